"""SkipInit as native NNX modules; networks go through `flax.nnx.bridge`.

`nnx.bridge.ToNNX(WideResNet(...), rngs=nnx.Rngs(0)).lazy_init(images,
train=False)` makes an NNX module of a whole network. Import this module by
name, as `import skipinit_jax` doesn't.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from skipinit_jax.models.checks import check_branch, check_scalar
from skipinit_jax.models.precision import widen


class SkipInit(nnx.Module):
  """Scales a residual branch by one learnable scalar (De & Smith 2020, sec. 4).

  The NNX form of `skipinit_jax.SkipInit`. If the branch ends in a linear layer
  or a convolution, `SkipInitLinear` and `SkipInitConv` compute the same
  function without keeping the branch's output for the gradient of the scalar.

  Args:
    init_value: alpha at initialization; 0 or at most 1/sqrt(number of blocks).
    param_dtype: dtype of alpha, an `nnx.Param` of shape ().

  Raises:
    InputError: an `init_value` that is no number, or a branch of integers.

  >>> scale = SkipInit(0.5)
  >>> float(scale(jnp.ones(3)).sum())
  1.5
  """

  def __init__(
    self, init_value: float = 0.0, *, param_dtype: Dtype = jnp.float32
  ):
    check_scalar('init_value', init_value)
    self.alpha = nnx.Param(jnp.asarray(init_value, param_dtype))

  def __call__(self, branch: jax.Array) -> jax.Array:
    """Returns alpha * branch, with the shape and dtype of `branch`."""
    check_branch(branch)
    alpha = widen(self.alpha[...])
    return (alpha * widen(branch)).astype(branch.dtype)


class _Folded:
  """A layer whose kernel and bias are multiplied by a scalar `alpha`.

  NNX's layers pass (inputs, kernel, bias) to `promote_dtype` before they
  compute. There they are multiplied in `param_dtype`, as in `skipinit.py`, and
  the bias stays in float32 or wider, as in `precision.py`.
  """

  dtype: Dtype | None
  param_dtype: Dtype

  def __init__(self, *args: Any, init_value: float = 0.0, **kwargs: Any):
    check_scalar('init_value', init_value)
    super().__init__(*args, **kwargs)
    self.alpha = nnx.Param(jnp.asarray(init_value, self.param_dtype))

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns alpha times the layer's output, in its compute dtype."""
    dtype = self.dtype or jnp.result_type(inputs, self.param_dtype)
    layer: Any = super()
    return layer.__call__(inputs).astype(dtype)

  @property
  def promote_dtype(self) -> Callable[..., Any]:
    """The layer's function, applied to inputs, alpha * kernel, alpha * bias."""

    def promote(arrays: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
      inputs, *params = arrays
      alpha = self.alpha[...]
      kernel, bias = (None if p is None else alpha * p for p in params)
      promoted = self._promote_dtype((inputs, kernel, bias), **kwargs)
      wide = None if bias is None else widen(bias)
      return (*promoted[:2], wide)

    return promote

  @promote_dtype.setter
  def promote_dtype(self, function: Callable[..., Any]) -> None:
    self._promote_dtype = function


def _signature(layer: type) -> inspect.Signature:
  """A layer's arguments, and `init_value`: what editors and `help` show."""
  _, *others = inspect.signature(layer.__init__).parameters.values()
  value = inspect.Parameter(
    'init_value', inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float
  )
  return inspect.Signature([*others, value])


class SkipInitLinear(_Folded, nnx.Linear):
  """`nnx.Linear` times a learnable scalar: the best end of a residual branch.

  Equal to `SkipInit(init_value)(nnx.Linear(...)(x))` in function and gradients,
  with the scalar folded into the kernel and the bias. Takes every argument of
  `nnx.Linear`, and `init_value`. Parameters: `kernel`, `bias` and `alpha`,
  shape (), all of `param_dtype`.

  >>> x = jnp.ones((2, 5))
  >>> layer = SkipInitLinear(5, 5, rngs=nnx.Rngs(0))
  >>> bool((x + layer(x) == x).all())  # alpha starts at 0
  True
  """

  __signature__ = _signature(nnx.Linear)


class SkipInitConv(_Folded, nnx.Conv):
  """`nnx.Conv` times a learnable scalar, folded as in `SkipInitLinear`."""

  __signature__ = _signature(nnx.Conv)

"""SkipInit: one learnable scalar at the end of every residual branch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError
from skipinit_jax.models.checks import check_branch, check_scalar
from skipinit_jax.models.precision import Conv, Dense, widen
from skipinit_jax.models.standardization import StandardizedConv


class SkipInit(nn.Module):
  """Scales a residual branch by one learnable scalar (De & Smith 2020, sec. 4).

  Write `x + SkipInit()(branch)`. If the branch ends in a convolution or a dense
  layer, `SkipInitConv` and `SkipInitDense` compute the same function without
  keeping the branch's output for the gradient of the scalar.

  Attributes:
    init_value: alpha at initialization; 0 or at most 1/sqrt(number of blocks).
    param_dtype: dtype of alpha.

  >>> import jax, jax.numpy as jnp
  >>> branch = jnp.ones((2, 8, 8, 3))
  >>> variables = SkipInit(init_value=0.5).init(jax.random.key(0), branch)
  >>> float(variables['params']['alpha'])
  0.5
  """

  init_value: float = 0.0
  param_dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, branch: jax.Array) -> jax.Array:
    """Returns alpha * branch, with the shape and dtype of `branch`.

    Raises:
      InputError: a branch of integers, or an `init_value` that is no number.
    """
    check_branch(branch)
    check_scalar('init_value', self.init_value)
    init = nn.initializers.constant(self.init_value)
    alpha = self.param('alpha', init, (), self.param_dtype)
    return (widen(alpha) * widen(branch)).astype(branch.dtype)


class _Folded(nn.Module):
  """A layer whose kernel and bias are multiplied by a scalar `alpha`.

  alpha * (conv(x, K) + b) = conv(x, alpha K) + alpha b. The product is taken in
  `param_dtype`, before the layer casts to its compute dtype, and the gradient
  of alpha is <dL/d(alpha K), K> + <dL/d(alpha b), b>: no activation is kept for
  it.
  """

  init_value: float = 0.0
  param_dtype: Dtype = jnp.float32

  @nn.nowrap
  def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
    value = super().param(name, *args, **kwargs)
    if name == 'kernel':  # Flax's layers ask for the kernel first.
      check_scalar('init_value', self.init_value)
      init = nn.initializers.constant(self.init_value)
      alpha = super().param('alpha', init, (), self.param_dtype)
    else:
      alpha = self.get_variable('params', 'alpha')
    return alpha * value


class SkipInitConv(_Folded, Conv):
  """`nn.Conv` times a learnable scalar: the best end of a residual branch.

  Equal to `SkipInit(init_value)(nn.Conv(...)(x))` in function and gradients,
  with the scalar folded into the kernel and the bias. Takes every argument of
  `nn.Conv`, and `init_value`. Parameters: `kernel`, `bias` and `alpha`, shape
  (), all of `param_dtype`.

  >>> import jax, jax.numpy as jnp
  >>> layer = SkipInitConv(8, (3, 3))
  >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
  >>> sorted(variables['params'])
  ['alpha', 'bias', 'kernel']
  """


class StandardizedSkipInitConv(_Folded, StandardizedConv):
  """`StandardizedConv` times a scalar, folded as in `SkipInitConv`."""


class SkipInitDense(_Folded, Dense):
  """`nn.Dense` times a learnable scalar, folded as in `SkipInitConv`.

  >>> import jax, jax.numpy as jnp
  >>> x = jnp.ones((2, 5))
  >>> layer = SkipInitDense(5)
  >>> variables = layer.init(jax.random.key(0), x)
  >>> bool((x + layer.apply(variables, x) == x).all())  # alpha starts at 0
  True
  """


class Join(nn.Module):
  """Adds a skip path and a residual branch: the end of every block here.

  As a module it lets `nn.intercept_methods` see both paths of any network of
  this package.

  Attributes:
    gain: factor on the sum, 1/sqrt(2) for `divide_sqrt2`.
  """

  gain: float = 1.0

  @nn.compact
  def __call__(self, skip: jax.Array, branch: jax.Array) -> jax.Array:
    """Returns gain * (skip + branch), both of one shape.

    Raises:
      InputError: two different shapes.
    """
    if skip.shape != branch.shape:
      raise InputError(
        f'skip path {skip.shape} and residual branch {branch.shape} must have '
        'the same shape to be added'
      )
    total = skip + branch
    return total if self.gain == 1.0 else self.gain * total

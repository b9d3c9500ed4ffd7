"""The methods: normalization, scalars, initialization and rates of each."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from flax import linen as nn

from skipinit_jax.errors import InputError, shown, unknown

Initializer = Callable[..., jax.Array]
Fan = Literal['fan_in', 'fan_out']

# Fields that change variances which standardized kernels and betas expect.
_NOT_STANDARDIZED = (
  'normalize',
  'gain',
  'fixup_block',
  'scalar_biases',
  'rescale',
  'zero_last',
)


@dataclasses.dataclass(frozen=True)
class Method:
  """One method; networks read these fields, never the name.

  Attributes:
    normalize: batch normalization in every residual branch.
    alpha: initial value of the learnable scalar at the end of every branch, a
      number or '1/sqrt(d)' for d residual blocks; None for no scalar.
    gain: factor on the output of every block, skip path included.
    fixup_block: use Fixup's post-activation block instead of the
      pre-activation block.
    scalar_biases: add Fixup's scalar bias before each layer and activation.
    kernel_fan: the fan of He's initialization, 'fan_in' or 'fan_out'.
    rescale: multiply the standard deviation of the kernels inside a branch by
      d^(-1/(2m-2)), for branches of m layers (Fixup's second rule).
    zero_last: start the last kernel of every branch at zero (Fixup's first).
    zero_classifier: start the classifier at zero, unless the network has a
      `classifier_init`.
    reduced_rate: learning rate of all parameters except kernels, as a share of
      the recipe's rate before that is scaled with the batch; None: the same.
    standardize: normalizer-free blocks (Brock, De, Smith 2021): standardized
      kernels with gains, see `StandardizedConv`; a bias on every convolution;
      ReLU times 1.714, which keeps the variance; and a branch whose input is
      divided by its expected standard deviation, see `betas`.
    branch_scale: factor on every branch beside alpha, the authors' alpha; only
      with `standardize`.
    classifier_std: standard deviation of the classifier's kernel at
      initialization, unless the network has a `classifier_init`; None: He's.
  """

  normalize: bool = False
  alpha: float | str | None = None
  gain: float = 1.0
  fixup_block: bool = False
  scalar_biases: bool = False
  kernel_fan: Fan = 'fan_in'
  rescale: bool = False
  zero_last: bool = False
  zero_classifier: bool = False
  reduced_rate: float | None = None
  standardize: bool = False
  branch_scale: float = 1.0
  classifier_std: float | None = None

  def alpha_value(self, num_blocks: int) -> float | None:
    """Returns the scalar's initial value for `num_blocks` blocks, or None.

    Raises:
      InputError: an `alpha` that is neither finite nor '1/sqrt(d)'.
    """
    if self.alpha is None:
      return None
    if isinstance(self.alpha, str) and self.alpha == '1/sqrt(d)':
      return num_blocks**-0.5
    try:
      value = float(self.alpha)
    except (TypeError, ValueError):
      value = math.nan
    if not math.isfinite(value):
      raise InputError(
        f"alpha={shown(self.alpha)}: expected a finite number or '1/sqrt(d)'"
      )
    return value

  def betas(self, stage_sizes: Sequence[int]) -> list[list[float] | None]:
    """Factors on the inputs of all branches and projections, stage by stage.

    1 over the standard deviation that an input has at alpha = 1, if the stem's
    output has 1: block i of a stage adds branch_scale^2 to the variance, which
    its first block sets back to 1, as in the authors' code. None without
    `standardize`.

    >>> Method(standardize=True, branch_scale=0.75).betas((1, 2))
    [[1.0], [0.8, 0.8]]
    """
    betas: list[list[float] | None] = []
    std = 1.0
    for size in stage_sizes:
      stage: list[float] = []
      for block in range(size):
        stage.append(1 / std)
        std = math.hypot(std if block else 1.0, self.branch_scale)
      betas.append(stage if self.standardize else None)
    return betas

  def check(self, num_blocks: int) -> None:
    """Raises InputError for fields that contradict each other."""
    self._check_standardize()
    if self.scalar_biases and not self.fixup_block:
      raise InputError(
        'scalar_biases=True is for fixup_block=True, whose block adds them; '
        "expected scalar_biases=False, or the parts of method 'fixup'"
      )
    if self.alpha_value(num_blocks) == 0 and self.zero_last:
      raise InputError(
        f'alpha={shown(self.alpha)} with zero_last=True: each keeps the '
        "other's gradient at zero; expected another alpha, such as 1, or "
        'zero_last=False'
      )

  def _check_standardize(self) -> None:
    scale = self.branch_scale
    if not self.standardize:
      if scale != 1:
        raise InputError(
          f'branch_scale={shown(scale)} is for standardize=True, whose blocks '
          'expect the variance that it adds; expected 1'
        )
      return
    good = isinstance(scale, numbers.Real) and math.isfinite(scale)
    if not good or not scale > 0:
      raise InputError(
        f'branch_scale={shown(scale)}: expected a positive, finite number'
      )
    for name in _NOT_STANDARDIZED:
      value, default = getattr(self, name), getattr(Method(), name)
      if value != default:
        raise InputError(
          f'{name}={shown(value)} with standardize=True, as in method nf, '
          'whose blocks expect the variance of their own layers: expected '
          f'{name}={default}, or another method'
        )


METHODS: dict[str, Method] = {
  'batchnorm': Method(normalize=True),
  # De & Smith 2020: alpha at 0, or at most 1/sqrt(d).
  'skipinit': Method(alpha=0.0),
  # Zhang, Dauphin, Ma 2019. Rates as in the authors' code: a tenth for the
  # multipliers and for every bias, the classifier's included. Our choice: the
  # stem is He-initialized like the projections. Theirs keeps PyTorch's default,
  # a variance of 1/(3 fan_in) instead of 2/fan_out: .89 of ours for 3x3 kernels
  # from 3 to 16 channels, 3.6 times ours for 7x7 kernels from 3 to 64.
  'fixup': Method(
    alpha=1.0,
    fixup_block=True,
    scalar_biases=True,
    kernel_fan='fan_out',
    rescale=True,
    zero_last=True,
    zero_classifier=True,
    reduced_rate=0.1,
  ),
  # De & Smith 2020, table 2: the whole block divided by sqrt(2).
  'divide_sqrt2': Method(gain=2**-0.5),
  # Brock, De, Smith 2021, as in their code: deepmind-research, nfnets.
  'nf': Method(
    alpha=0.0, standardize=True, branch_scale=0.2, classifier_std=0.01
  ),
  'none': Method(),
}


def resolve_method(
  method: str | Method, alpha: float | str | None = None
) -> Method:
  """Looks up a method, and overrides the initial value of its scalar.

  Args:
    method: a name in `METHODS`, or a `Method`.
    alpha: a number or '1/sqrt(d)'; 'none' removes the scalar; None keeps the
      method's own.

  Raises:
    InputError: an unknown name, or an `alpha` for a method without one.
  """
  if not isinstance(method, Method):
    if not isinstance(method, str) or method not in METHODS:
      raise InputError(unknown('method', method, METHODS))
    name, method = f'method {method!r}', METHODS[method]
  else:
    name = 'this method'
  if alpha is None:
    return method
  if isinstance(alpha, str) and alpha == 'none':
    return dataclasses.replace(method, alpha=None)
  if method.alpha is None:
    having = ' or '.join(n for n, m in METHODS.items() if m.alpha is not None)
    raise InputError(
      f'alpha={shown(alpha)} was given, but {name} has no such scalar; '
      f'expected {having}, or no alpha'
    )
  return dataclasses.replace(method, alpha=alpha)


def he_normal(fan: Fan = 'fan_in') -> Initializer:
  """He's initialization: normal, of variance 2 / fan (He et al. 2015)."""
  return nn.initializers.variance_scaling(2.0, fan, 'normal')


def fixup_kernel_init(
  num_branches: int, branch_layers: int, fan: Fan = 'fan_out'
) -> Initializer:
  """Fixup's second rule, for all kernels of a branch except the last.

  He's initialization with its standard deviation times L^(-1/(2m-2)), for L
  branches of m layers each (Zhang, Dauphin, Ma 2019, algorithm, step 2).

  Raises:
    InputError: no branch, or branches of fewer than two layers.
  """
  if num_branches < 1 or branch_layers < 2:
    raise InputError(
      f'Fixup needs at least one branch of at least two layers, got '
      f'num_branches={num_branches}, branch_layers={branch_layers}'
    )
  variance = 2.0 * num_branches ** (-1 / (branch_layers - 1))
  return nn.initializers.variance_scaling(variance, fan, 'normal')

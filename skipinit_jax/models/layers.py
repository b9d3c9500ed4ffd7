"""The layers that a method puts into the blocks of a network."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
from flax.typing import Dtype

from skipinit_jax.models.activations import ACTIVATIONS, Activation, scaled_relu
from skipinit_jax.models.checks import check_choices, check_floating_dtype
from skipinit_jax.models.convolution import convolve
from skipinit_jax.models.looks_linear import kernel_initializer, orthogonal
from skipinit_jax.models.methods import Method, fixup_kernel_init, he_normal
from skipinit_jax.models.normalization import BatchNorm
from skipinit_jax.models.precision import Conv, ScalarBias
from skipinit_jax.models.skipinit import (
  Join,
  SkipInitConv,
  StandardizedSkipInitConv,
)
from skipinit_jax.models.standardization import StandardizedConv

Layer = TypeVar('Layer', bound=nn.Module)
Norm = Callable[..., jax.Array]


class Layers(NamedTuple):
  """The layers of a network's blocks; every field but two makes a module.

  Attributes:
    conv: convolutions outside the branches: the projections.
    branch_conv: all convolutions of a branch except the last.
    last_conv: the last convolution of a branch, times alpha if there is one.
    norm: called as norm(name)(x, train=train).
    join: called as join()(skip, branch).
    scalar_bias: called as scalar_bias(name)(x).
    stem_conv: the first convolution, whose input follows no activation.
    activation: of the pre-activation block; may double the channels.
    skip: whether blocks have a skip path; if not, they are their branches.
  """

  conv: Callable[..., Conv]
  branch_conv: Callable[..., Conv]
  last_conv: Callable[..., Conv]
  norm: Callable[[str], Norm]
  join: Callable[[], Join]
  scalar_bias: Callable[[str], Activation]
  stem_conv: Callable[..., Conv]
  activation: Activation
  skip: bool


def make_layers(
  method: Method,
  *,
  num_blocks: int,
  branch_layers: int,
  biases: bool = False,
  statistics_group: int | None = None,
  axis_name: str | None = None,
  dtype: Dtype | None = None,
  param_dtype: Dtype = 'float32',
  activation: str = 'relu',
  kernel_init: str = 'he',
  skip: bool = True,
  symmetric_padding: bool = False,
  stem_bias: bool = False,
) -> Layers:
  """Makes the layers of the blocks of a network.

  Args:
    method: decides on normalization, scalars and initialization.
    num_blocks: residual blocks in the network, d in 1/sqrt(d).
    branch_layers: convolutions in a branch.
    biases: see `ResNet`, like all that follow.

  Raises:
    InputError: choices that exclude each other; see `ResNet`.
  """
  check_choices(method, num_blocks, activation, kernel_init, skip)
  check_floating_dtype('dtype', dtype)
  check_floating_dtype('param_dtype', param_dtype)
  normal = he_normal(method.kernel_fan)
  if method.standardize:
    # As its authors: the size of a kernel decides only how far a step turns it.
    normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  outer = kernel_initializer(kernel_init, normal)
  # The stem's input is not mirrored.
  first = orthogonal() if kernel_init == 'looks_linear' else outer
  inner = outer
  if method.rescale:
    inner = fixup_kernel_init(num_blocks, branch_layers, method.kernel_fan)

  plain, scaled = Conv, SkipInitConv
  if method.standardize:
    plain, scaled = StandardizedConv, StandardizedSkipInitConv
  conv = functools.partial(
    plain,
    use_bias=biases or method.standardize,
    kernel_init=outer,
    conv_general_dilated=functools.partial(
      convolve, symmetric=symmetric_padding
    ),
    dtype=dtype,
    param_dtype=param_dtype,
  )
  return Layers(
    conv=conv,
    branch_conv=functools.partial(conv, kernel_init=inner),
    last_conv=last_layer(method, num_blocks, conv, scaled),
    norm=make_norm(
      method,
      group=statistics_group,
      axis_name=axis_name,
      dtype=dtype,
      param_dtype=param_dtype,
    ),
    join=functools.partial(Join, gain=method.gain, name='join'),
    scalar_bias=make_scalar_bias(method, param_dtype),
    stem_conv=functools.partial(
      conv, kernel_init=first, use_bias=stem_bias or method.standardize
    ),
    activation=scaled_relu if method.standardize else ACTIVATIONS[activation],
    skip=skip,
  )


def last_layer(
  method: Method,
  num_blocks: int,
  layer: functools.partial[Layer],
  scaled: Callable[..., Layer],
) -> functools.partial[Layer]:
  """Returns the factory of the layer that ends a branch.

  `layer` makes the other layers of the branch; `scaled` makes such layers with
  a scalar.
  """
  alpha = method.alpha_value(num_blocks)
  if alpha is not None:
    layer = functools.partial(scaled, init_value=alpha, **layer.keywords)
  if method.branch_scale != 1.0:
    layer = functools.partial(layer, scale=method.branch_scale)
  if method.zero_last:
    layer = functools.partial(layer, kernel_init=nn.initializers.zeros)
  return layer


def make_norm(method: Method, **fields: Any) -> Callable[[str], Norm]:
  """Returns the factory, by name, of a `BatchNorm` or of the identity."""
  if method.normalize:
    return lambda name: BatchNorm(**fields, name=name)
  return lambda name: _identity


def make_scalar_bias(
  method: Method, param_dtype: Dtype
) -> Callable[[str], Activation]:
  """Returns the factory, by name, of a `ScalarBias` or of the identity."""
  if method.scalar_biases:
    return lambda name: ScalarBias(param_dtype, name=name)
  return lambda name: _identity


def _identity(x: jax.Array, train: bool = False) -> jax.Array:
  return x

"""The layers that a method puts into the blocks of a network."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
from flax.typing import Dtype

from skipinit_jax.models.activations import ACTIVATIONS
from skipinit_jax.models.checks import check_choices, check_floating_dtype
from skipinit_jax.models.convolution import convolve
from skipinit_jax.models.looks_linear import kernel_initializer, orthogonal
from skipinit_jax.models.methods import (
  Initializer,
  Method,
  fixup_kernel_init,
  he_normal,
)
from skipinit_jax.models.normalization import BatchNorm
from skipinit_jax.models.precision import Conv, ScalarBias
from skipinit_jax.models.skipinit import Join, SkipInitConv


class Layers(NamedTuple):
  """What a method puts into a block; each entry makes a module given a name.

  Attributes:
    conv: convolutions outside the branches: the projections.
    branch_conv: convolutions inside a branch but its last.
    last_conv: the last convolution of a branch, with alpha folded in if any.
    norm: called as norm(name)(x, train=train).
    join: called as join()(skip, branch).
    scalar_bias: called as scalar_bias(name)(x).
    stem_conv: the first convolution, whose input comes from no activation.
    activation: of the pre-activation block; may double the channels.
    skip: whether blocks have a skip path; without, they are their branches.
  """

  conv: Callable
  branch_conv: Callable
  last_conv: Callable
  norm: Callable
  join: Callable
  scalar_bias: Callable
  stem_conv: Callable
  activation: Callable
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
) -> Layers:
  """Turns what a method says into the layers of a network's blocks.

  Raises:
    InputError: choices that don't go together; see `ResNet`.
  """
  check_choices(method, num_blocks, activation, kernel_init, skip)
  check_floating_dtype('dtype', dtype)
  check_floating_dtype('param_dtype', param_dtype)
  dtypes = {'dtype': dtype, 'param_dtype': param_dtype}
  outer = kernel_initializer(kernel_init, he_normal(method.kernel_fan))
  # The stem's input is not mirrored.
  first = orthogonal() if kernel_init == 'looks_linear' else outer
  inner: Initializer = outer
  if method.rescale:
    inner = fixup_kernel_init(num_blocks, branch_layers, method.kernel_fan)
  last = nn.initializers.zeros if method.zero_last else outer

  conv = functools.partial(
    Conv,
    use_bias=biases,
    conv_general_dilated=functools.partial(
      convolve, symmetric=symmetric_padding
    ),
    **dtypes,
  )
  alpha = method.alpha_value(num_blocks)
  if alpha is None:
    last_conv = conv
  else:
    last_conv = functools.partial(
      SkipInitConv, init_value=alpha, **conv.keywords
    )
  norm = functools.partial(
    BatchNorm, group=statistics_group, axis_name=axis_name, **dtypes
  )
  return Layers(
    conv=functools.partial(conv, kernel_init=outer),
    branch_conv=functools.partial(conv, kernel_init=inner),
    last_conv=functools.partial(last_conv, kernel_init=last),
    norm=(lambda name: norm(name=name)) if method.normalize else _no_norm,
    join=functools.partial(Join, gain=method.gain, name='join'),
    scalar_bias=(
      (lambda name: ScalarBias(param_dtype, name=name))
      if method.scalar_biases
      else _no_bias
    ),
    stem_conv=functools.partial(conv, kernel_init=first, use_bias=False),
    activation=ACTIVATIONS[activation],
    skip=skip,
  )


def _no_norm(name: str) -> Callable:
  return lambda x, train: x


def _no_bias(name: str) -> Callable:
  return lambda x: x

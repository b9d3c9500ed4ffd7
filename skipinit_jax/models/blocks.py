"""The two residual blocks: pre-activation (ResNet V2) and Fixup's."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.models.checks import check_floating_dtype
from skipinit_jax.models.layers import Conv, widen
from skipinit_jax.models.looks_linear import (
  KERNEL_INITS,
  kernel_initializer,
  orthogonal,
)
from skipinit_jax.models.methods import (
  Initializer,
  Method,
  fixup_kernel_init,
  he_normal,
)
from skipinit_jax.models.normalization import BatchNorm
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

  convolve = functools.partial(_convolve, symmetric=symmetric_padding)
  conv = functools.partial(
    Conv, use_bias=biases, conv_general_dilated=convolve, **dtypes
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


class ResidualBlock(nn.Module):
  """Pre-activation residual block (He et al. 2016), basic or bottleneck.

  branch: [norm, relu, conv] for each kernel size, the last conv carrying the
  scalar. A block that changes the shape projects the activated (and, with
  batch normalization, normalized) input with a 1x1 convolution; the scalar sits
  on its branch too. Without a skip path there is no projection and no `Join`.

  Attributes:
    features: output channels of each convolution of the branch.
    kernel_sizes: of the same length; the stride is on the first 3.
    strides: of the block.
    layers: what the method puts in, see `make_layers`.
  """

  features: Sequence[int]
  kernel_sizes: Sequence[int]
  strides: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: (batch, height, width, channels)."""
    layers, depth = self.layers, len(self.features)
    strides = _branch_strides(self.kernel_sizes, self.strides)
    projects = layers.skip and _changes_shape(
      x, self.features[-1], self.strides
    )
    skip = x
    for i, (features, size) in enumerate(
      zip(self.features, self.kernel_sizes, strict=True), start=1
    ):
      x = layers.activation(layers.norm(f'norm{i}')(x, train=train))
      if i == 1 and projects:
        skip = layers.conv(
          self.features[-1], (1, 1), self.strides, name='projection'
        )(x)
      conv = layers.last_conv if i == depth else layers.branch_conv
      x = conv(features, (size, size), strides[i - 1], name=f'conv{i}')(x)
    return layers.join()(skip, x) if layers.skip else x


class FixupBlock(nn.Module):
  """Fixup's post-activation block (Zhang, Dauphin, Ma 2019, and their code).

  relu(shortcut(x + b1a) + alpha conv2(relu(conv1(x + b1a) + b1b) + b2a) + b2b)
  and the same with three convolutions. The multiplier is `alpha`, at 1.

  Attributes:
    pooled_shortcut: where the shape changes, subsample and pad the channels by
      zeros (the authors' CIFAR networks) in place of a 1x1 convolution.
    features, kernel_sizes, strides, layers: as in `ResidualBlock`.
  """

  features: Sequence[int]
  kernel_sizes: Sequence[int]
  strides: int
  layers: Layers
  pooled_shortcut: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: (batch, height, width, channels)."""
    layers, depth, out = self.layers, len(self.features), self.features[-1]
    strides = _branch_strides(self.kernel_sizes, self.strides)
    skip = x
    for i, (features, size) in enumerate(
      zip(self.features, self.kernel_sizes, strict=True), start=1
    ):
      if i > 1:
        x = relu(layers.norm(f'norm{i - 1}')(x, train=train))
      x = layers.scalar_bias(f'bias{i}a')(x)
      if i == 1 and _changes_shape(skip, out, self.strides):
        if self.pooled_shortcut:
          skip = _subsample_and_pad(x, out, self.strides)
        else:
          skip = layers.conv(out, (1, 1), self.strides, name='projection')(x)
      conv = layers.last_conv if i == depth else layers.branch_conv
      x = conv(features, (size, size), strides[i - 1], name=f'conv{i}')(x)
      x = layers.scalar_bias(f'bias{i}b')(x)
    x = layers.norm(f'norm{depth}')(x, train=train)
    return relu(layers.join()(skip, x))


class ScalarBias(nn.Module):
  """Adds one learnable scalar, `scalar_bias`, to all of its input (Fixup)."""

  param_dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x + scalar_bias, with the shape and dtype of x."""
    bias = self.param(
      'scalar_bias', nn.initializers.zeros, (), self.param_dtype
    )
    return (widen(x) + widen(bias)).astype(x.dtype)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose derivative is read from its output, not from its input.

  The next convolution keeps that output anyway; see `stages.keep`.
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = relu(*primals)
  return y, jnp.where(y > 0, *tangents, jnp.zeros_like(y))


def crelu(x: jax.Array) -> jax.Array:
  """Concatenated ReLU: max(x, 0), then max(-x, 0), twice the channels."""
  return relu(jnp.concatenate([x, -x], axis=-1))


ACTIVATIONS = {'relu': relu, 'crelu': crelu}


def check_choices(
  method: Method, num_blocks: int, activation: str, kernel_init: str, skip: bool
) -> None:
  """Raises InputError for what has no meaning, or no signal at the start."""
  method.check(num_blocks)
  if activation not in ACTIVATIONS:
    raise InputError(unknown('activation', activation, ACTIVATIONS))
  if kernel_init not in KERNEL_INITS:
    raise InputError(unknown('kernel_init', kernel_init, KERNEL_INITS))
  if kernel_init == 'looks_linear' and activation != 'crelu':
    raise InputError(
      f"kernel_init='looks_linear' mirrors kernels for activation='crelu', got "
      f'activation={activation!r}'
    )
  if kernel_init != 'he' and method.rescale:
    raise InputError(
      f"kernel_init={kernel_init!r} can't be rescaled by the depth; expected "
      "'he', or a method other than fixup"
    )
  if method.fixup_block and activation != 'relu':
    raise InputError(
      f'activation={activation!r} doubles the channels, which blocks that '
      "activate their sum can't: expected 'relu', or a method other than fixup"
    )
  dead = method.zero_last or method.alpha_value(num_blocks) == 0
  if not skip and (method.fixup_block or method.gain != 1 or dead):
    raise InputError(
      'skip=False leaves the branches alone, so that these must carry the '
      "signal from the start: expected method 'none' or 'batchnorm', or "
      "'skipinit' with an alpha other than 0"
    )


def _no_norm(name: str) -> Callable:
  return lambda x, train: x


def _no_bias(name: str) -> Callable:
  return lambda x: x


def _branch_strides(kernel_sizes: Sequence[int], strides: int) -> list[int]:
  first = list(kernel_sizes).index(3)
  return [strides if i == first else 1 for i in range(len(kernel_sizes))]


def _changes_shape(x: jax.Array, features: int, strides: int) -> bool:
  return strides != 1 or x.shape[-1] != features


def _subsample_and_pad(x: jax.Array, features: int, strides: int) -> jax.Array:
  x = x[:, ::strides, ::strides]
  if features < x.shape[-1]:
    raise InputError(
      f'features={features}: a pooled shortcut pads channels, it has '
      f'{x.shape[-1]} already; expected so many or more'
    )
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def _convolve(x, kernel, strides, padding, *, symmetric=False, **kwargs):
  """`lax.conv_general_dilated`, but for 3x3 kernels on 2x2 images on a CPU.

  With `symmetric` the padding is half of the kernel's size, on both sides.
  """
  if symmetric:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]

  def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

  if (*x.shape[1:3], *kernel.shape[:2], *strides) == (2, 2, 3, 3, 1, 1):
    return jax.lax.platform_dependent(
      x, kernel, cpu=_convolve_2x2, default=convolution
    )
  return convolution(x, kernel)


def _convolve_2x2(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 3x3 'SAME' convolution of 2x2 images as one matrix product.

  Output pixel (p, q) reads input pixel (i, j) through tap (i - p + 1,
  j - q + 1). XLA's CPU convolution takes 5 to 10 times as long at this size.
  """
  taps = [kernel[1 - p : 3 - p, 1 - q : 3 - q] for p in (0, 1) for q in (0, 1)]
  matrix = jnp.concatenate([t.reshape(-1, t.shape[-1]) for t in taps], axis=-1)
  return (x.reshape(x.shape[0], -1) @ matrix).reshape(*x.shape[:3], -1)

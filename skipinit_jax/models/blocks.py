"""The two residual blocks: pre-activation (ResNet V2) and Fixup's."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from skipinit_jax.errors import InputError
from skipinit_jax.models.activations import relu, times
from skipinit_jax.models.layers import Layers


class ResidualBlock(nn.Module):
  """Pre-activation residual block (He et al. 2016), basic or bottleneck.

  The branch is [norm, activation, conv] for each kernel size; the last conv has
  the scalar. A block that changes the shape projects its activated (and, with
  batch normalization, normalized) input with a 1x1 convolution; the scalar is
  on the branch there too. Without a skip path there is no projection and no
  `Join`.

  With `beta` the branch and the projection get beta times the input (Brock, De,
  Smith 2021); the skip path, where it is the identity, does not.

  Attributes:
    features: output channels of each convolution of the branch.
    kernel_sizes: one for each convolution; the first 3x3 has the stride.
    strides: of the block.
    layers: see `make_layers`.
  """

  features: Sequence[int]
  kernel_sizes: Sequence[int]
  strides: int
  layers: Layers

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    train: bool,
    beta: jax.Array | float | None = None,
  ) -> jax.Array:
    """Maps (batch, height, width, channels) to the same, strided."""
    layers, depth = self.layers, len(self.features)
    strides = _branch_strides(self.kernel_sizes, self.strides)
    projects = layers.skip and _changes_shape(
      x, self.features[-1], self.strides
    )
    skip = x
    if beta is not None:
      x = times(x, beta)
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
  and the same with three convolutions. Its multiplier is `alpha`, 1 at first.

  Attributes:
    features, kernel_sizes, strides, layers: as in `ResidualBlock`.
    pooled_shortcut: where the shape changes, subsample and pad the channels
      with zeros (the authors' CIFAR networks) instead of a 1x1 convolution.
  """

  features: Sequence[int]
  kernel_sizes: Sequence[int]
  strides: int
  layers: Layers
  pooled_shortcut: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (batch, height, width, channels) to the same, strided.

    Raises:
      InputError: a pooled shortcut to fewer channels.
    """
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


def _branch_strides(kernel_sizes: Sequence[int], strides: int) -> list[int]:
  first = list(kernel_sizes).index(3)
  return [strides if i == first else 1 for i in range(len(kernel_sizes))]


def _changes_shape(x: jax.Array, features: int, strides: int) -> bool:
  return strides != 1 or x.shape[-1] != features


def _subsample_and_pad(x: jax.Array, features: int, strides: int) -> jax.Array:
  x = x[:, ::strides, ::strides]
  channels = x.shape[-1]
  if features < channels:
    raise InputError(
      f'features={features}: a pooled shortcut only adds channels; expected '
      f'{channels} or more, as in its input'
    )
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - channels)))

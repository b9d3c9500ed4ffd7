"""Residual networks: ResNet V2 of any size, and Wide-ResNets."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError, shown
from skipinit_jax.models.activations import relu
from skipinit_jax.models.blocks import FixupBlock, ResidualBlock
from skipinit_jax.models.checks import check_inputs, check_whole, is_whole
from skipinit_jax.models.layers import make_layers
from skipinit_jax.models.looks_linear import kernel_initializer
from skipinit_jax.models.methods import (
  Initializer,
  Method,
  he_normal,
  resolve_method,
)
from skipinit_jax.models.pooling import max_pool
from skipinit_jax.models.precision import widen
from skipinit_jax.models.stages import Stage

KERNEL_SIZES = {False: (3, 3), True: (1, 3, 1)}


class ResNet(nn.Module):
  """A residual network without (or with) batch normalization.

  With `fixup` the blocks are its authors' post-activation blocks; with every
  other method they are the pre-activation blocks of ResNet V2 (He et al. 2016).
  Call `model.apply(variables, images, train=True, rngs={'dropout': key})`.

  Attributes:
    stage_sizes: residual blocks in each stage; every stage after the first
      halves the image and doubles the channels.
    bottleneck: branches of 1x1, 3x3, 1x1 convolutions with four times the
      channels at the end, instead of two 3x3 convolutions.
    num_classes: of the classifier; None returns the pooled features.
    method: a name in `METHODS`, or a `Method`.
    alpha: initial value of the scalar, a number or '1/sqrt(d)' for d residual
      blocks; None: the method's own.
    biases: bias vectors on every convolution except the stem. With `nf` there
      are always biases, the stem's included.
    dropout: rate of Dropout on the pooled features, before Fixup's last bias.
    classifier_init: of the classifier's kernel; None: zeros if the method has
      `zero_classifier`, normal if it has a `classifier_std`, otherwise as in
      `kernel_init`.
    features: channels of the first stage's 3x3 convolutions.
    stem_features: channels of the stem.
    small_images: a 3x3 stem, and Fixup's CIFAR shortcuts, instead of a 7x7 stem
      of stride 2 with a max-pool.
    activation: of the pre-activation blocks, 'relu', or 'crelu': concatenated
      ReLU, which doubles the inputs of the next layer.
    kernel_init: 'he' with the method's fan, 'orthogonal', or 'looks_linear' for
      'crelu'; see `looks_linear`.
    skip: False: a feed-forward network of the same layers, without skip paths.
    symmetric_padding: pad strided layers equally on both sides, as PyTorch
      does; 'SAME' pads even sizes by one less at the top and left.
    stem_bias: a bias vector on the stem too, as `fold` makes of `nf`.
    scan: run the equal blocks of a stage as one scanned block; see `stages`.
    remat: recompute blocks in the backward pass; see `stages`.
    statistics_group: images that share batch statistics; None: the whole batch
      of one call. Only for methods that normalize.
    axis_name: mapped axis over which to average batch statistics, or None.
    dtype: of the computation; None: that of images and parameters. The
      pooled features and the logits are at least float32.
    param_dtype: of the parameters.
  """

  stage_sizes: Sequence[int]
  bottleneck: bool = False
  num_classes: int | None = 1000
  method: str | Method = 'skipinit'
  alpha: float | str | None = None
  biases: bool = False
  dropout: float = 0.0
  classifier_init: Initializer | None = None
  features: int = 64
  stem_features: int = 64
  small_images: bool = False
  activation: str = 'relu'
  kernel_init: str = 'he'
  skip: bool = True
  symmetric_padding: bool = False
  stem_bias: bool = False
  scan: bool = False
  remat: bool = False
  statistics_group: int | None = None
  axis_name: str | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = 'float32'

  @property
  def num_blocks(self) -> int:
    """Residual blocks in the network, d in 1/sqrt(d)."""
    return sum(self.stage_sizes)

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool,
    first_example: jax.Array | int = 0,
  ) -> jax.Array:
    """Computes the logits.

    Args:
      images: (batch, height, width, channels), floating, normalized.
      train: use batch statistics and Dropout.
      first_example: index of images[0] in the whole batch. Dropout draws its
        masks by example, so splitting a batch over devices or into
        micro-batches changes nothing.

    Returns:
      Logits (batch, num_classes), or features (batch, channels) if num_classes
      is None; float32 unless the parameters are wider.

    Raises:
      InputError: images of another rank or dtype, without pixels, or whose 3
        or 1 channels come before a square; an unknown method or dtype,
        impossible sizes, parameters of a scanned network in an unrolled one or
        the reverse, or choices that exclude each other: 'crelu' or no skip
        paths with Fixup's blocks or `nf`; 'looks_linear' without 'crelu'; no
        skip paths where the branches start at zero; an alpha of 0 where the
        last kernels start at zero too.
    """
    self._check(images)
    method = resolve_method(self.method, self.alpha)
    kernel_sizes = KERNEL_SIZES[self.bottleneck]
    layers = make_layers(
      method,
      num_blocks=self.num_blocks,
      branch_layers=len(kernel_sizes),
      biases=self.biases,
      statistics_group=self.statistics_group,
      axis_name=self.axis_name,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      activation=self.activation,
      kernel_init=self.kernel_init,
      skip=self.skip,
      symmetric_padding=self.symmetric_padding,
      stem_bias=self.stem_bias,
    )
    block: Callable[..., nn.Module] = ResidualBlock
    if method.fixup_block:
      block = functools.partial(FixupBlock, pooled_shortcut=self.small_images)

    size, strides = (3, 1) if self.small_images else (7, 2)
    x = layers.stem_conv(
      self.stem_features, (size, size), strides, name='stem'
    )(images)
    if method.fixup_block:
      x = relu(layers.scalar_bias('bias1')(x))
    if not self.small_images:
      x = max_pool(x, symmetric=self.symmetric_padding)

    betas = method.betas(self.stage_sizes)
    for i, stage_size in enumerate(self.stage_sizes):
      width = self.features * 2**i
      out = (width, width, 4 * width) if self.bottleneck else (width, width)
      x = Stage(
        functools.partial(
          block, features=out, kernel_sizes=kernel_sizes, layers=layers
        ),
        size=stage_size,
        strides=1 if i == 0 else 2,
        scan=self.scan,
        remat=self.remat,
        betas=betas[i],
        name=f'stage{i + 1}',
      )(x, train=train)

    if not method.fixup_block:
      x = layers.activation(layers.norm('norm')(x, train=train))
    x = widen(x).mean((1, 2))
    if self.num_classes is not None and train and self.dropout > 0:
      x = drop_by_example(
        self.make_rng('dropout'), x, self.dropout, first_example
      )
    if method.fixup_block:
      x = layers.scalar_bias('bias2')(x)
    if self.num_classes is None:
      return x
    init = self.classifier_init
    if init is None:
      init = kernel_initializer(self.kernel_init, he_normal())
      if method.classifier_std is not None:
        init = nn.initializers.normal(method.classifier_std)
      if method.zero_classifier:
        init = nn.initializers.zeros
    return nn.Dense(
      self.num_classes,
      kernel_init=init,
      param_dtype=self.param_dtype,
      name='classifier',
    )(x)

  def _check(self, images: jax.Array) -> None:
    check_inputs('images', images, '(batch, height, width, channels)', rank=4)
    _, height, width, channels = images.shape
    if height in (1, 3) and width == channels > 4:
      raise InputError(
        f'images of shape {images.shape}: their channels come first; expected '
        '(batch, height, width, channels), as of images.transpose(0, 2, 3, 1)'
      )
    sizes = self.stage_sizes
    whole = isinstance(sizes, Sequence) and all(map(is_whole, sizes))
    if not whole or not sizes:
      raise InputError(
        f'stage_sizes={shown(sizes)}: expected a whole number of blocks, 1 or '
        'more, for each stage, as in (3, 4, 6, 3)'
      )
    if not isinstance(self.bottleneck, bool):
      raise InputError(
        f'bottleneck={shown(self.bottleneck)}: expected True or False'
      )
    check_whole('features', self.features)
    check_whole('stem_features', self.stem_features)
    for field in ('num_classes', 'statistics_group'):
      if (value := getattr(self, field)) is not None:
        check_whole(field, value)
    if not 0 <= self.dropout < 1:
      raise InputError(
        f'dropout={self.dropout} must be at least 0 and less than 1'
      )


def drop_by_example(
  key: jax.Array, x: jax.Array, rate: float, first_example: jax.Array | int
) -> jax.Array:
  """Dropout whose mask for example i depends on `key` and i alone.

  Args:
    key: scalar PRNG key.
    x: (batch, features).
    rate: share of features set to zero; the others are scaled by 1/(1-rate).
    first_example: the index i of x[0].
  """

  def keep(i: jax.Array) -> jax.Array:
    key_i = jax.random.fold_in(key, i)
    return jax.random.bernoulli(key_i, 1 - rate, x.shape[1:])

  mask = jax.vmap(keep)(first_example + jnp.arange(x.shape[0]))
  return jnp.where(mask, x / (1 - rate), 0)


def WideResNet(
  depth: int = 16, width: int = 4, num_classes: int | None = 10, **fields: Any
) -> ResNet:
  """The n-k Wide-ResNet of depth 6n+4 (Zagoruyko & Komodakis 2016).

  Three stages of (depth - 4) / 6 blocks with 16 k, 32 k and 64 k channels after
  a 3x3 stem of 16, for images of at least 8x8.

  Args:
    depth: 6n + 4 for n >= 1: 16, 28, 40, 100, 1000, ...
    width: k, the factor on the channels.
    num_classes: of the classifier; None returns the pooled features.
    **fields: of `ResNet`, such as method='skipinit'.

  >>> WideResNet(depth=100, width=2).num_blocks
  48

  Raises:
    InputError: a depth that is not 6n + 4, or a width that is not a whole
      number, 1 or more.
  """
  if not isinstance(depth, numbers.Integral):
    raise InputError(
      f'depth={shown(depth)} of a Wide-ResNet must be a whole number 6n+4, '
      'such as 16, 28 or 40'
    )
  if depth < 10 or depth % 6 != 4:
    below = max(10, (depth - 4) // 6 * 6 + 4)
    near = f'{below}' if below >= depth else f'{below} or {below + 6}'
    raise InputError(
      f'depth={depth} of a Wide-ResNet must be 6n+4; nearest: {near}'
    )
  check_whole('width', width)
  return ResNet(
    stage_sizes=((depth - 4) // 6,) * 3,
    num_classes=num_classes,
    features=16 * width,
    stem_features=16,
    small_images=True,
    **fields,
  )


# Sizes of He et al. 2016, table 1; ResNet-200's as in the pre-activation paper.


def ResNet18(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-18; `fields` are those of `ResNet`."""
  return ResNet((2, 2, 2, 2), False, num_classes, **fields)


def ResNet34(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-34; `fields` are those of `ResNet`."""
  return ResNet((3, 4, 6, 3), False, num_classes, **fields)


def ResNet50(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-50; `fields` are those of `ResNet`."""
  return ResNet((3, 4, 6, 3), True, num_classes, **fields)


def ResNet101(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-101; `fields` are those of `ResNet`."""
  return ResNet((3, 4, 23, 3), True, num_classes, **fields)


def ResNet152(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-152; `fields` are those of `ResNet`."""
  return ResNet((3, 8, 36, 3), True, num_classes, **fields)


def ResNet200(num_classes: int | None = 1000, **fields: Any) -> ResNet:
  """The pre-activation ResNet-200; `fields` are those of `ResNet`."""
  return ResNet((3, 24, 36, 3), True, num_classes, **fields)


RESNETS = {
  18: ResNet18,
  34: ResNet34,
  50: ResNet50,
  101: ResNet101,
  152: ResNet152,
  200: ResNet200,
}

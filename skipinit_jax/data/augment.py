"""Augmentation and normalization of images, on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Makes uint8 images and labels into what the network and the loss take.

  Pure. Random numbers depend on an image's index in the global batch, so that
  splitting the batch over devices or into micro-batches changes nothing.

  Attributes:
    num_classes: of the targets.
    mean, std: (channels,), of the training images, on the scale of 0 to 255.
    shift: largest shift in pixels of pad-and-crop, or 0.
    flip: mirror half of the training images.
    cutout: side of the square set to the mean, or 0.
    mixup, cutmix: alpha of Beta(alpha, alpha), or 0; see `mix`.
  """

  num_classes: int
  mean: np.ndarray
  std: np.ndarray
  shift: int = 0
  flip: bool = False
  cutout: int = 0
  mixup: float = 0.0
  cutmix: float = 0.0

  def __call__(
    self,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    examples: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Augments images to train on.

    Args:
      images: uint8 (n, height, width, channels).
      labels: int32 (n,).
      key: scalar PRNG key, of the step.
      examples: int32 (n,), indices of the images in the global batch.

    Returns:
      Normalized images, float32, and targets, float32 (n, num_classes).
    """
    move_key, cut_key, mix_key = jax.random.split(key, 3)
    by_example = jax.vmap(jax.random.fold_in, (None, 0))
    keys = by_example(move_key, examples)
    images = self.normalize(jax.vmap(self._move)(keys, images))
    if self.cutout:
      keys = by_example(cut_key, examples)
      images = jax.vmap(cutout, (0, 0, None))(keys, images, self.cutout)
    targets = jax.nn.one_hot(labels, self.num_classes)
    if self.mixup or self.cutmix:
      images, targets = mix(
        mix_key, images, targets, examples, self.mixup, self.cutmix
      )
    return images, targets

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 images to float32 of zero mean and unit variance per channel."""
    mean, std = (
      np.asarray(v, np.float32)[None, None, None] for v in (self.mean, self.std)
    )
    return (images - mean) / std

  def _move(self, key: jax.Array, image: jax.Array) -> jax.Array:
    shift_key, flip_key = jax.random.split(key)
    if self.shift:
      image = shift(shift_key, image, self.shift)
    if self.flip:
      image = flip(flip_key, image)
    return image


def make_augmentation(
  config: ConfigDict,
  num_classes: int,
  image_shape: tuple[int, int, int],
  mean: np.ndarray,
  std: np.ndarray,
) -> Augmentation:
  """The augmentation of a recipe's `data`; see `Augmentation`.

  Raises:
    InputError: a shift or a square larger than an image.
  """
  side = min(image_shape[:2])
  for field in ('shift', 'cutout'):
    if not 0 <= config[field] <= side:
      raise InputError(
        f'data.{field}={config[field]}: expected a number of pixels from 0 to '
        f'{side}, the side of an image'
      )
  return Augmentation(
    num_classes,
    mean,
    std,
    shift=config.shift,
    flip=config.flip,
    cutout=config.cutout,
    mixup=config.mixup,
    cutmix=config.cutmix,
  )


def shift(key: jax.Array, image: jax.Array, pixels: int) -> jax.Array:
  """Pads by `pixels` zeros on each side and crops back at a random place.

  Args:
    key: scalar PRNG key.
    image: (height, width, channels), any dtype.
    pixels: the largest shift, 4 for CIFAR.
  """
  pad = ((pixels, pixels), (pixels, pixels), (0, 0))
  row, column = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
  start = (row, column, jnp.zeros_like(row))
  return jax.lax.dynamic_slice(jnp.pad(image, pad), start, image.shape)


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
  """Mirrors an image (height, width, channels) with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(key: jax.Array, image: jax.Array, size: int) -> jax.Array:
  """Sets a square to 0, the mean of normalized images (DeVries, Taylor 2017).

  Args:
    key: scalar PRNG key.
    image: (height, width, channels), normalized.
    size: side of the square in pixels. Its centre is anywhere in the image, so
      that part of it may be outside.
  """
  height, width, _ = image.shape
  row_key, column_key = jax.random.split(key)
  box = _random_box(row_key, column_key, size, size, height, width)
  return jnp.where(box, 0, image)


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  examples: jax.Array,
  mixup: float,
  cutmix: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours.

  Images 2p and 2p+1 of the global batch, which is in random order, are mixed
  with each other, with a share drawn from (key, p): splitting the batch into
  even parts changes nothing. If both are on, each pair gets one of them.

  Args:
    key: scalar PRNG key, of the step.
    images: (n, height, width, channels), normalized; n even.
    targets: float32 (n, classes), one-hot.
    examples: int32 (n,), indices of the images in the global batch: whole
      pairs, in order.
    mixup, cutmix: alpha of the share's Beta(alpha, alpha) distribution; 0: off.

  Returns:
    Mixed images and targets, of the same shapes.
  """
  _, height, width, _ = images.shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples[::2] // 2)

  def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight of the image itself: (height, width, 1), and its mean."""
    which_key, blend_key, box_key = jax.random.split(key, 3)
    ones = jnp.ones((height, width, 1))
    blend = ones
    if mixup:
      blend = ones * jax.random.beta(blend_key, mixup, mixup)
    if cutmix:
      boxed = 1.0 - _cutmix_box(box_key, cutmix, height, width)
      chance = 0.5 if mixup else 1.0
      blend = jnp.where(jax.random.bernoulli(which_key, chance), boxed, blend)
    return blend, blend.mean()

  weights, shares = jax.vmap(draw)(keys)
  return (
    _blend(images, weights[:, None]),
    _blend(targets, shares[:, None, None]),
  )


def _blend(x: jax.Array, weights: jax.Array) -> jax.Array:
  pairs = x.reshape(-1, 2, *x.shape[1:])
  weights = weights.astype(x.dtype)
  mixed = weights * pairs + (1 - weights) * pairs[:, ::-1]
  return mixed.reshape(x.shape)


def _cutmix_box(
  key: jax.Array, alpha: float, height: int, width: int
) -> jax.Array:
  """A box with a share 1 - Beta(alpha, alpha) of the image, clipped to it."""
  share_key, row_key, column_key = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
  box = (side * jnp.array([height, width])).astype(jnp.int32)
  inside = _random_box(row_key, column_key, box[0], box[1], height, width)
  return inside.astype(jnp.float32)


def _random_box(
  row_key, column_key, box_height, box_width, height, width
) -> jax.Array:
  """Whether each pixel is in a box about a random one, (height, width, 1)."""
  top = jax.random.randint(row_key, (), 0, height) - box_height // 2
  left = jax.random.randint(column_key, (), 0, width) - box_width // 2
  rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
  inside_rows = (rows >= 0) & (rows < box_height)
  inside_columns = (columns >= 0) & (columns < box_width)
  return (inside_rows[:, None] & inside_columns[None])[..., None]

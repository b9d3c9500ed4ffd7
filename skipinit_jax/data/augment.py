"""Augmentation on the device; `mix` for a batch, the rest for one image."""

import jax
import jax.numpy as jnp


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
  """Mirrors an image (height, width, channels) left to right, one in two."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(key: jax.Array, image: jax.Array, size: int) -> jax.Array:
  """Sets a square to 0, the mean of normalized images (DeVries, Taylor 2017).

  Args:
    key: scalar PRNG key.
    image: (height, width, channels), normalized.
    size: side of the square in pixels; its centre lies anywhere in the image,
      so that part of it may fall outside.
  """
  height, width, _ = image.shape
  row_key, column_key = jax.random.split(key)
  top = jax.random.randint(row_key, (), 0, height) - size // 2
  left = jax.random.randint(column_key, (), 0, width) - size // 2
  return jnp.where(_box(top, left, size, size, height, width), 0, image)


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  first: jax.Array | int,
  mixup: float,
  cutmix: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours.

  Images 2p and 2p+1 of the global batch, which come in random order, are mixed
  with each other, with a share drawn from (key, p): cutting the batch into even
  parts changes nothing. Where both are on, each pair is given to one of them.

  Args:
    key: scalar PRNG key, of the step.
    images: (n, height, width, channels), normalized; n even.
    targets: float32 (n, classes), one-hot.
    first: index of images[0] in the global batch, even.
    mixup, cutmix: alpha of the share's Beta(alpha, alpha) distribution; 0: off.

  Returns:
    Mixed images and targets, of the same shapes.
  """
  n, height, width, _ = images.shape
  pairs = jnp.arange(n // 2) + first // 2
  keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(pairs)

  def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What stays of the image itself: weights (height, width), their mean."""
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
  """A box of share 1 - Beta(alpha, alpha) of the image, cut at its edges."""
  share_key, row_key, column_key = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
  box = (side * jnp.array([height, width])).astype(jnp.int32)
  top = jax.random.randint(row_key, (), 0, height) - box[0] // 2
  left = jax.random.randint(column_key, (), 0, width) - box[1] // 2
  return _box(top, left, box[0], box[1], height, width).astype(jnp.float32)


def _box(top, left, box_height, box_width, height, width) -> jax.Array:
  """Whether each pixel lies in a box, bool (height, width, 1)."""
  rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
  inside_rows = (rows >= 0) & (rows < box_height)
  inside_columns = (columns >= 0) & (columns < box_width)
  return (inside_rows[:, None] & inside_columns[None])[..., None]

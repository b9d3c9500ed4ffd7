"""Augmentation on the device, one image and one key at a time (use vmap)."""

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

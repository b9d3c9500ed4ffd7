"""The max-pool after the stem, whose gradient is no scatter."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Padding = tuple[tuple[int, int], ...]
SIZE, STRIDE = 3, 2
_WINDOW = (SIZE, SIZE), (STRIDE, STRIDE)


def max_pool(x: jax.Array, *, symmetric: bool) -> jax.Array:
  """Returns the maxima of 3x3 windows at a stride of 2.

  Of equal values the first one has the gradient, as in JAX's `reduce_window`.
  XLA makes a scatter of JAX's gradient for CPUs and GPUs. Here it is a sum: on
  CPUs ten times as fast, on GPUs without indices that lie in memory through the
  backward pass, and deterministic. On TPUs the program is JAX's own.

  Args:
    x: floating (batch, height, width, channels).
    symmetric: pad all sides by one pixel, as PyTorch does; else as 'SAME' does.
  """
  padding = ((1, 1), (1, 1))
  if not symmetric:
    padding = jax.lax.padtype_to_pads(x.shape[1:3], *_WINDOW, 'SAME')
  return _max_pool(x, tuple(padding))


def _reduce(x: jax.Array, padding: Any) -> jax.Array:
  return nn.max_pool(x, *_WINDOW, padding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, padding: Padding) -> jax.Array:
  return _reduce(x, padding)


@_max_pool.defjvp
def _max_pool_jvp(
  padding: Padding, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents

  def default(x: jax.Array, dx: jax.Array) -> jax.Array:
    return jax.jvp(functools.partial(_reduce, padding=padding), (x,), (dx,))[1]

  # Only x is kept for the backward pass.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def tangent(x: jax.Array, dx: jax.Array) -> jax.Array:
    ours = functools.partial(_by_place, padding=padding)
    return jax.lax.platform_dependent(
      x, dx, cpu=ours, cuda=ours, default=default
    )

  return _max_pool(x, padding), tangent(x, dx)


def _by_place(x: jax.Array, dx: jax.Array, padding: Padding) -> jax.Array:
  """The tangent of the pool: a sum over the nine places in a window."""
  values = _places(x, padding, -jnp.inf)
  y = functools.reduce(jnp.maximum, values)
  first = jnp.full(y.shape, SIZE**2, jnp.int8)
  for place in reversed(range(SIZE**2)):
    first = jnp.where(values[place] == y, jnp.int8(place), first)
  zero = jnp.zeros_like(y)
  return functools.reduce(
    jnp.add,
    (
      jnp.where(first == place, tangent, zero)
      for place, tangent in enumerate(_places(dx, padding, 0))
    ),
  )


def _places(x: jax.Array, padding: Padding, fill: float) -> list[jax.Array]:
  """What each place of a window sees, nine arrays of the output's shape."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
  rows, columns = (n - SIZE + 1 for n in x.shape[1:3])
  return [
    x[:, i : i + rows : STRIDE, j : j + columns : STRIDE]
    for i in range(SIZE)
    for j in range(SIZE)
  ]

"""The order of an epoch, computed at the places of a batch, without a sort."""

import jax
import jax.numpy as jnp

NAME = 'swap or not, 4 rounds a digit'  # Another order needs another name.


def batch_indices(
  key: jax.Array, step: jax.Array, batch_size: int, num_examples: int
) -> jax.Array:
  """Indices into the training split of one step's global batch.

  The epochs' permutations, each drawn from (key, epoch), follow one another
  without a gap, so that every epoch shows every example exactly once, whatever
  the batch size.

  Args:
    key: scalar PRNG key.
    step: number of the step from 0, an integer scalar.
    batch_size: global.
    num_examples: in the training split.

  Returns:
    int32 (batch_size,), in [0, num_examples).
  """
  epoch, offset = jnp.divmod(step * batch_size, num_examples)
  later, position = jnp.divmod(offset + jnp.arange(batch_size), num_examples)
  epochs = 1 + (num_examples - 1 + batch_size - 1) // num_examples
  if num_examples % batch_size == 0:
    epochs = 1  # No batch reaches into the next epoch.
  keys = jax.vmap(lambda e: jax.random.fold_in(key, epoch + e))(
    jnp.arange(epochs)
  )
  sums, masks = jax.vmap(lambda key: rounds(key, num_examples))(keys)
  return _swap_or_not(position, sums[later], masks[later], num_examples)


def rounds(key: jax.Array, num_examples: int) -> tuple[jax.Array, jax.Array]:
  """Sums and masks of a permutation's rounds, four for each binary digit."""
  shape = (4 * max(num_examples - 1, 1).bit_length(),)
  sums = jax.random.randint(key, shape, 0, num_examples)
  return sums, jax.random.bits(jax.random.fold_in(key, 1), shape)


def _swap_or_not(
  x: jax.Array, sums: jax.Array, masks: jax.Array, num_examples: int
) -> jax.Array:
  """Sends positions where a permutation of [0, num_examples) does.

  The swap-or-not shuffle (Hoang, Morris, Rogaway 2012,
  https://eprint.iacr.org/2012/254): in every round the numbers are paired so
  that all pairs have the same sum, and a bit of each pair decides whether its
  two change places. That permutes any number of examples.

  Args:
    x: int32 (n,), positions.
    sums, masks: (n, rounds), of each position's epoch.
    num_examples: in the training split.
  """
  for this_sum, mask in zip(sums.T, masks.T, strict=True):
    partner = this_sum - x
    partner = jnp.where(partner < 0, partner + num_examples, partner)
    pair = jnp.maximum(x, partner).astype(jnp.uint32)
    x = jnp.where(_mix(pair ^ mask) >> 31 == 1, partner, x)
  return x


def _mix(x: jax.Array) -> jax.Array:
  """Mixes the bits of uint32 numbers.

  The constants are `lowbias32` of https://github.com/skeeto/hash-prospector.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)

"""The order of epochs: every example once, in orders that are even enough."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from skipinit_jax.data import shuffle
from skipinit_jax.data.shuffle import batch_indices

# More than a million, and sizes on both sides of a power of two.
SIZES = [(12, 4), (12, 12), (12, 5), (12, 7), (12, 11), (5, 12), (1, 3), (2, 2)]
SIZES += [(12, 1), (12, 24), (12, 13), (7, 20), (63, 16), (64, 16), (65, 16)]
SIZES += [(1437, 32), (50_000, 128)]
RARE = 1e-4  # A right shuffle fails a test less often than that.


@pytest.mark.sampled(6)
@pytest.mark.parametrize(('examples', 'batch'), SIZES)
def test_every_epoch_shows_every_example_once(examples, batch):
  epochs = 3
  steps = -(-epochs * examples // batch)
  indices = jax.jit(
    jax.vmap(
      functools.partial(batch_indices, batch_size=batch, num_examples=examples),
      (None, 0),
    )
  )
  stream = indices(jax.random.key(3), jnp.arange(steps)).reshape(-1)
  assert stream.dtype == jnp.int32
  for epoch in np.split(stream[: epochs * examples], epochs):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(examples))


def orders(examples, epochs, key=0):
  """Whole epochs, (epochs, examples)."""
  indices = functools.partial(
    batch_indices, batch_size=examples, num_examples=examples
  )
  in_order = jax.jit(jax.vmap(indices, (None, 0)))
  return np.asarray(in_order(jax.random.key(key), jnp.arange(epochs)))


def test_epochs_and_seeds_have_different_orders():
  found = {tuple(o) for key in range(3) for o in orders(64, 4, key).tolist()}
  assert len(found) == 12
  np.testing.assert_array_equal(orders(64, 3, 1), orders(64, 3, 1))


def test_a_batch_is_a_function_of_the_step_alone():
  n, batch = 10, 4
  for step in range(5):
    alone = batch_indices(jax.random.key(7), jnp.int32(step), batch, n)
    stream = orders(n, 2, 7).reshape(-1)
    np.testing.assert_array_equal(alone, stream[step * batch :][:batch])


def places(found):
  """How often each example is at each place: p of all being equal."""
  n = found.shape[1]
  counts = np.stack([np.bincount(column, minlength=n) for column in found.T])
  expected = len(found) / n
  # Rows and columns of the table have fixed sums.
  chi_square = ((counts - expected) ** 2 / expected).sum()
  return stats.chi2.sf(chi_square, (n - 1) ** 2)


def pairs(found):
  """How often each ordered pair is at the first two places, and at the last."""
  n = found.shape[1]
  values = []
  for i, j in ((0, 1), (n - 2, n - 1), (0, n - 1)):
    codes = found[:, i] * n + found[:, j]
    counts = np.bincount(codes, minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    rest = counts[~np.eye(n, dtype=bool)]
    values.append(stats.chisquare(rest).pvalue)
  return min(values)


def neighbours(found):
  """How often an example follows the same one as in the epoch before."""
  epochs, n = found.shape
  after = np.full(found.shape, -1)
  rows = np.arange(epochs)[:, None]
  after[rows, found[:, :-1]] = found[:, 1:]
  same = ((after[1:] == after[:-1]) & (after[1:] >= 0)).sum()
  # Of n (n - 1) ordered pairs an epoch has n - 1.
  expected = (epochs - 1) * (n - 1) / n
  return 2 * min(
    stats.poisson.cdf(same, expected), stats.poisson.sf(same - 1, expected)
  )


def runs_up(found):
  """How often example i + 1 follows example i, as in no order at all."""
  epochs, n = found.shape
  up = (np.diff(found, axis=1) % n == 1).sum()
  expected = epochs * (n - 1) * n / (n * (n - 1))
  return 2 * min(
    stats.poisson.cdf(up, expected), stats.poisson.sf(up - 1, expected)
  )


LOOKS = (places, pairs, neighbours, runs_up)


@pytest.mark.parametrize('look', LOOKS)
@pytest.mark.parametrize(('examples', 'epochs'), [(8, 8000), (23, 8000)])
def test_orders_are_even(look, examples, epochs):
  assert look(orders(examples, epochs)) > RARE


@pytest.mark.parametrize('look', [places, neighbours, runs_up])
def test_long_orders_are_even(look):
  assert look(orders(1437, 300)) > RARE


def few_rounds(x, sums, masks, num_examples):
  return SWAP(x, sums[:, :3], masks[:, :3], num_examples)


def affine(x, sums, masks, num_examples):
  """Pairs of places keep their distance, up to the factor."""
  factors = 1 + sums[:, 1] % (num_examples - 1)  # Of a prime number.
  return (x * factors + sums[:, 0]) % num_examples


def rotation(x, sums, masks, num_examples):
  return (x + sums[:, 0]) % num_examples


SWAP = shuffle._swap_or_not


@pytest.mark.parametrize(
  ('weak', 'seen_by'),
  [
    (few_rounds, {places, pairs, runs_up}),
    (affine, {neighbours}),
    (rotation, {pairs, neighbours, runs_up}),
  ],
)
def test_weak_orders_are_seen(weak, seen_by, monkeypatch):
  monkeypatch.setattr(shuffle, '_swap_or_not', weak)
  found = orders(23, 8000)
  np.testing.assert_array_equal(np.sort(found[0]), np.arange(23))
  assert seen_by <= {look for look in LOOKS if look(found) < RARE}


def test_no_step_sorts():
  def step(key, i):
    return batch_indices(key, i, 128, 50_000)

  text = jax.jit(step).lower(jax.random.key(0), jnp.int32(0)).as_text()
  assert 'stablehlo.' in text
  assert 'stablehlo.sort' not in text

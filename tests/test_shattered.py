"""Gradients over a grid of inputs, against noise, theory and differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.analysis import shattered
from skipinit_jax.errors import InputError

POINTS = 256
# Their outputs share batch statistics.
NORMALIZED = {'feedforward_bn', 'batchnorm_1', 'batchnorm_0.1'}


def brute_force(series, lags):
  n = len(series)
  out = []
  for k in range(lags + 1):
    total = 0.0
    for i in range(n - k):
      total += series[i] * series[i + k]
    out.append(total / (n - k) / (np.square(series).sum() / n))
  return np.array(out)


def keys(runs=20, seed=0):
  return jax.random.split(jax.random.key(seed), runs)


@functools.cache
def gradients(name, depth, runs=20, width=100):
  model = shattered.NETWORKS[name](depth, width)
  return np.asarray(shattered.input_gradients(model, keys(runs), POINTS))


def mean_and_error(name, depth):
  values = shattered.autocorrelation(gradients(name, depth))
  assert np.isfinite(values).all()
  return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def test_autocorrelation_against_brute_force_and_numpy():
  rng = np.random.default_rng(0)
  series = rng.standard_normal((3, 50)).cumsum(-1)
  got = shattered.autocorrelation(series, lags=6)
  assert got.shape == (3, 7)
  for row, values in zip(series, got, strict=True):
    np.testing.assert_allclose(values, brute_force(row, 6), rtol=1e-12)
    full = np.correlate(row, row, 'full')[49:56] / (50 - np.arange(7))
    np.testing.assert_allclose(values, full / full[0], rtol=1e-12)


def test_autocorrelation_of_series_that_are_known():
  np.testing.assert_allclose(shattered.autocorrelation(np.full(40, -2.5)), 1)
  wave = np.cos(2 * np.pi * np.arange(1000) / 20)
  expected = np.cos(2 * np.pi * np.arange(16) / 20)
  got = shattered.autocorrelation(wave)
  np.testing.assert_allclose(got, expected, atol=0.02)
  assert np.isnan(shattered.autocorrelation(np.zeros(20))).all()
  with pytest.raises(InputError, match='lags=15: expected 0 to 14'):
    shattered.autocorrelation(np.ones(15))


def test_white_noise_has_none():
  values = shattered.autocorrelation(shattered.noise(400, POINTS, 1)['white'])
  error = values.std(0, ddof=1) / 400**0.5
  np.testing.assert_array_equal(values[:, 0], 1)
  assert (np.abs(values.mean(0)) < 3.5 * error)[1:].all()
  # Each run has the error 1 / sqrt(n - k) of theory.
  theory = (POINTS - np.arange(1, 16)) ** -0.5
  np.testing.assert_allclose(values.std(0)[1:], theory, rtol=0.15)


def test_brown_noise_is_near_its_theory():
  """cov(v_i, v_j) = min(i, j), whence the ratio of the expected means."""
  series = shattered.noise(4000, POINTS, 2)['brown']
  i = np.arange(1, POINTS + 1)
  square = np.mean(i)
  for k in (1, 5, 15):
    expected = np.mean(i[: POINTS - k]) / square
    products = (series[:, : POINTS - k] * series[:, k:]).mean(-1)
    got = products.mean() / np.square(series).mean(-1).mean()
    np.testing.assert_allclose(got, expected, rtol=0.02)
    # The mean of ratios, which is what is drawn, is a little less.
    values = shattered.autocorrelation(series)[:, k].mean()
    assert expected - 0.1 < values < expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize('name', sorted(set(shattered.NETWORKS) - NORMALIZED))
def test_gradients_are_those_of_the_network(name):
  """One input at a time, by reverse mode, with the statistics as given."""
  model = shattered.NETWORKS[name](4, 16)
  got = shattered.input_gradients(model, keys(2), 9)
  grid = jnp.linspace(-2.0, 2.0, 9)
  for key, values in zip(keys(2), got, strict=True):
    variables = model.init(key, jnp.ones((1, 2)), train=False)

    def f(x, variables=variables):
      x = jnp.stack([x, jnp.ones_like(x)])[None]
      return model.apply(variables, x, train=False)[0, 0]

    expected = jax.vmap(jax.grad(f))(grid)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-5)


def test_batch_statistics_are_held_constant():
  """Against the evaluation of a network given the grid's statistics.

  No point lies at 0, where the first layer's normalized ReLUs bend.
  """
  model = shattered.NETWORKS['batchnorm_1'](3, 16)
  (key,) = keys(1)
  grid = jnp.linspace(-2.0, 2.0, 10)
  inputs = jnp.stack([grid, jnp.ones_like(grid)], -1)
  variables = model.init(key, inputs, train=False)

  def again(_, stats):  # Running averages go to those of the grid.
    mutable = ['batch_stats']
    _, new = model.apply(
      {**variables, 'batch_stats': stats}, inputs, train=True, mutable=mutable
    )
    return new['batch_stats']

  stats = variables['batch_stats']
  stats = jax.jit(lambda s: jax.lax.fori_loop(0, 300, again, s))(stats)
  variables = {**variables, 'batch_stats': stats}

  def f(x):
    x = jnp.stack([x, jnp.ones_like(x)])[None]
    return model.apply(variables, x, train=False)[0, 0]

  expected = jax.vmap(jax.grad(f))(grid)
  got = shattered.input_gradients(model, keys(1), 10)[0]
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_deep_feed_forward_gradients_are_white_noise():
  mean, error = mean_and_error('feedforward_bn', 50)
  assert (np.abs(mean) < 4 * error)[1:].all()
  mean, error = mean_and_error('feedforward_bn', 2)
  assert (mean > 0.6).all()


def test_skip_paths_hold_gradients_together():
  """The order of the paper's section 3: by depth 50, and by beta."""
  rising = []
  for name in (
    'feedforward_bn',
    'batchnorm_1',
    'batchnorm_0.1',
    'skipinit_sqrt',
  ):
    mean, error = mean_and_error(name, 50)
    rising.append((mean[2], error[2]))
  for (low, a), (high, b) in itertools.pairwise(rising):
    assert high - low > 3 * (a**2 + b**2) ** 0.5


def test_skipinit_at_zero_is_as_shallow_at_any_depth():
  model = shattered.NETWORKS['skipinit'](50, 8)
  got = shattered.input_gradients(model, keys(1), 11)[0]
  params = model.init(keys(1)[0], jnp.ones((1, 2)), train=False)['params']
  # One hidden layer: w2 * w1 where it is on.
  w1 = np.asarray(params['stem']['kernel'])
  w2 = np.asarray(params['classifier']['kernel'])[:, 0]
  grid = np.linspace(-2, 2, 11, dtype=np.float32)
  on = grid[:, None] * w1[0] + w1[1] > 0
  np.testing.assert_allclose(got, (on * w1[0] * w2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize('depth', [2, 50])
def test_looks_linear_gradients_are_constant(depth):
  grads = gradients('looks_linear', depth, runs=4, width=64)
  np.testing.assert_allclose(grads, grads[:, :1] + 0 * grads, rtol=1e-3)
  assert (np.abs(grads) > 1e-4).all()
  assert len(np.unique(grads[:, 0])) == 4
  values = shattered.autocorrelation(grads)
  np.testing.assert_allclose(values, 1, atol=1e-5)


def test_measure_and_draw(tmp_path):
  names = ('feedforward_bn', 'skipinit')
  measured = shattered.measure(
    names, depths=(2, 3), runs=3, width=8, points=32, seed=1
  )
  for name in names:
    assert measured[name].shape == (2, 3, 16)
    np.testing.assert_array_equal(measured[name][..., 0], 1)
  model = shattered.NETWORKS['skipinit'](3, 8)
  grads = shattered.input_gradients(model, keys(3, seed=1), 32)
  np.testing.assert_allclose(
    measured['skipinit'][1], shattered.autocorrelation(grads)
  )
  assert measured['white'].shape == measured['brown'].shape == (3, 16)
  files = shattered.draw(measured, tmp_path)
  assert [f.suffix for f in files] == ['.svg', '.png']
  assert 1000 < files[1].stat().st_size < 200_000


def test_what_can_not_be_is_refused():
  with pytest.raises(InputError, match="did you mean 'residual'"):
    shattered.measure(('residul',))
  with pytest.raises(InputError, match='depth=1: expected 2'):
    shattered.measure(depths=(4, 1))

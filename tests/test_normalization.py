"""Batch normalization: against Flax's, and over groups and devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import InputError
from skipinit_jax.models import BatchNorm

SHAPE = (8, 3, 2, 5)


def images(seed=0, shape=SHAPE, dtype='float32'):
  values = np.random.default_rng(seed).standard_normal(shape)
  # Channels of different means and variances.
  channels = np.arange(1, shape[-1] + 1)
  return jnp.asarray(values * channels + channels - 2, dtype)


def random_variables():
  rng = np.random.default_rng(5)

  def draw():
    return jnp.asarray(rng.uniform(0.5, 2, SHAPE[-1]), jnp.float32)

  return {
    'params': {'scale': draw(), 'bias': draw()},
    'batch_stats': {'mean': draw(), 'var': draw()},
  }


def by_numpy(x, params, epsilon=1e-5):
  """One group's result, mean and variance, in float64."""
  x = np.asarray(x, 'float64')
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  y = (x - mean) / np.sqrt(var + epsilon)
  return y * np.asarray(params['scale']) + np.asarray(params['bias']), mean, var


def train(layer, variables, x):
  y, new = layer.apply(variables, x, train=True, mutable=['batch_stats'])
  return y, new['batch_stats']


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_it_starts_as_the_identity_of_normalized_images():
  variables = BatchNorm().init(jax.random.key(0), images(), train=True)
  expected = {
    'params': {'scale': np.ones(5), 'bias': np.zeros(5)},
    'batch_stats': {'mean': np.zeros(5), 'var': np.ones(5)},
  }
  # Not updated by initialization, though it saw a batch.
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  dtypes = {v.dtype for v in jax.tree.leaves(variables)}
  assert dtypes == {jnp.dtype('float32')}


@pytest.mark.parametrize(('momentum', 'epsilon'), [(0.9, 1e-5), (0.7, 1e-2)])
def test_it_equals_flax(momentum, epsilon):
  ours = BatchNorm(momentum=momentum, epsilon=epsilon)
  theirs = nn.BatchNorm(
    use_running_average=False, momentum=momentum, epsilon=epsilon
  )
  variables, x, cotangent = random_variables(), images(), images(1)

  def our_loss(params, x):
    y, stats = train(ours, {**variables, 'params': params}, x)
    return (y * cotangent).sum(), (y, stats)

  def their_loss(params, x):
    y, new = theirs.apply(
      {**variables, 'params': params}, x, mutable=['batch_stats']
    )
    return (y * cotangent).sum(), (y, new['batch_stats'])

  got, expected = (
    jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables['params'], x)
    for loss in (our_loss, their_loss)
  )
  assert float(jnp.abs(got[0][1]).max()) > 1
  jax.tree.map(lambda a, b: close(a, b, 1e-4), got, expected)
  # And with the running statistics.
  inference = theirs.clone(use_running_average=True)
  close(ours.apply(variables, x, train=False), inference.apply(variables, x))


def test_evaluation_uses_the_running_statistics_and_leaves_them():
  variables, x = random_variables(), images()
  y, new = BatchNorm(group=3).apply(
    variables, x, train=False, mutable=['batch_stats']
  )
  p, s = ({k: np.asarray(v) for k, v in t.items()} for t in variables.values())
  expected = (np.asarray(x) - s['mean']) / np.sqrt(s['var'] + 1e-5)
  close(y, expected * p['scale'] + p['bias'])
  jax.tree.map(
    np.testing.assert_array_equal, new['batch_stats'], variables['batch_stats']
  )
  # An image's result does not depend on its batch.
  close(BatchNorm().apply(variables, x[:1], train=False), y[:1])


@pytest.mark.parametrize('group', [1, 2, 4, 8, None])
def test_groups_of_consecutive_images_are_normalized_apart(group):
  variables, x = random_variables(), images()
  y, stats = train(BatchNorm(group=group), variables, x)
  size = group or 8
  parts = [
    by_numpy(x[i : i + size], variables['params']) for i in range(0, 8, size)
  ]
  close(y, np.concatenate([p[0] for p in parts]))
  # Running statistics move by a tenth to the groups' mean.
  for name, values in (
    ('mean', [p[1] for p in parts]),
    ('var', [p[2] for p in parts]),
  ):
    old = np.asarray(variables['batch_stats'][name])
    close(stats[name], 0.9 * old + 0.1 * np.mean(values, 0))


@pytest.mark.parametrize('group', [3, 5, 16])
def test_a_group_that_does_not_divide_the_batch_is_refused(group):
  message = f'batch of 8 images .* groups of {group}'
  with pytest.raises(InputError, match=message):
    train(BatchNorm(group=group), random_variables(), images())


def sharded(mapping, layer, variables, x, parts):
  """Result, statistics and gradients, over an axis 'batch' of `parts`."""
  cotangent = images(1)

  def one(x, cotangent):
    def loss(params, x):
      y, stats = train(layer, {**variables, 'params': params}, x)
      return (y * cotangent).sum(), (y, stats)

    (_, dx), out = jax.grad(loss, (0, 1), has_aux=True)(variables['params'], x)
    return *out, dx

  def cut(a):
    return a.reshape(parts, -1, *SHAPE[1:])

  mapped = mapping(one, axis_name='batch')
  mapped = jax.jit(mapped) if mapping is jax.vmap else mapped
  y, stats, dx = mapped(cut(x), cut(cotangent))
  return y.reshape(SHAPE), stats, dx.reshape(SHAPE)


@pytest.mark.parametrize('mapping', [jax.vmap, jax.pmap])
def test_averaged_over_an_axis_it_equals_the_whole_batch(mapping):
  parts = 4 if mapping is jax.vmap else min(4, jax.local_device_count())
  variables, x = random_variables(), images()
  layer = BatchNorm(axis_name='batch')
  y, stats, dx = sharded(mapping, layer, variables, x, parts)

  def whole(x):
    y, stats = train(BatchNorm(), variables, x)
    return (y * images(1)).sum(), (y, stats)

  expected = jax.jit(jax.grad(whole, has_aux=True))(x)
  expected_dx, (expected_y, expected_stats) = expected
  close(y, expected_y, 1e-4)
  close(dx, expected_dx, 1e-4)
  for name, value in expected_stats.items():
    assert stats[name].shape == (parts, SHAPE[-1])
    close(stats[name], np.tile(value, (parts, 1)), 1e-4)


def test_without_an_axis_each_part_has_its_own_statistics():
  variables, x = random_variables(), images()
  y, stats, _ = sharded(jax.vmap, BatchNorm(), variables, x, 4)
  expected, _ = train(BatchNorm(group=2), variables, x)
  close(y, expected)
  assert np.asarray(stats['mean']).std(0).min() > 1e-3


def test_bfloat16_images_keep_float32_statistics():
  x = images(dtype='bfloat16')
  variables = random_variables()
  y, stats = train(BatchNorm(), variables, x)
  assert y.dtype == jnp.bfloat16
  assert {v.dtype for v in stats.values()} == {jnp.dtype('float32')}
  expected, mean, _ = by_numpy(x, variables['params'])
  # Means of bfloat16 numbers, to float32's precision.
  close(stats['mean'], 0.9 * variables['batch_stats']['mean'] + 0.1 * mean)
  np.testing.assert_allclose(
    np.asarray(y, 'float64'), expected, rtol=2**-8, atol=1e-4
  )
  for dtype in ('float32', 'bfloat16'):
    layer = BatchNorm(dtype=dtype)
    for mode in (True, False):
      out = layer.apply(variables, x, train=mode, mutable=['batch_stats'])[0]
      assert out.dtype == dtype


def test_a_constant_channel_is_finite():
  # E[x^2] - E[x]^2 of a constant may round below zero.
  x = jnp.full(SHAPE, 1000.1)
  variables = random_variables()
  y, stats = train(BatchNorm(), variables, x)
  assert np.isfinite(y).all()
  assert (np.asarray(stats['var']) > 0).all()


@pytest.mark.parametrize('group', [0, -2, 2.0, True])
def test_a_group_is_a_whole_number_of_images(group):
  message = f'group={group} must be a whole number'
  for mode in (True, False):
    with pytest.raises(InputError, match=message):
      BatchNorm(group=group).init(jax.random.key(0), images(), train=mode)


def test_no_images_have_no_statistics():
  with pytest.raises(InputError, match=r'float32 of shape \(0, 3, 2, 5\)'):
    train(BatchNorm(), random_variables(), images()[:0])


def test_running_statistics_are_float32_under_x64_too():
  with jax.enable_x64(True):
    for dtype in ('float32', 'float64'):
      layer, x = BatchNorm(param_dtype=dtype), images(dtype=dtype)
      variables = layer.init(jax.random.key(0), x, train=True)
      y, stats = train(layer, variables, x)
      assert y.dtype == dtype
      for tree in (variables['batch_stats'], stats):
        assert {v.dtype for v in tree.values()} == {jnp.dtype('float32')}

"""Gradients by path length against all 2^n paths."""

import functools
import itertools
import math
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from skipinit_jax.analysis import paths
from skipinit_jax.analysis.networks import Network
from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  Join,
  SkipInitDense,
  stack_blocks,
)
from skipinit_jax.models.dense import DenseResNet

SHAPE = (4, 8, 8, 2)


network = functools.partial(toys.small_resnet, (3, 1))  # One block projects.
data = functools.partial(toys.batch, SHAPE)


def full_gradient(model, variables, images, labels, train=True):
  rest = {name: v for name, v in variables.items() if name != 'params'}

  def loss(params, images):
    logits, _ = model.apply(
      {**rest, 'params': params}, images, train=train, mutable=list(rest)
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

  return jax.jit(jax.grad(loss, (0, 1)))(variables['params'], images)


def selections(n):
  return [np.array(s, bool) for s in itertools.product((0, 1), repeat=n)]


def largest(tree):
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@functools.cache
def enumerated(method):
  """All 16 paths: the selections, and the gradients of each."""
  model, (images, labels) = network(method), data()
  variables = toys.randomize(model, SHAPE)
  blocks, gradient = paths.path_gradients(model, variables, images, labels)
  assert len(blocks) == 4
  every = [(s, gradient(jnp.asarray(s))) for s in selections(4)]
  return model, variables, every


@pytest.mark.sampled(3)
@pytest.mark.parametrize('method', METHODS)
def test_the_gradients_of_all_paths_add_up_to_the_gradient(method):
  model, variables, every = enumerated(method)
  params, images = full_gradient(model, variables, *data())
  total = jax.tree.map(lambda *g: sum(g), *(g[1] for _, g in every))
  tolerance = 3e-5 * max(largest(g[1]) for _, g in every)
  np.testing.assert_allclose(total, images, atol=tolerance)
  assert largest(images) > 100 * tolerance
  # The stem is below all blocks, as the images are.
  total = sum(g[0]['stem']['kernel'] for _, g in every)
  expected = params['stem']['kernel']
  tolerance = 3e-5 * max(largest(g[0]['stem']) for _, g in every)
  np.testing.assert_allclose(total, expected, atol=tolerance)


def test_a_path_passes_by_the_branches_that_it_leaves_out():
  _, _, every = enumerated('none')
  for selection, (params, _) in every:
    for block, selected in zip(
      (f'stage{i}/block{j}' for i, j in ((1, 1), (1, 2), (1, 3), (2, 1))),
      selection,
      strict=True,
    ):
      stage, name = block.split('/')
      assert bool(largest(params[stage][name]['conv1'])) == selected


def test_the_shortest_path_is_the_network_of_its_projections_alone():
  """The gradient along no branch, by hand: the forward pass stays whole."""
  model, variables, every = enumerated('none')
  images, labels = data()
  blocks = paths.find_blocks(model, variables, images)
  outputs = []

  def keep(block, skip, branch):
    outputs.append(branch)
    return skip, branch

  with paths.changed_joins(blocks, keep):
    model.apply(variables, images, train=True)

  def loss(images):
    given = iter(outputs)

    def constant(block, skip, branch):
      return skip, next(given)

    with paths.changed_joins(blocks, constant):
      logits = model.apply(variables, images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

  got = every[0][1][1]
  np.testing.assert_allclose(got, jax.grad(loss)(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('method', ['none', 'batchnorm'])
def test_samples_converge_to_the_mean_of_all_paths(method):
  model, variables, every = enumerated(method)
  images, labels = data()
  expected, spread = [], []
  for length in range(5):
    norms = [
      np.linalg.norm(np.asarray(g[1]).reshape(SHAPE[0], -1), axis=1).mean()
      for selection, g in every
      if selection.sum() == length
    ]
    assert len(norms) == math.comb(4, length)
    expected.append(np.mean(norms))
    spread.append(np.std(norms))
  few, many = (
    paths.measure(model, variables, images, labels, samples=n, seed=1)
    for n in (4, 64)
  )
  error = np.array(spread) / 64**0.5
  bound = 4 * error + 1e-5 * np.array(expected)
  assert (np.abs(many['norm'] - expected) < bound).all()
  np.testing.assert_allclose(
    many['norm_error'][1:4], error[1:4], rtol=0.5, atol=1e-6
  )
  assert few['norm_error'][0] == few['norm_error'][4] == 0
  weights = np.array([1, 4, 6, 4, 1]) * many['norm']
  np.testing.assert_allclose(many['gradient'], weights / weights.sum())
  depth = (weights * np.arange(5)).sum() / weights.sum()
  np.testing.assert_allclose(many['effective_depth'], depth)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('scan', [False, True])
def test_draws_are_those_of_one_network_after_the_other(scan):
  images, labels = data()
  model = network('batchnorm', scan=scan)
  draws = [
    Network(model, model.init(jax.random.key(i), images, train=False), *data())
    for i in range(3)
  ]
  found = paths.measure_draws(draws, samples=2)
  each = [
    paths.measure(model, draw.variables, images, labels, samples=2, seed=i)
    for i, draw in enumerate(draws)
  ]
  depths = np.array([one['effective_depth'] for one in each])
  assert np.ptp(depths) > 1e-3
  np.testing.assert_allclose(found['effective_depths'], depths, rtol=1e-4)
  np.testing.assert_allclose(found['effective_depth'], depths.mean(), rtol=1e-4)
  # Student's t of 2 degrees of freedom: 4.303.
  half = 4.3027 * depths.std(ddof=1) / 3**0.5
  np.testing.assert_allclose(found['interval'], half, rtol=1e-3)
  np.testing.assert_allclose(found['norm'], each[0]['norm'], rtol=1e-4)


def test_at_alpha_zero_only_the_shortest_path_carries_gradient():
  model, (images, labels) = network('skipinit'), data()
  variables = model.init(jax.random.key(0), images, train=False)
  result = paths.measure(model, variables, images, labels, samples=1)
  assert result['norm'][0] > 0
  assert not result['norm'][1:].any()
  assert result['effective_depth'] == 0
  assert np.isnan(result['norm_error'][1])


def test_a_linear_network_against_its_matrices():
  """Paths of width-1 linear blocks: products of their kernels."""
  model = DenseResNet(
    3, 1, num_classes=2, method='none', activation='linear', branch_layers=1
  )
  images, labels = jnp.ones((1, 1)), jnp.array([0])
  variables = toys.randomize(model, images.shape)
  params = variables['params']
  result = paths.measure(model, variables, images, labels, samples=40, seed=3)
  w = [
    abs(float(params['stage1'][f'block{i}']['dense1']['kernel'][0, 0]))
    for i in (1, 2, 3)
  ]
  np.testing.assert_allclose(
    result['norm'][3] / result['norm'][0], w[0] * w[1] * w[2], rtol=1e-4
  )
  by_one = result['norm'][1] / result['norm'][0]
  assert min(w) < by_one < max(w)
  np.testing.assert_allclose(by_one, np.mean(w), atol=4 * np.std(w) / 40**0.5)


def test_gain_and_scan_are_those_of_the_network():
  model, (images, labels) = network('divide_sqrt2'), data()
  variables = toys.randomize(model, SHAPE)
  options = {'samples': 2, 'train': True}
  plain = paths.measure(model, variables, images, labels, **options)
  scanned = paths.measure(
    model.clone(scan=True), stack_blocks(variables), images, labels, **options
  )
  for name, value in plain.items():
    np.testing.assert_allclose(scanned[name], value, rtol=1e-4, err_msg=name)


class Custom(nn.Module):
  """Somebody's network whose blocks meet in `Join`."""

  shared: bool = False

  @nn.compact
  def __call__(self, x, *, train):
    x = x.reshape(x.shape[0], -1)
    join = Join() if self.shared else None
    for i in range(2):
      branch = SkipInitDense(x.shape[-1], init_value=0.5, name=f'dense{i}')(x)
      x = (join or Join(name=f'join{i}'))(x, branch)
    return nn.Dense(5)(x)


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    return network('none', scan=True)(x, train=train)


def test_what_has_no_paths_is_refused():
  images, labels = data()
  for model, words in (
    (Custom(shared=True), 'called 2 times'),
    (Scanned(), 'scan=False'),
    (network('none', skip=False), 'no block that ends in Join'),
  ):
    variables = model.init(jax.random.key(0), images, train=False)
    with pytest.raises(InputError, match=words):
      paths.measure(model, variables, images, labels)
  with pytest.raises(InputError, match='samples=0'):
    paths.measure(model, variables, images, labels, samples=0)


def test_any_network_that_joins_has_paths():
  model, (images, labels) = Custom(), data()
  variables = model.init(jax.random.key(0), images, train=False)
  blocks, gradient = paths.path_gradients(model, variables, images, labels)
  assert blocks == [('join0',), ('join1',)]
  total = sum(gradient(jnp.asarray(s))[1] for s in selections(2))
  expected = full_gradient(model, variables, images, labels)[1]
  np.testing.assert_allclose(total, expected, atol=1e-5)


def test_recomputed_blocks_have_the_same_paths():
  model, variables, every = enumerated('none')
  again = model.clone(remat=True)
  _, gradient = paths.path_gradients(again, variables, *data())
  selection, (_, images) = every[5]
  got = gradient(jnp.asarray(selection))[1]
  np.testing.assert_allclose(got, images, rtol=1e-4, atol=1e-6)


def test_weights_are_binomial():
  norm = np.random.default_rng(0).random(11)
  result = paths.weigh(norm)
  counts = np.array([math.comb(10, k) for k in range(11)])
  np.testing.assert_allclose(result['paths'], counts / 2**10)
  np.testing.assert_allclose(
    result['gradient'], counts * norm / (counts * norm).sum()
  )


def test_figures_are_written(tmp_path):
  model, variables, _ = enumerated('none')
  result = paths.measure(model, variables, *data(), samples=2)
  result['interval'] = np.array(0.25)
  zero = {**result, 'norm': np.eye(5)[0], **paths.weigh(np.eye(5)[0])}
  zero['interval'] = np.array(0.0)
  files = paths.draw({'none': result, 'skipinit': zero}, tmp_path)
  assert [f.suffix for f in files] == ['.svg', '.png']
  text = ''.join(ElementTree.parse(files[0]).getroot().itertext())
  assert f'mean {result["effective_depth"]:.1f} ± 0.2)' in text
  assert '(mean 0.0)' in text
  assert 1000 < files[1].stat().st_size < 200_000

"""Deleting and reordering blocks against networks built by hand."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from skipinit_jax.analysis import lesions
from skipinit_jax.analysis.paths import changed_joins, find_blocks
from skipinit_jax.errors import InputError
from skipinit_jax.models import Join, stack_blocks

SHAPE = (12, 8, 8, 2)
METHODS = ('batchnorm', 'skipinit', 'fixup', 'divide_sqrt2')


network = functools.partial(toys.small_resnet, (3, 2))
data = functools.partial(toys.batch, SHAPE)


@functools.cache
def case(method):
  model, variables = network(method), toys.randomize(network(method), SHAPE)
  return model, variables, find_blocks(model, variables, data()[0])


def logits(model, variables, deleted=None):
  """Of the network without some blocks, in the way that is measured."""
  blocks = find_blocks(model, variables, data()[0])
  deleted = np.zeros(len(blocks), bool) if deleted is None else deleted

  @jax.jit
  def run(variables, deleted):
    with changed_joins(blocks, lesions._delete(deleted)):
      return model.apply(variables, data()[0], train=False)

  return run(variables, jnp.asarray(deleted))


def close(a, b, rtol=1e-4, atol=1e-5, **kwargs):
  np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, **kwargs)


@pytest.mark.parametrize('method', METHODS)
def test_deleting_nothing_changes_nothing(method):
  model, variables, _ = case(method)
  close(
    logits(model, variables), model.apply(variables, data()[0], train=False)
  )


@pytest.mark.parametrize('method', ['batchnorm', 'skipinit'])
def test_deleting_a_block_is_the_network_without_it(method):
  model, variables, blocks = case(method)
  assert [b[:2] for b in blocks[:2]] == [
    ('stage1', 'block1'),
    ('stage1', 'block2'),
  ]
  # Without the second block the first stage has two blocks.
  smaller = model.clone(stage_sizes=(2, 2))
  moved = {}
  for name, tree in variables.items():
    stage = tree['stage1']
    stage = {'block1': stage['block1'], 'block2': stage['block3']}
    moved[name] = {**tree, 'stage1': stage}
  deleted = np.array([False, True, False, False, False])
  expected = smaller.apply(moved, data()[0], train=False)
  close(logits(model, variables, deleted), expected)
  assert float(jnp.abs(expected - logits(model, variables)).max()) > 0.01


def test_deleting_every_block_at_alpha_zero_changes_nothing():
  model, variables, _ = case('skipinit')
  zero = jax.tree_util.tree_map_with_path(
    lambda path, v: v * 0 if path[-1].key == 'alpha' else v, variables
  )
  everything = np.ones(5, bool)
  np.testing.assert_array_equal(
    logits(model, zero, everything), logits(model, zero)
  )
  # Where alpha is not 0 it does.
  different = logits(model, variables, everything) - logits(model, variables)
  assert float(jnp.abs(different).max()) > 0.01


@pytest.mark.parametrize('method', METHODS)
def test_a_block_swapped_with_itself_changes_nothing(method):
  _, variables, blocks = case(method)
  same = lesions.reorder(variables, blocks, range(5))
  assert jax.tree.structure(same) == jax.tree.structure(dict(variables))
  assert all(
    a is b
    for a, b in zip(
      jax.tree.leaves(same), jax.tree.leaves(variables), strict=True
    )
  )


@pytest.mark.parametrize('method', METHODS)
def test_a_reordered_network_is_one_built_in_that_order(method):
  """Also by hand: the modules called in another order, values unmoved."""
  model, variables, blocks = case(method)
  order = [2, 0, 1, 3, 4]
  moved = lesions.reorder(variables, blocks, order)
  by_hand = {}
  for name, tree in variables.items():
    stage = dict(tree['stage1'])
    stage['block1'] = tree['stage1']['block3']
    stage['block2'] = tree['stage1']['block1']
    stage['block3'] = tree['stage1']['block2']
    by_hand[name] = {**tree, 'stage1': stage}
  images, _ = data()
  expected = model.apply(by_hand, images, train=False)
  got = model.apply(moved, images, train=False)
  np.testing.assert_array_equal(got, expected)
  unmoved = model.apply(variables, images, train=False)
  assert float(jnp.abs(got - unmoved).max()) > 0.01
  back = lesions.reorder(moved, blocks, np.argsort(order))
  np.testing.assert_array_equal(model.apply(back, images, train=False), unmoved)


def test_only_equal_blocks_are_swapped():
  _, variables, blocks = case('skipinit')
  groups = lesions.equal_blocks(variables, blocks)
  assert groups == [[0, 1, 2]]  # The second stage's first block projects.
  _, variables, blocks = case('fixup')
  assert lesions.equal_blocks(variables, blocks) == [[0, 1, 2]]
  rng = np.random.default_rng(0)
  groups = [[0, 2, 3], [1, 4]]
  seen = {tuple(lesions.random_swaps(rng, 6, groups, 1)) for _ in range(200)}
  swaps = [(0, 2), (0, 3), (2, 3), (1, 4)]
  expected = set()
  for a, b in swaps:
    order = np.arange(6)
    order[[a, b]] = order[[b, a]]
    expected.add(tuple(order))
  assert seen == expected


def test_swaps_are_drawn_evenly_from_all_pairs():
  rng, groups = np.random.default_rng(0), [[0, 1, 2], [3, 4]]
  n, counts = 4000, {}
  for _ in range(n):
    order = tuple(lesions.random_swaps(rng, 5, groups, 1))
    counts[order] = counts.get(order, 0) + 1
  assert len(counts) == 4
  bound = 4 * (n * 0.25 * 0.75) ** 0.5
  assert all(abs(c - n / 4) < bound for c in counts.values())


@pytest.mark.parametrize('method', ['batchnorm', 'fixup'])
def test_measure_against_networks_one_by_one(method):
  model, variables, blocks = case(method)
  images, labels = data()
  result = lesions.measure(
    model, variables, images, labels, draws=2, points=3, seed=5
  )

  def error(variables, deleted=None):
    wrong = logits(model, variables, deleted).argmax(-1) != labels
    return float(wrong.mean())

  close(result['whole'], error(variables))
  close(result['single'], [error(variables, r) for r in np.eye(5, dtype=bool)])
  np.testing.assert_array_equal(result['deleted'], [1, 3, 5])
  assert result['several'].shape == result['swapped'].shape == (3, 2)
  close(result['several'][2], error(variables, np.ones(5, bool)))
  assert set(result['several'][0]) <= set(result['single'])
  # All orders of the first stage's blocks that a swap can make.
  orders = [[1, 0, 2, 3, 4], [2, 1, 0, 3, 4], [0, 2, 1, 3, 4]]
  pairs = list(itertools.combinations(range(5), 2))

  def tau(order):  # Of Kendall: pairs in the right order less the others.
    right = sum(order[a] < order[b] for a, b in pairs)
    return (2 * right - len(pairs)) / len(pairs)

  possible = {
    (
      round(error(lesions.reorder(variables, blocks, order)), 6),
      round(tau(order), 6),
    )
    for order in orders
  }
  for e, found in zip(result['swapped'][0], result['tau'][0], strict=True):
    assert (round(e, 6), round(found, 6)) in possible
  np.testing.assert_array_equal(result['transitions'], np.arange(5) == 3)


def test_a_scanned_network_is_unrolled():
  model, variables, _ = case('skipinit')
  images, labels = data()
  options = {'draws': 1, 'points': 2}
  plain = lesions.measure(model, variables, images, labels, **options)
  scanned = lesions.measure(
    model.clone(scan=True), stack_blocks(variables), images, labels, **options
  )
  for name, value in plain.items():
    np.testing.assert_array_equal(scanned[name], value)


class OneModule(nn.Module):
  """All joins in one module: there are no blocks to swap."""

  @nn.compact
  def __call__(self, x, *, train):
    x = x.reshape(x.shape[0], -1)
    for i in range(2):
      x = Join(name=f'join{i}')(x, nn.Dense(x.shape[-1])(x))
    return nn.Dense(5)(x)


def test_without_equal_blocks_nothing_is_swapped(tmp_path):
  images, labels = data()
  model = OneModule()
  variables = model.init(jax.random.key(0), images, train=False)
  result = lesions.measure(model, variables, images, labels, draws=2)
  assert result['swapped'].shape == result['tau'].shape == (0, 2)
  assert result['single'].shape == (2,)
  assert lesions.draw({'none': result}, tmp_path)


def test_sizes_below_one_are_refused():
  model, variables, _ = case('skipinit')
  for name in ('draws', 'points'):
    with pytest.raises(InputError, match=f'{name}=0'):
      lesions.measure(model, variables, *data(), **{name: 0})


def test_figures_are_written(tmp_path):
  measured = {}
  for method in ('batchnorm', 'skipinit'):
    model, variables, _ = case(method)
    measured[method] = lesions.measure(
      model, variables, *data(), draws=2, points=3
    )
  files = lesions.draw(measured, tmp_path)
  assert [f.suffix for f in files] == ['.svg', '.png']
  assert 1000 < files[1].stat().st_size < 200_000

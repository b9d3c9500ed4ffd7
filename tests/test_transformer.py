"""The transformer of examples/: by hand, and under the analyses' tools."""

import functools
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.analysis import lesions, paths
from skipinit_jax.analysis.capture import capture, second_moment
from skipinit_jax.data import DATASETS
from skipinit_jax.models import alphas, stack_blocks
from skipinit_jax.training.config import default_config

FILE = Path(__file__).parents[1] / 'examples' / 'transformer.py'


def by_path():
  spec = importlib.util.spec_from_file_location('example_transformer', FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


example = by_path()
KINDS = ('postnorm', 'prenorm', 'skipinit', 'none')
UNNORMALIZED = ('skipinit', 'none')
DEPTH, WIDTH, BATCH = 3, 8, 12
BRANCHES = [
  f'block{i}/{name}' for i in (1, 2, 3) for name in ('attention', 'mlp')
]


def data(seed=0):
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.standard_normal((BATCH, 8, 8)), jnp.float32)
  return images, jnp.asarray(rng.integers(0, 10, BATCH))


@functools.cache
def case(kind):
  """A network without a scan, and variables that leave nothing at zero."""
  model = example.Transformer(kind, DEPTH, WIDTH, scan=False)
  shapes = jax.eval_shape(model.init, jax.random.key(0), data()[0])
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    value = 0.4 * rng.standard_normal(leaf.shape)
    if path[-1].key in ('scale', 'alpha'):
      value = 0.5 + np.abs(value)
    return jnp.asarray(value, leaf.dtype)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def by_hand(kind, variables, deleted=(), images=None):
  """The network in NumPy; logits, and name -> arrays seen on the way."""
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)[
    'params'
  ]
  images = np.asarray(data()[0] if images is None else images, np.float64)
  seen = {}

  def dense(layer, x):
    return layer.get('alpha', 1) * (x @ layer['kernel'] + layer['bias'])

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * layer['scale'] + layer['bias']

  def attention(layers, x):
    qkv = seen['qkv'] = dense(layers['qkv'], x)
    heads = []
    for h in range(4):
      q, k, v = (
        qkv[..., (4 * i + h) * WIDTH // 4 : (4 * i + h + 1) * WIDTH // 4]
        for i in range(3)
      )
      scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(WIDTH // 4))
      heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    return dense(layers['last'], np.concatenate(heads, -1))

  def mlp(layers, x):
    return dense(layers['last'], np.maximum(dense(layers['first'], x), 0))

  pixels = [
    images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(BATCH, 4)
    for i, j in itertools.product(range(4), repeat=2)
  ]
  x = dense(params['embed'], np.stack(pixels, 1)) + params['position']
  for name in BRANCHES:
    block, branch = name.split('/')
    layers = params['stage'][block][branch]
    y = norm(layers['norm'], x) if kind == 'prenorm' else x
    y = {'attention': attention, 'mlp': mlp}[branch](layers, y)
    y = y * (name not in deleted)
    seen[name] = x, y, x + y
    seen[f'{name}/qkv'] = seen['qkv']
    x = x + y
    x = norm(layers['norm'], x) if kind == 'postnorm' else x
  x = norm(params['norm'], x) if kind == 'prenorm' else x
  return dense(params['classifier'], x.mean(1)), seen


def cross_entropy(logits, labels):
  """The sum over the batch."""
  logits = logits - logits.max(-1, keepdims=True)
  right = logits[np.arange(BATCH), np.asarray(labels)]
  return (np.log(np.exp(logits).sum(-1)) - right).sum()


def close(a, b, rtol=2e-4, atol=2e-5, **kwargs):
  np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, **kwargs)


def largest(tree):
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('kind', KINDS)
def test_the_network_is_what_it_says_scanned_or_not(kind):
  model, variables = case(kind)
  expected, _ = by_hand(kind, variables)
  close(model.apply(variables, data()[0]), expected)
  scanned = model.clone(scan=True)
  close(scanned.apply(stack_blocks(variables), data()[0]), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_every_join_is_captured(kind):
  model, variables = case(kind)
  _, seen = by_hand(kind, variables)
  for of, values in (
    (model, variables),
    (model.clone(scan=True), stack_blocks(variables)),
  ):
    captured = capture(of, values, data()[0])
    names = [name.removeprefix('stage/') for name in captured['name']]
    assert names == BRANCHES
    for i, path in enumerate(('skip', 'branch', 'output')):
      expected = [np.square(seen[name][i]).mean() for name in names]
      close(second_moment(captured, path), expected)
    if kind == 'skipinit':
      scalars = alphas(variables['params'])
      expected = [float(scalars[f'stage/{name}']) for name in names]
      close(captured['alpha'], expected)


@pytest.mark.parametrize('kind', ['postnorm', 'skipinit'])
def test_layers_are_captured_by_a_pattern(kind):
  model, variables = case(kind)
  _, seen = by_hand(kind, variables)
  pattern = r'stage/block\d/attention/qkv'
  captured = capture(model, variables, data()[0], pattern=pattern)
  names = [f'block{i}/attention/qkv' for i in (1, 2, 3)]
  assert captured['name'].tolist() == [f'stage/{name}' for name in names]
  expected = [np.square(seen[name]).mean() for name in names]
  close(second_moment(captured, 'output'), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('kind', KINDS)
def test_the_gradients_of_all_paths_add_up_to_the_gradient(kind):
  model, variables = case(kind)
  images, labels = data()
  blocks, gradient_along = paths.path_gradients(
    model, variables, images, labels
  )
  assert ['/'.join(block[1:3]) for block in blocks] == BRANCHES

  total, norms = jax.tree.map(jnp.zeros_like, (variables['params'], images)), []
  for selection in itertools.product((False, True), repeat=len(BRANCHES)):
    along = gradient_along(jnp.array(selection))
    norms.append(largest(along[1]))
    total = jax.tree.map(jnp.add, total, along)
    for block, selected in zip(BRANCHES, selection, strict=True):
      block, name = block.split('/')
      last = along[0]['stage'][block][name]['last']['kernel']
      assert bool(largest(last)) == selected
  assert np.sum(np.array(norms) > 0.01 * max(norms)) > len(BRANCHES)

  # Below all blocks, along random directions: the pixels, the positions.
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)[
    'params'
  ]
  images, rng = np.asarray(images, np.float64), np.random.default_rng(3)
  for _ in range(3):
    pixels = rng.standard_normal(images.shape)
    position = rng.standard_normal(params['position'].shape)

    def loss(a, b, pixels=pixels, position=position):
      moved = {**params, 'position': params['position'] + b * position}
      logits, _ = by_hand(kind, {'params': moved}, images=images + a * pixels)
      return cross_entropy(logits, labels)

    step = 1e-7
    slopes = (loss(step, 0) - loss(-step, 0), loss(0, step) - loss(0, -step))
    for gradient, direction, slope in zip(
      (total[1], total[0]['position']), (pixels, position), slopes, strict=True
    ):
      product = np.asarray(gradient, np.float64) * direction
      tolerance = 1e-4 * np.linalg.norm(product)
      close(product.sum(), slope / (2 * step), atol=tolerance)


@pytest.mark.parametrize('kind', UNNORMALIZED)
def test_the_shortest_path_is_the_classifier_alone(kind):
  model, variables = case(kind)
  images, labels = data()
  blocks, gradient = paths.path_gradients(model, variables, images, labels)
  along, _ = gradient(jnp.zeros(len(blocks), bool))
  logits, _ = by_hand(kind, variables)
  wrong = np.exp(logits - logits.max(-1, keepdims=True))
  wrong /= wrong.sum(-1, keepdims=True)
  wrong[np.arange(BATCH), labels] -= 1
  kernel = np.asarray(variables['params']['classifier']['kernel'])
  expected = np.tile((wrong @ kernel.T / 16).sum(0), (1, 16, 1))
  close(along['position'], expected)


@pytest.mark.parametrize('kind', KINDS)
def test_a_deleted_branch_is_the_network_without_it(kind):
  model, variables = case(kind)
  images, labels = data()
  result = lesions.measure(
    model.clone(scan=True), stack_blocks(variables), images, labels, points=2
  )

  def error(*deleted):
    logits, _ = by_hand(kind, variables, deleted)
    return np.mean(logits.argmax(-1) != np.asarray(labels))

  close(result['whole'], error())
  close(result['single'], [error(name) for name in BRANCHES])
  close(result['several'][-1], error(*BRANCHES))
  # Attention changes places with attention, an MLP with an MLP.
  blocks = paths.find_blocks(model, variables, images)
  groups = lesions.equal_blocks(variables, blocks)
  assert sorted(groups) == [[0, 2, 4], [1, 3, 5]]
  assert not result['transitions'].any()


@pytest.mark.parametrize('kind', KINDS)
def test_a_deleted_block_is_a_smaller_network(kind):
  model, variables = case(kind)
  images, _ = data()
  blocks = paths.find_blocks(model, variables, images)
  deleted = jnp.array(['block2' in block for block in blocks])
  with paths.changed_joins(blocks, lesions._delete(deleted)):
    logits = model.apply(variables, images)
  expected, _ = by_hand(kind, variables, ['block2/attention', 'block2/mlp'])
  close(logits, expected)
  assert largest(logits - model.apply(variables, images)) > 0.01
  if kind != 'postnorm':  # Its normalization stays behind.
    params, stage = variables['params'], variables['params']['stage']
    stage = {'block1': stage['block1'], 'block2': stage['block3']}
    smaller = {'params': {**params, 'stage': stage}}
    close(logits, model.clone(depth=2).apply(smaller, images))


def test_blocks_change_places():
  model, variables = case('none')
  images, _ = data()
  blocks = paths.find_blocks(model, variables, images)
  moved = lesions.reorder(variables, blocks, [4, 5, 2, 3, 0, 1])
  params, stage = variables['params'], variables['params']['stage']
  stage = {**stage, 'block1': stage['block3'], 'block3': stage['block1']}
  expected, _ = by_hand('none', {'params': {**params, 'stage': stage}})
  close(model.apply(moved, images), expected)


def test_at_alpha_zero_the_blocks_are_the_identity():
  model, variables = case('skipinit')
  zero = jax.tree_util.tree_map_with_path(
    lambda path, v: 0 * v if path[-1].key == 'alpha' else v, variables
  )
  captured = capture(model, zero, data()[0])
  np.testing.assert_array_equal(captured['share'], 0)
  params = zero['params']
  images = np.asarray(data()[0]).reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
  x = images.reshape(-1, 16, 4) @ params['embed']['kernel']
  x = x + params['embed']['bias'][None, None] + params['position']
  expected = x.mean(1) @ params['classifier']['kernel']
  expected = expected + params['classifier']['bias'][None]
  close(model.apply(zero, data()[0]), expected)
  # Where alpha is not 0 they are not.
  assert largest(model.apply(variables, data()[0]) - expected) > 0.1


@pytest.mark.sampled(2)
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_from_the_start_is_finite(kind):
  model = example.Transformer(kind, 2, WIDTH, scan=False)
  images, labels = data()
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  gradient = jax.jit(
    jax.grad(functools.partial(example.evaluate, model), has_aux=True)
  )
  grads, _ = gradient(params, images, labels)
  mlp = grads['stage']['block2']['mlp']
  assert bool(largest(mlp['first'])) == (kind != 'skipinit')
  if kind == 'skipinit':  # The scalars have to leave 0 first.
    assert largest(mlp['last']['kernel']) == 0
    assert all(float(jnp.abs(alpha)) > 0 for alpha in alphas(grads).values())
  # Adam's first step, but for its epsilon.
  params = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, grads)
  grads, _ = gradient(params, images, labels)
  assert largest(grads['stage']['block2']['mlp']['first']) > 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_training_is_adam_with_a_warm_up_and_a_cosine():
  model = example.Transformer('skipinit', 1, WIDTH)
  images, labels = data()
  rng, steps, rate = np.random.default_rng(0), 20, 0.05
  rows, held = rng.integers(0, BATCH, (steps, 4)), np.arange(BATCH)
  loss, accuracy = example.train(model, data(), rows, held, rate, 7)
  params = jax.jit(model.init)(jax.random.key(7), images[:1])['params']
  gradient = jax.jit(
    jax.grad(functools.partial(example.evaluate, model), has_aux=True)
  )
  mean = square = jax.tree.map(jnp.zeros_like, params)
  for i, batch in enumerate(rows):
    now = rate * min(i / 2, 0.5 + 0.5 * np.cos(np.pi * (i - 2) / 18))
    grads, _ = gradient(params, images[batch], labels[batch])
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda s, g: 0.999 * s + 1e-3 * g**2, square, grads)
    m, s = 1 - 0.9 ** (i + 1), 1 - 0.999 ** (i + 1)
    params = jax.tree.map(
      lambda p, a, b, now=now, m=m, s=s: (
        p - now * (a / m) / (jnp.sqrt(b / s) + 1e-8)
      ),
      params,
      mean,
      square,
    )
  expected = example.evaluate(model, params, images[held], labels[held])
  close((loss, accuracy), expected, rtol=1e-3)
  assert all(float(jnp.abs(alpha)) > 0.01 for alpha in alphas(params).values())


def test_the_test_split_is_the_projects():
  images, labels = example.load()
  config = default_config()
  config.data.name = 'digits'
  project = DATASETS['digits'](config.data)
  assert len(project.eval_images) == example.HELD_OUT
  test = 8 * (images[-example.HELD_OUT :] + 1)
  np.testing.assert_array_equal(test, project.eval_images[..., 0])
  np.testing.assert_array_equal(
    labels[-example.HELD_OUT :], project.eval_labels
  )
  # The rest are all there, once.
  rest = np.sort(8 * (images[: -example.HELD_OUT] + 1).reshape(-1, 64), axis=0)
  expected = np.sort(project.images.reshape(-1, 64), axis=0)
  np.testing.assert_array_equal(rest, expected)


def test_every_epoch_shows_every_image_once():
  rows = example.batches(24, 5, seed=0)
  assert rows.shape == (5, example.BATCH_SIZE)
  epochs = rows.ravel()[:72].reshape(3, 24)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(24), (3, 1)))
  assert (epochs[0] != epochs[1]).any()
  assert (rows != example.batches(24, 5, seed=1)).any()


@pytest.mark.parametrize(
  ('best', 'chosen', 'tried'),
  [
    (-10, -10, [-12, -10, -8]),
    (-6.5, -6, [-12, -10, -8, -6, -4]),
    (-14.5, -14, [-16, -14, -12, -10, -8]),
    (-99, -16, [-16, -14, -12, -10, -8]),
    (0, -4, [-12, -10, -8, -6, -4]),
  ],
)
def test_the_search_leaves_the_best_off_the_edge(best, chosen, tried):
  def run(exponent):
    return {'accuracy': -abs(exponent - best)}

  found, runs = example.search(example.Plan(), run)
  assert found == chosen
  assert [r['exponent'] for r in runs] == tried


def test_of_rates_that_all_fail_the_smallest_is_taken():
  found, runs = example.search(example.Plan(), lambda _: {'accuracy': 0.1})
  assert (found, len(runs)) == (-16, 5)

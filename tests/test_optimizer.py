"""Schedules and the optimizer against loops written out in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import METHODS
from skipinit_jax.models.resnet import WideResNet
from skipinit_jax.models.stages import stack_blocks, unstack_blocks
from skipinit_jax.training.config import default_config
from skipinit_jax.training.optimizer import (
  adaptive_clip,
  make_optimizer,
  make_schedule,
  peak_rate,
)

SIZE, BATCH = 100, 10  # 10 steps an epoch.


def recipe(schedule='constant', epochs=12.0, **fields):
  config = default_config()
  config.batch_size, config.epochs = BATCH, epochs
  config.optimizer.learning_rate = 0.4
  config.optimizer.l2 = 0.0
  config.schedule.name = schedule
  for field, value in fields.items():
    part = config.optimizer if field in config.optimizer else config.schedule
    part[field] = value
  return config


def rates(config, steps=120):
  schedule = make_schedule(config, SIZE)
  shares = np.array([float(schedule(jnp.int32(s))) for s in range(steps)])
  return peak_rate(config) * shares


# One step's rate, by the words of the schedule's description.


def constant(step):
  return 0.4


def halving(step, hold, every):
  rate, boundary = 0.4, hold
  while boundary <= step:
    rate, boundary = rate / 2, boundary + every
  return rate


def stepped(step, boundaries, factor):
  for boundary in boundaries:
    if step >= boundary:
      factor_now = factor
      boundaries = boundaries[1:]
      return factor_now * stepped(step, boundaries, factor)
  return 0.4


def cosine(step, warmup=0, total=120):
  done = (step - warmup) / (total - warmup)
  return 0.2 * (1 + math.cos(math.pi * done))


SCHEDULES = {
  'constant': (recipe(), constant),
  'halving': (
    recipe('halving', hold_epochs=5.0, every_epochs=2.0),
    lambda s: halving(s, 50, 20),
  ),
  'halving with an interval that is no whole number': (
    recipe('halving', hold_epochs=4.5, every_epochs=2.5),
    lambda s: halving(s, 45, 25),
  ),
  'step': (
    recipe('step', boundaries=(3, 6.5, 9), factor=0.1),
    lambda s: stepped(s, (30, 65, 90), 0.1),
  ),
  'cosine': (recipe('cosine'), cosine),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedule_is_what_its_description_says_at_every_step(name):
  config, rate = SCHEDULES[name]
  expected = [rate(step) for step in range(120)]
  np.testing.assert_allclose(rates(config), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warm_up_is_linear_from_0_and_then_the_schedule_goes_on(name):
  config, rate = SCHEDULES[name]
  config = config.copy_and_resolve_references()
  config.schedule.warmup_epochs = 1.5
  if name == 'cosine':
    rate = functools.partial(cosine, warmup=15)
  expected = [0.4 * s / 15 if s < 15 else rate(s) for s in range(120)]
  np.testing.assert_allclose(rates(config), expected, rtol=1e-5, atol=1e-8)


def test_boundaries_inside_the_warm_up_count_each():
  config = recipe('step', boundaries=(1, 2), factor=0.1, warmup_epochs=3.0)
  np.testing.assert_allclose(rates(config)[30:], 0.4 * 0.1 * 0.1, rtol=1e-5)


@pytest.mark.parametrize('every', [1e-9, 0.0999])
def test_halvings_closer_than_a_step_are_refused(every):
  with pytest.raises(InputError) as error:
    make_schedule(recipe('halving', hold_epochs=1.0, every_epochs=every), SIZE)
  assert str(error.value) == (
    f'schedule.every_epochs={every:g} of 100 images is less than one step of '
    'batch_size=10; expected at least 0.1'
  )


def test_the_rate_halves_at_every_step_until_nothing_is_left():
  config = recipe('halving', 40.0, hold_epochs=1.0, every_epochs=0.1)
  expected = [0.4 * 0.5 ** max(step - 9, 0) for step in range(400)]
  np.testing.assert_allclose(
    rates(config, 400), expected, rtol=1e-5, atol=1e-30
  )


def test_cosine_ends_at_0():
  schedule = make_schedule(recipe('cosine', warmup_epochs=2.0), SIZE)
  assert float(schedule(120)) == pytest.approx(0, abs=1e-8)
  assert float(schedule(20)) == pytest.approx(1.0)


def test_peak_is_scaled_with_the_batch_where_asked():
  config = recipe(reference_batch=40, warmup_epochs=1.0)
  assert rates(config)[-1] == pytest.approx(0.4 * BATCH / 40)


# The optimizer, on a tree with every kind of leaf.


def tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {
    'stem': {'kernel': (3, 3, 2, 4)},
    'stage1': {
      'block1': {
        'conv1': {'kernel': (3, 3, 4, 4), 'bias': (4,)},
        'conv2': {'kernel': (1, 1, 4, 4), 'bias': (4,), 'alpha': ()},
        'bias1a': {'scalar_bias': ()},
        'norm1': {'scale': (4,), 'bias': (4,)},
      }
    },
    'classifier': {'kernel': (4, 5), 'bias': (5,)},
  }
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(
      leaf, np.float64
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def run(config, method='skipinit', steps=4):
  """Parameters after some steps of the optimizer."""
  tx = make_optimizer(config, METHODS[method])
  params = tree(0)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for step, rate in enumerate(rates(config, steps)):
    updates, state = update(tree(step + 1), state, params)
    scaled = jax.tree.map(lambda u, r=float(rate): r * u, updates)
    params = jax.tree.map(jnp.add, params, scaled)
  return flat(params)


def by_hand(config, change=lambda g, p: g, decay=('kernel',), reduced=1.0):
  """The same, by a loop over leaves in float64."""
  optimizer = config.optimizer
  schedule = rates(config)
  params = flat(tree(0))
  traces = {name: np.zeros_like(p) for name, p in params.items()}
  for step in range(4):
    grads = change(flat(tree(step + 1)), params)
    for name, p in params.items():
      leaf, g = name.split('/')[-1], grads[name]
      if leaf in decay:
        g = g + optimizer.l2 * p
      if leaf != 'kernel':
        g = reduced * g
      traces[name] = optimizer.momentum * traces[name] + g
      step_by = traces[name]
      if optimizer.nesterov:
        step_by = g + optimizer.momentum * traces[name]
      params[name] = p - schedule[step] * step_by
  return params


def assert_close(ours, theirs, rtol=1e-5):
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_allclose(
      ours[name], theirs[name], rtol=rtol, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('l2', [0.0, 0.3])
def test_sgd_with_momentum_and_l2_in_the_gradient(nesterov, l2):
  config = recipe(nesterov=nesterov, l2=l2, momentum=0.7, warmup_epochs=0.2)
  assert_close(run(config), by_hand(config))


def test_l2_is_for_the_leaves_that_the_recipe_names():
  decay = ('bias', 'alpha')
  config = recipe(l2=0.3, decay=decay)
  assert_close(run(config), by_hand(config, decay=decay))


def test_clipping_by_global_norm_leaves_l2_alone():
  config = recipe(clip_norm=0.5, l2=0.3)

  def clip(grads, params):
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    return {n: g * min(1, 0.5 / norm) for n, g in grads.items()}

  assert_close(run(config), by_hand(config, clip))


def test_a_gradient_within_the_norm_is_not_clipped():
  assert_close(run(recipe(clip_norm=1e3)), by_hand(recipe()))


def clip_adaptively(grads, params, threshold=0.02):
  """Brock et al. 2021, equation 3, unit by unit."""
  clipped = {}
  for name, g in grads.items():
    w, leaf = params[name], name.split('/')[-1]
    g = np.array(g)
    if name.startswith('classifier'):
      clipped[name] = g
      continue
    units = [...]
    if leaf == 'kernel':
      units = [(..., i) for i in range(g.shape[-1])]
    for unit in units:
      length = math.sqrt((g[unit] ** 2).sum())
      limit = threshold * max(math.sqrt((w[unit] ** 2).sum()), 1e-3)
      if length > limit:
        g[unit] = g[unit] * limit / length
    clipped[name] = g
  return clipped


def test_adaptive_clipping_is_equation_3():
  config = recipe(adaptive_clip=0.02, l2=0.3)
  assert_close(run(config), by_hand(config, clip_adaptively))


def test_adaptive_clipping_scales_some_units_and_leaves_others():
  grads, params = tree(1), tree(0)
  kernel = ('stage1/block1/conv1/kernel', 'stem/kernel')
  tx = adaptive_clip(0.9)
  ours, _ = tx.update(grads, tx.init(params), params)
  assert_close(flat(ours), clip_adaptively(flat(grads), flat(params), 0.9))
  same = [
    np.isclose(flat(ours)[k][..., i], flat(grads)[k][..., i]).all()
    for k in kernel
    for i in range(4)
  ]
  assert {*same} == {True, False}


def test_adaptive_clipping_lets_zero_parameters_move():
  params = jax.tree.map(jnp.zeros_like, tree(0))
  grads, tx = tree(1), adaptive_clip(0.02)
  ours, _ = tx.update(grads, tx.init(params), params)
  ours = flat(ours)
  assert abs(ours['stage1/block1/conv2/alpha']) == pytest.approx(0.02 * 1e-3)
  assert_close(ours, clip_adaptively(flat(grads), flat(params)))


def test_the_classifier_is_not_clipped_adaptively():
  grads = jax.tree.map(lambda g: 1e3 * g, tree(1))
  params, tx = tree(0), adaptive_clip(0.02)
  ours, _ = tx.update(grads, tx.init(params), params)
  for name, leaf in ours['classifier'].items():
    np.testing.assert_array_equal(leaf, grads['classifier'][name])


def test_the_scalars_can_be_exempt_from_adaptive_clipping():
  config = recipe(adaptive_clip=0.02, clip_alpha=False)

  def clip(grads, params):
    alphas = {n: g for n, g in grads.items() if n.endswith('alpha')}
    return clip_adaptively(grads, params) | alphas

  assert_close(run(config), by_hand(config, clip))


def test_lars_scales_each_kernel_to_its_own_norm():
  """You et al. 2017, algorithm 1: g + l2 w, times |w| / |g + l2 w|."""
  config = recipe(name='lars', l2=0.3, nesterov=True)

  def scale(grads, params):
    scaled = {}
    for name, g in grads.items():
      w = params[name]
      if name.endswith('kernel'):
        g = g + 0.3 * w
        g = math.sqrt((w**2).sum() / (g**2).sum()) * g
      scaled[name] = g
    return scaled

  assert_close(run(config), by_hand(config, scale, decay=()))


def test_muon_moves_kernels_by_orthogonal_matrices_and_the_rest_by_adam():
  config = recipe(name='muon')
  tx = make_optimizer(config, METHODS['skipinit'])
  params, grads = tree(0), tree(1)
  updates, _ = tx.update(grads, tx.init(params), params)
  got, grads = flat(updates), flat(grads)
  for name, update in got.items():
    if not name.endswith('kernel') or name.startswith('classifier'):
      # Adam's first step: the sign of the gradient.
      np.testing.assert_allclose(update, -np.sign(grads[name]), atol=1e-4)
      continue
    matrix, gradient = (
      x.reshape(-1, x.shape[-1]) for x in (update, grads[name])
    )
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    # All singular values lie near .2 sqrt(max(rows, columns)).
    values = np.diag(left.T @ -matrix @ right.T)
    values = values / (0.2 * math.sqrt(max(matrix.shape)))
    assert 0.5 < values.min() <= values.max() < 1.3, name
    rest = -matrix - left @ np.diag(np.diag(left.T @ -matrix @ right.T)) @ right
    np.testing.assert_allclose(rest, 0, atol=1e-3)


def test_muon_decays_apart_from_the_gradient():
  with_decay, without = (
    run(recipe(name='muon', l2=l2), steps=1) for l2 in (0.1, 0.0)
  )
  before = flat(tree(0))
  for name, value in with_decay.items():
    less = 0.4 * 0.1 * before[name] if name.endswith('kernel') else 0
    np.testing.assert_allclose(value, without[name] - less, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('name', ['lars', 'muon'])
def test_stacked_kernels_move_as_those_of_the_blocks(name):
  model = WideResNet(22, 1, 3, method='skipinit', biases=True)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
  )['params']
  rng = np.random.default_rng(0)
  params, grads = (
    jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes
    )
    for _ in range(2)
  )
  config = recipe(name=name, l2=0.1)
  tx = make_optimizer(config, METHODS['skipinit'])
  unrolled, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  stacked = stack_blocks(params)
  scanned, _ = jax.jit(tx.update)(
    stack_blocks(grads), tx.init(stacked), stacked
  )
  assert_close(flat(unstack_blocks(scanned)), flat(unrolled), rtol=1e-4)


@pytest.mark.parametrize('method', ['skipinit', 'fixup'])
def test_adaptive_clipping_of_stacked_leaves_is_that_of_the_blocks(method):
  model = WideResNet(22, 1, 3, method=method, biases=True)  # Two stacked.
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
  )['params']
  rng = np.random.default_rng(0)
  params, grads = (
    jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes
    )
    for _ in range(2)
  )
  tx = adaptive_clip(0.5)
  unrolled, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  stacked = stack_blocks(params)
  assert 'blocks' in stacked['stage1']
  scanned, _ = jax.jit(tx.update)(
    stack_blocks(grads), tx.init(stacked), stacked
  )
  assert_close(flat(unstack_blocks(scanned)), flat(unrolled), rtol=1e-6)
  assert_close(flat(unrolled), clip_adaptively(flat(grads), flat(params), 0.5))


@pytest.mark.parametrize('reference', [None, 2])
def test_fixup_reduces_all_rates_but_the_kernels_before_scaling(reference):
  config = recipe(reference_batch=reference)
  # The peak is 0.4 * BATCH / reference; the rate of the others stays 0.04.
  scale = BATCH / (reference or BATCH)
  expected = by_hand(config, reduced=0.1 / scale)
  assert_close(run(config, 'fixup'), expected)
  one, before, gradient = run(config, 'fixup', 1), flat(tree(0)), flat(tree(1))
  for name in ('stage1/block1/conv2/alpha', 'classifier/bias'):
    moved = before[name] - one[name]
    np.testing.assert_allclose(moved, 0.04 * gradient[name], rtol=1e-4)


def test_fixup_has_one_rate_where_the_recipe_says_so():
  config = recipe(reference_batch=2, reduced_rate=False)
  assert_close(run(config, 'fixup'), by_hand(config))


@pytest.mark.parametrize('method', sorted(METHODS.keys() - {'fixup'}))
def test_other_methods_have_one_rate(method):
  assert_close(run(recipe(), method), by_hand(recipe()))


@pytest.mark.parametrize('name', ['sgd', 'lars', 'muon'])
@pytest.mark.parametrize('method', ['skipinit', 'fixup'])
def test_the_rate_is_no_part_of_the_program(name, method):
  """Runs that differ in their rate share one, see `program.IN_STATE`."""
  params = WideResNet(10, 1, num_classes=10, method=method).init(
    jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False
  )['params']
  programs = []
  for rate in (0.1, 0.37):
    config = recipe(
      name=name,
      learning_rate=rate,
      reference_batch=7,
      l2=1e-4,
      adaptive_clip=0.1,
    )
    tx = make_optimizer(config, METHODS[method])
    state = tx.init(params)
    made = jax.jit(tx.update).lower(params, state, params)
    programs.append(made.as_text())
  assert programs[0] == programs[1]

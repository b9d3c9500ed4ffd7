"""The training and evaluation steps against numpy and against themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from skipinit_jax.analysis.capture import capture
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.resident import Resident
from skipinit_jax.models.methods import METHODS
from skipinit_jax.models.parameters import block_names
from skipinit_jax.training import step as steps
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import default_config
from skipinit_jax.training.devices import AXIS, message, replicate, shard
from skipinit_jax.training.network import init_variables
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import make_program

N, BATCH, CLASSES = 24, 8, 6
WITHOUT_STATISTICS = sorted(METHODS.keys() - {'batchnorm'})


def recipe(**changes) -> ConfigDict:
  config = default_config()
  config.batch_size, config.epochs = BATCH, 10.0
  config.model.depth, config.model.width = 10, 1
  config.model.alpha = None
  config.model.biases = True
  config.optimizer.learning_rate = 0.05
  config.schedule.name = 'constant'
  config.log_every_steps = 3
  for name, value in changes.items():
    part, *path = config, *name.split('__')
    for field in path[:-1]:
      part = part[field]
    part[path[-1]] = value
  return config


@functools.cache
def toy(**fields):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (N, 8, 8, 1), np.uint8)
  labels = rng.integers(0, CLASSES, N)
  augment = Augmentation(CLASSES, np.array([127.0]), np.array([74.0]), **fields)
  return Resident('toy', images, labels, images, labels, augment)


def data_of(config):
  data = config.data
  return toy(shift=data.shift, mixup=data.mixup, cutmix=data.cutmix)


@functools.cache
def init(method):
  """Parameters with every leaf away from its special starting value."""
  config = recipe(model__method=method)
  model = make_program(config, toy()).model
  variables = init_variables(model, (8, 8, 1), 0)
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda p: np.asarray(p + 0.1 * rng.normal(size=p.shape), np.float32),
    variables['params'],
  )
  return {**variables, 'params': params}


def fresh_state(config, program):
  variables = init(config.model.method)
  variables = jax.tree.map(jnp.array, variables)
  return steps.create_state(
    variables,
    program.tx,
    rate=peak_rate(config),
    seed=config.seed,
    ema=config.ema_decay is not None,
  )


def pure_step(config):
  """The step that the recipe's program maps, not mapped."""
  mapped = {}

  def keep(step, split, devices=None, **_):
    mapped.setdefault('train', step)
    return step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('skipinit_jax.training.program.map_over_devices', keep)
    program = make_program(config, data_of(config))
  return mapped['train'], program


# Compiled without much optimization: they run a few times only.
OPTIONS = {'xla_backend_optimization_level': 0}


def run(config, devices=1, number=1, optimize=False):
  """The state and the metrics after some steps on so many virtual devices."""
  step, program = pure_step(config)
  data = data_of(config)
  inputs = (jnp.asarray(data.images), jnp.asarray(data.labels, jnp.int32))
  silence = {
    name: jnp.zeros(devices, jnp.int32) for name in ('stop', 'replaced')
  }
  mapped = jax.jit(
    jax.vmap(
      lambda state, silence: step(state, inputs, silence, 1),
      in_axes=(None, 0),
      out_axes=0,
      axis_name=AXIS,
      axis_size=devices,
    ),
    compiler_options=None if optimize else OPTIONS,
  )
  state, metrics = fresh_state(config, program), None
  for _ in range(number):
    state, metrics = mapped(state, silence)
    for leaf in jax.tree.leaves((state, metrics)):
      assert all(jnp.array_equal(x, leaf[0], equal_nan=True) for x in leaf)
    state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
  return jax.device_get((state, metrics))


def assert_close(ours, theirs, rtol=1e-4, atol=2e-6):
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree.leaves(theirs),
    strict=True,
  )
  for (path, a), b in pairs:
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(autouse=True)
def cheap_shares(monkeypatch):
  # Beta takes longer to compile than all the rest; test_augment has it.
  monkeypatch.setattr(
    jax.random, 'beta', lambda key, a, b: jax.random.uniform(key)
  )


# Everything that a cut of the batch could upset.
RICH = {
  'model__dropout': 0.3,
  'data__mixup': 0.5,
  'data__cutmix': 1.0,
  'label_smoothing': 0.1,
  'data__shift': 1,
  'optimizer__clip_norm': 0.5,
}


@functools.cache
def one_device(method, rich=False):
  return run(recipe(model__method=method, **(RICH if rich else {})))


def same_update(ours, theirs):
  (state, metrics), (other, other_metrics) = ours, theirs
  assert_close(state.params, other.params)
  assert_close(state.opt_state, other.opt_state, atol=2e-5)  # The gradient.
  assert_close(metrics, other_metrics)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('method', WITHOUT_STATISTICS)
def test_four_devices_make_the_step_of_one(method):
  config = recipe(model__method=method)
  same_update(run(config, devices=4), one_device(method))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('devices', [2, 4])
def test_devices_agree_on_random_draws(devices):
  config = recipe(model__method='skipinit', **RICH)
  same_update(run(config, devices), one_device('skipinit', True))


@pytest.mark.sampled(2)
@pytest.mark.parametrize('method', WITHOUT_STATISTICS)
def test_two_micro_batches_make_the_step_of_one(method):
  config = recipe(model__method=method, micro_batches=2)
  same_update(run(config), one_device(method))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(('micro_batches', 'devices'), [(4, 1), (2, 1), (2, 2)])
def test_micro_batches_agree_on_random_draws(micro_batches, devices):
  config = recipe(model__method='skipinit', micro_batches=micro_batches, **RICH)
  same_update(run(config, devices), one_device('skipinit', True))


def batchnorm(group, **changes):
  return recipe(
    model__method='batchnorm', model__statistics_group=group, **changes
  )


@functools.cache
def batchnorm_on_one(group):
  return run(batchnorm(group))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('group', ['all', '2'])
def test_devices_share_batch_statistics_as_the_group_says(group):
  ours = run(batchnorm(group), devices=4)
  same_update(ours, batchnorm_on_one(group))
  assert_close(ours[0].batch_stats, batchnorm_on_one(group)[0].batch_stats)


def test_statistics_of_a_device_depend_on_the_devices():
  ours = run(batchnorm('device'), devices=4)
  same_update(ours, batchnorm_on_one('2'))
  with pytest.raises(AssertionError):
    same_update(ours, batchnorm_on_one('all'))


def test_a_group_within_a_micro_batch_is_exact():
  ours = run(batchnorm('2', micro_batches=2))
  same_update(ours, batchnorm_on_one('2'))
  assert_close(ours[0].batch_stats, batchnorm_on_one('2')[0].batch_stats)


# The step on the real devices.


def real_run(config, number, per_call=1):
  data, program = data_of(config), make_program(config, data_of(config))
  state = replicate(fresh_state(config, program))
  (batch, _) = next(data.inputs(replicate, config, 0))
  for _ in range(0, number, per_call):
    state, metrics = program.train_step(state, batch, message(), per_call)
  return jax.device_get((state, metrics)), program


def test_mapped_step_is_the_pure_step():
  if BATCH % jax.device_count():
    pytest.skip('the batch does not divide')
  ours, _ = real_run(recipe(model__method='skipinit'), 1)
  same_update(ours, one_device('skipinit'))


def test_state_is_donated_and_the_step_compiled_once(tmp_path):
  config = recipe(model__method='skipinit', ema_decay=0.5)
  data = data_of(config)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: (
      compiled.append(name) if 'backend_compile' in name else None
    )
  )
  program = make_program(config, data)
  state = replicate(fresh_state(config, program))
  batch, _ = next(data.inputs(replicate, config, 0))
  silence = message()
  jax.block_until_ready((state, batch, silence))
  compiled.clear()
  for _ in range(3):
    old = jax.tree.leaves(state)
    state, _ = program.train_step(state, batch, silence, 1)
    assert all(leaf.is_deleted() for leaf in old)
  assert len(compiled) == 1
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
  pointers = [
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards
  ]
  assert len(pointers) == len({*pointers})
  with Checkpoints(tmp_path, config, print) as checkpoints:
    checkpoints.save(3, state)
    checkpoints.wait()
    restored = checkpoints.restore(3, jax.eval_shape(lambda: state))
  compiled.clear()
  program.train_step(restored, batch, silence, 1)
  assert not compiled


def test_runs_that_differ_in_rate_and_seed_share_a_program():
  def text(**changes):
    config = recipe(model__method='fixup', schedule__name='cosine', **changes)
    program = make_program(config, data_of(config))
    state = replicate(fresh_state(config, program))
    batch, _ = next(data_of(config).inputs(replicate, config, 0))
    return program.train_step.lower(state, batch, message(), 1).as_text()

  ours = text()
  assert text(seed=3, optimizer__learning_rate=0.7) == ours
  assert text(optimizer__l2=0.1) != ours


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
  ('method', 'scan'),
  [
    ('skipinit', False),
    ('batchnorm', True),
    pytest.param('fixup', False, marks=pytest.mark.slow),
    pytest.param('skipinit', True, marks=pytest.mark.slow),
    pytest.param('batchnorm', False, marks=pytest.mark.slow),
    pytest.param('fixup', True, marks=pytest.mark.slow),
  ],
)
def test_watched_shares_are_those_of_a_capture_of_the_whole_batch(method, scan):
  config = recipe(
    model__method=method,
    model__statistics_group='all',
    model__depth=16,
    model__scan=scan,
  )
  data = data_of(config)
  program = make_program(config, data)
  variables = init_variables(program.model, (8, 8, 1), 0)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda p: (p + 0.1 * rng.normal(size=p.shape)).astype(np.float32), variables
  )
  state = steps.create_state(variables, program.tx, rate=1.0, seed=0)
  batch, _ = next(data.inputs(replicate, config, 0))
  ours = jax.device_get(program.watch_step(replicate(state), batch))

  (images, labels, examples), (_, key) = jax.vmap(
    lambda _: steps.draw(state, batch, data.choose, BATCH), axis_name=AXIS
  )(jnp.zeros(1))
  images, _ = data.augmentation(images[0], labels[0], key[0], examples[0])
  model = program.model.clone(axis_name=None)
  theirs = capture(model, variables, images)
  assert [*theirs['name']] == block_names(state.params)
  assert len({*np.round(theirs['share'], 4)}) == 6
  np.testing.assert_allclose(ours['branch_share'], theirs['share'], rtol=1e-4)


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_watched_gradient_norms_are_those_of_each_block(micro_batches):
  config = recipe(model__method='skipinit', micro_batches=micro_batches)
  # At a rate of 1 without momentum the update is the gradient.
  config.optimizer.momentum = config.optimizer.l2 = 0.0
  config.optimizer.learning_rate = 1.0
  data, program = data_of(config), make_program(config, data_of(config))
  before = fresh_state(config, program)
  after, _ = run(config)
  grads = jax.tree.map(jnp.subtract, before.params, after.params)
  names = block_names(grads)
  assert names == [f'stage{s}/block1' for s in (1, 2, 3)]
  batch, _ = next(data.inputs(replicate, config, 0))
  norms = program.watch_step(replicate(before), batch)
  for name, norm in zip(names, norms['block_grad_norm'], strict=True):
    stage, block = name.split('/')
    square = sum(
      np.sum(np.square(np.asarray(leaf, np.float64)))
      for leaf in jax.tree.leaves(grads[stage][block])
    )
    np.testing.assert_allclose(norm, np.sqrt(square), rtol=1e-4)


def test_several_steps_in_a_call_are_single_steps():
  config = recipe(model__method='skipinit', model__dropout=0.2)
  (single, metrics), _ = real_run(config, 4)
  config.steps_per_call = 4
  (several, several_metrics), program = real_run(config, 4, per_call=4)
  assert int(several.step) == 4
  assert_close(several, single, rtol=1e-3, atol=2e-5)
  assert_close(several_metrics, metrics, rtol=1e-3, atol=2e-5)
  # The length of a call is no part of the program.
  state = replicate(several)
  batch, _ = next(data_of(config).inputs(replicate, config, 0))
  state, _ = program.train_step(state, batch, message(), 3)
  assert int(state.step) == 7


# What the step computes, against numpy.


def smooth_cross_entropy(logits, targets, smoothing):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  targets = (1 - smoothing) * targets + smoothing / logits.shape[-1]
  return -(targets * log_p).sum(-1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cross_entropy_is_in_float32(dtype, smoothing):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(30 * rng.normal(size=(20, CLASSES)), dtype)
  targets = rng.dirichlet(np.ones(CLASSES), 20).astype(np.float32)
  ours = steps.cross_entropy(logits, jnp.asarray(targets), smoothing)
  assert ours.dtype == jnp.float32
  expected = smooth_cross_entropy(logits, targets, smoothing)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_in_top_k_by_counting():
  rng = np.random.default_rng(0)
  logits = rng.integers(0, 4, (300, CLASSES)).astype(np.float32)  # Many ties.
  labels = rng.integers(0, CLASSES, 300)
  for k in (1, 2, 5, CLASSES, 50):
    expected = []
    for row, label in zip(logits, labels, strict=True):
      # Those before it: larger, or equal and lower.
      before = (row > row[label]).sum() + (row[:label] == row[label]).sum()
      expected.append(before < k)
    ours = steps.in_top_k(jnp.asarray(logits), jnp.asarray(labels), k)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('k', [1, 5, 10])
def test_logits_that_are_not_finite_are_wrong_whatever_the_label(bad, k):
  logits = np.zeros((CLASSES, CLASSES), np.float32)
  logits[:, 2] = bad
  every = jnp.arange(CLASSES)
  assert not steps.in_top_k(jnp.asarray(logits), every, k).any()
  assert not steps.in_top_k(jnp.full_like(logits, bad), every, k).any()


def test_minus_one_is_in_no_top_k():
  logits = jnp.zeros((2, CLASSES))
  assert not steps.in_top_k(logits, jnp.array([-1, -1]), 50).any()


@functools.cache
def short_run(ema_decay=0.7, **averages):
  config = recipe(
    model__method='skipinit',
    ema_decay=ema_decay,
    **averages,
    label_smoothing=0.2,
    optimizer__l2=0.01,
  )
  step, program = pure_step(config)
  data = data_of(config)
  inputs = (jnp.asarray(data.images), jnp.asarray(data.labels, jnp.int32))
  silence = {name: jnp.zeros(1, jnp.int32) for name in ('stop', 'replaced')}
  mapped = jax.jit(
    jax.vmap(
      lambda state, silence: step(state, inputs, silence, 1), (None, 0), 0, AXIS
    ),
    compiler_options=OPTIONS,
  )
  states, metrics = [fresh_state(config, program)], []
  for _ in range(7):
    out = jax.tree.map(lambda x: x[0], mapped(states[-1], silence))
    states.append(out[0])
    metrics.append(out[1])
  return config, program, states, jax.device_get(metrics)


def test_averaged_parameters_are_an_exponential_average():
  _, _, states, _ = short_run()
  average = jax.tree.map(np.float64, states[0].params)
  for state in states[1:]:
    average = jax.tree.map(
      lambda a, p: 0.7 * a + 0.3 * np.float64(p), average, state.params
    )
    assert_close(state.ema['params'], average, rtol=1e-5, atol=1e-6)


def test_the_decay_of_averages_warms_up_with_the_step():
  _, _, states, _ = short_run(ema_decay=0.3, ema_warmup=True)
  average = jax.tree.map(np.float64, states[0].params)
  for step, state in enumerate(states[1:]):
    # Brock et al. 2021, in their code: .1, .182, .25, and then .3.
    decay = min(0.3, (1 + step) / (10 + step))
    average = jax.tree.map(
      lambda a, p, d=decay: d * a + (1 - d) * np.float64(p),
      average,
      state.params,
    )
    assert_close(state.ema['params'], average, rtol=1e-5, atol=1e-6)


def losses_and_hits():
  """Each step's loss and top-1, from its parameters and its images."""
  config, program, states, _ = short_run()
  data = data_of(config)
  key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 3)[1]
  arrays = (jnp.asarray(data.images), jnp.asarray(data.labels))
  logits_of = jax.jit(
    lambda params, images: program.model.apply(
      {'params': params}, images, train=True
    ),
    compiler_options=OPTIONS,
  )
  for i, state in enumerate(states[:-1]):
    images, labels = data.choose(arrays, key, i, BATCH, jnp.arange(BATCH))
    logits = logits_of(state.params, data.augmentation.normalize(images))
    targets = np.eye(CLASSES)[labels]
    loss = smooth_cross_entropy(logits, targets, 0.2).mean()
    yield loss, (np.argmax(logits, -1) == labels).mean()


def test_loss_and_top1_are_averaged_since_the_last_log():
  _, _, _, metrics = short_run()
  losses, hits = np.array([*losses_and_hits()]).T
  for i, values in enumerate(metrics):
    since = i - i % 3
    assert values['loss'] == pytest.approx(
      losses[since : i + 1].mean(), rel=1e-4
    )
    assert values['top1'] == pytest.approx(hits[since : i + 1].mean())


def test_metrics_name_rate_and_norms():
  config, _, states, metrics = short_run()
  for i, values in enumerate(metrics):
    assert values['learning_rate'] == pytest.approx(0.05)
    leaves = jax.tree.leaves(states[i + 1].params)
    norm = np.sqrt(sum((np.float64(p) ** 2).sum() for p in leaves))
    assert values['param_norm'] == pytest.approx(norm, rel=1e-5)
    assert values['finite']
    assert values['skipped'] == values['stop'] == values['replaced'] == 0
  # The first gradient is what momentum starts from, without L2 on kernels.
  change = jax.tree_util.tree_map_with_path(
    lambda path, before, after: (
      (np.float64(before) - after) / 0.05
      - config.optimizer.l2
      * before
      * (jax.tree_util.keystr(path[-1:], simple=True) == 'kernel')
    ),
    states[0].params,
    states[1].params,
  )
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(change)))
  assert metrics[0]['grad_norm'] == pytest.approx(norm, rel=1e-3)


def test_the_rate_is_on_the_update():
  config = recipe(model__method='skipinit')
  step, program = pure_step(config)
  data = data_of(config)
  inputs = (jnp.asarray(data.images), jnp.asarray(data.labels, jnp.int32))
  silence = {name: jnp.zeros(1, jnp.int32) for name in ('stop', 'replaced')}
  mapped = jax.jit(
    jax.vmap(lambda s, h: step(s, inputs, h, 1), (None, 0), 0, AXIS),
    compiler_options=OPTIONS,
  )
  start = fresh_state(config, program)
  moved = {}
  for scale in (1.0, 0.25):
    rate = jnp.float32(0.05 * scale)
    state, metrics = mapped(start.replace(rate=rate), silence)
    assert metrics['learning_rate'][0] == pytest.approx(0.05 * scale)
    moved[scale] = jax.tree.map(
      lambda new, old: np.asarray(new[0] - old), state.params, start.params
    )
  quarter = jax.tree.map(lambda m: m / 4, moved[1.0])
  assert_close(moved[0.25], quarter, atol=1e-6)


# Divergence.


def diverging(**changes):
  """A mapped step, and a state whose parameters give no finite loss."""
  config = recipe(model__method='none', **changes)
  step, program = pure_step(config)
  data = data_of(config)
  inputs = (jnp.asarray(data.images), jnp.asarray(data.labels, jnp.int32))
  silence = {name: jnp.zeros(1, jnp.int32) for name in ('stop', 'replaced')}
  mapped = jax.jit(
    jax.vmap(lambda s, h: step(s, inputs, h, 1), (None, 0), 0, AXIS),
    compiler_options=OPTIONS,
  )

  def one(state):
    return jax.tree.map(lambda x: np.asarray(x[0]), mapped(state, silence))

  good = fresh_state(config, program)
  huge = jax.tree.map(lambda p: p * 1e20, good.params)
  return one, good, good.replace(params=huge)


def test_a_diverged_state_stays_as_it_was():
  one, good, bad = diverging(ema_decay=0.9)
  assert one(good)[1]['finite']
  before = jax.device_get(bad)
  state, metrics = one(bad)
  assert not metrics['finite']
  assert not np.isfinite(metrics['loss'])
  assert metrics['skipped'] == 0
  jax.tree.map(np.testing.assert_array_equal, state, before)
  jax.tree.map(np.testing.assert_array_equal, one(state)[0], before)


def test_so_many_steps_in_a_row_may_be_skipped():
  one, good, bad = diverging(on_divergence='skip', divergence_limit=2)
  state = bad
  for i in (1, 2):
    state, metrics = one(state)
    assert metrics['finite']
    assert metrics['skipped'] == state.skipped == state.step == i
    jax.tree.map(np.testing.assert_array_equal, state.params, bad.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, bad.opt_state)
  # A finite one between them starts the count again,
  after, metrics = one(state.replace(params=good.params))
  assert metrics['finite']
  assert (after.skipped, after.step) == (0, 3)
  # and one too many ends it, without being counted as a step.
  state, metrics = one(state)
  assert not metrics['finite']
  assert state.step == 2


def test_the_rate_after_skipped_steps_is_the_one_reported():
  one, good, bad = diverging(
    on_divergence='skip',
    schedule__name='cosine',
    epochs=3.0,
    optimizer__momentum=0.0,
    optimizer__l2=0.0,
  )
  state = bad
  for _ in range(3):
    state, metrics = one(state)
  assert (metrics['skipped'], state.step) == (3, 3)
  state = state.replace(params=good.params)
  for step in range(3, 6):  # Of 9.
    before, (state, metrics) = state.params, one(state)
    rate = 0.05 * 0.5 * (1 + np.cos(np.pi * step / 9))
    assert metrics['learning_rate'] == pytest.approx(rate, rel=1e-5)
    moved = jax.tree.map(lambda p, b: np.float64(p) - b, state.params, before)
    moved = np.sqrt(sum((m**2).sum() for m in jax.tree.leaves(moved)))
    assert moved == pytest.approx(rate * metrics['grad_norm'], rel=1e-3)


def test_the_loss_is_that_of_the_last_steps_that_were_made():
  one, good, bad = diverging(on_divergence='skip', divergence_limit=9)
  first, _ = one(bad)
  state, metrics = one(first)
  assert np.isnan(metrics['loss'])  # Nothing was made yet.
  state, alone = one(state.replace(params=good.params))
  assert np.isfinite(alone['loss'])
  # A window of three that is skipped as a whole, and the start of the next.
  made = state.params
  state = state.replace(params=bad.params)
  for _ in range(4):
    state, metrics = one(state)
    assert metrics['loss'] == alone['loss']
    assert metrics['top1'] == alone['top1']
  assert state.step == 7
  # The window starts with the first step that is made in it.
  state, metrics = one(state.replace(params=made))
  again, _ = one(first.replace(params=made, step=np.int32(7)))
  assert state.sums['steps'] == 1
  assert metrics['loss'] == again.sums['loss']


def test_a_skipped_step_leaves_the_averages_of_the_others():
  one, good, _ = diverging(on_divergence='skip', log_every_steps=10)
  first, metrics = one(good)
  huge = jax.tree.map(lambda p: p * np.float32(1e20), first.params)
  skipped, after = one(first.replace(params=huge))
  assert after['loss'] == pytest.approx(metrics['loss'])
  assert skipped.sums['steps'] == 1


@pytest.mark.parametrize('rate', [1e6, 3e38])
def test_a_huge_rate_ends_at_finite_parameters(rate):
  one, good, _ = diverging(optimizer__learning_rate=rate)
  state = good
  for _ in range(30):
    state, metrics = one(state)
    if not metrics['finite']:
      break
  assert not metrics['finite']
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(state.params))


# Evaluation.


def test_evaluation_counts_masked_and_unreadable_rows_as_it_says():
  config = recipe(model__method='batchnorm')
  program = make_program(config, toy())
  variables = replicate(init('batchnorm'))
  rng = np.random.default_rng(3)
  n = 8 * jax.device_count()
  images = rng.integers(0, 256, (n, 8, 8, 1), np.uint8)
  labels = rng.integers(0, CLASSES, n).astype(np.int32)
  labels[::5] = -1
  mask = rng.random(n) < 0.7
  mask[:8] = False  # A device without an image.
  sums = jax.device_get(
    program.eval_step(
      variables['params'],
      variables['batch_stats'],
      *shard((images, labels, mask)),
      message(stop=True),
    )
  )
  logits = np.asarray(
    program.model.apply(
      init('batchnorm'), toy().augmentation.normalize(images), train=False
    )
  )
  order = np.argsort(-logits, -1, kind='stable')
  read = mask & (labels >= 0)
  ranks = (order == labels[:, None]).argmax(-1)
  expected = {
    'seen': mask.sum(),
    'read': read.sum(),
    'top1': (read & (ranks < 1)).sum(),
    'top5': (read & (ranks < 5)).sum(),
    'stop': 1,
  }
  for name, value in expected.items():
    assert sums[name] == value, name
    assert sums[name].dtype == np.int32
  targets = np.eye(CLASSES)[labels]
  loss = smooth_cross_entropy(logits, targets, 0)[read].sum()
  assert sums['loss'] == pytest.approx(loss, rel=1e-4)

"""Whole runs in this process: what they write, and how they end."""

import copy
import dataclasses
import json
import math
import shutil

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from runs import last_state, listing

from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import dumps
from skipinit_jax.training import changes, devices, train
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import default_config
from skipinit_jax.training.describe import describe
from skipinit_jax.training.evaluate import evaluate
from skipinit_jax.training.loop import evaluate_latest
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.program import LastProgram, make_program
from skipinit_jax.training.resume import restore_or_create
from skipinit_jax.training.saved import load_run
from skipinit_jax.training.timetable import make_timetable
from skipinit_jax.training.workdir import open_workdir, record_changes

# Keys that a run must write.
TRAIN_KEYS = {
  'step',
  'epoch',
  'loss',
  'top1',
  'learning_rate',
  'grad_norm',
  'param_norm',
  'images_per_second',
  'data_wait_seconds',
}
RESULT_KEYS = {
  'status',
  'eval',
  'best_eval',
  'steps',
  'parameters',
  'seconds',
  'versions',
  'device',
  'revision',
  'last_train',
  'eval_size',
  'chance',
}
FILES = {'config.json', 'metrics.jsonl', 'result.json'}
FILES |= {'tensorboard', 'checkpoints'}


def recipe(**changes) -> ConfigDict:
  """Two epochs of 6 steps on random images."""
  config = default_config()
  config.batch_size, config.eval_batch_size, config.epochs = 8, 12, 2.0
  config.log_every_steps, config.checkpoint_every_steps = 4, 3
  config.compilation_cache = ''
  config.model.depth, config.model.width = 10, 1
  config.optimizer.learning_rate = 0.01
  config.schedule.name = 'constant'
  with config.unlocked():
    config.data.update(
      name='synthetic',
      height=8,
      width=8,
      channels=1,
      num_classes=10,
      train_size=48,
      eval_size=29,
    )
  for name, value in changes.items():
    part, *path = config, *name.split('__')
    for field in path[:-1]:
      part = part[field]
    part[path[-1]] = value
  return config


def strict(text):
  """JSON without NaN and Infinity, which are none."""

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A run that was completed: its config, workdir and result."""
  workdir = tmp_path_factory.mktemp('done') / 'run'
  config = recipe(ema_decay=0.9)
  return config, workdir, train(config, workdir)


def test_result_has_its_keys_and_the_run_its_files(done):
  config, workdir, result = done
  assert {p.name for p in workdir.iterdir()} == FILES
  assert result.keys() == RESULT_KEYS
  assert strict((workdir / 'result.json').read_text()) == result
  assert (result['status'], result['steps']) == ('completed', 12)
  for name in ('eval', 'best_eval'):
    assert {'top1', 'top5', 'loss', 'step'} <= result[name].keys()
    assert 0 <= result[name]['top1'] <= result[name]['top5'] <= 1
    hits = result[name]['top1'] * 29  # A fraction of 29 images.
    assert hits == pytest.approx(round(hits))
  assert result['versions']['jax'] == jax.__version__
  trained = [line for line in read_metrics(workdir) if 'loss' in line][-1]
  assert result['last_train'].items() <= trained.items()
  assert result['last_train']['step'] == 12
  labels = open_dataset(config.data).eval_labels
  counts = [int((labels == c).sum()) for c in range(10)]
  assert result['eval_size'] == sum(counts) == 29
  assert result['chance'] == pytest.approx(max(counts) / 29)
  written = strict((workdir / 'config.json').read_text())
  assert written == json.loads(dumps(config.to_dict()))


def test_metrics_have_their_keys_at_their_steps(done):
  _, workdir, result = done
  lines = [
    strict(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  training = [line for line in lines if 'loss' in line]
  assert [line['step'] for line in training] == [4, 8, 12]
  for line in training:
    assert line.keys() == TRAIN_KEYS
    assert line['epoch'] == pytest.approx(line['step'] / 6, abs=1e-4)
  evaluations = [line for line in lines if 'eval' in line]
  assert [line['step'] for line in evaluations] == [6, 12]
  assert all('eval_ema' in line for line in evaluations)
  assert {**evaluations[-1]['eval'], 'step': 12} == result['eval']
  best = max(line['eval']['top1'] for line in evaluations)
  assert result['best_eval']['top1'] == best


@pytest.mark.sampled(1)
@pytest.mark.parametrize('scan', [False, True])
def test_blocks_are_watched_where_asked(scan, tmp_path):
  config = recipe(watch_every_steps=5, model__scan=scan, model__depth=16)
  config.model.alpha = '0.5'
  train(config, tmp_path / 'run')
  lines = [x for x in read_metrics(tmp_path / 'run') if 'alpha' in x]
  assert [line['step'] for line in lines] == [0, 5, 10, 12]
  blocks = [f'stage{s}/block{b}' for s in (1, 2, 3) for b in (1, 2)]
  kinds = ['alpha', 'branch_share', 'block_grad_norm']
  for line in lines:
    assert line.keys() == {'step', 'epoch', *kinds}
    assert all([*line[kind]] == blocks for kind in kinds)
    assert all(0 < value < 1 for value in line['branch_share'].values())
  assert {*lines[0]['alpha'].values()} == {0.5}
  # The last line is of the parameters at the end.
  state = last_state(tmp_path / 'run')
  for block, value in lines[-1]['alpha'].items():
    stage, number = block.split('/block')
    if scan and number == '2':
      leaf = state[f"['params']['{stage}']['blocks']['conv2']['alpha']"][0]
    else:
      leaf = state[f"['params']['{stage}']['block{number}']['conv2']['alpha']"]
    assert value == pytest.approx(float(leaf), rel=1e-6)
    assert value != 0.5


def test_what_a_network_has_not_is_not_watched(tmp_path):
  config = recipe(watch_every_steps=5, model__method='none', model__skip=False)
  train(config, tmp_path)
  lines = [x for x in read_metrics(tmp_path) if 'block_grad_norm' in x]
  assert [line['step'] for line in lines] == [0, 5, 10, 12]
  assert all(x.keys() == {'step', 'epoch', 'block_grad_norm'} for x in lines)


def test_nothing_is_watched_unless_asked(done):
  config, workdir, _ = done
  kinds = {'alpha', 'branch_share', 'block_grad_norm'}
  assert not any(kinds & line.keys() for line in read_metrics(workdir))
  data = open_dataset(config.data)
  program = make_program(config, data)
  state = jax.eval_shape(program.initial_state, 0, 1.0)
  batch, _ = next(data.inputs(devices.replicate, config, 0))
  _, metrics = jax.eval_shape(
    program.train_step, state, batch, devices.message(), 1
  )
  assert not kinds & metrics.keys()


def test_tensorboard_events_hold_the_metrics(done):
  from tensorboardX.proto.event_pb2 import Event

  _, workdir, result = done
  (path,) = (workdir / 'tensorboard').iterdir()
  data, points = path.read_bytes(), {}
  while data:  # Length, its checksum, the event, its checksum.
    size = int.from_bytes(data[:8], 'little')
    event = Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    for value in event.summary.value:
      points[value.tag, event.step] = value.simple_value
  assert points['eval/top1', 12] == pytest.approx(result['eval']['top1'])
  for line in read_metrics(workdir):
    if 'loss' in line:
      loss = points['train/loss', line['step']]
      assert loss == pytest.approx(line['loss'], rel=1e-5)


def test_a_finished_run_is_returned_and_not_repeated(done):
  config, workdir, result = done
  before = {
    p: p.stat().st_mtime_ns for p in (workdir / 'checkpoints').iterdir()
  }
  lines = read_metrics(workdir)
  assert train(config, workdir) == result
  assert read_metrics(workdir) == lines
  assert before == {p: p.stat().st_mtime_ns for p in before}


def test_evaluating_the_newest_checkpoint_gives_the_runs_last(done):
  config, workdir, result = done
  again = evaluate_latest(config, workdir)
  assert {**again['eval'], 'step': again['step']} == result['eval']


def test_looking_at_a_run_changes_nothing_even_if_its_newest_is_damaged(
  done, tmp_path, capsys
):
  config, workdir, result = done
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  folder = workdir / 'checkpoints'
  newest = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
  (folder / str(newest) / 'check/metadata').write_text('{')
  before = listing(workdir)
  looked = evaluate_latest(config, workdir)['step'], load_run(workdir).step
  assert looked[0] == looked[1] < newest == result['steps']
  assert capsys.readouterr().err.count(f'step {newest} is damaged') == 2
  with pytest.raises(RunError, match=f'step {newest} is damaged'):
    load_run(folder / str(newest))
  assert listing(workdir) == before


def test_a_checkpoint_that_is_not_whole_is_not_evaluated(done, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(done[1], workdir)
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'checkpoints').mkdir()
  (workdir / 'checkpoints' / '5').touch()
  for look in (
    lambda: evaluate_latest(done[0], workdir),
    lambda: load_run(workdir),
  ):
    with pytest.raises(InputError, match='holds no checkpoint'):
      look()


def test_evaluation_needs_a_checkpoint(tmp_path):
  with pytest.raises(InputError, match='holds no checkpoint'):
    evaluate_latest(recipe(), tmp_path / 'nothing')
  assert not (tmp_path / 'nothing').exists()


def test_a_workdir_of_another_config_is_refused_and_left_alone(done):
  config, workdir, _ = done
  other = copy.deepcopy(config)
  other.optimizer.learning_rate, other.seed = 0.5, 3
  before = (workdir / 'config.json').read_bytes()
  with pytest.raises(InputError) as error:
    train(other, workdir)
  message = str(error.value)
  assert 'optimizer.learning_rate=0.01 there, 0.5 here' in message
  assert 'seed=0 there, 3 here' in message
  assert 'batch_size' not in message
  assert '\n' not in message
  assert (workdir / 'config.json').read_bytes() == before


def test_changes_can_be_accepted_and_some_fields_are_free(tmp_path):
  open_workdir(tmp_path / 'run', recipe(), 12)
  free = recipe(checkpoint_every_steps=7, eval_batch_size=4, fall_back=False)
  open_workdir(tmp_path / 'run', free, 12)
  other = recipe(seed=3)
  with pytest.raises(InputError):
    open_workdir(tmp_path / 'run', other, 12)
  other.accept_changes = True
  new = open_workdir(tmp_path / 'run', other, 12)
  record_changes(tmp_path / 'run', other, new, 0)
  written = json.loads((tmp_path / 'run/config.json').read_text())
  assert written['seed'] == 3


def test_free_fields_exist():
  names = flatten_dict(default_config().to_dict(), sep='.').keys()
  assert set(changes.FREE) - names == {'data.dir', 'data.workers'}


BAD = {
  'network': {'model__depth': 11},
  'method': {'model__method': 'skipinti'},
  'batch': {'batch_size': 0},
  'schedule': {'schedule__warmup_epochs': 3.0},
  'data': {'data__name': 'digit'},
  'data size': {'data__height': 0},
  'what decays': {'optimizer__decay': ('kernal',)},
  'less than a step': {'epochs': 0.01},
}


@pytest.mark.parametrize('name', BAD)
def test_a_recipe_that_can_not_run_makes_no_workdir(name, tmp_path):
  with pytest.raises(InputError) as error:
    train(recipe(**BAD[name]), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(InputError, match='can not write to'):
    train(recipe(), tmp_path / 'file' / 'run')


# Divergence.


@pytest.fixture(scope='module')
def diverged(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('diverged') / 'run'
  return workdir, train(recipe(optimizer__learning_rate=1e6), workdir)


def test_a_diverged_run_is_evaluated_on_its_last_finite_parameters(diverged):
  workdir, result = diverged
  assert result['status'] == 'diverged'
  assert result.keys() == RESULT_KEYS | {'divergence'}
  assert strict((workdir / 'result.json').read_text()) == result
  divergence = result['divergence']
  assert divergence['last_finite']['step'] == result['steps'] < 12
  assert math.isfinite(divergence['last_finite']['loss'])
  norms = [*divergence['largest_norms'].values()]
  assert len(norms) == 5
  assert norms == sorted(norms, reverse=True)
  assert all(math.isfinite(norm) for norm in norms)
  assert result['eval']['step'] == result['steps']
  assert 0 <= result['eval']['top1'] <= 1
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    strict(line)


def test_a_run_that_diverges_at_its_first_step_is_evaluated_too(tmp_path):
  # As a plain network of depth 1000 does: nothing is finite at the start.
  config = recipe(model__alpha='1e6', model__depth=28)
  result = train(config, tmp_path / 'run')
  assert (result['status'], result['steps']) == ('diverged', 0)
  assert result['eval']['step'] == 0
  assert result['eval']['top1'] == 0.0  # Logits that are not finite are wrong.


@pytest.mark.parametrize(
  ('method', 'batch', 'warned'),
  [
    ('skipinit', 2048, True),
    ('skipinit', 8, False),
    ('batchnorm', 2048, False),
  ],
)
def test_large_batches_without_normalization_are_warned_of(
  method, batch, warned, tmp_path
):
  config = recipe(model__method=method, batch_size=batch)
  config.data.train_size = batch
  data = open_dataset(config.data)
  program = make_program(config, data)
  state = program.initial_state(np.uint32(0), np.float32(0.1))
  times = make_timetable(config, data.train_size)
  text = describe(program, state, times, tmp_path)
  # De & Smith 2020, table 3.
  assert ('SkipInit + Biases 74.9 -> 70.8' in text) == warned


def test_going_back_ends_as_diverged_after_the_limit(tmp_path, capsys):
  config = recipe(
    optimizer__learning_rate=1e9,
    on_divergence='back',
    divergence_limit=2,
  )
  result = train(config, tmp_path / 'run')
  assert result['status'] == 'diverged'
  err = capsys.readouterr().err
  assert err.count('diverged after step') == 2
  assert 'peak learning rate at 5e+08' in err
  assert 'peak learning rate at 2.5e+08' in err


def test_going_back_to_before_any_evaluation_ends_with_one(tmp_path):
  config = recipe(
    optimizer__learning_rate=1e9,
    on_divergence='back',
    divergence_limit=2,
    checkpoint_every_steps=1,
    eval_every_epochs=100.0,
  )
  result = train(config, tmp_path / 'run')
  assert result['status'] == 'diverged'
  assert result['eval']['step'] == result['steps'] > 0


def test_going_back_completes_with_a_smaller_rate(tmp_path):
  config = recipe(
    optimizer__learning_rate=1e3,
    on_divergence='back',
    divergence_limit=3,
    divergence_factor=1e-6,
  )
  result = train(config, tmp_path / 'run')
  assert (result['status'], result['steps']) == ('completed', 12)
  training = [x for x in read_metrics(tmp_path / 'run') if 'loss' in x]
  assert [line['step'] for line in training] == [4, 8, 12]
  assert training[-1]['learning_rate'] == pytest.approx(1e-3)


# Evaluation.


@pytest.mark.parametrize('size', [1, 12, 29, 64])
def test_evaluation_counts_every_image_once_at_any_batch_size(size, evaluated):
  program, state, expected = evaluated
  config = copy.deepcopy(program.config)
  config.eval_batch_size = size
  program = dataclasses.replace(program, config=config)
  ours = evaluate(program, state)['eval']
  assert ours == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """A trained state, and its evaluation in numpy."""
  workdir = tmp_path_factory.mktemp('evaluated')
  config = recipe(model__method='batchnorm', model__statistics_group='device')
  train(config, workdir)
  data = open_dataset(config.data)
  program = make_program(config, data)
  with Checkpoints(workdir, config, print) as checkpoints:
    _, state = restore_or_create(program, checkpoints)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  variables = jax.device_get(variables)
  images = (data.eval_images - data.augmentation.mean) / data.augmentation.std
  logits = program.model.apply(variables, np.float32(images), train=False)
  logits, labels = np.float64(logits), data.eval_labels
  ranks = (logits > logits[np.arange(29), labels][:, None]).sum(-1)
  log_sum = np.log(np.exp(logits).sum(-1))
  expected = {
    'top1': (ranks < 1).mean(),
    'top5': (ranks < 5).mean(),
    'loss': (log_sum - logits[np.arange(29), labels]).mean(),
  }
  return program, state, expected


# Networks of both forms.


@pytest.mark.sampled(1)
@pytest.mark.parametrize('scan', [False, True])
def test_a_run_goes_on_in_the_other_form(scan, tmp_path):
  config = recipe(model__depth=16, model__scan=scan, epochs=1.0)
  result = train(config, tmp_path / 'run')
  config.model.scan = not scan
  config.accept_changes = True
  again = evaluate_latest(config, tmp_path / 'run')
  assert again['step'] == 6
  for name in ('top1', 'top5', 'loss'):
    assert again['eval'][name] == pytest.approx(result['eval'][name], rel=1e-4)


def test_strict_json_has_null_for_what_is_not_finite():
  value = {
    'a': math.nan,
    'b': [math.inf, 1.5],
    'c': {'d': -math.inf},
    'e': 'NaN',
  }
  assert json.loads(dumps(value)) == {
    'a': None,
    'b': [None, 1.5],
    'c': {'d': None},
    'e': 'NaN',
  }


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
  config = default_config()
  config.batch_size, config.eval_batch_size, config.epochs = 32, 360, 4.0
  config.compilation_cache, config.log_every_steps = '', 45
  config.model.depth, config.model.width, config.model.biases = 16, 1, True
  config.model.classifier_init = 'zero'
  config.optimizer.learning_rate, config.optimizer.l2 = 2.0**-4, 0.0
  config.schedule.name = 'cosine'
  result = train(config, tmp_path / 'run')
  assert result['status'] == 'completed'
  assert result['eval']['top1'] > 0.8


def test_runs_of_one_program_have_the_bits_that_each_has_alone(tmp_path):
  def config(seed, rate):
    made = recipe()
    made.seed, made.optimizer.learning_rate = seed, rate
    return made

  make = LastProgram()
  train(config(1, 0.04), tmp_path / 'before', make)
  ours, alone = config(2, 0.01), config(2, 0.01)
  train(ours, tmp_path / 'ours', make)
  train(alone, tmp_path / 'alone')
  chex.assert_trees_all_equal(
    last_state(tmp_path / 'ours'), last_state(tmp_path / 'alone')
  )

  data = open_dataset(ours.data)
  first, second = make(config(3, 0.02), data), make(ours, data)
  assert first.train_step is second.train_step
  assert second.config is ours
  other = recipe()
  other.batch_size = 4
  assert make(other, data).train_step is not first.train_step

"""Checkpoints: which are kept, and what damage does."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import listing

from skipinit_jax import files
from skipinit_jax.errors import InputError, RunError, of_system
from skipinit_jax.files import dumps
from skipinit_jax.models.stages import stack_blocks, unstack_blocks
from skipinit_jax.training.checkpoints import Checkpoints, digest
from skipinit_jax.training.config import default_config
from skipinit_jax.training.step import TrainState

# A read that fails leaves TensorStore's other reads without their event loop.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(step, blocks=3, stacked=False):
  rng = np.random.default_rng(step)

  def leaf(*shape):
    return rng.normal(size=shape).astype(np.float32)

  stage = {
    f'block{i + 1}': {'conv1': {'kernel': leaf(3, 4), 'alpha': leaf()}}
    for i in range(blocks)
  }
  params = {'stage1': stage, 'classifier': {'kernel': leaf(64, 8)}}
  stats = {'stage1': {n: {'norm': {'mean': leaf(4)}} for n in stage}}
  if stacked:
    params, stats = stack_blocks(params), stack_blocks(stats)
  return TrainState(
    step=jnp.int32(step),
    params=jax.tree.map(jnp.asarray, params),
    batch_stats=jax.tree.map(jnp.asarray, stats),
    ema=None,
    opt_state=({'trace': jax.tree.map(lambda p: jnp.asarray(-p), params)},),
    sums={name: jnp.zeros(()) for name in ('loss', 'top1', 'steps')},
    skipped=jnp.int32(0),
    rate=jnp.ones(()),
    seed=jnp.zeros((), jnp.uint32),
  )


def recipe(**fields):
  config = default_config()
  for name, value in fields.items():
    config[name] = value
  return config


def save(workdir, steps, tops=None, config=None):
  with Checkpoints(workdir, config or recipe(), print) as opened:
    for i, step in enumerate(steps):
      evals = {'top1': tops[i]} if tops and tops[i] is not None else None
      opened.save(step, make_state(step), evals)


def restore(workdir, said=None, config=None, like=None):
  like = like or jax.eval_shape(lambda: make_state(0))
  say = print if said is None else said.append
  with Checkpoints(workdir, config or recipe(), say) as opened:
    return opened.restore_latest(like)


def assert_is(state, step, **kwargs):
  expected = make_state(step, **kwargs)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A workdir with the checkpoints of steps 10 and 20."""
  workdir = tmp_path_factory.mktemp('two')
  save(workdir, [10, 20])
  return workdir


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'run')


def test_newest_is_restored_to_the_bit(two):
  step, state = restore(two)
  assert step == 20
  assert_is(state, 20)
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(make_state(20))]
  assert [leaf.dtype for leaf in jax.tree.leaves(state)] == dtypes


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert restore(tmp_path) == (None, None)


@pytest.mark.parametrize(
  ('keep', 'tops', 'kept'),
  [
    (2, [0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5]),  # The best and the newest.
    (2, [0.1, 0.2, 0.3, 0.4, 0.5], [4, 5]),
    (1, [0.9, 0.1, 0.1, 0.1, 0.1], [1, 5]),
    (3, [None] * 5, [3, 4, 5]),
    (1, [None, 0.2, None, None, None], [2, 5]),
  ],
)
def test_newest_and_best_are_kept(tmp_path, keep, tops, kept):
  config = recipe(keep_checkpoints=keep)
  save(tmp_path, [1, 2, 3, 4, 5], tops, config)
  with Checkpoints(tmp_path, config, print) as checkpoints:
    assert checkpoints.steps() == kept
    for step in kept:
      like = jax.eval_shape(lambda: make_state(0))
      assert_is(checkpoints.restore(step, like), step)


def test_a_step_is_saved_once(copy):
  with Checkpoints(copy, recipe(), print) as checkpoints:
    checkpoints.save(20, make_state(99))
  assert_is(restore(copy)[1], 20)


def array_files(workdir, step):
  """Files with the bytes of arrays, but for small ones of bookkeeping."""
  folder = workdir / 'checkpoints' / str(step) / 'state'
  files = [p for p in folder.rglob('*') if p.is_file() and '/d/' in str(p)]
  assert files
  return sorted(files, key=lambda p: p.stat().st_size)


def flip_a_bit(path, rng):
  data = bytearray(path.read_bytes())
  place = rng.randrange(len(data))
  data[place] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


@pytest.mark.parametrize('seed', range(8))
def test_a_flipped_bit_is_never_learnt_from(copy, seed):
  rng = random.Random(seed)
  flip_a_bit(array_files(copy, 20)[-1], rng)
  said = []
  step, state = restore(copy, said)
  assert_is(state, step)  # Right whatever was hit: padding does no harm.
  if step == 10:
    assert len(said) == 1
    assert 'step 20 is damaged' in said[0]
    assert 'resuming from step 10' in said[0]
    assert '\n' not in said[0]
    assert (copy / 'damaged-checkpoint-20').is_dir()
    assert not (copy / 'checkpoints' / '20').exists()


def test_bits_flipped_in_arrays_are_mostly_found(copy, tmp_path):
  rng, found = random.Random(0), 0
  for i in range(4):
    workdir = shutil.copytree(copy, tmp_path / f'flip{i}')
    for _ in range(3):
      flip_a_bit(array_files(workdir, 20)[-1], rng)
    found += restore(workdir, [])[0] == 10
  assert found >= 3


def test_a_changed_value_is_found_where_orbax_finds_nothing(copy):
  # Written again as a whole, with one value changed and the old digest.
  check = copy / 'checkpoints/20/check'
  kept = {p: p.read_bytes() for p in check.rglob('*') if p.is_file()}
  shutil.rmtree(copy / 'checkpoints/20')
  state = make_state(20)
  state.params['classifier']['kernel'] = (
    state.params['classifier']['kernel'].at[3, 3].add(1e-3)
  )
  with Checkpoints(copy, recipe(), print) as checkpoints:
    checkpoints.save(20, state)
  for path, data in kept.items():
    path.write_bytes(data)
  said = []
  step, state = restore(copy, said)
  assert step == 10
  assert_is(state, 10)
  assert 'not those that were saved' in said[0]


def truncate(workdir, step):
  path = array_files(workdir, step)[-1]
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_file_is_passed_over(copy):
  truncate(copy, 20)
  said = []
  step, state = restore(copy, said)
  assert step == 10
  assert_is(state, 10)
  assert len(said) == 1
  # Training goes on, and saves step 20 again.
  save(copy, [20])
  assert_is(restore(copy)[1], 20)


def test_falling_back_can_be_refused(copy):
  truncate(copy, 20)
  with pytest.raises(RunError) as error:
    restore(copy, config=recipe(fall_back=False))
  line = str(error.value)
  assert 'step 20 is damaged' in line
  assert 'resumes from step 10' in line
  assert '\n' not in line
  assert (copy / 'checkpoints/20').is_dir()  # Nothing was moved.


def test_with_none_before_it_a_damaged_one_ends_the_run(copy):
  shutil.rmtree(copy / 'checkpoints/10')
  truncate(copy, 20)
  with pytest.raises(RunError, match='and there is none before it'):
    restore(copy)


@pytest.mark.parametrize('wanted', [False, True])
@pytest.mark.parametrize('stacked', [False, True])
def test_scanned_and_unrolled_states_serve_both(tmp_path, stacked, wanted):
  with Checkpoints(tmp_path, recipe(), print) as checkpoints:
    checkpoints.save(5, make_state(5, stacked=stacked))
  like = jax.eval_shape(lambda: make_state(0, stacked=wanted))
  step, state = restore(tmp_path, like=like)
  assert step == 5
  assert_is(state, 5, stacked=wanted)


def test_stacked_trees_are_told_from_others():
  tree = make_state(1).params
  assert 'blocks' in stack_blocks(tree)['stage1']
  jax.tree.map(
    np.testing.assert_array_equal, unstack_blocks(stack_blocks(tree)), tree
  )


def test_digest_is_of_names_types_shapes_and_bytes():
  x = np.arange(6, dtype=np.float32)
  trees = [
    {'a': x},
    {'b': x},
    {'a': x.reshape(2, 3)},
    {'a': x.view(np.int32)},
    {'a': -x},
    {'a': x, 'b': x},
  ]
  assert len({digest(tree) for tree in trees}) == len(trees)
  flipped = np.asfortranarray(x.reshape(2, 3))
  assert digest({'a': flipped}) == digest(trees[2])


def newest_array(workdir):
  return array_files(workdir, 20)[-1].relative_to(workdir / 'checkpoints/20')


# Where a read can fail, in Python or in TensorStore.
PARTS = ('check/metadata', 'state/_METADATA', 'state/manifest.ocdbt', 'array')


def break_reads(workdir, part):
  """Makes reads of a file fail with EIO, by the kernel; undone by a call."""
  name = newest_array(workdir) if part == 'array' else part
  path = workdir / 'checkpoints/20' / name
  kept = path.rename(workdir.parent / 'kept')
  path.symlink_to('/proc/self/mem')  # Its first page can't be read.
  with pytest.raises(OSError, match='Input/output error'):
    path.read_bytes()

  def heal():
    path.unlink()
    kept.rename(path)

  return heal


@pytest.mark.parametrize('part', PARTS)
def test_a_read_that_fails_is_not_damage(copy, part, monkeypatch):
  break_reads(copy, part)
  before, pauses, said = listing(copy), [], []
  monkeypatch.setattr(files.time, 'sleep', pauses.append)
  with pytest.raises(RunError) as error:
    restore(copy, said)
  line = 'checkpoint of step 20: Input/output error'
  assert str(error.value) == f'{line} (tried 4 times)'
  assert pauses == list(files.PAUSES)
  assert said == [f'{line}; trying again in {p:g} s' for p in pauses]
  assert listing(copy) == before


@pytest.mark.parametrize('part', PARTS)
def test_a_read_that_fails_once_is_tried_again(copy, part, monkeypatch):
  heal = break_reads(copy, part)
  monkeypatch.setattr(files.time, 'sleep', lambda _: heal())
  said = []
  step, state = restore(copy, said)
  assert step == 20
  assert_is(state, 20)
  assert len(said) == 1


def test_an_error_that_passes_is_not_damage_though_it_gives_no_reason(
  copy, monkeypatch
):
  whole, errors = Checkpoints._restore, [Exception('of Orbax')]

  def fail_once(self, *args):
    if errors:
      raise errors.pop()
    return whole(self, *args)

  monkeypatch.setattr(Checkpoints, '_restore', fail_once)
  assert restore(copy, said := [])[0] == 20
  assert not said


TROUBLE = ('EIO', 'ESTALE', 'EACCES', 'ENOSPC', 'EMFILE', 'ETIMEDOUT')


@pytest.mark.parametrize('name', TROUBLE)
def test_the_systems_reason_is_found_in_what_an_error_came_from(name):
  number = getattr(errno, name)
  reason = os.strerror(number)
  errors = [
    OSError(number, reason),
    Exception(f"DATA_LOSS: x: {reason} [os_error_code='{number}']"),
  ]
  for error in errors:
    assert of_system(error) == reason
    cause, context = ValueError('v'), ValueError('v')
    cause.__cause__, context.__context__ = error, error
    around = RuntimeError('r')
    around.__context__ = cause
    for outer in (cause, context, around):
      assert of_system(outer) == reason
  assert of_system(TimeoutError('too slow')) == 'too slow'


def test_what_is_missing_or_senseless_is_no_trouble_of_the_system():
  for error in (
    None,
    Exception('bare'),
    FileNotFoundError(errno.ENOENT, 'gone'),
    Exception("NOT_FOUND: x: gone [os_error_code='2']"),
  ):
    assert of_system(error) is None
  loop = ValueError()
  loop.__context__ = RuntimeError()
  loop.__context__.__context__ = loop
  assert of_system(loop) is None


def test_looking_changes_nothing(copy):
  truncate(copy, 20)
  (copy / 'checkpoints/30.orbax-checkpoint-tmp').mkdir()  # Being saved.
  before, said = listing(copy), []
  like = jax.eval_shape(lambda: make_state(0))
  with Checkpoints(copy, recipe(), said.append, read_only=True) as opened:
    step, state = opened.restore_latest(like)
  assert step == 10
  assert_is(state, 10)
  assert 'step 20 is damaged' in said[0]
  assert listing(copy) == before


def test_a_checkpoint_deleted_while_it_is_looked_at_is_not_the_last(copy):
  like = jax.eval_shape(lambda: make_state(0))
  with Checkpoints(copy, recipe(), print, read_only=True) as opened:
    assert opened.steps() == [10, 20]
    save(copy, [30, 40])  # The two newest are kept.
    step, state = opened.restore_latest(like)
  assert step == 40
  assert_is(state, 40)


def write_config(workdir, config, **more):
  fields = json.loads(dumps(config.to_dict()))
  (workdir / 'config.json').write_text(json.dumps(fields | more))


@pytest.mark.parametrize('how', ['rename', 'copytree'])
def test_a_renamed_checkpoint_is_refused_by_name(copy, how):
  old, new = copy / 'checkpoints/20', copy / 'checkpoints/28'
  old.rename(new) if how == 'rename' else shutil.copytree(old, new)
  before = listing(copy)
  with pytest.raises(InputError) as error:
    restore(copy)
  assert str(error.value).startswith(f'{new} holds the state after step 20')
  assert '\n' not in str(error.value)
  assert listing(copy) == before


def test_the_checkpoint_of_another_run_is_refused_by_name(copy, tmp_path):
  other = tmp_path / 'other'
  save(other, [30], config=recipe(seed=1, epochs=3.0))
  shutil.copytree(other / 'checkpoints/30', copy / 'checkpoints/30')
  write_config(copy, recipe())
  before = listing(copy)
  with pytest.raises(InputError) as error:
    restore(copy)
  path = copy / 'checkpoints/30'
  assert str(error.value).startswith(f'{path} is of another run (')
  assert 'seed=1 there, 0 here' in str(error.value)
  assert 'epochs=3.0 there, 200.0 here' in str(error.value)
  assert listing(copy) == before
  assert restore(copy, config=recipe(accept_changes=True))[0] == 30


def test_what_was_accepted_once_and_what_is_free_are_of_the_same_run(tmp_path):
  save(tmp_path, [10], config=recipe(epochs=3.0, keep_checkpoints=5))
  write_config(tmp_path, recipe(epochs=4.0, fall_back=False))
  with pytest.raises(InputError, match=r'epochs=3.0 there, 4.0 here\); move'):
    restore(tmp_path)
  change = {'field': 'epochs', 'old': 3.0, 'new': 4.0, 'step': 10}
  write_config(tmp_path, recipe(epochs=4.0), changes=[change])
  assert restore(tmp_path)[0] == 10


def test_a_checkpoint_that_does_not_say_where_it_is_from_is_taken(copy):
  check = copy / 'checkpoints/20/check/metadata'
  fields = json.loads(check.read_text())
  assert fields['step'] == 20
  check.write_text(json.dumps({'sha256': fields['sha256']}))
  write_config(copy, recipe(seed=7))
  step, state = restore(copy)
  assert step == 20
  assert_is(state, 20)


FULL_DISK = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoints import Checkpoints, RunError, make_state, recipe
from absl import logging
logging.set_verbosity(logging.FATAL)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints({workdir!r}, recipe(), print)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
  checkpoints.save(30, make_state(30))
  checkpoints.wait()
except RunError as error:
  print(error, flush=True)
os._exit(0)  # Threads of Orbax still wait for the rest of the save.
"""


def test_a_save_that_fails_is_one_line_and_the_others_stay_good(copy):
  from pathlib import Path

  code = FULL_DISK.format(tests=str(Path(__file__).parent), workdir=str(copy))
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.strip().splitlines()
  assert len(lines) == 1
  assert 'could not be written (whole ones: 10, 20)' in lines[0]
  step, state = restore(copy)
  assert step == 20
  assert_is(state, 20)

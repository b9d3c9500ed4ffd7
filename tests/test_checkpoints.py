"""Checkpoints: which are kept, and what damage does."""

import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import RunError
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
  with Checkpoints(workdir, config or recipe(), print) as checkpoints:
    for i, step in enumerate(steps):
      evals = {'top1': tops[i]} if tops and tops[i] is not None else None
      checkpoints.save(step, make_state(step), evals)


def restore(workdir, said=None, config=None, like=None):
  like = like or jax.eval_shape(lambda: make_state(0))
  say = print if said is None else said.append
  with Checkpoints(workdir, config or recipe(), say) as checkpoints:
    return checkpoints.restore_latest(like)


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
    assert 'going on from step 10' in said[0]
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
  assert 'goes on from step 10' in line
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

"""Runs that are killed, and go on as if nothing had happened."""

import contextlib
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import (
  ROOT,
  TINY,
  assert_same_run,
  finish,
  last_state,
  metric_lines,
  run,
  start,
  wait_for,
)

from skipinit_jax.cli import FAILED
from skipinit_jax.training.signals import IMPATIENT, SIGNALS

pytestmark = pytest.mark.sampled(7)  # Each starts programs.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that was never stopped: 24 steps."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  begin = time.monotonic()
  run(workdir, *TINY)
  whole.seconds = time.monotonic() - begin
  return workdir


def kill_and_go_on(workdir, delays):
  for delay in delays:
    process = start(workdir, *TINY)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    finish(process)
  run(workdir, *TINY)


def test_metrics_have_every_line_once(whole):
  lines = metric_lines(whole)
  train = [line['step'] for line in lines if 'loss' in line]
  evaluations = [line['step'] for line in lines if 'eval' in line]
  assert train == list(range(3, 25, 3))
  assert evaluations == list(range(4, 25, 4))


def test_killed_run_ends_as_one_that_was_not(whole, tmp_path):
  random.seed(0)
  delays = [random.uniform(0.2, 1.1) * whole_seconds() for _ in range(2)]
  kill_and_go_on(tmp_path / 'run', delays)
  assert_same_run(tmp_path / 'run', whole)


def whole_seconds():
  return whole.seconds


@pytest.mark.slow
def test_killed_at_20_random_moments(whole, tmp_path):
  random.seed(1)
  for i in range(5):
    delays = [random.uniform(0.2, 1.1) * whole_seconds() for _ in range(4)]
    kill_and_go_on(tmp_path / f'run{i}', delays)
    assert_same_run(tmp_path / f'run{i}', whole)


# The interpreter imports it by its name; Orbax ends a save by renaming it.
HELD_SAVE = """
import os, pathlib, time

def hold(rename):
  def held(source, target, *args, **kwargs):
    if pathlib.Path(target).name == '10':
      pathlib.Path(os.environ['HELD']).touch()
      time.sleep(1000)
    return rename(source, target, *args, **kwargs)
  return held

os.rename, os.replace = hold(os.rename), hold(os.replace)
"""


def test_killed_in_the_middle_of_a_save(whole, tmp_path):
  workdir, held = tmp_path / 'run', tmp_path / 'held'
  (tmp_path / 'sitecustomize.py').write_text(HELD_SAVE)
  process = start(workdir, *TINY, PYTHONPATH=str(tmp_path), HELD=str(held))
  wait_for(held.exists, process)
  assert any(workdir.glob('checkpoints/10.orbax-checkpoint-tmp*'))
  process.send_signal(signal.SIGKILL)
  finish(process)
  assert not (workdir / 'checkpoints' / '10').exists()
  run(workdir, *TINY)
  assert_same_run(workdir, whole)


def test_full_disk_ends_in_one_line_and_the_run_goes_on(whole, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, *TINY)
  wait_for((workdir / 'checkpoints' / '5').exists, process)
  limit = 10_000  # Bytes of one file: metrics still fit, arrays do not.
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
  status, _, err = finish(process, timeout=300)  # Orbax threads wait 600 s.
  assert status == FAILED
  lines = [line for line in err.splitlines() if line.startswith('error:')]
  assert len(lines) == 1
  assert re.search(r'could not be written \(whole ones: .*5', lines[0])
  assert 'Traceback' not in err
  run(workdir, *TINY)
  assert_same_run(workdir, whole)


def test_more_devices_go_on_with_the_same_batches(tmp_path):
  flags = (*TINY, '--config.model.method=skipinit')
  run(tmp_path / 'one', *flags)
  process = start(tmp_path / 'two', *flags)
  wait_for(lambda: (tmp_path / 'two/checkpoints/10').exists(), process)
  process.send_signal(signal.SIGTERM)
  status, _, err = finish(process)
  assert status == 128 + signal.SIGTERM, err
  run(tmp_path / 'two', *flags, devices=4)
  ours, theirs = last_state(tmp_path / 'two'), last_state(tmp_path / 'one')
  for name, leaf in ours.items():
    np.testing.assert_allclose(leaf, theirs[name], rtol=1e-3, atol=1e-5)
  assert len(metric_lines(tmp_path / 'two')) == len(
    metric_lines(tmp_path / 'one')
  )


@pytest.fixture
def hangup():
  """SIGHUP, not ignored where the tests themselves run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield signal.SIGHUP
  signal.signal(signal.SIGHUP, before)


@pytest.mark.sampled(1)
@pytest.mark.usefixtures('hangup')
@pytest.mark.parametrize('number', SIGNALS)
def test_signal_saves_and_the_run_goes_on(number, whole, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, *TINY, '--config.checkpoint_every_steps=1000')
  wait_for(lambda: len(metric_lines(workdir)) > 2, process)
  process.send_signal(number)
  status, _, err = finish(process)
  assert status == 128 + number, err
  assert f'stopped by {signal.Signals(number).name} after step' in err
  assert 'Traceback' not in err
  assert any((workdir / 'checkpoints').iterdir())
  run(workdir, *TINY)
  assert_same_run(workdir, whole)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_first_step_leaves_at_once(number, tmp_path):
  process = start(tmp_path / 'run', *TINY, '--config.compilation_cache=')
  wait_for((tmp_path / 'run' / 'config.json').exists, process)
  time.sleep(0.3)
  process.send_signal(number)
  status, _, err = finish(process)
  assert status == 128 + number
  assert 'nothing to save' in err


@pytest.mark.parametrize(
  'number',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_signal_during_an_evaluation_puts_it_off(number, tmp_path):
  flags = (
    *TINY,
    '--config.epochs=1',
    '--config.data.eval_size=8000',
    '--config.eval_batch_size=8',
  )
  process = start(tmp_path / 'cut', *flags)
  wait_for(lambda: metric_lines(tmp_path / 'cut'), process)
  time.sleep(0.5)  # Step 4 takes less, its evaluation takes longer.
  process.send_signal(number)
  status, _, err = finish(process)
  assert status == 128 + number, err
  assert 'after step 4' in err
  assert not any('eval' in line for line in metric_lines(tmp_path / 'cut'))
  run(tmp_path / 'cut', *flags)
  run(tmp_path / 'whole', *flags)
  assert_same_run(tmp_path / 'cut', tmp_path / 'whole')


ENDLESS = (*TINY, '--config.epochs=100000')


@pytest.mark.sampled(1)
@pytest.mark.parametrize('number', IMPATIENT)
def test_the_same_signal_again_stops_at_once(number, tmp_path):
  process = start(tmp_path / 'run', *ENDLESS)
  wait_for(lambda: len(metric_lines(tmp_path / 'run')) > 2, process)
  while process.poll() is None:  # Two that come together may be one.
    process.send_signal(number)
    time.sleep(0.01)
  status, _, err = finish(process)
  assert status == 128 + number
  assert 'again: stopping at once' in err


def test_another_signal_does_not_stop_at_once(hangup, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, *ENDLESS, '--config.checkpoint_every_steps=100000')
  wait_for(lambda: len(metric_lines(workdir)) > 2, process)
  for number in (signal.SIGINT, hangup, hangup, signal.SIGUSR1, signal.SIGTERM):
    process.send_signal(number)
    time.sleep(0.005)  # Else they come in the order of their numbers.
  status, _, err = finish(process)
  assert status > 128, err
  assert 'which is saved' in err
  assert saved_step(workdir) >= metric_lines(workdir)[-1]['step']


def saved_step(workdir):
  names = [p.name for p in (workdir / 'checkpoints').iterdir()]
  return max(int(name) for name in names if name.isdecimal())


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
  workdir = tmp_path / 'run'
  process = subprocess.Popen(
    ['nohup', sys.executable, 'train.py', f'--workdir={workdir}', *ENDLESS],
    cwd=ROOT,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for(lambda: len(metric_lines(workdir)) > 2, process)
  process.send_signal(signal.SIGHUP)
  step = metric_lines(workdir)[-1]['step']
  wait_for(lambda: metric_lines(workdir)[-1]['step'] > step + 20, process)
  process.send_signal(signal.SIGTERM)
  status, _, err = finish(process)
  assert status == 128 + signal.SIGTERM
  assert 'SIGHUP' not in err


# Not preexec_fn, with which JAX in this process warns of a fork.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.usefixtures('hangup')
def test_a_terminal_that_is_closed_loses_no_step(tmp_path):
  """As when an ssh session is dropped: SIGHUP, and writing fails."""
  workdir = tmp_path / 'run'
  ours, its = pty.openpty()
  process = subprocess.Popen(
    [
      sys.executable,
      '-c',
      IN_TERMINAL,
      'train.py',
      f'--workdir={workdir}',
      *ENDLESS,
      '--config.checkpoint_every_steps=100000',
    ],
    cwd=ROOT,
    stdin=its,
    stdout=its,
    stderr=its,
    start_new_session=True,
  )
  os.close(its)
  os.set_blocking(ours, False)

  def progress():
    with contextlib.suppress(BlockingIOError):
      os.read(ours, 100_000)  # Else it would wait for us.
    return len(metric_lines(workdir)) > 2

  wait_for(progress, process)
  step = metric_lines(workdir)[-1]['step']
  os.close(ours)
  assert process.wait(300) == 128 + signal.SIGHUP
  assert saved_step(workdir) >= step


def test_steps_in_one_call_resume_exactly(tmp_path):
  flags = (*TINY, '--config.steps_per_call=4')
  run(tmp_path / 'whole', *flags)
  process = start(tmp_path / 'cut', *flags)
  wait_for(lambda: len(metric_lines(tmp_path / 'cut')) > 2, process)
  process.send_signal(signal.SIGTERM)
  status, _, err = finish(process)
  assert status == 128 + signal.SIGTERM, err
  run(tmp_path / 'cut', *flags)
  assert_same_run(tmp_path / 'cut', tmp_path / 'whole')

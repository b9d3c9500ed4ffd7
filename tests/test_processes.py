"""Several processes on loopback: as one, and when one is lost or stuck."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import (
  ROOT,
  TINY,
  finish,
  last_state,
  metric_lines,
  run,
  start,
  start_two,
  wait_for,
)

from skipinit_jax.cli import LOST, STUCK

pytestmark = pytest.mark.sampled(3)

SYNCED = (
  *TINY,
  '--config.model.statistics_group=all',
  '--config.data.mixup=0.2',
)
ENDLESS = (*SYNCED, '--config.epochs=1000000')


def assert_close(workdir, other):
  ours, theirs = last_state(workdir), last_state(other)
  assert ours.keys() == theirs.keys()
  for name, leaf in ours.items():
    np.testing.assert_allclose(
      leaf, theirs[name], rtol=2e-2, atol=1e-4, err_msg=name
    )


def test_two_processes_go_on_from_one_and_are_stopped_together(tmp_path):
  """1 x 4 devices, cut off; then 2 x 2, told to stop; then 1 x 1 to the end."""
  cut, whole = tmp_path / 'cut', tmp_path / 'whole'
  run(whole, *SYNCED, devices=4)

  process = start(cut, *SYNCED, devices=4)
  wait_for(lambda: len(metric_lines(cut)) > 1, process)
  process.send_signal(signal.SIGTERM)
  finish(process)

  two = start_two(cut, *SYNCED)
  before = len(metric_lines(cut))
  wait_for(lambda: len(metric_lines(cut)) > before, two[0])
  two[1].send_signal(signal.SIGTERM)  # Process 0 hears of it from process 1.
  ends = [finish(process) for process in two]
  for status, _, err in ends:
    assert status == 128 + signal.SIGTERM, err
    assert 'Traceback' not in err
  # All stopped after the same step.
  assert (
    len({err.split('after step ')[1].split(',')[0] for *_, err in ends}) == 1
  )

  run(cut, *SYNCED)
  assert_close(cut, whole)
  steps = [line['step'] for line in metric_lines(cut)]
  assert steps == [line['step'] for line in metric_lines(whole)]
  result = json.loads((cut / 'result.json').read_text())
  assert result['status'] == 'completed'


@pytest.mark.slow  # As in the test above, without a stop.
def test_two_processes_train_as_one(tmp_path):
  run(tmp_path / 'one', *SYNCED, devices=4)
  ends = [finish(p) for p in start_two(tmp_path / 'two', *SYNCED)]
  assert [status for status, *_ in ends] == [0, 0], ends[0][2] + ends[1][2]
  assert 'completed' in ends[0][1]
  assert 'completed' not in ends[1][1]  # Only the first says so.
  assert_close(tmp_path / 'two', tmp_path / 'one')


def test_a_killed_process_ends_the_others(tmp_path):
  two = start_two(tmp_path / 'run', *ENDLESS)
  wait_for(lambda: len(metric_lines(tmp_path / 'run')) > 2, two[0])
  two[1].send_signal(signal.SIGKILL)
  status, _, err = finish(two[0])
  finish(two[1])
  # The collective notices, or else JAX's heartbeat, which aborts.
  assert status in (LOST, -signal.SIGABRT), err
  assert 'a process was lost' in err or 'another task died' in err


def test_a_stuck_process_ends_the_others_and_is_named(tmp_path):
  flags = (*ENDLESS, '--config.stuck_after_seconds=20')
  # On a busy machine JAX's heartbeat would notice first.
  two = start_two(tmp_path / 'run', *flags, heartbeat=120)
  wait_for(lambda: len(metric_lines(tmp_path / 'run')) > 2, two[0])
  assert_stuck_without(two, 'process 1 (after step|before the first step)')


@pytest.mark.slow
def test_a_process_stuck_before_its_first_step_is_named(tmp_path):
  flags = (
    *ENDLESS,
    '--config.stuck_at_start_seconds=60',
    '--config.compilation_cache=',
  )
  two = start_two(tmp_path / 'run', *flags, heartbeat=300)
  wait_for((tmp_path / 'run' / 'config.json').exists, two[0])
  assert_stuck_without(two, 'process 1 before the first step')


def assert_stuck_without(two, last_heard_of):
  """Stops the second process; the first one ends and says so."""
  two[1].send_signal(signal.SIGSTOP)
  try:
    status, _, err = finish(two[0])
  finally:
    two[1].send_signal(signal.SIGKILL)
    finish(two[1])
  assert status == STUCK, err
  assert 'no progress for' in err
  assert re.search(last_heard_of + r'[ 0-9]* \d+ s ago', err), err


def test_a_process_without_a_first_step_ends(tmp_path):
  """Compiling a thousand blocks without a scan takes all day."""
  flags = ('--config.model.depth=6004', '--config.stuck_at_start_seconds=2')
  process = start(tmp_path / 'run', *TINY, *flags)
  status, _, err = finish(process)
  assert status == STUCK, err
  last = err.splitlines()[-1]
  assert last.startswith('error: no progress for ')
  assert last.endswith('s before the first step; this is the only process')


WATCHED = """
import sys
from skipinit_jax.training.watchdog import Watchdog

with Watchdog(at_start=4, seconds=4):
  print('ready', flush=True)
  sys.stdin.readline()
"""


def test_a_process_that_stood_still_is_not_stuck():
  """As after Ctrl-Z and `fg`."""
  process = subprocess.Popen(
    [sys.executable, '-c', WATCHED],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGSTOP)
  time.sleep(4.5)  # Longer than the limit, and little.
  process.send_signal(signal.SIGCONT)
  time.sleep(1)
  process.stdin.write('\n')
  status, _, err = finish(process)
  assert (status, err) == (0, '')

"""Two runs never share a folder, whatever becomes of the first."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from runs import (
  ROOT,
  TINY,
  empty_bucket,
  finish,
  listing,
  metric_lines,
  start,
  start_two,
  wait_for,
)

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import lock
from skipinit_jax.training.checkpoints import saved_steps
from skipinit_jax.training.lock import LOCK, hold

ENDLESS = (
  *TINY,
  '--config.epochs=100000',
  '--config.checkpoint_every_steps=100',
)


def one_line(err):
  (line,) = [line for line in err.splitlines() if line.startswith('error:')]
  assert 'Traceback' not in err
  assert len(line) <= 300 + len('error: ')
  return line


def is_free(workdir):
  try:
    with hold(workdir, print):
      return True
  except InputError:
    return False


def test_a_second_run_says_who_holds_the_workdir_and_touches_nothing(tmp_path):
  workdir = tmp_path / 'run'
  first = start(workdir, *ENDLESS)
  try:
    wait_for(lambda: metric_lines(workdir), first, timeout=600)
    config = (workdir / 'config.json').stat()
    status, out, err = finish(start(workdir, *ENDLESS))
    assert status == 2, err
    assert out == ''
    (line,) = err.splitlines()  # It compiled and described nothing.
    host = socket.gethostname()
    assert f'{workdir} is held by process {first.pid} on {host} since 2' in line
    assert (workdir / 'config.json').stat() == config
    # Looking at it is no second run.
    wait_for(
      lambda: max(saved_steps(workdir), default=0) >= 100, first, timeout=600
    )
    status, out, err = finish(start(workdir, *ENDLESS, '--eval-only'))
    assert status == 0, err
    assert json.loads(out)['step'] >= 100
    assert first.poll() is None
    assert not is_free(workdir)
  finally:
    first.kill()
    finish(first)
  assert is_free(workdir)


def test_of_several_processes_all_are_refused(tmp_path):
  workdir = tmp_path / 'run'
  with hold(workdir, print):
    before = listing(workdir)
    ends = [finish(process) for process in start_two(workdir, *TINY)]
    assert listing(workdir) == before
  assert [status for status, *_ in ends] == [2, 2], ends
  assert f'held by process {os.getpid()}' in one_line(ends[0][2])
  assert 'process 0: ' in one_line(ends[1][2])


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGTERM])
def test_children_do_not_keep_the_folder_of_a_killed_run(tmp_path, end):
  # Grain's workers outlive a run that is killed.
  code = (
    'import subprocess, sys, time\n'
    'from skipinit_jax.training.lock import hold\n'
    f'with hold({str(tmp_path)!r}, print):\n'
    '  child = subprocess.Popen(["sleep", "600"], close_fds=False,\n'
    '    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n'
    '  print(child.pid, flush=True)\n'
    '  time.sleep(600)\n'
  )
  run = subprocess.Popen(
    [sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  child = int(run.stdout.readline())
  try:
    assert not is_free(tmp_path)
    run.send_signal(end)
    run.communicate(timeout=120)
    os.kill(child, 0)  # It is there still.
    assert is_free(tmp_path)
  finally:
    os.kill(child, signal.SIGKILL)


def in_a_thread(function):
  """What it returns, or raises, in another thread."""
  results = []

  def run():
    try:
      results.append(function())
    except Exception as error:
      results.append(error)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join(600)
  return results[0]


def test_a_thread_may_hold_it_twice_but_not_two_threads(tmp_path):
  with hold(tmp_path, print):
    with hold(os.path.relpath(tmp_path), print):
      assert not in_a_thread(lambda: is_free(tmp_path))
    assert not in_a_thread(lambda: is_free(tmp_path))
  assert in_a_thread(lambda: is_free(tmp_path))


def test_waiting_for_the_one_that_holds_it(tmp_path):
  said = []

  def wait():
    with hold(tmp_path, said.append, wait=True):
      return True

  with contextlib.ExitStack() as first:
    first.enter_context(hold(tmp_path, print))
    waiter = threading.Thread(target=wait)
    waiter.start()
    while not said:
      waiter.join(0.05)
    assert waiter.is_alive()
  waiter.join(600)
  assert not waiter.is_alive()
  assert len(said) == 1
  assert f'waiting for process {os.getpid()}' in said[0]


@pytest.mark.parametrize('replaced', [False, True])
def test_a_folder_moved_away_is_noticed(tmp_path, replaced):
  workdir = tmp_path / 'run'
  with hold(workdir, print) as check:
    check()
    workdir.rename(tmp_path / 'moved')
    if replaced:
      shutil.copytree(tmp_path / 'moved', workdir)
    with pytest.raises(RunError, match='run was moved away or replaced'):
      check()


def test_a_run_whose_workdir_is_moved_away_ends_in_one_line(tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, *ENDLESS)
  wait_for(lambda: metric_lines(workdir), process, timeout=600)
  workdir.rename(tmp_path / 'moved')
  status, _, err = finish(process)
  assert status == 1, err
  assert 'moved away' in one_line(err)
  assert not (workdir / 'result.json').exists()


@pytest.fixture(params=['bucket', 'no locks'])
def marked(request, tmp_path, monkeypatch):
  """A workdir where markers serve for locks."""
  if request.param == 'bucket':
    return f'{empty_bucket()}/run'

  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', refuse)
  return str(tmp_path / 'run')


def marker(workdir):
  return lock.epath.Path(workdir) / LOCK


def test_a_marker_that_changes_is_of_a_run_that_goes_on(marked, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  with hold(marked, print):
    # Only a beat ends the second one's look.
    monkeypatch.setattr(lock, 'DEAD', 600.0)
    error = in_a_thread(lambda: hold(marked, print).__enter__())
    assert isinstance(error, InputError)
    assert f'{marked} is held by process {os.getpid()} on' in str(error)
  assert not marker(marked).exists()
  assert in_a_thread(lambda: is_free(marked))


def test_a_marker_left_by_a_killed_run_is_passed_over(marked, monkeypatch):
  marker(marked).parent.mkdir(parents=True, exist_ok=True)
  marker(marked).write_text('{"token": "x", "pid": 1, "host": "h"}')
  monkeypatch.setattr(lock, 'DEAD', 0.2)
  said = []
  with hold(marked, said.append) as check:
    check()
    assert f'"pid": {os.getpid()}' in marker(marked).read_text()
  assert len(said) == 1
  assert 'waiting to see if its run is alive' in said[0]


def again_and_again(function):
  end = time.monotonic() + 600
  while time.monotonic() < end:
    function()
    time.sleep(0.01)


def test_a_run_that_was_taken_over_ends(marked, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  with hold(marked, print) as check:
    check()
    theirs = '{"token": "x", "pid": 1, "host": "there", "since": "noon"}'
    marker(marked).write_text(theirs)
    with pytest.raises(RunError, match='taken over by process 1 on there'):
      again_and_again(check)
  assert marker(marked).read_text() == theirs  # It is not ours to delete.


def test_a_full_disk_at_the_start_is_the_runs_trouble_and_not_the_users():
  # A file system of 64 KiB, full, in a mount namespace of its own.
  script = (
    'mount -t tmpfs -o size=64k none /mnt || exit 77\n'
    'cat /dev/zero > /mnt/filled 2> /dev/null\n'
    'exec "$@"'
  )
  command = ['unshare', '-rm', 'sh', '-c', script, 'sh', sys.executable]
  probe = subprocess.run([*command, '-c', ''], capture_output=True, check=False)
  if probe.returncode:
    pytest.skip('no mount namespaces here')
  done = subprocess.run(
    [*command, str(ROOT / 'train.py'), *TINY, '--workdir=/mnt/run'],
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 1, done.stderr
  assert one_line(done.stderr) == (
    'error: can not write to /mnt/run: No space left on device'
  )


def test_what_is_in_the_way_of_the_folder_is_the_users_mistake(tmp_path):
  (tmp_path / 'file').write_text('')
  with (
    pytest.raises(InputError, match=r'can not write to .*file/run: Not a'),
    hold(tmp_path / 'file/run', print),
  ):
    pass


def test_nothing_is_left_of_a_lock_that_ended(tmp_path):
  with hold(tmp_path, print):
    assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()
  assert not any(tmp_path.iterdir())


def test_many_threads_hold_it_one_after_the_other(tmp_path):
  inside, most = [], []

  def work():
    for _ in range(50):
      try:
        with hold(tmp_path, print):
          inside.append(1)
          most.append(len(inside))
          inside.pop()
      except InputError:
        pass

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(600)
  assert most
  assert max(most) == 1

"""One run, one folder: a workdir is held by the run that trains in it."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from skipinit_jax.errors import InputError, RunError, unwritable
from skipinit_jax.files import parse_object
from skipinit_jax.training import processes

LOCK = 'lock'
# A marker is written again every BEAT seconds. One that has not changed for
# DEAD seconds was left behind by a run that was killed.
BEAT, DEAD = 5.0, 60.0
# What flock answers on file systems that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[tuple[int, str], '_File | _Marker'] = {}


@contextlib.contextmanager
def hold(
  workdir: str | os.PathLike, say: Callable[[str], None], wait: bool = False
) -> Iterator[Callable[[], None]]:
  """Holds a workdir, which is made if it does not exist.

  The lock is one of the operating system on the file `lock` in it. It ends with
  the process, however that ends; child processes do not inherit it. Buckets,
  and file systems without locks, get a marker of that name instead, which is
  written again every few seconds. That is weaker: a run that was killed holds
  the workdir for another minute, and one that is cut off from the store for
  that long may find that another run has taken over.

  A thread may hold a workdir more than once.

  Args:
    workdir: a folder, or an address such as gs://bucket/run.
    say: called with a line before this has to wait.
    wait: for the run that holds it, instead of raising InputError.

  Yields:
    A function that raises RunError if the workdir is no longer held: it was
    moved away, or another run has taken over.

  Raises:
    InputError: another run holds it, or it can't be written to.
    RunError: there is no space left for it.
  """
  in_bucket = '://' in os.fspath(workdir)
  folder = os.fspath(workdir) if in_bucket else os.path.realpath(workdir)
  key = threading.get_ident(), folder
  if key in _held:
    yield _held[key].check
    return
  try:
    lock = _take(folder, say, wait)
  except ImportError as error:  # A bucket, and no package to reach it.
    raise InputError(f'--workdir={workdir}: {error}') from None
  except OSError as error:
    raise unwritable(workdir, error) from None
  if lock is None:
    raise InputError(
      f'{workdir} is held by {_holder(folder)}; wait until it ends, or choose '
      'another --workdir'
    )
  _held[key] = lock
  try:
    yield lock.check
  finally:
    del _held[key]
    lock.release()


@contextlib.contextmanager
def hold_for_all(
  workdir: str | os.PathLike, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
  """As `hold`; the first of several processes holds, or all raise."""
  error, check = None, lambda: None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        check = stack.enter_context(hold(workdir, say))
      except (InputError, RunError) as raised:
        error = raised
    if trouble := processes.agree(error):
      raise error or trouble
    yield check


def _take(
  folder: str, say: Callable[[str], None], wait: bool
) -> '_File | _Marker | None':
  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  lock = _Marker(folder, say) if '://' in folder else _File(folder)
  waiting = False
  while True:
    try:
      if lock.take():
        return lock
    except OSError as error:
      if isinstance(lock, _Marker) or error.errno not in NO_LOCKS:
        raise
      lock = _Marker(folder, say)
      continue
    if not wait:
      return None
    if not waiting:
      say(f'waiting for {_holder(folder)}, which holds {folder}')
    waiting = True
    time.sleep(0.5)


class _File:
  """A lock of the operating system on a file in a folder."""

  def __init__(self, folder: str):
    self._path = Path(folder) / LOCK

  def take(self) -> bool:
    # Python closes its descriptors in processes that this one starts.
    self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.ExitStack() as unless_taken:
      unless_taken.callback(os.close, self._file)
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      if self._is_in_folder():
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(_this_process()).encode())
        unless_taken.pop_all()
        return True
    return self.take()  # The last holder has just deleted the file.

  def check(self) -> None:
    with contextlib.suppress(OSError):  # Trouble that may pass.
      if not self._is_in_folder():
        raise RunError(
          f'{self._path.parent} was moved away or replaced during the run: '
          f'its {LOCK} is gone'
        )

  def release(self) -> None:
    with contextlib.suppress(OSError):
      if self._is_in_folder():
        self._path.unlink()
    os.close(self._file)

  def _is_in_folder(self) -> bool:
    try:
      return os.path.samestat(os.stat(self._path), os.fstat(self._file))
    except (FileNotFoundError, NotADirectoryError):
      return False


class _Marker:
  """A file or object that is rewritten every few seconds during a run."""

  def __init__(self, folder: str, say: Callable[[str], None]):
    self._folder, self._path = folder, epath.Path(folder) / LOCK
    self._say = say
    self._mine = _this_process() | {'token': uuid.uuid4().hex}
    self._beats = 0
    self._taken_by = ''
    self._done = threading.Event()

  def take(self) -> bool:
    before = self._read()
    if before:
      self._say(f'{self._path} exists: waiting to see if its run is alive')
    end = time.monotonic() + DEAD
    while before and time.monotonic() < end:
      time.sleep(BEAT / 10)
      now = self._read()
      if now and now != before:
        return False
      before = now
    self._write()
    if self._is_of_another():
      return False  # It came at the same time.
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()
    return True

  def check(self) -> None:
    if self._taken_by:
      raise RunError(
        f'{self._folder} was taken over by {self._taken_by}, which had heard '
        f'nothing of this run for {DEAD:.0f} s'
      )

  def release(self) -> None:
    self._done.set()
    self._thread.join()
    with contextlib.suppress(Exception):
      if not self._is_of_another():
        self._path.unlink()

  def _beat(self) -> None:
    while not self._done.wait(BEAT):
      with contextlib.suppress(Exception):  # Trouble that may pass.
        if self._is_of_another():
          self._taken_by = _holder(self._folder)
          return
        self._write()

  def _is_of_another(self) -> bool:
    mine = self._mine['token']
    return _parse(self._read()).get('token', mine) != mine

  def _read(self) -> str:
    try:
      return self._path.read_text()
    except FileNotFoundError:
      return ''

  def _write(self) -> None:
    self._beats += 1
    text = json.dumps(self._mine | {'beats': self._beats})
    if '://' in self._folder:
      self._path.write_text(text)
      return
    # In one piece: a marker that is read half written looks like none.
    whole = self._path.with_name(f'{LOCK}.{self._mine["token"]}')
    whole.write_text(text)
    whole.replace(self._path)


def _this_process() -> dict[str, Any]:
  now = datetime.datetime.now().astimezone()
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': now.isoformat(sep=' ', timespec='seconds'),
  }


def _holder(folder: str) -> str:
  """Who holds a folder, for a message."""
  try:
    fields = _parse((epath.Path(folder) / LOCK).read_text())
    return (
      f'process {fields["pid"]} on {fields["host"]} since {fields["since"]}'
    )
  except (OSError, KeyError):
    return 'another process'


def _parse(text: str) -> dict[str, Any]:
  try:
    return parse_object(text.encode())
  except ValueError:
    return {}

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

  A lock of the operating system on the file `lock` in it, which ends with the
  process however that ends; processes that this one starts do not inherit it.
  Object stores, and file systems without locks, get a marker of that name
  instead, which is written again every few seconds. That is weaker: a run that
  was killed holds the workdir for another minute, and one that is cut off from
  the store for so long may find that another run has taken over.

  A thread may hold a workdir more than once.

  Args:
    workdir: a folder, or an address such as gs://bucket/run.
    say: called with a line where this has to wait.
    wait: for the run that holds it, instead of an InputError.

  Yields:
    A function that raises RunError if the workdir is no longer held: it was
    moved away, or another run has taken over.

  Raises:
    InputError: another run holds it, or it can't be written to.
    RunError: there is no space left for it.
  """
  remote = '://' in os.fspath(workdir)
  where = os.fspath(workdir) if remote else os.path.realpath(workdir)
  key = threading.get_ident(), where
  if key in _held:
    yield _held[key].check
    return
  try:
    lock = _take(where, remote, say, wait)
  except ImportError as error:  # A bucket, and no package to reach it.
    raise InputError(f'--workdir={workdir}: {error}') from None
  except OSError as error:
    raise unwritable(workdir, error) from None
  if lock is None:
    raise InputError(
      f'{workdir} is held by {_holder(epath.Path(where) / LOCK)}; '
      'wait until it ends, or choose another --workdir'
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
  """As `hold`; of several processes the first holds, or all raise."""
  error, check = None, _nothing
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        check = stack.enter_context(hold(workdir, say))
      except (InputError, RunError) as raised:
        error = raised
    kinds = (None, InputError, RunError)
    kind = kinds[processes.from_first(kinds.index(error and type(error)))]
    if kind is not None:
      raise error or kind(f'process 0 can not use {workdir}; see its message')
    yield check


def _nothing() -> None:
  """The check of a process that holds nothing itself."""


def _take(
  where: str, remote: bool, say: Callable[[str], None], wait: bool
) -> '_File | _Marker | None':
  epath.Path(where).mkdir(parents=True, exist_ok=True)
  lock = _Marker(where, say) if remote else _File(where)
  said = False
  while True:
    try:
      if lock.take():
        return lock
    except OSError as error:
      if remote or error.errno not in NO_LOCKS:
        raise
      lock, remote = _Marker(where, say), True
      continue
    if not wait:
      return None
    if not said:
      say(
        f'waiting for {_holder(epath.Path(where) / LOCK)}, which holds {where}'
      )
      said = True
    time.sleep(0.5)


class _File:
  """A lock of the operating system on a file in a folder."""

  def __init__(self, folder: str):
    self._path = Path(folder) / LOCK

  def take(self) -> bool:
    # Python's descriptors are closed in processes that this one starts.
    self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if not self._in_place():  # Its last holder has just deleted it.
        os.close(self._file)
        return self.take()
      os.ftruncate(self._file, 0)
      os.write(self._file, json.dumps(_myself()).encode())
    except BlockingIOError:
      os.close(self._file)
      return False
    except OSError:
      os.close(self._file)
      raise
    return True

  def check(self) -> None:
    with contextlib.suppress(OSError):  # Trouble that may pass.
      if not self._in_place():
        raise RunError(
          f'{self._path.parent} was moved away or replaced while its run was '
          f'going on: its {LOCK} is gone'
        )

  def release(self) -> None:
    with contextlib.suppress(OSError):
      if self._in_place():
        self._path.unlink()
    os.close(self._file)

  def _in_place(self) -> bool:
    try:
      return os.path.samestat(os.stat(self._path), os.fstat(self._file))
    except (FileNotFoundError, NotADirectoryError):
      return False


class _Marker:
  """A file or object that is written again and again while its run goes on."""

  def __init__(self, folder: str, say: Callable[[str], None]):
    self._folder, self._path = folder, epath.Path(folder) / LOCK
    self._say = say
    self._mine = _myself() | {'token': uuid.uuid4().hex}
    self._beats = 0
    self._taken_by = ''
    self._done = threading.Event()

  def take(self) -> bool:
    before = self._read()
    if before:
      self._say(f'{self._path} is there: looking whether its run is alive')
    end = time.monotonic() + DEAD
    while before and time.monotonic() < end:
      time.sleep(BEAT / 10)
      now = self._read()
      if now and now != before:
        return False
      before = now
    self._write()
    if self._is_of_another(self._read()):
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
      if not self._is_of_another(self._read()):
        self._path.unlink()

  def _beat(self) -> None:
    while not self._done.wait(BEAT):
      with contextlib.suppress(Exception):  # Trouble that may pass.
        if self._is_of_another(self._read()):
          self._taken_by = _holder(self._path)
          return
        self._write()

  def _is_of_another(self, text: str) -> bool:
    return _parse(text).get('token', self._mine['token']) != self._mine['token']

  def _read(self) -> str:
    try:
      return self._path.read_text()
    except FileNotFoundError:
      return ''

  def _write(self) -> None:
    self._beats += 1
    self._path.write_text(json.dumps(self._mine | {'beats': self._beats}))


def _myself() -> dict[str, Any]:
  now = datetime.datetime.now().astimezone()
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': now.isoformat(sep=' ', timespec='seconds'),
  }


def _holder(path: epath.Path) -> str:
  """Who holds a folder, for a message."""
  try:
    fields = _parse(path.read_text())
    return (
      f'process {fields["pid"]} on {fields["host"]} since {fields["since"]}'
    )
  except (OSError, KeyError):
    return 'another process'


def _parse(text: str) -> dict[str, Any]:
  try:
    fields = json.loads(text)
  except ValueError:
    return {}
  return fields if isinstance(fields, dict) else {}

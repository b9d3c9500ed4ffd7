"""Small files: written whole, read with retries, set aside if damaged."""

import errno
import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from skipinit_jax.errors import RunError, reason

T = TypeVar('T')

PAUSES = (0.5, 2.0, 8.0)  # Seconds before a read that failed is tried again.
# Errors of file systems that can't flush the names in a folder to the disk.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class DamagedFile(RunError):
  """A file that does not hold what was written; one line.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: epath.PathLike, flaw: str):
    super().__init__(f'{path} is damaged: {flaw}')
    self.path = epath.Path(path)


def write_whole(path: epath.PathLike, data: bytes) -> None:
  """Writes a file; a crash or power cut leaves the old one or the new one."""
  path = epath.Path(path)
  if _is_object(path):  # Objects appear when they are whole.
    path.write_bytes(data)
    return
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_bytes(data)
  commit(temporary, path)


def commit(temporary: os.PathLike, path: os.PathLike) -> None:
  """Renames a file to `path` once its bytes are on the disk."""
  _sync(temporary)
  os.replace(temporary, path)
  try:
    _sync(os.path.dirname(os.path.abspath(path)))
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise


def read_bytes(path: epath.PathLike) -> bytes | None:
  """The content of a file, None if there is no file.

  Raises:
    DamagedFile: there is something else, such as a folder.
    RunError: the system can't read it, even after retries.
  """
  path = epath.Path(path)

  def read() -> bytes | None:
    try:
      if not _is_object(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
          kind = 'a folder' if stat.S_ISDIR(mode) else 'something else'
          raise DamagedFile(path, f'{kind} is in the place of the file')
      return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      if not _is_object(path) and os.path.islink(path):
        raise DamagedFile(path, 'it is a link that leads nowhere') from None
      return None
    except OSError as error:
      if error.errno == errno.ELOOP:
        raise RunError(f'{path} can not be read: {error.strerror}') from None
      # Clients of object stores give a message alone.
      raise OSError(error.errno, reason(error), str(path)) from None

  return retry(read)


def retry(
  read: Callable[[], T],
  pauses: Sequence[float] | None = None,
  say: Callable[[str], None] | None = None,
) -> T:
  """Calls `read`, and again after each pause while it raises OSError.

  Args:
    read: what may fail for a while, as a network disk does.
    pauses: in seconds; None: PAUSES.
    say: called with a line before each pause; None: to standard error.

  Raises:
    RunError: it still can't be read; one line with the file and the reason.
  """
  pauses = PAUSES if pauses is None else pauses
  for tries, pause in enumerate((*pauses, None), 1):
    try:
      return read()
    except OSError as error:
      if pause is None:
        raise RunError(f'{_describe(error)} (tried {tries} times)') from None
      line = f'{_describe(error)}; trying again in {pause:g} s'
      if say:
        say(line)
      else:
        print(line, file=sys.stderr)
      time.sleep(pause)
  raise AssertionError('unreachable')


def _describe(error: OSError) -> str:
  name = f'{error.filename}: ' if error.filename else ''
  return f'{name[-150:]}{reason(error)[:100]}'


def read_json(path: epath.PathLike) -> dict[str, Any] | None:
  """The JSON object in a file, None if there is no file.

  Raises:
    DamagedFile: its content is not a JSON object.
    RunError: see `read_bytes`.
  """
  data = read_bytes(path)
  if data is None:
    return None
  if not data.strip(b'\0 \r\n\t'):
    raise DamagedFile(path, 'it is empty' if not data else 'it is blank')
  try:
    return parse_object(data)
  except ValueError as error:
    raise DamagedFile(path, str(error)) from None


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file in one piece, see `write_whole`."""
  write_whole(path, (dumps(value, indent=2) + '\n').encode())


def dumps(value: Any, **kwargs) -> str:
  """Strict JSON, with null for numbers that are not finite."""
  return json.dumps(_finite(value), allow_nan=False, **kwargs)


def parse_object(data: bytes) -> dict[str, Any]:
  """A JSON object in UTF-8; raises ValueError, in a few words, if it is not."""
  try:
    value = json.loads(data.decode('utf-8-sig'), parse_constant=_refuse)
  except UnicodeDecodeError as error:
    raise ValueError(f'byte {error.start} is not UTF-8') from None
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  if not isinstance(value, dict):
    raise ValueError(f'a JSON object was expected, not {str(value)[:20]!r}')
  return value


def set_aside(path: epath.PathLike) -> epath.Path:
  """Renames a damaged file to `damaged-NAME`, with a number if that exists."""
  path = epath.Path(path)
  aside = name_aside(path)
  path.rename(aside)
  return aside


def name_aside(path: epath.PathLike) -> epath.Path:
  """An unused name beside `path` for what is damaged."""
  path = epath.Path(path)
  aside, number = path.with_name(f'damaged-{path.name}'), 1
  while aside.exists() or os.path.islink(aside):
    number += 1
    aside = path.with_name(f'damaged-{path.name}.{number}')
  return aside


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _refuse(name: str) -> None:
  raise ValueError(f'{name} is not JSON')


def _sync(path: os.PathLike | str) -> None:
  """Waits until a file, or a folder's list of names, is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _is_object(path: epath.Path) -> bool:
  return '://' in str(path)

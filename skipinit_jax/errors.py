"""Errors for people: one line each, with the value and what was expected."""

import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUCKETS = ('gs', 's3', 'az')

# Errors of a file system that is full or broken, not badly chosen.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# These are about the content of a folder, not about trouble with reading it.
CONTENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# TensorStore's errors: paths, then No space left on device [os_error_code='28'.
_TENSORSTORE = re.compile(r"([^:]+) \[os_error_code='(\d+)'")


class InputError(ValueError):
  """Bad input; the message is one line that names the value and the remedy."""


class RunError(RuntimeError):
  """A run that can't continue for a reason outside it, as a full disk."""


def unwritable(
  folder: str | os.PathLike, error: OSError
) -> InputError | RunError:
  """The error for a folder that can't be written to: badly chosen, or full."""
  kind = RunError if error.errno in FULL_OR_BROKEN else InputError
  return kind(f'can not write to {folder}: {reason(error)}')


def not_installed(module: str, extra: str = 'train') -> str:
  """The line for a module that an extra installs."""
  return f"{module} is not installed: pip install 'skipinit-jax[{extra}]'"


def reason(error: BaseException) -> str:
  """What an error says, without paths and all that follows a line break."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if found := _TENSORSTORE.search(str(error)):
    return found[1].strip()
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = lines[0] if lines else type(error).__name__
  return text if len(text) < 200 else f'{text[:200]}...'


def of_system(error: BaseException | None) -> str | None:
  """The system's reason for an error, or for what caused it; else None.

  A file that is missing or of the wrong kind is no such reason.
  """
  causes = []
  while error is not None and error not in causes:
    causes.append(error)
    found = _TENSORSTORE.search(str(error))
    if (
      isinstance(error, TimeoutError | ConnectionError)
      or (isinstance(error, OSError) and error.errno not in CONTENT)
      or (found and int(found[2]) not in CONTENT)
    ):
      return reason(error)
    error = error.__cause__ or error.__context__
  return None


def unknown(what: str, value: object, known: Iterable[str]) -> str:
  """An error for a name that is not in a table, with the most similar one.

  >>> unknown('color', 'rde', ['red', 'blue'])
  "unknown color 'rde'; did you mean 'red'? (one of: red, blue)"
  """
  known = list(known)
  hint = nearest(str(value), known)
  return f'unknown {what} {value!r}{hint} (one of: {", ".join(known)})'


def nearest(name: str, known: Iterable[str]) -> str:
  """The end of an error: the known name most like this one, '' if none is."""
  # The time that comparing takes grows with the square of the length.
  near = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
  return f'; did you mean {near[0]!r}?' if near else ''


def shown(value: Any) -> str:
  """A value in an error: its repr on one line, shortened.

  >>> shown(list(range(100)))
  '[0, 1, 2, 3, 4, 5, ...]'
  """
  return ' '.join(reprlib.repr(value).split())


def kind(value: Any) -> str:
  """What an argument is, in an error: as in 'float32 of shape (2, 3)'."""
  if hasattr(value, 'dtype') and hasattr(value, 'shape'):
    return f'{value.dtype} of shape {value.shape}'
  return f'a value of type {type(value).__name__}'


def check_folder(name: str | os.PathLike, buckets: bool = False) -> str:
  """Checks that a folder can be written to; returns its name, ~ expanded.

  Args:
    name: of a folder, which does not have to exist.
    buckets: whether the address of an object store is accepted.

  Raises:
    InputError: it can't be written to, or made; nothing is written.
  """
  text = os.fspath(name)
  if not text.strip():
    raise InputError(f'{text!r}: expected the name of a folder')
  scheme = re.match(r'([\w+.-]+)://', text)
  if scheme and buckets and scheme[1] in BUCKETS:
    return text
  if scheme:
    stores = ' or '.join(f'{b}://' for b in BUCKETS)
    raise InputError(
      f'{text!r}: {scheme[0]} is not supported here; expected a folder'
      + (f' or an address that begins with {stores}' if buckets else '')
    )
  path = Path(os.path.expanduser(text))
  try:
    existing = path
    while not (existing.exists() or existing.is_symlink()):
      existing = existing.parent
    is_folder = existing.is_dir()
  except (OSError, ValueError) as error:
    raise InputError(f'{text!r}: {reason(error)}') from None
  if text.startswith('~') and str(path).startswith('~'):
    raise InputError(f'{text!r}: no such user; expected a folder')
  if not is_folder:
    raise InputError(f'{text!r}: {existing} is a file; expected a folder')
  if not os.access(existing, os.W_OK | os.X_OK):
    raise InputError(f'{text!r}: no permission to write to {existing}')
  return str(path)

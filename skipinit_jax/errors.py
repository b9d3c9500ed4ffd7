"""What this package says about bad input: one line, for people."""

import difflib
import errno
import os
from collections.abc import Iterable

# What a file system answers that is full or broken, not badly chosen.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class InputError(ValueError):
  """Bad input; the message is one line that names the value and the remedy."""


class RunError(RuntimeError):
  """A run that can't go on for a reason outside it (a full disk); one line."""


def unwritable(
  folder: str | os.PathLike, error: OSError
) -> InputError | RunError:
  """The error for a folder that can't be written to: badly chosen, or full."""
  kind = RunError if error.errno in FULL_OR_BROKEN else InputError
  return kind(f'can not write to {folder}: {error.strerror or error}')


def unknown(what: str, value: object, known: Iterable[str]) -> str:
  """A line for a name that is not in a table, with the nearest that is.

  >>> unknown('color', 'rde', ['red', 'blue'])
  "unknown color 'rde'; did you mean 'red'? (one of: red, blue)"
  """
  known = list(known)
  nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
  hint = f'; did you mean {nearest[0]!r}?' if nearest else ''
  return f'unknown {what} {value!r}{hint} (one of: {", ".join(known)})'

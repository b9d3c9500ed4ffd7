"""Why saving or restoring failed, in a few words."""

import contextlib
import errno
import re
from collections.abc import Iterator

from skipinit_jax.errors import RunError

# These are about the content of a folder, not about trouble with reading it.
CONTENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# TensorStore's errors: paths, then No space left on device [os_error_code='28'.
_TENSORSTORE = re.compile(r"([^:]+) \[os_error_code='(\d+)'")


@contextlib.contextmanager
def errors_as(what: str) -> Iterator[None]:
  """Turns what Orbax and the file system raise into a RunError of one line."""
  try:
    yield
  except RunError:
    raise
  except Exception as error:
    raise RunError(f'{what}: {first_line(error)}') from None


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
      return first_line(error)
    error = error.__cause__ or error.__context__
  return None


def first_line(error: BaseException) -> str:
  """What an error says, without paths and all that follows a line break."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if found := _TENSORSTORE.search(str(error)):
    return found[1].strip()
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = lines[0] if lines else type(error).__name__
  return text if len(text) < 200 else f'{text[:200]}...'

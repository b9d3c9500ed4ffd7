"""Why saving or restoring failed, in a few words."""

import contextlib
import errno
from collections.abc import Iterator

from skipinit_jax.errors import TENSORSTORE, RunError, reason

# These are about the content of a folder, not about trouble with reading it.
CONTENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def errors_as(what: str) -> Iterator[None]:
  """Turns what Orbax and the file system raise into a RunError of one line."""
  try:
    yield
  except RunError:
    raise
  except Exception as error:
    raise RunError(f'{what}: {reason(error)}') from None


def of_system(error: BaseException | None) -> str | None:
  """The system's reason for an error, or for what caused it; else None.

  A file that is missing or of the wrong kind is no such reason.
  """
  causes = []
  while error is not None and error not in causes:
    causes.append(error)
    found = TENSORSTORE.search(str(error))
    if (
      isinstance(error, TimeoutError | ConnectionError)
      or (isinstance(error, OSError) and error.errno not in CONTENT)
      or (found and int(found[2]) not in CONTENT)
    ):
      return reason(error)
    error = error.__cause__ or error.__context__
  return None

"""Reading image files, and telling a bad file from a failing disk.

- The image is at fault: it can't be decoded, or its name leads to no regular
  file (a folder, pipe, socket or device; a link that leads nowhere). It raises
  `Unreadable`, and is named, counted and replaced.
- The system is at fault: every other OSError, such as EIO, ESTALE, EMFILE,
  EACCES, or ENOENT for a file that was listed. The read is tried again, see
  `files.retry`; if it keeps failing, `RunError` ends the run.
"""

import errno
import os
import stat

_KINDS = {
  stat.S_IFDIR: 'a folder',
  stat.S_IFIFO: 'a pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}
_NOWHERE = errno.ENOENT, errno.ELOOP, errno.ENOTDIR


class Unreadable(ValueError):
  """A record that can't be read by its own fault: its name and the reason."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)
    self.name, self.reason = name, reason

  def __str__(self) -> str:
    return self.reason


def read_image(path: str, name: str) -> bytes:
  """The bytes of an image file.

  Args:
    path: of the file.
    name: for messages.

  Raises:
    Unreadable: the path does not lead to a regular file.
    OSError: it can't be read for a reason of the system.
  """
  try:
    with open(path, 'rb', buffering=0, opener=_open) as file:
      kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
      if kind == stat.S_IFREG:
        return file.readall()
  except OSError as error:
    if not (reason := _irregular(path)):  # Errors of read(2) have no name.
      raise OSError(error.errno, error.strerror, path) from None
  else:
    reason = _KINDS.get(kind, 'special')
  raise Unreadable(name, f'{reason}, not a file')


def _open(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NONBLOCK)  # A pipe waits for its writer.


def _irregular(path: str) -> str | None:
  """What a path that can't be opened leads to, None for a regular file."""
  try:
    return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
  except OSError as error:
    nowhere = error.errno in _NOWHERE and os.path.islink(path)
    return 'a link that leads nowhere' if nowhere else None

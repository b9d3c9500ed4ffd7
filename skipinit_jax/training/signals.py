"""Asked to stop by a signal, at any moment of a run."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import TextIO

from skipinit_jax.cli import SIGNALED, leave

# SIGHUP comes from a terminal that is gone, SIGUSR1 from a scheduler some time
# before it ends the job.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Sent twice by somebody who does not want to wait.
IMPATIENT = (signal.SIGTERM, signal.SIGINT)


def handled_signals() -> list[signal.Signals]:
  """SIGNALS without a SIGHUP that is ignored, as under nohup."""
  ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  return [s for s in SIGNALS if not (ignored and s == signal.SIGHUP)]


class Stopped(Exception):
  """A run that was asked to stop and has saved what it had.

  Args:
    number: of the signal, None if another process was asked.
    step: steps made and saved.
  """

  def __init__(self, number: int | None, step: int):
    super().__init__(number, step)
    self.number, self.step = number or signal.SIGTERM, step

  @property
  def status(self) -> int:
    """Exit status, as a shell gives it: 128 and the signal's number."""
    return SIGNALED + self.number


class StopRequest:
  """A context in which SIGNALS ask the run to stop.

  Python runs a signal handler only between two of its own instructions, so not
  while XLA compiles. The operating system's wake-up byte goes to a thread
  instead, which acts within milliseconds. The first signal sets `requested`, or
  ends the process at once while there is nothing to lose. A signal of IMPATIENT
  that comes again ends it at once.

  Args:
    say: called with a line on what happens next.

  Attributes:
    requested: number of the first signal, None before it.
    nothing_to_lose: whether leaving at once loses no step.
  """

  def __init__(self, say: Callable[[str], None]):
    self._say = say
    self.requested: int | None = None
    self.nothing_to_lose = True

  def __enter__(self):
    self._before = None
    if threading.current_thread() is not threading.main_thread():
      return self  # Only the main thread may set handlers.
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._before = {s: signal.signal(s, _ignore) for s in handled_signals()}
    self._wakeup = signal.set_wakeup_fd(self._write)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    if self._before is None:
      return
    signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.close(self._write)  # Ends the thread.
    self._thread.join()
    os.close(self._read)

  def _watch(self) -> None:
    received = set()
    while numbers := os.read(self._read, 1):
      number = numbers[0]
      if number not in SIGNALS:
        continue
      name = signal.Signals(number).name
      if number in received and number in IMPATIENT:
        leave(f'{name} again: stopping at once', SIGNALED + number)
      received.add(number)
      if self.requested is not None:
        continue
      if self.nothing_to_lose:
        line = f'{name} before the first step: nothing to save'
        leave(line, SIGNALED + number)
      self.requested = number
      self._say(
        f'{name}: saving and stopping; SIGINT or SIGTERM twice to stop at once'
      )


class Tolerant:
  """A text stream whose terminal may be gone.

  What can't be written is dropped: otherwise a progress line that fails before
  the SIGHUP is noticed would end the run unsaved.

  Args:
    stream: standard output or standard error.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes what can be written."""
    with contextlib.suppress(OSError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """Flushes what can be flushed."""
    with contextlib.suppress(OSError):
      self._stream.flush()


def _ignore(number, frame):
  del number, frame  # The thread acts on it.

"""Ends a process whose steps do not come, and says who is missing."""

import threading
import time

from jax._src import distributed

from skipinit_jax.cli import STUCK, leave


class Watchdog:
  """A thread that ends this process after a silence.

  In a job of several processes one that hangs leaves all others waiting in a
  collective for ever, and one that is alive keeps its heartbeat. Every process
  therefore watches its own steps, and tells the others through the coordination
  service how far it got.

  Args:
    at_start: seconds without a first step after which the process ends, with
      status 75: connecting, reading and compiling are one long silence.
    seconds: the same between steps.
  """

  def __init__(self, at_start: float, seconds: float):
    self._at_start, self._seconds = at_start, seconds
    self._step: int | None = None
    self._last = time.monotonic()
    self._done = threading.Event()

  def __enter__(self):
    self._done.clear()
    # Other bounds are refused in a moment, by `check_config`.
    if self._at_start > 0 and self._seconds > 0:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._done.set()

  def beat(self, step: int | None = None) -> None:
    """Says that `step` steps are made, or that something else moves on."""
    self._last = time.monotonic()
    self._step = self._step if step is None else step

  def _watch(self) -> None:
    told = None
    while not self._done.wait(min(1.0, self._seconds / 4, self._at_start / 4)):
      beat = self._step, self._last
      if beat != told:
        _tell(self._step)
        told = beat
      silence = time.monotonic() - self._last
      starting = self._step is None
      if silence > (self._at_start if starting else self._seconds):
        leave(
          f'error: no progress for {silence:.0f} s {_after(self._step)}; '
          f'{_who_is_missing()}',
          STUCK,
        )


def _after(step: int | None) -> str:
  return 'before the first step' if step is None else f'after step {step}'


def _key(process: int) -> str:
  return f'skipinit_jax/progress/{process}'


# Not jax.process_count(), which waits for the devices, maybe for ever.
def _tell(step: int | None) -> None:
  job = distributed.global_state
  if job.client is not None:
    job.client.key_value_set(
      _key(job.process_id),
      f'{time.time()} {_after(step)}',
      allow_overwrite=True,
    )


def _who_is_missing() -> str:
  job = distributed.global_state
  if job.client is None:
    return 'this is the only process'
  lines = []
  for process in range(job.num_processes):
    try:
      told = job.client.key_value_try_get(_key(process))
    except Exception:
      lines.append(f'process {process} was never heard of')
      continue
    when, _, where = told.partition(' ')
    ago = time.time() - float(when)
    lines.append(f'process {process} {where} {ago:.0f} s ago')
  return 'last heard of: ' + '; '.join(lines)

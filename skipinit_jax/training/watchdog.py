"""Ends a process that makes no steps, and says which one is missing."""

import threading
import time

from jax._src import distributed

from skipinit_jax.cli import STUCK, leave

STANDSTILL = 2  # Pauses between two looks: meanwhile nothing ran at all.


class Watchdog:
  """A thread that ends this process, with status STUCK, after a silence.

  If one process of a job hangs, all others wait in a collective for ever, and
  JAX's heartbeat does not notice. Every process therefore watches its own
  steps, and publishes how far it got through the coordination service. Time in
  which this whole process stood still, as after Ctrl-Z or with its machine, is
  no silence.

  Args:
    at_start: seconds that may pass before the first step: connecting, reading
      and compiling are one long silence.
    seconds: the same between steps.
  """

  def __init__(self, at_start: float, seconds: float):
    self._at_start, self._seconds = at_start, seconds
    self._step: int | None = None
    self._last = time.monotonic()
    self._done = threading.Event()

  def __enter__(self):
    self._done.clear()
    # `check_config` is about to refuse other limits.
    if self._at_start > 0 and self._seconds > 0:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._done.set()

  def beat(self, step: int | None = None) -> None:
    """Says that `step` steps are made, or that something else progresses."""
    self._last = time.monotonic()
    self._step = self._step if step is None else step

  def _watch(self) -> None:
    published, looked = None, time.monotonic()
    pause = min(1.0, self._seconds / 4, self._at_start / 4)
    while True:
      beat = self._step, self._last
      if beat != published:
        _publish(_progress(self._step))
        published = beat
      if self._done.wait(pause):
        return
      before, looked = looked, time.monotonic()
      if looked - before > STANDSTILL * pause:
        self._last = looked
      silence = time.monotonic() - self._last
      if silence > (self._at_start if self._step is None else self._seconds):
        line = f'no progress for {silence:.0f} s {_progress(self._step)}'
        leave(f'error: {line}; {_last_signs()}', STUCK)


def _progress(step: int | None) -> str:
  return 'before the first step' if step is None else f'after step {step}'


def _key(process: int) -> str:
  return f'skipinit_jax/progress/{process}'


# Not jax.process_count(), which may wait for the devices for ever.
def _publish(progress: str) -> None:
  job = distributed.global_state
  if job.client is not None:
    job.client.key_value_set(
      _key(job.process_id), f'{time.time()} {progress}', allow_overwrite=True
    )


def _last_signs() -> str:
  """The last that was heard of each process."""
  job = distributed.global_state
  if job.client is None:
    return 'this is the only process'
  lines = []
  for process in range(job.num_processes):
    try:
      published = job.client.key_value_try_get(_key(process))
    except Exception:
      lines.append(f'process {process} was never heard of')
      continue
    when, _, progress = published.partition(' ')
    ago = time.time() - float(when)
    lines.append(f'process {process} {progress} {ago:.0f} s ago')
  return 'last heard of: ' + '; '.join(lines)

"""Ends a process whose steps have stopped coming, and says who is missing."""

import threading
import time

import jax
from jax._src import distributed

from skipinit_jax.training.signals import leave

STUCK = 75  # Exit status.


class Watchdog:
  """A thread that ends this process after a silence.

  In a job of several processes one that hangs leaves all others waiting in a
  collective for ever, and one that is alive keeps its heartbeat. Every process
  therefore watches its own steps, and tells the others through the coordination
  service how far it got.

  Args:
    seconds: of silence after which the process ends, with status 75; None
      never ends it. Silence counts from the first `beat`.
  """

  def __init__(self, seconds: float | None):
    self._seconds = seconds
    self._step: int | None = None
    self._last = time.monotonic()
    self._done = threading.Event()

  def __enter__(self):
    self._done.clear()
    if self._seconds is not None:
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
    while not self._done.wait(min(1.0, self._seconds / 4)):
      if self._step is None:
        continue
      beat = self._step, self._last
      if beat != told:
        _tell(self._step)
        told = beat
      silence = time.monotonic() - self._last
      if silence > self._seconds:
        leave(
          f'error: no progress for {silence:.0f} s after step {self._step}; '
          f'{_who_is_missing()}',
          STUCK,
        )


def _client():
  return distributed.global_state.client if jax.process_count() > 1 else None


def _key(process: int) -> str:
  return f'skipinit_jax/progress/{process}'


def _tell(step: int) -> None:
  if (client := _client()) is not None:
    client.key_value_set(
      _key(jax.process_index()), f'{step} {time.time()}', allow_overwrite=True
    )


def _who_is_missing() -> str:
  client = _client()
  if client is None:
    return 'this is the only process'
  lines = []
  for process in range(jax.process_count()):
    try:
      step, when = client.key_value_try_get(_key(process)).split()
    except Exception:
      lines.append(f'process {process} was never heard of')
      continue
    ago = time.time() - float(when)
    lines.append(f'process {process} at step {step} {ago:.0f} s ago')
  return 'last heard of: ' + '; '.join(lines)

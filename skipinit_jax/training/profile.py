"""A window of steps in JAX's profiler."""

import jax
from etils import epath
from ml_collections import ConfigDict


class Profiler:
  """Traces `profile_steps` steps from step `profile_at` on.

  The trace is in `WORKDIR/profile`, for TensorBoard or Perfetto.
  """

  def __init__(self, config: ConfigDict, workdir: epath.Path):
    self._first, self._number = config.profile_at, config.profile_steps
    self._folder = workdir / 'profile'
    self._until: int | None = None

  def before(self, step: int) -> None:
    """Opens or closes the window; called before each call, at step `step`."""
    if self._first is None:
      return
    if self._until is None and step >= self._first:
      self._until = step + self._number
      jax.profiler.start_trace(str(self._folder))
    elif self._until is not None and step >= self._until:
      self.close()

  def close(self) -> None:
    """Closes the window if it is open; a run has one."""
    if self._until is not None and self._first is not None:
      jax.profiler.stop_trace()
      self._first = None

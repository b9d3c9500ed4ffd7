"""How many images of an epoch could not be read, and when that is too many."""

from collections.abc import Iterable, Mapping
from typing import Any

from skipinit_jax.errors import InputError
from skipinit_jax.training import processes


class BadShare:
  """Counts the images of an epoch that were replaced by others.

  All processes count alike, so that all stop after the same step.

  Args:
    batch_size: of all processes.
    train_size: images of an epoch.
    limit: the share of an epoch's images that may be replaced.
  """

  def __init__(self, batch_size: int, train_size: int, limit: float):
    self._batch_size, self._train_size = batch_size, train_size
    self._limit = limit
    self._epoch, self._count = 0, 0

  def resume(self, start: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Counts again what the first process has written in `start` steps."""
    self._epoch = start * self._batch_size // self._train_size
    count = sum(
      line['replaced']
      for line in lines
      if 'replaced' in line and self._epoch_of(line['step']) == self._epoch
    )
    self._count = processes.from_first(count)

  def add(self, step: int, replaced: int) -> InputError | None:
    """Counts the images replaced in a step; an error if they are too many."""
    epoch = self._epoch_of(step)
    if epoch is None:
      return None
    if epoch != self._epoch:
      self._epoch, self._count = epoch, 0
    self._count += replaced
    if self._count <= self._limit * self._train_size:
      return None
    return InputError(
      f"{self._count} of an epoch's {self._train_size} images could not be "
      f'read, more than data.bad_share={self._limit}; they are named above; '
      'python -m skipinit_jax.data check lists all'
    )

  def _epoch_of(self, step: int) -> int | None:
    """The epoch of a step's images, None if they are of two.

    These count for neither, or an image might be counted twice.
    """
    first, after = (n * self._batch_size for n in (step - 1, step))
    epoch = first // self._train_size
    return epoch if epoch == (after - 1) // self._train_size else None

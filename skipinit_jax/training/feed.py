"""What each step takes, read ahead so that trouble is told in time."""

import collections
import itertools
from collections.abc import Iterator
from typing import Any

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import processes

# Metrics are read one call late, see `Reporter.train`: that a process has no
# batch for a step must be told two steps before it.
AHEAD = 2


class Feed:
  """Elements of a data set's `inputs`, the next `AHEAD` of them read already.

  Where reading fails in one process, it still has batches for the steps in
  which it tells the others; all then stop after the same step.

  Args:
    inputs: of the data set.
    count: elements that are needed.

  Attributes:
    trouble: why nothing follows what was read, None while all is well.

  Raises:
    InputError, RunError: the first elements can't be read, in any process.
  """

  def __init__(self, inputs: Iterator[Any], count: int):
    self._inputs = itertools.islice(inputs, count)
    self._ahead: collections.deque[Any] = collections.deque()
    self.trouble: Exception | None = None
    self._fill()
    if trouble := processes.agree(self.trouble):
      raise trouble

  def __next__(self) -> Any:
    element = self._ahead.popleft()
    self._fill()
    return element

  def _fill(self) -> None:
    missing = AHEAD - len(self._ahead)
    if self.trouble is None:
      try:
        self._ahead.extend(itertools.islice(self._inputs, missing))
      except (InputError, RunError) as error:
        self.trouble = error

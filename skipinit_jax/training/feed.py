"""The inputs of the steps, read ahead so that errors are told in time."""

import collections
import itertools
from typing import Any

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import processes
from skipinit_jax.training.devices import replicate, shard
from skipinit_jax.training.program import Program

# Metrics are read one call late, see `Reporter.train`: that a process has no
# batch for a step must be told two steps before it.
AHEAD = 2


class Feed:
  """Elements of a data set's `inputs`, always `AHEAD` of them ahead.

  Where reading fails in one process, it still has batches for the steps in
  which it tells the others; all then stop after the same step.

  Args:
    program: its data set is read, as its config says.
    total: steps of the run; nothing is read beyond.

  Attributes:
    trouble: why nothing follows what was read, None while all is well.
  """

  def __init__(self, program: Program, total: int):
    self._program, self._total = program, total
    self._inputs, self._elements = None, iter(())
    self._ahead: collections.deque[Any] = collections.deque()
    self.trouble: InputError | RunError | None = None

  def start(self, step: int) -> None:
    """Continues with what follows the first `step` steps.

    Raises:
      InputError, RunError: it can't be read, in any process.
    """
    self.close()
    data, config = self._program.data, self._program.config
    place = replicate if data.resident else shard
    self._inputs = data.inputs(place, config, step)
    self._elements = itertools.islice(self._inputs, self._total - step)
    self._ahead.clear()
    self.trouble = None
    self._fill()
    if trouble := processes.agree(self.trouble):
      raise trouble

  def __next__(self) -> Any:
    element = self._ahead.popleft()
    self._fill()
    return element

  def close(self) -> None:
    """Stops whatever reads in the background."""
    if self._inputs is not None:
      self._inputs.close()

  def _fill(self) -> None:
    missing = AHEAD - len(self._ahead)
    if self.trouble is None:
      try:
        self._ahead.extend(itertools.islice(self._elements, missing))
      except (InputError, RunError) as error:
        self.trouble = error

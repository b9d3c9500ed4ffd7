"""What the images of a data set are read from, wherever they lie."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from skipinit_jax.errors import InputError
from skipinit_jax.files import retry

# Names tried for the evaluation split where the recipe names none.
EVAL_SPLITS = ('validation', 'val', 'test')


class Record(NamedTuple):
  """An image file: its name for messages, its bytes, its class."""

  name: str
  data: bytes
  label: int


class Records(Protocol):
  """One split; random access (Grain's protocol), picklable.

  Reading one raises Unreadable where the record itself is at fault, and OSError
  where the system is.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class Subset:
  """Some of the records, in the order of `indices`."""

  def __init__(self, records: Records, indices: np.ndarray):
    self.records, self.indices = records, indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Record:
    return self.records[int(self.indices[index])]


class Source(NamedTuple):
  """A data set on disk.

  Attributes:
    name: for messages.
    folder: where it lies.
    splits, classes: their names; labels are indices into `classes`.
    open: opens a split; raises InputError if it is not there or damaged.
    form: what was done to the images, as the set itself says; or ''.
  """

  name: str
  folder: Path
  splits: Sequence[str]
  classes: Sequence[str]
  open: Callable[[str], Records]
  form: str = ''

  def eval_split(self, wanted: str) -> str:
    """The split to evaluate on: `wanted`, or the usual one where empty."""
    usual = [split for split in EVAL_SPLITS if split in self.splits]
    if wanted or usual:
      return wanted or usual[0]
    raise InputError(
      f'{self.name} has no split to evaluate on, only '
      f'{", ".join(self.splits)}; name one in data.eval_split or hold images '
      'out by data.validation'
    )


def read_record(records: Records, index: int, num_classes: int) -> Record:
  """Reads a record; tries again where the system fails.

  Raises:
    Unreadable: the record is at fault.
    InputError: its label is not in [0, num_classes).
    RunError: the system can't read it.
  """
  record = retry(lambda: records[index])
  check_label(record, num_classes)
  return record


def check_label(record: Record, num_classes: int) -> None:
  """Raises InputError unless the label is in [0, num_classes)."""
  if not 0 <= record.label < num_classes:
    raise InputError(
      f'label {record.label} of {record.name} is outside the {num_classes} '
      f'classes (0 to {num_classes - 1})'
    )


def sample(count: int, wanted: int) -> list[int]:
  """At most `wanted` indices, evenly over 0 ... count - 1.

  >>> sample(10, 3)
  [0, 4, 9]
  """
  return np.linspace(0, count - 1, min(count, wanted), dtype=int).tolist()

"""Batches of crops, decoded from records by Grain."""

import dataclasses
import os
from collections.abc import Generator
from typing import Any

import numpy as np

from skipinit_jax.data.crops import CentralCrop, RandomCrop, mirror, read
from skipinit_jax.data.decode import DecodeError
from skipinit_jax.data.extras import require
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Records, read_record
from skipinit_jax.errors import InputError, RunError

NEIGHBOURS = 100  # Records that are tried in place of a broken one.


def draw(position: int, rng: np.random.Generator) -> tuple[int, list[float]]:
  """Index in the split -> (index, all random numbers of its crop)."""
  return position, rng.random(RandomCrop.DRAWS + 1).tolist()


@dataclasses.dataclass(frozen=True)
class Crops:
  """Makes batches of a split's records; picklable.

  Attributes:
    records: the split.
    num_classes: labels must be below.
    size: height and width of the crops.
    shared: workers make the batches, in memory that they share with the
      program; only they may.
  """

  records: Records
  num_classes: int
  size: int
  shared: bool

  def empty(self, rows: int) -> dict[str, Any]:
    """A batch of no images in particular, to be filled in place."""
    # What lies elsewhere, Grain would copy there.
    array = require('grain').multiprocessing.SharedMemoryArray
    make = array if self.shared else np.empty
    return {
      'image': make((rows, self.size, self.size, 3), np.uint8),
      'label': np.zeros(rows, np.int32),
      'broken': [],
    }

  def fill(
    self,
    batch: dict[str, Any],
    row: int,
    index: int,
    crop: RandomCrop | CentralCrop,
  ) -> tuple[str, str] | None:
    """Fills a row, or returns the name of a broken record and the reason."""
    try:
      record = read_record(self.records, index, self.num_classes)
      read(record.data, crop, batch['image'][row])
    except Unreadable as error:
      return error.name, error.reason
    except DecodeError as error:
      return record.name, str(error)
    batch['label'][row] = record.label
    return None


@dataclasses.dataclass(frozen=True)
class RandomCrops(Crops):
  """Results of `draw` -> a batch to train on.

  Attributes:
    area, aspect: ranges of the random crop, see `RandomCrop`.
    flip: mirror half of the images.
  """

  area: tuple[float, float]
  aspect: tuple[float, float]
  flip: bool

  def __call__(self, draws: list[tuple[int, list[float]]]) -> dict[str, Any]:
    """Loads a batch; in place of a broken image the next whole one."""
    batch, size = self.empty(len(draws)), len(self.records)
    for row, (position, (*numbers, side)) in enumerate(draws):
      crop = RandomCrop(self.size, self.area, self.aspect, numbers)
      flaws = []
      for step in range(min(NEIGHBOURS, size)):
        flaw = self.fill(batch, row, (position + step) % size, crop)
        if flaw is None:
          break
        flaws.append(flaw)
      else:
        raise InputError(
          f'{len(flaws)} images in a row are broken; the last: '
          f'{brief(flaws[-1])}'
        )
      batch['broken'] += flaws[:1]  # The others count at their own positions.
      if self.flip and side < 0.5:
        mirror(batch['image'][row])
    return batch


@dataclasses.dataclass(frozen=True)
class CentralCrops(Crops):
  """Positions in the split -> a batch to evaluate on, with its `mask`.

  Attributes:
    resize: shorter side that an image is resized to before its central crop.
  """

  resize: int

  def __call__(self, positions: list[int]) -> dict[str, Any]:
    """Loads a batch."""
    batch = self.empty(len(positions))
    mask = np.array(positions) < len(self.records)
    crop = CentralCrop(self.size, self.resize)
    for row in range(mask.sum()):
      if flaw := self.fill(batch, row, positions[row], crop):
        batch['broken'].append(flaw)
        batch['image'][row], batch['label'][row] = 0, -1
    batch['image'][mask.sum() :] = 0
    return batch | {'mask': mask}


def brief(flaw: tuple[str, str]) -> str:
  """A broken image's name and reason, 65 characters at most."""
  name, reason = flaw
  return f'{name[-35:]}: {reason[:28]}'


def iterate(dataset: Any, workers: int) -> Generator[Any]:
  """Yields the elements of a Grain MapDataset in order, made ahead of time.

  Args:
    dataset: of elements that are costly to make, such as batches.
    workers: processes that make them; 0: threads of this one.

  Raises:
    InputError, RunError: what an element raised.
    RunError: a worker died, or met another error; one line.
  """
  grain = require('grain')
  # A thread makes a whole batch, so that each costs the memory of one. A worker
  # needs none, since it is ahead of the program by itself; and what it had made
  # in shared memory when it is stopped would not be freed.
  threads = 0 if workers else min(8, os.cpu_count() or 1)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, threads))
  if workers:
    # No warning about shared memory that Grain frees only at exit.
    os.environ.setdefault(
      'PYTHONWARNINGS', 'ignore::UserWarning:multiprocessing.resource_tracker'
    )
    flags = require('absl.flags').FLAGS
    if not flags.is_parsed():  # Grain reads flags; a library has parsed none.
      flags.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers))
  iterator = iter(dataset)
  try:
    yield from iterator
  except (InputError, RunError):
    raise
  except Exception as error:
    reason = (str(error).splitlines() or [''])[0]
    raise RunError(
      f'images can not be read: {type(error).__name__}: {reason[:200]}'
    ) from error
  finally:
    iterator.close()

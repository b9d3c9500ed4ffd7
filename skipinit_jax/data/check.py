"""Reads every record of a data set and says what is broken."""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data import imagenet
from skipinit_jax.data.decode import DecodeError, decode
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Record, check_label, open_source
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import retry

CHUNK = 256  # Records that a process checks at a time.


@dataclasses.dataclass
class Findings:
  """What is in a split.

  Attributes:
    records: how many were read.
    broken: (name, reason) of those that can't be used.
    fallback: (name, reason) of those that the strict JPEG decoder refused and
      another took.
    labels: the classes that occur.
  """

  records: int = 0
  broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  fallback: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  labels: set[int] = dataclasses.field(default_factory=set)

  def add(self, other: 'Findings') -> None:
    """Adds what another part of the split showed."""
    self.records += other.records
    self.broken += other.broken
    self.fallback += other.fallback
    self.labels |= other.labels


def check(
  name: str, folder: Path, workers: int = 0, allow_counts: bool = False
) -> Iterator[str]:
  """Checks every record of every split; yields what is wrong, a line each.

  Prints progress and a summary of each split. A label of imagenet2012 is
  compared with what the image's name implies.

  Args:
    name, folder: see `records.open_source`.
    workers: processes; 0: as many as cores.
    allow_counts: imagenet2012 need not have its published sizes; for tests.

  Raises:
    InputError: the data set can't be opened.
  """
  sizes = {}
  for split in open_source(name, folder).splits:
    job = Split(name, folder, split)
    sizes[split] = len(job.records)
    found = Findings()
    with tqdm(total=sizes[split], desc=split, unit='image') as progress:
      for part in _run(job, workers or os.cpu_count()):
        found.add(part)
        progress.update(part.records)
    print(
      f'{split}: {found.records:,} records, {len(found.broken)} broken, '
      f'{len(found.fallback)} not decoded by the strict decoder but by Pillow',
      flush=True,
    )
    for record, reason in sorted(found.fallback):
      print(f'  by Pillow: {record}: {reason}')
    yield from (
      f'{record}: {reason}' for record, reason in sorted(found.broken)
    )
    empty = sorted(set(range(len(job.classes))) - found.labels)
    if job.labelled and empty and not allow_counts:
      yield (
        f'{split}: {len(empty)} classes have no image (the first: '
        f'{job.classes[empty[0]]})'
      )
  if name == imagenet.NAME and not allow_counts:
    for split, size in imagenet.SIZES.items():
      if sizes.get(split) != size:
        yield f'{split}: {sizes.get(split, 0):,} images, not {size:,}'


class Split:
  """A split to be checked."""

  def __init__(self, name: str, folder: Path, split: str):
    source = open_source(name, folder)
    self.args = name, folder, split
    self.split, self.classes = split, source.classes
    self.records = source.open(split)
    self.pauses: tuple | None = None
    # tfds' imagenet2012 may hold the test images, which have no labels.
    self.labelled = not (name == imagenet.NAME and split == 'test')
    self.label_of = imagenet.label_of if name == imagenet.NAME else None

  def check(self, first: int) -> Findings:
    """Checks a chunk of the records from `first` on."""
    found = Findings()
    for index in range(first, min(first + CHUNK, len(self.records))):
      found.records += 1
      try:
        record = retry(lambda index=index: self.records[index], self.pauses)
      except Unreadable as error:
        found.broken.append((error.name, error.reason))
        continue
      except RunError as error:
        found.broken.append((f'{self.split}[{index}]', str(error)))
        self.pauses = ()  # Listing what a dead disk held must come to an end.
        continue
      found.labels.add(record.label)
      reasons = self._wrong_label(record) if self.labelled else []
      try:
        _, fallback = decode(record.data)
        found.fallback += [(record.name, fallback)] if fallback else []
      except DecodeError as error:
        reasons.append(str(error))
      found.broken += [(record.name, reason) for reason in reasons]
    return found

  def _wrong_label(self, record: Record) -> list[str]:
    try:
      check_label(record, len(self.classes))
    except InputError as error:
      return [str(error)]
    expected = self.label_of(record.name) if self.label_of else record.label
    if expected is None:
      return ['not a file name of imagenet2012']
    if expected != record.label:
      return [f'label {record.label}, but by its name {expected}']
    return []


def _run(job: Split, workers: int) -> Iterator[Findings]:
  """Checks the chunks of a split, in order."""
  starts = range(0, len(job.records), CHUNK)
  workers = min(workers, len(starts))
  if workers <= 1:
    yield from map(job.check, starts)
    return
  spawn = multiprocessing.get_context('spawn')  # JAX's threads forbid a fork.
  with ProcessPoolExecutor(workers, spawn, _start, job.args) as pool:
    try:
      yield from pool.map(_check_chunk, starts)
    except BrokenProcessPool:
      raise InputError(
        'a process that decodes images died; was it killed for its memory? '
        'Fewer of them: --workers'
      ) from None


_job: Split | None = None  # Of a worker process.


def _start(*args) -> None:
  global _job
  _job = Split(*args)


def _check_chunk(first: int) -> Findings:
  return _job.check(first)

"""Reads every record of a data set and says what is broken."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data import imagenet
from skipinit_jax.data.decode import DecodeError, decode
from skipinit_jax.data.extras import require
from skipinit_jax.data.loader import iterate
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Record, Records, check_label
from skipinit_jax.data.sources import open_source
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import retry

CHUNK = 256  # Records that a process checks at a time.


# (name, reason) of the records that can't be used, likewise of those that the
# strict JPEG decoder refused and another took, and the classes that occur.
Findings = tuple[list[tuple[str, str]], list[tuple[str, str]], set[int]]


def check(name: str, folder: Path, workers: int = 0) -> Iterator[str]:
  """Checks every record of every split; yields what is wrong, a line each.

  Prints progress and a summary of each split. A label of imagenet2012 is
  compared with what the image's name implies.

  Args:
    name, folder: see `open_source`.
    workers: processes; 0: as many as cores.

  Raises:
    InputError: the data set can't be opened.
    RunError: a worker died.
  """
  source = open_source(name, folder)
  if source.form:
    print(f'{name}: {source.form}', flush=True)
  sizes = {}
  for split in source.splits:
    records = source.open(split)
    sizes[split] = len(records)
    # tfds' imagenet2012 may hold the test images, which have no labels.
    labelled = (name, split) != (imagenet.NAME, 'test')
    check_chunk = _Checker(
      records,
      split,
      num_classes=len(source.classes) if labelled else None,
      label_of=imagenet.label_of if name == imagenet.NAME else None,
    )
    broken, fallback, labels = check_all(
      check_chunk, workers or os.cpu_count() or 1
    )
    print(
      f'{split}: {sizes[split]:,} records, {len(broken)} broken, '
      f'{len(fallback)} not decoded by the strict decoder but by Pillow',
      flush=True,
    )
    for record, reason in sorted(fallback):
      print(f'  by Pillow: {record}: {reason}')
    yield from (f'{record}: {reason}' for record, reason in sorted(broken))
    empty = sorted(set(range(len(source.classes))) - labels)
    if labelled and empty:
      yield (
        f'{split}: {len(empty)} classes have no image (the first: '
        f'{source.classes[empty[0]]})'
      )
  if name == imagenet.NAME:
    yield from imagenet.wrong_sizes(sizes)


def check_all(check_chunk: '_Checker', workers: int) -> Findings:
  """Checks all records, in as many processes; one: in this one."""
  size = len(check_chunk.records)
  dataset = (
    require('grain')
    .MapDataset.range(size)
    .batch(CHUNK, batch_fn=list)
    .map(check_chunk)
  )
  found: Findings = [], [], set()
  workers = min(workers, len(dataset))
  parts = (dataset[i] for i in range(len(dataset)))
  if workers > 1:
    parts = iterate(dataset, workers)
  with tqdm(total=size, desc=check_chunk.split, unit='image') as progress:
    for broken, fallback, labels in parts:
      found[0].extend(broken)
      found[1].extend(fallback)
      found[2].update(labels)
      progress.update(min(CHUNK, size - progress.n))
  return found


@dataclasses.dataclass
class _Checker:
  """Indices of records -> `Findings`; picklable.

  Attributes:
    records: the split.
    split: its name.
    num_classes: labels are below; None: there are none.
    label_of: the label that a record's name implies, or None.
    pauses: in seconds, before a read that failed is tried again; None: the
      usual ones.
  """

  records: Records
  split: str
  num_classes: int | None
  label_of: Callable[[str], int | None] | None
  pauses: tuple[float, ...] | None = None

  def __call__(self, indices: list[int]) -> Findings:
    """Checks these records."""
    broken, fallback, labels = [], [], set()
    for index in indices:
      try:
        record = retry(lambda index=index: self.records[index], self.pauses)
      except Unreadable as error:
        broken.append((error.name, error.reason))
        continue
      except RunError as error:
        broken.append((f'{self.split}[{index}]', str(error)))
        self.pauses = ()  # A dead disk must not keep the listing from ending.
        continue
      labels.add(record.label)
      reasons = list(self._wrong_label(record))
      try:
        if refusal := decode(record.data).fallback:
          fallback.append((record.name, refusal))
      except DecodeError as error:
        reasons.append(str(error))
      broken += [(record.name, reason) for reason in reasons]
    return broken, fallback, labels

  def _wrong_label(self, record: Record) -> Iterator[str]:
    if self.num_classes is None:
      return
    try:
      check_label(record, self.num_classes)
    except InputError as error:
      yield str(error)
      return
    if self.label_of:
      expected = self.label_of(record.name)
      if expected is None:
        yield 'not a file name of imagenet2012'
      elif expected != record.label:
        yield f'label {record.label}, but by its name {expected}'

"""ImageNet-like data: batches of decoded crops, through Grain."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.crops import CentralCrop, Crop, RandomCrop, mirror, read
from skipinit_jax.data.decode import DecodeError
from skipinit_jax.data.extras import require
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import (
  Records,
  Source,
  check_label,
  hold_out,
  source_of,
  spread,
)
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import retry

NEIGHBOURS = 100  # So many records are tried in place of a broken one.
MOST_ASPECT = 100  # Width by height of a random crop.
SAMPLED = 64  # Records that are read when a data set is opened.
LISTED = 3  # Broken images that an error names; all are named as they occur.


@dataclasses.dataclass(frozen=True)
class Images:
  """A set of images to be decoded, cropped and batched as training goes.

  Attributes:
    name: for messages.
    num_classes: number of classes.
    image_size: height and width of what comes out.
    train, evaluation: the records.
    eval_resize: the shorter side that an evaluation image is resized to before
      its central crop.
    area, aspect: ranges of the random crop, see `crops.RandomCrop`.
    flip: mirror half of the training images.
    workers: processes that decode; 0: threads of this one.
    bad_share: more broken images than this share of a split end the run.
  """

  name: str
  num_classes: int
  image_size: int
  train: Records
  evaluation: Records
  eval_resize: int
  area: tuple[float, float] = (0.08, 1.0)
  aspect: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True
  workers: int = 0
  bad_share: float = 1e-3

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.image_size, self.image_size, 3

  @property
  def train_size(self) -> int:
    """Number of images to train on."""
    return len(self.train)

  @property
  def eval_size(self) -> int:
    """Number of images to evaluate on."""
    return len(self.evaluation)

  def train_batches(
    self,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
  ) -> Iterator[dict[str, Any]]:
    """This process's rows of each step's global batch, without end.

    The batch of a step is a function of (seed, step): it depends neither on the
    number of workers nor on where the run began. Each epoch shows every image
    once, and the epochs follow one another without a gap. The rows of the first
    process come first in the global batch, and so on.

    A broken record is replaced by the next one that is whole, whose label it
    gets; more than `bad_share` of them in this process raise InputError. A read
    that fails for a reason of the system is tried again, then raises RunError;
    see `reading`. Close the iterator to stop its workers.

    Args:
      batch_size: over all processes.
      seed: of the run, in [0, 2^32).
      start_step: number of the first step wanted, from 0.
      process_index, process_count: this process, and how many there are.
      workers: processes that decode; None: the data set's own.

    Yields:
      image: uint8 (rows, size, size, 3); label: int32 (rows,); broken: a list
      of (name, reason) of the records that were replaced.
    """
    rows = _rows(batch_size, process_count)
    dataset = (
      require('grain')
      .MapDataset.range(self.train_size)
      .seed(seed)
      .shuffle()
      .repeat(None)
      .random_map(_Draw())
      # Cut into shares before they are chosen: a process has rows that follow
      # one another, as devices have, so that examples keep their numbers.
      .batch(rows, drop_remainder=True, batch_fn=list)
      .slice(slice(process_index, None, process_count))
      .slice(slice(start_step, None))
      .map(_TrainLoader(self))
    )
    batches = _iterate(dataset, self.workers if workers is None else workers)
    yield from self._checked('train', self.train_size, batches)

  def eval_batches(
    self,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
  ) -> Iterator[dict[str, Any]]:
    """Every evaluation image once, over all processes.

    All processes yield the same number of batches, all batches have the same
    number of rows; rows that fill up the last have mask False. A broken image
    is black and has label -1, so that no prediction is right.

    Args:
      batch_size, process_index, process_count, workers: as in `train_batches`.

    Yields:
      image, label and broken as in `train_batches`; mask: bool (rows,).
    """
    rows = _rows(batch_size, process_count)
    padded = -(-self.eval_size // batch_size) * batch_size
    dataset = (
      require('grain')
      .MapDataset.range(padded)
      .batch(rows, drop_remainder=True, batch_fn=list)
      .slice(slice(process_index, None, process_count))
      .map(_EvalLoader(self))
    )
    batches = _iterate(dataset, self.workers if workers is None else workers)
    yield from self._checked('evaluation', self.eval_size, batches)

  def _checked(
    self, split: str, size: int, batches: Iterator[dict[str, Any]]
  ) -> Iterator[dict[str, Any]]:
    """Ends the run where too much is broken."""
    broken: dict[str, str] = {}
    try:
      for batch in batches:
        broken.update(batch['broken'])
        if len(broken) > self.bad_share * size:
          listed = '; '.join(map(_flaw, list(broken.items())[:LISTED]))
          raise InputError(
            f'{len(broken)} of the {size} images of {self.name} ({split}) are '
            f'broken, more than data.bad_share={self.bad_share}; {listed}'
          )
        yield batch
    finally:
      batches.close()


class _Draw:
  """Position in the split -> (position, all the numbers its crop needs)."""

  def __call__(
    self, position: int, rng: np.random.Generator
  ) -> tuple[int, list[float]]:
    return position, rng.random(RandomCrop.DRAWS + 1).tolist()


class _Batch:
  """A batch in the making: images are written to where they stay."""

  def __init__(self, rows: int, size: int):
    self.image = np.zeros((rows, size, size, 3), np.uint8)
    self.label = np.zeros(rows, np.int32)
    self.broken: list[tuple[str, str]] = []

  def load(
    self, row: int, records: Records, index: int, crop: Crop, num_classes: int
  ) -> tuple[str, str] | None:
    """Fills a row, or returns the name of a broken record and the reason."""
    try:
      record = retry(lambda: records[index])
      check_label(record, num_classes)
      read(record.data, crop, self.image[row])
    except Unreadable as error:
      return error.name, error.reason
    except DecodeError as error:
      return record.name, str(error)
    self.label[row] = record.label
    return None


class _TrainLoader:
  """Draws -> a batch of random crops."""

  def __init__(self, images: Images):
    self.records, self.num_classes = images.train, images.num_classes
    self.size, self.flip = images.image_size, images.flip
    self.area, self.aspect = images.area, images.aspect

  def __call__(self, draws: list[tuple[int, list[float]]]) -> dict[str, Any]:
    batch = _Batch(len(draws), self.size)
    for row, (position, numbers) in enumerate(draws):
      *numbers, side = numbers
      crop = RandomCrop(self.size, self.area, self.aspect, numbers)
      self._load(batch, row, position, crop)
      if self.flip and side < 0.5:
        mirror(batch.image[row])
    return vars(batch)

  def _load(
    self, batch: _Batch, row: int, position: int, crop: RandomCrop
  ) -> None:
    """Fills a row with an image, or with the next one that is whole."""
    size = len(self.records)
    for step in range(min(NEIGHBOURS, size)):
      index = (position + step) % size
      flaw = batch.load(row, self.records, index, crop, self.num_classes)
      if flaw is None:
        return
      if step == 0:  # The others are counted when it is their turn.
        batch.broken.append(flaw)
    raise InputError(
      f'{step + 1} images in a row are broken; the last: {_flaw(flaw)}'
    )


class _EvalLoader:
  """Positions in the split -> a batch of central crops."""

  def __init__(self, images: Images):
    self.records, self.num_classes = images.evaluation, images.num_classes
    self.crop = CentralCrop(images.image_size, images.eval_resize)

  def __call__(self, positions: list[int]) -> dict[str, Any]:
    batch = _Batch(len(positions), self.crop.size)
    mask = np.array(positions) < len(self.records)
    for row, index in enumerate(positions):
      if mask[row] and (
        flaw := batch.load(
          row, self.records, index, self.crop, self.num_classes
        )
      ):
        batch.broken.append(flaw)
        batch.label[row] = -1
    return vars(batch) | {'mask': mask}


def _flaw(flaw: tuple[str, str]) -> str:
  """A broken image in an error's line, of which it may have 65 characters."""
  name, reason = flaw
  return f'{name[-35:]}: {reason[:28]}'


def _rows(batch_size: int, process_count: int) -> int:
  rows, rest = divmod(batch_size, process_count)
  if rest or not rows:
    raise InputError(
      f'batch_size={batch_size} does not divide over {process_count} '
      f'processes; nearest: {max(rows, 1) * process_count} or '
      f'{(max(rows, 1) + 1) * process_count}'
    )
  return rows


def _iterate(dataset, workers: int) -> Iterator[dict[str, Any]]:
  """The batches of a Grain MapDataset, in order, made ahead of time."""
  grain = require('grain')
  # A thread makes a whole batch, so that each costs the memory of one.
  threads = 1 if workers else min(8, os.cpu_count())
  dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, threads))
  if workers:
    # Shared memory that Grain holds at exit is freed then: no warning of it.
    os.environ.setdefault(
      'PYTHONWARNINGS', 'ignore::UserWarning:multiprocessing.resource_tracker'
    )
    flags = require('absl.flags').FLAGS
    if not flags.is_parsed():  # Grain reads its own; a library parses none.
      flags.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers))
  iterator = iter(dataset)
  try:
    yield from iterator
  except (InputError, RunError):
    raise
  except Exception as error:  # Whatever a worker met, or its own death.
    reason = (str(error).splitlines() or [''])[0]
    raise RunError(
      f'images can not be read: {type(error).__name__}: {reason[:200]}'
    ) from error
  finally:
    iterator.close()


def open_images(config: ConfigDict) -> Images:
  """Opens the ImageNet-like data set that `config` describes.

  Checks the files' record counts, the expected sizes and a sample of the
  labels; `python -m skipinit_jax.data check` reads everything.

  Args:
    config: a recipe's `data`. name: 'folder' or a tfds set; dir: see
      `records.open_source`; train_split; eval_split: empty for the usual one;
      train_size, eval_size: what these splits must hold, 0 for anything;
      validation: training images held out to be evaluated on instead;
      image_size, eval_resize, area, aspect, flip, workers, bad_share: see
      `Images`.

  Raises:
    InputError: it can't be used; one line.
    RunError: it can't be read for a reason of the system; one line.
  """
  for name in ('grain', 'simplejpeg', 'cv2', 'PIL.Image'):
    require(name)
  _check_values(config)
  source = source_of(config)
  train = _open(source, config.train_split, config.train_size)
  if config.validation:
    train, evaluation = hold_out(train, config.validation, config.name)
  else:
    split = source.eval_split(config.eval_split)
    evaluation = _open(source, split, config.eval_size)
  return Images(
    name=config.name,
    num_classes=len(source.classes),
    image_size=config.image_size,
    train=train,
    evaluation=evaluation,
    eval_resize=config.eval_resize,
    area=tuple(config.area),
    aspect=tuple(config.aspect),
    flip=config.flip,
    workers=config.workers,
    bad_share=config.bad_share,
  )


def _open(source: Source, split: str, size: int) -> Records:
  records = source.open(split)
  if not len(records):
    raise InputError(f"{source.name}'s split {split} is empty")
  if size and len(records) != size:
    raise InputError(
      f"{source.name}'s split {split} has {len(records)} images, not {size}"
    )
  for index in spread(len(records), SAMPLED):
    try:
      record = retry(lambda index=index: records[index])
      check_label(record, len(source.classes))
    except Unreadable:
      continue  # Training counts and names it.
  return records


def _check_values(config: ConfigDict) -> None:
  """Raises InputError for values that no data set can have."""
  for field in ('area', 'aspect'):
    value, most = config[field], 1 if field == 'area' else MOST_ASPECT
    numbers = [v for v in value if isinstance(v, int | float)]
    low, high = numbers if len(value) == len(numbers) == 2 else (0, 0)
    if not 1e-6 <= low <= high <= most:
      raise InputError(
        f'data.{field}={value}: expected two numbers, the lower one first, '
        f'above 0 and at most {most}'
      )
  for field, least, most in (
    ('image_size', 1, 2**12),
    ('eval_resize', config.image_size, 2**13),
    ('workers', 0, 2**10),
    ('validation', 0, 2**31 - 1),
    ('train_size', 0, 2**31 - 1),
    ('eval_size', 0, 2**31 - 1),
    ('bad_share', 0, 1),
  ):
    if not least <= config[field] <= most:
      of = ', data.image_size,' if field == 'eval_resize' else ''
      raise InputError(
        f'data.{field}={config[field]}: expected a number from {least}{of} to '
        f'{most}'
      )

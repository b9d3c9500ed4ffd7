"""Data sets of image files, decoded during training."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.extras import require
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.loader import (
  CentralCrops,
  Draw,
  RandomCrops,
  brief,
  iterate,
)
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import (
  Records,
  Source,
  Subset,
  check_label,
  source_of,
  spread,
)
from skipinit_jax.data.sources import augmentation
from skipinit_jax.errors import InputError
from skipinit_jax.files import retry

# ImageNet's training images by channel, on the scale of 0 to 255; the values
# that the field uses.
MEAN = 255 * np.array([0.485, 0.456, 0.406])
STD = 255 * np.array([0.229, 0.224, 0.225])
SAMPLED = 64  # Records that are read when a data set is opened.
LISTED = 3  # Broken images in an error; all are named as they occur.


@dataclasses.dataclass(frozen=True)
class Stream:
  """Images that are decoded, cropped and batched as training goes.

  Attributes:
    name: for messages.
    train, evaluation: the records.
    augmentation: the device's part.
    image_size: height and width of the crops in pixels.
    eval_resize: shorter side that an evaluation image is resized to before its
      central crop.
    area, aspect: ranges of the random crop, see `crops.RandomCrop`.
    flip: mirror half of the training images.
    workers: processes that decode; 0: threads of this one.
    bad_share: more broken images than this share of a split end the run.
  """

  name: str
  train: Records
  evaluation: Records
  augmentation: Augmentation
  image_size: int
  eval_resize: int
  area: tuple[float, float] = (0.08, 1.0)
  aspect: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True
  workers: int = 0
  bad_share: float = 1e-3

  resident: ClassVar[bool] = False

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return self.augmentation.num_classes

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

  @property
  def chance(self) -> float:
    """Share of one class; labels are not read ahead to find the largest."""
    return 1 / self.num_classes

  def inputs(
    self, place: Callable[[Any], Any], config: ConfigDict, start_step: int
  ) -> Iterator[tuple[Any, list[str]]]:
    """Yields each step's batch; see `Dataset.inputs` and `read_train`."""
    batches = self.read_train(
      config.batch_size,
      seed=config.seed,
      start_step=start_step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
      for batch in batches:
        broken = [f'{name}: {reason}' for name, reason in batch['broken']]
        yield place((batch['image'], batch['label'])), broken

  def choose(
    self,
    inputs: tuple[jax.Array, jax.Array],
    key: jax.Array,
    step: jax.Array,
    batch_size: int,
    examples: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns `inputs`, this device's share of the batch."""
    del key, step, batch_size, examples
    return inputs

  def eval_batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields every evaluation image once; see `Dataset.eval_batches`.

    A broken image is named on standard error, once.
    """
    batches = self.read_eval(
      batch_size, process_index=process_index, process_count=process_count
    )
    for batch in batches:
      for name, reason in batch['broken']:
        _say_once(f'could not be read, counted as wrong: {name}: {reason}')
      yield batch['image'], batch['label'], batch['mask']

  def read_train(
    self,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[dict[str, Any]]:
    """Yields this process's rows of each step's global batch, forever.

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
      seed: the run's, in [0, 2^32).
      start_step: number of the first step, from 0.
      process_index, process_count: this process, and how many there are.

    Yields:
      image: uint8 (rows, size, size, 3); label: int32 (rows,); broken: a list
      of (name, reason) of the records that were replaced.
    """
    rows = _rows(batch_size, process_count)
    load = RandomCrops(
      self.train,
      self.num_classes,
      self.image_size,
      area=self.area,
      aspect=self.aspect,
      flip=self.flip,
    )
    dataset = (
      require('grain')
      .MapDataset.range(self.train_size)
      .seed(seed)
      .shuffle()
      .repeat(None)
      .random_map(Draw())
      # Cut into shares before they are chosen: a process has rows that follow
      # one another, as devices have, so that examples keep their numbers.
      .batch(rows, drop_remainder=True, batch_fn=list)
      .slice(slice(process_index, None, process_count))
      .slice(slice(start_step, None))
      .map(load)
    )
    batches = iterate(dataset, self.workers)
    yield from self._check_share('train', self.train_size, batches)

  def read_eval(
    self, batch_size: int, *, process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, Any]]:
    """Yields every evaluation image once, over all processes.

    All processes yield equally many batches of equally many rows. A broken
    image is black and has label -1, so that no prediction is right.

    Args:
      batch_size, process_index, process_count: as in `read_train`.

    Yields:
      image, label and broken as in `read_train`; mask: bool (rows,), False for
      rows that fill up the last batch.
    """
    rows = _rows(batch_size, process_count)
    padded = -(-self.eval_size // batch_size) * batch_size
    load = CentralCrops(
      self.evaluation,
      self.num_classes,
      self.image_size,
      resize=self.eval_resize,
    )
    dataset = (
      require('grain')
      .MapDataset.range(padded)
      .batch(rows, drop_remainder=True, batch_fn=list)
      .slice(slice(process_index, None, process_count))
      .map(load)
    )
    batches = iterate(dataset, self.workers)
    yield from self._check_share('evaluation', self.eval_size, batches)

  def _check_share(
    self, split: str, size: int, batches: Iterator[dict[str, Any]]
  ) -> Iterator[dict[str, Any]]:
    """Ends the run where too much is broken."""
    broken: dict[str, str] = {}
    with contextlib.closing(batches):
      for batch in batches:
        broken.update(batch['broken'])
        if len(broken) > self.bad_share * size:
          listed = '; '.join(map(brief, list(broken.items())[:LISTED]))
          raise InputError(
            f'{len(broken)} of the {size} images of {self.name} ({split}) are '
            f'broken, more than data.bad_share={self.bad_share}; {listed}'
          )
        yield batch


@functools.cache
def _say_once(line: str) -> None:
  print(line, file=sys.stderr)


def _rows(batch_size: int, process_count: int) -> int:
  rows, rest = divmod(batch_size, process_count)
  if rest or not rows:
    raise InputError(
      f'batch_size={batch_size} does not divide over {process_count} '
      f'processes; nearest: {max(rows, 1) * process_count} or '
      f'{(max(rows, 1) + 1) * process_count}'
    )
  return rows


def open_stream(config: ConfigDict) -> Stream:
  """Opens image files: imagenet2012, another tfds set, or class folders.

  Checks the files' record counts, the expected sizes and a sample of the
  labels; `python -m skipinit_jax.data check` reads everything.

  Args:
    config: a recipe's `data`. name: 'folder' or a tfds set; dir: see
      `records.open_source`; train_split; eval_split: empty for the usual one;
      train_size, eval_size: what these splits must hold, 0 for anything;
      validation: training images held out to be evaluated on instead; the
      other fields: see `Stream` and `Augmentation`.

  Raises:
    InputError: it can't be used; one line.
    RunError: the system can't read it; one line.
  """
  for name in ('grain', 'simplejpeg', 'cv2', 'PIL.Image'):
    require(name)
  source = source_of(config)
  train = _open_split(source, config.train_split, config.train_size)
  if config.validation:
    # Read in the order of the files, which is the disk's.
    rest, held = map(np.sort, hold_out(config, len(train)))
    train, evaluation = Subset(train, rest), Subset(train, held)
  else:
    split = source.eval_split(config.eval_split)
    evaluation = _open_split(source, split, config.eval_size)
  shape = config.image_size, config.image_size, 3
  return Stream(
    name=config.name,
    train=train,
    evaluation=evaluation,
    augmentation=augmentation(config, len(source.classes), shape, MEAN, STD),
    image_size=config.image_size,
    eval_resize=config.eval_resize,
    area=tuple(config.area),
    aspect=tuple(config.aspect),
    flip=config.flip,
    workers=config.workers,
    bad_share=config.bad_share,
  )


def _open_split(source: Source, split: str, size: int) -> Records:
  records = source.open(split)
  if not len(records):
    raise InputError(f"{source.name}'s split {split} is empty")
  if size and len(records) != size:
    raise InputError(
      f"{source.name}'s split {split} has {len(records)} images, not {size}"
    )
  for index in spread(len(records), SAMPLED):
    # A broken one is named and counted in training.
    with contextlib.suppress(Unreadable):
      check_label(
        retry(lambda index=index: records[index]), len(source.classes)
      )
  return records

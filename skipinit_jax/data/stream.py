"""Data sets of image files, decoded during training."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation, make_augmentation
from skipinit_jax.data.extras import require
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.loader import (
  CentralCrops,
  Crops,
  RandomCrops,
  brief,
  iterate,
)
from skipinit_jax.data.order import streamed
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import (
  Records,
  Source,
  Subset,
  read_record,
  sample,
)
from skipinit_jax.data.sources import source_of
from skipinit_jax.errors import InputError

# The usual values for ImageNet's training images, by channel, from 0 to 255.
MEAN = 255 * np.array([0.485, 0.456, 0.406])
STD = 255 * np.array([0.229, 0.224, 0.225])
SAMPLED = 64  # Records that are read when a data set is opened.
LISTED = 3  # Broken images in an error; all are named as they occur.


@dataclasses.dataclass(frozen=True)
class Stream:
  """A data set of image files, decoded, cropped and batched during training.

  Attributes:
    config: a recipe's `data`. image_size: height and width of the crops in
      pixels; eval_resize: shorter side that an evaluation image is resized to
      before its central crop; area, aspect: ranges of the random crop, see
      `crops.RandomCrop`; flip: mirror half of the training images; workers:
      processes that decode, 0: threads of this one; bad_share: more broken
      images than this share of a split end the run.
    train, evaluation: the records.
    augmentation: the device's part.
    form: see `Source`.
  """

  config: ConfigDict
  train: Records
  evaluation: Records
  augmentation: Augmentation
  form: str = ''

  resident: ClassVar[bool] = False

  @property
  def name(self) -> str:
    """For messages."""
    return self.config.name

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return self.augmentation.num_classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.config.image_size, self.config.image_size, 3

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
  ) -> Generator[tuple[Any, list[str]]]:
    """Yields each step's batch; see `Dataset.inputs` and `read`."""
    batches = self.read(
      config, start_step, jax.process_index(), jax.process_count()
    )
    with contextlib.closing(batches):
      for images, labels, broken in batches:
        yield place((images, labels)), broken

  def read(
    self,
    config: ConfigDict,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Generator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Yields a process's part of each step's batch, forever.

    A batch depends neither on the number of workers nor on the first step. Each
    epoch shows every image once, and the next follows without a gap. The global
    batch has the rows of the first process first. A broken image is replaced,
    with its label, by the next whole one. Close the iterator to stop its
    workers.

    Args:
      config: see `Dataset.inputs`.
      start_step: number of the first step, from 0.
      process_index, process_count: the process, and how many there are.

    Yields:
      Images, uint8 (rows, size, size, 3); labels, int32 (rows,); and a line for
      each image that was replaced.
    """
    crops = RandomCrops(
      self.train,
      self.num_classes,
      self.config.image_size,
      shared=self.config.workers > 0,
      area=self.config.area,
      aspect=self.config.aspect,
      flip=self.config.flip,
    )
    rows = config.batch_size // process_count
    order = streamed(self.train_size, config.seed)
    shares = _share(order, rows, process_index, process_count)
    shares = shares.slice(slice(start_step, None))
    for batch in self._load('train', shares, crops):
      yield (
        batch['image'],
        batch['label'],
        [': '.join(flaw) for flaw in batch['broken']],
      )

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
  ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields every evaluation image once; see `Dataset.eval_batches`.

    A broken image is black, and named on standard error, once.
    """
    padded = -(-self.eval_size // batch_size) * batch_size
    dataset = require('grain').MapDataset.range(padded)
    crops = CentralCrops(
      self.evaluation,
      self.num_classes,
      self.config.image_size,
      shared=self.config.workers > 0,
      resize=self.config.eval_resize,
    )
    rows = batch_size // process_count
    shares = _share(dataset, rows, process_index, process_count)
    for batch in self._load('evaluation', shares, crops):
      for name, reason in batch['broken']:
        _say_once(f'could not be read, counted as wrong: {name}: {reason}')
      yield batch['image'], batch['label'], batch['mask']

  def _load(
    self, split: str, dataset: Any, crops: Crops
  ) -> Generator[dict[str, Any]]:
    """Loads batches; ends the run where too much is broken."""
    broken: dict[str, str] = {}
    with contextlib.closing(
      iterate(dataset.map(crops), self.config.workers)
    ) as batches:
      for batch in batches:
        broken.update(batch['broken'])
        self._check_share(split, len(crops.records), broken)
        yield batch

  def _check_share(self, split: str, size: int, broken: dict[str, str]) -> None:
    if len(broken) > self.config.bad_share * size:
      listed = '; '.join(map(brief, list(broken.items())[:LISTED]))
      raise InputError(
        f'{len(broken)} of the {size} images of {self.name} ({split}) are '
        f'broken, more than data.bad_share={self.config.bad_share}; {listed}'
      )


def _share(
  dataset: Any, rows: int, process_index: int, process_count: int
) -> Any:
  """Cuts a Grain MapDataset into one process's rows of each batch.

  A process has consecutive rows, as devices have, so that the index of an image
  in the global batch is the same for any number of processes.
  """
  batches = dataset.batch(rows, drop_remainder=True, batch_fn=list)
  return batches.slice(slice(process_index, None, process_count))


@functools.cache
def _say_once(line: str) -> None:
  print(line, file=sys.stderr)


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
  augmentation = make_augmentation(
    config, len(source.classes), shape, MEAN, STD
  )
  return Stream(config, train, evaluation, augmentation, source.form)


def _open_split(source: Source, split: str, size: int) -> Records:
  records = source.open(split)
  if not len(records):
    raise InputError(f"{source.name}'s split {split} is empty")
  if size and len(records) != size:
    raise InputError(
      f"{source.name}'s split {split} has {len(records)} images, not {size}"
    )
  for index in sample(len(records), SAMPLED):
    # A broken one is named and counted in training.
    with contextlib.suppress(Unreadable):
      read_record(records, index, len(source.classes))
  return records

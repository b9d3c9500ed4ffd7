"""Image files on their way to the device: batches for the training step."""

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
from skipinit_jax.data.images import Images, open_images
from skipinit_jax.data.sources import augmentation

# Of ImageNet's training images by channel, on the scale of 0 to 255; the values
# that the field uses.
MEAN = 255 * np.array([0.485, 0.456, 0.406])
STD = 255 * np.array([0.229, 0.224, 0.225])


@dataclasses.dataclass(frozen=True)
class Stream:
  """A data set that is read and decoded as training goes.

  Attributes:
    images: the host's part.
    augmentation: the device's part.
  """

  images: Images
  augmentation: Augmentation

  # Each device gets its share of the batch, see `training.devices`.
  resident: ClassVar[bool] = False

  @property
  def name(self) -> str:
    """For messages."""
    return self.images.name

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return self.images.num_classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.images.image_shape

  @property
  def train_size(self) -> int:
    """Number of images to train on."""
    return self.images.train_size

  @property
  def eval_size(self) -> int:
    """Number of images to evaluate on."""
    return self.images.eval_size

  @property
  def chance(self) -> float:
    """Share of one class; labels are not read ahead to find the largest."""
    return 1 / self.num_classes

  def inputs(
    self, place: Callable[[Any], Any], config: ConfigDict, start_step: int
  ) -> Iterator[tuple[tuple[jax.Array, jax.Array], list[str]]]:
    """What each step takes, put on the devices.

    Args:
      place: cuts a batch over the devices of this process; returns at once.
      config: of the run: its batch size and seed.
      start_step: number of the first step, from 0.

    Yields:
      (images uint8, labels int32), and a line on each image that could not be
      read and was replaced; without end. Close it to stop the workers.

    Raises:
      InputError, RunError: see `Images.train_batches`.
    """
    batches = self.images.train_batches(
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
    """This device's share of the batch is what it was given."""
    del key, step, batch_size, examples
    return inputs

  def eval_batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every evaluation image once; see `Resident.eval_batches`.

    An image that can't be read has label -1, so that it counts as wrong; it is
    named on standard error, once.
    """
    for batch in self.images.eval_batches(
      batch_size, process_index=process_index, process_count=process_count
    ):
      for name, reason in batch['broken']:
        _say_once(f'could not be read, counted as wrong: {name}: {reason}')
      yield batch['image'], batch['label'], batch['mask']


@functools.cache
def _say_once(line: str) -> None:
  print(line, file=sys.stderr)


def stream(config: ConfigDict) -> Stream:
  """Opens image files: imagenet2012, another tfds set, or class folders."""
  images = open_images(config)
  return Stream(
    images,
    augmentation(config, images.num_classes, images.image_shape, MEAN, STD),
  )

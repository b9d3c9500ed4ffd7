"""Data sets that fit on a device.

Training costs the host nothing per step: the training step itself chooses and
augments its batch, a pure function of (seed, step).
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation, make_augmentation
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.shuffle import batch_indices
from skipinit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Resident:
  """A data set as arrays.

  Attributes:
    name: for messages.
    images, eval_images: uint8 (n, height, width, channels).
    labels, eval_labels: integers (n,) in [0, num_classes).
    augmentation: from these to what the network takes.

  Raises:
    InputError: arrays of another rank, dtype or length, or a wrong label.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  eval_images: np.ndarray
  eval_labels: np.ndarray
  augmentation: Augmentation

  resident: ClassVar[bool] = True

  def __post_init__(self):
    classes = self.num_classes
    _check(self.name, 'train', self.images, self.labels, classes)
    _check(self.name, 'eval', self.eval_images, self.eval_labels, classes)

  @property
  def form(self) -> str:
    """The images are as published."""
    return ''

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return self.augmentation.num_classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.images.shape[1:]

  @property
  def train_size(self) -> int:
    """Number of images to train on."""
    return len(self.images)

  @property
  def eval_size(self) -> int:
    """Number of images to evaluate on."""
    return len(self.eval_images)

  @property
  def chance(self) -> float:
    """Share of the largest class among the images to evaluate on."""
    return float(np.bincount(self.eval_labels).max() / self.eval_size)

  def inputs(
    self, place: Callable[[Any], Any], config: ConfigDict, start_step: int
  ) -> Generator[tuple[Any, list[str]]]:
    """Yields all images, put on the devices once; see `Dataset.inputs`.

    As rows: a TPU lays pixels out so that choosing some images would copy all
    of them in every step.
    """
    del config, start_step
    rows = self.images.reshape(self.train_size, -1)
    arrays = place((rows, self.labels.astype(np.int32)))
    while True:
      yield arrays, []

  def choose(
    self,
    inputs: tuple[jax.Array, jax.Array],
    key: jax.Array,
    step: jax.Array,
    batch_size: int,
    examples: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Takes the images of a step by `batch_indices`; see `Dataset.choose`."""
    images, labels = inputs
    index = batch_indices(key, step, batch_size, self.train_size)[examples]
    return images[index].reshape(-1, *self.image_shape), labels[index]

  def eval_batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields every evaluation image once; see `Dataset.eval_batches`."""
    share = batch_size // process_count
    for start in range(0, self.eval_size, batch_size):
      rows = start + share * process_index + np.arange(share)
      mask = rows < self.eval_size
      rows = np.where(mask, rows, 0)
      labels = self.eval_labels[rows].astype(np.int32)
      yield self.eval_images[rows], labels, mask


def make_resident(
  config: ConfigDict,
  images: np.ndarray,
  labels: np.ndarray,
  eval_images: np.ndarray,
  eval_labels: np.ndarray,
  num_classes: int,
) -> Resident:
  """Makes a data set of all its images and a recipe's `data`.

  Holds out the validation images, and normalizes by the others.

  Raises:
    InputError: too many images held out, or see `Resident`.
  """
  if config.validation:
    rest, held = hold_out(config, len(images))
    eval_images, eval_labels = images[held], labels[held]
    images, labels = images[rest], labels[rest]
  axes = (0, 1, 2)
  mean, std = images.mean(axes, np.float64), images.std(axes, np.float64)
  augmentation = make_augmentation(
    config, num_classes, images.shape[1:], mean, np.maximum(std, 1e-3)
  )
  return Resident(
    name=config.name,
    images=images,
    labels=labels,
    eval_images=eval_images,
    eval_labels=eval_labels,
    augmentation=augmentation,
  )


def _check(
  name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: int
) -> None:
  where = f"{name}'s {split} split"
  if images.ndim != 4 or images.dtype != np.uint8:
    raise InputError(
      f'{where}: images must be uint8 of shape (n, height, width, channels), '
      f'got {images.dtype} of shape {images.shape}'
    )
  if not len(images):
    raise InputError(f'{where} is empty')
  if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
    raise InputError(
      f'{where}: labels must be integers of shape ({len(images)},), '
      f'got {labels.dtype} of shape {labels.shape}'
    )
  outside = np.flatnonzero((labels < 0) | (labels >= classes))
  if len(outside):
    first = outside[0]
    raise InputError(
      f'{where}: label {labels[first]} of example {first} is outside the '
      f'{classes} classes (0 to {classes - 1}); {len(outside)} such labels'
    )

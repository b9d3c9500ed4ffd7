"""Data sets small enough to live on the device: digits, synthetic images.

Training costs the host nothing per step: the arrays are on the device, and the
choice and augmentation of a batch is a pure function of (seed, step) that runs
inside the training step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation
from skipinit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Resident:
  """A data set as arrays.

  Attributes:
    name: for messages.
    images, labels: to train on; uint8 (n, height, width, channels), integers
      (n,) in [0, num_classes).
    eval_images, eval_labels: to evaluate on, likewise.
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
  ) -> Iterator[tuple[tuple[jax.Array, jax.Array], list[str]]]:
    """What each step takes: all of the images, put on the devices once.

    Args:
      place: puts a tree of arrays on the devices.
      config, start_step: make no difference here.

    Yields:
      (images, labels), and the names of unreadable images, none; without end.
      Images are rows, uint8 (n, height * width * channels): a TPU lays pixels
      out so that choosing some images would copy all of them in every step.
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
    """Images of the global batch of a step; pure, on the device.

    Args:
      inputs: one element of `inputs`.
      key: the run's data key, the same on every device and step.
      step: number of the step from 0, an integer scalar.
      batch_size: of the global batch.
      examples: int32 (n,), indices of the images wanted in the global batch.

    Returns:
      Images, uint8 (n, height, width, channels); and labels, int32 (n,).
    """
    images, labels = inputs
    index = batch_indices(key, step, batch_size, self.train_size)[examples]
    return images[index].reshape(-1, *self.image_shape), labels[index]

  def eval_batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every evaluation image once: (images uint8, labels int32, mask bool).

    Args:
      batch_size: over all processes; the last batch is filled up with rows
        whose mask is False.
      process_index, process_count: whose rows of each batch to give.
    """
    share = batch_size // process_count
    for start in range(0, self.eval_size, batch_size):
      rows = start + share * process_index + np.arange(share)
      mask = rows < self.eval_size
      rows = np.where(mask, rows, 0)
      labels = self.eval_labels[rows].astype(np.int32)
      yield self.eval_images[rows], labels, mask


def batch_indices(
  key: jax.Array, step: jax.Array, batch_size: int, num_examples: int
) -> jax.Array:
  """Indices into the training split of one step's global batch.

  The epochs' permutations, each drawn from (key, epoch), follow one another
  without a gap, so that every epoch shows every example exactly once, whatever
  the batch size.

  Args:
    key: scalar PRNG key.
    step: number of the step from 0, an integer scalar.
    batch_size: global.
    num_examples: in the training split.

  Returns:
    int32 (batch_size,), in [0, num_examples).
  """
  epoch, offset = jnp.divmod(step * batch_size, num_examples)
  epochs = 1 + (num_examples - 1 + batch_size - 1) // num_examples
  if num_examples % batch_size == 0:
    epochs = 1  # No batch reaches into the next epoch.
  orders = [
    jax.random.permutation(jax.random.fold_in(key, epoch + e), num_examples)
    for e in range(epochs)
  ]
  stream = jnp.concatenate(orders)
  return jax.lax.dynamic_slice_in_dim(stream, offset, batch_size)


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

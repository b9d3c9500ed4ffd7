"""Data sets small enough to live on the device: digits, synthetic images.

Training costs the host nothing per step: the arrays are on the device, and the
choice and augmentation of a batch is a pure function of (seed, step) that runs
inside the training step.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from skipinit_jax.data import augment
from skipinit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Resident:
  """A data set as arrays.

  Attributes:
    name: for messages.
    images, labels: to train on; uint8 (n, height, width, channels), integers
      (n,) in [0, num_classes).
    eval_images, eval_labels: to evaluate on, likewise.
    num_classes: number of classes.
    shift: largest shift in pixels of the pad-and-crop augmentation, or 0.
    flip: mirror half of the training images.

  Raises:
    InputError: arrays of another rank, dtype or length, or a wrong label.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  eval_images: np.ndarray
  eval_labels: np.ndarray
  num_classes: int
  shift: int = 0
  flip: bool = False

  def __post_init__(self):
    _check(self.name, 'train', self.images, self.labels, self.num_classes)
    _check(
      self.name, 'eval', self.eval_images, self.eval_labels, self.num_classes
    )

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

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """What `train_batch` chooses from, to be put on every device."""
    return self.images, self.labels.astype(np.int32)

  def train_batch(
    self,
    arrays: tuple[jax.Array, jax.Array],
    key: jax.Array,
    step: jax.Array,
    batch_size: int,
    first: jax.Array | int,
    size: int,
  ) -> tuple[jax.Array, jax.Array]:
    """Images `first` ... `first + size` of the global batch of a step.

    Pure; the batch of a step does not depend on how it is cut.

    Args:
      arrays: see `arrays`, on the device.
      key: the run's data key, the same on every device and step.
      step: number of the step from 0, an integer scalar.
      batch_size: of the global batch.
      first: index of the first image wanted in the global batch.
      size: number of images wanted.

    Returns:
      Images, float32 (size, height, width, channels), normalized; and labels,
      int32 (size,).
    """
    images, labels = arrays
    order_key, augment_key = jax.random.split(key)
    index = batch_indices(order_key, step, batch_size, self.train_size)
    index = jax.lax.dynamic_slice_in_dim(index, first, size)
    images, labels = images[index], labels[index]
    if self.shift or self.flip:
      keys = jax.random.split(jax.random.fold_in(augment_key, step), batch_size)
      keys = jax.lax.dynamic_slice_in_dim(keys, first, size)
      images = jax.vmap(self._augment)(keys, images)
    return self.normalize(images), labels

  @functools.cached_property
  def _moments(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over the training images, (1, 1, 1, channels)."""
    axes = (0, 1, 2)
    mean = self.images.mean(axes, np.float64, keepdims=True)
    std = self.images.std(axes, np.float64, keepdims=True)
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)

  def _augment(self, key: jax.Array, image: jax.Array) -> jax.Array:
    shift_key, flip_key = jax.random.split(key)
    if self.shift:
      image = augment.shift(shift_key, image, self.shift)
    if self.flip:
      image = augment.flip(flip_key, image)
    return image

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 images to float32 of zero mean and unit variance per channel."""
    mean, std = self._moments
    return (images - mean) / std

  def eval_batches(
    self, batch_size: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every evaluation image once: (images uint8, labels int32, mask bool).

    All batches have `batch_size` rows; the last is filled up with rows whose
    mask is False.
    """
    for start in range(0, self.eval_size, batch_size):
      images = self.eval_images[start : start + batch_size]
      labels = self.eval_labels[start : start + batch_size].astype(np.int32)
      fill = batch_size - len(images)
      yield (
        np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0))),
        np.pad(labels, (0, fill)),
        np.arange(batch_size) < len(images),
      )


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

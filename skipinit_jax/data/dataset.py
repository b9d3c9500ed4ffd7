"""The contract of a data set: what training, evaluation and analyses use."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation


class Dataset(Protocol):
  """A set of labelled images to train on and one to evaluate on.

  `Resident` and `Stream` fulfil it; `stand_in` makes one of either without
  images, for what only asks for sizes.
  """

  # Whether `inputs` yields one array of all images, for every device; if not,
  # it yields batches to be split over the devices.
  resident: ClassVar[bool]

  @property
  def name(self) -> str:
    """A key of `DATASETS`, for messages."""
    ...

  @property
  def form(self) -> str:
    """What was done to the image files beforehand, for messages; or ''."""
    ...

  @property
  def num_classes(self) -> int:
    """Number of classes; labels are in [0, num_classes)."""
    ...

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height and width in pixels, channels."""
    ...

  @property
  def train_size(self) -> int:
    """Number of images to train on."""
    ...

  @property
  def eval_size(self) -> int:
    """Number of images to evaluate on."""
    ...

  @property
  def chance(self) -> float:
    """Top-1 of the best constant guess, in [0, 1], as far as is known."""
    ...

  @property
  def augmentation(self) -> Augmentation:
    """From uint8 images and int32 labels to normalized images and targets."""
    ...

  def inputs(
    self, place: Callable[[Any], Any], config: ConfigDict, start_step: int
  ) -> Generator[tuple[Any, list[str]]]:
    """Yields what each training step takes, from `start_step` on, forever.

    What a step takes is a function of the seed and its number alone. Close the
    iterator to free what it holds.

    Args:
      place: puts a tree of arrays on the devices; returns at once.
      config: the run's recipe; its `batch_size` is over all processes, its
        `seed` in [0, 2^32).
      start_step: number of the first step, from 0.

    Yields:
      `place` of (images, labels), and a line for each image that could not be
      read and was replaced. Resident: all images as rows, uint8
      (train_size, height * width * channels), and labels, int32 (train_size,).
      Else this process's part of a batch: uint8 (rows, height, width,
      channels), and int32 (rows,).

    Raises:
      InputError: more than `data.bad_share` of the images are broken.
      RunError: the system can't read an image.
    """
    ...

  def choose(
    self,
    inputs: tuple[jax.Array, jax.Array],
    key: jax.Array,
    step: jax.Array,
    batch_size: int,
    examples: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Takes a step's images from `inputs`; pure, runs on the device.

    Args:
      inputs: what `inputs` yielded for this step, on this device.
      key: the run's data key, the same on every device and in every step.
      step: number of the step from 0, an integer scalar.
      batch_size: images in the global batch.
      examples: int32 (n,), indices into the global batch of the images wanted;
        unless resident, those that `inputs` holds.

    Returns:
      Images, uint8 (n, height, width, channels), and labels, int32 (n,).
    """
    ...

  def eval_batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields every evaluation image once, over all processes.

    All processes yield equally many batches of equally many rows.

    Args:
      batch_size: over all processes, a multiple of `process_count`.
      process_index: whose rows of each batch to yield.
      process_count: number of processes.

    Yields:
      Images, uint8 (rows, height, width, channels); labels, int32 (rows,), -1
      for an image that can't be read; mask, bool (rows,), False for rows that
      fill up the last batch.

    Raises:
      InputError, RunError: as `inputs`.
    """
    ...

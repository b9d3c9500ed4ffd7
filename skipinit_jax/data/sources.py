"""Where the images of a resident data set come from."""

import math

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.resident import Resident
from skipinit_jax.errors import InputError


def digits(config: ConfigDict) -> Resident:
  """scikit-learn's 1,797 images of handwritten digits, 8x8, values 0 to 16.

  The test split is 360 images, stratified by class and always the same.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  bunch = load_digits()
  images = bunch.images.astype(np.uint8)[..., None]
  split = train_test_split(
    images, bunch.target, test_size=360, stratify=bunch.target, random_state=0
  )
  images, eval_images, labels, eval_labels = split
  return _resident(config, images, labels, eval_images, eval_labels, 10)


def synthetic(config: ConfigDict) -> Resident:
  """Random images and labels of any shape, for smoke tests and benchmarks."""
  sizes = {
    field: config[field]
    for field in (
      *('height', 'width', 'channels'),
      *('num_classes', 'train_size', 'eval_size'),
    )
  }
  for field, value in sizes.items():
    if value < 1:
      raise InputError(f'data.{field}={value} must be 1 or more')
  rng = np.random.default_rng(0)
  shape = config.height, config.width, config.channels

  def draw(n):
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, rng.integers(0, config.num_classes, n)

  train, evaluation = draw(config.train_size), draw(config.eval_size)
  return _resident(config, *train, *evaluation, config.num_classes)


def _resident(
  config: ConfigDict,
  images: np.ndarray,
  labels: np.ndarray,
  eval_images: np.ndarray,
  eval_labels: np.ndarray,
  num_classes: int,
) -> Resident:
  """Applies what is common: the validation split and the augmentation."""
  held = config.validation
  if not 0 <= held < len(images):
    raise InputError(
      f'data.validation={held} must be at least 0 and less than the '
      f"{len(images)} images of {config.name}'s training split"
    )
  if held:  # Evaluate on training images that are held out, not on the test.
    order = np.random.default_rng(0).permutation(len(images))
    eval_images, eval_labels = images[order[:held]], labels[order[:held]]
    images, labels = images[order[held:]], labels[order[held:]]
  return Resident(
    name=config.name,
    images=images,
    labels=labels,
    eval_images=eval_images,
    eval_labels=eval_labels,
    augmentation=augmentation(config, num_classes, *_moments(images)),
  )


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation over all images and pixels, by channel."""
  axes = (0, 1, 2)
  mean, std = images.mean(axes, np.float64), images.std(axes, np.float64)
  return mean, np.maximum(std, 1e-3)


def augmentation(
  config: ConfigDict, num_classes: int, mean: np.ndarray, std: np.ndarray
) -> Augmentation:
  """What `config` (a recipe's `data`) says happens on the device."""
  for field in ('shift', 'cutout', 'mixup', 'cutmix'):
    if not 0 <= config[field] < math.inf:
      raise InputError(f'data.{field}={config[field]} must be 0 or more')
  return Augmentation(
    num_classes,
    mean,
    std,
    **{
      field: config[field]
      for field in ('shift', 'flip', 'cutout', 'mixup', 'cutmix')
    },
  )

"""Data sets without images, for what only asks for their sizes."""

import dataclasses
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.augment import make_augmentation
from skipinit_jax.data.dataset import Dataset
from skipinit_jax.data.fields import check_fields, check_validation
from skipinit_jax.data.resident import Resident
from skipinit_jax.data.stream import Stream
from skipinit_jax.errors import InputError

# Image side, channels, classes, images to train and to evaluate on.
SIZES = {
  'digits': (8, 1, 10, 1437, 360),
  'mnist5k': (28, 1, 10, 4000, 1000),
  'cifar10': (32, 3, 10, 50_000, 10_000),
  'cifar100': (32, 3, 100, 50_000, 10_000),
  'imagenet2012': (224, 3, 1000, 1_281_167, 50_000),
}


@dataclasses.dataclass(frozen=True)
class _NoRecords:
  size: int

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> NoReturn:
    raise TypeError('a stand-in has no images')


def stand_in(config: ConfigDict) -> Dataset:
  """Makes the data set of a recipe's `data` with its sizes; reads no image.

  All that computes with shapes works; images, labels and `chance` are made up.

  Raises:
    InputError: the recipe does not say how large its data set is.
  """
  check_fields(config)
  side, channels, *sizes = SIZES.get(config.name, (0, 3, 0, 0, 0))
  side = config.get('image_size', side)
  shape = (
    config.get('height', side),
    config.get('width', side),
    config.get('channels', channels),
  )
  fields = ('num_classes', 'train_size', 'eval_size')
  classes, train_size, eval_size = (
    config.get(field, 0) or size
    for field, size in zip(fields, sizes, strict=True)
  )
  if not all((classes, train_size, eval_size, *shape)):
    raise InputError(
      f'data.name={config.name!r}: its sizes are not in the recipe; compile '
      f'for one of {", ".join(SIZES)}, or for synthetic with its sizes'
    )
  if config.validation:
    check_validation(config, train_size)
    train_size, eval_size = train_size - config.validation, config.validation
  augment = make_augmentation(
    config, classes, shape, *np.full((2, shape[-1]), 127.5)
  )
  if config.name == 'imagenet2012':
    train, evaluation = _NoRecords(train_size), _NoRecords(eval_size)
    return Stream(config, train, evaluation, augment)
  # Arrays of one element, repeated without memory.
  zero = np.zeros((), np.uint8)
  return Resident(
    name=config.name,
    images=np.broadcast_to(zero, (train_size, *shape)),
    labels=np.broadcast_to(zero, train_size),
    eval_images=np.broadcast_to(zero, (eval_size, *shape)),
    eval_labels=np.broadcast_to(zero, eval_size),
    augmentation=augment,
  )

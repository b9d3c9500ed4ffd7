"""The fields of a recipe's `data`: which a data set has, and their values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, unknown

MOST = 2**31 - 1  # Steps and images are counted in int32.

# Field -> its type, lowest and highest value; a tuple holds two numbers, the
# lower one first.
TEXT = (str, 0, 0)
FILES = {
  'dir': TEXT,
  'train_split': TEXT,
  'eval_split': TEXT,
  'train_size': (int, 0, MOST),
  'eval_size': (int, 0, MOST),
  'image_size': (int, 1, 2**12),
  'eval_resize': (int, 1, 2**13),
  'area': (tuple, 1e-6, 1),
  'aspect': (tuple, 1e-6, 100),
  'workers': (int, 0, 2**10),
}
SYNTHETIC = {
  'height': (int, 1, 4096),
  'width': (int, 1, 4096),
  'channels': (int, 1, 4096),
  'num_classes': (int, 1, 10**6),
  'train_size': (int, 1, MOST),
  'eval_size': (int, 1, MOST),
}
# Data set -> the fields that it has beside those of all.
FIELDS: dict[str, Mapping[str, tuple[type, float, float]]] = {
  'digits': {},
  'mnist5k': {},
  'cifar10': {'dir': TEXT},
  'cifar100': {'dir': TEXT},
  'imagenet2012': FILES,
  'tfds': FILES,
  'folder': FILES,
  'synthetic': SYNTHETIC,
}


def check_fields(config: ConfigDict) -> None:
  """Checks the fields of a recipe's `data`; reads no data.

  Raises:
    InputError: a field is missing, out of range, or another data set's.
  """
  if config.name not in FIELDS:
    raise InputError(unknown('data set', config.name, FIELDS))
  own = FIELDS[config.name]
  for name, (kind, low, high) in own.items():
    if name not in config:
      raise InputError(
        f'data.name={config.name!r} needs data.{name}, which this recipe '
        f'does not have; start from a recipe of {config.name}'
      )
    if not _accepts(config[name], kind, low, high):
      expected = {
        str: 'a string',
        int: f'an integer from {low} to {high}',
        tuple: f'two numbers, the lower one first, from {low:g} to {high:g}',
      }[kind]
      raise InputError(f'data.{name}={config[name]!r}: expected {expected}')
  if own is FILES and config.eval_resize < config.image_size:
    raise InputError(
      f'data.eval_resize={config.eval_resize}: expected at least '
      f'{config.image_size}, data.image_size'
    )
  for name in config:
    if name not in own and any(name in other for other in FIELDS.values()):
      raise InputError(
        f'data.{name}={config[name]!r} is no field of '
        f'data.name={config.name!r}; start from a recipe of {config.name}'
      )


def _accepts(value: Any, kind: type, low: float, high: float) -> bool:
  if not isinstance(value, kind) or isinstance(value, bool):
    return False
  if kind is str:
    return True
  numbers = value if isinstance(value, tuple) else (value, value)
  return (
    len(numbers) == 2
    and all(isinstance(number, int | float) for number in numbers)
    and low <= numbers[0] <= numbers[1] <= high
  )


def check_validation(config: ConfigDict, size: int) -> None:
  """Raises InputError if no image of a training split would be left."""
  count = config.validation
  if not 0 < count < size:
    raise InputError(
      f'data.validation={count}: expected fewer than the {size} images of '
      f"{config.name}'s training split"
    )


def hold_out(config: ConfigDict, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws the `data.validation` training images to evaluate on.

  Args:
    config: a recipe's `data`.
    size: number of images in the training split.

  Returns:
    Indices of the images to train on and of those held out, in random order,
    the same in every run.

  Raises:
    InputError: none would be left to train on.
  """
  check_validation(config, size)
  count = config.validation
  order = held_out(size)
  return order[count:], order[:count]


def held_out(size: int) -> np.ndarray:
  """All of `size` training images in the order in which they are held out."""
  return np.random.default_rng(0).permutation(size)

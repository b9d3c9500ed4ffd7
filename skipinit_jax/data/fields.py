"""The fields of a recipe's `data`: which a data set has, and their values."""

from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, unknown

MOST = 2**31 - 1
LARGEST = 2**34  # Bytes of all synthetic images.


class Field(NamedTuple):
  """What a field may hold.

  Attributes:
    kind: str, int, float (a whole number will do), or tuple (two numbers, the
      lower one first).
    low, high: lowest and highest number.
  """

  kind: type
  low: float = 0
  high: float = MOST

  def accepts(self, value: Any) -> bool:
    """Whether this is such a value."""
    if self.kind is str:
      return isinstance(value, str)
    numbers = value if self.kind is tuple else (value, value)
    kinds = int if self.kind is int else int | float
    return (
      isinstance(numbers, tuple)
      and len(numbers) == 2
      and all(isinstance(n, kinds) for n in numbers)
      and not isinstance(value, bool)
      and self.low <= numbers[0] <= numbers[1] <= self.high
    )

  def __str__(self) -> str:
    if self.kind is str:
      return 'a string'
    if self.kind is tuple:
      return (
        f'two numbers, the lower one first, above 0 and at most {self.high:g}'
      )
    kind = 'an integer' if self.kind is int else 'a number'
    return f'{kind} from {self.low} to {self.high}'


# Of every data set.
COMMON = {
  'validation': Field(int),
  'mixup': Field(float, 0, 1000),
  'cutmix': Field(float, 0, 1000),
  'bad_share': Field(float, 0, 1),
}
FILES = {
  'dir': Field(str),
  'train_split': Field(str),
  'eval_split': Field(str),
  'train_size': Field(int),
  'eval_size': Field(int),
  'image_size': Field(int, 1, 2**12),
  'eval_resize': Field(int, 1, 2**13),
  'area': Field(tuple, 1e-6, 1),
  'aspect': Field(tuple, 1e-6, 100),
  'workers': Field(int, 0, 2**10),
}
SYNTHETIC = {
  'height': Field(int, 1, 4096),
  'width': Field(int, 1, 4096),
  'channels': Field(int, 1, 4096),
  'num_classes': Field(int, 1, 10**6),
  'train_size': Field(int, 1),
  'eval_size': Field(int, 1),
}
# Data set -> the fields that it has beside those of all.
FIELDS: dict[str, dict[str, Field]] = {
  'digits': {},
  'cifar10': {'dir': Field(str)},
  'cifar100': {'dir': Field(str)},
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
  for name, field in (COMMON | own).items():
    if name not in config:
      raise InputError(
        f'data.name={config.name!r} needs data.{name}, which this recipe '
        f'does not have; start from a recipe of {config.name}'
      )
    if not field.accepts(config[name]):
      raise InputError(f'data.{name}={config[name]!r}: expected {field}')
  if own is FILES and config.eval_resize < config.image_size:
    raise InputError(
      f'data.eval_resize={config.eval_resize}: expected at least '
      f'{config.image_size}, data.image_size'
    )
  if own is SYNTHETIC:
    images = config.train_size + config.eval_size
    needed = images * config.height * config.width * config.channels
    if needed > LARGEST:
      raise InputError(
        f'data.train_size={config.train_size} and data.eval_size='
        f'{config.eval_size} need {needed:.3g} bytes; expected at most '
        f'{LARGEST:.3g}'
      )
  for name in config:
    if name not in own and any(name in other for other in FIELDS.values()):
      raise InputError(
        f'data.{name}={config[name]!r} is no field of '
        f'data.name={config.name!r}; start from a recipe of {config.name}'
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
  count = config.validation
  if not count < size:
    raise InputError(
      f'data.validation={count}: expected fewer than the {size} images of '
      f"{config.name}'s training split"
    )
  order = np.random.default_rng(0).permutation(size)
  return order[count:], order[:count]

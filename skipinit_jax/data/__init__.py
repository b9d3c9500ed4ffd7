"""Data sets: what to train on, and how a batch comes about."""

from collections.abc import Callable

from ml_collections import ConfigDict

from skipinit_jax.data.resident import Resident as Resident
from skipinit_jax.data.sources import cifar, digits, synthetic
from skipinit_jax.data.stream import Stream as Stream
from skipinit_jax.data.stream import stream
from skipinit_jax.errors import InputError, unknown

# Name in `config.data.name` -> function of `config.data`.
DATASETS: dict[str, Callable[[ConfigDict], Resident | Stream]] = {
  'digits': digits,
  'cifar10': cifar,
  'cifar100': cifar,
  'imagenet2012': stream,
  'tfds': stream,  # Any image-classification set, in data.dir.
  'folder': stream,  # Folders split/class/image, in data.dir.
  'synthetic': synthetic,
}


# What a recipe's `data` holds beside the fields that all data sets have.
_FILES = {
  'dir': str,
  'train_split': str,
  'eval_split': str,
  'train_size': int,
  'eval_size': int,
  'image_size': int,
  'eval_resize': int,
  'area': tuple,
  'aspect': tuple,
  'workers': int,
}
_SHAPE = ('height', 'width', 'channels', 'num_classes')
_OWN: dict[str, dict[str, type]] = {
  'digits': {},
  'cifar10': {'dir': str},
  'cifar100': {'dir': str},
  'imagenet2012': _FILES,
  'tfds': _FILES,
  'folder': _FILES,
  'synthetic': dict.fromkeys((*_SHAPE, 'train_size', 'eval_size'), int),
}


def check_fields(config: ConfigDict) -> None:
  """Raises InputError unless `config` has just the fields of its data set."""
  if config.name not in DATASETS:
    raise InputError(unknown('data set', config.name, DATASETS))
  own = _OWN[config.name]
  for field, kind in own.items():
    if field not in config:
      raise InputError(
        f'data.name={config.name!r} needs data.{field}, which this recipe '
        f'does not have; start from a recipe of {config.name}'
      )
    value = config[field]
    if not isinstance(value, kind) or isinstance(value, bool):
      raise InputError(
        f'data.{field}={value!r}: expected a value of type {kind.__name__}'
      )
  for field in config:
    if field not in own and any(field in other for other in _OWN.values()):
      raise InputError(
        f'data.{field}={config[field]!r} is no field of '
        f'data.name={config.name!r}; start from a recipe of {config.name}'
      )


def open_dataset(config: ConfigDict) -> Resident | Stream:
  """Opens the data set that `config` (a recipe's `data`) names.

  Raises:
    InputError: no such data set, or one that can't be used; one line.
  """
  check_fields(config)
  return DATASETS[config.name](config)

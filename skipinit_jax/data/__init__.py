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


def open_dataset(config: ConfigDict) -> Resident | Stream:
  """Opens the data set that `config` (a recipe's `data`) names.

  Raises:
    InputError: no such data set, or one that can't be used; one line.
  """
  if config.name not in DATASETS:
    raise InputError(unknown('data set', config.name, DATASETS))
  return DATASETS[config.name](config)

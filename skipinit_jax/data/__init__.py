"""Data sets: what to train on, and how a batch comes about."""

from collections.abc import Callable

from ml_collections import ConfigDict

from skipinit_jax.data.dataset import Dataset as Dataset
from skipinit_jax.data.fields import check_fields
from skipinit_jax.data.resident import Resident as Resident
from skipinit_jax.data.small import cifar, digits, mnist5k, synthetic
from skipinit_jax.data.stream import Stream as Stream
from skipinit_jax.data.stream import open_stream

# Name in `config.data.name` -> function of `config.data`.
DATASETS: dict[str, Callable[[ConfigDict], Dataset]] = {
  'digits': digits,
  'mnist5k': mnist5k,
  'cifar10': cifar,
  'cifar100': cifar,
  'imagenet2012': open_stream,
  'tfds': open_stream,  # Any image-classification set, in data.dir.
  'folder': open_stream,  # Folders split/class/image, in data.dir.
  'synthetic': synthetic,
}


def open_dataset(config: ConfigDict) -> Dataset:
  """Opens the data set that `config` (a recipe's `data`) names.

  Raises:
    InputError: no such data set, or one that can't be used; one line.
  """
  check_fields(config)
  return DATASETS[config.name](config)

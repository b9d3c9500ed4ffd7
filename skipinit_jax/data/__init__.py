"""Data sets: what to train on, and how a batch comes about."""

from collections.abc import Callable

from ml_collections import ConfigDict

from skipinit_jax.data.resident import Resident as Resident
from skipinit_jax.data.sources import digits, synthetic
from skipinit_jax.errors import InputError, unknown

# Name in `config.data.name` -> function of `config.data`.
DATASETS: dict[str, Callable[[ConfigDict], Resident]] = {
  'digits': digits,
  'synthetic': synthetic,
}


def open_dataset(config: ConfigDict) -> Resident:
  """Opens the data set that `config` (a recipe's `data`) names.

  Raises:
    InputError: no such data set, or one that can't be used; one line.
  """
  if config.name not in DATASETS:
    raise InputError(unknown('data set', config.name, DATASETS))
  return DATASETS[config.name](config)

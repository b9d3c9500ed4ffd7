"""Packages that only some commands need."""

import functools
import importlib
from types import ModuleType

from skipinit_jax.errors import InputError, not_installed


@functools.cache
def require(name: str, extra: str = 'train') -> ModuleType:
  """Imports the module `name`, which the extra `extra` installs.

  Raises:
    InputError: it is not installed; the line names the command that does it.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise InputError(not_installed(str(error.name), extra)) from None

"""What networks and layers say about arguments of the wrong kind."""

import math
import numbers
import reprlib
from typing import Any

import jax.numpy as jnp

from skipinit_jax.errors import InputError, unknown

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def is_whole(value: Any, least: int = 1) -> bool:
  """Whether `value` is a whole number, `least` or more; True is none."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return whole and value >= least


def check_whole(field: str, value: Any) -> None:
  """Raises InputError unless `value` is a whole number, 1 or more."""
  if is_whole(value):
    return
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  near = ''
  if number and math.isfinite(value):
    near = f'; nearest: {max(1, round(value))}'
  raise InputError(
    f'{field}={shown(value)} must be a whole number, 1 or more{near}'
  )


def check_floating_dtype(field: str, dtype: Any) -> None:
  """Raises InputError unless `dtype` names a floating dtype, or is None."""
  try:
    floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
  except TypeError:
    floating = False
  if not floating:
    raise InputError(unknown(field, dtype, DTYPES))


def check_scalar(field: str, value: Any) -> None:
  """Raises InputError unless `value` is a number or an array of shape ()."""
  if isinstance(value, numbers.Real) or getattr(value, 'shape', None) == ():
    return
  raise InputError(
    f'{field}={shown(value)}: expected a number; what networks call '
    "alpha='1/sqrt(d)' is num_blocks**-0.5"
  )


def check_branch(branch: Any) -> None:
  """Raises InputError for what a scalar would turn into zeros: integers."""
  dtype = getattr(branch, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
    raise InputError(
      f'SkipInit scales an array of floating dtype, got {kind(branch)}'
    )


def shown(value: Any) -> str:
  """A value in an error: its repr on one line, shortened.

  >>> shown(list(range(100)))
  '[0, 1, 2, 3, 4, 5, ...]'
  """
  return ' '.join(reprlib.repr(value).split())


def kind(value: Any) -> str:
  """What an argument is, in an error: as in 'float32 of shape (2, 3)'."""
  if hasattr(value, 'dtype') and hasattr(value, 'shape'):
    return f'{value.dtype} of shape {value.shape}'
  return f'a value of type {type(value).__name__}'

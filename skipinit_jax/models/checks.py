"""Checks of the arguments of networks and layers."""

import math
import numbers
from typing import Any

import jax.numpy as jnp

from skipinit_jax.errors import InputError, kind, shown, unknown
from skipinit_jax.models.activations import ACTIVATIONS
from skipinit_jax.models.looks_linear import KERNEL_INITS
from skipinit_jax.models.methods import Method

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def is_whole(value: Any) -> bool:
  """Whether `value` is a whole number, 1 or more; True is not."""
  whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
  return whole and int(value) >= 1


def check_whole(field: str, value: Any) -> None:
  """Raises InputError unless `value` is a whole number, 1 or more."""
  if is_whole(value):
    return
  number = not isinstance(value, bool) and isinstance(value, numbers.Real)
  near = ''
  if number and math.isfinite(value):
    near = f'; nearest: {max(1, round(float(value)))}'
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


def check_inputs(
  name: str, inputs: Any, shape: str, rank: int, *, or_more: bool = False
) -> None:
  """Raises InputError unless a network can take `inputs`.

  They must be floating, not empty, and have `rank` axes, or more if `or_more`.
  `shape` says so in the error.
  """
  found = getattr(inputs, 'ndim', 0)
  if (
    found < rank
    or (found > rank and not or_more)
    or not jnp.issubdtype(inputs.dtype, jnp.floating)
    or 0 in inputs.shape
  ):
    raise InputError(
      f'{name} must be floating and of shape {shape}, no axis empty, got '
      f'{kind(inputs)}'
    )


def check_scalar(field: str, value: Any) -> None:
  """Raises InputError unless `value` is a finite number, or of shape ().

  A whole number from 2 on is taken for features, which layers have there.
  """
  if isinstance(value, numbers.Integral) and int(value) > 1:
    raise InputError(
      f'{field}={value}: expected how large alpha starts, such as 0.0 or 0.25, '
      'not a number of features'
    )
  if isinstance(value, numbers.Real) and math.isfinite(value):
    return
  if getattr(value, 'shape', None) == ():
    return
  raise InputError(
    f"{field}={shown(value)}: expected a finite number; alpha='1/sqrt(d)' of "
    'a network is num_blocks**-0.5 here'
  )


def check_branch(branch: Any) -> None:
  """Raises InputError for a branch of integers: alpha would round to 0."""
  dtype = getattr(branch, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
    raise InputError(
      f'SkipInit scales an array of floating dtype, got {kind(branch)}'
    )


def check_choices(
  method: Method, num_blocks: int, activation: str, kernel_init: str, skip: bool
) -> None:
  """Raises InputError for choices that exclude each other.

  These have no meaning together, or pass no signal at initialization.
  """
  method.check(num_blocks)
  if activation not in ACTIVATIONS:
    raise InputError(unknown('activation', activation, ACTIVATIONS))
  if kernel_init not in KERNEL_INITS:
    raise InputError(unknown('kernel_init', kernel_init, KERNEL_INITS))
  if kernel_init == 'looks_linear' and activation != 'crelu':
    raise InputError(
      f"kernel_init='looks_linear' mirrors kernels for activation='crelu', got "
      f'activation={activation!r}'
    )
  if kernel_init != 'he' and method.rescale:
    raise InputError(
      f"kernel_init={kernel_init!r} can't be rescaled by the depth; expected "
      "'he', or a method other than fixup"
    )
  if method.fixup_block and activation != 'relu':
    raise InputError(
      f'activation={activation!r} doubles the channels, which blocks that '
      "activate their sum can't: expected 'relu', or a method other than fixup"
    )
  if method.standardize and (activation != 'relu' or not skip):
    bad = 'skip=False' if not skip else f'activation={activation!r}'
    raise InputError(
      f'{bad} with standardize=True, as in method nf, whose blocks expect the '
      "variance of ReLU and of a skip path: expected activation='relu' and "
      'skip=True, or another method'
    )
  dead = method.zero_last or method.alpha_value(num_blocks) == 0
  if not skip and (method.fixup_block or method.gain != 1 or dead):
    raise InputError(
      'skip=False leaves only the branches, which must pass the signal at '
      "initialization: expected method 'none' or 'batchnorm', or 'skipinit' "
      'with an alpha other than 0'
    )

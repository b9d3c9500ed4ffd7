"""Moments of what the modules of a network return, and of what its joins add.

The part that is traced; `analysis.capture` makes tables of it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skipinit_jax.errors import InputError
from skipinit_jax.models.parameters import in_order
from skipinit_jax.models.skipinit import Join

SOWN = 'moments_of_'


def recorder(pattern: str | None = None) -> tuple[Callable, dict[str, None]]:
  """For `nn.intercept_methods`: sows moments into 'intermediates'.

  Args:
    pattern: a regular expression for the paths of modules whose outputs to look
      at; None: every `Join`, and both its paths.

  Returns:
    The interceptor, and the paths that it has met, in order, as keys.
  """
  seen: dict[str, None] = {}  # A scan traces its body repeatedly.

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    module = context.module
    path = '/'.join(module.path)
    if context.method_name != '__call__' or not _wanted(module, path, pattern):
      return out
    if getattr(out, 'ndim', 0) < 2:
      kind = getattr(out, 'shape', type(out).__name__)
      raise InputError(
        f'{path} returns {kind}; expected an array (batch, ..., channels)'
      )
    seen[path] = None
    values = {f'output_{name}': v for name, v in _moments(out).items()}
    if pattern is None:
      values |= _of_join(module, *args, **kwargs)
    for name, value in values.items():
      module.sow('intermediates', SOWN + name, value)
    return out

  return record, seen


def branch_moments(
  model: nn.Module, variables: Mapping[str, Any], images: jax.Array, **options
) -> jax.Array:
  """Second moments of the skip path and of the branch of every block.

  Args:
    model: whose blocks end in `Join`, called once each, scanned or not.
    variables, images: as `model.apply` takes them.
    **options: more of its arguments.

  Returns:
    float32 (blocks, 2), skip and branch, in the order of `block_names`; (0, 2)
    for a network without skip paths. The branch's share is the second over the
    sum of both, see `analysis.capture`.
  """
  record, seen = recorder()
  mutable = ['intermediates', *(name for name in variables if name != 'params')]
  with nn.intercept_methods(record):
    _, new = model.apply(variables, images, mutable=mutable, **options)
  found = []
  for path in in_order(seen):
    sown = new['intermediates']
    for part in path.split('/'):
      sown = sown[part]

    def second(of: str, sown: Mapping[str, Any] = sown) -> jax.Array:
      (variance,), (square,) = (
        sown[f'{SOWN}{of}_{name}'] for name in ('variance', 'squared_mean')
      )
      return jnp.ravel(variance + square)

    found.append(jnp.stack([second('skip'), second('branch')], axis=-1))
  return jnp.concatenate(found) if found else jnp.zeros((0, 2))


def _wanted(module: nn.Module, path: str, pattern: str | None) -> bool:
  if pattern is None:
    return isinstance(module, Join)
  return re.fullmatch(pattern, path) is not None


def _moments(x: jax.Array) -> dict[str, jax.Array]:
  """Mean variance of the channels, and mean square of their means; both ()."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  over = tuple(range(x.ndim - 1))
  return {
    'variance': x.var(over).mean(),
    'squared_mean': jnp.square(x.mean(over)).mean(),
  }


def _of_join(
  module: Join, skip: jax.Array, branch: jax.Array
) -> dict[str, jax.Array]:
  values = {f'skip_{name}': v for name, v in _moments(skip).items()}
  values |= {f'branch_{name}': v for name, v in _moments(branch).items()}
  # Of the block that the join is in: a folded scalar lies in the last layer.
  block = module.parent.variables.get('params', {}) if module.parent else {}
  scalars = [
    layer['alpha']
    for layer in block.values()
    if isinstance(layer, Mapping) and 'alpha' in layer
  ]
  # Which of several scales this branch can not be told.
  alpha = jnp.nan if len(scalars) > 1 else [*scalars, 1.0][0]
  return {**values, 'alpha': jnp.asarray(alpha)}

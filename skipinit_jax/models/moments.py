"""Moments of the outputs of modules, and of both paths of every `Join`.

This is the traced part; `analysis.capture` makes tables of it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.parameters import in_order
from skipinit_jax.models.precision import widen
from skipinit_jax.models.skipinit import Join

SOWN = 'moments_of_'


def recorder(
  pattern: str | None = None,
) -> tuple[Callable[..., Any], dict[str, None]]:
  """Makes an interceptor that sows moments into 'intermediates'.

  Args:
    pattern: a regular expression for the paths of the modules to record; None:
      every `Join`, with both its paths.

  Returns:
    The interceptor, for `nn.intercept_methods`, and a dict whose keys will be
    the paths of the recorded modules, in the order of their calls.
  """
  recorded: dict[str, None] = {}  # A scan traces its body repeatedly.

  def record(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    out = call(*args, **kwargs)
    module = context.module
    path = '/'.join(module.path)
    if context.method_name != '__call__' or not _wanted(module, path, pattern):
      return out
    if getattr(out, 'ndim', 0) < 2:
      raise InputError(
        f'{path} returns {kind(out)}; expected an array (batch, ..., channels)'
      )
    recorded[path] = None
    values = {f'output_{name}': v for name, v in _moments(out).items()}
    if pattern is None:
      values |= _join_moments(module, *args, **kwargs)
    for name, value in values.items():
      module.sow('intermediates', SOWN + name, value)
    return out

  return record, recorded


def branch_moments(
  model: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  **options: Any,
) -> jax.Array:
  """Computes the second moments of both paths of every block.

  Args:
    model: its blocks, scanned or not, each end in one call of a `Join`.
    variables, images: as for `model.apply`.
    **options: its other arguments.

  Returns:
    float32 (blocks, 2), skip and branch, in the order of `block_names`; (0, 2)
    for a network without skip paths. The branch's share is the second over the
    sum of both, see `analysis.capture`.
  """
  record, recorded = recorder()
  mutable = ['intermediates', *(name for name in variables if name != 'params')]
  with nn.intercept_methods(record):
    _, new = model.apply(variables, images, mutable=mutable, **options)
  sown: dict[str, Any] = flatten_dict(new.get('intermediates', {}), sep='/')

  def second_moment(path: str, of: str) -> jax.Array:
    (variance,) = sown[f'{path}/{SOWN}{of}_variance']
    (squared_mean,) = sown[f'{path}/{SOWN}{of}_squared_mean']
    return jnp.ravel(variance + squared_mean)

  rows = [
    jnp.stack([second_moment(path, of) for of in ('skip', 'branch')], axis=-1)
    for path in in_order(recorded)
  ]
  return jnp.concatenate(rows) if rows else jnp.zeros((0, 2))


def _wanted(module: nn.Module, path: str, pattern: str | None) -> bool:
  if pattern is None:
    return isinstance(module, Join)
  return re.fullmatch(pattern, path) is not None


def _moments(x: jax.Array) -> dict[str, jax.Array]:
  """Mean variance of the channels, and mean square of their means; both ()."""
  x = widen(x)
  axes = tuple(range(x.ndim - 1))
  return {
    'variance': x.var(axes).mean(),
    'squared_mean': jnp.square(x.mean(axes)).mean(),
  }


def _join_moments(
  join: nn.Module, skip: jax.Array, branch: jax.Array
) -> dict[str, jax.Array]:
  values = {f'skip_{name}': v for name, v in _moments(skip).items()}
  values |= {f'branch_{name}': v for name, v in _moments(branch).items()}
  # A folded scalar is in the last layer of the block that the join ends.
  parent: Any = join.parent
  block = parent.variables.get('params', {}) if parent else {}
  scalars = [
    layer['alpha']
    for layer in block.values()
    if isinstance(layer, Mapping) and 'alpha' in layer
  ]
  # Which of several scales this branch can not be told.
  alpha = jnp.nan if len(scalars) > 1 else [*scalars, 1.0][0]
  return {**values, 'alpha': jnp.asarray(alpha)}

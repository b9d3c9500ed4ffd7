"""Statistics of the blocks of a network: variances of skip and branch."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from skipinit_jax.errors import InputError
from skipinit_jax.models.moments import SOWN, recorder
from skipinit_jax.models.stages import STACKED


def capture(
  model: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  *,
  pattern: str | None = None,
  train: bool | None = True,
  rngs: dict[str, jax.Array] | None = None,
) -> dict[str, np.ndarray]:
  """Statistics of every block, from input to output.

  Of an array (batch, ..., channels), statistics of a channel are over the batch
  and all positions, and then averaged over the channels with equal weights:

    variance: mean over channels of the variance of a channel;
    squared_mean: mean over channels of the square of a channel's mean (both
      as in Brock, De, Smith 2021, figure 1);
    their sum is the second moment, the mean square of all elements.

  He's initialization is about second moments: over the draw of the weights
  every channel has mean zero. With the weights fixed its mean over the images
  is not zero, and the variance grows more slowly than the second moment.

  Everything is computed in the dtype of the activations, at least float32. A
  deep network without normalization overflows float32: use float64 parameters
  and images under `jax.enable_x64(True)`.

  Args:
    model: any Linen module whose blocks end in `Join`, scanned or not.
    variables: as `model.init` gives them.
    images: the model's only positional argument.
    pattern: a regular expression; instead of joins, captures the outputs of all
      modules whose whole path ('stage1/block2/conv1') it matches. Works on any
      Linen module.
    train: passed to the model; None: not passed.
    rngs: for Dropout.

  Returns:
    Arrays of shape (blocks,), in the order of the first calls, the steps of a
    scan one after the other, the calls of one module together:
      name: str, as in 'stage1/block2';
      output_variance, output_squared_mean: of what `Join` returns (before the
        last ReLU of Fixup's post-activation blocks);
    and, without a pattern,
      skip_variance, skip_squared_mean, branch_variance, branch_squared_mean: of
        the two paths, the branch after its scalar;
      alpha: the branch's scalar, 1 where there is none, NaN where the module of
        the join has several;
      unscaled_variance: of the branch before its scalar; NaN where alpha is 0
        or NaN;
      share: the branch's second moment over the sum of both paths'. That is
        Var(branch) / Var(output) if the paths are uncorrelated, as in theory,
        and there is no gain; unlike that, it can't leave [0, 1]. NaN where the
        activations have overflowed;
      variance_share: the same of the variances.

  Raises:
    InputError: no `Join`, nothing that the pattern matches, an output that
      is no array (batch, ..., channels), or a module within a scan that does
      not stack 'intermediates'.
  """
  record, seen = recorder(pattern)
  mutable = ['intermediates', *(name for name in variables if name != 'params')]
  options: dict[str, Any] = {} if train is None else {'train': train}
  with nn.intercept_methods(record):
    _, new = model.apply(
      variables, images, rngs=rngs, mutable=mutable, **options
    )
  if not seen:
    raise InputError(
      f'{type(model).__name__} has no block that ends in Join; a pattern '
      'captures outputs of other modules'
      if pattern is None
      else f'pattern={pattern!r} matches no module of {type(model).__name__}'
    )
  sown = flatten_dict(new.get('intermediates', {}), sep='/')
  found = [_of_path(path, sown) for path in seen]
  order = _in_order(list(seen), [len(f['name']) for f in found])
  out = {
    name: np.concatenate([f[name] for f in found])[order] for name in found[0]
  }
  return out if pattern else _with_shares(out)


def second_moment(captured: Mapping[str, np.ndarray], path: str) -> np.ndarray:
  """Mean square of the elements of 'skip', 'branch' or 'output', (blocks,)."""
  return captured[f'{path}_variance'] + captured[f'{path}_squared_mean']


def _in_order(paths: Sequence[str], rows: Sequence[int]) -> list[int]:
  """The order of all modules' rows, with a scan's steps one after the other."""
  first: dict[str, int] = {}
  keys = []
  for i, (path, number) in enumerate(zip(paths, rows, strict=True)):
    scanned, stacked, _ = f'/{path}/'.partition(f'/{STACKED}/')
    start = first.setdefault(scanned, i) if stacked else i
    keys += [(start, row if stacked else 0, i, row) for row in range(number)]
  return sorted(range(len(keys)), key=keys.__getitem__)


def _of_path(path: str, sown: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """One module's statistics, a row for each of its calls and scan steps."""
  prefix = f'{path}/{SOWN}' if path else SOWN
  values = {
    key.removeprefix(prefix): np.ravel(np.asarray(value))
    for key, value in sown.items()
    if key.startswith(prefix)
  }
  if not values:
    raise InputError(
      f'{path} lies within a scan that drops what its body sows; give nn.scan '
      "variable_axes={'intermediates': 0, ...}, or unroll the network"
    )
  parts = path.split('/')
  if parts[-1] == 'join':
    parts = parts[:-1]
  calls, *steps = np.shape(sown[f'{prefix}output_variance'])
  number = 1 if len(steps) == 0 else int(np.prod(steps))
  names = []
  for i in range(number):
    if steps and STACKED in parts:
      name = '/'.join(f'block{i + 2}' if p == STACKED else p for p in parts)
    else:
      name = '/'.join(parts) + (f'[{i}]' if steps else '')
    names.append(name)
  return {'name': np.array(calls * names), **values}


def _with_shares(captured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  alpha = captured['alpha']
  unscaled = np.full(alpha.shape, np.nan)
  np.divide(
    captured['branch_variance'], alpha**2, out=unscaled, where=alpha != 0
  )
  return {
    **captured,
    'unscaled_variance': unscaled,
    'share': _share(
      second_moment(captured, 'skip'), second_moment(captured, 'branch')
    ),
    'variance_share': _share(
      captured['skip_variance'], captured['branch_variance']
    ),
  }


def _share(skip: np.ndarray, branch: np.ndarray) -> np.ndarray:
  total = np.asarray(skip, np.float64) + branch
  with np.errstate(invalid='ignore'):
    return np.where(total == 0, 0.0, branch / np.where(total == 0, 1, total))

"""Gradient by path length (Veit, Wilber, Belongie 2016, section 4).

A network of n residual blocks is a sum over 2^n paths, each through the branch
or the skip path of every block. How much gradient do paths of each length
carry?
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.ticker import MaxNLocator

from skipinit_jax import plotting
from skipinit_jax.analysis.networks import Network
from skipinit_jax.analysis.propagation import path_lengths
from skipinit_jax.errors import InputError
from skipinit_jax.intervals import half_interval
from skipinit_jax.models.skipinit import Join
from skipinit_jax.models.stages import STACKED, unstack_blocks
from skipinit_jax.variants import VARIANTS

SHOWN = 1e-20  # Smallest norm drawn, as a share of the largest.

Variables = Mapping[str, Any]
# change(block, skip, branch) returns the skip path and the branch to be joined.
Change = Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def unrolled(
  model: nn.Module, variables: Variables
) -> tuple[nn.Module, dict[str, Any]]:
  """The same network with a separate join for every block.

  Args:
    model: any Linen module; those of this package may be scanned.
    variables: of `model`.
  """
  if getattr(model, 'scan', False):
    return model.clone(scan=False), unstack_blocks(variables)
  return model, dict(variables)


def find_blocks(
  model: nn.Module, variables: Variables, images: jax.Array
) -> list[tuple[str, ...]]:
  """The joins of all residual blocks, from the input to the output.

  Args:
    model: any Linen module, called as model(images, train=...), whose blocks
      end in `Join`.
    variables: of `model`.
    images: of the shape and dtype that it takes; the values are not read.

  Returns:
    Their paths, such as ('stage1', 'block2', 'join').

  Raises:
    InputError: no `Join`, one that several blocks share, or scanned blocks.
  """
  calls: list[tuple[str, ...]] = []

  def record(call, args, kwargs, context):
    if isinstance(context.module, Join):
      calls.append(context.module.path)
    return call(*args, **kwargs)

  def run(variables, images):
    with nn.intercept_methods(record):
      return model.apply(variables, images, train=False)

  jax.eval_shape(run, variables, images)
  blocks = list(dict.fromkeys(calls))
  if not blocks:
    raise InputError(
      f'{type(model).__name__} has no block that ends in Join, and so no paths'
    )
  for path in blocks:
    if STACKED in path:
      raise InputError(
        f'{"/".join(path)} stands for all blocks of a scan; expected a network '
        'with scan=False'
      )
    if calls.count(path) > 1:
      raise InputError(
        f'{"/".join(path)} is called {calls.count(path)} times; expected a '
        'separate Join for every block'
      )
  return blocks


@contextlib.contextmanager
def changed_joins(
  blocks: Sequence[tuple[str, ...]], change: Change
) -> Iterator[None]:
  """A context in which every join is passed change(block, skip, branch).

  Args:
    blocks: of `find_blocks`.
    change: takes the number of the block, and both paths; returns both.
  """
  number = {path: i for i, path in enumerate(blocks)}

  def intercept(call, args, kwargs, context):
    if isinstance(context.module, Join):
      args = change(number[context.module.path], *args)
    return call(*args, **kwargs)

  with nn.intercept_methods(intercept):
    yield


def path_gradients(
  model: nn.Module,
  variables: Variables,
  images: jax.Array,
  labels: jax.Array | np.ndarray,
  *,
  train: bool = True,
) -> tuple[list[tuple[str, ...]], Callable[[jax.Array], tuple[Any, jax.Array]]]:
  """The gradient along one path, as a compiled function.

  The forward pass is whole. In the backward pass the gradient goes through the
  branches of the selected blocks, and through the skip paths of the others.

  Args:
    model: any Linen module of logits, called as model(images, train=...), whose
      blocks end in `Join`, a separate one in each.
    variables: of `model`.
    images: (batch, ...), floating, as the model takes them.
    labels: integers (batch,).
    train: use batch statistics, as a network at initialization must.

  Returns:
    The blocks, and f(selection), bool (blocks,): the gradient of the sum over
    the batch of the cross-entropy with respect to the parameters, a tree like
    them, and to the images, like them.
  """
  blocks = find_blocks(model, variables, images)
  gradient = _compiled(model, blocks, labels, train)
  return blocks, functools.partial(gradient, variables, images)


def _compiled(
  model: nn.Module,
  blocks: Sequence[tuple[str, ...]],
  labels: jax.Array | np.ndarray,
  train: bool,
) -> Callable[[Variables, jax.Array, jax.Array], tuple[Any, jax.Array]]:
  """The function of `path_gradients`, of any variables and images."""

  def loss(params, images, rest, selection):
    def change(block, skip, branch):
      selected = selection[block]
      return _gate(skip, ~selected), _gate(branch, selected)

    with changed_joins(blocks, change):
      logits, _ = model.apply(
        {**rest, 'params': params}, images, train=train, mutable=list(rest)
      )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))

  def of(variables, images, selection):
    rest = {name: v for name, v in variables.items() if name != 'params'}
    return gradient(variables['params'], images, rest, selection)

  return of


def measure(
  model: nn.Module,
  variables: Variables,
  images: jax.Array,
  labels: jax.Array | np.ndarray,
  *,
  samples: int = 4,
  train: bool = True,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Gradient norm by path length, from paths drawn at random.

  Veit et al. weigh norms, as done here; they add only along paths that agree.
  Where the gradients of paths are uncorrelated, squares add, and the effective
  depth is less. Gradients below 1e-38 are zero in float32.

  48 blocks (the digits' 100-layer network) and 32 images take about half a
  minute on two CPU cores.

  Args:
    model, variables, images, labels, train: as in `path_gradients`; scanned
      networks of this package are unrolled.
    samples: paths drawn for each length.
    seed: of the draws.

  Returns:
    For n blocks, float64 (n + 1,), by length 0 ... n:
      norm: mean over paths and images of the L2 norm of the gradient of an
        image's loss with respect to the image;
      norm_error: its standard error over the paths, 0 for lengths with one
        path, NaN for a single sample;
      first_norm: likewise the norm of the gradient of the mean loss with
        respect to the kernel of `stem`; NaN where there is none;
      paths: share of all paths that have the length, binomial(n, 1/2);
      gradient: paths times norm, as a share of its sum (NaN if all are zero);
    and effective_depth, float64 (): the mean length weighted by `gradient`.

  Raises:
    InputError: as `find_blocks`; samples below 1.
  """
  if samples < 1:
    raise InputError(f'samples={samples} must be 1 or more')
  model, variables = unrolled(model, variables)
  blocks, gradient = path_gradients(
    model, variables, images, labels, train=train
  )
  return _by_length(len(blocks), gradient, samples, seed)


def measure_draws(
  draws: Sequence[Network], *, samples: int = 4
) -> dict[str, np.ndarray]:
  """Several draws of a network at initialization, in one compiled program.

  Args:
    draws: they differ in their variables alone.
    samples: as in `measure`.

  Returns:
    What `measure` returns of the first draw, but for `effective_depth`, which
    is the mean over the draws; `effective_depths`, float64 (draws,), that of
    each; and `interval`, float64 (), half of the 95 % interval for the mean.
  """
  pairs = [unrolled(draw.model, draw.variables) for draw in draws]
  model, variables = pairs[0]
  _, _, images, labels = draws[0]
  blocks = find_blocks(model, variables, images)
  gradient = _compiled(model, blocks, labels, train=True)
  found = [
    _by_length(
      len(blocks), functools.partial(gradient, variables, images), samples, seed
    )
    for seed, (_, variables) in enumerate(pairs)
  ]
  depths = np.array([each['effective_depth'] for each in found])
  return {
    **found[0],
    'effective_depth': depths.mean(),
    'effective_depths': depths,
    'interval': np.array(half_interval(depths.tolist())),
  }


def _by_length(
  n: int, gradient: Callable, samples: int, seed: int
) -> dict[str, np.ndarray]:
  """The arrays of `measure`, for n blocks and `path_gradients`' function."""
  rng = np.random.default_rng(seed)
  norms = [[] for _ in range(n + 1)]
  for length in range(n + 1):
    for _ in range(1 if length in (0, n) else samples):
      selection = jnp.asarray(some_blocks(rng, n, length))
      norms[length].append(_norms(*gradient(selection)))
  means = np.array([np.mean(rows, axis=0) for rows in norms])
  errors = [
    np.std(rows, axis=0, ddof=1)[0] / len(rows) ** 0.5
    if len(rows) > 1
    else (0.0 if length in (0, n) else np.nan)
    for length, rows in enumerate(norms)
  ]
  return {
    'norm': means[:, 0],
    'norm_error': np.array(errors),
    'first_norm': means[:, 1],
    **weigh(means[:, 0]),
  }


def some_blocks(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
  """`count` of n blocks at random: bool (n,)."""
  chosen = np.zeros(n, bool)
  chosen[rng.choice(n, count, replace=False)] = True
  return chosen


def weigh(norm: np.ndarray) -> dict[str, np.ndarray]:
  """Weighs a norm by path length with the number of paths of that length.

  Args:
    norm: (n + 1,), mean norm of a path of length 0 ... n.

  Returns:
    'paths', 'gradient' and 'effective_depth' as in `measure`.

  >>> weigh(np.ones(5))['effective_depth'].item()
  2.0
  """
  n = len(norm) - 1
  paths = path_lengths(np.full(n, 0.5))
  product = paths * norm
  with np.errstate(invalid='ignore'):
    gradient = product / product.sum()
  depth = np.asarray((gradient * np.arange(n + 1)).sum())
  return {'paths': paths, 'gradient': gradient, 'effective_depth': depth}


@plotting.style()
def draw(
  measured: Mapping[str, Mapping[str, np.ndarray]], out: Path
) -> list[Path]:
  """Draws arrays of `measure`, as figure 6 of Veit et al. 2016.

  Args:
    measured: name in `VARIANTS` -> arrays of `measure` or `measure_draws`, all
      of equal shapes.
    out: folder for the SVG and PNG files.

  Raises:
    InputError: no path of any network has a gradient.
  """
  largest = max(result['norm'].max() for result in measured.values())
  if not largest > 0:
    raise InputError(
      'no path has a gradient; expected a classifier that does not start at '
      'zero: --config.model.classifier_init=he, or a trained network'
    )
  figure, (lengths, norms, shares) = plotting.new_figure(3, 1, sharex=True)
  paths = next(iter(measured.values()))['paths']
  lengths.bar(np.arange(len(paths)), paths, color='0.6')
  lengths.set_ylabel('share of all paths')
  lone = 10.0  # Size of the marker of a method with one length, hollow.
  for method, result in measured.items():
    style = plotting.line_style(method) | {'marker': 'o', 'markersize': 3}
    length = np.flatnonzero(result['norm'] > 0)
    if len(length) == 1:
      style |= {'markersize': lone, 'markerfacecolor': 'none'}
      lone -= 4
    mean, interval = result['effective_depth'], result.get('interval', 0)
    spread = f' ± {interval:.1f}' if interval else ''
    label = f'{VARIANTS[method].label} (mean {mean:.1f}{spread})'
    norms.plot(length, result['norm'][length], label=label, **style)
    shares.plot(length, result['gradient'][length], **style)
  norms.set_yscale('log')
  norms.set_ylim(max(SHOWN * largest, norms.get_ylim()[0]), 10 * largest)
  plotting.log_axis(norms)
  norms.set_ylabel("norm of a path's gradient")
  shares.set_ylabel('share of the gradient')
  shares.xaxis.set_major_locator(MaxNLocator(integer=True))
  shares.set_xlabel('path length (branches passed)')
  plotting.legend(figure, *norms.get_legend_handles_labels(), columns=2)
  figure.align_ylabels()
  return plotting.save(figure, out, 'paths')


def _gate(x: jax.Array, opened: jax.Array) -> jax.Array:
  """x, with a gradient only where the gate is open."""
  return jnp.where(opened, x, jax.lax.stop_gradient(x))


def _norms(params: Any, images: jax.Array) -> tuple[Any, Any]:
  """Mean norm of images' gradients; norm of the stem's gradient of the mean."""
  # In float64: squares of small and large gradients leave float32.
  flat = np.asarray(images, np.float64).reshape(len(images), -1)
  stem = params.get('stem', {}).get('kernel')
  first = np.nan
  if stem is not None:
    first = np.linalg.norm(np.asarray(stem, np.float64)) / len(images)
  return np.linalg.norm(flat, axis=1).mean(), first

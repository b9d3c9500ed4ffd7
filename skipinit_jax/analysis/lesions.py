"""Blocks deleted and reordered (Veit, Wilber, Belongie 2016, sections 4, 5).

A trained network is a sum over paths: without one block half of the paths are
left, and the test error should grow smoothly with the number of blocks that are
deleted or moved.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.axes import Axes

from skipinit_jax import plotting
from skipinit_jax.analysis.paths import (
  changed_joins,
  find_blocks,
  some_blocks,
  unrolled,
)
from skipinit_jax.errors import InputError
from skipinit_jax.variants import VARIANTS

Variables = Mapping[str, Any]
Labels = jax.Array | np.ndarray
Blocks = Sequence[tuple[str, ...]]


def measure(
  model: nn.Module,
  variables: Variables,
  images: jax.Array,
  labels: Labels,
  *,
  draws: int = 5,
  points: int = 8,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Test error of a trained network with blocks deleted or reordered.

  48 blocks (the digits' 100-layer network) and its 360 test images take less
  than a minute on two CPU cores.

  Args:
    model, variables: a trained network of logits, whose blocks end in `Join`;
      scanned networks of this package are unrolled.
    images: (n, ...), floating, as the model takes them; all in one batch.
    labels: integers (n,).
    draws: of the blocks to delete, and of the pairs to swap, for each number.
    points: numbers of blocks, and of swaps, spread evenly.
    seed: of the draws.

  Returns:
    Test errors, float64 fractions, of
      whole: () the network as it is;
      single: (blocks,) without each block's branch;
      several: (points, draws) without `deleted` random branches;
      swapped: (points, draws) after `swaps` random swaps of equal blocks;
    and deleted, swaps: int (points,); tau: (points, draws), Kendall's tau of
    the order of the blocks after the swaps; transitions: bool (blocks,), of
    `find_transitions`. Without equal blocks, swaps, swapped and tau are empty.

  Raises:
    InputError: as `paths.find_blocks`; draws or points below 1.
  """
  for name, value in (('draws', draws), ('points', points)):
    if value < 1:
      raise InputError(f'{name}={value} must be 1 or more')
  from scipy.stats import kendalltau  # Here, since it takes a second to import.

  model, variables = unrolled(model, variables)
  blocks = find_blocks(model, variables, images)
  error = error_without(model, blocks, images, labels)
  n, rng = len(blocks), np.random.default_rng(seed)
  nothing = np.zeros(n, bool)
  deleted = np.unique(np.linspace(1, n, points).round().astype(int))
  several = [
    [error(variables, some_blocks(rng, n, count)) for _ in range(draws)]
    for count in deleted
  ]
  groups = equal_blocks(variables, blocks)
  swaps = deleted if groups else deleted[:0]
  orders = [
    [random_swaps(rng, n, groups, count) for _ in range(draws)]
    for count in swaps
  ]
  swapped = [
    [error(reorder(variables, blocks, order), nothing) for order in row]
    for row in orders
  ]
  taus = [
    [kendalltau(np.arange(n), order)[0] for order in row] for row in orders
  ]
  return {
    'whole': np.asarray(error(variables, nothing)),
    'single': np.array(
      [error(variables, row) for row in np.eye(n, dtype=bool)]
    ),
    'several': np.array(several),
    'swapped': np.array(swapped).reshape(-1, draws),
    'deleted': deleted,
    'swaps': swaps,
    'tau': np.array(taus).reshape(-1, draws),
    'transitions': find_transitions(model, variables, images, blocks),
  }


def error_without(
  model: nn.Module,
  blocks: Blocks,
  images: jax.Array,
  labels: Labels,
) -> Callable[[Variables, np.ndarray], float]:
  """The test error of a network without the branches of some blocks.

  A deleted block is its skip path alone, which is the identity, or the
  projection where there is one. Running statistics are used as they are.

  Args:
    model: of logits, called as model(images, train=False).
    blocks: of `paths.find_blocks`.
    images, labels: (n, ...) and integers (n,).

  Returns:
    f(variables, deleted), bool (blocks,): the share of images whose label is
    not the largest logit. Compiled once.
  """

  @jax.jit
  def error(variables, deleted):
    with changed_joins(blocks, _delete(deleted)):
      logits: Any = model.apply(variables, images, train=False)
    return (logits.argmax(-1) != labels).mean()

  return lambda variables, deleted: float(
    error(variables, jnp.asarray(deleted))
  )


def equal_blocks(variables: Variables, blocks: Blocks) -> list[list[int]]:
  """Groups of two blocks or more whose parameters have equal shapes.

  Args:
    variables: of an unrolled network.
    blocks: of `paths.find_blocks`. The module of the join is the block; a
      module with several joins has no blocks to swap.

  Returns:
    Lists of block numbers.
  """
  groups: dict[Any, list[int]] = {}
  modules = [block[:-1] for block in blocks]
  for i, module in enumerate(modules):
    if not module or modules.count(module) > 1:
      continue
    leaves: dict[Any, Any] = flatten_dict(_at(variables['params'], module))
    key = tuple(sorted((name, leaf.shape) for name, leaf in leaves.items()))
    groups.setdefault(key, []).append(i)
  return [group for group in groups.values() if len(group) > 1]


def find_transitions(
  model: nn.Module, variables: Variables, images: jax.Array, blocks: Blocks
) -> np.ndarray:
  """Which blocks change the shape: bool (blocks,).

  Those with a projection, or whose output is of another shape than the output
  of the block before. Arguments as of `paths.find_blocks`.
  """
  shapes = {}

  def record(block, skip, branch):
    shapes[block] = skip.shape
    return skip, branch

  def run(variables, images):
    with changed_joins(blocks, record):
      return model.apply(variables, images, train=False)

  jax.eval_shape(run, variables, images)
  return np.array(
    [
      'projection' in _at(variables['params'], block[:-1])
      or shapes[i] != shapes[max(i - 1, 0)]
      for i, block in enumerate(blocks)
    ]
  )


def random_swaps(
  rng: np.random.Generator, n: int, groups: list[list[int]], count: int
) -> np.ndarray:
  """The order of n blocks after `count` swaps of random pairs.

  Args:
    rng: of the draws.
    n: number of blocks.
    groups: of `equal_blocks`; each pair of equal blocks is as likely.
    count: number of swaps, one after the other.

  Returns:
    int (n,): the number of the block that is in each place.
  """
  order = np.arange(n)
  pairs = [len(group) * (len(group) - 1) for group in groups]
  shares = np.array(pairs) / max(sum(pairs), 1)
  for _ in range(count):
    group = groups[rng.choice(len(groups), p=shares)]
    a, b = rng.choice(group, 2, replace=False)
    order[[a, b]] = order[[b, a]]
  return order


def reorder(
  variables: Variables, blocks: Blocks, order: Sequence[int] | np.ndarray
) -> dict[str, Any]:
  """Puts block order[i] into place i: parameters and running statistics.

  Args:
    variables: of an unrolled network.
    blocks: of `paths.find_blocks`.
    order: a permutation that puts equal blocks into each other's places.
  """
  out = {}
  for name, tree in variables.items():
    out[name] = tree
    for place, block in enumerate(order):
      if place != block and (moved := _at(tree, blocks[block][:-1])):
        out[name] = _put(out[name], blocks[place][:-1], moved)
  return out


@plotting.style()
def draw(
  measured: Mapping[str, Mapping[str, np.ndarray]], out: Path
) -> list[Path]:
  """Draws arrays of `measure`: SVG and PNG files in the folder `out`.

  Args:
    measured: name in `VARIANTS` -> arrays of `measure`.
    out: folder.
  """
  figure, panels = plotting.new_figure(3, 1)
  for method, result in measured.items():
    _draw_method(panels, method, result)
  single, several, swapped = panels
  single.set_xlabel('the block deleted (dots: transitions)')
  several.set_xlabel('number of random blocks deleted')
  swapped.set_xlabel("Kendall's tau of the blocks' order")
  swapped.invert_xaxis()
  for axes in panels:
    axes.set_ylabel('test error (%)')
    axes.set_ylim(bottom=0)
  labels = single.get_legend_handles_labels()
  plotting.legend(figure, *labels, columns=3)
  return plotting.save(figure, out, 'lesions')


def _draw_method(
  panels: Sequence[Axes], method: str, result: Mapping[str, np.ndarray]
) -> None:
  single, several, swapped = panels
  style = plotting.line_style(method)
  dots = {'color': style['color'], 'linestyle': 'none'}
  numbers = 1 + np.arange(len(result['single']))
  errors = 100 * result['single']
  label = VARIANTS[method].label
  single.plot(numbers, errors, linewidth=1.2, label=label, **style)
  changes = result['transitions']
  single.plot(numbers[changes], errors[changes], marker='o', **dots)
  draws, errors = result['deleted'], 100 * result['several']
  several.plot(draws, errors.mean(1), marker='o', markersize=3.5, **style)
  # The range of the draws.
  shade = {'color': style['color'], 'alpha': 0.2, 'linewidth': 0}
  several.fill_between(draws, errors.min(1), errors.max(1), **shade)
  taus, errors = result['tau'].ravel(), 100 * result['swapped'].ravel()
  swapped.plot(taus, errors, marker='.', **dots)
  whole = 100 * float(result['whole'])
  for axes in panels:
    axes.axhline(whole, color=dots['color'], linewidth=0.8, alpha=0.7, zorder=0)


def _delete(deleted: jax.Array) -> Callable:
  def change(block, skip, branch):
    return skip, jnp.where(deleted[block], 0, branch)

  return change


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
  for name in path:
    tree = tree.get(name, {})
  return tree


def _put(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict:
  if not path:
    return value
  first, *rest = path
  return {**tree, first: _put(tree[first], rest, value)}

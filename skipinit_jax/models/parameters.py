"""Parameters by leaf name: labels, decay, scalars, norms and counts."""

import collections
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.models.stages import STACKED

# Leaf name -> its meaning. Covers every network of this package.
LEAVES = {
  'kernel': 'kernels of convolutions and dense layers',
  'bias': 'bias vectors, those of batch normalization included',
  'scale': "batch normalization's scales",
  'alpha': "the residual branches' scalars, Fixup's multipliers included",
  'scalar_bias': "Fixup's scalar biases",
  'gain': 'gains of standardized kernels',
}


def param_labels(params: Any, *, other: str | None = None) -> Any:
  """Labels every parameter with its leaf name, a key of `LEAVES`.

  Args:
    params: nested dicts of arrays, or any tree: fields of a NamedTuple or of a
      `flax.struct`, and NNX variables in the state of a module, have leaf names
      too.
    other: 'decay' or 'no_decay', the label of leaves that are not in `LEAVES`;
      None makes them an error.

  Returns:
    A tree of str like `params`.

  Raises:
    InputError: an unknown leaf name without `other`, or another `other`.

  >>> param_labels({'block1': {'conv2': {'alpha': 0, 'kernel': 0}}})
  {'block1': {'conv2': {'alpha': 'alpha', 'kernel': 'kernel'}}}
  """
  _check_other(other)
  labels = [_label(names, other) for names, _ in named_leaves(params)]
  return jax.tree.unflatten(jax.tree.structure(params), labels)


def _check_other(other: str | None) -> None:
  if other not in (None, 'decay', 'no_decay'):
    raise InputError(f"other={other!r}: expected 'decay' or 'no_decay'")


def _label(names: tuple[str, ...], other: str | None) -> str:
  """The label of the leaf at the end of these names."""
  leaf = names[-1] if names else ''
  if leaf in LEAVES:
    return leaf
  if other is None:
    raise InputError(
      f'parameter {"/".join(names)!r} has the unknown leaf name {leaf!r}; '
      f'known are {", ".join(LEAVES)}; '
      "other='decay' or other='no_decay' labels it"
    )
  return other


def named_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
  """The leaves of a tree, each with the names on its path.

  NNX keeps an array as the value of a variable. The variable has the name, so
  the step to its value is omitted.
  """
  found: list[tuple[tuple[str, ...], Any]] = []
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nnx):
    for inside, leaf in jax.tree_util.tree_leaves_with_path(node):
      keys = (*path, *inside[1:])
      names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
      found.append((tuple(names), leaf))
  return found


def _is_nnx(node: Any) -> bool:
  """Whether `node` is an NNX variable; doesn't import NNX, which is slow."""
  nnx = sys.modules.get('flax.nnx')
  return nnx is not None and isinstance(node, nnx.Variable)


def decay_mask(
  params: Any,
  *,
  decay: Collection[str] = ('kernel',),
  other: str | None = None,
) -> Any:
  """True for the parameters that L2 regularization applies to.

  Args:
    params: nested dicts of arrays.
    decay: leaf names that decay, keys of `LEAVES` or others that `params` has.
      Only kernels by default, as decay would pull the scalars back to 0; De &
      Smith 2020 leave this open.
    other: see `param_labels`.

  Returns:
    A tree of bool like `params`, for `optax.add_decayed_weights(l2, mask)`.

  Raises:
    InputError: an unknown leaf name in `decay`; see also `param_labels`.
  """
  _check_other(other)
  decay = {decay} if isinstance(decay, str) else {*decay}
  paths = [names for names, _ in named_leaves(params)]
  known = {*LEAVES, *(names[-1] for names in paths if names)}
  for name in sorted(decay - known):
    raise InputError(unknown('leaf name in decay', name, sorted(known)))
  leaves = {(name,) for name in decay}
  mask = [
    names[-1:] in leaves or _label(names, other) == 'decay' for names in paths
  ]
  return jax.tree.unflatten(jax.tree.structure(params), mask)


def alphas(params: Any) -> dict[str, jax.Array]:
  """Finds the scalars of all residual branches, from input to output.

  Args:
    params: of a network whose blocks are numbered, or stacked for a scan; see
      `param_labels`.

  Returns:
    Block -> its alpha, shape (), under names like 'stage1/block2'. A block with
    several scalars has one name for each layer, like 'stage1/block2/out'.

  >>> block = {'out': {'alpha': 1}, 'mlp2': {'alpha': 2}}
  >>> alphas({'block1': block, 'block2': {'conv2': {'alpha': 3}}})
  {'block1/mlp2': 2, 'block1/out': 1, 'block2': 3}
  """
  layers: dict[tuple[str, ...], jax.Array] = {}
  for names, leaf in named_leaves(params):
    path = names[:-1]
    if names[-1:] != ('alpha',):
      continue
    if STACKED not in path or not leaf.ndim:
      layers[path] = leaf
      continue
    for i in range(leaf.shape[0]):
      numbered = (f'block{i + 2}' if n == STACKED else n for n in path)
      layers[tuple(numbered)] = leaf[i]
  blocks = collections.Counter(path[:-1] for path in layers)
  found: dict[str, jax.Array] = {}
  for path, leaf in layers.items():
    block = path[:-1]
    alone = block and blocks[block] == 1 and block not in layers
    found['/'.join(block if alone else path)] = leaf
  return {name: found[name] for name in in_order(found)}


def block_names(params: Any) -> list[str]:
  """Names the blocks of a network from input to output, as 'stage1/block2'."""
  names: list[str] = []
  for block, leaves in _by_block(params).items():
    if block.endswith(f'/{STACKED}'):
      stage, count = block.removesuffix(STACKED), leaves[0].shape[0]
      names += [f'{stage}block{i + 2}' for i in range(count)]
    else:
      names.append(block)
  return names


def block_norms(grads: Any) -> jax.Array:
  """Computes the norm of a gradient for every block.

  Args:
    grads: a tree like the parameters of a network, blocks numbered or stacked.

  Returns:
    (blocks,), in the order of `block_names`.
  """
  squares: list[jax.Array] = []
  for block, leaves in _by_block(grads).items():
    stacked = block.endswith(f'/{STACKED}')
    rows = leaves[0].shape[0] if stacked else 1
    sums = [jnp.square(leaf).reshape(rows, -1).sum(1) for leaf in leaves]
    squares.append(sum(sums[1:], start=sums[0]))
  return jnp.sqrt(jnp.concatenate(squares)) if squares else jnp.zeros(0)


def _by_block(tree: Any) -> dict[str, list[jax.Array]]:
  """The leaves of every block, or of a stage's stacked blocks, in order."""
  found: dict[str, list[jax.Array]] = {}
  for path, leaf in named_leaves(tree):
    names = '/'.join(path)
    if match := re.match(rf'(?:[^/]+/)*(?:block\d+|{STACKED})(?=/)', names):
      found.setdefault(match[0], []).append(leaf)
  return {block: found[block] for block in in_order(found)}


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names by the numbers in them: block2 before block10."""

  def order(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name)]

  return sorted(names, key=order)


def count_parameters(params: Any) -> dict[str, tuple[int, int]]:
  """Counts the arrays and their elements for every leaf name."""
  counts: dict[str, tuple[int, int]] = {}
  labels = jax.tree.leaves(param_labels(params, other='no_decay'))
  for label, leaf in zip(labels, jax.tree.leaves(params), strict=True):
    arrays, elements = counts.get(label, (0, 0))
    counts[label] = arrays + 1, elements + leaf.size
  return counts

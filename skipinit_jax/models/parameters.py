"""Which parameters decay, and which have a rate of their own, by leaf name."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.models.stages import STACKED

# Leaf name -> what it is. Total for every network of this package.
LEAVES = {
  'kernel': 'kernels of convolutions and dense layers',
  'bias': 'bias vectors, those of batch normalization included',
  'scale': "batch normalization's scales",
  'alpha': "the residual branches' scalars, Fixup's multipliers included",
  'scalar_bias': "Fixup's scalar biases",
}


def param_labels(params: Any, *, other: str | None = None) -> Any:
  """The leaf name of every parameter, a key of `LEAVES`.

  Args:
    params: nested dicts of arrays, or the state of an NNX module.
    other: 'decay' or 'no_decay', the label of leaves that `LEAVES` lacks; None
      makes them an error.

  Returns:
    A tree of str like `params`.

  Raises:
    InputError: an unknown leaf and no `other`; names the leaf.

  >>> param_labels({'block1': {'conv2': {'alpha': 0, 'kernel': 0}}})
  {'block1': {'conv2': {'alpha': 'alpha', 'kernel': 'kernel'}}}
  """
  if other not in (None, 'decay', 'no_decay'):
    raise InputError(f"other={other!r}: expected 'decay' or 'no_decay'")

  def label(path, _):
    if isinstance(path[-1], jax.tree_util.GetAttrKey):
      path = path[:-1]  # The value of an NNX variable.
    leaf = jax.tree_util.keystr(path[-1:], simple=True)
    if leaf in LEAVES:
      return leaf
    if other is None:
      where = jax.tree_util.keystr(path, simple=True, separator='/')
      raise InputError(
        f'parameter {where!r} has the unknown leaf name {leaf!r}; known are '
        f"{', '.join(LEAVES)}; other='decay' or other='no_decay' settles it"
      )
    return other

  return jax.tree_util.tree_map_with_path(label, params)


def decay_mask(
  params: Any,
  *,
  decay: Collection[str] = ('kernel',),
  other: str | None = None,
) -> Any:
  """True for the parameters that L2 regularization applies to.

  Args:
    params: nested dicts of arrays.
    decay: leaf names that decay, keys of `LEAVES`. Kernels by default: De &
      Smith 2020 leave this open, and a decayed scalar is pulled back to the
      identity.
    other: see `param_labels`.

  Returns:
    A tree of bool like `params`, for `optax.add_decayed_weights(l2, mask)`.
  """
  for name in decay:
    if name not in LEAVES:
      raise InputError(unknown('leaf name in decay', name, LEAVES))
  decays = {*decay, 'decay'}
  return jax.tree.map(
    lambda label: label in decays, param_labels(params, other=other)
  )


def alphas(params: Any) -> dict[str, jax.Array]:
  """The scalars of all residual branches, from the input to the output.

  Args:
    params: of a network whose blocks are numbered, or stacked for a scan.

  Returns:
    Block -> its alpha, shape (), as in 'stage1/block2'.
  """
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    block = '/'.join(names[:-2])
    if names[-1] == 'alpha' and STACKED in names:
      for i in range(leaf.shape[0]):
        found[block.replace(STACKED, f'block{i + 2}')] = leaf[i]
    elif names[-1] == 'alpha':
      found[block] = leaf
  return {block: found[block] for block in in_order(found)}


def block_names(params: Any) -> list[str]:
  """The blocks of a network, from the input to the output: 'stage1/block2'."""
  names = []
  for block, leaves in _by_block(params).items():
    if block.endswith(f'/{STACKED}'):
      stage, count = block.removesuffix(STACKED), leaves[0].shape[0]
      names += [f'{stage}block{i + 2}' for i in range(count)]
    else:
      names.append(block)
  return names


def block_norms(grads: Any) -> jax.Array:
  """The norm of every block's part of a gradient, (blocks,).

  Args:
    grads: like the parameters of a network, its blocks numbered or stacked; in
      the order of `block_names`.
  """
  squares = []
  for block, leaves in _by_block(grads).items():
    stacked = block.endswith(f'/{STACKED}')
    rows = leaves[0].shape[0] if stacked else 1
    squares.append(
      sum(jnp.square(leaf).reshape(rows, -1).sum(1) for leaf in leaves)
    )
  return jnp.sqrt(jnp.concatenate(squares)) if squares else jnp.zeros(0)


def _by_block(tree: Any) -> dict[str, list[jax.Array]]:
  """The leaves of every block, or of all stacked ones of a stage, in order."""
  found: dict[str, list[jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = jax.tree_util.keystr(path, simple=True, separator='/')
    if match := re.match(rf'(?:[^/]+/)*(?:block\d+|{STACKED})(?=/)', names):
      found.setdefault(match[0], []).append(leaf)
  return {block: found[block] for block in in_order(found)}


def in_order(names: Iterable[str]) -> list[str]:
  """Sorted by the numbers in them: block2 before block10."""

  def order(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name)]

  return sorted(names, key=order)


def count_parameters(params: Any) -> dict[str, tuple[int, int]]:
  """Number of arrays and of their elements for every leaf name, as found."""
  counts: dict[str, tuple[int, int]] = {}
  labels = jax.tree.leaves(param_labels(params, other='no_decay'))
  for label, leaf in zip(labels, jax.tree.leaves(params), strict=True):
    arrays, elements = counts.get(label, (0, 0))
    counts[label] = arrays + 1, elements + leaf.size
  return counts

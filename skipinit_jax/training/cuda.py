"""Parts of a training step in forms that take fewer kernels on NVIDIA GPUs.

Each form returns what the plain one does; other platforms have the plain one.
What they save was read from XLA's program for an H100, see docs/gpu.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint


def settle(grads: Any, *, summed: bool) -> Any:
  """The same gradients; for CUDA, in the layout that parameters have.

  cuDNN's kernels have their outputs first. Left alone, XLA updates parameters
  and momentum in that layout, and transposes and copies both back.

  Args:
    grads: a tree.
    summed: they are added to others next, in one kernel with the transpose.
      If not, they are written out once, for all that reads them.
  """

  def settled(x: jax.Array) -> jax.Array:
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return x if summed else jax.lax.optimization_barrier(x)

  return _for_cuda(functools.partial(jax.tree.map, settled), _same, grads)


def norm(tree: Any) -> jax.Array:
  """The norm of all leaves together, float32 ()."""
  return _for_cuda(norm_by_rows, optax.tree.norm, tree)


def norm_by_rows(tree: Any) -> jax.Array:
  """`norm`, with squares summed along the last axes first.

  That takes one kernel a leaf, a sum to a scalar takes two.
  """

  def rows(x: jax.Array) -> jax.Array:
    return jnp.square(x).sum(-1 if x.ndim else None).ravel()

  sums = jnp.concatenate([*map(rows, jax.tree.leaves(tree))])
  # Without a barrier XLA sums each leaf to a scalar after all.
  return jnp.sqrt(jax.lax.optimization_barrier(sums).sum())


def join_scalars(tree: Any) -> Any:
  """The same tree; for CUDA its scalars are computed together.

  Each would have kernels of its own: two and a copy for every alpha.
  """
  return _for_cuda(scalars_by_vectors, _same, tree)


def scalars_by_vectors(tree: Any) -> Any:
  """The same tree, its scalars taken from one vector for each dtype."""
  leaves, treedef = jax.tree.flatten(tree)
  scalars: dict[Any, list[int]] = {}
  for place, leaf in enumerate(leaves):
    if not leaf.ndim:
      scalars.setdefault(leaf.dtype, []).append(place)
  for places in scalars.values():
    vector = jnp.stack([leaves[place] for place in places])
    vector = jax.lax.optimization_barrier(vector)
    for place, value in zip(places, vector, strict=True):
      leaves[place] = value
  return treedef.unflatten(leaves)


def _for_cuda(form: Callable, plain: Callable, tree: Any) -> Any:
  return jax.lax.platform_dependent(tree, cuda=form, default=plain)


def _same(tree: Any) -> Any:
  return tree

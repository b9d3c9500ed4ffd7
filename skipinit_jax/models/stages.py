"""A stage of residual blocks, unrolled or scanned, with convertible parameters.

Unrolled, a stage holds `block1` ... `blockN`. Scanned, it holds `block1`, which
may change the shape, and `blocks`: the others, all equal, with their leaves
stacked along a new first axis. `stack_blocks` and `unstack_blocks` convert one
tree into the other without loss.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from skipinit_jax.errors import InputError

# run(block, x, beta), or several blocks and their betas.
Run = Callable[[nn.Module, jax.Array, Any], jax.Array]

STACKED = 'blocks'
# Collection -> the axis along which a scan stacks the leaves of its blocks.
AXES: dict[Any, Any] = {'params': 0, 'batch_stats': 0, 'intermediates': 0}


class Stage(nn.Module):
  """`size` blocks, of which only the first may change the shape.

  Attributes:
    block: called as block(strides=..., name=...), makes a block.
    size: number of blocks.
    strides: of the first block.
    scan: run the equal blocks as one scanned block, so that compile time and
      program size don't grow with the depth.
    remat: keep only the inputs of blocks (scanned: of groups of blocks, see
      `group_size`) for the backward pass, and recompute the rest.
    betas: passed to the blocks, one to each, as `beta`; None: nothing is.
  """

  block: Callable[..., Any]
  size: int
  strides: int
  scan: bool = False
  remat: bool = False
  betas: Sequence[float] | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (batch, ...) to (batch, ...) by all blocks in turn.

    Raises:
      InputError: parameters of a scanned stage in an unrolled one, or the
        reverse.
    """

    def run(block: Any, x: jax.Array, beta: Any) -> jax.Array:
      options = {} if beta is None else {'beta': beta}
      return block(x, train=train, **options)

    def split(leaf: jax.Array) -> jax.Array:
      return leaf.reshape(-1, size, *leaf.shape[1:])

    def merge(leaf: jax.Array) -> jax.Array:
      return leaf.reshape(-1, *leaf.shape[2:])

    scanned = self.scan and self.size > 1
    self._check_form(scanned)
    recomputed = functools.partial(nn.remat, prevent_cse=not scanned)
    each: Run = recomputed(run) if self.remat else run
    first, *betas = self.betas or [None] * self.size
    x = each(self.block(strides=self.strides, name='block1'), x, first)
    if not scanned:
      for i, beta in enumerate(betas, start=2):
        x = each(self.block(strides=1, name=f'block{i}'), x, beta)
      return x

    blocks, length = self.block(strides=1, name=STACKED), self.size - 1
    stacked = None if self.betas is None else jnp.asarray(betas)
    if not self.remat or self.is_initializing():
      return _scan(run, length)(blocks, x, stacked)
    size = group_size(length)
    groups = nn.map_variables(
      _scan(recomputed(_scan(run, size)), length // size),
      list(AXES),
      functools.partial(jax.tree.map, split),
      functools.partial(jax.tree.map, merge),
      mutable=True,
    )
    return groups(blocks, x, jax.tree.map(split, stacked))

  def _check_form(self, scanned: bool) -> None:
    other = 'block2' if scanned else STACKED
    if self.size > 1 and self.has_variable('params', other):
      turn = 'stack_blocks' if scanned else 'unstack_blocks'
      raise InputError(
        f"{'/'.join(self.path) or 'a stage'} has parameters '{other}', those "
        f'of scan={not scanned}: expected a network with scan={not scanned}, '
        f'or skipinit_jax.models.{turn}(variables)'
      )


def _scan(run: Run, length: int) -> Run:
  """Scans `run` over `length` blocks, each of which gets the last x.

  Betas (length, ...) are scanned along; None passes None to every block.
  """

  def step(block: nn.Module, x: jax.Array, beta: Any) -> tuple[jax.Array, None]:
    return run(block, x, beta), None

  scan = nn.scan(
    step, variable_axes=AXES, split_rngs={'params': True}, length=length
  )
  return lambda block, x, betas: scan(block, x, betas)[0]


def group_size(length: int) -> int:
  """How many blocks to recompute together: the largest divisor up to the root.

  The backward pass then keeps length / size inputs of groups and the
  activations of one group, instead of `length` inputs, for the same one
  recomputation (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

  >>> group_size(1665)
  37
  """
  return max(k for k in range(1, math.isqrt(length) + 1) if length % k == 0)


def unstack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a scanned network's tree to the unrolled one's.

  Args:
    tree: nested dicts of arrays: parameters, statistics, or an optimizer state
      as `flax.serialization.to_state_dict` gives it.

  Returns:
    The same with each `blocks`, leaves (n, ...), as `block2` ... `block{n+1}`.
  """
  out: dict[str, Any] = {}
  for name, value in tree.items():
    if name == STACKED:
      for i in range(len(jax.tree.leaves(value)[0])):
        out[f'block{i + 2}'] = jax.tree.map(operator.itemgetter(i), value)
    else:
      is_tree = isinstance(value, Mapping)
      out[name] = unstack_blocks(value) if is_tree else value
  return out


def stack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Converts an unrolled network's tree to the scanned one's.

  The inverse of `unstack_blocks`. All blocks of a stage from the second on must
  have equal shapes.
  """
  numbers = sorted(
    int(m[1]) for name in tree if (m := re.fullmatch(r'block(\d+)', name))
  )
  rest = [f'block{i}' for i in numbers if i > 1]
  out = {
    name: stack_blocks(value) if isinstance(value, Mapping) else value
    for name, value in tree.items()
    if name not in rest
  }
  if rest:
    out[STACKED] = jax.tree.map(_stack, *(tree[name] for name in rest))
  return out


def _stack(*leaves: Any) -> Any:
  module = np if isinstance(leaves[0], np.ndarray) else jnp
  return module.stack(leaves)

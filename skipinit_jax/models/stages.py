"""A stage of residual blocks, unrolled or scanned, over one set of parameters.

Unrolled, a stage holds `block1` ... `blockN`. Scanned, it holds `block1`, which
may change the shape, and `blocks`: the others, equal, with their leaves stacked
along a new first axis. `stack_blocks` and `unstack_blocks` turn the one tree
into the other without loss.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from skipinit_jax.errors import InputError

STACKED = 'blocks'
# Along which a scan stacks the leaves of its blocks.
AXES = {'params': 0, 'batch_stats': 0, 'intermediates': 0}


class Stage(nn.Module):
  """`size` blocks, of which only the first may change the shape.

  Attributes:
    block: called as block(strides=..., name=...), makes a block.
    size: number of blocks.
    strides: of the first block.
    scan: run the equal blocks as one scanned block: compile time and program
      size no longer grow with the depth.
    remat: keep only the inputs of blocks (scanned: of groups of blocks, see
      `group_size`) for the backward pass, and compute them again.
  """

  block: Callable[..., nn.Module]
  size: int
  strides: int
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: (batch, height, width, channels)."""

    def run(block: nn.Module, x: jax.Array) -> jax.Array:
      return block(x, train=train)

    scanned = self.scan and self.size > 1
    self._check_form(scanned)
    again = functools.partial(nn.remat, prevent_cse=not scanned)
    each = again(run) if self.remat else run
    x = each(self.block(strides=self.strides, name='block1'), x)
    if not scanned:
      for i in range(2, self.size + 1):
        x = each(self.block(strides=1, name=f'block{i}'), x)
      return x

    blocks, length = self.block(strides=1, name=STACKED), self.size - 1
    run = again(run, policy=keep)
    if not self.remat or self.is_initializing():
      return _repeat(run, length)(blocks, x)
    size = group_size(length)
    groups = _repeat(again(_repeat(run, size)), length // size)
    cut = nn.map_variables(
      groups,
      list(AXES),
      lambda tree: jax.tree.map(
        lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree
      ),
      lambda tree: jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree
      ),
      mutable=True,
    )
    return cut(blocks, x)

  def _check_form(self, scanned: bool) -> None:
    other = 'block2' if scanned else STACKED
    if self.size > 1 and self.has_variable('params', other):
      turn = 'stack_blocks' if scanned else 'unstack_blocks'
      raise InputError(
        f"{'/'.join(self.path) or 'a stage'} has parameters '{other}', those "
        f'of scan={not scanned}: expected a network with scan={not scanned}, '
        f'or skipinit_jax.models.{turn}(variables)'
      )


def _repeat(run: Callable, length: int) -> Callable:
  """Scans run(block, x) over so many blocks, x going from one to the next."""
  scan = nn.scan(
    lambda block, x, _: (run(block, x), None),
    variable_axes=AXES,
    split_rngs={'params': True},
    length=length,
  )
  return lambda block, x: scan(block, x, None)[0]


def group_size(length: int) -> int:
  """Blocks recomputed together: the largest divisor up to the square root.

  The backward pass then keeps length / size inputs of groups and what one
  group needs, instead of `length` inputs, for the same one recomputation.

  >>> group_size(1665)
  37
  """
  return max(k for k in range(1, math.isqrt(length) + 1) if length % k == 0)


def keep(primitive: jax.extend.core.Primitive, *_, **__) -> bool:
  """What a scanned block keeps for its backward pass: all but comparisons.

  ReLU's mask is made again from its output. A scan keeps whatever its body
  hands on, the masks too: a third of the memory.
  """
  return primitive is not jax.lax.gt_p


def unstack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The unrolled network's tree from the scanned one's.

  Args:
    tree: nested dicts of arrays: parameters, statistics, or an optimizer state
      as `flax.serialization.to_state_dict` gives it.

  Returns:
    The same with each `blocks`, leaves (n, ...), as `block2` ... `block{n+1}`.
  """
  out = {}
  for name, value in tree.items():
    if name == STACKED:
      length = jax.tree.leaves(value)[0].shape[0]
      for i in range(length):
        out[f'block{i + 2}'] = jax.tree.map(lambda x, i=i: x[i], value)
    else:
      is_tree = isinstance(value, Mapping)
      out[name] = unstack_blocks(value) if is_tree else value
  return out


def stack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The scanned network's tree from the unrolled one's; see `unstack_blocks`.

  Blocks from the second on must have equal shapes, as in every stage here.
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


def _stack(*leaves):
  module = np if isinstance(leaves[0], np.ndarray) else jnp
  return module.stack(leaves)

"""How a step is mapped over devices: everything about `jax.pmap` is here."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'batch'


def map_over_devices(
  step: Callable,
  in_axes: tuple,
  devices: Sequence[jax.Device] | None = None,
  **pmap_args,
) -> Callable:
  """Maps a step over devices; results are equal on all.

  Args:
    step: pure, under the mapped axis `AXIS`.
    in_axes: by argument, None for ordinary replicated trees, 0 for leaves
      stacked by device.
    devices: to compile for; None: all of every process.
    **pmap_args: more arguments of `jax.pmap`.

  Returns:
    The mapped step, whose results are not stacked.
  """
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=in_axes,
    out_axes=None,
    devices=devices,
    **pmap_args,
  )


def replicate(tree: Any) -> Any:
  """Puts a tree on every device of this process, where pmap expects it."""
  return jax.device_put(tree, _sharding())


def shard(tree: Any) -> Any:
  """Cuts leaves (batch, ...) of this process over its devices.

  Returns:
    Leaves (devices, batch / devices, ...), on the devices.
  """
  n = jax.local_device_count()
  return jax.device_put(
    jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree),
    _sharding(AXIS),
  )


@functools.cache
def tell(stop: bool = False, replaced: int = 0) -> dict[str, jax.Array]:
  """What this process tells the others in a step, on its devices.

  Args:
    stop: it was asked to stop.
    replaced: images of its part of the batch that could not be read.
  """
  values = {'stop': stop, 'replaced': replaced}
  first = np.arange(jax.local_device_count()) == 0
  return jax.device_put(
    {name: np.int32(v) * first for name, v in values.items()}, _sharding(AXIS)
  )


def _sharding(*axes: str) -> NamedSharding:
  # The mesh is pmap's own, so that the step compiles once and not twice.
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(*axes))

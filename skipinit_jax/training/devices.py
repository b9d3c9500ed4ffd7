"""Devices: their set-up, and how steps and arrays are mapped over them."""

import functools
import glob
import importlib.util
import mmap
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError

# Device files of accelerators, and what to install for them.
ACCELERATORS = {
  '/dev/nvidia[0-9]*': ('GPU', "pip install 'jax[cuda13]' (or 'jax[cuda12]')"),
  '/dev/accel[0-9]*': ('TPU', "pip install 'jax[tpu]'"),
}
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'
# Convolutions by Eigen instead of YNNPACK; see docs/cpu.md for what it gains.
CPU_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
CPU_VALUE = 'individual_convolution'

AXIS = 'batch'  # Name of the axis that `jax.pmap` maps.


def map_over_devices(
  step: Callable,
  split: Sequence[bool],
  devices: Sequence[Any] | None = None,
  **pmap_args,
) -> Callable:
  """Maps a step over devices; results are equal on all.

  Args:
    step: pure, under the mapped axis `AXIS`.
    split: for each argument, whether its leaves are stacked by device, or the
      same on all devices.
    devices: of JAX, to compile for; None: all of every process.
    **pmap_args: more arguments of `jax.pmap`.

  Returns:
    The mapped step, whose results are not stacked.
  """
  if not any(split):  # pmap needs one argument that is stacked.
    mapped = map_over_devices(
      lambda *args: step(*args[:-1]), (*split, True), devices, **pmap_args
    )
    return lambda *args: mapped(*args, message())
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=tuple(0 if stacked else None for stacked in split),
    out_axes=None,
    devices=devices,
    **pmap_args,
  )


def replicate(tree: Any) -> Any:
  """Puts a tree on every device of this process, where pmap expects it."""
  return jax.device_put(tree, _sharding())


def shard(tree: Any) -> Any:
  """Splits leaves (batch, ...) of this process over its devices.

  Returns:
    Leaves (devices, batch / devices, ...), on the devices.
  """
  n = jax.local_device_count()
  return jax.device_put(
    jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree),
    _sharding(AXIS),
  )


@functools.cache
def message(stop: bool = False, replaced: int = 0) -> dict[str, jax.Array]:
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
  # As pmap has it, so that the step compiles only once.
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(*axes))


def set_deterministic(config: ConfigDict) -> None:
  """Asks XLA for the same bits in every run; call it before JAX finds devices.

  CPUs and TPUs are deterministic anyway. GPUs otherwise take some sums in the
  order in which their parts happen to finish.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if config.deterministic and DETERMINISTIC not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC}'.strip()


def set_cpu_flag() -> None:
  """Has XLA use faster convolutions on CPUs; call before JAX finds devices.

  Only on x86, where it was measured; not if XLA_FLAGS says something of it, if
  this XLA does not know it, or if another plugin reads the same flags: an
  unknown one would end the process.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if CPU_FLAG in flags or (flags and not flags.startswith('-')):  # A file.
    return
  if platform.machine() not in ('x86_64', 'AMD64') or not only_cpus():
    return
  names = CPU_FLAG.removeprefix('--'), CPU_VALUE.upper()
  if all(map(_is_in_jaxlib, names)):
    os.environ['XLA_FLAGS'] = f'{flags} {CPU_FLAG}=-{CPU_VALUE}'.strip()


def only_cpus() -> bool:
  """Whether JAX will look for no other devices than CPUs."""
  plugins = ('libtpu', 'jax_plugins')
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(
    map(importlib.util.find_spec, plugins)
  )


def _is_in_jaxlib(name: str) -> bool:
  """Whether the library of XLA holds a text."""
  for path in Path(jaxlib.__file__).parent.glob('libjax_common.*'):
    with (
      path.open('rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
      if content.find(name.encode()) >= 0:
        return True
  return False


def check_devices(config: ConfigDict) -> None:
  """Raises InputError unless the devices are what the recipe needs."""
  on_gpu = jax.default_backend() == 'gpu'
  flags = os.environ.get('XLA_FLAGS', '')
  if config.deterministic and on_gpu and DETERMINISTIC not in flags:
    raise InputError(
      f'deterministic=True on a GPU needs XLA_FLAGS={DETERMINISTIC} before JAX '
      'finds its devices'
    )
  if config.allow_cpu or jax.default_backend() != 'cpu':
    return
  for files, (kind, install) in ACCELERATORS.items():
    if glob.glob(files):
      raise InputError(
        f'this machine has a {kind}, but JAX sees only the CPU: {install}, '
        'or train on the CPU with --config.allow_cpu=True'
      )


def set_compilation_cache(folder: str) -> None:
  """Caches compiled programs in a folder, unless JAX already has one."""
  if folder and jax.config.values['jax_compilation_cache_dir'] is None:
    path = str(Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

"""Chips to compile for, which need not be here: slices of TPUs, and GPUs."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from skipinit_jax.errors import InputError, unknown

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What bounds a step on one chip.

  Attributes:
    flops: peak rate in bfloat16, per second, of dense products.
    bandwidth: of its memory, bytes per second.
    capacity: of its memory, bytes.
  """

  flops: float
  bandwidth: float
  capacity: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
  """A TPU chip.

  Attributes:
    topologies: names of slices that the compiler knows, after the colon.
    megacore: its two cores are one device, and the compiler must be told.
  """

  topologies: tuple[str, ...]
  megacore: bool = False


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
  """A GPU, with what the CUDA compiler asks about it.

  Attributes:
    capability: compute capability, a key of CAPABILITIES.
    cores: streaming multiprocessors.
    l2: size of the L2 cache, bytes.
    clock: boost, GHz.
    name: as its driver gives it.
  """

  capability: tuple[int, int]
  cores: int
  l2: int
  clock: float
  name: str

  @property
  def usable(self) -> float:
    """What JAX takes of the memory unless told otherwise, bytes."""
    return PREALLOCATED * self.capacity

  def description(self) -> str:
    """XLA's GpuTargetConfigProto of this GPU, as text."""
    shared, threads, units = CAPABILITIES[self.capability]
    major, minor = self.capability
    fields = {
      'threads_per_block_limit': 1024,
      'threads_per_warp': 32,
      'shared_memory_per_block': 48 * 1024,
      'shared_memory_per_core': shared * 1024,
      'shared_memory_per_block_optin': (shared - 1) * 1024,
      'threads_per_core_limit': threads,
      'core_count': self.cores,
      'fpus_per_core': units,
      'block_dim_limit_x': 2**31 - 1,
      'block_dim_limit_y': 2**16 - 1,
      'block_dim_limit_z': 2**16 - 1,
      'memory_bandwidth': round(self.bandwidth),
      'l2_cache_size': self.l2,
      'clock_rate_ghz': self.clock,
      'device_memory_size': round(self.capacity),
      'registers_per_core_limit': 2**16,
      'registers_per_block_limit': 2**16,
    }
    lines = ' '.join(f'{name}: {value}' for name, value in fields.items())
    return (
      f'gpu_device_info {{ {lines} '
      f'cuda_compute_capability {{ major: {major} minor: {minor} }} }} '
      f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} '
      f'device_description_str: "{self.name}"'
    )


SQUARES = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
# Figures: docs.cloud.google.com/tpu/docs, pages v3, v4, v5e, v5p, v6e and
# tpu7x. The page of v2 has none: those of JAX 0.10.2,
# jax/_src/pallas/mosaic/tpu_info.py.
TPUS = {
  'v2': Tpu(46e12, 716e9, 16e9, ('2x2', '4x4')),
  'v3': Tpu(123e12, 900e9, 32 * GIB, ('2x2', '4x4')),
  'v4': Tpu(275e12, 1200e9, 32 * GIB, ('2x2x1', '2x2x2', '4x4x4'), True),
  'v5e': Tpu(197e12, 819e9, 16 * GIB, SQUARES),
  'v5p': Tpu(459e12, 2765e9, 95 * GIB, ('2x2x1', '2x2x2', '4x4x4')),
  'v6e': Tpu(918e12, 1638e9, 32 * GIB, SQUARES),
  'tpu7x': Tpu(2307e12, 7380e9, 192 * GIB, ('2x2x1',)),
}
# Compute capability -> KiB of shared memory and threads of a multiprocessor,
# and its units for float32: NVIDIA's CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
CAPABILITIES = {
  (8, 0): (164, 2048, 64),
  (8, 9): (100, 1536, 128),
  (9, 0): (228, 2048, 128),
  (10, 0): (228, 2048, 128),
}
# Rates: NVIDIA's data sheets (SXM where there are several; of the HGX B200),
# those "with sparsity" halved. The rest: what drivers report, as in XLA's own
# descriptions (xla/backends/gpu/target_config/specs): more memory than the name
# says. XLA has no L4 and L40S: NVIDIA's data sheets and white paper.
GPUS = {
  'a100-40gb': Gpu(
    312e12,
    1555e9,
    42.33e9,
    (8, 0),
    108,
    40 << 20,
    1.41,
    'NVIDIA A100-SXM4-40GB',
  ),
  'a100': Gpu(
    312e12, 2039e9, 85.1e9, (8, 0), 108, 40 << 20, 1.41, 'NVIDIA A100-SXM4-80GB'
  ),
  'l4': Gpu(121e12, 300e9, 24e9, (8, 9), 58, 48 << 20, 2.04, 'NVIDIA L4'),
  'l40s': Gpu(362e12, 864e9, 48e9, (8, 9), 142, 96 << 20, 2.52, 'NVIDIA L40S'),
  'h100': Gpu(
    989e12,
    3352e9,
    84.94e9,
    (9, 0),
    132,
    50 << 20,
    1.98,
    'NVIDIA H100 80GB HBM3',
  ),
  'h200': Gpu(
    989e12, 4800e9, 151.4e9, (9, 0), 132, 50 << 20, 1.98, 'NVIDIA H200'
  ),
  'b200': Gpu(
    2250e12, 7672e9, 191.5e9, (10, 0), 148, 132_644_864, 1.965, 'NVIDIA B200'
  ),
}
CHIPS = TPUS | GPUS
PER_HOST = 8  # GPUs of one host, at most.
PREALLOCATED = 0.75  # Share of a GPU's memory that JAX takes, by its docs.
CUDA_PACKAGES = ('jax-cuda13-pjrt', 'jax-cuda12-pjrt')  # The compiler.
COMPILERS = ('libtpu', *CUDA_PACKAGES)
INSTALL_TPU = 'pip install libtpu'
INSTALL_GPU = "pip install 'jax[cuda13]' (or 'jax[cuda12]'); no GPU is needed"
# Read when libtpu is loaded. Other processes may have it loaded too, and there
# is neither a metadata server nor a TPU to ask about.
TPU_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
GPU_ENVIRONMENT = {'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}  # Asks a driver.


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips to compile for.

  Attributes:
    name: such as 'v5e:2x2' or 'h100x8'.
    chip: of which kind.
    chips, hosts: their numbers.
    devices: as JAX sees them: one a chip, or one a core.
  """

  name: str
  chip: Chip
  chips: int
  hosts: int
  devices: tuple[Any, ...]

  @property
  def cores(self) -> int:
    """Devices a chip."""
    return len(self.devices) // self.chips


def topology(name: str) -> Slice:
  """The slice of a name such as 'v5e:2x2' or 'h100x8'; none need be here.

  Raises:
    InputError: an unknown chip or number of them, or the compiler is missing,
      of another version, or in use.
  """
  kind, count = _kind_and_count(name)
  if kind in GPUS:
    return _gpus(name, kind, count)
  if kind in TPUS:
    return _tpus(name, kind)
  raise InputError(unknown('chip', kind, CHIPS))


def platform_of(name: str) -> str:
  """'tpu' or 'gpu', by a topology's name."""
  return 'gpu' if _kind_and_count(name)[0] in GPUS else 'tpu'


def _kind_and_count(name: str) -> tuple[str, str]:
  """The chip, and for a GPU how many, in the words of the name."""
  found = re.fullmatch(r'(.+?)(?:x(\d{1,6})|:.*)?', name, re.DOTALL)
  return (found[1], found[2] or '1') if found else (name, '1')


def _tpus(name: str, kind: str) -> Slice:
  known = [f'{kind}:{shape}' for shape in TPUS[kind].topologies]
  if name not in known:
    raise InputError(unknown('topology', name, known))
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(f'compiling for a TPU needs its compiler: {INSTALL_TPU}')
  for variable, value in TPU_ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {'chip_config_name': 'megacore'} if TPUS[kind].megacore else {}
  devices = _devices('tpu', name, topology_name=name, **options)
  return Slice(
    name=name,
    chip=TPUS[kind],
    chips=len({tuple(d.coords) for d in devices}),
    hosts=len({d.process_index for d in devices}),
    devices=devices,
  )


def _gpus(name: str, kind: str, count: str) -> Slice:
  chips = int(count)
  hosts, rest = divmod(chips, PER_HOST)
  if ':' in name or not chips or (hosts and rest):
    raise InputError(
      f'topology {name!r}: expected {kind}x1 to {kind}x{PER_HOST}, or a '
      f'multiple of {PER_HOST} for several hosts'
    )
  _check_cuda()
  for variable, value in GPU_ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  hosts = hosts or 1
  shape = f'1x{hosts}x{chips // hosts}'
  devices = _devices(
    'cuda',
    name,
    topology_name=shape,
    topology=shape,
    target_config=GPUS[kind].description(),
  )
  return Slice(name, GPUS[kind], chips, hosts, devices)


def _check_cuda() -> None:
  """Raises InputError unless the CUDA compiler is here, as new as jaxlib."""
  installed = {}
  for package in ('jaxlib', *CUDA_PACKAGES):
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  jaxlib = installed.pop('jaxlib')
  if not installed:
    raise InputError(f'compiling for a GPU needs its compiler: {INSTALL_GPU}')
  for package, version in installed.items():
    if version != jaxlib:
      raise InputError(
        f'{package} {version} does not go with jaxlib {jaxlib}: expected '
        f'{package} {jaxlib}'
      )


def compilers() -> dict[str, str]:
  """The versions of the compilers that are installed."""
  installed = importlib.metadata.packages_distributions()
  there = {name for names in installed.values() for name in names}
  return {
    name: importlib.metadata.version(name)
    for name in COMPILERS
    if name in there
  }


def _devices(platform: str, name: str, **options: str) -> tuple[Any, ...]:
  try:
    description = topologies.get_topology_desc(platform=platform, **options)
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    raise InputError(_reason(name, str(error))) from None
  return tuple(description.devices)


def _reason(name: str, message: str) -> str:
  first = message.strip().splitlines()[0]
  if 'lockfile' in message or 'already in use' in message:
    return (
      f'another process holds libtpu ({first}); wait for it, or set '
      'ALLOW_MULTIPLE_LIBTPU_LOAD=1 in both'
    )
  return f'the compiler does not take {name}: {first}'

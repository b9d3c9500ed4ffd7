"""TPU chips, and slices of them that need not be here."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from skipinit_jax.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    flops: peak rate in bfloat16, per second.
    bandwidth: of the HBM, bytes per second.
    capacity: of the HBM, bytes.
    topologies: names of slices that the compiler knows, after the colon.
    megacore: its two cores are one device, and the compiler must be told.
  """

  flops: float
  bandwidth: float
  capacity: float
  topologies: tuple[str, ...]
  megacore: bool = False


GIB = 2**30
SQUARES = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
DOCS = 'https://docs.cloud.google.com/tpu/docs'
# Figures: DOCS/v3, /v4, /v5e, /v5p, /v6e and /tpu7x. The page of v2 has none:
# those of JAX, jax/_src/pallas/mosaic/tpu_info.py in version 0.10.2.
CHIPS = {
  'v2': Chip(46e12, 716e9, 16e9, ('2x2', '4x4')),
  'v3': Chip(123e12, 900e9, 32 * GIB, ('2x2', '4x4')),
  'v4': Chip(
    275e12, 1200e9, 32 * GIB, ('2x2x1', '2x2x2', '4x4x4'), megacore=True
  ),
  'v5e': Chip(197e12, 819e9, 16 * GIB, SQUARES),
  'v5p': Chip(459e12, 2765e9, 95 * GIB, ('2x2x1', '2x2x2', '4x4x4')),
  'v6e': Chip(918e12, 1638e9, 32 * GIB, SQUARES),
  'tpu7x': Chip(2307e12, 7380e9, 192 * GIB, ('2x2x1',)),
}
INSTALL = 'pip install libtpu'
# Read when libtpu is loaded. Other processes may have it loaded too, and there
# is neither a metadata server nor a TPU to ask about.
ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips to compile for.

  Attributes:
    name: such as 'v5e:2x2'.
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
  """The slice of a name such as 'v5e:2x2'; no such hardware is needed.

  Raises:
    InputError: an unknown chip or topology, or libtpu is missing or in use.
  """
  kind = name.partition(':')[0]
  if kind not in CHIPS:
    raise InputError(unknown('chip', kind, CHIPS))
  known = [f'{kind}:{shape}' for shape in CHIPS[kind].topologies]
  if name not in known:
    raise InputError(unknown('topology', name, known))
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(f'compiling for a TPU needs its compiler: {INSTALL}')
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {'chip_config_name': 'megacore'} if CHIPS[kind].megacore else {}
  try:
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise InputError(_reason(name, str(error))) from None
  devices = tuple(description.devices)
  return Slice(
    name=name,
    chip=CHIPS[kind],
    chips=len({tuple(d.coords) for d in devices}),
    hosts=len({d.process_index for d in devices}),
    devices=devices,
  )


def _reason(name: str, message: str) -> str:
  first = message.strip().splitlines()[0]
  if 'lockfile' in message or 'already in use' in message:
    return (
      f'another process holds libtpu ({first}); wait for it, or set '
      'ALLOW_MULTIPLE_LIBTPU_LOAD=1 in both'
    )
  return f'the TPU compiler does not take {name}: {first}'

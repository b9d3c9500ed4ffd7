"""What a step costs on chips, from their compiler: no chip is needed."""

import copy
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.ahead_of_time.chips import GIB, PREALLOCATED, Gpu, Slice
from skipinit_jax.ahead_of_time.counts import count
from skipinit_jax.data.dataset import Dataset
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.errors import InputError
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.describe import less_memory
from skipinit_jax.training.network import build_model
from skipinit_jax.training.program import Program, make_program

# Figures that need a compiled program.
COMPILED = (
  'flops',
  'bytes_accessed',
  'hbm_bytes',
  'activation_bytes',
  'peak_bytes',
  'compute_seconds',
  'memory_seconds',
  'collectives',
  'collective_bytes',
  'sorts',
)
MICRO_BATCHES = (1, 2, 4, 8)
LARGEST_BATCH = 2**14  # A chip, where the search for one ends.


def check(config: ConfigDict, platform: str) -> None:
  """Raises InputError for a recipe that can't be on any slice.

  Args:
    config: a recipe.
    platform: 'tpu' or 'gpu'.
  """
  check_config(config, 1)
  build_model(config, stand_in(config.data).num_classes, platform)


def measure(
  config: ConfigDict,
  where: Slice,
  *,
  evaluation: bool = True,
  data: Dataset | None = None,
) -> dict[str, Any]:
  """Compiles a recipe's training step for a slice, and counts.

  Args:
    config: a recipe; its batch_size is over all devices of the slice.
    where: what to compile for.
    evaluation: compile the evaluation step too.
    data: its sizes are taken; None: a stand-in's.

  Returns:
    Per chip and step in SI units, unless the name says otherwise:
    batch_per_chip, micro_batches, parameter_bytes, optimizer_bytes, the fields
    of `cost`, images_per_second_bound (the smaller of what the chip can compute
    and what its memory can carry; a GPU can be faster where its L2 cache holds
    what a kernel reads), and as `evaluation` the fields of `cost` for
    the evaluation step. Where the step does not fit, what only a compiled
    program can tell is None.

  Raises:
    InputError: a recipe that can't be, or not on this slice.
  """
  program, data, args = compute(config, where, data)
  state, _, host, _ = args
  n = len(where.devices)
  batch = config.batch_size // where.chips
  result = {
    'topology': where.name,
    'chips': where.chips,
    'hosts': where.hosts,
    'batch_per_chip': batch,
    'micro_batches': config.micro_batches,
    'parameter_bytes': where.cores * _bytes(state.params),
    'optimizer_bytes': where.cores * _bytes(state.opt_state),
    **cost(program.train_step, args, where),
  }
  result['images_per_second_bound'] = None
  if result['fits']:
    seconds = max(result['compute_seconds'], result['memory_seconds'])
    result['images_per_second_bound'] = batch / seconds
  if evaluation:
    rows = -(-config.eval_batch_size // n)
    images, labels = _batch((n, rows), data)
    mask = _shape((n, rows), np.bool_)
    variables = state.params, state.batch_stats
    args = (*variables, images, labels, mask, host)
    result['evaluation'] = cost(program.eval_step, args, where)
  return result


def compute(
  config: ConfigDict, where: Slice, data: Dataset | None = None
) -> tuple[Program, Dataset, tuple[Any, ...]]:
  """What a recipe computes on a slice, and the arguments to lower it with.

  Returns:
    The program for the slice's devices, the data that it is for, and shapes for
    `Program.train_step`.

  Raises:
    InputError: a recipe that can't be, or not on this slice.
  """
  n = len(where.devices)
  check_config(config, n)
  data = data or stand_in(config.data)
  program = make_program(config, data, where.devices)
  state = jax.eval_shape(program.initial_state, 0, 0.0)
  message = {name: _shape((n,), np.int32) for name in ('stop', 'replaced')}
  if data.resident:
    # What `Resident.inputs` yields.
    pixels = data.train_size, math.prod(data.image_shape)
    inputs = _shape(pixels, np.uint8), _shape(pixels[:1], np.int32)
  else:
    inputs = _batch((n, config.batch_size // n), data)
  return program, data, (state, inputs, message, 1)


def cost(step: Callable, args: tuple, where: Slice) -> dict[str, Any]:
  """Compiles any pmapped step, and counts.

  Args:
    step: of `jax.pmap`, with the slice's devices.
    args: of the step, `jax.ShapeDtypeStruct`s for arrays.
    where: what the step is mapped over.

  Returns:
    Per chip: trace_seconds and compile_seconds (of this machine), flops and
    hbm_bytes (see `counts`), bytes_accessed (the compiler's own; None for
    GPUs), activation_bytes (its temporary memory), peak_bytes,
    hbm_capacity_bytes, fits, over_bytes (by how much it does not fit),
    compute_seconds (at the peak rate in bfloat16), memory_seconds, collectives
    and collective_bytes (handed to them), sorts, and for GPUs launches,
    usable_bytes (what JAX takes of the memory unless told otherwise) and
    workspace_bytes: None, since cuDNN chooses it on a GPU, so that the memory
    is a lower bound. Where the step does not fit a TPU, the figures that need a
    compiled program are None.
  """
  cores, chip = where.cores, where.chip
  start = time.perf_counter()
  lowered = step.lower(*args)
  traced = time.perf_counter()
  compiled, over = _compile(lowered)
  result = {
    'trace_seconds': traced - start,
    'compile_seconds': time.perf_counter() - traced,
    'hbm_capacity_bytes': chip.capacity,
    'fits': compiled is not None,
    'over_bytes': cores * over,
  }
  if compiled is None:
    return result | dict.fromkeys(COMPILED)
  memory = compiled.memory_analysis()
  counts = count(compiled.as_text()).times(cores)
  accessed = (compiled.cost_analysis() or {}).get('bytes accessed')
  values = (
    counts.flops,
    accessed and cores * accessed,
    counts.hbm_bytes,
    cores * memory.temp_size_in_bytes,
    cores * memory.peak_memory_in_bytes,
    counts.flops / chip.flops,
    counts.hbm_bytes / chip.bandwidth,
    counts.collectives,
    counts.collective_bytes,
    counts.sorts,
  )
  result |= zip(COMPILED, values, strict=True)
  if isinstance(chip, Gpu):  # Its compiler refuses nothing.
    peak = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )
    result |= {
      'peak_bytes': peak,
      'usable_bytes': chip.usable,
      'fits': peak <= chip.usable,
      'over_bytes': max(peak - chip.usable, 0.0),
      'launches': counts.launches,
      'workspace_bytes': None,
    }
  return result


def find_batch(config: ConfigDict, where: Slice) -> tuple[int, list[dict]]:
  """The largest power of two of images a device whose step fits.

  Returns:
    That number of images over all devices, 0 if there is none; and what was
    measured on the way.
  """
  n = len(where.devices)
  config = copy.deepcopy(config)
  share = 1 << (max(config.batch_size // n, 1).bit_length() - 1)
  tried: dict[int, dict] = {}

  def fits(share: int) -> bool:
    config.batch_size = share * n
    tried[share] = measure(config, where, evaluation=False)
    return tried[share]['fits']

  if fits(share):
    while 2 * share <= LARGEST_BATCH and fits(2 * share):
      share *= 2
  else:
    share //= 2
    while share and not fits(share):
      share //= 2
  return share * n, list(tried.values())


def find_micro_batches(
  config: ConfigDict, where: Slice
) -> list[dict[str, Any]]:
  """`measure` at each of MICRO_BATCHES that the recipe can have.

  Returns:
    What was measured, with `cheapest` true for the least bound on the time.

  Raises:
    InputError: the recipe can't have any of them.
  """
  config = copy.deepcopy(config)
  results, refused = [], InputError('no number of micro-batches to try')
  for config.micro_batches in MICRO_BATCHES:
    try:
      results.append(measure(config, where, evaluation=False))
    except InputError as error:
      refused = error
  if not results:
    raise refused
  best = max(results, key=lambda r: r['images_per_second_bound'] or 0)
  return [r | {'cheapest': r is best and r['fits']} for r in results]


def remedy(result: dict[str, Any], config: ConfigDict) -> str:
  """One line for a step that does not fit."""
  has = f'has ({result["hbm_capacity_bytes"] / GIB:.1f} GiB)'
  there = f'a chip of {result["topology"]} {has}'
  if 'usable_bytes' in result:
    there = (
      f'JAX takes of the memory that a GPU of {result["topology"]} {has}: '
      f'XLA_PYTHON_CLIENT_MEM_FRACTION is {PREALLOCATED} unless set'
    )
  return (
    f'does not fit: {result["over_bytes"] / GIB:.2f} GiB more than {there}; '
    f'{less_memory(config)}'
  )


def _compile(lowered) -> tuple[Any, float]:
  """The compiled program, or None and the bytes that a device lacks."""
  try:
    return lowered.compile(), 0.0
  except jax.errors.JaxRuntimeError as error:
    return None, _lacking(str(error))


def _lacking(message: str) -> float:
  """Bytes that a device lacks, from the compiler's message.

  >>> _lacking('temporaries (20.25G) exceeds available HBM (15.75G).') / 2**30
  4.5
  """
  found = re.search(
    r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
    message,
  )
  if found is None:
    raise InputError(
      f'the compiler refuses this step: {message.strip().splitlines()[0]}'
    )
  unit = {u: 1024.0**i for i, u in enumerate(('', *'KMGT'))}
  needed, needed_unit, there, there_unit = found.groups()
  return float(needed) * unit[needed_unit] - float(there) * unit[there_unit]


def _batch(rows: tuple[int, ...], data: Dataset) -> tuple:
  images = _shape((*rows, *data.image_shape), np.uint8)
  return images, _shape(rows, np.int32)


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

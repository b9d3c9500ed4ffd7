"""The cost of a study, before it starts."""

import concurrent.futures
import copy
import dataclasses
import functools
import math
import multiprocessing
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tqdm

from skipinit_jax.ahead_of_time.chips import (
  GPUS,
  Gpu,
  Slice,
  platform_of,
  topology,
)
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.errors import InputError, reason
from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Axis,
  Grid,
  Run,
  cells,
  make_run,
)
from skipinit_jax.experiments.selection import seeds_of
from skipinit_jax.experiments.studies import find_study
from skipinit_jax.experiments.words import duration
from skipinit_jax.training.config import default_config
from skipinit_jax.training.devices import only_cpus
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import set_fields
from skipinit_jax.variants import Fields

# Seconds of a CPU core, measured on the digits (large_batch): at least for a
# layer of a step, for a run beside its steps, and for compiling what the runs
# of a cell share, once for each split.
LAYER_SECONDS, RUN_SECONDS, PROGRAM_SECONDS = 4e-4, 1.0, 20.0
CPU_RATE, SUSTAINED_RATE = 3e10, 1e14  # FLOPs a second.


def cost(grid: Grid) -> dict[str, float]:
  """Runs, images, FLOPs and seconds of a whole grid, not widened.

  Returns:
    runs; widened, runs if every cell is widened as far as its grid allows;
    images, trained on; flops of convolutions and matrix products, forward and
    backward; cpu_seconds, a rough estimate for one CPU core; device_seconds at
    SUSTAINED_RATE.
  """
  more = most_widened(grid)
  total = widened = images = flops = seconds = 0
  for split in (VALIDATION, TEST):
    runs = [
      make_run(grid, cell, grid.rates[0], 0, split) for cell in cells(grid)
    ]
    unique = {run.id: run for run in runs}  # Cells may share theirs.
    for run in unique.values():
      tuning, tests = seeds_of(grid, run.cell.row)
      each = len(grid.rates) * tuning if split == VALIDATION else tests
      one = _run_cost(run)
      total += each
      widened += each + (more * tuning if split == VALIDATION else 0)
      images += each * one[0]
      flops += each * one[1]
      seconds += each * one[2] + PROGRAM_SECONDS
  return {
    'runs': total,
    'widened': widened,
    'images': images,
    'flops': flops,
    'cpu_seconds': seconds,
    'device_seconds': flops / SUSTAINED_RATE,
  }


def time_here(grid: Grid) -> str:
  """The time of a whole grid on the device that JAX finds, in words."""
  # The runs need the memory, which JAX would take at its first look.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  device = jax.devices()[0]
  if device.platform == 'cpu':
    cores = os.cpu_count() or 1
    seconds = cost(grid)['cpu_seconds'] / cores
    return f'{cores} CPU cores: roughly {duration(seconds)} with --jobs={cores}'
  for name, gpu in GPUS.items():
    if gpu.name == device.device_kind:
      return time_on(grid, f'{name}x1')
  seconds = cost(grid)['device_seconds']
  return (
    f'{device.device_kind}: {duration(seconds)} at a sustained '
    f'{SUSTAINED_RATE / 1e12:.0f} TFLOP/s'
  )


def time_of_runs(grid: Grid, study: str, dataset: str) -> str:
  """`time_here` before runs start, which need the device to themselves.

  A process of its own looks for the device: a TPU serves one process, and what
  a GPU's keeps is missing in the runs. Nothing that it meets stops a study.

  Args:
    grid: of the study.
    study, dataset: where it is found, since grids hold functions, which can't
      be sent.
  """
  if only_cpus():
    return time_here(grid)
  context = multiprocessing.get_context('spawn')
  try:
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
      asked = process.submit(_time_of, study, dataset, dict(grid.overrides))
      return asked.result()
  except Exception as error:
    return f'a time that is not known: {reason(error)}'


def _time_of(study: str, dataset: str, overrides: Fields) -> str:
  _, grid = find_study(study, dataset)
  return time_here(dataclasses.replace(grid, overrides=overrides))


def time_on(grid: Grid, name: str) -> str:
  """A bound on the time of a whole grid on a GPU, in words.

  Args:
    grid: of the study.
    name: a topology of one GPU, such as 'h100x1'.

  Raises:
    InputError: another topology, or its compiler is missing.
  """
  where = topology(name) if platform_of(name) == 'gpu' else None
  if where is None or where.chips > 1:
    raise InputError(f'--topology={name}: expected one GPU, as in h100x1')
  assert isinstance(where.chip, Gpu)
  seconds, launches = bound(grid, where)
  return (
    f'{where.chip.name}: at least about {duration(seconds)} by a bound, not '
    'measured: the plain network of each size, every byte from memory; '
    f'{launches:.2g} kernels to start come on top, '
    f'{duration(1e-6 * launches)} for each microsecond that one takes'
  )


def bound(grid: Grid, where: Slice) -> tuple[float, float]:
  """Seconds and started kernels of a whole grid on a GPU, by `ahead_of_time`.

  Every method is counted as the plain network of its size, which does what all
  of them do: one compilation for each panel and row.
  """
  seconds = launches = 0.0
  parts = [
    dataclasses.replace(
      grid,
      panels=Axis(grid.panels.name, {panel: grid.panels.values[panel]}),
      rows=Axis(grid.rows.name, {row: grid.rows.values[row]}),
    )
    for panel in grid.panels.values
    for row in grid.rows.values
  ]
  for part in tqdm.tqdm(parts, 'compiling', disable=None, leave=False):
    run = make_run(part, next(cells(part)), grid.rates[0], 0, TEST)
    config = set_fields(copy.deepcopy(run.config), {'model.method': 'none'})
    step = measure(config, where, evaluation=False)
    steps = cost(part)['images'] / config.batch_size
    seconds += steps * max(step['compute_seconds'], step['memory_seconds'])
    launches += steps * step['launches']
  return seconds, launches


def most_widened(grid: Grid) -> int:
  """Rates by which a cell can be widened, at its smallest or largest."""
  if not grid.widest or len(grid.rates) < 2:
    return 0
  tried = sorted(grid.rates)
  below = (tried[0] - grid.widest[0]) // (tried[1] - tried[0])
  return max(below, (grid.widest[1] - tried[-1]) // (tried[-1] - tried[-2]))


def _run_cost(run: Run) -> tuple[float, float, float]:
  """Images, FLOPs and seconds on a CPU of one run."""
  config = run.config
  data = stand_in(config.data)
  images = config.epochs * data.train_size
  model = config.model
  each = image_flops(
    model.name, model.depth, model.width, data.image_shape, data.num_classes
  )
  flops = 3 * each * images
  by_layers = images / config.batch_size * model.depth * LAYER_SECONDS
  return images, flops, RUN_SECONDS + max(by_layers, flops / CPU_RATE)


@functools.cache
def image_flops(
  name: str,
  depth: int,
  width: int | None,
  image_shape: tuple[int, int, int],
  num_classes: int,
) -> float:
  """FLOPs of one image's forward pass, two for a multiplication and addition.

  Those of a deep Wide-ResNet are extrapolated linearly from two shallow ones.
  """
  if name == 'wide_resnet' and depth > 22:
    a, b = (
      image_flops(name, d, width, image_shape, num_classes) for d in (16, 22)
    )
    return a + (b - a) * (depth - 16) / 6
  config = default_config()
  config.model.name, config.model.depth, config.model.width = name, depth, width
  model = build_model(config, num_classes, 'cpu')
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  total = []

  def count(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if isinstance(context.module, nn.Conv | nn.Dense):
      kernel = context.module.variables['params']['kernel'].shape
      total.append(2 * math.prod(out.shape[:-1]) * math.prod(kernel))
    return out

  def forward(key: jax.Array, images: jax.Array) -> Any:
    with nn.intercept_methods(count):
      return model.init_with_output(key, images, train=False)[0]

  jax.eval_shape(forward, jax.eval_shape(jax.random.key, 0), images)
  return float(sum(total))

"""The cost of a study, before it starts."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.experiments.grid import TEST, Grid, Run, cells, make_run
from skipinit_jax.experiments.selection import seeds_of
from skipinit_jax.training.config import default_config
from skipinit_jax.training.network import build_model

# Seconds of a CPU core, measured on the digits (ablations 1,200 s in 80 runs,
# fixup_parts 816 s in 60): at least for a layer of a step, and for a run beside
# its steps.
LAYER_SECONDS, RUN_SECONDS = 4e-4, 5.0
CPU_RATE, SUSTAINED_RATE = 5e10, 1e14  # FLOPs a second.


def cost(grid: Grid) -> dict[str, float]:
  """Runs, images, FLOPs and seconds of a whole grid, not widened.

  Returns:
    runs; widened, runs if every cell is widened as far as its grid allows;
    images, trained on; flops of convolutions and matrix products, forward and
    backward; cpu_seconds, a rough estimate for one CPU core; device_seconds at
    SUSTAINED_RATE.
  """
  runs = [make_run(grid, cell, grid.rates[0], 0, TEST) for cell in cells(grid)]
  more = most_widened(grid)
  total = widened = images = flops = seconds = 0
  for run in {run.id: run for run in runs}.values():  # Cells may share theirs.
    tuning, tests = seeds_of(grid, run.cell.row)
    each = len(grid.rates) * tuning + tests
    one = _run_cost(run)
    total += each
    widened += each + more * tuning
    images += each * one[0]
    flops += each * one[1]
    seconds += each * one[2]
  return {
    'runs': total,
    'widened': widened,
    'images': images,
    'flops': flops,
    'cpu_seconds': seconds,
    'device_seconds': flops / SUSTAINED_RATE,
  }


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

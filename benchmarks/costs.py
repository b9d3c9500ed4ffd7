"""What training steps cost by a chip's compiler: the body of `tpu_cost` and
`gpu_cost`."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers import (
  IMAGE,
  NETWORKS,
  ExampleResNet50,
  as_network,
  example_state,
  example_step,
  recipe,
)
from skipinit_jax import markdown
from skipinit_jax.ahead_of_time.chips import GIB, Slice, compilers
from skipinit_jax.ahead_of_time.measure import cost, measure
from skipinit_jax.training.devices import map_over_devices
from skipinit_jax.training.result import versions

# Field -> head of its column, unit, and how much that is.
FIELDS = {
  'bytes_accessed': ('bytes accessed', 'GB', 1e9),
  'hbm_bytes': ('HBM bytes', 'GB', 1e9),
  'activation_bytes': ('activations', 'GiB', GIB),
}


def example(where: Slice, batch: int) -> dict[str, Any]:
  """The example's step; its images come normalized, in bfloat16."""
  model, tx = ExampleResNet50(), optax.sgd(0.1, 0.9, nesterov=True)
  shape = (len(where.devices), batch // where.cores)
  args = (
    jax.eval_shape(functools.partial(example_state, model, tx)),
    jax.ShapeDtypeStruct((*shape, *IMAGE), jnp.bfloat16),
    jax.ShapeDtypeStruct(shape, np.int32),
  )
  step = functools.partial(example_step, model=model, tx=tx)
  split = (False, True, True)
  mapped = map_over_devices(step, split, where.devices, donate_argnums=0)
  return cost(mapped, args, where)


def row(name: str, where: Slice, batch: int) -> dict[str, Any]:
  """A network's step of ResNet-50, with so many images a chip."""
  if name == 'example':
    return example(where, batch)
  config = recipe(name, 'imagenet2012', batch * where.chips)
  with as_network(name):
    return measure(config, where, evaluation=False)


def fill(
  report: dict[str, Any],
  part: str,
  names: Iterable[str],
  make: Callable[[str], dict[str, Any]],
  out: Path,
) -> None:
  """Sets `report[part]` to what `make` finds of each name; writes it to `out`
  after each, so that nothing is lost."""
  report[part] = {}
  for name in names:
    report[part][name] = made = make(name)
    print(f'{name}: compiled in {made["compile_seconds"]:.0f} s', flush=True)
    out.with_suffix('.json').write_text(json.dumps(report, indent=1) + '\n')


def compile_networks(
  names: Iterable[str], where: Slice, batch: int, out: Path
) -> dict[str, Any]:
  """A report with the rows of these networks, see `row` and `fill`."""
  report = {
    'topology': where.name,
    'batch_per_chip': batch,
    'versions': versions() | compilers(),
  }
  fill(report, 'rows', names, lambda name: row(name, where, batch), out)
  return report


def table(report: dict[str, Any], fields: Iterable[str], bound: str) -> str:
  """Markdown, relative to the example where that was compiled.

  Args:
    report: with costs by network as `rows`, and `batch_per_chip`.
    fields: which of FIELDS, or others, which are counts.
    bound: head of the column of what rate and bandwidth allow.
  """
  results, batch = report['rows'], report['batch_per_chip']
  base = results.get('example')
  heads = [FIELDS.get(field, (field,))[0] for field in fields]
  rows = [['network', *heads, bound]]
  for name, result in results.items():
    cells = [NETWORKS[name]]
    for field in fields:
      value = result[field]
      if field not in FIELDS:
        cells.append(f'{value:,.0f}')
        continue
      _, unit, scale = FIELDS[field]
      share = f' = {value / base[field]:.2f}' if base else ''
      cells.append(f'{value / scale:.2f} {unit}{share}')
    seconds = max(result['compute_seconds'], result['memory_seconds'])
    cells.append(f'{batch / seconds:,.0f}')
    rows.append(cells)
  return markdown.table(rows)

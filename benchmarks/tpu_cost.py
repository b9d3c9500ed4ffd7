"""The cost of a ResNet-50 training step on a TPU chip, network by network.

  python -m benchmarks.tpu_cost --out=docs/tpu_cost

Compiles one step per network for v5e:2x2 with the TPU compiler (`pip install
libtpu`; no chip is needed, a minute or two each), 128 images of 224x224 a chip,
bfloat16, float32 parameters, SGD with Nesterov momentum. Writes OUT.json and
prints a table: the cost of each relative to the network of Flax's ImageNet
example, in the compiler's bytes accessed, bytes to and from HBM (see
`skipinit_jax.ahead_of_time.counts`) and activations.
"""

import functools
import importlib.metadata
import json
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
from skipinit_jax import cli, markdown
from skipinit_jax.ahead_of_time.chips import GIB, Slice, topology
from skipinit_jax.ahead_of_time.measure import cost, measure
from skipinit_jax.training.devices import map_over_devices
from skipinit_jax.training.result import versions

BATCH = 128
ROWS = [n for n in NETWORKS if n not in ('torch', 'fixup', 'calls8')]


def example(where: Slice) -> dict[str, Any]:
  """The example's step; its images come normalized, in bfloat16."""
  model, tx = ExampleResNet50(), optax.sgd(0.1, 0.9, nesterov=True)
  shape = (len(where.devices), BATCH // where.cores)
  args = (
    jax.eval_shape(functools.partial(example_state, model, tx)),
    jax.ShapeDtypeStruct((*shape, *IMAGE), jnp.bfloat16),
    jax.ShapeDtypeStruct(shape, np.int32),
  )
  step = functools.partial(example_step, model=model, tx=tx)
  split = (False, True, True)
  mapped = map_over_devices(step, split, where.devices, donate_argnums=0)
  return cost(mapped, args, where)


def row(name: str, where: Slice) -> dict[str, Any]:
  if name == 'example':
    return example(where)
  config = recipe(name, 'imagenet2012', BATCH * where.chips)
  with as_network(name):
    return measure(config, where, evaluation=False)


def table(results: dict[str, dict[str, Any]]) -> str:
  """Markdown, relative to the example where that was compiled."""
  fields = ('bytes_accessed', 'hbm_bytes', 'activation_bytes')
  base = results.get('example')
  heads = ['network', 'bytes accessed', 'HBM bytes', 'activations']
  rows = [[*heads, 'images/s a chip, at most']]
  for name, result in results.items():
    cells = [NETWORKS[name]]
    for field in fields:
      value = result[field]
      unit, scale = ('GiB', GIB) if field == 'activation_bytes' else ('GB', 1e9)
      share = f' = {value / base[field]:.2f}' if base else ''
      cells.append(f'{value / scale:.2f} {unit}{share}')
    seconds = max(result['compute_seconds'], result['memory_seconds'])
    cells.append(f'{BATCH / seconds:,.0f}')
    rows.append(cells)
  return markdown.table(rows)


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--rows', nargs='+', default=ROWS, choices=ROWS)
  parser.add_argument('--out', type=cli.file, default=Path('tpu_cost'))
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with cli.errors_in_one_line():
    where = topology(args.topology)
  report = {
    'topology': where.name,
    'batch_per_chip': BATCH,
    'versions': versions() | {'libtpu': importlib.metadata.version('libtpu')},
    'rows': {},
  }
  for name in args.rows:
    report['rows'][name] = row(name, where)
    seconds = report['rows'][name]['compile_seconds']
    print(f'{name}: compiled in {seconds:.0f} s', flush=True)
    text = json.dumps(report, indent=1) + '\n'
    args.out.with_suffix('.json').write_text(text)
  print(table(report['rows']))


if __name__ == '__main__':
  main()

"""The cost of a training step on NVIDIA GPUs, by their compiler.

  pip install 'jax[cuda13]'
  python -m benchmarks.gpu_cost --out=docs/gpu_cost

Compiles with XLA's CUDA compiler, which needs no GPU; half a minute to two a
step. First ResNet-50, network by network, for one H100: 256 images of 224x224,
bfloat16, float32 parameters, SGD with Nesterov momentum, relative to the
network of Flax's ImageNet example. Then whole recipes, on one GPU and on eight.
Writes OUT.json and prints both tables. Bytes and launches are counted from the
optimized program (see `skipinit_jax.ahead_of_time.counts`).
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks import costs
from benchmarks.peers import NETWORKS
from skipinit_jax import cli, markdown
from skipinit_jax.ahead_of_time.chips import (
  CUDA_PACKAGES,
  GIB,
  Slice,
  topology,
)
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.training.recipes import load_recipe
from skipinit_jax.training.result import versions

BATCH = 256
ROWS = [n for n in NETWORKS if n not in ('torch', 'calls8')]
# Recipe, its changes, and on what.
RECIPES = {
  'digits': ('digits', {}, 'h100x1'),
  'CIFAR-10, batch 128': ('cifar10', {}, 'h100x1'),
  'CIFAR-10, batch 1024': ('cifar10', {'batch_size': 1024}, 'h100x8'),
  'ImageNet, batch 256': ('imagenet:skipinit,batch=256', {}, 'h100x1'),
  'ImageNet, batch 2048': ('imagenet:skipinit,batch=2048', {}, 'h100x8'),
  'ImageNet, batch 2048, 4 micro-batches': (
    'imagenet:skipinit,batch=2048',
    {'micro_batches': 4},
    'h100x8',
  ),
}


def of_recipe(name: str) -> dict[str, Any]:
  """The cost of one of RECIPES."""
  path, changes, on = RECIPES[name]
  config = load_recipe(path)
  config.update(changes)
  return measure(config, topology(on), evaluation=False)


def of_networks(report: dict[str, Any]) -> str:
  """Markdown of ResNet-50, network by network."""
  return costs.table(report, ('hbm_bytes', 'activation_bytes', 'launches'))


def of_recipes(report: dict[str, Any]) -> str:
  """Markdown of the recipes."""
  heads = 'recipe, GPUs, HBM a GPU, activations a GPU, launches, sorts'
  heads += ', collectives, their bytes'
  rows = [heads.split(', ')]
  for name, r in report['recipes'].items():
    alone = r['chips'] == 1
    row = [name, r['topology'], f'{r["hbm_bytes"] / 1e9:.2f} GB']
    row += [f'{r["activation_bytes"] / GIB:.2f} GiB', f'{r["launches"]:,.0f}']
    row += [f'{r["sorts"]:.0f}', '' if alone else f'{r["collectives"]:.0f}']
    row += ['' if alone else f'{r["collective_bytes"] / 1e6:.1f} MB']
    rows.append(row)
  return markdown.table(rows)


def compiler() -> dict[str, str]:
  """The version of the CUDA compiler."""
  there = {d.metadata['Name'] for d in importlib.metadata.distributions()}
  names = there.intersection(CUDA_PACKAGES)
  return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='h100x1')
  parser.add_argument('--rows', nargs='*', default=ROWS, choices=ROWS)
  parser.add_argument(
    '--recipes', nargs='*', default=[*RECIPES], choices=[*RECIPES]
  )
  parser.add_argument('--out', type=cli.file, default=Path('gpu_cost'))
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with cli.errors_in_one_line():
    where = topology(args.topology)
  report: dict[str, Any] = {
    'topology': where.name,
    'batch_per_chip': BATCH,
    'versions': versions() | compiler(),
  }

  def network(name: str, where: Slice = where) -> dict[str, Any]:
    return costs.row(name, where, BATCH)

  costs.fill(report, 'rows', args.rows, network, args.out)
  costs.fill(report, 'recipes', args.recipes, of_recipe, args.out)
  print(of_networks(report))
  print(of_recipes(report))


if __name__ == '__main__':
  main()

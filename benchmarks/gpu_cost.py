"""The cost of a training step on NVIDIA GPUs, by their compiler.

  pip install 'jax[cuda13]'
  python -m benchmarks.gpu_cost --out=docs/gpu_cost

Compiles with XLA's CUDA compiler, which needs no GPU; half a minute a step.
First ResNet-50, network by network, for one H100: 256 images of 224x224,
bfloat16, float32 parameters, SGD with Nesterov momentum, relative to the
network of Flax's ImageNet example. Then whole recipes, on one GPU and on eight.
Writes OUT.json and prints both tables. Bytes and launches are counted from the
optimized program (see `skipinit_jax.ahead_of_time.counts`).
"""

import functools
from pathlib import Path
from typing import Any

import jax

from benchmarks import costs
from benchmarks.peers import NETWORKS
from skipinit_jax import cli, markdown
from skipinit_jax.ahead_of_time.chips import GIB, GPUS, topology
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.errors import InputError, unknown
from skipinit_jax.training.recipes import load_recipe

BATCH = 256
ROWS = [n for n in NETWORKS if n not in ('torch', 'calls8')]
# Recipe, its changes, and on how many GPUs.
RECIPES = {
  'digits': ('digits', {}, 1),
  'CIFAR-10, batch 128': ('cifar10', {}, 1),
  'CIFAR-10, batch 1024': ('cifar10', {'batch_size': 1024}, 8),
  'ImageNet, batch 256': ('imagenet:skipinit,batch=256', {}, 1),
  'ImageNet, batch 2048': ('imagenet:skipinit,batch=2048', {}, 8),
  'ImageNet, batch 2048, 4 micro-batches': (
    'imagenet:skipinit,batch=2048',
    {'micro_batches': 4},
    8,
  ),
}


def of_recipe(name: str, chip: str) -> dict[str, Any]:
  """The cost of one of RECIPES."""
  path, changes, number = RECIPES[name]
  config = load_recipe(path)
  config.update(changes)
  return measure(config, topology(f'{chip}x{number}'), evaluation=False)


def of_networks(report: dict[str, Any]) -> str:
  """Markdown of ResNet-50, network by network."""
  fields = 'hbm_bytes', 'activation_bytes', 'launches'
  return costs.table(report, fields, 'images/s, without L2')


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


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--chip', default='h100')
  parser.add_argument('--rows', nargs='*', default=ROWS, choices=ROWS)
  parser.add_argument(
    '--recipes', nargs='*', default=[*RECIPES], choices=[*RECIPES]
  )
  parser.add_argument('--out', type=cli.file, default=Path('gpu_cost'))
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with cli.errors_in_one_line():
    if args.chip not in GPUS:
      raise InputError(unknown('GPU', args.chip, GPUS))
    where = topology(f'{args.chip}x1')
  report = costs.compile_networks(args.rows, where, BATCH, args.out)
  make = functools.partial(of_recipe, chip=args.chip)
  costs.fill(report, 'recipes', args.recipes, make, args.out)
  print(of_networks(report))
  print(of_recipes(report))


if __name__ == '__main__':
  main()

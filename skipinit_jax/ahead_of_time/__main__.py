"""The command line: what a recipe's step would cost on TPUs or GPUs.

  python -m skipinit_jax.ahead_of_time --config=configs/imagenet.py \
    --topology=v5e:16x16
  python -m skipinit_jax.ahead_of_time --config=configs/imagenet.py \
    --topology=h100x8
"""

from typing import Any

import jax
from absl import logging

from skipinit_jax import cli
from skipinit_jax.ahead_of_time.chips import GIB, platform_of, topology
from skipinit_jax.ahead_of_time.measure import (
  check,
  find_batch,
  find_micro_batches,
  measure,
  remedy,
)
from skipinit_jax.files import write_json
from skipinit_jax.training import __main__ as training


def parser() -> cli.Parser:
  """The flags."""
  flags = cli.Parser(
    prog='python -m skipinit_jax.ahead_of_time',
    description="What a recipe's step would cost on TPUs or GPUs.",
    fields=True,
  )
  flags.add_argument('--config', default='digits', help='recipe')
  flags.add_argument(
    '--topology', default='v5e:2x2', help='what to compile for (%(default)s)'
  )
  flags.add_argument(
    '--json', type=cli.file, help='file to write all figures to'
  )
  flags.add_argument(
    '--find-batch',
    action='store_true',
    help='find the largest power-of-two batch that fits',
  )
  flags.add_argument(
    '--find-micro-batches',
    action='store_true',
    help='compare 1, 2, 4 and 8 micro-batches',
  )
  return flags


def run() -> None:
  """Compiles, prints, and writes the JSON file."""
  cli.interrupt_as_usual()
  logging.set_verbosity(logging.ERROR)
  args, config = training.parse(parser())
  # Nothing is computed: an accelerator that is here is left alone.
  jax.config.update('jax_platforms', 'cpu')
  with cli.errors_in_one_line():
    check(config, platform_of(args.topology))
    where = topology(args.topology)
    if args.find_batch:
      batch, results = find_batch(config, where)
      figures: Any = {'batch_size': batch, 'tried': results}
      print(table(results))
      print(
        f'largest power of two that fits: --config.batch_size={batch}, '
        f'{batch // where.chips} images a chip'
        if batch
        else 'not one image a device fits'
      )
    elif args.find_micro_batches:
      figures = results = find_micro_batches(config, where)
      print(table(results))
    else:
      figures = measure(config, where)
      results = [figures]
      print(lines(figures))
  if args.json:
    write_json(args.json, figures)
  if not any(result['fits'] for result in results):
    config.micro_batches = results[-1]['micro_batches']
    cli.refuse(remedy(results[-1], config), cli.FAILED)


def lines(result: dict[str, Any], indent: str = '') -> str:
  """One line a figure; nested figures are indented."""
  out = []
  for name, value in result.items():
    if isinstance(value, dict):
      out += [f'{indent}{name}:', lines(value, indent + '  ')]
    else:
      out.append(f'{indent}{name:<24}{_number(name, value)}')
  return '\n'.join(out)


def table(results: list[dict[str, Any]]) -> str:
  """One row a compilation."""
  rows = [
    'batch a chip  micro-batches  HBM GB  activations GiB  peak GiB  '
    'images/s a chip (bound)'
  ]
  for r in results:
    row = f'{r["batch_per_chip"]:>12}  {r["micro_batches"]:>13}  '
    if r['fits']:
      row += (
        f'{r["hbm_bytes"] / 1e9:>6.1f}  {r["activation_bytes"] / GIB:>15.2f}  '
        f'{r["peak_bytes"] / GIB:>8.2f}  {r["images_per_second_bound"]:>10,.0f}'
      )
    else:
      row += f'does not fit, by {r["over_bytes"] / GIB:.2f} GiB'
    rows.append(row + ('  <- cheapest' if r.get('cheapest') else ''))
  return '\n'.join(rows)


def _number(name: str, value: Any) -> str:
  if name == 'workspace_bytes':
    return 'not known without a GPU: the memory is a lower bound'
  if value is None:
    return '-'
  if name.endswith('_bytes'):
    return f'{value:.4g} ({value / GIB:.2f} GiB)'
  if isinstance(value, float):
    return f'{value:.4g}'
  return str(value)


if __name__ == '__main__':
  run()

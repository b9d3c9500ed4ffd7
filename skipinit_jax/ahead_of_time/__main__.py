"""The command line: what a recipe's step would cost on a TPU slice.

  python -m skipinit_jax.ahead_of_time --config=configs/imagenet.py \
    --topology=v5e:16x16
"""

import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from skipinit_jax.ahead_of_time.chips import GIB, topology
from skipinit_jax.ahead_of_time.measure import (
  find_batch,
  find_micro_batches,
  measure,
  remedy,
)
from skipinit_jax.errors import InputError
from skipinit_jax.training import __main__ as training
from skipinit_jax.training.lines import write_json

_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:2x2', 'What to compile for: a chip and its slice.'
)
_JSON = flags.DEFINE_string('json', None, 'File to write all figures to.')
_FIND_BATCH = flags.DEFINE_bool(
  'find_batch', False, 'Find the largest power-of-two batch that fits.'
)
_FIND_MICRO_BATCHES = flags.DEFINE_bool(
  'find_micro_batches', False, 'Compare 1, 2, 4 and 8 micro-batches.'
)


def main(argv: list[str]) -> None:
  """Compiles, prints, and writes the JSON file."""
  del argv
  # Nothing is computed: an accelerator that is here is left alone.
  jax.config.update('jax_platforms', 'cpu')
  config = flags.FLAGS['config'].value
  try:
    output = _open(_JSON.value)
    where = topology(_TOPOLOGY.value)
    if _FIND_BATCH.value:
      batch, results = find_batch(config, where)
      figures: Any = {'batch_size': batch, 'tried': results}
      print(table(results))
      print(_largest(batch, where.chips))
    elif _FIND_MICRO_BATCHES.value:
      figures = results = find_micro_batches(config, where)
      print(table(results))
    else:
      figures = measure(config, where)
      results = [figures]
      print(lines(figures))
  except InputError as error:
    training._exit(str(error))
  if output:
    write_json(output, figures)
  if not any(result['fits'] for result in results):
    config.micro_batches = results[-1]['micro_batches']
    training._exit(remedy(results[-1], config), training.FAILED)


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


def _largest(batch: int, chips: int) -> str:
  if not batch:
    return 'not one image a device fits'
  return (
    f'largest power of two that fits: --config.batch_size={batch}, '
    f'{batch // chips} images a chip'
  )


def _number(name: str, value: Any) -> str:
  if value is None:
    return '-'
  if name.endswith('_bytes'):
    return f'{value:.4g} ({value / GIB:.2f} GiB)'
  if isinstance(value, float):
    return f'{value:.4g}'
  return str(value)


def _open(name: str | None) -> Path | None:
  """The file to write, known to be writable before minutes of compiling."""
  if name is None:
    return None
  try:
    with open(name, 'a'):
      return Path(name)
  except OSError as error:
    raise InputError(f'can not write {name}: {error.strerror}') from None


def run() -> None:
  """Entry point."""
  logging.set_verbosity(logging.ERROR)
  args = [a.replace('--find-', '--find_', 1) for a in sys.argv[1:]]
  args = [a.replace('_micro-batches', '_micro_batches', 1) for a in args]
  try:
    sys.argv[1:] = training._with_recipe_path(args)
  except InputError as error:
    training._exit(str(error))
  app.run(main, flags_parser=training.parse)


if __name__ == '__main__':
  run()

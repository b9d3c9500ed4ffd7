"""How a report writes numbers, learning rates, cells and data sets."""

from skipinit_jax.experiments.grid import Cell, Grid
from skipinit_jax.variants import VARIANTS

DASH, MINUS, TIMES = '\N{EN DASH}', '\N{MINUS SIGN}', '\N{MULTIPLICATION SIGN}'
SUPERSCRIPTS = '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'
DATASETS = {
  'mnist5k': '5,000 images of MNIST',
  'cifar10': 'CIFAR-10',
  'cifar100': 'CIFAR-100',
  'imagenet2012': 'ImageNet',
}


def power(exponent: int) -> str:
  """A power of two.

  >>> power(-3)
  '2⁻³'
  """
  digits = str.maketrans('-0123456789', SUPERSCRIPTS)
  return f'2{str(exponent).translate(digits)}'


def rate_text(grid: Grid, exponent: int) -> str:
  """A learning rate of a grid, as a power of two."""
  return power(exponent) + ('' if grid.unit == 1 else f' {TIMES} {grid.unit:g}')


def widening(grid: Grid) -> str:
  """How far a grid's rates may be widened; empty if they are not."""
  if not grid.widest:
    return ''
  low, high = (rate_text(grid, rate) for rate in grid.widest)
  return (
    f', widened down to {low} and up to {high} while the best is at the edge'
  )


def seeds_text(grid: Grid) -> str:
  """The seeds of each rate and of the tests."""

  def each(tuning: int, tests: int) -> str:
    number = f'{tuning} seed{"s" * (tuning > 1)} a rate'
    return number if tests == tuning else f'{number} and {tests} in tests'

  text = each(grid.tuning_seeds or grid.seeds, grid.seeds)
  for row, numbers in grid.fewer.items():
    text += f' (at {grid.rows.name} {row} {each(*numbers)})'
  if grid.best < grid.seeds:
    text += f', of which the best {grid.best} enter a mean'
  return text


def percent(share: float, error: float) -> str:
  """A share and its error, in percent.

  >>> percent(0.935, 0.001)
  '93.5 ± 0.1'
  """
  return f'{100 * share:.1f} ± {100 * error:.1f}'


def duration(seconds: float) -> str:
  """Seconds in the unit that people would use.

  >>> duration(90), duration(7200), duration(3e6)
  ('2 minutes', '2.0 hours', '34.7 days')
  """
  if seconds < 60:
    return f'{seconds:.0f} seconds'
  if seconds < 2 * 3600:
    return f'{seconds / 60:.0f} minutes'
  if seconds < 48 * 3600:
    return f'{seconds / 3600:.1f} hours'
  return f'{seconds / 86400:,.1f} days'


def row_name(grid: Grid, cell: Cell) -> str:
  """A cell's row by its panel and row."""
  row = f'{grid.rows.name} {cell.row}'
  return f'{cell.panel}, {row}' if cell.panel else row


def cell_name(grid: Grid, cell: Cell) -> str:
  """A cell by its panel, row and column."""
  return f'{row_name(grid, cell)}, {VARIANTS[cell.column].label}'


def dataset_name(name: str) -> str:
  """A data set as people write it."""
  return DATASETS.get(name, name)

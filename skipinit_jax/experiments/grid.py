"""A study's grid, and its runs: their configs, names and commands."""

import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.files import dumps
from skipinit_jax.training.changes import ADDED, FREE
from skipinit_jax.training.program import program_key
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.variants import VARIANTS, Fields

VALIDATION, TEST = 'validation', 'test'


@dataclasses.dataclass(frozen=True)
class Axis:
  """The values along one side of a table.

  Attributes:
    name: for people: 'depth', 'batch', 'method'.
    values: what is printed -> the fields that it sets.
  """

  name: str
  values: Mapping[str, Fields]


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
  """A study at a size that suits a data set.

  Attributes:
    recipe: the recipe that all runs start from.
    fields: fields that all runs set; like those of the axes, values, or
      functions of the fields before them (in the order: these, rows, panels,
      columns).
    test_fields: fields that test runs set beside these, such as what is to be
      measured in them.
    rows, columns, panels: axes of the table; `columns` are keys of VARIANTS.
    rates: exponents of 2 of the learning rates, times `unit`.
    widest: the smallest and the largest exponent that a cell's rates may be
      widened to; None: they are not widened.
    validation: training images held out to choose the rate.
    seeds: test runs of every cell.
    tuning_seeds: runs of every cell and rate that choose it; None: `seeds`.
    fewer: row -> its tuning_seeds and seeds, where these are fewer.
    best: number of seeds, the best, that enter a mean.
    choices: the choices that are ours and not the paper's, for the report.
    overrides: fields given on the command line; they override all others.
  """

  recipe: str
  fields: Fields
  rows: Axis
  columns: tuple[str, ...]
  rates: tuple[int, ...]
  validation: int
  test_fields: Fields = dataclasses.field(default_factory=dict)
  widest: tuple[int, int] | None = None
  seeds: int = 1
  tuning_seeds: int | None = None
  fewer: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  best: int = 1
  panels: Axis = Axis('', {'': {}})
  unit: float = 1.0
  choices: str = ''
  overrides: Fields = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
  """A place in a study's table: the values on its three axes."""

  panel: str
  row: str
  column: str


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    cell: its place in the table.
    rate: exponent of 2 of its learning rate, times the grid's unit.
    seed: its random seed.
    split: VALIDATION, to choose the rate, or TEST, at the chosen one.
    recipe: the recipe that it starts from.
    fields: the recipe's fields that it changes, by dotted name.
  """

  cell: Cell
  rate: int
  seed: int
  split: str
  recipe: str
  fields: Mapping[str, Any] = dataclasses.field(hash=False)

  @functools.cached_property
  def config(self) -> ConfigDict:
    """The whole recipe."""
    return set_fields(load_recipe(self.recipe), self.fields)

  @property
  def title(self) -> str:
    """The run in words: its place in the grid."""
    cell = self.cell
    place = ', '.join(p for p in (cell.panel, cell.row, cell.column) if p)
    return f'{place}, 2^{self.rate}, seed {self.seed}, {self.split} ({self.id})'

  @functools.cached_property
  def id(self) -> str:
    """Twelve hexadecimal digits of all fields that change the numbers.

    Fields that came later count only where they are not as before, so that a
    study of before goes on.
    """
    fields = {
      name: value
      for name, value in flatten_dict(self.config.to_dict(), sep='.').items()
      if name not in FREE and (name, value) not in ADDED.items()
    }
    text = dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  @functools.cached_property
  def program(self) -> str:
    """The same for runs that share what is compiled."""
    return program_key(self.config)

  def folder(self, workdir: Path) -> Path:
    """The run's folder in that of the study."""
    return workdir / 'runs' / self.id

  def arguments(self, workdir: Path) -> list[str]:
    """Arguments of `train.py` or `python -m skipinit_jax.training`."""
    return [
      f'--config={self.recipe}',
      f'--workdir={self.folder(workdir)}',
      *(f'--config.{name}={_text(v)}' for name, v in self.fields.items()),
    ]

  def command(self, workdir: Path) -> str:
    """The command that repeats this run, for a shell."""
    return shlex.join(
      ['python', '-m', 'skipinit_jax.training', *self.arguments(workdir)]
    )


def cells(grid: Grid) -> Iterator[Cell]:
  """All cells, panel by panel and row by row."""
  for panel in grid.panels.values:
    for row in grid.rows.values:
      for column in grid.columns:
        yield Cell(panel, row, column)


@functools.cache
def make_run(grid: Grid, cell: Cell, rate: int, seed: int, split: str) -> Run:
  """The run of a cell at a rate and seed."""
  fields: dict[str, Any] = {}
  for part in (
    grid.fields,
    grid.rows.values[cell.row],
    grid.panels.values[cell.panel],
    VARIANTS[cell.column].fields,
    _of_run(grid, rate, seed, split),
    grid.test_fields if split == TEST else {},
    grid.overrides,
  ):
    fields |= {k: v(fields) if callable(v) else v for k, v in part.items()}
  if split == TEST:  # Evaluated exactly once, at the end.
    epochs = fields.get('epochs', load_recipe(grid.recipe).epochs)
    fields['eval_every_epochs'] = epochs
  return Run(cell, rate, seed, split, grid.recipe, fields)


def _of_run(grid: Grid, rate: int, seed: int, split: str) -> dict[str, Any]:
  """What the tool itself sets for each run."""
  return {
    'optimizer.learning_rate': grid.unit * 2.0**rate,
    'seed': seed,
    'data.validation': grid.validation if split == VALIDATION else 0,
    'diverged_status': 0,
  }


def check_overrides(grid: Grid, fields: Fields) -> None:
  """Raises InputError for fields that differ between a study's cells."""
  columns = [VARIANTS[name].fields for name in grid.columns]
  of = {
    'run': {*_of_run(grid, 0, 0, TEST)},
    'method': {f for each in columns for f in each},
    grid.panels.name: {f for each in grid.panels.values.values() for f in each},
    # What one row alone has, such as fewer epochs, may be set for all.
    grid.rows.name: {*fields}.intersection(*grid.rows.values.values()),
  }
  for name, varied in of.items():
    for field in fields:
      if field in varied:
        raise InputError(
          f'{field} is set by this study for each {name}; expected a field '
          'that is the same for all'
        )


def _text(value: Any) -> str:
  return repr(value) if isinstance(value, float) else str(value)

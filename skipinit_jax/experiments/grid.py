"""From a study's grid to runs: their configs, names and commands."""

import dataclasses
import difflib
import functools
import hashlib
import runpy
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.experiments.studies import VARIANTS, Grid
from skipinit_jax.training.config import recipe_path
from skipinit_jax.training.lines import dumps
from skipinit_jax.training.startup import FREE, flatten

VALIDATION, TEST = 'validation', 'test'


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
  """A place in a study's table, by what is printed on its axes."""

  panel: str
  row: str
  column: str


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    cell: whose run it is.
    rate: exponent of 2 of its learning rate, times the grid's unit.
    seed: of the run.
    split: VALIDATION, to choose the rate, or TEST, at the chosen one.
    recipe: what it starts from.
    fields: that it changes, by dotted name.
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
    config = load_recipe(self.recipe)
    for name, value in self.fields.items():
      part, last = _field(config, name)
      part[last] = value
    return config

  @property
  def title(self) -> str:
    """The run for people: its place in the grid."""
    cell = self.cell
    place = ', '.join(p for p in (cell.panel, cell.row, cell.column) if p)
    return f'{place}, 2^{self.rate}, seed {self.seed}, {self.split} ({self.id})'

  @functools.cached_property
  def id(self) -> str:
    """Twelve digits that stand for all that changes the run's numbers."""
    fields = flatten(self.config.to_dict())
    for name in FREE:
      fields.pop(name, None)
    text = dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  def folder(self, workdir: Path) -> Path:
    """The run's own workdir in that of the study."""
    return workdir / 'runs' / self.id

  def arguments(self, workdir: Path) -> list[str]:
    """Of `train.py`, or of `python -m skipinit_jax.training`."""
    return [
      f'--config={self.recipe}',
      f'--workdir={self.folder(workdir)}',
      *(f'--config.{name}={_text(v)}' for name, v in self.fields.items()),
    ]

  def command(self, workdir: Path) -> str:
    """What makes this run again, for a shell."""
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
    {
      'optimizer.learning_rate': grid.unit * 2.0**rate,
      'seed': seed,
      'data.validation': grid.validation if split == VALIDATION else 0,
      'diverged_status': 0,
    },
    grid.overrides,
  ):
    fields |= {k: v(fields) if callable(v) else v for k, v in part.items()}
  if split == TEST:  # Which is looked at once.
    epochs = fields.get('epochs', load_recipe(grid.recipe).epochs)
    fields['eval_every_epochs'] = epochs
  return Run(cell, rate, seed, split, grid.recipe, fields)


def load_recipe(name: str) -> ConfigDict:
  """The config of a recipe, by name or path, with get_config's argument."""
  file, colon, argument = recipe_path(name).partition(':')
  get_config = runpy.run_path(file)['get_config']
  return get_config(argument) if colon else get_config()


def parse_overrides(recipe: str, arguments: Iterable[str]) -> dict[str, Any]:
  """The fields of arguments such as --config.epochs=2, typed as the recipe's.

  Raises:
    InputError: something else, an unknown field, or a value of another type.
  """
  fields = {}
  for argument in arguments:
    name, equals, text = argument.removeprefix('--config.').partition('=')
    if not argument.startswith('--config.') or not equals:
      raise InputError(
        f'unexpected argument {argument!r}; fields are set as in '
        '--config.epochs=2'
      )
    part, last = _field(load_recipe(recipe), name)
    fields[name] = _value(name, part.get_type(last), text)
  return fields


def _field(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
  """The part of a config that a dotted name leads to, and the last name."""
  *path, last = name.split('.')
  part = config
  for step in path:
    part = part.get(step) if isinstance(part, ConfigDict) else None
  if not isinstance(part, ConfigDict) or last not in part:
    near = difflib.get_close_matches(name, flatten(config.to_dict()), 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise InputError(f'the recipe has no field {name!r}{hint}')
  return part, last


def _value(name: str, kind: type, text: str) -> Any:
  if kind is bool and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    if kind in (int, float, str):
      return kind(text)
  except ValueError:
    pass
  raise InputError(f'{name}={text}: expected a value of type {kind.__name__}')


def _text(value: Any) -> str:
  return repr(value) if isinstance(value, float) else str(value)

"""The table of variants: a method is one row there and one in METHODS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from studies import make_grid, make_study, write_runs

from skipinit_jax import published
from skipinit_jax.analysis.curvature import DRAWN
from skipinit_jax.analysis.propagation import COLUMNS
from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import TEST, cells, make_run
from skipinit_jax.experiments.report import write_report
from skipinit_jax.experiments.studies import STUDIES
from skipinit_jax.experiments.tables import make_tables
from skipinit_jax.models.methods import METHODS, Method
from skipinit_jax.training.network import build_method, build_model
from skipinit_jax.variants import PURPLE, VARIANTS, Variant

FIGURES = {
  f'{name}, {dataset}': grid.columns
  for name, study in STUDIES.items()
  for dataset, grid in study.grids.items()
} | {'propagation': tuple(COLUMNS), 'curvature': DRAWN}


@pytest.mark.parametrize('figure', FIGURES)
def test_lines_of_a_figure_differ(figure):
  rows = [VARIANTS[column] for column in FIGURES[figure]]
  # Loss curves have no markers; where nothing is finite there are no dashes.
  for name in ('label', 'marker'):
    looks = {getattr(row, name) for row in rows}
    assert len(looks) == len(rows), name
  assert len({(row.color, row.dashes) for row in rows}) == len(rows)


def test_published_figures_are_of_variants():
  tables = [published.DEPTH, published.ABLATIONS, published.FIRST_EPOCH]
  for table in (*tables, published.IMAGENET):
    assert table.keys() <= VARIANTS.keys()


def test_two_rows_make_a_method(tmp_path, monkeypatch):
  row = Variant({'model.method': 'made_up'}, 'Made up', PURPLE, '*', '-')
  monkeypatch.setitem(METHODS, 'made_up', Method(alpha=0.125))
  monkeypatch.setitem(VARIANTS, 'made_up', row)
  grid = dataclasses.replace(make_grid(), columns=('skipinit', 'made_up'))

  # The study's plan and the network.
  cell = next(c for c in cells(grid) if c.column == 'made_up')
  config = make_run(grid, cell, -2, 0, TEST).config
  assert build_method(config).alpha == 0.125
  model = build_model(config, 10, 'cpu')
  images = jnp.zeros((1, 8, 8, 1))
  init = functools.partial(model.init, train=False)
  assert jax.eval_shape(init, jax.random.key(0), images)['params']

  # The tables and the figures.
  write_runs(tmp_path, grid)
  study = make_study(grid)
  table = next(make_tables(Findings(study, grid, 'cifar10', tmp_path)))
  assert [label for label, _ in table.heads] == [
    'depth',
    'SkipInit 0',
    'Made up',
  ]
  page = write_report(study, grid, 'cifar10', tmp_path).read_text()
  assert 'depth 16, Made up' in page
  figure = (tmp_path / 'figures' / 'accuracy.svg').read_text()
  assert '>Made up</text>' in figure
  assert PURPLE.lower() in figure

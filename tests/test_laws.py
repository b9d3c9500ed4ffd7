"""The exponent of the best rate, from losses whose best rate is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from skipinit_jax.experiments import laws
from skipinit_jax.experiments.findings import Curve
from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Cell,
  cells,
  make_run,
)
from skipinit_jax.experiments.selection import Mean, Summary
from skipinit_jax.experiments.studies import STUDIES
from skipinit_jax.intervals import slope

RATES = range(-10, 1)
DEPTHS = (16, 28, 52, 100)


def by_rate(*best):
  """Losses of seeds that are parabolas with these lowest points."""
  return {
    rate: Mean(
      0.9,
      0.0,
      0.1,
      0.1,
      0,
      tuple(0.9 for _ in best),
      tuple(0.1 + (rate - b) ** 2 for b in best),
    )
    for rate in RATES
  }


@pytest.mark.parametrize('best', [-6.0, -4.3, -3.5, -1.01])
def test_the_best_rate_lies_at_the_lowest_point_of_the_parabola(best):
  losses = {rate: 2.0 + 0.3 * (rate - best) ** 2 for rate in RATES}
  assert laws.best_exponent(losses) == pytest.approx(best)
  finite = {r: v if r <= round(best) else None for r, v in losses.items()}
  assert laws.best_exponent(finite) == round(best)
  assert laws.best_exponent(dict.fromkeys(RATES)) is None


def test_at_the_edge_nothing_is_made_up():
  assert laws.best_exponent({-3: 1.0, -2: 2.0, -1: 9.0}) == -3
  assert laws.best_exponent({-4: 2.0, -2: 1.0, -1: 1.1}) == -2  # Uneven.
  assert laws.best_exponent({-3: 1.0, -2: 1.0, -1: 1.0}) == -3


def test_seeds_are_taken_one_by_one():
  assert laws.by_seed(by_rate(-5.25, -4.5)) == pytest.approx([-5.25, -4.5])


def test_the_slope_is_that_of_least_squares_with_students_interval():
  rng = np.random.default_rng(0)
  x = rng.normal(size=9)
  inside = 0
  for _ in range(400):
    y = 1.5 - 0.7 * x + rng.normal(size=9)
    found, half = slope(x, y)
    assert found == pytest.approx(np.polyfit(x, y, 1)[0])
    inside += abs(found + 0.7) <= half
  assert 0.92 < inside / 400 < 0.98
  assert slope([1, 1, 1], [1, 2, 3]) is None
  assert slope([1, 2], [1, 2]) is None


def curve(*sums):
  lines = [{'step': 0, 'loss': 1.0}]
  lines += [{'branch_share': {'a': s / 4, 'b': 3 * s / 4}} for s in sums]
  return Curve(lines, diverged=False)


def test_effective_depth_is_the_mean_over_watched_steps():
  assert laws.effective_depth(curve(1.0, 2.0, 6.0)) == pytest.approx(3.0)
  assert laws.effective_depth(curve()) is None
  assert laws.effective_depth(None) is None


def test_the_law_is_found_again():
  """Rates that fall as depth^-1.5; effective depths that grow as its root."""
  summaries, curves = {}, {}
  for depth in DEPTHS:
    cell = Cell('', str(depth), 'skipinit')
    best = -1.5 * math.log2(depth / 16) - 0.7
    summaries[cell] = Summary(
      cell, by_rate(best - 0.2, best + 0.2), list(RATES), rate=-3, trains=True
    )
    curves[cell] = curve(math.sqrt(depth))
  grid = SimpleNamespace(
    rows=SimpleNamespace(values=dict.fromkeys(map(str, DEPTHS)))
  )
  findings = SimpleNamespace(grid=grid, summaries=summaries, curves=curves)
  found = laws.exponents(findings, '', 'skipinit')
  assert found['depth'][0] == pytest.approx(-1.5)
  assert found['effective'][0] == pytest.approx(-3.0)
  assert 0 < found['depth'][1] < 1
  fails = {c: Summary(c, {}, [], rate=-3, trains=False) for c in summaries}
  findings.summaries = fails
  assert laws.exponents(findings, '', 'skipinit')['depth'] is None


def test_test_runs_measure_the_effective_depth():
  for study in STUDIES.values():
    for grid in study.grids.values() if study.law else ():
      for cell in cells(grid):
        for split, watched in ((VALIDATION, False), (TEST, True)):
          run = make_run(grid, cell, grid.rates[0], 0, split)
          every, steps = run.config.watch_every_steps, run.config.epochs * 44
          assert bool(every and every < steps / 4) == watched

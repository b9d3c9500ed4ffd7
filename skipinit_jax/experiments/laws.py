"""How the best learning rate falls with the depth: the exponent of a power law.

The best rate of a seed is where the parabola through its smallest held-out loss
and the losses beside it is least, with the logarithm of the rate along x. The
exponent is the slope of log(rate) by least squares over all depths and seeds.
"""

import math
import statistics
from collections.abc import Mapping

from skipinit_jax.experiments.findings import Curve, Findings
from skipinit_jax.experiments.grid import Cell
from skipinit_jax.experiments.selection import Mean
from skipinit_jax.intervals import slope


def best_exponent(losses: Mapping[int, float | None]) -> float | None:
  """The exponent of 2 of the best rate, between those tried; None: no loss.

  >>> best_exponent({-3: 2.0, -2: 1.0, -1: 1.0})
  -1.5
  >>> best_exponent({-3: 2.0, -2: 1.0, -1: None})
  -2.0
  """
  finite = {rate: loss for rate, loss in losses.items() if loss is not None}
  if not finite:
    return None
  tried, best = sorted(losses), min(finite, key=finite.__getitem__)
  place = tried.index(best)
  if place in (0, len(tried) - 1):
    return float(best)
  low, high = tried[place - 1], tried[place + 1]
  if low not in finite or high not in finite or best - low != high - best:
    return float(best)
  left, middle, right = finite[low], finite[best], finite[high]
  bend = left - 2 * middle + right
  step = (left - right) / (2 * bend) if bend > 0 else 0.0
  return best + step * (best - low)


def by_seed(by_rate: Mapping[int, Mean]) -> list[float]:
  """The exponent of the best rate of each seed that trains at any."""
  seeds = range(min(mean.runs for mean in by_rate.values()))
  found = (
    best_exponent({rate: mean.losses[seed] for rate, mean in by_rate.items()})
    for seed in seeds
  )
  return [exponent for exponent in found if exponent is not None]


def effective_depth(curve: Curve | None) -> float | None:
  """The branches' shares of their blocks' outputs, summed over blocks.

  The mean over a run's watched steps, which are evenly spaced; None if there is
  none.
  """
  sums = [
    sum(line['branch_share'].values())
    for line in (curve.lines if curve else ())
    if None not in line.get('branch_share', {None: None}).values()
  ]
  return statistics.fmean(sums) if sums else None


def effective_depths(
  findings: Findings, panel: str, column: str
) -> dict[str, float | None]:
  """The effective depth at the chosen rate, by row; None: not measured."""
  return {
    row: effective_depth(findings.curves[Cell(panel, row, column)])
    for row in findings.grid.rows.values
  }


def exponents(
  findings: Findings, panel: str, column: str
) -> dict[str, tuple[float, float] | None]:
  """Exponents of the best rate, by the depth of rows and by effective depth."""
  points: dict[str, list[tuple[float, float]]] = {'depth': [], 'effective': []}
  for row, effective in effective_depths(findings, panel, column).items():
    summary = findings.summaries[Cell(panel, row, column)]
    if summary.rate is None or summary.trains is False:
      continue
    for kind, depth in {'depth': float(row), 'effective': effective}.items():
      if depth:
        x = math.log2(depth)
        points[kind] += [(x, y) for y in by_seed(summary.by_rate)]
  return {
    kind: slope([x for x, _ in some], [y for _, y in some])
    for kind, some in points.items()
  }

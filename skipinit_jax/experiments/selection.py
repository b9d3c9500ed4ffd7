"""From the results of runs to a table's cells: means, rates, what trains."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Cell,
  Grid,
  Run,
  cells,
  make_run,
)
from skipinit_jax.experiments.words import percent
from skipinit_jax.intervals import half_interval


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    status: 'completed' or 'diverged'.
    top1: of the last evaluation, a fraction; 0 if the run diverged.
    loss: of that evaluation, None if not finite.
    train_loss: the last that was logged, None if not finite.
    chance: share of the largest class among the images evaluated on.
    eval_size: number of those images.
    seconds: run time.
    steps: number of training steps.
    device, revision, versions: what it ran on, as text.
  """

  status: str
  top1: float
  loss: float | None
  train_loss: float | None
  chance: float
  eval_size: int
  seconds: float
  steps: int
  device: str = 'unknown'
  revision: str = 'unknown'
  versions: str = 'unknown'


@dataclasses.dataclass(frozen=True)
class Mean:
  """The mean over the best seeds.

  Attributes:
    top1: mean over the best `grid.best` seeds, a fraction.
    error: standard error of that mean; with one seed, that of a share of the
      images evaluated on.
    loss, train_loss: means over the same seeds; None if any is not finite.
    diverged: number of all seeds that diverged.
    seeds: the accuracy of each seed, in order; 0 where it diverged.
    losses: the loss of each seed, in order; None where it is not finite.
    interval: half of a 95 % interval for the mean over seeds, if all enter and
      there are several; else None.
  """

  top1: float
  error: float
  loss: float | None
  train_loss: float | None
  diverged: int
  seeds: tuple[float, ...]
  losses: tuple[float | None, ...] = ()
  interval: float | None = None

  @property
  def runs(self) -> int:
    """Number of all seeds."""
    return len(self.seeds)

  @property
  def bar(self) -> float:
    """The interval where there is one, else the standard error."""
    return self.error if self.interval is None else self.interval


@dataclasses.dataclass(frozen=True)
class Summary:
  """The content of a table's cell.

  Attributes:
    cell: its place.
    by_rate: exponent -> mean on the held out images, of finished rates only.
    tried: all exponents so far, finished or not.
    rate: the chosen exponent, None until all rates are done.
    rates: the smallest and the largest exponent within error of `rate`.
    largest_stable: the largest exponent at which no seed diverged.
    result: the mean on the test split at the chosen rate, None until done.
    trains: whether any rate, or `result`, beats the largest class by three
      standard errors; None until done.
    why_not: in words, where `result` does not.
  """

  cell: Cell
  by_rate: Mapping[int, Mean]
  tried: Sequence[int]
  rate: int | None = None
  rates: tuple[int, int] | None = None
  largest_stable: int | None = None
  result: Mean | None = None
  trains: bool | None = None
  why_not: str = ''

  @property
  def at_the_edge(self) -> bool:
    """Whether a better rate may lie outside those tried."""
    return self.rate in (min(self.tried), max(self.tried))


Lookup = Callable[[Run], Outcome | None]


def read_outcome(folder: Path) -> Outcome | None:
  """The outcome of a run, None if it is not finished.

  Raises:
    ValueError: a result that can't be read.
  """
  path = folder / 'result.json'
  if not path.exists():
    return None
  try:
    result = json.loads(path.read_text())
    diverged = result['status'] == 'diverged'
    versions = (result.get('versions') or {}).items()
    return Outcome(
      status=result['status'],
      top1=0.0 if diverged else float(result['eval']['top1']),
      loss=None if diverged else result['eval']['loss'],
      train_loss=None if diverged else result['last_train']['loss'],
      chance=result['chance'],
      eval_size=result['eval_size'],
      seconds=result['seconds'],
      steps=result['steps'],
      device=str(result.get('device') or 'unknown'),
      revision=str(result.get('revision') or 'unknown'),
      versions=', '.join(f'{k} {v}' for k, v in versions) or 'unknown',
    )
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: {error!r}') from None


def mean(outcomes: Iterable[Outcome], best: int) -> Mean:
  """The mean over the `best` seeds of the highest accuracy."""
  outcomes = list(outcomes)
  kept = sorted(outcomes, key=lambda o: o.top1, reverse=True)[:best]
  top1 = statistics.fmean(o.top1 for o in kept)
  if len(kept) > 1:
    error = statistics.stdev(o.top1 for o in kept) / math.sqrt(len(kept))
  else:
    error = share_error(top1, kept[0].eval_size)
  return Mean(
    top1=top1,
    error=error,
    loss=_mean_or_none([o.loss for o in kept]),
    train_loss=_mean_or_none([o.train_loss for o in kept]),
    diverged=sum(o.status == 'diverged' for o in outcomes),
    seeds=tuple(o.top1 for o in outcomes),
    losses=tuple(o.loss for o in outcomes),
    interval=half_interval([o.top1 for o in kept])
    if 1 < len(kept) == len(outcomes)
    else None,
  )


def paired(ours: Mean, theirs: Mean) -> tuple[float, float] | None:
  """The mean difference seed by seed, and half of its 95 % interval.

  None unless both have the same seeds, several, of which all enter.
  """
  if ours.interval is None or theirs.interval is None:
    return None
  if ours.runs != theirs.runs:
    return None
  each = [a - b for a, b in zip(ours.seeds, theirs.seeds, strict=True)]
  return statistics.fmean(each), half_interval(each)


def share_error(share: float, images: int) -> float:
  """Standard error of a share of a number of images."""
  return math.sqrt(share * (1 - share) / images)


def summarize(grid: Grid, cell: Cell, look_up: Lookup) -> Summary:
  """The summary of a cell's finished runs."""

  def finished(rate: int, split: str) -> list[Outcome] | None:
    found = [look_up(run) for run in runs_at(grid, cell, rate, split)]
    outcomes = [outcome for outcome in found if outcome]
    return outcomes if len(outcomes) == len(found) else None

  by_rate, good, untried = {}, False, list(grid.rates)
  while untried:
    for rate in untried:
      if outcomes := finished(rate, VALIDATION):
        by_rate[rate] = mean(outcomes, grid.best)
        good |= beats_chance(by_rate[rate], outcomes)
    if not by_rate.keys() >= set(untried):
      return Summary(cell, by_rate, sorted({*by_rate, *untried}))
    untried = wider(by_rate, good, grid.widest)
  tried = sorted(by_rate)
  rate, rates = choose_rate(by_rate)
  stable = [r for r, m in by_rate.items() if not m.diverged]
  summary = Summary(
    cell, by_rate, tried, rate, rates, max(stable, default=None)
  )
  if not (outcomes := finished(rate, TEST)):
    return summary
  result = mean(outcomes, grid.best)
  reason = ''
  if not beats_chance(result, outcomes):
    reason = _failed_later(by_rate[rate]) if good else why_not(by_rate)
  return dataclasses.replace(
    summary, result=result, trains=good or not reason, why_not=reason
  )


def wider(
  by_rate: Mapping[int, Mean], good: bool, widest: tuple[int, int] | None
) -> list[int]:
  """The rate to try next, if a better one may lie outside those tried.

  Args:
    by_rate: of all exponents tried so far.
    good: whether any of them trains; if not, smaller ones are tried.
    widest: the smallest and the largest exponent to try.

  Returns:
    An exponent as far outside as the last two are apart, or none.
  """
  if widest is None or len(by_rate) < 2:
    return []
  tried = sorted(by_rate)
  best = choose_rate(by_rate)[0] if good else tried[0]
  if best == tried[0]:
    rate = 2 * tried[0] - tried[1]
  elif best == tried[-1]:
    rate = 2 * tried[-1] - tried[-2]
  else:
    return []
  return [rate] if widest[0] <= rate <= widest[1] else []


def beats_chance(result: Mean, outcomes: Sequence[Outcome]) -> bool:
  """Whether a mean lies three standard errors above the largest class."""
  chance, images = outcomes[0].chance, outcomes[0].eval_size
  return result.top1 > chance + 3 * share_error(chance, images)


def choose_rate(by_rate: Mapping[int, Mean]) -> tuple[int, tuple[int, int]]:
  """The best rate, and the smallest and largest whose error bars meet its own.

  Among equals, the one of the smallest loss.
  """

  def order(rate: int) -> tuple[float, float]:
    loss = by_rate[rate].loss
    return by_rate[rate].top1, -math.inf if loss is None else -loss

  rate = max(by_rate, key=order)
  best = by_rate[rate]
  near = [
    r for r, m in by_rate.items() if m.top1 + m.error >= best.top1 - best.error
  ]
  return rate, (min(near), max(near))


def why_not(by_rate: Mapping[int, Mean]) -> str:
  """Whether the runs of a cell that does not train diverged or just ended."""
  rates = f', at rates of 2^{min(by_rate)} to 2^{max(by_rate)}'
  runs = sum(m.runs for m in by_rate.values())
  diverged = sum(m.diverged for m in by_rate.values())
  if diverged == runs:
    return f'all {runs} runs diverged{rates}'
  if not diverged:
    return f'all {runs} runs ended finite, at chance{rates}'
  return (
    f'{diverged} of {runs} runs diverged, the others ended at chance{rates}'
  )


def runs_at(grid: Grid, cell: Cell, rate: int, split: str) -> list[Run]:
  """The runs of a cell at a rate, one for each seed."""
  tuning, tests = seeds_of(grid, cell.row)
  seeds = tuning if split == VALIDATION else tests
  return [make_run(grid, cell, rate, seed, split) for seed in range(seeds)]


def seeds_of(grid: Grid, row: str) -> tuple[int, int]:
  """The number of seeds of a row: at each rate, and in tests."""
  return grid.fewer.get(row, (grid.tuning_seeds or grid.seeds, grid.seeds))


def cell_runs(
  grid: Grid, cell: Cell, rates: Sequence[int], rate: int | None
) -> list[Run]:
  """The runs of a cell: to choose a rate, then tests at the chosen one."""
  at = [(each, VALIDATION) for each in rates]
  at += [] if rate is None else [(rate, TEST)]
  return [r for each, split in at for r in runs_at(grid, cell, each, split)]


def known_runs(grid: Grid, look_up: Lookup) -> list[Run]:
  """The runs that can be started so far; those that cells share, once."""
  known: dict[str, Run] = {}
  for cell in cells(grid):
    summary = summarize(grid, cell, look_up)
    for run in cell_runs(grid, cell, summary.tried, summary.rate):
      known.setdefault(run.id, run)
  return list(known.values())


def wanted(grid: Grid, look_up: Lookup) -> list[Run]:
  """The known runs that are not finished."""
  return [run for run in known_runs(grid, look_up) if look_up(run) is None]


def total_runs(grid: Grid, look_up: Lookup) -> int:
  """The number of runs of a grid as widened so far; shared ones once."""
  total = set()
  for cell in cells(grid):
    summary = summarize(grid, cell, look_up)
    # Tests are as many at any rate.
    rate = grid.rates[0] if summary.rate is None else summary.rate
    total |= {run.id for run in cell_runs(grid, cell, summary.tried, rate)}
  return len(total)


def _failed_later(held_out: Mean) -> str:
  return (
    f'reached {percent(held_out.top1, held_out.error)} on the held out images, '
    'and failed at the same rate on the whole split'
  )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
  finite = [value for value in values if value is not None]
  return statistics.fmean(finite) if len(finite) == len(values) else None

"""From results of runs to what a table says: means, rates, what trains."""

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
  Run,
  cells,
  make_run,
)
from skipinit_jax.experiments.studies import Grid


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    status: 'completed' or 'diverged'.
    top1: of its last evaluation, a fraction; 0 if it diverged.
    loss: of that evaluation, None if not finite.
    train_loss: the last that was logged, None if not finite.
    chance: share of the largest class among the images evaluated on.
    eval_size: their number.
    seconds: that it took.
    steps: made.
  """

  status: str
  top1: float
  loss: float | None
  train_loss: float | None
  chance: float
  eval_size: int
  seconds: float
  steps: int


@dataclasses.dataclass(frozen=True)
class Mean:
  """The mean of some seeds.

  Attributes:
    top1: mean of the best so many, a fraction.
    error: its standard error: over the seeds; of a share of so many images,
      where there is one seed.
    loss, train_loss: means over the same seeds; None if any is not finite.
    diverged: number of all seeds that did.
    runs: number of all seeds.
  """

  top1: float
  error: float
  loss: float | None
  train_loss: float | None
  diverged: int
  runs: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a table says in a cell.

  Attributes:
    cell: which.
    by_rate: exponent -> mean on the held out images, of the rates that are
      done.
    rate: the chosen exponent, None until all rates are done.
    rates: the smallest and the largest exponent within error of it.
    largest_stable: the largest exponent at which no seed diverged.
    result: the mean on the test split at the chosen rate, None until done.
    trains: whether any rate, or that result, beats the largest class by three
      standard errors.
    why_not: in words, where the result does not.
  """

  cell: Cell
  by_rate: Mapping[int, Mean]
  rate: int | None = None
  rates: tuple[int, int] | None = None
  largest_stable: int | None = None
  result: Mean | None = None
  trains: bool | None = None
  why_not: str = ''


Lookup = Callable[[Run], Outcome | None]


def read_outcome(folder: Path) -> Outcome | None:
  """The outcome of a finished run, None if it is not.

  Raises:
    ValueError: a result that can't be read.
  """
  path = folder / 'result.json'
  if not path.exists():
    return None
  try:
    result = json.loads(path.read_text())
    diverged = result['status'] == 'diverged'
    return Outcome(
      status=result['status'],
      top1=0.0 if diverged else float(result['eval']['top1']),
      loss=None if diverged else result['eval']['loss'],
      train_loss=None if diverged else result['last_train']['loss'],
      chance=result['chance'],
      eval_size=result['eval_size'],
      seconds=result['seconds'],
      steps=result['steps'],
    )
  except (KeyError, OSError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: {error!r}') from None


def mean(outcomes: Iterable[Outcome], best: int) -> Mean:
  """The mean of the `best` best of some seeds."""
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
    loss=_mean_or_none(o.loss for o in kept),
    train_loss=_mean_or_none(o.train_loss for o in kept),
    diverged=sum(o.status == 'diverged' for o in outcomes),
    runs=len(outcomes),
  )


def share_error(share: float, images: int) -> float:
  """Standard error of a share of so many images."""
  return math.sqrt(share * (1 - share) / images)


def summarize(grid: Grid, cell: Cell, look_up: Lookup) -> Summary:
  """What is known of a cell from the runs that are done."""
  by_rate, good = {}, False
  for rate in grid.rates:
    outcomes = [look_up(r) for r in runs_at(grid, cell, rate, VALIDATION)]
    if all(outcomes):
      by_rate[rate] = mean(outcomes, grid.best)
      good |= beats_chance(by_rate[rate], outcomes)
  if len(by_rate) < len(grid.rates):
    return Summary(cell, by_rate)
  rate, rates = choose_rate(by_rate)
  stable = [r for r, m in by_rate.items() if not m.diverged]
  summary = Summary(cell, by_rate, rate, rates, max(stable, default=None))
  outcomes = [look_up(r) for r in runs_at(grid, cell, rate, TEST)]
  if not all(outcomes):
    return summary
  result = mean(outcomes, grid.best)
  if beats_chance(result, outcomes):
    reason = ''
  elif good:
    held_out = by_rate[rate]
    reason = (
      f'reached {100 * held_out.top1:.1f} ± {100 * held_out.error:.1f} on the '
      'held out images, and failed at the same rate on the whole split'
    )
  else:
    reason = why_not(by_rate)
  return dataclasses.replace(
    summary, result=result, trains=good or not reason, why_not=reason
  )


def beats_chance(result: Mean, outcomes: Sequence[Outcome]) -> bool:
  """Whether a mean of outcomes lies three errors above the largest class."""
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
  runs = sum(m.runs for m in by_rate.values())
  diverged = sum(m.diverged for m in by_rate.values())
  if diverged == runs:
    return f'all {runs} runs diverged'
  if not diverged:
    return f'all {runs} runs ended finite, at chance'
  return f'{diverged} of {runs} runs diverged, the others ended at chance'


def runs_at(grid: Grid, cell: Cell, rate: int, split: str) -> list[Run]:
  """The runs of a cell at a rate, one a seed."""
  return [make_run(grid, cell, rate, seed, split) for seed in range(grid.seeds)]


def known_runs(grid: Grid, look_up: Lookup) -> list[Run]:
  """The runs that can be started so far: rates to choose by, then tests.

  Runs that two cells share are named once.
  """
  runs: dict[str, Run] = {}
  for cell in cells(grid):
    known = [
      run
      for rate in grid.rates
      for run in runs_at(grid, cell, rate, VALIDATION)
    ]
    rate = summarize(grid, cell, look_up).rate
    if rate is not None:
      known += runs_at(grid, cell, rate, TEST)
    for run in known:
      runs.setdefault(run.id, run)
  return list(runs.values())


def wanted(grid: Grid, look_up: Lookup) -> list[Run]:
  """Those of the known runs that are not finished."""
  return [run for run in known_runs(grid, look_up) if look_up(run) is None]


def total_runs(grid: Grid) -> int:
  """All runs of a grid, tests included; shared ones count once."""
  tuning = {
    run.id
    for cell in cells(grid)
    for rate in grid.rates
    for run in runs_at(grid, cell, rate, VALIDATION)
  }
  tests = {
    run.id
    for cell in cells(grid)
    for run in runs_at(grid, cell, grid.rates[0], TEST)
  }
  return len(tuning) + len(tests)


def _mean_or_none(values: Iterable[float | None]) -> float | None:
  values = list(values)
  return None if None in values else statistics.fmean(values)

"""The results of a study's runs, read once each."""

from pathlib import Path
from typing import Any, NamedTuple

from skipinit_jax.errors import RunError
from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Cell,
  Grid,
  Run,
  cells,
)
from skipinit_jax.experiments.runner import Results
from skipinit_jax.experiments.selection import (
  Outcome,
  Summary,
  cell_runs,
  summarize,
  total_runs,
)
from skipinit_jax.experiments.studies import Study
from skipinit_jax.training.lines import METRICS, Lines


class Curve(NamedTuple):
  """A run's metric lines, and whether it diverged."""

  lines: list[dict[str, Any]]
  diverged: bool


class Findings:
  """The results of a study's runs.

  Attributes:
    summaries: of every cell.
    runs: of every cell; the test runs come last, once the rate is chosen.
    outcomes: by run id, of finished runs only.
    total: number of runs, as far as the rates are known.
    chance: split -> share of its largest class, 0 while none of its runs is
      done.
    curves: the first test run of a cell at the chosen rate, None if not done.
    problems: a line on each file that can't be read.
  """

  def __init__(self, study: Study, grid: Grid, dataset: str, workdir: Path):
    self.study, self.grid = study, grid
    self.dataset, self.workdir = dataset, workdir
    results = Results(workdir)
    self.summaries: dict[Cell, Summary] = {
      cell: summarize(grid, cell, results) for cell in cells(grid)
    }
    self.runs: dict[Cell, list[Run]] = {
      cell: cell_runs(grid, cell, summary.tried, summary.rate)
      for cell, summary in self.summaries.items()
    }
    self.outcomes: dict[str, Outcome] = {}
    self.chance = {VALIDATION: 0.0, TEST: 0.0}
    for runs in self.runs.values():
      for run in runs:
        if outcome := results(run):
          self.outcomes[run.id] = outcome
          self.chance[run.split] = outcome.chance
    self.total = total_runs(grid, results)
    self.problems = list(results.problems.values())
    self.curves = {cell: self._curve(cell) for cell in self.runs}

  def done(self, runs: list[Run]) -> int:
    """The number of those runs that are finished."""
    return sum(run.id in self.outcomes for run in runs)

  def of_panel(self, panel: str) -> dict[Cell, Summary]:
    """The summaries of a panel's cells."""
    return {c: s for c, s in self.summaries.items() if c.panel == panel}

  def test_runs(self, cell: Cell) -> list[Run]:
    """The test runs of a cell at the chosen rate; empty before the choice."""
    return [run for run in self.runs[cell] if run.split == TEST]

  def _curve(self, cell: Cell) -> Curve | None:
    run = next(iter(self.test_runs(cell)), None)
    if run is None or run.id not in self.outcomes:
      return None
    folder = run.folder(self.workdir)
    lines = []
    try:
      lines, broken = Lines(folder).read_and_count()
      if broken:
        self.problems.append(
          f'{folder / METRICS}: {broken} broken lines skipped'
        )
    except RunError as error:
      self.problems.append(str(error))
    return Curve(lines, self.outcomes[run.id].status == 'diverged')

"""What a report says, in tables and in words, before it is rendered."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from skipinit_jax.errors import RunError
from skipinit_jax.experiments.figures import Curve, cell_name, power
from skipinit_jax.experiments.grid import TEST, VALIDATION, Cell, Run, cells
from skipinit_jax.experiments.runner import Results
from skipinit_jax.experiments.selection import (
  Summary,
  runs_at,
  summarize,
  total_runs,
)
from skipinit_jax.experiments.studies import Grid, Study
from skipinit_jax.published import Accuracy
from skipinit_jax.training.lines import Lines
from skipinit_jax.variants import VARIANTS

DASH, MINUS, TIMES = '\N{EN DASH}', '\N{MINUS SIGN}', '\N{MULTIPLICATION SIGN}'
DATASETS = {
  'cifar10': 'CIFAR-10',
  'cifar100': 'CIFAR-100',
  'imagenet2012': 'ImageNet',
}
EDGE = '* The smallest or largest rate tried: a better one may lie outside.'


class Findings:
  """What the runs of a study gave; every file is read once.

  Attributes:
    summaries: of every cell.
    runs: of every cell, the test runs last and only once the rate is chosen.
    done: the outcomes of the runs that are, by run.
    problems: lines for people.
    chance: split -> share of its largest class, 0 if none of its runs is done.
  """

  def __init__(
    self,
    study: Study,
    grid: Grid,
    dataset: str,
    workdir: Path,
    problems: Sequence[str] = (),
  ):
    self.study, self.grid = study, grid
    self.dataset, self.workdir = dataset, workdir
    self.look_up = Results(workdir)
    self.summaries = {
      cell: summarize(grid, cell, self.look_up) for cell in cells(grid)
    }
    self.runs = {cell: self._runs(cell) for cell in self.summaries}
    self.anchors = {c: f'runs-{i}' for i, c in enumerate(self.summaries, 1)}
    every = {run.id: run for runs in self.runs.values() for run in runs}
    self.done = {
      run.id: outcome
      for run in every.values()
      if (outcome := self.look_up(run))
    }
    self.problems = [*problems, *self.look_up.problems.values()]
    self.chance = dict.fromkeys((VALIDATION, TEST), 0.0) | {
      run.split: self.done[run.id].chance
      for run in every.values()
      if run.id in self.done
    }

  def curve(self, cell: Cell) -> Curve | None:
    """The first test run of a cell at the chosen rate."""
    run = next((r for r in self.runs[cell] if r.split == TEST), None)
    outcome = run and self.look_up(run)
    if not outcome:
      return None
    path = run.folder(self.workdir) / 'metrics.jsonl'
    try:
      lines, broken = Lines(path.parent).read_and_count()
      if broken:
        self.problems.append(f'{path}: {broken} broken lines skipped')
    except RunError as error:
      self.problems.append(str(error))
      lines = []
    return Curve(lines, outcome.status == 'diverged')

  def _runs(self, cell: Cell) -> list[Run]:
    at = [(rate, VALIDATION) for rate in self.grid.rates]
    rate = self.summaries[cell].rate
    at += [] if rate is None else [(rate, TEST)]
    return [r for each in at for r in runs_at(self.grid, cell, *each)]


class Entry(NamedTuple):
  """A place in a table.

  Attributes:
    text: what is in it; lines are told apart by newlines.
    cell: whose runs it links to.
    label: for a screen reader, where the text alone says too little.
  """

  text: str
  cell: Cell | None = None
  label: str = ''


class Table(NamedTuple):
  """A table; `heads` are its columns, in groups: label, names."""

  caption: str
  heads: Sequence[tuple[str, Sequence[str]]]
  rows: Sequence[Sequence[Entry]]
  notes: Sequence[str] = ()


def make_tables(findings: Findings) -> Iterator[Table]:
  """The study's tables, in the order of the report."""
  study = findings.study
  for panel in findings.grid.panels.values:
    yield _accuracies(findings, panel)
    if study.rates_curve:
      yield _losses_and_rates(findings, panel)
    if study.published and findings.dataset == study.published_for:
      yield _comparison(findings, panel)
  if study.published and findings.dataset != study.published_for:
    yield _published_elsewhere(study)


def make_facts(findings: Findings) -> list[tuple[str, str]]:
  """How the numbers came about: heading and text."""
  grid, study, done = findings.grid, findings.study, findings.done.values()
  seeds = 'one seed' if grid.seeds == 1 else f'{grid.seeds} seeds'
  low, high = (
    rate_text(grid, rate) for rate in (grid.rates[0], grid.rates[-1])
  )
  tuned = (
    f'Every cell was trained at {len(grid.rates)} learning rates, {low} to '
    f'{high}, with '
    f'{seeds} each and {grid.validation:,} training images held out. The rate '
    'of the best accuracy on those was chosen, at equal accuracy that of the '
    'smallest loss. In brackets: the smallest and the largest rate whose error '
    "bars meet the best one's."
  )
  size = {o.eval_size for o in done}
  images = ' or '.join(f'{n:,}' for n in sorted(size)) or 'all'
  if grid.best > 1:
    error = f'± is the standard error of the mean of {seeds}.'
    if grid.best < grid.seeds:
      error = (
        f'± is the standard error of the mean of the best {grid.best} of '
        f'{seeds}: best on the held out images where a rate is chosen, best '
        'on the test images in a test accuracy.'
      )
  else:
    error = (
      '± is the standard error of a share of the images evaluated on '
      f'({images}): one seed enters, so it says nothing about seeds.'
    )
  changed = ', '.join(f'{k}={v}' for k, v in grid.overrides.items())
  pairs = [
    ('Tuned on', tuned),
    (
      'Tested on',
      'The test split was looked at once, at the chosen rate, after training '
      'on the whole training split; it chose no rate.',
    ),
    ('Errors', error),
    (
      f'Does not train ({DASH})',
      'The test accuracy is not above the share of the largest class '
      f'({findings.chance[TEST]:.1%}) by three standard errors.',
    ),
    ('Setting', grid.choices),
    ('Changed by hand', changed),
    ('Published figures', study.source),
    (
      'Runs',
      f'{len(done):,} of {total_runs(grid):,} done, '
      f'{sum(o.status == "diverged" for o in done):,} of these diverged; '
      f'{_duration(sum(o.seconds for o in done))} of run time in all.',
    ),
    *_provenance(findings),
  ]
  return [(name, text) for name, text in pairs if text]


def _accuracies(findings: Findings, panel: str) -> Table:
  """Test accuracy and optimal rate, as De & Smith print them."""
  grid = findings.grid
  names = ('accuracy (%)', 'optimal rate')

  def entries(cell: Cell) -> tuple[Entry, Entry]:
    summary = findings.summaries[cell]
    rate = '' if summary.rate is None else _rates(grid, summary)
    return _ours(findings, cell), Entry(rate, cell if rate else None)

  of_panel = [s for c, s in findings.summaries.items() if c.panel == panel]
  notes = [
    f'{cell_name(grid, s.cell)} ({_ours(findings, s.cell).text}): '
    f'{s.why_not}; {_test_words(s)}.'
    for s in of_panel
    if s.why_not
  ]
  if any(_at_the_edge(grid, s) for s in of_panel):
    notes.append(EDGE)
  caption = 'Test accuracy and optimal learning rate'
  return _grid_table(findings, panel, caption, names, entries, notes)


def _losses_and_rates(findings: Findings, panel: str) -> Table:
  """Training loss and the largest stable rate."""
  grid = findings.grid

  def entries(cell: Cell) -> tuple[Entry, Entry]:
    summary = findings.summaries[cell]
    result, stable = summary.result, summary.largest_stable
    loss = 'not done'
    if result:
      loss = DASH if result.train_loss is None else f'{result.train_loss:.3g}'
    if stable is not None:
      rate = rate_text(grid, stable)
      rate += '\n(largest tried)' if stable == max(grid.rates) else ''
    else:
      rate = 'not done' if summary.rate is None else 'none'
    return Entry(loss, cell), Entry(rate, cell)

  names = ('training loss', 'largest stable rate')
  caption = 'Training loss at the end and largest stable learning rate'
  note = (
    'Training loss: of the test runs, the last that was logged. Stable: no '
    'seed diverged.'
  )
  return _grid_table(findings, panel, caption, names, entries, [note])


def _grid_table(findings, panel, caption, names, entries, notes) -> Table:
  """A table of the grid's own form: rows, and some columns for each method."""
  grid = findings.grid
  labels = [VARIANTS[column].label for column in grid.columns]
  rows = [
    [
      Entry(row),
      *itertools.chain(
        *(entries(Cell(panel, row, column)) for column in grid.columns)
      ),
    ]
    for row in grid.rows.values
  ]
  heads = [(grid.rows.name, ()), *((label, names) for label in labels)]
  return Table(_title(panel, caption), heads, rows, notes)


def _comparison(findings: Findings, panel: str) -> Table:
  """Ours beside the published, with the difference."""
  grid, study = findings.grid, findings.study
  rows = []
  for cell, summary in findings.summaries.items():
    if cell.panel != panel:
      continue
    theirs = _published(study, cell)
    rate = '' if summary.rate is None else _rates(grid, summary)
    rows.append(
      [
        Entry(f'{grid.rows.name} {cell.row}, {VARIANTS[cell.column].label}'),
        _ours(findings, cell),
        Entry(_published_text(theirs)),
        Entry(_difference(summary, theirs)),
        Entry(rate, cell if rate else None),
        Entry(_published_rates(theirs)),
      ]
    )
  names = (
    'cell',
    'ours (%)',
    'published (%)',
    'difference',
    'our rate',
    'published rate',
  )
  notes = [f'Published: {study.source}. Difference: ours less theirs.']
  if any('*' in entry.text for row in rows for entry in row):
    notes.append(EDGE)
  if grid.overrides:
    notes.append('Fields were changed by hand: ours is not the same training.')
  caption = _title(panel, 'Ours beside the published')
  return Table(caption, [(name, ()) for name in names], rows, notes)


def _published_elsewhere(study: Study) -> Table:
  """Published figures of another data set, without differences."""
  published = study.published
  columns = [column for column in VARIANTS if column in published]
  rows = [
    [
      Entry(str(row)),
      *(
        Entry(_published_text(published[column].get(row))) for column in columns
      ),
    ]
    for row in sorted({row for of in published.values() for row in of})
  ]
  name = next(iter(study.grids.values())).rows.name
  heads = [(name, ()), *((VARIANTS[column].label, ()) for column in columns)]
  where = dataset_name(study.published_for)
  caption = (
    f'Published for {where} (another data set and setting): accuracy (%)'
  )
  return Table(caption, heads, rows, [f'{study.source}.'])


def _ours(findings: Findings, cell: Cell) -> Entry:
  grid, summary = findings.grid, findings.summaries[cell]
  if summary.result and summary.trains:
    return Entry(_percent(summary.result.top1, summary.result.error), cell)
  if summary.result:
    return Entry(DASH, cell, f'does not train: {summary.why_not}')
  if summary.rate is None:
    return Entry(
      f'{len(summary.by_rate)} of {len(grid.rates)} rates done', cell
    )
  tests = [findings.look_up(r) for r in findings.runs[cell] if r.split == TEST]
  done = sum(outcome is not None for outcome in tests)
  return Entry(f'{done} of {len(tests)} test runs done', cell)


def _published(study: Study, cell: Cell) -> Accuracy | None:
  rows = study.published.get(cell.column, {})
  return rows.get(int(cell.row)) if cell.row.isdigit() else None


def _difference(summary: Summary, theirs: Accuracy | None) -> str:
  """In percent, with its error; in words where there is no such number."""
  if theirs is None or summary.result is None:
    return ''
  if theirs.value is None and not summary.trains:
    return 'both do not train'
  if theirs.value is None:
    return 'ours trains, theirs does not'
  if not summary.trains:
    return 'theirs trains, ours does not'
  difference = 100 * summary.result.top1 - theirs.value
  error = math.hypot(100 * summary.result.error, theirs.error or 0)
  sign = '' if round(difference, 1) == 0 else '+' if difference > 0 else MINUS
  return f'{sign}{abs(difference):.1f} ± {error:.1f}'


def _test_words(summary: Summary) -> str:
  result = summary.result
  if result.diverged == result.runs and summary.trains:
    return 'diverged there'
  if result.diverged == result.runs:
    return 'on the whole training split too'
  return f'test accuracy {_percent(result.top1, result.error)}'


def _percent(share: float, error: float) -> str:
  return f'{100 * share:.1f} ± {100 * error:.1f}'


def _published_text(theirs: Accuracy | None) -> str:
  if theirs is None:
    return 'not published'
  if theirs.value is None:
    return DASH
  error = '' if theirs.error is None else f' ± {theirs.error:.1f}'
  return f'{theirs.value:.1f}{error}'


def _published_rates(theirs: Accuracy | None) -> str:
  if theirs is None or theirs.rate is None:
    return ''
  low, high = theirs.rates
  return f'{power(theirs.rate)}\n({power(low)} to {power(high)})'


def _rates(grid: Grid, summary: Summary) -> str:
  if summary.trains is False:
    return DASH
  low, high = (rate_text(grid, rate) for rate in summary.rates)
  mark = ' *' if _at_the_edge(grid, summary) else ''
  return f'{rate_text(grid, summary.rate)}{mark}\n({low} to {high})'


def _at_the_edge(grid: Grid, summary: Summary) -> bool:
  """Whether a better rate may lie outside those tried."""
  if summary.rate is None or summary.trains is False:
    return False
  return summary.rate in (min(grid.rates), max(grid.rates))


def rate_text(grid: Grid, exponent: int) -> str:
  """A learning rate of a grid, as a power of two."""
  return power(exponent) + ('' if grid.unit == 1 else f' {TIMES} {grid.unit:g}')


def dataset_name(name: str) -> str:
  """A data set as people write it."""
  return DATASETS.get(name, name)


def _title(panel: str, caption: str) -> str:
  return f'{caption}, {panel}' if panel else caption


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.0f} seconds'
  if seconds < 2 * 3600:
    return f'{seconds / 60:.0f} minutes'
  return f'{seconds / 3600:,.1f} hours'


def _provenance(findings: Findings) -> Iterator[tuple[str, str]]:
  """Devices, revisions and versions, each that any run names."""
  named: dict[str, dict[str, None]] = {}
  for run in findings.done:
    path = findings.workdir / 'runs' / run / 'result.json'
    result = json.loads(path.read_text())
    versions = (result.get('versions') or {}).items()
    for name, value in (
      ('Device', result.get('device')),
      ('Revision', result.get('revision')),
      ('Versions', ', '.join(f'{k} {v}' for k, v in versions)),
    ):
      named.setdefault(name, {})[str(value or 'unknown')] = None
  for name, values in named.items():
    yield name, '; '.join(values)


def state_of(findings: Findings) -> str:
  """What a reader must know before the numbers; empty if all is well."""
  parts = []
  unfinished = sum(s.result is None for s in findings.summaries.values())
  if unfinished:
    parts.append(
      f'Unfinished: {unfinished} of {len(findings.summaries)} cells are not '
      'done.'
    )
  if findings.problems:
    parts.append(f'{len(findings.problems)} problems, listed at the end.')
  return ' '.join(parts)

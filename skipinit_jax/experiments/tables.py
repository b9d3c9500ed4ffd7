"""A report's tables, before they are rendered."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import Cell, Grid
from skipinit_jax.experiments.laws import effective_depths, exponents
from skipinit_jax.experiments.selection import Summary, paired
from skipinit_jax.experiments.studies import Study
from skipinit_jax.experiments.words import (
  DASH,
  MINUS,
  cell_name,
  dataset_name,
  percent,
  power,
  rate_text,
)
from skipinit_jax.published import Accuracy
from skipinit_jax.variants import VARIANTS

PAIRED = (
  'Paired by seed, with half of a 95 % interval for the mean difference. '
  '"Ahead" or "behind" only where the interval excludes zero; with several '
  'comparisons, one in twenty does so by chance.'
)
EDGE = '* The smallest or largest rate tried: a better one may lie outside.'


class Entry(NamedTuple):
  """A place in a table.

  Attributes:
    text: one line, or two.
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

  @property
  def flat_heads(self) -> list[str]:
    """One head for each column: its group's label, then its name."""
    return [
      f'{label} {name}'.strip()
      for label, names in self.heads
      for name in names or ['']
    ]


def make_tables(findings: Findings) -> Iterator[Table]:
  """The study's tables, in the order of the report."""
  study = findings.study
  comparable = findings.dataset == study.published_for
  yield from _regained(findings)
  for panel in findings.grid.panels.values if study.law else ():
    yield _exponents(findings, panel)
  for panel in findings.grid.panels.values:
    yield _accuracies(findings, panel)
    yield from _differences(findings, panel)
    if study.rates_curve:
      yield _losses_and_rates(findings, panel)
    if study.published and comparable:
      yield _comparison(findings, panel)
  if study.published and not comparable:
    yield _published_elsewhere(study)


def side_by_side(ours: Findings, theirs: Findings) -> Table:
  """The cells that two studies have in common, and their differences."""
  common = [cell for cell in ours.summaries if cell in theirs.summaries]
  rows = [
    [
      Entry(cell_name(ours.grid, cell)),
      Entry(_ours(ours, cell).text),
      Entry(_ours(theirs, cell).text),
      Entry(_less(theirs.summaries[cell], ours.summaries[cell]).text),
      Entry(_rates(ours, cell).text),
      Entry(_rates(theirs, cell).text),
    ]
    for cell in common
  ]
  first, second = ours.workdir.name, theirs.workdir.name
  heads = ('cell', f'{first} (%)', f'{second} (%)', f'{second} minus {first}')
  heads += (f'rate of {first}', f'rate of {second}')
  notes = [PAIRED]
  for each, other in ((ours, theirs), (theirs, ours)):
    if alone := [c for c in each.summaries if c not in other.summaries]:
      names = '; '.join(cell_name(each.grid, cell) for cell in alone)
      notes.append(f'Only in {each.workdir.name}: {names}.')
  heads_ = [(head, ()) for head in heads]
  return Table('Test accuracy, side by side', heads_, rows, notes)


def _accuracies(findings: Findings, panel: str) -> Table:
  """Test accuracy and optimal rate, as De & Smith print them."""
  grid, summaries = findings.grid, findings.of_panel(panel).values()
  notes = [
    f'{cell_name(grid, s.cell)} ({_ours(findings, s.cell).text}): '
    f'{s.why_not}; {_on_test(s)}.'
    for s in summaries
    if s.why_not
  ]
  if any(s.at_the_edge and s.trains is not False for s in summaries):
    notes.append(EDGE)
  notes += _widened(grid, summaries)
  return _by_method(
    findings,
    panel,
    'Test accuracy and optimal learning rate',
    {'accuracy (%)': _ours, 'optimal rate': _rates},
    notes,
  )


def _widened(grid: Grid, summaries: Iterable[Summary]) -> Iterator[str]:
  """Which cells were tried at more rates than the grid has, in one note."""
  wider = [
    f'{cell_name(grid, s.cell)}: {rate_text(grid, min(s.tried))} to '
    f'{rate_text(grid, max(s.tried))}'
    for s in summaries
    if len(s.tried) > len(grid.rates)
  ]
  if wider:
    yield f'Tried at more rates than the others: {"; ".join(wider)}.'


def _differences(findings: Findings, panel: str) -> Iterator[Table]:
  """Each method's accuracy less that of the first, seed by seed."""
  grid = findings.grid
  first, *others = grid.columns
  if not others or not 1 < grid.best == grid.seeds:
    return
  rows = []
  for row in grid.rows.values:
    theirs = findings.summaries[Cell(panel, row, first)]
    cells = [Cell(panel, row, column) for column in others]
    rows.append(
      [Entry(row), *(_less(findings.summaries[c], theirs) for c in cells)]
    )
  label = VARIANTS[first].label
  yield Table(
    _title(panel, f'Test accuracy minus that of {label}, in points'),
    [(grid.rows.name, ()), *((VARIANTS[c].label, ()) for c in others)],
    rows,
    [PAIRED],
  )


def _regained(findings: Findings) -> Iterator[Table]:
  """What the last row costs, and what the panels 'panel, remedy' regain."""
  grid, summaries = findings.grid, findings.summaries
  names = list(grid.rows.values)
  first, last = names[0], names[-1]
  for panel in grid.panels.values:
    remedies = {
      name.removeprefix(f'{panel}, '): name
      for name in grid.panels.values
      if name.startswith(f'{panel}, ')
    }
    rows = []
    for column in grid.columns if remedies else ():
      small, large = (summaries[Cell(panel, r, column)] for r in (first, last))
      remedied = [summaries[Cell(p, last, column)] for p in remedies.values()]
      entries = [_less(large, small), *(_less(s, large) for s in remedied)]
      rows.append([Entry(VARIANTS[column].label), *entries])
    if rows:
      name = grid.rows.name
      yield Table(
        _title(panel, f'What {name} {last} costs and what regains it'),
        [
          ('method', ()),
          (f'{name} {last} minus {name} {first}', ()),
          *((f'{remedy}, minus without', ()) for remedy in remedies),
        ],
        rows,
        [f'In points of test accuracy. {PAIRED}'],
      )


def _exponents(findings: Findings, panel: str) -> Table:
  """The exponent of the best rate, by depth and by effective depth."""
  grid = findings.grid
  rows = []
  for column in grid.columns:
    found = exponents(findings, panel, column)
    measured = effective_depths(findings, panel, column).values()
    depths = ', '.join(DASH if d is None else f'{d:.1f}' for d in measured)
    texts = map(exponent, found.values())
    rows.append([Entry(t) for t in (VARIANTS[column].label, *texts, depths)])
  names = ', '.join(grid.rows.values)
  return Table(
    _title(panel, 'The best rate as a power of the depth'),
    [
      ('method', ()),
      ('exponent, by depth', ()),
      ('exponent, by effective depth', ()),
      (f'effective depths at {names}', ()),
    ],
    rows,
    [
      'By least squares over depths and seeds, with half of a 95 % interval. '
      "The effective depth is the branches' shares of their blocks' outputs, "
      'summed over blocks and averaged over training at the chosen rate.'
    ],
  )


def exponent(fit: Sequence[float] | None) -> str:
  """An exponent and half of its interval, in words."""
  return 'not done' if fit is None else f'{_signed(fit[0], 2)} ± {fit[1]:.2f}'


def _less(ours: Summary, theirs: Summary) -> Entry:
  """A cell's accuracy less another's."""
  if ours.result is None or theirs.result is None:
    return Entry('not done')
  if not (ours.trains and theirs.trains):
    return Entry(DASH, ours.cell)
  found = paired(ours.result, theirs.result)
  return Entry(DASH if found is None else difference(*found), ours.cell)


def difference(mean: float, half: float) -> str:
  """In points, with a word where the interval excludes zero.

  >>> print(difference(-0.02, 0.01))
  \u22122.0 ± 1.0
  behind
  """
  text = f'{_signed(100 * mean)} ± {100 * half:.1f}'
  if abs(mean) <= half:
    return text
  return f'{text}\n{"ahead" if mean > 0 else "behind"}'


def _losses_and_rates(findings: Findings, panel: str) -> Table:
  """Training loss and the largest stable rate."""
  return _by_method(
    findings,
    panel,
    'Training loss at the end and largest stable learning rate',
    {'training loss': _loss, 'largest stable rate': _stable_rate},
    [
      'Training loss: of the test runs, the last that was logged. Stable: no '
      'seed diverged.'
    ],
  )


def _comparison(findings: Findings, panel: str) -> Table:
  """Ours beside the published, with the difference."""
  grid, study = findings.grid, findings.study
  rows = []
  for cell, summary in findings.of_panel(panel).items():
    theirs = _published(study, cell)
    label = VARIANTS[cell.column].label
    rows.append(
      [
        Entry(f'{grid.rows.name} {cell.row}, {label}'),
        _ours(findings, cell),
        Entry(_published_text(theirs)),
        Entry(_difference(summary, theirs)),
        _rates(findings, cell),
        Entry(_published_rates(theirs)),
      ]
    )
  heads = ('cell', 'ours (%)', 'published (%)', 'difference')
  heads += ('our rate', 'published rate')
  notes = [
    f'Published: {study.source}. Difference: ours minus theirs, with the '
    'standard error of both.'
  ]
  if any('*' in entry.text for row in rows for entry in row):
    notes.append(EDGE)
  if grid.overrides:
    notes.append('Fields were changed by hand: ours is not the same training.')
  caption = _title(panel, 'Ours beside the published')
  return Table(caption, [(head, ()) for head in heads], rows, notes)


def _published_elsewhere(study: Study) -> Table:
  """Published figures of another data set, without differences."""
  published = study.published
  columns = [column for column in VARIANTS if column in published]
  rows = sorted({row for column in columns for row in published[column]})
  first = next(iter(study.grids.values())).rows.name
  return Table(
    f'Published for {dataset_name(study.published_for)} (another data set and '
    'setting): accuracy (%)',
    [(first, ()), *((VARIANTS[column].label, ()) for column in columns)],
    [
      [Entry(str(row))]
      + [Entry(_published_text(published[c].get(row))) for c in columns]
      for row in rows
    ],
    [f'{study.source}.'],
  )


def _by_method(
  findings: Findings,
  panel: str,
  caption: str,
  columns: Mapping[str, Callable[[Findings, Cell], Entry]],
  notes: Sequence[str],
) -> Table:
  """A table in the grid's form, with these columns for each method."""
  grid = findings.grid
  groups = [(VARIANTS[method].label, list(columns)) for method in grid.columns]
  rows = [
    [Entry(row)]
    + [
      entry(findings, Cell(panel, row, method))
      for method in grid.columns
      for entry in columns.values()
    ]
    for row in grid.rows.values
  ]
  heads = [(grid.rows.name, ()), *groups]
  return Table(_title(panel, caption), heads, rows, notes)


def _ours(findings: Findings, cell: Cell) -> Entry:
  summary = findings.summaries[cell]
  result = summary.result
  if result and summary.trains:
    return Entry(percent(result.top1, result.bar), cell)
  if result:
    return Entry(DASH, cell, f'does not train: {summary.why_not}')
  if summary.rate is None:
    done = f'{len(summary.by_rate)} of {len(summary.tried)} rates done'
    return Entry(done, cell)
  tests = findings.test_runs(cell)
  return Entry(f'{findings.done(tests)} of {len(tests)} test runs done', cell)


def _rates(findings: Findings, cell: Cell) -> Entry:
  """The optimal rate, and the range of rates within error of it."""
  grid, summary = findings.grid, findings.summaries[cell]
  if summary.rate is None or summary.rates is None:
    return Entry('')
  if summary.trains is False:
    return Entry(DASH, cell)
  low, high = (rate_text(grid, rate) for rate in summary.rates)
  mark = ' *' if summary.at_the_edge else ''
  rate = rate_text(grid, summary.rate)
  return Entry(f'{rate}{mark}\n({low} to {high})', cell)


def _loss(findings: Findings, cell: Cell) -> Entry:
  result = findings.summaries[cell].result
  if result is None:
    return Entry('not done', cell)
  loss = result.train_loss
  return Entry(DASH if loss is None else f'{loss:.3g}', cell)


def _stable_rate(findings: Findings, cell: Cell) -> Entry:
  summary = findings.summaries[cell]
  stable = summary.largest_stable
  if stable is None:
    return Entry('not done' if summary.rate is None else 'none', cell)
  note = '\n(largest tried)' if stable == max(summary.tried) else ''
  return Entry(rate_text(findings.grid, stable) + note, cell)


def _published(study: Study, cell: Cell) -> Accuracy | None:
  rows = study.published.get(cell.column, {})
  return rows.get(int(cell.row)) if cell.row.isdigit() else None


def _difference(summary: Summary, theirs: Accuracy | None) -> str:
  """In percent, with its error; in words where there is no such number."""
  if theirs is None or summary.result is None:
    return ''
  if theirs.value is None:
    both = 'ours trains, theirs does not'
    return both if summary.trains else 'both do not train'
  if not summary.trains:
    return 'theirs trains, ours does not'
  points = 100 * summary.result.top1 - theirs.value
  error = math.hypot(100 * summary.result.error, theirs.error or 0)
  return f'{_signed(points)} ± {error:.1f}'


def _signed(value: float, digits: int = 1) -> str:
  sign = '' if round(value, digits) == 0 else '+' if value > 0 else MINUS
  return f'{sign}{abs(value):.{digits}f}'


def _on_test(summary: Summary) -> str:
  """How a cell that does not train did on the test split."""
  result: Any = summary.result
  if result.diverged < result.runs:
    return f'test accuracy {percent(result.top1, result.bar)}'
  return (
    'diverged there' if summary.trains else 'on the whole training split too'
  )


def _published_text(theirs: Accuracy | None) -> str:
  if theirs is None:
    return 'not published'
  if theirs.value is None:
    return DASH
  error = '' if theirs.error is None else f' ± {theirs.error:.1f}'
  return f'{theirs.value:.1f}{error}'


def _published_rates(theirs: Accuracy | None) -> str:
  if theirs is None or theirs.rate is None or theirs.rates is None:
    return ''
  low, high = theirs.rates
  return f'{power(theirs.rate)}\n({power(low)} to {power(high)})'


def _title(panel: str, caption: str) -> str:
  return f'{caption}, {panel}' if panel else caption

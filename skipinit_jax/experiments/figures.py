"""A study's figures: SVG that follows a page's colours, and PNG."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from skipinit_jax import plotting
from skipinit_jax.experiments.grid import TEST, VALIDATION, Cell
from skipinit_jax.experiments.selection import Summary
from skipinit_jax.experiments.studies import Grid
from skipinit_jax.plotting import INK
from skipinit_jax.variants import VARIANTS

WIDTH, HEIGHT = 4.6, 2.5  # Inches, a height for each axes: fits a phone.
BLOCKS, POINTS = 48, 200  # Drawn at most: scalars, and points of a curve.
AXES = {'depth': 'depth (layers)', 'batch': 'batch size (images)'}


class Curve(NamedTuple):
  """A run's metric lines, and whether it diverged."""

  lines: Sequence[Mapping[str, Any]]
  diverged: bool


class Drawing(NamedTuple):
  """A figure, written.

  Attributes:
    name: of the files, NAME.svg and NAME.png.
    heading: what figures of its kind show.
    caption: of this one.
    svg: for a page, with ids of its own.
  """

  name: str
  heading: str
  caption: str
  svg: str


class _Sketch(NamedTuple):
  """A figure before it is written; `where` tells it from others of its kind."""

  kind: str
  heading: str
  where: str
  caption: str
  figure: Figure


class _Point(NamedTuple):
  x: float
  y: float
  low: float = 0.0
  high: float = 0.0
  good: bool = True


Summaries = Mapping[Cell, Summary]
Curves = Callable[[Cell], Curve | None]


def write_figures(
  folder: Path,
  grid: Grid,
  summaries: Summaries,
  curves: Curves,
  chance: Mapping[str, float],
  *,
  rates_curve: bool,
) -> list[Drawing]:
  """Draws all that can be drawn by now, and writes it.

  Args:
    folder: for the files.
    grid: of the study.
    summaries: of its cells.
    curves: the first test run of a cell at its chosen rate, None if not done.
    chance: split -> accuracy of guessing its largest class, a fraction.
    rates_curve: whether to draw rates along the rows.
  """
  folder.mkdir(parents=True, exist_ok=True)
  drawings = []
  with plotting.style():
    for panel in grid.panels.values:
      done = {c: s for c, s in summaries.items() if c.panel == panel}
      drawings += _accuracy(grid, panel, done, chance[TEST])
      if rates_curve:
        drawings += _optimal_rates(grid, panel, done)
      for row in grid.rows.values:
        of_row = {c: s for c, s in done.items() if c.row == row}
        drawings += _along_rates(grid, panel, of_row, chance[VALIDATION])
      for row in grid.rows.values:
        of_row = {c: curves(c) for c in done if c.row == row}
        drawings += _losses(grid, panel, of_row)
      for column in grid.columns:
        drawings += _alphas(
          grid, [c for c in done if c.column == column], curves
        )
    # Of one kind together, whatever the panel.
    kinds = list(dict.fromkeys(sketch.kind for sketch in drawings))
    drawings.sort(key=lambda sketch: kinds.index(sketch.kind))
    return [_write(sketch, folder) for sketch in drawings]


def power(exponent: int) -> str:
  """A power of two.

  >>> power(-3)
  '2⁻³'
  """
  digits = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
  return f'2{str(exponent).translate(digits)}'


def cell_name(grid: Grid, cell: Cell) -> str:
  """A cell in words: panel, row, column."""
  parts = (
    cell.panel,
    f'{grid.rows.name} {cell.row}',
    VARIANTS[cell.column].label,
  )
  return ', '.join(part for part in parts if part)


def _accuracy(
  grid: Grid, panel: str, summaries: Summaries, chance: float
) -> Iterator[_Sketch]:
  """Test accuracy along the rows."""
  done = {c: s for c, s in summaries.items() if s.result}
  if not done:
    return
  good = {s.trains for s in done.values()}
  trained = [s.result.top1 for s in done.values() if s.trains]
  # With some at chance the others' differences would not be seen.
  apart = len(good) == 2 and min(trained) > 0.6
  figure, (*above, axes) = _figure(grid, axes=1 + apart)
  for column in grid.columns:
    points = [
      _accuracy_point(grid, summary, chance)
      for summary in _of_column(done, column)
    ]
    _plot(axes, column, points)
    for enlarged in above:
      _plot(enlarged, column, [point for point in points if point.good])
      enlarged.set_ylabel('those that train (%)')
  _row_axis(axes, grid)
  axes.set_ylabel('test accuracy (%)')
  name = grid.rows.name
  caption = f'Test accuracy against {name}, at the rate chosen for each point.'
  if False in good:
    axes.set_ylim(0, 101)
    _chance_line(axes, chance)
    caption += (
      ' Hollow: does not train; on the chance line where all runs diverged.'
    )
  if above:
    caption += ' Above, enlarged: what trains.'
  yield _Sketch(
    'accuracy',
    f'Accuracy against {name}',
    panel,
    caption + _missing(grid, [c for c in summaries if c not in done]),
    figure,
  )


def _accuracy_point(grid: Grid, summary: Summary, chance: float) -> _Point:
  result, x = summary.result, _place(grid, summary.cell)
  if result.diverged == result.runs:
    return _Point(x, 100 * chance, good=False)
  error = 100 * result.error
  return _Point(x, 100 * result.top1, error, error, bool(summary.trains))


def _along_rates(
  grid: Grid, panel: str, summaries: Summaries, chance: float
) -> Iterator[_Sketch]:
  """Accuracy and loss on the held out images against the rate, of a row."""
  if not any(s.by_rate for s in summaries.values()):
    return
  figure, (top, bottom) = _figure(grid, axes=2)
  span = max(grid.rates) - min(grid.rates)
  for column in grid.columns:
    tops, losses, lost = [], [], []
    for summary in _of_column(summaries, column):
      for rate, mean in summary.by_rate.items():
        x = rate + _dodge(grid, summary.cell, span)
        if mean.diverged == mean.runs:
          tops.append(_Point(x, 100 * chance, good=False))
        else:
          error = 100 * mean.error
          tops.append(_Point(x, 100 * mean.top1, error, error))
        if mean.loss is None:
          lost.append(x)
        else:
          losses.append(_Point(x, mean.loss))
    _plot(top, column, tops)
    _plot(bottom, column, losses)
    _plot_on_top(bottom, column, lost)
  means = [m for s in summaries.values() for m in s.by_rate.values()]
  if min(mean.top1 for mean in means) < 0.5:
    top.set_ylim(0, 101)
    _chance_line(top, chance)
  _log_if_wide(bottom)
  if any(mean.loss is None for mean in means):
    edge = {'transform': bottom.transAxes, 'va': 'center'}
    bottom.text(1.01, 1.0, 'not finite', **edge)
  top.set_ylabel('held-out accuracy (%)')
  bottom.set_ylabel('held-out loss')
  for axes in (top, bottom):
    axes.set_xticks(grid.rates, [power(r) for r in grid.rates])
  unit = '' if grid.unit == 1 else f' (times {grid.unit:g})'
  bottom.set_xlabel(f'learning rate{unit}')
  row = next(iter(summaries)).row
  where = f'{grid.rows.name} {row}'
  rest = [c for c, s in summaries.items() if len(s.by_rate) < len(grid.rates)]
  yield _Sketch(
    'rates',
    'Accuracy and loss against learning rate',
    f'{panel}, {where}' if panel else where,
    'Accuracy and loss on the held-out training images against the learning '
    'rate. Hollow on the chance line: all seeds diverged.'
    + _missing(grid, rest, 'Not all rates are done'),
    figure,
  )


def _optimal_rates(
  grid: Grid, panel: str, summaries: Summaries
) -> Iterator[_Sketch]:
  """The optimal and the largest stable rate along the rows."""
  done = {c: s for c, s in summaries.items() if s.rate is not None}
  if not done:
    return
  figure, (top, bottom) = _figure(grid, axes=2)
  for column in grid.columns:
    best, stable, none = [], [], []
    for summary in _of_column(done, column):
      x, rate = _place(grid, summary.cell), summary.rate
      if summary.trains is False:
        best.append(_Point(x, rate, good=False))
      else:
        low, high = summary.rates
        best.append(_Point(x, rate, rate - low, high - rate))
      if summary.largest_stable is None:
        none.append(_Point(x, min(grid.rates) - 1, good=False))
      else:
        stable.append(_Point(x, summary.largest_stable))
    _plot(top, column, best)
    _plot(bottom, column, stable)
    _plot(bottom, column, none)
  unit = '' if grid.unit == 1 else f' (times {grid.unit:g})'
  for axes, name in ((top, 'optimal rate'), (bottom, 'largest stable rate')):
    low = min(grid.rates) - (axes is bottom)
    labels = dict.fromkeys([low], 'none') | {r: power(r) for r in grid.rates}
    axes.set_yticks(list(labels), labels.values())
    axes.set_ylim(low - 0.5, max(grid.rates) + 0.5)
    axes.set_ylabel(name + unit)
    _row_axis(axes, grid)
  top.set_xlabel('')
  yield _Sketch(
    'optimal-rates',
    f'Learning rates against {AXES.get(grid.rows.name, grid.rows.name)}',
    panel,
    'Above, the optimal learning rate, with the range of rates within error of '
    'it; hollow: does not train. Below, the largest rate at which no seed '
    'diverged, or none.'
    + _missing(grid, [c for c in summaries if c not in done]),
    figure,
  )


def _losses(
  grid: Grid, panel: str, curves: Mapping[Cell, Curve | None]
) -> Iterator[_Sketch]:
  """Training loss of a row's test runs."""
  figure, (axes,) = _figure(grid, markers=False)
  early = []
  for cell, curve in curves.items():
    points = [
      (line['epoch'], line['loss'])
      for line in (curve.lines if curve else ())
      if line.get('loss') is not None
    ]
    if not points:
      early += [cell] if curve else []
      continue
    style = plotting.line_style(cell.column)
    axes.plot(
      *zip(*_thinned(points), strict=True),
      **style,
      linewidth=1.5,
    )
    if curve.diverged:
      axes.plot(*points[-1], 'x', color=style['color'], ms=9, mew=2.5)
  if not axes.lines:
    return
  _log_if_wide(axes)
  axes.set(xlabel='epoch', ylabel='training loss')
  axes.set_xlim(left=0)
  where = f'{grid.rows.name} {next(iter(curves)).row}'
  absent = [cell for cell, curve in curves.items() if curve is None]
  yield _Sketch(
    'loss',
    'Training loss',
    f'{panel}, {where}' if panel else where,
    'Training loss of the first test run at the chosen rate; a cross where it '
    'diverged.'
    + _missing(grid, early, 'Diverged before a finite loss was logged')
    + _missing(grid, absent),
    figure,
  )


def _alphas(
  grid: Grid, cells: Sequence[Cell], curves: Curves
) -> Iterator[_Sketch]:
  """The scalars of a column's last row that has any."""
  for cell in reversed(cells):
    curve = curves(cell)
    lines = [line for line in (curve.lines if curve else ()) if 'alpha' in line]
    if lines:
      break
  else:
    return
  lines = _thinned(lines)
  epochs = [line['epoch'] for line in lines]
  names = list(lines[0]['alpha'])
  every = math.ceil(len(names) / BLOCKS)
  # Without the ends, which are lost on white or on black.
  viridis = matplotlib.colormaps['viridis']
  colors = ListedColormap([viridis(0.12 + 0.68 * i / 63) for i in range(64)])
  norm = Normalize(1, max(len(names), 2))
  figure = Figure(figsize=(WIDTH, HEIGHT + 0.3), layout='constrained')
  axes = figure.subplots()
  for number, name in list(enumerate(names, 1))[::every]:
    values = [line['alpha'].get(name) for line in lines]
    values = [math.nan if value is None else value for value in values]
    axes.plot(epochs, values, color=colors(norm(number)), linewidth=1.1)
  axes.axhline(0, color=INK, alpha=0.4, linewidth=0.8, zorder=0)
  axes.set(xlabel='epoch', ylabel='scalar alpha')
  bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02)
  bar.solids.set_edgecolor('face')  # No seams between its steps.
  bar.set_label('block, from the input')
  bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
  bar.outline.set_visible(False)
  some = 'One line a block'
  if every > 1:
    some = f'A line for one block in {every}, of {len(names)}'
  yield _Sketch(
    'alpha',
    'The scalars over training',
    cell_name(grid, cell),
    f'The scalars alpha of the first test run at the chosen rate. {some}.',
    figure,
  )


def _figure(
  grid: Grid, axes: int = 1, markers: bool = True
) -> tuple[Figure, list[Axes]]:
  """Axes above one another, under a legend that names every column."""
  labels = [VARIANTS[column].label for column in grid.columns]
  width = max(map(len, labels)) * 5.2 + 44  # Points, of an entry.
  across = max(1, min(len(labels), int(72 * WIDTH / width)))
  lines = math.ceil(len(labels) / across)
  size = WIDTH, HEIGHT * axes + 0.2 * lines + 0.3
  figure = Figure(figsize=size, layout='constrained')
  style = plotting.marked_style if markers else plotting.line_style
  handles = [plotting.handle(**style(column)) for column in grid.columns]
  plotting.legend(figure, handles, labels, across)
  return figure, list(figure.subplots(axes, sharex=True, squeeze=False)[:, 0])


def _plot(axes: Axes, column: str, points: Sequence[_Point]) -> None:
  if not points:
    return
  _, _, color, marker, dashes = VARIANTS[column]
  x, y, low, high, _ = zip(*points, strict=True)
  error = {'yerr': (low, high)} if any(low + high) else {}
  axes.errorbar(
    x,
    y,
    **error,
    color=color,
    linestyle=dashes,
    elinewidth=1.2,
    capsize=2.5,
    clip_on=False,
  )
  for good in (True, False):
    some = [p for p in points if p.good == good]
    if not some:
      continue
    axes.plot(
      [p.x for p in some],
      [p.y for p in some],
      color=color,
      marker=marker,
      linestyle='none',
      markerfacecolor=color if good else 'none',
      clip_on=False,
    )


def _plot_on_top(axes: Axes, column: str, x: Sequence[float]) -> None:
  """Hollow markers on the upper edge: values that are not finite."""
  if not x:
    return
  _, _, color, marker, _ = VARIANTS[column]
  axes.plot(
    x,
    [1.0] * len(x),
    color=color,
    marker=marker,
    linestyle='none',
    markerfacecolor='none',
    clip_on=False,
    transform=axes.get_xaxis_transform(),
  )


def _chance_line(axes: Axes, chance: float) -> None:
  axes.axhline(100 * chance, color=INK, alpha=0.5, linewidth=1, zorder=0)
  axes.text(
    1.01,
    100 * chance,
    'chance',
    transform=axes.get_yaxis_transform(),
    va='center',
  )


def _log_if_wide(axes: Axes) -> None:
  """A logarithmic axis, with plain numbers, where values differ enough."""
  y = [
    value
    for line in axes.lines
    if line.get_transform() == axes.transData
    for value in line.get_ydata()
    if value > 0
  ]
  if not y:
    axes.set_ylim(0.1, 10)
    return
  low, high = min(y), max(y)
  if high < 5 * low:
    return
  axes.set_yscale('log')
  axes.set_ylim(low / 1.2, high * 1.2)
  subs = (1, 2, 5) if high < 1000 * low else (1,)
  axes.yaxis.set_major_locator(LogLocator(subs=subs))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.minorticks_off()


def _row_positions(grid: Grid) -> dict[str, float]:
  """Of the rows on the axis: logarithms, or places where not numbers."""
  try:
    return {row: math.log2(float(row)) for row in grid.rows.values}
  except ValueError:
    return {row: float(i) for i, row in enumerate(grid.rows.values)}


def _row_axis(axes: Axes, grid: Grid) -> None:
  positions = _row_positions(grid)
  x = sorted(positions.values())
  gap = min((b - a for a, b in itertools.pairwise(x)), default=1)
  room = 3.5 * gap / ((x[-1] - x[0]) or 1)  # Inches, for about 0.09 a letter.
  crowded = max(map(len, positions)) * 0.09 + 0.1 > room
  turned = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
  axes.set_xticks(
    list(positions.values()), list(positions), **(turned if crowded else {})
  )
  axes.set_xlabel(AXES.get(grid.rows.name, grid.rows.name))


def _place(grid: Grid, cell: Cell) -> float:
  x = _row_positions(grid)
  span = max(x.values()) - min(x.values())
  return x[cell.row] + _dodge(grid, cell, span)


def _dodge(grid: Grid, cell: Cell, span: float) -> float:
  """Aside by column, so that equal values don't hide one another."""
  middle = (len(grid.columns) - 1) / 2
  return 0.013 * (span or 1) * (grid.columns.index(cell.column) - middle)


def _of_column(summaries: Summaries, column: str) -> list[Summary]:
  return [s for cell, s in summaries.items() if cell.column == column]


def _thinned(values: Sequence[Any]) -> Sequence[Any]:
  """At most so many, evenly spread, the first and the last among them."""
  if len(values) <= POINTS:
    return values
  step = (len(values) - 1) / (POINTS - 1)
  return [values[round(i * step)] for i in range(POINTS)]


def _missing(
  grid: Grid, cells: Sequence[Cell], what: str = 'Not done, so not drawn'
) -> str:
  names = [cell_name(grid, cell) for cell in cells]
  return f' {what}: {"; ".join(names)}.' if names else ''


def _write(sketch: _Sketch, folder: Path) -> Drawing:
  words = f'{sketch.kind} {sketch.where}'.lower()
  name = re.sub('[^a-z0-9]+', '-', words).strip('-')
  svg, _ = plotting.save(sketch.figure, folder, name)
  where = sketch.where
  caption = f'{where[0].upper()}{where[1:]}. ' if where else ''
  caption += sketch.caption
  return Drawing(name, sketch.heading, caption, plotting.svg_for_page(svg))

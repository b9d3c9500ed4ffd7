"""A study's figures, one function for each kind."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skipinit_jax import plotting
from skipinit_jax.experiments import drawing
from skipinit_jax.experiments.drawing import Point
from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import TEST, VALIDATION, Cell, Grid
from skipinit_jax.experiments.selection import Summary
from skipinit_jax.experiments.words import cell_name, power, row_name

BLOCKS = 48  # Whose scalars are drawn, at most.
ENLARGED = 0.6  # Accuracy from which what trains is drawn by itself too.
Summaries = Mapping[Cell, Summary]


class Drawing(NamedTuple):
  """A figure that was written.

  Attributes:
    name: of the files NAME.svg and NAME.png.
    caption: of this figure.
    svg: for a page with several figures.
  """

  name: str
  caption: str
  svg: str


class _Sketch(NamedTuple):
  """A figure to be written; `where` tells it from others of its kind."""

  kind: str
  heading: str
  where: str
  caption: str
  figure: Figure


@plotting.style()
def write_figures(folder: Path, findings: Findings) -> dict[str, list[Drawing]]:
  """Writes SVG and PNG files of all that can be drawn so far, by heading."""
  drawings: dict[str, list[Drawing]] = {}
  for sketch in _sketches(findings):
    drawings.setdefault(sketch.heading, []).append(_write(sketch, folder))
  return drawings


def _sketches(findings: Findings) -> Iterator[_Sketch]:
  grid = findings.grid
  for panel in grid.panels.values:
    summaries = findings.of_panel(panel)
    yield from _accuracy(grid, panel, summaries, findings.chance[TEST])
    if findings.study.rates_curve:
      yield from _optimal_rates(grid, panel, summaries)
    for row in grid.rows.values:
      in_row = {c: s for c, s in summaries.items() if c.row == row}
      yield from _held_out(grid, in_row, findings.chance[VALIDATION])
      yield from _losses(findings, list(in_row))
    for column in grid.columns:
      of_column = [c for c in summaries if c.column == column]
      yield from _alphas(findings, of_column)


def _accuracy(
  grid: Grid, panel: str, summaries: Summaries, chance: float
) -> Iterator[_Sketch]:
  """Test accuracy along the rows."""
  done = {c: s for c, s in summaries.items() if s.result}
  if not done:
    return
  fails = not all(s.trains for s in done.values())
  trained = [
    s.result.top1 - s.result.bar for s in done.values() if s.result and s.trains
  ]
  # Beside points at chance, differences among the others would not show.
  enlarge = fails and bool(trained) and min(trained) > ENLARGED
  figure, panels = drawing.new_figure(grid, 2 if enlarge else 1)
  for column in grid.columns:
    points = [
      _accuracy_point(grid, summary, chance)
      for summary in _of_column(done, column)
    ]
    seeds = [
      (point.x, 100 * top1)
      for point, s in zip(points, _of_column(done, column), strict=True)
      for top1 in (s.result.seeds if s.result and s.result.runs > 1 else ())
    ]
    drawing.plot(panels[-1], column, points)
    drawing.plot_seeds(panels[-1], column, seeds)
    if enlarge:
      drawing.plot(panels[0], column, [point for point in points if point.good])
      near = [(x, y) for x, y in seeds if y > 100 * ENLARGED]
      drawing.plot_seeds(panels[0], column, near)
      panels[0].set_ylabel('those that train (%)')
  axes, name = panels[-1], grid.rows.name
  drawing.row_axis(axes, grid)
  axes.set_ylabel('test accuracy (%)')
  caption = f'Test accuracy against {name}, at the rate chosen for each point.'
  if grid.best == grid.seeds > 1:
    caption += ' Small dots: seeds. Bars: 95 % intervals for their mean.'
  if fails:
    axes.set_ylim(0, 101)
    drawing.chance_line(axes, chance)
    caption += (
      ' Hollow: does not train; on the chance line where all runs diverged.'
    )
  if enlarge:
    caption += ' Above, enlarged: what trains.'
  yield _Sketch(
    'accuracy',
    f'Accuracy against {name}',
    panel,
    caption + _missing(grid, [c for c in summaries if c not in done]),
    figure,
  )


def _accuracy_point(grid: Grid, summary: Summary, chance: float) -> Point:
  result: Any = summary.result
  x = drawing.row_position(grid, summary.cell)
  if result.diverged == result.runs:
    return Point(x, 100 * chance, good=False)
  bar, y = 100 * result.bar, 100 * result.top1
  # An interval for a mean of seeds, some of which fail, may pass both ends.
  low, high = min(bar, y), min(bar, 100 - y)
  return Point(x, y, low, high, bool(summary.trains))


def _held_out(
  grid: Grid, summaries: Summaries, chance: float
) -> Iterator[_Sketch]:
  """Accuracy and loss on the held out images against the rate, of a row."""
  means = [m for s in summaries.values() for m in s.by_rate.values()]
  if not means:
    return
  figure, (top, bottom) = drawing.new_figure(grid, 2)
  rates = sorted({rate for s in summaries.values() for rate in s.tried})
  span = rates[-1] - rates[0]
  for cell, summary in summaries.items():
    accuracies, losses, infinite = [], [], []
    for rate, mean in summary.by_rate.items():
      x, error = rate + drawing.dodge(grid, cell, span), 100 * mean.error
      if mean.diverged == mean.runs:
        accuracies.append(Point(x, 100 * chance, good=False))
      else:
        accuracies.append(Point(x, 100 * mean.top1, error, error))
      if mean.loss is None:
        infinite.append(x)
      else:
        losses.append(Point(x, mean.loss))
    drawing.plot(top, cell.column, accuracies)
    drawing.plot(bottom, cell.column, losses)
    drawing.plot_on_edge(bottom, cell.column, infinite)
  if min(mean.top1 for mean in means) < 0.5:
    top.set_ylim(0, 101)
    drawing.chance_line(top, chance)
  drawing.log_if_wide(bottom)
  if any(mean.loss is None for mean in means):
    corner = bottom.transAxes
    bottom.text(1.01, 1.0, 'not finite', transform=corner, va='center')
  top.set_ylabel('held-out accuracy (%)')
  bottom.set_ylabel('held-out loss')
  bottom.set_xlabel(drawing.rate_label(grid, 'learning rate'))
  for axes in (top, bottom):
    axes.set_xticks(rates, [power(r) for r in rates])
  rest = [c for c, s in summaries.items() if len(s.by_rate) < len(s.tried)]
  yield _Sketch(
    'rates',
    'Accuracy and loss against learning rate',
    row_name(grid, next(iter(summaries))),
    'Accuracy and loss on the held-out training images against the learning '
    'rate. Hollow on the chance line: all seeds diverged.'
    + _missing(grid, rest, 'Not all rates are done'),
    figure,
  )


def _optimal_rates(
  grid: Grid, panel: str, summaries: Summaries
) -> Iterator[_Sketch]:
  """The optimal and the largest stable rate along the rows."""
  done = {c: s for c, s in summaries.items() if s.rates}
  if not done:
    return
  figure, (top, bottom) = drawing.new_figure(grid, 2)
  tried = sorted({rate for s in done.values() for rate in s.tried})
  lowest, highest = tried[0], tried[-1]
  for column in grid.columns:
    best, stable, unstable = [], [], []
    for summary in _of_column(done, column):
      rate: Any = summary.rate
      rates: Any = summary.rates
      x, (low, high) = drawing.row_position(grid, summary.cell), rates
      if summary.trains is False:
        best.append(Point(x, rate, good=False))
      else:
        best.append(Point(x, rate, rate - low, high - rate))
      if summary.largest_stable is None:
        unstable.append(Point(x, lowest - 1, good=False))
      else:
        stable.append(Point(x, summary.largest_stable))
    drawing.plot(top, column, best)
    drawing.plot(bottom, column, stable)
    drawing.plot(bottom, column, unstable)
  powers = {rate: power(rate) for rate in tried}
  for axes, name, ticks in (
    (top, 'optimal rate', powers),
    (bottom, 'largest stable rate', {lowest - 1: 'none'} | powers),
  ):
    axes.set_yticks(list(ticks), ticks.values())
    axes.set_ylim(min(ticks) - 0.5, highest + 0.5)
    axes.set_ylabel(drawing.rate_label(grid, name))
  drawing.row_axis(bottom, grid)
  yield _Sketch(
    'optimal-rates',
    f'Learning rates against {drawing.row_label(grid)}',
    panel,
    'Above, the optimal learning rate, with the range of rates within error of '
    'it; hollow: does not train. Below, the largest rate at which no seed '
    'diverged, or none.'
    + _missing(grid, [c for c in summaries if c not in done]),
    figure,
  )


def _losses(findings: Findings, cells: Sequence[Cell]) -> Iterator[_Sketch]:
  """Training loss of a row's test runs."""
  grid = findings.grid
  figure, (axes,) = drawing.new_figure(grid, markers=False)
  absent, early = [], []
  for cell in cells:
    curve = findings.curves[cell]
    if curve is None:
      absent.append(cell)
      continue
    points = [
      (line['epoch'], line['loss'])
      for line in curve.lines
      if line.get('loss') is not None
    ]
    if not points:
      early.append(cell)
      continue
    style = plotting.line_style(cell.column)
    x, y = zip(*drawing.thinned(points), strict=True)
    axes.plot(x, y, linewidth=1.5, **style)
    if curve.diverged:
      cross = {'color': style['color'], 'ms': 9, 'mew': 2.5}
      axes.plot(x[-1], y[-1], 'x', clip_on=False, **cross)
  if not axes.lines:
    return
  drawing.log_if_wide(axes)
  axes.set(xlabel='epoch', ylabel='training loss')
  axes.set_xlim(left=0)
  yield _Sketch(
    'loss',
    'Training loss',
    row_name(grid, cells[0]),
    'Training loss of the first test run at the chosen rate; a cross where it '
    'diverged.'
    + _missing(grid, early, 'Diverged before a finite loss was logged')
    + _missing(grid, absent),
    figure,
  )


def _alphas(findings: Findings, cells: Sequence[Cell]) -> Iterator[_Sketch]:
  """The scalars of a column's last row that has any."""
  for cell in reversed(cells):
    curve = findings.curves[cell]
    lines = [line for line in (curve.lines if curve else ()) if 'alpha' in line]
    if lines:
      break
  else:
    return
  lines = drawing.thinned(lines)
  epochs = [line['epoch'] for line in lines]
  names = list(lines[0]['alpha'])
  every = math.ceil(len(names) / BLOCKS)
  # Without the ends, which are lost on white or on black.
  places = np.linspace(0.12, 0.8, 64)
  colors = ListedColormap(matplotlib.colormaps['viridis'](places))
  norm = Normalize(1, max(len(names), 2))
  figure, (axes,) = plotting.new_figure(height=2.8)
  for number, name in list(enumerate(names, 1))[::every]:
    values = [line['alpha'].get(name) for line in lines]
    values = [math.nan if value is None else value for value in values]
    axes.plot(epochs, values, color=colors(norm(number)), linewidth=1.1)
  axes.axhline(0, color=plotting.INK, alpha=0.4, linewidth=0.8, zorder=0)
  axes.set(xlabel='epoch', ylabel='scalar alpha')
  bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02)
  steps: Any = bar.solids
  steps.set_edgecolor('face')  # No seams between them.
  bar.set_label('block, from the input')
  bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
  bar.outline.set_visible(False)
  some = 'One line a block'
  if every > 1:
    some = f'A line for one block in {every}, of {len(names)}'
  yield _Sketch(
    'alpha',
    'The scalars over training',
    cell_name(findings.grid, cell),
    f'The scalars alpha of the first test run at the chosen rate. {some}.',
    figure,
  )


def _of_column(summaries: Summaries, column: str) -> list[Summary]:
  return [s for cell, s in summaries.items() if cell.column == column]


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
  return Drawing(name, caption + sketch.caption, plotting.svg_for_page(svg))

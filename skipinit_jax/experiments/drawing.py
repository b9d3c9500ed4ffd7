"""The marks of a study's figures: panels, points, axes with a grid's values."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skipinit_jax import plotting
from skipinit_jax.experiments.grid import Cell, Grid
from skipinit_jax.variants import VARIANTS

HEIGHT = 2.5  # Inches, of a panel.
POINTS = 200  # Drawn at most, of a curve.
AXES = {'depth': 'depth (layers)', 'batch': 'batch size (images)'}


class Point(NamedTuple):
  """A point with its error bar; hollow where it is not `good`."""

  x: float
  y: float
  low: float = 0.0
  high: float = 0.0
  good: bool = True


def new_figure(
  grid: Grid, panels: int = 1, markers: bool = True
) -> tuple[Figure, list[Axes]]:
  """Panels above one another, under a legend that names every column."""
  labels = [VARIANTS[column].label for column in grid.columns]
  width = max(map(len, labels)) * 5.2 + 44  # Points, of an entry.
  across = max(1, min(len(labels), int(72 * plotting.WIDTH / width)))
  lines = math.ceil(len(labels) / across)
  figure, axes = plotting.new_figure(
    panels, height=HEIGHT * panels + 0.2 * lines + 0.3, sharex=True
  )
  style = plotting.marked_style if markers else plotting.line_style
  handles = [plotting.handle(**style(column)) for column in grid.columns]
  plotting.legend(figure, handles, labels, across)
  return figure, axes


def plot(
  axes: Axes, column: str, points: Sequence[Point], **options: Any
) -> None:
  """A column's points, joined, with error bars where there are any.

  Args:
    axes: the panel.
    column: a key of VARIANTS.
    points: in order.
    **options: for `Axes.errorbar` and `Axes.plot`, such as a transform.
  """
  if not points:
    return
  x, y, low, high, good = map(np.array, zip(*points, strict=True))
  axes.errorbar(
    x,
    y,
    (low, high) if low.any() or high.any() else None,
    elinewidth=1.2,
    capsize=2.5,
    clip_on=False,
    **(plotting.line_style(column) | options),
  )
  style: dict[str, Any] = plotting.marked_style(column)
  style = style | {'linestyle': 'none'} | options
  for some, face in ((good, style['color']), (~good, 'none')):
    if some.any():
      style['markerfacecolor'] = face
      axes.plot(x[some], y[some], clip_on=False, **style)


def plot_seeds(
  axes: Axes, column: str, values: Sequence[tuple[float, float]]
) -> None:
  """A small dot for each seed, behind its mean."""
  if values:
    x, y = zip(*values, strict=True)
    color = plotting.marked_style(column)['color']
    style = {'marker': '.', 'markersize': 4, 'linestyle': 'none', 'zorder': 1.5}
    axes.plot(x, y, color=color, alpha=0.55, clip_on=False, **style)


def plot_on_edge(axes: Axes, column: str, x: Sequence[float]) -> None:
  """Hollow markers on the upper edge, for values that are not finite."""
  plot(
    axes,
    column,
    [Point(each, 1.0, good=False) for each in x],
    linestyle='none',
    transform=axes.get_xaxis_transform(),
  )


def chance_line(axes: Axes, chance: float) -> None:
  """A line at the accuracy of guessing the largest class, a fraction."""
  y = 100 * chance
  axes.axhline(y, color=plotting.INK, alpha=0.5, linewidth=1, zorder=0)
  right = axes.get_yaxis_transform()
  axes.text(1.01, y, 'chance', transform=right, va='center')


def log_if_wide(axes: Axes) -> None:
  """A logarithmic vertical axis where the plotted values differ enough."""
  y = [
    value
    for line in axes.lines
    if line.get_transform() == axes.transData
    for value in np.asarray(line.get_ydata())
    if value > 0
  ]
  if not y:
    axes.set_ylim(0.1, 10)
  elif max(y) >= 5 * min(y):
    axes.set_yscale('log')
    axes.set_ylim(min(y) / 1.2, max(y) * 1.2)
    plotting.log_axis(axes)


def row_axis(axes: Axes, grid: Grid) -> None:
  """Ticks and name of a horizontal axis along the grid's rows."""
  positions = _row_positions(grid)
  x = sorted(positions.values())
  gap = min((b - a for a, b in itertools.pairwise(x)), default=1)
  room = 3.5 * gap / ((x[-1] - x[0]) or 1)  # Inches, for about 0.09 a letter.
  axes.set_xticks(list(positions.values()), list(positions))
  if max(map(len, positions)) * 0.09 + 0.1 > room:
    for label in axes.get_xticklabels():
      label.set(rotation=45, ha='right', rotation_mode='anchor')
  axes.set_xlabel(row_label(grid))


def row_label(grid: Grid) -> str:
  """The name of the axis of rows."""
  return AXES.get(grid.rows.name, grid.rows.name)


def rate_label(grid: Grid, name: str) -> str:
  """The name of an axis of learning rates."""
  return name if grid.unit == 1 else f'{name} (times {grid.unit:g})'


def row_position(grid: Grid, cell: Cell) -> float:
  """A cell's place on the axis of rows."""
  x = _row_positions(grid)
  return x[cell.row] + dodge(grid, cell, max(x.values()) - min(x.values()))


def dodge(grid: Grid, cell: Cell, span: float) -> float:
  """A shift by column, so that equal values don't hide one another."""
  middle = (len(grid.columns) - 1) / 2
  return 0.013 * (span or 1) * (grid.columns.index(cell.column) - middle)


def thinned(values: Sequence[Any]) -> Sequence[Any]:
  """At most POINTS, evenly spread, the first and the last among them."""
  if len(values) <= POINTS:
    return values
  step = (len(values) - 1) / (POINTS - 1)
  return [values[round(i * step)] for i in range(POINTS)]


def _row_positions(grid: Grid) -> dict[str, float]:
  """The rows' places: logarithms, or numbers in order where not numbers."""
  try:
    return {row: math.log2(float(row)) for row in grid.rows.values}
  except ValueError:
    return {row: float(i) for i, row in enumerate(grid.rows.values)}

"""How the figures of an analysis look, and the files they become."""

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from skipinit_jax import styles
from skipinit_jax.styles import ALONE, INK, STYLES
from skipinit_jax.styles import LABELS as LABELS

WIDTH, HEIGHT = 4.6, 2.6  # Inches, of a panel alone in its row.
RC = styles.RC | {
  'axes.titlesize': 10,
  'legend.fontsize': 9,
  'savefig.dpi': 150,
}


def style() -> AbstractContextManager:
  """The context in which a figure is drawn: `with style(): ...`."""
  return matplotlib.rc_context(RC)


def new_figure(
  rows: int = 1,
  columns: int = 1,
  *,
  width: float | None = None,
  height: float | None = None,
  **subplots: Any,
) -> tuple[Figure, list[Axes]]:
  """A figure and its panels, row by row.

  Args:
    rows, columns: of panels.
    width, height: of the figure in inches; None: by the number of panels.
    **subplots: of `Figure.subplots`, such as sharex=True.
  """
  width = WIDTH * (1 + 0.6 * (columns - 1)) if width is None else width
  height = HEIGHT * rows if height is None else height
  with style():
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
  return figure, list(axes.flat)


def log_axis(axes: Axes, which: Literal['x', 'y'] = 'y') -> None:
  """Makes an axis logarithmic, with plain numbers; after all is plotted."""
  axes.set(**{f'{which}scale': 'log'})
  axis = axes.xaxis if which == 'x' else axes.yaxis
  low, high = axis.get_view_interval()
  axis.set_major_locator(
    LogLocator(subs=(1, 2, 5) if high < 99 * low else (1,))
  )
  axis.set_major_formatter(lambda value, _: f'{value:g}')
  axis.set_minor_locator(NullLocator())


def line_style(method: str) -> Mapping[str, str]:
  """Colour and dashes of a method, for `Axes.plot`; see `styles.STYLES`."""
  color, _, dashes = STYLES[method]
  return {'color': color, 'linestyle': dashes}


def save(figure: Figure, out: Path, name: str) -> list[Path]:
  """Writes OUT/NAME.svg and OUT/NAME.png; returns their paths.

  The SVG takes its text's colour from the page, or from the reader's choice of
  a light or a dark one.
  """
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  svg, png = out / f'{name}.svg', out / f'{name}.png'
  with style():
    figure.savefig(png, facecolor='white')
    buffer = io.StringIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(buffer, format='svg', transparent=True, metadata=nothing)
  text = buffer.getvalue().replace(INK, 'currentColor')
  start = text.index('>', text.index('<svg')) + 1
  svg.write_text(text[:start] + ALONE + text[start:])
  return [svg, png]

"""How every figure of the project looks, and the files it becomes."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from skipinit_jax.variants import VARIANTS

WIDTH, HEIGHT = 4.6, 2.6  # Inches, of a lone panel: fits a phone.
INK = '#010203'  # Text and axes; in SVG, the color of the page's text.
RC: dict[Any, Any] = {
  'text.color': INK,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 10,
  'font.size': 10,
  'lines.linewidth': 1.8,
  'lines.markersize': 6,
  'legend.frameon': False,
  'legend.fontsize': 9,
  'savefig.dpi': 150,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'skipinit-jax',
  'text.parse_math': False,  # A $ in a label is a dollar.
}
# A standalone SVG file has no page to take a color from.
STANDALONE = (
  '<style>:root{color:#1b1b1b}text{fill:currentColor}'
  '@media (prefers-color-scheme: dark){:root{color:#e8e8e8}}</style>'
)


@contextlib.contextmanager
def style() -> Iterator[None]:
  """The context in which a figure is drawn, or a decorator: `@style()`."""
  with matplotlib.rc_context(RC):
    yield


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
    rows, columns: number of panels.
    width, height: of the figure in inches; None: by the number of panels.
    **subplots: for `Figure.subplots`, such as sharex=True.
  """
  width = WIDTH * (1 + 0.6 * (columns - 1)) if width is None else width
  height = HEIGHT * rows if height is None else height
  with style():
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
  return figure, list(axes.flat)


def legend(
  figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int
) -> Legend:
  """A legend above the panels."""
  return figure.legend(
    handles,
    labels,
    loc='outside upper left',
    ncols=columns,
    handlelength=3,
    columnspacing=1.2,
    borderpad=0,
  )


def line_style(variant: str) -> dict[str, Any]:
  """Color and dashes of a variant, for `Axes.plot`."""
  row = VARIANTS[variant]
  return {'color': row.color, 'linestyle': row.dashes}


def marked_style(variant: str) -> dict[str, Any]:
  """Color, dashes and marker of a variant, for `Axes.plot`."""
  return line_style(variant) | {'marker': VARIANTS[variant].marker}


def handle(**style: Any) -> Line2D:
  """A line for a legend, of a style that `Axes.plot` takes."""
  return Line2D([], [], **style)


def log_axis(axes: Axes, which: Literal['x', 'y'] = 'y') -> None:
  """Makes an axis logarithmic, with plain numbers; after all is plotted."""
  axis = axes.xaxis if which == 'x' else axes.yaxis
  scale = axes.set_xscale if which == 'x' else axes.set_yscale
  scale('log')
  low, high = axis.get_view_interval()
  subs = (1, 2, 5) if high < 99 * low else (1,)
  axis.set_major_locator(LogLocator(subs=subs))
  axis.set_major_formatter(lambda value, _: f'{value:g}')
  axis.set_minor_locator(NullLocator())


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
  """Writes FOLDER/NAME.svg and FOLDER/NAME.png; returns their paths.

  The SVG takes the color of its text from the page, or from the reader's choice
  of a light or a dark scheme.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  svg, png = folder / f'{name}.svg', folder / f'{name}.png'
  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with style():
    figure.savefig(png, facecolor='white')
    figure.savefig(buffer, format='svg', transparent=True, metadata=nothing)
  text = buffer.getvalue().replace(INK, 'currentColor')
  svg.write_text(re.sub('(<svg[^>]*>)', rf'\g<1>{STANDALONE}', text, count=1))
  return [svg, png]


def svg_for_page(path: Path) -> str:
  """The <svg> element of a file that `save` wrote, for a page with several.

  Its ids, and the references to them, begin with the file's name.
  """
  text = path.read_text().replace(STANDALONE, '', 1)
  text = text[text.index('<svg') :]
  return re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{path.stem}-', text)

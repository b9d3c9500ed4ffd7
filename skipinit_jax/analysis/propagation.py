"""Signal propagation at initialization: theory, measurement, effective depth.

Var below is a second moment, the mean square of an array's elements: what the
theory of De & Smith 2020 (section 2) follows over the draw of the weights. See
`capture` for the variance over the images beside it.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from skipinit_jax import plotting
from skipinit_jax.analysis.capture import capture, second_moment
from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import Method, resolve_method
from skipinit_jax.models.resnet import ResNet, WideResNet
from skipinit_jax.models.stages import unstack_blocks
from skipinit_jax.variants import VARIANTS

# Name in `VARIANTS` -> method and initial value of its scalar.
COLUMNS: dict[str, tuple[str, str | None]] = {
  'batchnorm': ('batchnorm', None),
  'skipinit_sqrt': ('skipinit', '1/sqrt(d)'),
  'skipinit': ('skipinit', None),
  'none': ('none', None),
}
PATHS = ('skip', 'branch', 'output')

Captured = Mapping[str, np.ndarray]
Measured = Mapping[int, Mapping[str, Captured]]


def expected(
  method: Method,
  stage_sizes: Sequence[int],
  *,
  start: float = 1.0,
  project_first: bool = True,
) -> dict[str, np.ndarray]:
  """What theory says of a pre-activation network at initialization.

  He's initialization keeps the second moment of what a layer is given. For
  block l of d, l counted from 1, Var(output_l) = gain^2 (Var(skip_l) +
  Var(branch_l)), and:

    no normalization: Var(branch) = alpha^2 Var(skip): the output grows as
      2^l for alpha = 1, as (1 + 1/d)^l for 1/sqrt(d), and not at all for 0;
    batch normalization: Var(branch) = 1 whatever the input: the output is
      start + l, the branch's share 1 / (start + l). A block that projects
      projects a normalized input, so that its skip path has variance 1 again:
      the count l restarts in every stage, with shares 1/2, 1/3, ...

  Args:
    method: without Fixup's post-activation block.
    stage_sizes: blocks in each stage.
    start: Var(skip) of the first block.
    project_first: whether the first stage's first block projects too, as in
      Wide-ResNets of width 2 and more.

  Returns:
    'skip', 'branch', 'output': second moments; 'share': the branch's share in
    the output's; all float64 (blocks,).

  Raises:
    InputError: a method with Fixup's block.
  """
  if method.fixup_block:
    raise InputError(
      "expected a method of pre-activation blocks, got one with Fixup's block"
    )
  alpha = method.alpha_value(sum(stage_sizes))
  square = 1.0 if alpha is None else alpha**2
  if method.zero_last:
    square = 0.0
  rows, skip = [], start
  for stage, size in enumerate(stage_sizes):
    for block in range(size):
      if method.normalize and block == 0 and (stage or project_first):
        skip = 1.0
      branch = square * (1.0 if method.normalize else skip)
      # Not branch / (skip + branch), which may overflow.
      share = square / ((skip if method.normalize else 1.0) + square)
      output = method.gain**2 * (skip + branch)
      rows.append((skip, branch, output, share))
      skip = output
  return dict(zip((*PATHS, 'share'), np.array(rows).T, strict=True))


def effective_depth(shares: np.ndarray) -> float:
  """Mean number of branches that a path passes: the sum of the shares.

  A network of d blocks is a sum over 2^d paths, each through the branch or the
  skip path of every block. Paths weighted by what they contribute to the
  output's second moment pass branch l with its share as probability.

  >>> effective_depth(np.full(54, 0.5))
  27.0
  """
  return float(np.sum(_checked(shares)))


def path_lengths(shares: np.ndarray) -> np.ndarray:
  """Distribution of the number of branches that a path passes.

  The Poisson-binomial distribution of independent branches with these shares
  as probabilities, exact, by convolution of non-negative terms; binomial(d,
  1/2) where all shares are 1/2 (Veit et al. 2016, section 4).

  Args:
    shares: (d,), in [0, 1].

  Returns:
    Probabilities of 0 ... d branches, float64 (d + 1,).

  >>> path_lengths(np.array([0.5, 0.5]))
  array([0.25, 0.5 , 0.25])
  """
  distribution = np.ones(1)
  for share in _checked(shares):
    distribution = np.convolve(distribution, (1 - share, share))
  return distribution


def initialize(model: ResNet, images: jax.Array, seed: int) -> dict[str, Any]:
  """The variables of an unrolled network at the start, for images like these.

  They are drawn in the scanned form, whose program is small at any depth, by
  'rbg', which takes a third of the time of JAX's own generator.
  """
  init = functools.partial(model.clone(scan=True).init, train=False)
  key = jax.random.key(seed, impl='rbg')
  return unstack_blocks(jax.jit(init)(key, images[:1, :8, :8]))


def measure(
  depths: Sequence[int] = (16, 100, 1000),
  *,
  width: int = 2,
  image_size: int = 32,
  batch: int = 4,
  seed: int = 0,
) -> dict[int, dict[str, dict[str, np.ndarray]]]:
  """Measures n-`width` Wide-ResNets at initialization, in float64.

  Images are standard normal. At the sides of an image a 3x3 convolution reads
  zeros, which theory does not know: the smaller the image, the smaller the
  branch. Depth 1000 takes about 10 s a method on two CPU cores.

  Args:
    depths: 6n + 4.
    width: the factor on the channels; from 2 on every stage begins with a
      projection.
    image_size: height and width of the random images, in pixels.
    batch: number of images.
    seed: of the weights and the images.

  Returns:
    Depth -> name in `COLUMNS` -> what `capture` returns, 'skip', 'branch' and
    'output' (second moments), and what `expected` returns, as 'expected_...'.
  """
  shape = batch, image_size, image_size, 3
  values = np.random.default_rng(seed).standard_normal(shape)
  measured: dict[int, dict[str, dict[str, np.ndarray]]] = {}
  with jax.enable_x64(True):  # 2^498 is beyond float32.
    images = jnp.asarray(values)
    for depth in depths:
      measured[depth] = {}
      for column, (method, alpha) in COLUMNS.items():
        model = WideResNet(
          depth, width, method=method, alpha=alpha, param_dtype='float64'
        )
        variables = initialize(model, images, seed)
        measured[depth][column] = beside_theory(
          capture(model, variables, images),
          resolve_method(method, alpha),
          model.stage_sizes,
          project_first=width > 1,
        )
  return measured


def beside_theory(
  captured: Captured,
  method: Method,
  stage_sizes: Sequence[int],
  *,
  project_first: bool,
) -> dict[str, np.ndarray]:
  """What `capture` returns, with second moments and what `expected` returns."""
  moments = {path: second_moment(captured, path) for path in PATHS}
  theory = expected(
    method,
    stage_sizes,
    start=float(moments['skip'][0]),
    project_first=project_first,
  )
  theory = {f'expected_{name}': value for name, value in theory.items()}
  return {**captured, **moments, **theory}


def table(measured: Measured) -> str:
  """Effective depths as a Markdown table: measured, and in brackets theory's.

  Theory's are those of a network whose every stage begins at Var(skip) = 1.
  """
  columns = list(next(iter(measured.values())))
  rows = [['depth', 'blocks', *(VARIANTS[c].label for c in columns)]]
  rows.append(['---'] * len(rows[0]))
  for depth, by_column in measured.items():
    cells = [
      f'{effective_depth(captured["share"]):.2f} '
      f'({effective_depth(captured["expected_share"]):.2f})'
      for captured in by_column.values()
    ]
    blocks = len(by_column[columns[0]]['share'])
    rows.append([str(depth), str(blocks), *cells])
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def draw(measured: Measured, out: Path) -> list[Path]:
  """Draws what `measure` returns: SVG and PNG files in the folder `out`.

  Per depth the second moments against the block, with theory; the shares
  against the block; the distribution of path lengths.
  """
  files = []
  with plotting.style():
    for depth, by_column in measured.items():
      files += _draw_moments(depth, by_column, out)
    files += _draw_shares(measured, out)
    files += _draw_path_lengths(measured, out)
  return files


def _checked(shares: np.ndarray) -> np.ndarray:
  shares = np.asarray(shares, np.float64)
  bad = shares[~((shares >= 0) & (shares <= 1))]
  if bad.size:
    raise InputError(f'share {bad[0]}: expected a number from 0 to 1')
  return shares


def _draw_moments(
  depth: int, by_column: Mapping[str, Captured], out: Path
) -> list[Path]:
  figure, panels = plotting.new_figure(2, 2, width=7.4, height=5.2, sharex=True)
  dashes = dict(zip(PATHS, ('--', ':', '-'), strict=True))
  for axes, (column, captured) in zip(panels, by_column.items(), strict=False):
    color = plotting.line_style(column)['color']
    blocks = 1 + np.arange(len(captured['output']))
    for path in PATHS:
      theory = captured[f'expected_{path}']
      for values, line in (
        (captured[path], {'color': color, 'linestyle': dashes[path]}),
        (theory, {'color': plotting.INK, 'linewidth': 0.7, 'zorder': 3}),
      ):
        if values.all():
          axes.plot(blocks, np.log2(values), **line)
    axes.set_title(VARIANTS[column].label, loc='left')
    if not captured['branch'].any():
      axes.text(
        0.03, 0.06, 'branch: 0 in every block', transform=axes.transAxes
      )
    _widen(axes)
  for axes in panels[2:]:
    axes.set_xlabel('block, from the input')
  for axes in panels[::2]:
    axes.set_ylabel('log₂ of the mean square')
  gray = [
    Line2D([], [], color='gray', linestyle=dashes[path]) for path in PATHS
  ]
  theory = Line2D([], [], color=plotting.INK, linewidth=0.7)
  figure.legend(
    [*gray, theory],
    ['skip path', 'branch', "block's output", 'theory, of each'],
    loc='outside upper left',
    ncols=4,
    handlelength=3,
  )
  return plotting.save(figure, out, f'variance-depth-{depth}')


def _widen(axes: Axes) -> None:
  """At least 4 powers of two: a constant should look like one."""
  low, high = axes.get_ylim()
  if high - low < 4:
    middle = (low + high) / 2
    axes.set_ylim(middle - 2, middle + 2)


def _draw_shares(measured: Measured, out: Path) -> list[Path]:
  figure, panels = plotting.new_figure(
    len(measured), height=2.1 * len(measured)
  )
  for axes, (depth, by_column) in zip(panels, measured.items(), strict=True):
    for column, captured in by_column.items():
      blocks = 1 + np.arange(len(captured['share']))
      if captured['share'].any():
        axes.plot(blocks, captured['share'], **plotting.line_style(column))
        axes.plot(
          blocks,
          captured['expected_share'],
          color=plotting.INK,
          linewidth=0.7,
          zorder=3,
        )
    plotting.log_axis(axes)
    axes.set_title(f'depth {depth}', loc='left')
    axes.set_ylabel("branch's share")
  panels[-1].set_xlabel('block, from the input')
  _legend(figure, measured, {'skipinit': ' (share 0)'}, theory=True)
  return plotting.save(figure, out, 'share')


def _draw_path_lengths(measured: Measured, out: Path) -> list[Path]:
  figure, panels = plotting.new_figure(
    len(measured), height=2.1 * len(measured)
  )
  for axes, (depth, by_column) in zip(panels, measured.items(), strict=True):
    last = 0
    for column, captured in by_column.items():
      chances = path_lengths(captured['share'])
      last = max(last, int(np.flatnonzero(chances > 1e-4)[-1]))
      marker = '.' if len(chances) < 60 else ''
      style = plotting.line_style(column)
      if np.count_nonzero(chances) == 1:
        style, marker = {**style, 'linestyle': 'none'}, 'o'
      axes.plot(chances, marker=marker, **style)
    plotting.log_axis(axes)
    axes.set_ylim(1e-4, 1.3)
    axes.set_xlim(-0.02 * last, last)
    axes.set_title(f'depth {depth}, {len(chances) - 1} blocks', loc='left')
    axes.set_ylabel('share of the paths')
  panels[-1].set_xlabel('branches that a path passes')
  _legend(figure, measured, {}, theory=False)
  return plotting.save(figure, out, 'path-lengths')


def _legend(figure, measured, notes: Mapping[str, str], *, theory: bool):
  columns = list(next(iter(measured.values())))
  lines = [Line2D([], [], **plotting.line_style(column)) for column in columns]
  labels = [VARIANTS[c].label + notes.get(c, '') for c in columns]
  if theory:
    lines.append(Line2D([], [], color=plotting.INK, linewidth=0.7))
    labels.append('theory')
  figure.legend(
    lines, labels, loc='outside upper left', ncols=2, handlelength=3
  )

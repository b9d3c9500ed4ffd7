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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from skipinit_jax import markdown, plotting
from skipinit_jax.analysis.capture import capture, second_moment
from skipinit_jax.errors import InputError
from skipinit_jax.intervals import half_interval
from skipinit_jax.models.methods import Method, resolve_method
from skipinit_jax.models.resnet import ResNet, WideResNet
from skipinit_jax.models.stages import unstack_blocks
from skipinit_jax.variants import VARIANTS

# Of `VARIANTS`.
COLUMNS = ('batchnorm', 'skipinit_sqrt', 'skipinit', 'none')
PATHS = ('skip', 'branch', 'output')

THEORY = {'color': plotting.INK, 'linewidth': 0.7}

Captured = Mapping[str, np.ndarray]
Measured = Mapping[int, Mapping[str, Captured]]


def expected(
  method: Method,
  stage_sizes: Sequence[int],
  *,
  start: float = 1.0,
  project_first: bool = True,
) -> dict[str, np.ndarray]:
  """The moments of a pre-activation network at initialization, in theory.

  He's initialization keeps the second moment of a layer's input. For
  block l of d, l counted from 1, Var(output_l) = gain^2 (Var(skip_l) +
  Var(branch_l)), and:

    no normalization: Var(branch) = alpha^2 Var(skip): the output grows as
      2^l for alpha = 1, as (1 + 1/d)^l for 1/sqrt(d), and not at all for 0;
    batch normalization: Var(branch) = 1 whatever the input: the output is
      start + l, the branch's share 1 / (start + l). Projections take a
      normalized input, so that the skip path has variance 1 again and the
      count l restarts in every stage, with shares 1/2, 1/3, ...;
    standardized kernels (Brock, De, Smith 2021), with scale s: Var(branch) =
      (s alpha beta)^2 Var(output_(l-1)), and Var(skip) = beta^2
      Var(output_(l-1)) after a projection; see `Method.betas`. Exact for any
      start; with 1 and alpha = 1 block i of a stage has the output 1 + i s^2.

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
  square *= method.branch_scale**2
  rows, skip = [], start
  for stage, betas in enumerate(method.betas(stage_sizes)):
    for block in range(stage_sizes[stage]):
      # Var(skip) over that of the input of the branch and the projection.
      ratio = 1.0 if betas is None else betas[block] ** -2
      if block == 0 and (stage or project_first):
        skip, ratio = (1.0 if method.normalize else skip / ratio), 1.0
      if method.normalize:
        ratio = skip
      branch = square * (1.0 if method.normalize else skip / ratio)
      # Not branch / (skip + branch), which may overflow.
      share = square / (ratio + square)
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


def wide_resnet(variant: str, depth: int, width: int, **fields: Any) -> ResNet:
  """A Wide-ResNet with the method and the alpha of a row of `VARIANTS`."""
  row = VARIANTS[variant].fields
  return WideResNet(
    depth,
    width,
    method=row['model.method'],
    alpha=row.get('model.alpha'),
    **fields,
  )


def initialize(model: ResNet, images: jax.Array, seed: int) -> dict[str, Any]:
  """The variables of an unrolled network at initialization.

  They are drawn in the scanned form, whose program is small at any depth, by
  'rbg', which takes a third of the time of JAX's default generator.
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
  draws: int = 5,
) -> dict[int, dict[str, dict[str, np.ndarray]]]:
  """Measures n-`width` Wide-ResNets at initialization, in float64.

  Images are standard normal. At the sides of an image a 3x3 convolution reads
  zeros, which theory does not know: the smaller the image, the smaller the
  branch. Depth 1000 takes about 10 s a method and draw on two CPU cores.

  Args:
    depths: 6n + 4.
    width: the factor on the channels; from 2 on every stage begins with a
      projection.
    image_size: height and width of the random images, in pixels.
    batch: number of images.
    draws: of the weights and the images, with seeds 0, 1, ...

  Returns:
    Depth -> name in `COLUMNS` -> of the first draw what `capture` returns,
    'skip', 'branch' and 'output' (second moments), and what `expected` returns,
    as 'expected_...'; and 'effective_depth' of each draw, float64 (draws,),
    with 'interval', half of the 95 % interval for its mean, float64 ().
  """
  shape = batch, image_size, image_size, 3

  def of_draw(model: ResNet, seed: int) -> dict[str, np.ndarray]:
    images = jnp.asarray(np.random.default_rng(seed).standard_normal(shape))
    return capture(model, initialize(model, images, seed), images)

  def of_variant(depth: int, variant: str) -> dict[str, np.ndarray]:
    model = wide_resnet(variant, depth, width, param_dtype='float64')
    each = [of_draw(model, seed) for seed in range(draws)]
    depths = [effective_depth(captured['share']) for captured in each]
    return {
      **beside_theory(each[0], model, project_first=width > 1),
      'effective_depth': np.array(depths),
      'interval': np.array(half_interval(depths)),
    }

  with jax.enable_x64(True):  # 2^498 is beyond float32.
    return {
      depth: {variant: of_variant(depth, variant) for variant in COLUMNS}
      for depth in depths
    }


def beside_theory(
  captured: Captured, model: ResNet, *, project_first: bool
) -> dict[str, np.ndarray]:
  """What `capture` returns, with second moments and what `expected` returns."""
  moments = {path: second_moment(captured, path) for path in PATHS}
  theory = expected(
    resolve_method(model.method, model.alpha),
    model.stage_sizes,
    start=float(moments['skip'][0]),
    project_first=project_first,
  )
  theory = {f'expected_{name}': value for name, value in theory.items()}
  return {**captured, **moments, **theory}


def table(measured: Measured) -> str:
  """Effective depths as a Markdown table: measured, and in theory in brackets.

  Of several draws it is the mean, with half of the 95 % interval for it. In
  theory every stage begins at Var(skip) = 1.
  """
  columns = list(next(iter(measured.values())))
  rows = []
  for depth, by_column in measured.items():
    cells = [
      f'{_mean_depth(found)} ({effective_depth(found["expected_share"]):.2f})'
      for found in by_column.values()
    ]
    blocks = len(by_column[columns[0]]['share'])
    rows.append([str(depth), str(blocks), *cells])
  labels = [VARIANTS[column].label for column in columns]
  return markdown.table([['depth', 'blocks', *labels], *rows])


def _mean_depth(found: Captured) -> str:
  if 'effective_depth' not in found:  # Of a run.
    return f'{effective_depth(found["share"]):.2f}'
  mean, interval = found['effective_depth'].mean(), found['interval']
  # One draw has no interval, and exactly 0 needs none.
  return f'{mean:.2f}' + (f' ± {interval:.2f}' if 0 < interval < np.inf else '')


@plotting.style()
def draw(measured: Measured, out: Path) -> list[Path]:
  """Draws what `measure` returns: SVG and PNG files in the folder `out`.

  Per depth the second moments against the block, with theory; the shares
  against the block; the distribution of path lengths. Also writes `table`.
  """
  out.mkdir(parents=True, exist_ok=True)
  (out / 'effective_depth.md').write_text(table(measured))
  files = []
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
        (theory, {**THEORY, 'zorder': 3}),
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
  gray = [plotting.handle(color='gray', linestyle=dashes[p]) for p in PATHS]
  labels = ['skip path', 'branch', "block's output", 'theory, of each']
  handles = [*gray, plotting.handle(**THEORY)]
  plotting.legend(figure, handles, labels, columns=4)
  return plotting.save(figure, out, f'variance-depth-{depth}')


def _widen(axes: Axes) -> None:
  """At least 4 powers of two: a constant should look like one."""
  low, high = axes.get_ylim()
  if high - low < 4:
    middle = (low + high) / 2
    axes.set_ylim(middle - 2, middle + 2)


def _panels(
  measured: Measured, xlabel: str, ylabel: str
) -> tuple[Figure, list[Axes]]:
  """A figure with a panel for each depth."""
  rows = len(measured)
  figure, panels = plotting.new_figure(rows, height=2.1 * rows)
  for axes, (depth, by_column) in zip(panels, measured.items(), strict=True):
    blocks = len(next(iter(by_column.values()))['share'])
    axes.set_title(f'depth {depth}, {blocks} blocks', loc='left')
    axes.set_ylabel(ylabel)
  panels[-1].set_xlabel(xlabel)
  return figure, panels


def _draw_shares(measured: Measured, out: Path) -> list[Path]:
  figure, panels = _panels(measured, 'block, from the input', "branch's share")
  for axes, by_column in zip(panels, measured.values(), strict=True):
    for column, captured in by_column.items():
      share, theory = captured['share'], captured['expected_share']
      blocks = 1 + np.arange(len(share))
      if share.any():
        axes.plot(blocks, share, **plotting.line_style(column))
        axes.plot(blocks, theory, **THEORY, zorder=3)
    plotting.log_axis(axes)
  handles, labels = _handles(measured)
  first = next(iter(measured.values())).values()
  labels = [
    label if captured['share'].any() else f'{label} (share 0)'
    for label, captured in zip(labels, first, strict=True)
  ]
  handles.append(plotting.handle(**THEORY))
  plotting.legend(figure, handles, [*labels, 'theory'], columns=2)
  return plotting.save(figure, out, 'share')


def _draw_path_lengths(measured: Measured, out: Path) -> list[Path]:
  xlabel = 'branches that a path passes'
  figure, panels = _panels(measured, xlabel, 'share of the paths')
  for axes, by_column in zip(panels, measured.values(), strict=True):
    last = 0
    for column, captured in by_column.items():
      chances = path_lengths(captured['share'])
      last = max(last, int(np.flatnonzero(chances > 1e-4)[-1]))
      style = plotting.line_style(column)
      style['marker'] = '.' if len(chances) < 60 else ''
      if np.count_nonzero(chances) == 1:
        style |= {'marker': 'o', 'linestyle': 'none'}
      axes.plot(chances, **style)
    plotting.log_axis(axes)
    axes.set_ylim(1e-4, 1.3)
    axes.set_xlim(-0.02 * last, last)
  plotting.legend(figure, *_handles(measured), columns=2)
  return plotting.save(figure, out, 'path-lengths')


def _handles(measured: Measured) -> tuple[list[Line2D], list[str]]:
  """A line and a label for each column, for a legend."""
  columns = list(next(iter(measured.values())))
  lines = [plotting.handle(**plotting.line_style(c)) for c in columns]
  return lines, [VARIANTS[c].label for c in columns]

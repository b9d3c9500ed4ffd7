"""Effective depth and sharpness along training.

The effective depth is the sum of the branches' shares that a run has logged
(`watch_every_steps`). The Hessian's largest eigenvalue is that of its
checkpoints, beside the eigenvalue above which its rate is not stable.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from skipinit_jax import markdown, plotting
from skipinit_jax.analysis.curvature import largest_eigenvalue, training_loss
from skipinit_jax.errors import InputError
from skipinit_jax.training.checkpoints import FOLDER, saved_steps
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.optimizer import make_schedule, peak_rate
from skipinit_jax.training.saved import Saved, config_of, load_run
from skipinit_jax.variants import VARIANTS

DEEPEST = 400  # Layers; of more, an eigenvalue takes ten minutes on two cores.

Measured = Mapping[str, Mapping[str, np.ndarray]]


def measure(
  workdirs: Mapping[str, Path | epath.Path], *, images: int = 64
) -> dict[str, dict[str, np.ndarray]]:
  """Measures runs that watched their blocks.

  Args:
    workdirs: name in `VARIANTS` -> folder of a run on a data set that fits
      on a device.
    images: training images of the loss, the first.

  Returns:
    Name -> float64 arrays: `epoch` and `effective_depth` (lines of metrics,);
    `checkpoint_epoch`, `eigenvalue` and `error` (see
    `curvature.largest_eigenvalue`), and `limit`, the eigenvalue below which
    gradient descent with the run's rate and momentum is stable on a quadratic,
    2 (1 + momentum) / rate; all (checkpoints,), or (0,) of a network with more
    than DEEPEST layers.

  Raises:
    InputError: a folder without a run, or one that did not watch.
  """
  return {
    name: effective_depths(workdir) | eigenvalues(workdir, images)
    for name, workdir in workdirs.items()
  }


def effective_depths(workdir: Path | epath.Path) -> dict[str, np.ndarray]:
  """`epoch` and `effective_depth` of a run, see `measure`."""
  lines = [x for x in read_metrics(workdir) if 'branch_share' in x]
  if not lines:
    raise InputError(
      f'{workdir} has no branch_share in its metrics; train with '
      '--config.watch_every_steps=N, a network with skip paths'
    )
  shares = [list(line['branch_share'].values()) for line in lines]
  return {
    'epoch': np.array([x['epoch'] for x in lines]),
    'effective_depth': np.array(shares, np.float64).sum(1),  # None is NaN.
  }


def eigenvalues(
  workdir: Path | epath.Path, images: int
) -> dict[str, np.ndarray]:
  """The arrays of `measure` that have a row for every checkpoint."""
  rows, loss = [], None
  deep = config_of(workdir).model.depth > DEEPEST
  for step in () if deep else saved_steps(workdir):
    run = load_run(workdir / FOLDER / str(step))
    if loss is None:  # Compiled once.
      loss = training_loss(run.model, run.data, images)
    key = jax.random.key(step)
    value, error = largest_eigenvalue(loss, run.variables['params'], key)
    per_epoch = run.data.train_size / run.config.batch_size
    rows.append((step / per_epoch, value, error, _limit(run)))
  names = ('checkpoint_epoch', 'eigenvalue', 'error', 'limit')
  columns = np.array(rows, np.float64).reshape(-1, len(names)).T
  return dict(zip(names, columns, strict=True))


def _limit(run: Saved) -> float:
  schedule = make_schedule(run.config, run.data.train_size)
  rate = peak_rate(run.config) * float(np.asarray(schedule(run.step)))
  if not rate:  # A cosine ends at 0, where every eigenvalue is stable.
    return math.inf
  return 2 * (1 + run.config.optimizer.momentum) / rate


def table(measured: Measured) -> str:
  """The first and the last of the arrays of `measure` as a Markdown table.

  The last is followed by its epoch; what is not finite, or was not measured, is
  a dash.
  """
  rows = []
  for method, found in measured.items():
    row = [VARIANTS[method].label]
    for name, at in (
      ('effective_depth', 'epoch'),
      ('eigenvalue', 'checkpoint_epoch'),
    ):
      values = np.asarray(found[name], np.float64)  # None, of JSON, is NaN.
      if not values.size:
        row += ['-', '-']
        continue
      first, last = (
        f'{v:.3g}' if np.isfinite(v) else '-' for v in values[[0, -1]]
      )
      row += [first, f'{last} ({found[at][-1]:.3g})']
    rows.append(row)
  head = ['', 'effective depth at the start', 'at the end (epoch)']
  head += ['largest eigenvalue at the start', 'at the end (epoch)']
  return markdown.table([head, *rows])


@plotting.style()
def draw(measured: Measured, out: Path) -> list[Path]:
  """Draws the arrays of `measure`: SVG and PNG files in the folder `out`.

  Above, the effective depth; below, the largest eigenvalue and, thin and in the
  same color, the limit of stability. Also writes `table`.
  """
  out.mkdir(parents=True, exist_ok=True)
  (out / 'along_training.md').write_text(table(measured))
  known = any(found['eigenvalue'].size for found in measured.values())
  height = 5 if known else None
  figure, axes = plotting.new_figure(1 + known, height=height, sharex=True)
  for method, found in measured.items():
    axes[0].plot(
      found['epoch'],
      found['effective_depth'],
      label=VARIANTS[method].label,
      **plotting.line_style(method),
    )
  axes[0].set_ylabel('effective depth (branches)')
  axes[0].set_ylim(bottom=0)
  axes[-1].set_xlabel('epoch')
  handles, labels = axes[0].get_legend_handles_labels()
  if known:
    _draw_eigenvalues(axes[1], measured)
    handles.append(plotting.handle(color='gray', linewidth=0.8))
    labels.append('limit at the rate')
  plotting.legend(figure, handles, labels, columns=2)
  return plotting.save(figure, out, 'training')


def _draw_eigenvalues(axes: Axes, measured: Measured) -> None:
  for method, found in measured.items():
    at = found['checkpoint_epoch']
    if (good := np.isfinite(found['eigenvalue'])).any():
      axes.plot(
        at[good],
        found['eigenvalue'][good],
        markersize=4,
        **plotting.marked_style(method),
      )
    axes.plot(
      at[finite := np.isfinite(found['limit'])],
      found['limit'][finite],
      linewidth=0.8,
      zorder=1,
      **plotting.line_style(method),
    )
  plotting.log_axis(axes)
  axes.set_ylabel('largest eigenvalue')

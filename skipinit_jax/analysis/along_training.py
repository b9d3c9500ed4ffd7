"""Along training: how many branches signal passes, and how sharp the loss is.

The effective depth is the sum of the branches' shares that a run has watched
(`watch_every_steps`); the Hessian's largest eigenvalue is that of its
checkpoints, beside the eigenvalue above which its rate is not stable.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.lines import Line2D

from skipinit_jax import plotting
from skipinit_jax.analysis.curvature import largest_eigenvalue, training_loss
from skipinit_jax.errors import InputError
from skipinit_jax.training.checkpoints import FOLDER, saved_steps
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.optimizer import make_schedule, peak_rate
from skipinit_jax.training.saved import Saved, load_run
from skipinit_jax.variants import VARIANTS

Measured = Mapping[str, Mapping[str, np.ndarray]]


def measure(
  workdirs: Mapping[str, Path], *, images: int = 64, steps: int = 12
) -> dict[str, dict[str, np.ndarray]]:
  """Of runs that watched their blocks.

  Args:
    workdirs: name in `VARIANTS` -> folder of a run on a data set that fits
      on a device.
    images: training images of the loss, the first.
    steps: of Lanczos's method, at most.

  Returns:
    Name -> float64 arrays: `epoch` and `effective_depth` (looks,);
    `checkpoint_epoch`, `eigenvalue` and `error` (see
    `curvature.largest_eigenvalue`), and `limit`, the eigenvalue that gradient
    descent with the run's rate and momentum is stable below on a quadratic,
    2 (1 + momentum) / rate; all (checkpoints,).

  Raises:
    InputError: a folder without a run, or one that did not watch.
  """
  return {
    name: {**effective_depths(workdir), **eigenvalues(workdir, images, steps)}
    for name, workdir in workdirs.items()
  }


def effective_depths(workdir: Path) -> dict[str, np.ndarray]:
  """The effective depths that a run has watched, see `measure`."""
  lines = [x for x in read_metrics(workdir) if 'branch_share' in x]
  if not lines:
    raise InputError(
      f'{workdir} has no branch_share in its metrics; train with '
      '--config.watch_every_steps=N, a network with skip paths'
    )

  def depth(shares: Mapping[str, float | None]) -> float:
    values = [np.nan if s is None else s for s in shares.values()]
    return float(np.sum(values))

  return {
    'epoch': np.array([x['epoch'] for x in lines]),
    'effective_depth': np.array([depth(x['branch_share']) for x in lines]),
  }


def eigenvalues(
  workdir: Path, images: int, steps: int
) -> dict[str, np.ndarray]:
  """The largest eigenvalue at every checkpoint of a run, see `measure`."""
  rows, loss = [], None
  for step in saved_steps(workdir):
    run = load_run(workdir / FOLDER / str(step))
    if loss is None:  # Compiled once.
      loss = training_loss(run.model, run.data, images)
    found = largest_eigenvalue(
      loss, run.variables['params'], jax.random.key(step), steps
    )
    per_epoch = run.data.train_size / run.config.batch_size
    rows.append((step / per_epoch, found.value, found.error, _limit(run)))
  names = ('checkpoint_epoch', 'eigenvalue', 'error', 'limit')
  columns = np.array(rows, np.float64).reshape(-1, len(names)).T
  return dict(zip(names, columns, strict=True))


def _limit(run: Saved) -> float:
  schedule = make_schedule(run.config, run.data.train_size)
  rate = peak_rate(run.config) * float(schedule(run.step))
  if not rate:  # A cosine ends at 0, where every eigenvalue is stable.
    return math.inf
  return 2 * (1 + run.config.optimizer.momentum) / rate


def draw(measured: Measured, out: Path, name: str = 'training') -> list[Path]:
  """Draws what `measure` returns: SVG and PNG files in the folder `out`.

  Above, the effective depth; below, the largest eigenvalue, and in the same
  colour, thin, what the rate and the momentum leave stable.
  """
  with plotting.style():
    figure, (depths, eigenvalues) = plotting.new_figure(
      2, height=5, sharex=True
    )
    for method, found in measured.items():
      style = plotting.line_style(method)
      marker = {'marker': VARIANTS[method].marker, 'markersize': 4}
      depths.plot(
        found['epoch'],
        found['effective_depth'],
        **style,
        label=VARIANTS[method].label,
      )
      at = found['checkpoint_epoch']
      if (good := np.isfinite(found['eigenvalue'])).any():
        eigenvalues.plot(at[good], found['eigenvalue'][good], **style, **marker)
      finite = np.isfinite(found['limit'])
      eigenvalues.plot(
        at[finite], found['limit'][finite], **style, linewidth=0.8, zorder=1
      )
    depths.set_ylabel('effective depth (branches)')
    depths.set_ylim(bottom=0)
    plotting.log_axis(eigenvalues)
    eigenvalues.set_ylabel('largest eigenvalue')
    eigenvalues.set_xlabel('epoch')
    handles, labels = depths.get_legend_handles_labels()
    handles.append(Line2D([], [], color='gray', linewidth=0.8))
    labels.append('limit at the rate')
    figure.legend(
      handles, labels, loc='outside upper left', ncols=2, handlelength=3
    )
    return plotting.save(figure, out, name)

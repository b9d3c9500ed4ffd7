"""What a run says: metrics.jsonl, TensorBoard events, the progress line."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX
import tqdm

from skipinit_jax.training.timetable import Timetable

METRICS = 'metrics.jsonl'


class Reporter:
  """Writes the metrics of a run and shows its progress.

  Args:
    workdir: of the run.
    start: steps made already.
    times: when a line is due.
    batch_size: for images a second.

  Attributes:
    diverged: whether metrics that are not finite were read.
  """

  def __init__(
    self,
    workdir: Path,
    start: int,
    times: Timetable,
    batch_size: int,
  ):
    self._path = workdir / METRICS
    self._drop_after(start)
    self._file = self._path.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start
    )
    # disable=None: nothing where standard error is not a terminal.
    self._bar = tqdm.tqdm(
      initial=start,
      total=times.total,
      disable=None,
      unit='step',
      dynamic_ncols=True,
      bar_format='{percentage:3.0f}% {n_fmt}/{total_fmt} steps, '
      '{remaining} left{postfix}',
    )
    self._times = times
    self._batch_size = batch_size
    self._compiled = False
    self._pending = None
    self._eval = ''
    self.diverged = False
    self.restart_clock(start)

  def restart_clock(self, step: int) -> None:
    """Leaves what happened since the last line out of images a second."""
    self._clock = step, time.perf_counter()
    self._waited = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time spent inside as waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def train(
    self, step: int, count: int, metrics: Mapping[str, jax.Array]
  ) -> None:
    """Takes the metrics of a call of `count` steps, and reads those due.

    They are read one call late, when the next one is already running, so that
    the device does not wait for the host; `flush` reads them at once.
    """
    self.flush()
    if not self._compiled:  # Compiling is not training.
      jax.block_until_ready(metrics)
      self.restart_clock(step)
      self._compiled = True
    if self._times.logs(step):
      self._pending = step, metrics
    self._bar.update(count)

  def flush(self) -> None:
    """Writes the line of the metrics taken and not yet read."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = {name: value.item() for name, value in metrics.items()}
    self.diverged = not values.pop('finite')
    values.pop('stop')
    since, start = self._clock
    seconds = time.perf_counter() - start
    rate = (step - since) * self._batch_size / seconds
    timings = {
      'images_per_second': round(rate, 2),
      'data_wait_seconds': round(self._waited, 4),
    }
    self.restart_clock(step)
    self._write(step, values | timings)
    self._bar.set_postfix_str(
      f'{rate:,.0f} images/s, loss {values["loss"]:.4f}, '
      f'top-1 {values["top1"]:.3f}{self._eval}'
    )

  def eval(self, step: int, results: Mapping[str, Any]) -> None:
    """Writes the results of an evaluation, see `evaluate`."""
    self._write(step, results)
    self.restart_clock(step)
    self._eval = f', test top-1 {results["eval"]["top1"]:.3f}'

  def say(self, line: str) -> None:
    """Prints a line to standard error, above the progress line."""
    tqdm.tqdm.write(line, file=sys.stderr)

  def close(self) -> None:
    """Closes the files and the progress line."""
    self._bar.close()
    self._file.close()
    self._board.close()

  def _write(self, step: int, values: Mapping[str, Any]) -> None:
    epoch = round(step / self._times.per_epoch, 4)
    line = {'step': step, 'epoch': epoch} | dict(values)
    self._file.write(dumps(line) + '\n')
    self._file.flush()
    groups = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    for group, scalars in (groups or {'train': values}).items():
      for name, value in scalars.items():
        if math.isfinite(value):  # TensorBoard has no place for the others.
          self._board.add_scalar(f'{group}/{name}', value, step)

  def _drop_after(self, step: int) -> None:
    """Removes the lines that a resumed run is going to write again."""
    if self._path.exists():
      lines = self._path.read_text().splitlines(keepends=True)
      kept = [line for line in lines if _step_of(line) <= step]
      temporary = self._path.with_suffix('.tmp')
      temporary.write_text(''.join(kept))
      os.replace(temporary, self._path)


def read_evals(workdir: Path) -> list[dict[str, float]]:
  """All evaluations of a run: top1, top5, loss and step, in order."""
  with (workdir / METRICS).open() as file:
    lines = [json.loads(line) for line in file]
  return [{**x['eval'], 'step': x['step']} for x in lines if 'eval' in x]


def dumps(value: Any, **kwargs) -> str:
  """Strict JSON, with null for numbers that are not finite."""
  return json.dumps(_finite(value), allow_nan=False, **kwargs)


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except ValueError:  # Cut off when the run was killed.
    return math.inf

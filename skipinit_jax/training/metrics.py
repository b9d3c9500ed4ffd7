"""A run's metrics: metrics.jsonl, TensorBoard events, the progress line."""

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tensorboardX
import tqdm
from etils import epath

from skipinit_jax.errors import InputError, RunError, reason
from skipinit_jax.training import processes
from skipinit_jax.training.lines import Lines
from skipinit_jax.training.timetable import Timetable

# These differ from run to run; every other field of a line is reproducible.
TIMINGS = ('images_per_second', 'data_wait_seconds')
# Metrics that have a value for every block.
WATCHED = ('alpha', 'branch_share', 'block_grad_norm')


class Reporter:
  """Writes the metrics of a run and shows its progress.

  In a job of several processes only the first writes.

  Args:
    workdir: of the run.
    start: steps already made.
    times: when lines are due.
    batch_size: of all processes.
    names: for each metric of WATCHED, the names of its values.
    bad_share: the share of an epoch's images that may be unreadable.

  Attributes:
    diverged: whether metrics that are not finite were read.
    stop: whether any process was asked to stop, or `trouble` is not None.
    trouble: an InputError if more than `bad_share` are unreadable.
    last: the last finite training metrics and their step.
    evaluated: steps made at the last evaluation, 0 before the first.
  """

  def __init__(
    self,
    workdir: epath.Path,
    start: int,
    times: Timetable,
    batch_size: int,
    names: Mapping[str, Sequence[str]],
    bad_share: float,
  ):
    self._workdir = workdir
    self._lines = Lines(workdir)
    self._writes = jax.process_index() == 0
    self._times = times
    self._batch_size = batch_size
    self._names = names
    train_size = round(times.per_epoch * batch_size)
    self._bad_share = BadShare(batch_size, train_size, bad_share)
    self._board = None
    self._compiled = False
    self._eval = ''
    # disable=None: nothing where standard error is not a terminal.
    self._bar = tqdm.tqdm(
      total=times.total,
      disable=None if self._writes else True,
      unit='step',
      dynamic_ncols=True,
      bar_format='{percentage:3.0f}% {n_fmt}/{total_fmt} steps, '
      '{remaining} left{postfix}',
    )
    self._open(start)

  def _open(self, start: int) -> None:
    """Opens the files as they were after `start` steps."""
    self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
    self.diverged = self.stop = False
    self.last: dict[str, float] = {}
    self.trouble: InputError | None = None
    lines = []
    if self._writes:
      try:
        lines, said = self._lines.resume(start)
      except OSError as error:
        raise self._not_written(error) from None
      for sentence in said:
        say(sentence)
    self._bad_share.resume(start, lines)
    evals = [line['step'] for line in lines if 'eval' in line]
    self.evaluated = processes.from_first(max(evals, default=0))
    # tensorboardX needs a folder.
    if self._writes and '://' not in str(self._workdir):
      self._board = tensorboardX.SummaryWriter(
        str(self._workdir / 'tensorboard'), purge_step=start
      )
    self._bar.n = self._bar.initial = start
    self.restart_clock(start)

  def go_back(self, step: int) -> None:
    """Takes back all that was written after `step` steps."""
    self._close_files()
    self._open(step)

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
    """Takes the metrics of a call of `count` steps, and reads those before.

    They are read one call late, when the next one is already running, so that
    the device does not wait for the host; `flush` reads them at once.
    """
    self.flush()
    if not self._compiled:  # Compiling is not training.
      jax.block_until_ready(metrics)
      self.restart_clock(step)
      self._compiled = True
    self._pending = step, metrics
    self._bar.update(count)

  def flush(self) -> None:
    """Reads the metrics of the last call, and writes what is due."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    arrays = jax.device_get(dict(metrics))
    watched = {k: arrays.pop(k) for k in WATCHED if k in arrays}
    values: dict[str, Any] = {k: v.item() for k, v in arrays.items()}
    self.diverged = not values.pop('finite')
    if replaced := values.pop('replaced'):
      self._write(step, {'replaced': replaced})
      self.trouble = self._bad_share.add(step, replaced) or self.trouble
    self.stop = values.pop('stop') > 0 or self.trouble is not None
    if not values['skipped']:
      del values['skipped']
    if not self.diverged:
      self.last = {'step': step, **values}
    elif not self._times.logs(step):
      self._write(step, values)  # What it looked like when it diverged.
    if self._times.watches(step) and not self.diverged:
      self.watch(step, watched)
    if self._times.logs(step):
      since, start = self._clock
      rate = (step - since) * self._batch_size / (time.perf_counter() - start)
      waited = self._waited
      self.restart_clock(step)
      timings = round(rate, 2), round(waited, 4)
      self._write(step, values | dict(zip(TIMINGS, timings, strict=True)))
      self._bar.set_postfix_str(
        f'{rate:,.0f} images/s, loss {values["loss"]:.4f}, '
        f'top-1 {values["top1"]:.3f}{self._eval}'
      )

  def watch(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Writes the metrics of WATCHED, each by block; waits for them."""
    named = {
      key: dict(zip(self._names[key], values.tolist(), strict=True))
      for key, values in jax.device_get(dict(metrics)).items()
    }
    if named:
      self._write(step, named)

  def eval(self, step: int, results: Mapping[str, Any]) -> None:
    """Writes the results of an evaluation, see `evaluate`."""
    self._write(step, results)
    self.evaluated = step
    self.restart_clock(step)
    self._eval = f', test top-1 {results["eval"]["top1"]:.3f}'

  def unreadable(self, names: Sequence[str]) -> int:
    """Names images of this process that could not be read; their number."""
    for name in names:
      print(f'could not be read, replaced: {name}', file=sys.stderr)
    return len(names)

  def sync(self) -> None:
    """Makes the lines survive a crash of the machine."""
    self._lines.sync()

  def close(self) -> None:
    """Closes the files and the progress line."""
    self._bar.close()
    self._close_files()

  def _close_files(self) -> None:
    self._lines.close()
    if self._board:
      self._board.close()

  def _write(self, step: int, values: Mapping[str, Any]) -> None:
    if not self._writes:
      return
    line = {'step': step, 'epoch': round(step / self._times.per_epoch, 4)}
    try:
      self._lines.append(line | dict(values))
      self._show(step, values)
    except OSError as error:
      raise self._not_written(error) from None

  def _not_written(self, error: OSError) -> RunError:
    return RunError(
      f'metrics can not be written to {self._workdir}: {reason(error)}'
    )

  def _show(self, step: int, values: Mapping[str, Any]) -> None:
    if not self._board:
      return
    groups = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    for group, scalars in (groups or {'train': values}).items():
      for name, value in scalars.items():
        if math.isfinite(value):  # TensorBoard has no place for the others.
          self._board.add_scalar(f'{group}/{name}', value, step)


class BadShare:
  """Counts the images of an epoch that were replaced by others.

  All processes count alike, so that all stop after the same step.

  Args:
    batch_size: of all processes.
    train_size: images of an epoch.
    limit: the share of an epoch's images that may be replaced.
  """

  def __init__(self, batch_size: int, train_size: int, limit: float):
    self._batch_size, self._train_size = batch_size, train_size
    self._limit = limit
    self._epoch, self._count = 0, 0

  def resume(self, start: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Counts again what the first process has written in `start` steps."""
    self._epoch = start * self._batch_size // self._train_size
    count = sum(
      line['replaced']
      for line in lines
      if 'replaced' in line and self._epoch_of(line['step']) == self._epoch
    )
    self._count = processes.from_first(count)

  def add(self, step: int, replaced: int) -> InputError | None:
    """Counts the images replaced in a step; an error if they are too many."""
    epoch = self._epoch_of(step)
    if epoch is None:
      return None
    if epoch != self._epoch:
      self._epoch, self._count = epoch, 0
    self._count += replaced
    if self._count <= self._limit * self._train_size:
      return None
    return InputError(
      f"{self._count} of an epoch's {self._train_size} images could not be "
      f'read, more than data.bad_share={self._limit}; they are named above; '
      'python -m skipinit_jax.data check lists all'
    )

  def _epoch_of(self, step: int) -> int | None:
    """The epoch of a step's images, None if they are of two.

    These count for neither, or an image might be counted twice.
    """
    first, after = (n * self._batch_size for n in (step - 1, step))
    epoch = first // self._train_size
    return epoch if epoch == (after - 1) // self._train_size else None


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """All lines of a run's metrics, in order."""
  return Lines(workdir).read()


def say(line: str) -> None:
  """Prints a line to standard error, above a progress line if there is one."""
  tqdm.tqdm.write(line, file=sys.stderr)

"""Evaluation that counts every example once."""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import processes
from skipinit_jax.training.devices import message, shard
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState

# Images uint8 (rows, height, width, channels), labels int32 (rows,), and a mask
# bool (rows,), False for rows that only fill the batch.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


class AskedToStop(Exception):
  """A process was asked to stop during an evaluation."""


def evaluate(
  program: Program,
  state: TrainState,
  asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
  """Top-1, top-5 and loss over the whole evaluation split.

  Args:
    program: of the run; the config's `eval_batch_size` is rounded up to a
      multiple of the devices.
    state: replicated.
    asked_to_stop: whether this process was; called once a batch.

  Returns:
    'eval' and, where parameters are averaged, 'eval_ema': each top1 and top5 as
    fractions of the split, the mean loss, and `unreadable` if images could not
    be read (they count as wrong).

  Raises: the same in all processes:
    AskedToStop: any of them was.
    InputError, RunError: the images of one can't be read, or too many are
      broken.
  """
  variables = {'eval': (state.params, state.batch_stats)}
  if state.ema is not None:
    variables['eval_ema'] = state.ema['params'], state.ema['batch_stats']
  results = {}
  for name, parts in variables.items():
    totals: dict[str, float] = {}
    for batch, trouble in _batches(program):
      ours = message(stop=asked_to_stop() or trouble is not None)
      sums = program.eval_step(*parts, *shard(batch), ours)
      for key, value in jax.device_get(sums).items():
        totals[key] = totals.get(key, 0) + value.item()
      if totals['stop']:
        raise processes.agree(trouble) or AskedToStop
    results[name] = _means(totals, program)
  return results


def warm_up(program: Program, state: TrainState) -> None:
  """Compiles the evaluation while a signal to stop finds nothing to save."""
  batch = shard(_masked_batch(program))
  sums = program.eval_step(state.params, state.batch_stats, *batch, message())
  jax.block_until_ready(sums)


def _batches(program: Program) -> Iterator[tuple[Batch, Exception | None]]:
  """This process's batches, each with None.

  If they can't be read, a masked batch with the reason: the other processes
  wait for this one in a step, so it takes part and tells them.
  """
  try:
    for batch in program.data.eval_batches(
      _batch_size(program), jax.process_index(), jax.process_count()
    ):
      yield batch, None
  except (InputError, RunError) as error:
    yield _masked_batch(program), error


def _masked_batch(program: Program) -> Batch:
  rows = _batch_size(program) // jax.process_count()
  images = np.zeros((rows, *program.data.image_shape), np.uint8)
  return images, np.zeros(rows, np.int32), np.zeros(rows, bool)


def _batch_size(program: Program) -> int:
  """Over all devices, and a multiple of them."""
  n = jax.device_count()
  return math.ceil(program.config.eval_batch_size / n) * n


def _means(totals: dict[str, float], program: Program) -> dict[str, float]:
  seen, read, size = totals['seen'], totals['read'], program.data.eval_size
  assert seen == size, f'evaluated {seen} of {size} examples'
  broken, share = seen - read, program.config.data.bad_share
  if broken > share * size:
    raise InputError(
      f'{broken} of the {size} images to evaluate on could not be read, more '
      f'than data.bad_share={share}; they are named above'
    )
  means = {
    'top1': totals['top1'] / seen,
    'top5': totals['top5'] / seen,
    'loss': totals['loss'] / max(read, 1),
  }
  return means | ({'unreadable': broken} if broken else {})

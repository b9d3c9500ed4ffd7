"""Evaluation that counts every example once."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import processes
from skipinit_jax.training.devices import shard, tell
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState


def evaluate(
  program: Program,
  state: TrainState,
  config: ConfigDict,
  data,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]] | None:
  """Top-1, top-5 and loss over the whole evaluation split.

  Args:
    program: with the mapped `eval_step`.
    state: replicated.
    config: its `eval_batch_size` is rounded up to a multiple of the devices.
    data: what to evaluate on, see `data.open_dataset`.
    stop: whether this process was asked to stop.

  Returns:
    'eval' and, where parameters are averaged, 'eval_ema': each top1 and top5 as
    fractions of the split, the mean loss, and `unreadable` where images could
    not be read (they count as wrong). None if any process was asked to stop.

  Raises:
    InputError, RunError: the images of any process can't be read, or too many
      are broken; the same in all processes.
  """
  variables = {'eval': (state.params, state.batch_stats)}
  if state.ema is not None:
    variables['eval_ema'] = state.ema['params'], state.ema['batch_stats']
  results = {}
  for name, parts in variables.items():
    totals: dict[str, float] = {}
    batches = data.eval_batches(
      eval_batch_size(config), jax.process_index(), jax.process_count()
    )
    for batch, trouble in _or_trouble(batches, blank(config, data)):
      host = tell(stop=stop() or trouble is not None)
      sums = program.eval_step(*parts, *shard(batch), host)
      for key, value in jax.device_get(sums).items():
        totals[key] = totals.get(key, 0) + value.item()
      if totals['stop']:
        if trouble := processes.agree(trouble):
          raise trouble
        return None
    results[name] = _means(totals, data.eval_size)
    broken, share = results[name].get('unreadable', 0), config.data.bad_share
    if broken > share * data.eval_size:
      raise InputError(
        f'{broken} of the {data.eval_size} images to evaluate on could not be '
        f'read, more than data.bad_share={share}; they are named above'
      )
  return results


def _or_trouble(
  batches: Iterator[Any], blank: Any
) -> Iterator[tuple[Any, Exception | None]]:
  """Each batch with None, or a blank one with the reason why there is none.

  The others wait for this process in a step, so that it takes part and tells.
  """
  try:
    for batch in batches:
      yield batch, None
  except (InputError, RunError) as error:
    yield blank, error


def blank(
  config: ConfigDict, data: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """This process's part of a batch to evaluate on, all of it masked."""
  rows = eval_batch_size(config) // jax.process_count()
  images = np.zeros((rows, *data.image_shape), np.uint8)
  return images, np.zeros(rows, np.int32), np.zeros(rows, bool)


def eval_batch_size(config: ConfigDict) -> int:
  """The recipe's, over all devices, rounded up to a multiple of them."""
  n = jax.device_count()
  return math.ceil(config.eval_batch_size / n) * n


def _means(totals: dict[str, float], eval_size: int) -> dict[str, float]:
  seen, read = totals['seen'], totals['read']
  assert seen == eval_size, f'evaluated {seen} of {eval_size} examples'
  means = {
    'top1': totals['top1'] / seen,
    'top5': totals['top5'] / seen,
    'loss': totals['loss'] / max(read, 1),
  }
  return means | ({'unreadable': seen - read} if read < seen else {})


def warm_up(
  program: Program, state: TrainState, config: ConfigDict, data: Any
) -> None:
  """Compiles the evaluation while a signal to stop finds nothing to save."""
  batch = shard(blank(config, data))
  sums = program.eval_step(state.params, state.batch_stats, *batch, tell())
  jax.block_until_ready(sums)

"""Evaluation that counts every example once."""

import math
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

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
  """
  variables = {'eval': (state.params, state.batch_stats)}
  if state.ema is not None:
    variables['eval_ema'] = state.ema['params'], state.ema['batch_stats']
  results = {}
  for name, parts in variables.items():
    totals: dict[str, float] = {}
    for batch in data.eval_batches(
      eval_batch_size(config), jax.process_index(), jax.process_count()
    ):
      sums = program.eval_step(*parts, *shard(batch), tell(stop=stop()))
      for key, value in jax.device_get(sums).items():
        totals[key] = totals.get(key, 0) + value.item()
      if totals['stop']:
        return None
    results[name] = _means(totals, data.eval_size)
  return results


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

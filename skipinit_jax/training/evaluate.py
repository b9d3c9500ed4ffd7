"""Evaluation that counts every example once."""

import math

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.training.devices import shard
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState


def evaluate(
  program: Program, state: TrainState, config: ConfigDict, data
) -> dict[str, dict[str, float]]:
  """Top-1, top-5 and loss over the whole evaluation split.

  Args:
    program: with the mapped `eval_step`.
    state: replicated.
    config: its `eval_batch_size` is rounded up to a multiple of the devices.
    data: what to evaluate on, see `data.open_dataset`.

  Returns:
    'eval' and, where parameters are averaged, 'eval_ema': each top1 and top5 as
    fractions of the split, and the mean loss.
  """
  variables = {'eval': (state.params, state.batch_stats)}
  if state.ema is not None:
    variables['eval_ema'] = state.ema['params'], state.ema['batch_stats']
  return {
    name: _evaluate(program, config, data, *parts)
    for name, parts in variables.items()
  }


def _evaluate(program, config, data, params, batch_stats) -> dict[str, float]:
  n = jax.device_count()
  batch_size = math.ceil(config.eval_batch_size / n) * n
  no_stop = shard(np.zeros(jax.local_device_count(), bool))
  totals: dict[str, float] = {}
  for batch in data.eval_batches(batch_size):
    sums = program.eval_step(params, batch_stats, *shard(batch), no_stop)
    for name, value in sums.items():
      totals[name] = totals.get(name, 0) + value.item()
  seen, read = totals['seen'], totals['read']
  assert seen == data.eval_size, (
    f'evaluated {seen} of {data.eval_size} examples'
  )
  return {
    'top1': totals['top1'] / seen,
    'top5': totals['top5'] / seen,
    'loss': totals['loss'] / max(read, 1),
  }

"""Evaluation that counts every example once."""

import math
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from skipinit_jax.data import Resident
from skipinit_jax.training.step import TrainState, split_over_devices


def evaluate(
  eval_step: Callable, state: TrainState, config: ConfigDict, data: Resident
) -> dict[str, float]:
  """Top-1, top-5 and loss over the whole evaluation split.

  Args:
    eval_step: `step.eval_step`, mapped over the devices.
    state: replicated.
    config: its `eval_batch_size` is rounded up to a multiple of the devices.
    data: what to evaluate on.

  Returns:
    top1 and top5 as fractions, loss; means over all of the split.
  """
  devices = jax.local_device_count()
  batch_size = math.ceil(config.eval_batch_size / devices) * devices
  totals: dict[str, float] = {}
  for batch in data.eval_batches(batch_size):
    sums = eval_step(
      state.params, state.batch_stats, *split_over_devices(batch)
    )
    for name, value in sums.items():
      totals[name] = totals.get(name, 0) + value.item()
  seen = totals.pop('seen')
  assert seen == data.eval_size, (
    f'evaluated {seen} of {data.eval_size} examples'
  )
  return {name: total / seen for name, total in totals.items()}

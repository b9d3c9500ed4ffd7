"""How steps are mapped over devices is one place, which could be another."""

import jax
import numpy as np
import pytest
from runs import by_shard_map

from skipinit_jax.data.small import digits
from skipinit_jax.training.devices import message, replicate, shard
from skipinit_jax.training.program import make_program
from skipinit_jax.training.recipes import load_recipe


def bits(method, steps=3):
  """State, metrics and sums of an evaluation, after a few steps."""
  config = load_recipe('digits')
  config.model.depth, config.model.method = 10, method
  config.model.statistics_group = 'device'
  config.batch_size = 8 * jax.device_count()
  data = digits(config.data)
  program = make_program(config, data)
  state = replicate(jax.jit(program.initial_state)(0, 0.1))
  metrics = None
  for inputs in [replicate((data.images, data.labels))] * steps:
    state, metrics = program.train_step(state, inputs, message(), 1)
  rows = slice(0, config.batch_size)
  images, labels = data.images[rows], data.labels[rows]
  batch = shard((images, labels, np.ones(len(labels), bool)))
  sums = program.eval_step(state.params, state.batch_stats, *batch, message())
  return jax.device_get((state, metrics, sums))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('method', ['skipinit', 'batchnorm'])
def test_by_jit_of_shard_map_a_run_has_the_same_bits(method, monkeypatch):
  expected = bits(method)
  monkeypatch.setattr(
    'skipinit_jax.training.program.map_over_devices', by_shard_map
  )
  got = bits(method)
  assert expected[0].step == 3
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

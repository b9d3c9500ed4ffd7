"""What the step is for NVIDIA GPUs: the same values, by other kernels."""

import collections
import functools
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import by_compiler, by_shard_map
from toys import normal

from skipinit_jax.ahead_of_time.measure import compute
from skipinit_jax.models.activations import relu
from skipinit_jax.training import cuda
from skipinit_jax.training.recipes import load_recipe


def tree():
  return {
    'kernel': normal((3, 3, 5, 7)),
    'bias': normal((7,), 1, 'bfloat16'),
    'alpha': jnp.float32(0.25),
    'beta': jnp.bfloat16(-3),
    'gamma': jnp.float32(1e-3),
    'count': jnp.int32(12),
    'seen': jnp.int32(-5),
  }


def test_the_norm_by_rows_is_the_norm():
  floats = {k: x for k, x in tree().items() if x.dtype == jnp.float32}
  squares = sum(np.sum(np.float64(x) ** 2) for x in floats.values())
  for norm in (cuda.norm_by_rows, cuda.norm, optax.tree.norm):
    np.testing.assert_allclose(jax.jit(norm)(floats), squares**0.5, rtol=1e-6)


def test_scalars_by_vectors_are_the_same_scalars():
  got, expected = jax.jit(cuda.scalars_by_vectors)(tree()), tree()
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, b)
  # One vector for each of the three dtypes.
  text = jax.jit(cuda.scalars_by_vectors).lower(tree()).as_text()
  assert text.count('optimization_barrier') == 3


def lower(f, args, platform):
  traced = jax.jit(f).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('summed', [False, True])
def test_gradients_settle_in_the_layout_of_parameters_on_cuda_only(summed):
  settle = functools.partial(cuda.settle, summed=summed)
  leaves = len(jax.tree.leaves(tree()))
  text = lower(settle, (tree(),), 'cuda')
  assert text.count('@LayoutConstraint') == leaves
  assert text.count('optimization_barrier') == (0 if summed else leaves)
  for platform in ('cpu', 'tpu'):
    text = lower(settle, (tree(),), platform)
    assert 'LayoutConstraint' not in text
    assert 'optimization_barrier' not in text


@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'cuda'])
def test_relu_has_its_barrier_on_cuda_only(platform):
  x, y = normal((4, 8)), normal((4, 8), 1)
  gradient = lambda x, y: jax.vjp(relu, x)[1](y)[0]  # noqa: E731
  text = lower(gradient, (x, y), platform)
  assert ('optimization_barrier' in text) == (platform == 'cuda')
  np.testing.assert_array_equal(gradient(x, y), np.where(x > 0, y, 0))


def operations(platform):
  """How many operations of each kind the step of a small network has."""
  config = load_recipe('digits')
  config.model.depth = 10
  config.batch_size = 2 * jax.device_count()
  here = mock.Mock(devices=tuple(jax.devices()), chips=jax.device_count())
  program, _, args = compute(config, here)
  text = lower(program.train_step, args, platform)
  found = collections.Counter(re.findall(r'stablehlo\.(\w+)', text))
  for kind in ('case', 'constant', 'return'):  # Around the form that is chosen.
    del found[kind]
  return found


@pytest.mark.sampled(1)
@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'cuda'])
def test_the_step_of_other_platforms_is_the_plain_one(platform, monkeypatch):
  program = 'skipinit_jax.training.program.map_over_devices'
  monkeypatch.setattr(program, by_shard_map)
  ours = operations(platform)
  monkeypatch.setattr(cuda, 'settle', lambda grads, *, summed: grads)
  monkeypatch.setattr(cuda, 'norm', optax.tree.norm)
  monkeypatch.setattr(cuda, 'join_scalars', lambda tree: tree)
  assert (operations(platform) == ours) == (platform != 'cuda')


STEPS = """
import json, sys
import jax
jax.config.update('jax_platforms', 'cpu')
from skipinit_jax.ahead_of_time import chips, measure
from skipinit_jax.ahead_of_time.counts import count
from skipinit_jax.training.recipes import load_recipe

topology, recipe, changes, *flags = sys.argv[1:]
where = chips.topology(topology)
config = load_recipe(recipe)
config.update_from_flattened_dict(json.loads(changes))
program, _, args = measure.compute(config, where)
options = dict(flag.split('=') for flag in flags)
text = program.train_step.lower(*args).compile(options).as_text()
counts = count(text)
print(json.dumps({
  'sorts': counts.sorts,
  'launches': counts.launches,
  'scatters': text.count(' scatter('),
  'loops': text.count(' while('),
  'flops': counts.flops,
}))
"""
RECIPES = {
  'digits': {'model.depth': 10, 'batch_size': 64},
  'cifar10': {'model.depth': 10, 'model.width': 1},
  'imagenet': {'batch_size': 64},
}


def compiled(topology, recipe, changes, *flags):
  return by_compiler(
    topology, STEPS, topology, recipe, json.dumps(changes), *flags
  )


@pytest.mark.sampled(1)
@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100x1'])
@pytest.mark.parametrize(
  'recipe',
  [
    'digits',
    pytest.param('cifar10', marks=pytest.mark.slow),
    pytest.param('imagenet', marks=pytest.mark.slow),
  ],
)
def test_no_step_sorts(topology, recipe):
  counts = compiled(topology, recipe, RECIPES[recipe])
  assert counts['flops'] > 1e6
  assert counts['sorts'] == 0


def test_a_small_network_takes_less_than_200_launches():
  assert compiled('h100x1', 'cifar10', {})['launches'] < 200


@pytest.mark.slow
@pytest.mark.parametrize('deterministic', [False, True])
def test_no_step_scatters_or_loops_over_places(deterministic):
  """XLA expands scatters into loops where sums must have a fixed order."""
  flag = f'xla_gpu_deterministic_ops={deterministic}'
  counts = compiled('h100x1', 'imagenet', RECIPES['imagenet'], flag)
  assert (counts['scatters'], counts['loops']) == (0, 0)


CONVOLUTION = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
from skipinit_jax.ahead_of_time import chips
from skipinit_jax.ahead_of_time.counts import count

def convolve(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

def gradients(x, kernel, g):
  return jax.vjp(convolve, x, kernel)[1](g)

(device,) = chips.topology('h100x1').devices
x, kernel, y = (jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16) for shape in (
  (32, 28, 28, 128), (3, 3, 128, 256), (32, 28, 28, 256)))
found = {}
for f, args in ((convolve, (x, kernel)), (gradients, (x, kernel, y))):
  text = jax.pmap(f, devices=[device]).lower(*args).compile().as_text()
  found[f.__name__] = dataclasses.asdict(count(text)) | {
    'calls': text.count('custom_call_target="__cudnn$conv')}
print(json.dumps(found))
"""


def test_a_convolution_by_cudnn_has_the_products_that_it_has():
  found = by_compiler('h100x1', CONVOLUTION)
  # A side of 28 with 3 taps, of which one is padding at either end.
  flops = 2 * 32 * 128 * 256 * (3 * 28 - 2) ** 2
  assert found['convolve']['calls'] == 1
  assert found['convolve']['flops'] == flops
  assert found['gradients']['calls'] == 2
  assert found['gradients']['flops'] == 2 * flops
  # At least: the images, the kernels and the outputs, once.
  least = 2 * (32 * 28 * 28 * (128 + 256) + 9 * 128 * 256)
  assert found['convolve']['hbm_bytes'] >= least

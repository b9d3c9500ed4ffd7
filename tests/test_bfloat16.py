"""Gradients in bfloat16: sums over a feature map are taken in float32.

bfloat16 has 8 bits, so that a sum of equal terms stops growing at 256 of them.
All kernels and inputs here are positive, as are the weights of the loss: no
gradient is then the small difference of large ones, and no ReLU changes its
mind for a rounding error. What is left is how the terms are added up.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from runs import by_compiler

from configs import imagenet
from skipinit_jax import METHODS, SkipInit, SkipInitConv, SkipInitDense
from skipinit_jax.models import DenseResNet, ResNet, WideResNet
from skipinit_jax.models import nnx as skipinit_nnx
from skipinit_jax.models.precision import Conv, Dense, ScalarBias

ROOT = Path(__file__).resolve().parents[1]
COUNT = 2**18  # Elements that a scalar's gradient is summed over.


def wide(**fields):
  return WideResNet(10, 1, **fields)


def bottleneck(**fields):
  sizes = {'features': 8, 'stem_features': 8, 'num_classes': 10}
  return ResNet((1, 2, 1), bottleneck=True, **sizes, **fields)


def positive(path, leaf, rng):
  """Like a leaf of parameters, positive, and of a size that keeps signals."""
  values = np.abs(rng.standard_normal(leaf.shape)).astype(np.float32)
  name = path[-1].key
  if name == 'kernel':
    return 1.2 * values / np.prod(leaf.shape[:-1])
  return 0.1 * values + {'scale': 1.0, 'alpha': 0.3}.get(name, 0.0)


def gradients(make, inputs, method):
  """Of the same loss at the same parameters in bfloat16 and in float32."""
  rng = np.random.default_rng(0)
  variables = make(dtype='float32').init(jax.random.key(0), inputs, train=False)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: positive(path, leaf, rng), variables['params']
  )
  stats = variables.get('batch_stats', {})
  weights = np.abs(rng.standard_normal((len(inputs), 10))).astype(np.float32)

  def loss(params, dtype):
    # Batch statistics subtract means, and so leave small differences.
    logits = make(dtype=dtype).apply(
      {'params': params, 'batch_stats': stats}, inputs, train=False
    )
    return (logits * weights).mean()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  return grad(params, 'bfloat16'), grad(params, 'float32')


def assert_close(narrow, full):
  found = jax.tree_util.tree_leaves_with_path(narrow)
  expected = jax.tree.leaves(full)
  for (path, leaf), want in zip(found, expected, strict=True):
    error = np.linalg.norm(leaf - want) / np.linalg.norm(want)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    assert leaf.dtype == jnp.float32, name
    # The compiler adds up a kernel's gradient, convolution by convolution.
    assert error < (0.06 if name.endswith('kernel') else 0.03), (name, error)


# Standardized kernels have mean 0: each sum is a small difference.
@pytest.mark.sampled(4)
@pytest.mark.parametrize('method', sorted(METHODS.keys() - {'nf'}))
@pytest.mark.parametrize('family', [wide, bottleneck])
def test_gradients_of_a_network_are_those_in_float32(family, method):
  rng = np.random.default_rng(1)
  images = np.abs(rng.standard_normal((8, 16, 16, 3))).astype(np.float32)

  def make(dtype):
    return family(method=method, biases=method != 'batchnorm', dtype=dtype)

  assert_close(*gradients(make, images, method))


@pytest.mark.parametrize('method', ['batchnorm', 'skipinit', 'none'])
def test_gradients_of_a_dense_network_are_those_in_float32(method):
  inputs = np.abs(np.random.default_rng(1).standard_normal((2048, 16)))

  def make(dtype):
    return DenseResNet(2, 16, method=method, dtype=dtype)

  assert_close(*gradients(make, inputs.astype(np.float32), method))


def test_gradients_of_scanned_blocks_are_those_in_float32():
  rng = np.random.default_rng(1)
  images = np.abs(rng.standard_normal((8, 16, 16, 3))).astype(np.float32)

  def make(dtype):
    return WideResNet(16, 1, biases=True, scan=True, dtype=dtype)

  assert_close(*gradients(make, images, 'skipinit'))


@pytest.mark.parametrize(
  ('layer', 'leaf'),
  [
    (SkipInit(1.0), 'alpha'),
    (ScalarBias(), 'scalar_bias'),
    (ScalarBias(param_dtype='bfloat16'), 'scalar_bias'),
    (Conv(1, (1, 1), dtype='bfloat16'), 'bias'),
    (Dense(1, dtype='bfloat16'), 'bias'),
    (SkipInitConv(1, (1, 1), init_value=1.0, dtype='bfloat16'), 'bias'),
    (SkipInitDense(1, init_value=1.0, dtype='bfloat16'), 'bias'),
  ],
  ids=lambda value: getattr(value, 'name', None) or type(value).__name__,
)
def test_a_cotangent_of_ones_is_counted(layer, leaf):
  x = jnp.ones((COUNT // 64, 8, 8, 1), jnp.bfloat16)
  params = layer.init(jax.random.key(0), x[:1])['params']
  y, pull = jax.vjp(lambda p: layer.apply({'params': p}, x), params)
  (grads,) = pull(jnp.ones_like(y))
  assert y.dtype == jnp.bfloat16
  assert grads[leaf].dtype == params[leaf].dtype
  assert float(grads[leaf].sum()) == COUNT


@pytest.mark.parametrize('kind', ['SkipInit', 'SkipInitLinear', 'SkipInitConv'])
def test_a_cotangent_of_ones_is_counted_in_nnx(kind):
  args = {'rngs': nnx.Rngs(0), 'init_value': 1.0, 'dtype': jnp.bfloat16}
  layer = {
    'SkipInit': lambda: skipinit_nnx.SkipInit(1.0),
    'SkipInitLinear': lambda: skipinit_nnx.SkipInitLinear(1, 1, **args),
    'SkipInitConv': lambda: skipinit_nnx.SkipInitConv(1, 1, (1, 1), **args),
  }[kind]()
  x = jnp.ones((COUNT // 64, 8, 8, 1), jnp.bfloat16)
  graph, state = nnx.split(layer)
  y, pull = jax.vjp(lambda s: nnx.merge(graph, s)(x), state)
  (grads,) = pull(jnp.ones_like(y))
  assert y.dtype == jnp.bfloat16
  leaf = 'alpha' if kind == 'SkipInit' else 'bias'
  assert float(grads[leaf].get_value().sum()) == COUNT


@pytest.mark.parametrize('dtype', [None, 'bfloat16', 'float32'])
@pytest.mark.parametrize('given', ['bfloat16', 'float32'])
@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [(Conv(4, (3, 3)), nn.Conv(4, (3, 3))), (Dense(4), nn.Dense(4))],
)
def test_layers_compute_what_flax_computes(ours, theirs, given, dtype):
  x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3), given)
  ours, theirs = ours.clone(dtype=dtype), theirs.clone(dtype=dtype)
  variables = theirs.init(jax.random.key(0), x)
  bias = jnp.linspace(-1, 1, 4)
  variables = {'params': variables['params'] | {'bias': bias}}
  y, expected = ours.apply(variables, x), theirs.apply(variables, x)
  assert y.dtype == expected.dtype
  if y.dtype == jnp.float32:
    np.testing.assert_array_equal(y, expected)
  else:  # The bias is not rounded.
    np.testing.assert_allclose(
      y.astype(np.float32), expected.astype(np.float32), rtol=0.02, atol=0.02
    )


TPU = """
import json, sys
import jax
from skipinit_jax.ahead_of_time.counts import narrow_sums
from skipinit_jax.ahead_of_time.chips import topology
from skipinit_jax.ahead_of_time.measure import compute
from skipinit_jax.training.recipes import load_recipe

jax.config.update('jax_platforms', 'cpu')
where = topology('v5e:2x2')
found = {}
for row in sys.argv[4:]:
  config = load_recipe(f'imagenet:{row},batch={4 * int(sys.argv[1])}')
  config.model.statistics_group = 'device'
  config.data.image_size = int(sys.argv[2])
  config.model.depth = int(sys.argv[3])
  program, _, args = compute(config, where)
  text = program.train_step.lower(*args).compile().as_text()
  found[row] = narrow_sums(text)
print(json.dumps(found))
"""


def test_a_tpu_adds_up_nothing_long_in_bfloat16():
  found = by_compiler('v5e:2x2', TPU, 8, 64, 18, 'fixup_dropout')
  assert found == {'fixup_dropout': []}


@pytest.mark.slow
def test_a_tpu_adds_up_nothing_long_in_bfloat16_in_any_row():
  rows = imagenet.ROWS
  assert by_compiler('v5e:2x2', TPU, 64, 224, 50, *rows) == {
    row: [] for row in rows
  }

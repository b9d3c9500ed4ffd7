"""Folded networks compute what the ones with scalars compute."""

import dataclasses
import itertools
import math
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from toys import flatten

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  DenseResNet,
  ResNet,
  SkipInitConv,
  WideResNet,
  stack_blocks,
  unstack_blocks,
)
from skipinit_jax.models.fold import LIMIT, fold, fold_params
from skipinit_jax.models.methods import Method

SMALL = {'features': 4, 'stem_features': 4}
# A first stage without projection, after Fixup's CIFAR stem or ResNet's own.
NETWORKS = {
  'wide': lambda **fields: ResNet(
    (3, 2), False, 5, **SMALL, small_images=True, **fields
  ),
  'bottleneck': lambda **fields: ResNet((2, 2), True, 5, **SMALL, **fields),
}
SIZES = {'wide': 8, 'bottleneck': 32}
# Batch normalization has no scalars.
FOLDED = [name for name in METHODS if name != 'batchnorm']


def moved(model, inputs, dtype=np.float32):
  """Random variables: no leaf at its starting value, running variances > 0."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.asarray(inputs), train=False)
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    noise = rng.normal(size=leaf.shape)
    if name == 'kernel':
      noise *= math.prod(leaf.shape[-4:-1] or leaf.shape[:1]) ** -0.5
    if name in ('alpha', 'scale', 'var'):
      noise = 0.5 + 0.4 * np.tanh(noise)
    return np.asarray(noise, dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def images(size, dtype=np.float32):
  return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(dtype)


def run(model, params, rest, inputs):
  apply = jax.jit(
    lambda v, x: model.apply(v, x, train=False),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  return np.asarray(apply({**rest, 'params': params}, inputs))


def split(variables):
  rest = dict(variables)
  return rest.pop('params'), rest


def close(a, b, tolerance):
  assert a.shape == b.shape
  assert a.dtype == b.dtype
  assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.sampled(12)
@pytest.mark.parametrize('method', FOLDED)
@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize(
  ('biases', 'scan'), [(False, False), (True, False), (True, True)]
)
def test_the_same_logits_without_scalars(method, network, biases, scan):
  inputs = images(SIZES[network])
  model = NETWORKS[network](method=method, biases=biases, scan=scan)
  params, rest = split(moved(model, inputs))
  plain, folded = fold(model, params)
  scalars = any(name.endswith('alpha') for name in flatten(params))
  assert scalars == (METHODS[method].alpha is not None)
  # The plain network asks for exactly these leaves.
  wanted = jax.eval_shape(
    lambda: plain.init(jax.random.key(0), jnp.asarray(inputs), train=False)
  )
  assert list(flatten(folded)) == list(flatten(wanted['params']))
  assert not [name for name in flatten(folded) if name.endswith('alpha')]
  after = run(plain, folded, rest, inputs)
  close(after, run(model, params, rest, inputs), 2e-5)


def test_batch_normalization_comes_back_unchanged():
  model = NETWORKS['wide'](method='batchnorm')
  params, _ = split(moved(model, images(8)))
  plain, folded = fold(model, params)
  assert plain.clone(method='batchnorm') == model
  assert plain.method == METHODS['batchnorm']
  jax.tree.map(np.testing.assert_array_equal, folded, params)


@pytest.mark.parametrize('method', ['skipinit', 'fixup', 'divide_sqrt2'])
@pytest.mark.parametrize('network', NETWORKS)
def test_in_float64_to_its_rounding(method, network):
  with jax.enable_x64(True):
    inputs = images(SIZES[network], np.float64)
    model = NETWORKS[network](
      method=method, biases=True, param_dtype='float64', scan=True
    )
    params, rest = split(moved(model, inputs, np.float64))
    plain, folded = fold(model, params)
    after = run(plain, folded, rest, inputs)
    assert after.dtype == np.float64
    close(after, run(model, params, rest, inputs), 1e-12)


def test_any_method_of_ones_own():
  """All factors at once, Fixup's blocks with a gain, a gain above 1."""
  own = [
    Method(alpha=0.0, gain=0.8),
    dataclasses.replace(METHODS['fixup'], gain=0.7),
    Method(gain=1.5),
    Method(normalize=True, alpha='1/sqrt(d)'),
  ]
  for method, network in itertools.product(own, NETWORKS):
    inputs = images(SIZES[network])
    model = NETWORKS[network](method=method, biases=True)
    params, rest = split(moved(model, inputs))
    plain, folded = fold(model, params)
    after = run(plain, folded, rest, inputs)
    close(after, run(model, params, rest, inputs), 2e-5)


def test_features_and_crelu():
  """A headless body keeps its scale; concatenated ReLU passes factors on."""
  inputs = images(8)
  for fields in ({'num_classes': None}, {'activation': 'crelu'}):
    model = ResNet(
      (2, 2),
      False,
      **{'num_classes': 5, 'method': 'divide_sqrt2', 'biases': True} | fields,
      features=4,
      stem_features=4,
      small_images=True,
    )
    params, rest = split(moved(model, inputs))
    after = run(*fold(model, params), rest, inputs)
    close(after, run(model, params, rest, inputs), 2e-5)


@pytest.mark.parametrize('method', ['skipinit', 'divide_sqrt2', 'none'])
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('activation', ['relu', 'linear'])
def test_dense_networks(method, scan, activation):
  inputs = images(3)
  model = DenseResNet(4, 6, 5, method=method, activation=activation, scan=scan)
  params, rest = split(moved(model, inputs))
  plain, folded = fold(model, params)
  close(
    run(plain, folded, rest, inputs), run(model, params, rest, inputs), 2e-5
  )
  assert not [n for n in flatten(folded) if n.endswith('alpha')]


@pytest.mark.parametrize('method', ['skipinit', 'divide_sqrt2'])
@pytest.mark.parametrize('scan', [False, True])
def test_dense_networks_without_skip_paths_have_no_gain_to_fold(method, scan):
  inputs = images(3)
  model = DenseResNet(4, 6, 5, method=method, skip=False, scan=scan)
  params, rest = split(moved(model, inputs))
  before = run(model, params, rest, inputs)
  assert np.abs(before).max() > 1e-3
  close(run(*fold(model, params), rest, inputs), before, 2e-5)


def primitives(jaxpr):
  """Names of all primitives, those of inner programs included."""
  found = set()
  for equation in jaxpr.eqns:
    inner = jaxprs_in_params(equation.params)
    found |= set().union(*map(primitives, inner)) if inner else set()
    found.add(equation.primitive.name)
  return found


@pytest.mark.parametrize('method', ['skipinit', 'fixup', 'divide_sqrt2'])
def test_no_multiplication_is_left(method):
  inputs = images(32)  # No stage at 2x2, whose convolution is a product.
  model = WideResNet(10, 1, num_classes=5, method=method, biases=True)
  params, _ = split(moved(model, inputs))

  def used(model, params):
    program = jax.make_jaxpr(lambda p, x: model.apply(p, x, train=False))
    return primitives(program({'params': params}, inputs).jaxpr)

  assert 'mul' in used(model, params)
  computing = {'conv_general_dilated', 'dot_general', 'add', 'max'}
  mean = {'reduce_sum', 'div'}
  moving = {
    'broadcast_in_dim',
    'reshape',
    'squeeze',
    'pad',
    'slice',
    'convert_element_type',
    'custom_jvp_call',
    'jit',
    'pjit',
    'gather',
    'transpose',
    'copy',
    'platform_index',
    'cond',
  }
  assert used(*fold(model, params)) <= computing | mean | moving


def test_both_forms_fold_to_one():
  model = WideResNet(22, 1, num_classes=5, method='divide_sqrt2', biases=True)
  params, _ = split(moved(model, images(8)))
  _, unrolled = fold(model, params)
  _, scanned = fold(model.clone(scan=True), stack_blocks(params))
  jax.tree.map(np.testing.assert_array_equal, unrolled, unstack_blocks(scanned))


def test_arrays_stay_what_they_are():
  """NumPy or JAX, of their dtype; a bfloat16 product is rounded once."""
  model = WideResNet(10, 1, num_classes=5, alpha=0.3)
  params, _ = split(moved(model, images(8)))
  leaves = jax.tree.leaves(fold(model, params)[1])
  assert {(type(x), x.dtype) for x in leaves} == {(np.ndarray, np.dtype('f4'))}
  layer = {
    'alpha': jnp.asarray(0.3, jnp.bfloat16),
    'kernel': jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
  }
  (kernel,) = fold_params(layer).values()
  assert isinstance(kernel, jax.Array)
  assert kernel.dtype == jnp.bfloat16
  wide = np.asarray(layer['kernel'], np.float64) * float(layer['alpha'])
  assert (np.asarray(kernel) == wide.astype(jnp.bfloat16)).all()


def test_the_arguments_are_not_changed():
  model = WideResNet(10, 1, num_classes=5, method='divide_sqrt2', biases=True)
  params, _ = split(moved(model, images(8)))
  copy = jax.tree.map(np.copy, params)
  fold(model, params)
  jax.tree.map(np.testing.assert_array_equal, params, copy)


def test_a_network_of_ones_own():
  """`fold_params` alone: nn.Conv takes the place of SkipInitConv."""

  class Body(nn.Module):
    last: type

    @nn.compact
    def __call__(self, x):
      y = nn.relu(nn.Conv(3, (3, 3), name='first')(x))
      return x + self.last(3, (3, 3), name='last')(y)

  x = images(8)
  params = Body(SkipInitConv).init(jax.random.key(0), x)['params']
  params['last'] |= {'alpha': np.float32(0.3), 'bias': np.float32([1, -2, 3])}
  before = Body(SkipInitConv).apply({'params': params}, x)
  after = Body(nn.Conv).apply({'params': fold_params(params)}, x)
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_deep_stage_leaves_float32():
  """1/sqrt(2) to the number of blocks, from the stem to the end."""
  fits = math.log(LIMIT, 2**0.5)
  for blocks, good in ((int(fits) - 2, True), (int(fits) + 2, False)):
    model = DenseResNet(blocks, 2, 2, method='divide_sqrt2', scan=True)
    inputs = np.ones((1, 2), np.float32)
    params, rest = split(moved(model, inputs))
    if good:
      after = run(*fold(model, params), rest, inputs)
      assert np.abs(after).max() > 0.1
      close(after, run(model, params, rest, inputs), 1e-4)
    else:
      with pytest.raises(InputError, match=r'gain=0\.707107 to the power of'):
        fold(model, params)


def test_what_does_not_fold():
  own = WideResNet(10, method=Method(normalize=True, gain=0.5))
  with pytest.raises(InputError, match=r'gain=0\.5 folds only if ReLU'):
    fold(own, {})
  with pytest.raises(InputError, match='gain=-1 folds only if ReLU'):
    fold(WideResNet(10, method=Method(gain=-1.0)), {})
  variables = {'params': {'stem': {}}, 'batch_stats': {}}
  with pytest.raises(InputError, match=r"variables of params.*\['params'\]"):
    fold(WideResNet(10, method='divide_sqrt2'), variables)
  with pytest.raises(InputError, match=r'type Dense; expected fold_params'):
    fold(nn.Dense(3), {})
  with pytest.raises(InputError, match="'body/scale' has an alpha and no kern"):
    fold_params({'body': {'scale': {'alpha': np.float32(1)}}})


def test_mappings_of_any_kind_are_folded():
  layer = {'alpha': np.float32(0.5), 'kernel': np.ones((1, 2))}
  params = MappingProxyType({'conv2': MappingProxyType(layer)})
  np.testing.assert_equal(
    fold_params(params), {'conv2': {'kernel': np.full((1, 2), 0.5)}}
  )

"""Fully connected residual networks, against numpy and against theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import normal, randomize

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  DenseResNet,
  alphas,
  decay_mask,
  param_labels,
  stack_blocks,
  unstack_blocks,
)

SHAPE = (6, 3, 2)
NAMES = [name for name in METHODS if name not in ('fixup', 'nf')]


def by_hand(model, variables, x):
  """The network in numpy, float64, by its definition."""
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
  params = params['params']
  method = METHODS[model.method]

  def norm(x, p):
    return p['scale'] * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + p['bias']

  def act(x):
    return np.maximum(x, 0) if model.activation == 'relu' else x

  x = np.asarray(x, np.float64).reshape(len(x), -1) @ params['stem']['kernel']
  for i in range(1, model.blocks + 1):
    p, skip = params['stage1'][f'block{i}'], x
    for j in range(1, model.branch_layers + 1):
      if method.normalize:
        x = norm(x, p[f'norm{j}'])
      layer = p[f'dense{j}']
      x = act(x) @ layer['kernel'] * layer.get('alpha', 1.0)
    if model.skip:
      x = method.gain * (skip + x)
  x = act(norm(x, params['norm']) if method.normalize else x)
  return x @ params['classifier']['kernel'] + params['classifier']['bias']


@pytest.mark.parametrize('skip', [True, False])
@pytest.mark.parametrize(
  ('activation', 'layers'), [('relu', 2), ('relu', 1), ('linear', 1)]
)
@pytest.mark.parametrize('method', NAMES)
def test_computes_what_its_definition_says(method, activation, layers, skip):
  model = DenseResNet(
    3, 5, 4, method, activation=activation, branch_layers=layers, skip=skip
  )
  x = normal(SHAPE)
  variables = randomize(model, x.shape)
  got, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
  expected = by_hand(model, variables, x)
  assert got.shape == (6, 4)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
  stats = variables.get('batch_stats', {})
  assert bool(stats) == METHODS[method].normalize


@pytest.mark.sampled(2)
@pytest.mark.parametrize('method', NAMES)
def test_scanned_equals_unrolled(method):
  model, x = DenseResNet(4, 5, method=method), normal(SHAPE)
  variables = randomize(model, x.shape)

  def gradients(model, variables):
    params = variables['params']

    def loss(params):
      out, new = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.square(out).sum(), (out, new)

    return jax.grad(loss, has_aux=True)(params)

  expected = gradients(model, variables)
  grads, (out, new) = gradients(model.clone(scan=True), stack_blocks(variables))
  got = unstack_blocks(grads), (out, unstack_blocks(new))
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('method', NAMES)
def test_every_leaf_has_a_known_name(method):
  params = randomize(DenseResNet(11, 4, method=method), SHAPE)['params']
  labels = set(jax.tree.leaves(param_labels(params)))
  scalars = {'alpha'} if METHODS[method].alpha is not None else set()
  norms = {'scale'} if METHODS[method].normalize else set()
  assert labels == {'kernel', 'bias'} | scalars | norms
  assert decay_mask(params)['classifier'] == {'kernel': True, 'bias': False}
  if scalars:
    assert list(alphas(params)) == [f'stage1/block{i}' for i in range(1, 12)]


@pytest.mark.parametrize(
  ('activation', 'variance'), [('relu', 2.0), ('linear', 1.0)]
)
def test_kernels_start_with_the_variance_that_the_activation_asks(
  activation, variance
):
  model = DenseResNet(2, 128, activation=activation, method='none')
  x = normal((1, 64))
  params = model.init(jax.random.key(0), x, train=False)['params']
  kernels = [
    v for v in jax.tree.leaves(params) if v.ndim == 2 and v.shape[1] == 128
  ]
  assert len(kernels) == 1 + 2 * 2
  for kernel in kernels:
    error = 4 * (2 / kernel.size) ** 0.5
    assert kernel.var() * len(kernel) == pytest.approx(variance, rel=error)


def test_the_scalar_starts_where_it_is_told():
  x = normal(SHAPE)
  for alpha, expected in ((None, 0), (0.3, 0.3), ('1/sqrt(d)', 4**-0.5)):
    model = DenseResNet(4, 3, alpha=alpha)
    found = alphas(model.init(jax.random.key(0), x, train=False)['params'])
    np.testing.assert_allclose([*found.values()], 4 * [expected], rtol=1e-6)


def test_a_branch_that_ends_in_zero_is_no_branch():
  method = dataclasses.replace(METHODS['none'], zero_last=True)
  x = normal((4, 7))
  deep = DenseResNet(5, 6, None, method)
  variables = deep.init(jax.random.key(0), x, train=False)
  stem = np.asarray(variables['params']['stem']['kernel'])
  np.testing.assert_allclose(
    deep.apply(variables, x, train=False),
    np.maximum(np.asarray(x) @ stem, 0),
    rtol=1e-5,
    atol=1e-6,
  )


def test_float64_throughout():
  with jax.enable_x64(True):
    x = jnp.asarray(normal(SHAPE), jnp.float64)
    model = DenseResNet(2, 4, method='batchnorm', param_dtype='float64')
    variables = model.init(jax.random.key(0), x, train=False)
    assert model.apply(variables, x, train=False).dtype == jnp.float64


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'method': 'fixup'}, "method='fixup': .* no part of Fixup"),
    ({'method': 'nf'}, "method='nf': .* not standardized; expected a ResNet"),
    ({'method': 'skipint'}, "did you mean 'skipinit'"),
    ({'activation': 'rleu'}, "unknown activation 'rleu'; did you mean 'relu'"),
    ({'branch_layers': 3}, 'branch_layers=3: expected 1 or 2'),
    ({'blocks': 0}, 'blocks=0 must be a whole number, 1 or more'),
    ({'num_classes': 0}, 'num_classes=0 must be'),
  ],
)
def test_a_network_that_can_not_be_is_one_line(fields, message):
  fields = {'blocks': 2, 'width': 3, **fields}
  model = DenseResNet(**fields)
  with pytest.raises(InputError, match=message) as error:
    model.init(jax.random.key(0), normal(SHAPE), train=False)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'x', [jnp.zeros(3), jnp.zeros((2, 3), jnp.int32)], ids=['rank', 'dtype']
)
def test_wrong_inputs_are_one_line(x):
  with pytest.raises(InputError, match=r'floating and of shape \(batch'):
    DenseResNet(2, 3).init(jax.random.key(0), x, train=False)

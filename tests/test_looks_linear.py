"""Looks-linear and feed-forward networks, and what they leave as it was."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from toys import flatten, normal, shapes_of

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  Join,
  ResNet,
  WideResNet,
  mirrored,
  orthogonal,
  param_labels,
  stack_blocks,
)
from skipinit_jax.models.activations import crelu
from skipinit_jax.models.looks_linear import kernel_initializer
from skipinit_jax.training.config import default_config
from skipinit_jax.training.network import build_model

LINEAR = {'activation': 'crelu', 'kernel_init': 'looks_linear'}
SHAPE = (4, 8, 8, 3)


def network(**fields):
  fields = {'method': 'none', 'num_classes': 5, **fields}
  return WideResNet(16, 1, **fields)


def names(model):
  """Parameter -> shape."""
  params = flatten(shapes_of(model, SHAPE)['params'])
  return {path: leaf.shape for path, leaf in params.items()}


def joins(model, variables, x):
  """How many blocks have a skip path."""
  seen = []

  def record(call, args, kwargs, context):
    seen.append(isinstance(context.module, Join))
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    model.apply(variables, x, train=False)
  return sum(seen)


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('biases', [False, True])
def test_a_looks_linear_network_is_linear_at_the_start(skip, biases):
  model = network(skip=skip, biases=biases, **LINEAR)
  a, b = normal(SHAPE), normal(SHAPE, 1)
  variables = model.init(jax.random.key(2), a, train=False)
  f = jax.jit(lambda x: model.apply(variables, x, train=False))
  scale = float(jnp.abs(f(a)).max())
  assert scale > 1e-3
  close = functools.partial(np.testing.assert_allclose, atol=1e-5 * scale)
  close(f(a + b), f(a) + f(b))
  close(f(-a), -f(a))
  # The same network with kernels that are not mirrored is not linear.
  other = model.clone(kernel_init='orthogonal')
  variables = other.init(jax.random.key(2), a, train=False)
  f = jax.jit(lambda x: other.apply(variables, x, train=False))
  assert float(jnp.abs(f(-a) + f(a)).max()) > 0.1 * float(jnp.abs(f(a)).max())


def test_a_looks_linear_network_bends_once_its_kernels_move():
  model, x = network(skip=False, **LINEAR), normal(SHAPE)
  variables = model.init(jax.random.key(0), x, train=False)

  def loss(params):
    return model.apply({'params': params}, x, train=False)[:, 0].sum()

  grads = jax.jit(jax.grad(loss))(variables['params'])
  params = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], grads)
  f = jax.jit(lambda x: model.apply({'params': params}, x, train=False))
  assert float(jnp.abs(f(-x) + f(x)).max()) > 1e-3


def test_concatenated_relu_against_numpy():
  x = np.array([[-2.0, 0.0, 3.0]], np.float32)
  expected = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
  np.testing.assert_array_equal(crelu(jnp.asarray(x)), expected)
  np.testing.assert_array_equal(
    jax.grad(lambda x: (crelu(x) * jnp.arange(6.0)[None]).sum())(x),
    [[-3.0, 0.0, 2.0]],
  )


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('channels', [(3, 3), (3, 8)])
def test_orthogonal_convolutions_keep_norms(size, channels):
  kernel = orthogonal(2.0)(jax.random.key(0), (size, size, *channels))
  x = normal((2, 6, 6, channels[0]))
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  norms = [np.linalg.norm(v.reshape(2, -1), axis=1) for v in (x, y)]
  np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-5)


@pytest.mark.parametrize('extent', [(), (1, 1), (3, 3)])
def test_fewer_outputs_are_a_projection(extent):
  kernel = orthogonal()(jax.random.key(0), (*extent, 8, 3))
  matrix = kernel[tuple(s // 2 for s in extent)]
  np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-5)
  assert np.count_nonzero(kernel) == np.count_nonzero(matrix)


def test_orthogonal_kernels_keep_the_second_moment_through_relu():
  """Of x and -x together, exactly: ReLU shares their norm between them."""
  init = kernel_initializer('orthogonal', he=None)
  kernel = init(jax.random.key(0), (1, 1, 8, 16))[0, 0]
  x = normal((5, 8))
  parts = [jax.nn.relu(v) @ kernel for v in (x, -x)]
  squares = sum(jnp.square(part).sum(-1) for part in parts)
  np.testing.assert_allclose(squares / 2, jnp.square(x).sum(-1), rtol=1e-5)


def test_an_odd_number_of_inputs_is_not_mirrored():
  init = mirrored(nn.initializers.ones)
  with pytest.raises(InputError, match='got 3'):
    init(jax.random.key(0), (3, 2), 'float32')


@pytest.mark.parametrize('method', METHODS)
def test_the_parameters_of_default_networks_are_what_they_were(method):
  model = WideResNet(10, 1, num_classes=5, method=method)
  found = set(names(model))
  norm, alpha = model.method == 'batchnorm', METHODS[method].alpha is not None
  fixup = METHODS[method].fixup_block
  expected = {'stem/kernel', 'classifier/kernel', 'classifier/bias'}
  if norm:
    expected |= {'norm/scale', 'norm/bias'}
  if fixup:
    expected |= {'bias1/scalar_bias', 'bias2/scalar_bias'}
  for i in (1, 2, 3):
    block = f'stage{i}/block1'
    expected |= {f'{block}/conv1/kernel', f'{block}/conv2/kernel'}
    if alpha:
      expected.add(f'{block}/conv2/alpha')
    if norm:
      of_norms = [f'norm{j}/{leaf}' for j in '12' for leaf in ('scale', 'bias')]
      expected |= {f'{block}/{name}' for name in of_norms}
    if fixup:
      biases = ('bias1a', 'bias1b', 'bias2a', 'bias2b')
      expected |= {f'{block}/{name}/scalar_bias' for name in biases}
    elif i > 1:
      expected.add(f'{block}/projection/kernel')
  if METHODS[method].standardize:
    for name in [n for n in expected if n.endswith('/kernel')]:
      if not name.startswith('classifier'):
        layer = name.removesuffix('kernel')
        expected |= {f'{layer}gain', f'{layer}bias'}
  assert found == expected


def test_concatenated_relu_doubles_the_inputs_that_follow_it():
  plain, doubled = names(network()), names(network(activation='crelu'))
  assert set(plain) == set(doubled)
  for name, shape in plain.items():
    expected = list(shape)
    if name.endswith('kernel') and name != 'stem/kernel':
      expected[-2] *= 2
    assert doubled[name] == tuple(expected), name


@pytest.mark.parametrize('method', ['none', 'batchnorm'])
def test_without_skip_paths_the_branches_follow_one_another(method):
  model, x = network(skip=False, method=method), normal(SHAPE)
  variables = model.init(jax.random.key(0), x, train=False)
  assert joins(model, variables, x) == 0
  assert joins(network(), network().init(jax.random.key(0), x, train=False), x)
  with_skips = set(names(network(method=method)))
  assert set(names(model)) == {n for n in with_skips if 'projection' not in n}
  param_labels(variables['params'])
  if method == 'batchnorm':
    return
  params = variables['params']

  def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  y = conv(x, params['stem']['kernel'])
  for i in (1, 2, 3):
    for j in (1, 2):
      block = params[f'stage{i}'][f'block{j}']
      stride = 2 if i > 1 and j == 1 else 1
      y = conv(jax.nn.relu(y), block['conv1']['kernel'], stride)
      y = conv(jax.nn.relu(y), block['conv2']['kernel'])
  y = jax.nn.relu(y).mean((1, 2)) @ params['classifier']['kernel']
  got = model.apply(variables, x, train=False)
  np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_scanned_is_unrolled():
  model, x = network(skip=False, **LINEAR), normal(SHAPE)
  model = model.clone(stage_sizes=(3, 2), features=8, stem_features=8)
  variables = model.init(jax.random.key(0), x, train=False)
  scanned = model.clone(scan=True, remat=True)
  np.testing.assert_allclose(
    scanned.apply(stack_blocks(variables), x, train=False),
    model.apply(variables, x, train=False),
    rtol=1e-4,
    atol=1e-6,
  )


REFUSED = {
  'an activation': ({'activation': 'rleu'}, "did you mean 'relu'"),
  'a kernel_init': ({'kernel_init': 'orthogonl'}, "did you mean 'orthogonal'"),
  'no crelu': ({'kernel_init': 'looks_linear'}, "activation='crelu', got"),
  'fixup': ({'activation': 'crelu', 'method': 'fixup'}, 'doubles the channels'),
  'rescaled': (
    {'kernel_init': 'orthogonal', 'method': 'fixup'},
    "can't be rescaled",
  ),
  'alpha 0': ({'skip': False, 'method': 'skipinit'}, 'skip=False'),
  'fixup alone': ({'skip': False, 'method': 'fixup'}, 'skip=False'),
  'divided': ({'skip': False, 'method': 'divide_sqrt2'}, 'skip=False'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_go_together_is_refused(case):
  fields, words = REFUSED[case]
  with pytest.raises(InputError, match=words) as error:
    names(network(**fields))
  assert '\n' not in str(error.value)
  config = recipe(**fields)
  with pytest.raises(InputError) as by_recipe:
    build_model(config, 10)
  assert str(by_recipe.value) == str(error.value)


def test_a_branch_that_is_not_zero_may_stand_alone():
  names(network(skip=False, method='skipinit', alpha=1.0))


def recipe(**fields) -> ConfigDict:
  config = default_config()
  config.batch_size, config.eval_batch_size = 32, 360
  config.model.update(fields)
  return config


def test_recipes_say_it_and_default_to_what_was():
  assert build_model(recipe(), 10) == build_model(
    recipe(activation='relu', kernel_init='he', skip=True), 10
  )
  model = build_model(recipe(method='none', skip=False, **LINEAR), 10)
  assert (model.skip, model.activation) == (False, 'crelu')
  assert model.kernel_init == 'looks_linear'


def test_a_bottleneck_is_linear_too():
  model = ResNet((2, 1), True, num_classes=5, features=4, stem_features=4)
  model = model.clone(method='none', small_images=True, **LINEAR)
  a, b = normal(SHAPE), normal(SHAPE, 1)
  variables = model.init(jax.random.key(2), a, train=False)
  f = jax.jit(lambda x: model.apply(variables, x, train=False))
  np.testing.assert_allclose(f(a + b), f(a) + f(b), atol=1e-4)

"""The scalar: on the activation, folded into a layer, and where paths meet."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  Join,
  ResidualBlock,
  ResNet,
  SkipInit,
  SkipInitConv,
  SkipInitDense,
  WideResNet,
)
from skipinit_jax.models.layers import make_layers

CONV = {'features': 6, 'kernel_size': (3, 3)}
# What a user may write: our class, Flax's class, their common arguments.
LAYERS = {
  'conv': (SkipInitConv, nn.Conv, CONV),
  'strides': (SkipInitConv, nn.Conv, {**CONV, 'strides': 2}),
  'no_bias': (SkipInitConv, nn.Conv, {**CONV, 'use_bias': False}),
  'groups': (SkipInitConv, nn.Conv, {**CONV, 'feature_group_count': 2}),
  'valid': (SkipInitConv, nn.Conv, {**CONV, 'padding': 'VALID'}),
  'dense': (SkipInitDense, nn.Dense, {'features': 6}),
  'dense_no_bias': (
    SkipInitDense,
    nn.Dense,
    {'features': 6, 'use_bias': False},
  ),
}


def normal(rng, shape, dtype):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def random_params(layer, x, seed=0, alpha=0.37):
  """Non-zero values for every parameter of a folded layer."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: normal(rng, s.shape, s.dtype), shapes)
  return {**params, 'alpha': jnp.asarray(alpha, shapes['alpha'].dtype)}


def folded_and_unfolded(name, **dtypes):
  """f(params, x) of the folded layer and of Flax's layer, then SkipInit."""
  ours, theirs, kwargs = LAYERS[name]
  layer, plain = ours(**kwargs, **dtypes), theirs(**kwargs, **dtypes)

  def folded(params, x):
    return layer.apply({'params': params}, x)

  def unfolded(params, x):
    params = dict(params)
    alpha = {'params': {'alpha': params.pop('alpha')}}
    return SkipInit().apply(alpha, plain.apply({'params': params}, x))

  return layer, folded, unfolded


def compare(name, dtype, rtol, atol, alpha_rtol):
  rng = np.random.default_rng(1)
  x = normal(rng, (3, 5, 5, 4), dtype)
  layer, folded, unfolded = folded_and_unfolded(name, param_dtype=dtype)
  params = random_params(layer, x)
  assert params['alpha'].dtype == dtype
  y, vjp = jax.vjp(folded, params, x)
  expected_y, expected_vjp = jax.vjp(unfolded, params, x)
  assert y.dtype == expected_y.dtype == dtype
  np.testing.assert_allclose(y, expected_y, rtol, atol)
  cotangent = normal(rng, y.shape, dtype)
  got, expected = vjp(cotangent), expected_vjp(cotangent)
  names = {'kernel', 'alpha'} | {'bias'} & set(params)
  assert set(got[0]) == names
  for leaf in names:
    np.testing.assert_allclose(
      got[0][leaf],
      expected[0][leaf],
      *((alpha_rtol, 0) if leaf == 'alpha' else (rtol, atol)),
      err_msg=leaf,
    )
  np.testing.assert_allclose(got[1], expected[1], rtol, atol)
  assert abs(got[0]['alpha']) > 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_alpha_is_a_scalar_at_zero_and_keeps_the_branch_dtype(dtype):
  branch = jnp.asarray([[1.5, -2.0], [3.0, 0.25]], dtype)
  variables = SkipInit().init(jax.random.key(0), branch)
  alpha = variables['params']['alpha']
  assert (alpha.shape, alpha.dtype, float(alpha)) == ((), jnp.float32, 0.0)
  y = SkipInit().apply(variables, branch)
  assert y.dtype == branch.dtype
  x = 3 * branch
  np.testing.assert_array_equal(x + y, x)
  half = SkipInit(0.5)
  y = half.apply(half.init(jax.random.key(0), branch), branch)
  assert y.dtype == branch.dtype
  np.testing.assert_array_equal(y, branch / 2)


@pytest.mark.parametrize('layer', [SkipInitConv(4, (3, 3)), SkipInitDense(4)])
def test_folded_layers_start_at_init_value(layer):
  x = jnp.ones((1, 3, 3, 4))
  variables = layer.init(jax.random.key(0), x)
  params = variables['params']
  assert params['alpha'].shape == ()
  assert float(params['alpha']) == 0.0
  assert float(jnp.abs(params['kernel']).max()) > 0
  np.testing.assert_array_equal(x + layer.apply(variables, x), x)
  other = layer.clone(init_value=0.25).init(jax.random.key(0), x)
  assert float(other['params']['alpha']) == 0.25
  # The stored kernel is the layer's own: alpha is read, never multiplied in.
  np.testing.assert_array_equal(other['params']['kernel'], params['kernel'])


@pytest.mark.parametrize('name', LAYERS)
def test_folded_equals_alpha_on_the_activation_in_float32(name):
  # d alpha is a sum that cancels: relative 1e-4.
  compare(name, jnp.float32, rtol=1e-5, atol=1e-5, alpha_rtol=1e-4)


@pytest.mark.parametrize('name', LAYERS)
def test_folded_equals_alpha_on_the_activation_in_float64(name):
  with jax.enable_x64(True):
    compare(name, jnp.float64, rtol=1e-12, atol=1e-12, alpha_rtol=1e-12)


@pytest.mark.parametrize('name', ['conv', 'dense'])
def test_bfloat16_compute_keeps_float32_parameters(name):
  x = normal(np.random.default_rng(2), (3, 5, 5, 4), 'bfloat16')
  layer, folded, _ = folded_and_unfolded(name, dtype='bfloat16')
  params = random_params(layer, x)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  y, vjp = jax.vjp(folded, params, x)
  assert y.dtype == jnp.bfloat16
  grads, dx = vjp(jnp.ones_like(y))
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  assert dx.dtype == jnp.bfloat16
  # Rounding kernel and product costs 2^-9 a term; the sums have 36 terms.
  exact = folded_and_unfolded(name)[2](params, x.astype('float32'))
  error = jnp.abs(y.astype('float32') - exact)
  assert float(error.max()) < 2**-6 * float(jnp.abs(exact).max())


def test_alpha_multiplies_the_kernel_before_the_cast_to_bfloat16():
  # alpha rounds to 1 in bfloat16, where the product would be 1 + 2^-7.
  layer = SkipInitDense(1, dtype='bfloat16', use_bias=False)
  params = {'kernel': jnp.full((1, 1), 1 + 2**-7), 'alpha': 1 + 2**-8}
  params['alpha'] = jnp.asarray(params['alpha'])
  y = layer.apply({'params': params}, jnp.ones((1, 1), 'bfloat16'))
  assert float(y[0, 0]) == 1 + 2**-6


@pytest.mark.parametrize('name', ['conv', 'dense'])
def test_at_alpha_zero_only_alpha_has_a_gradient(name):
  rng = np.random.default_rng(3)
  x = normal(rng, (3, 5, 5, 4), 'float32')
  layer, folded, _ = folded_and_unfolded(name)
  params = random_params(layer, x, alpha=0.0)
  y, vjp = jax.vjp(folded, params, x)
  cotangent = normal(rng, y.shape, 'float32')
  grads, dx = vjp(cotangent)
  assert not np.asarray(y).any()
  assert not np.asarray(dx).any()
  assert not np.asarray(grads['kernel']).any()
  assert not np.asarray(grads['bias']).any()
  branch = LAYERS[name][1](**LAYERS[name][2]).apply(
    {'params': {k: params[k] for k in ('kernel', 'bias')}}, x
  )
  expected = np.vdot(cotangent, branch)
  assert abs(expected) > 1
  np.testing.assert_allclose(grads['alpha'], expected, rtol=1e-4)


class Unfolded(nn.Module):
  """`SkipInitConv`, with alpha on the activation."""

  features: int
  kernel_size: tuple
  strides: int = 1
  kernel_init: object = None

  @nn.compact
  def __call__(self, x):
    conv = nn.Conv(
      self.features,
      self.kernel_size,
      self.strides,
      use_bias=False,
      name='conv',
    )
    return SkipInit(name='scalar')(conv(x))


def residual_shapes(model, x):
  """Shapes of the arrays that the backward pass of `model` keeps."""
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), x
  )

  def backward(params):
    def forward(params):
      return model.apply({**variables, 'params': params}, x, train=True)

    return jax.vjp(forward, params)[1]

  kept = jax.eval_shape(backward, variables['params'])
  return [leaf.shape for leaf in jax.tree.leaves(kept)]


def test_folded_block_keeps_no_branch_output_for_the_gradient_of_alpha():
  layers = make_layers(
    METHODS['skipinit'],
    num_blocks=1,
    branch_layers=2,
    biases=False,
    statistics_group=None,
    axis_name=None,
    dtype=None,
    param_dtype='float32',
  )
  x = jnp.ones((2, 6, 6, 5))
  # 13 channels: only the branch's output and the projection's have them.
  block = ResidualBlock((7, 13), (3, 3), 1, layers)
  folded = residual_shapes(block, x)
  unfolded = residual_shapes(
    block.clone(layers=layers._replace(last_conv=Unfolded)), x
  )
  assert (2, 6, 6, 7) in folded  # The last convolution's input is kept.
  assert folded.count((2, 6, 6, 13)) == 0
  assert unfolded.count((2, 6, 6, 13)) == 1


def test_skipinit_networks_keep_the_activations_that_plain_ones_do():
  def activations(method):
    model = ResNet(
      (2, 1), True, 5, method, alpha=None, features=4, small_images=True
    )
    shapes = residual_shapes(model, jnp.ones((3, 8, 8, 1)))
    return sorted(s for s in shapes if len(s) == 4 and s[0] == 3)

  assert len(activations('none')) > 6
  assert activations('skipinit') == activations('none')


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'model',
  [
    WideResNet(16, 1),
    ResNet((2, 1), num_classes=5, features=4),
    ResNet((1, 2), True, num_classes=5, features=4),
  ],
  ids=['wide', 'basic', 'bottleneck'],
)
def test_every_block_ends_in_one_join(model, method):
  joins, blocks, calls = [], [], []

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    path = context.module.path
    if isinstance(context.module, Join):
      joins.append(path)
      assert len(args) == 2
      assert out.shape == args[0].shape == args[1].shape
    elif path and path[-1].startswith('block'):
      blocks.append(path)
      assert calls[-1] == (*path, 'join')  # No module runs after the join.
    calls.append(path)
    return out

  model = model.clone(method=method)
  with nn.intercept_methods(record):
    jax.eval_shape(
      functools.partial(model.init, train=False),
      jax.random.key(0),
      jnp.ones((2, 16, 16, 3)),
    )
  stages = enumerate(model.stage_sizes, start=1)
  expected = [
    (f'stage{s}', f'block{i}') for s, n in stages for i in range(1, n + 1)
  ]
  assert blocks == expected
  assert joins == [(*path, 'join') for path in expected]


def test_join_adds_and_multiplies_by_its_gain():
  skip, branch = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, -1.0])
  np.testing.assert_array_equal(Join().apply({}, skip, branch), [4.0, 1.0])
  np.testing.assert_array_equal(
    Join(gain=0.5).apply({}, skip, branch), [2.0, 0.5]
  )


def test_join_refuses_paths_of_different_shapes():
  with pytest.raises(InputError, match=r'\(2, 3\).*\(2, 1\).*same shape'):
    Join().apply({}, jnp.ones((2, 3)), jnp.ones((2, 1)))


@pytest.mark.parametrize('branch', [np.arange(3), np.ones(3, bool), 0.5])
def test_only_floating_branches_are_scaled(branch):
  """Alpha of 0.5 as an integer is 0."""
  with pytest.raises(InputError, match='floating dtype, got'):
    SkipInit(0.5).init(jax.random.key(0), branch)


@pytest.mark.parametrize(
  'value', ['1/sqrt(d)', [1.0], None, np.ones(2), math.nan]
)
@pytest.mark.parametrize(
  'layer', [SkipInit(), SkipInitConv(4, (3, 3)), SkipInitDense(4)]
)
def test_an_initial_value_is_a_number(layer, value):
  layer = layer.clone(init_value=value)
  with pytest.raises(InputError, match=r'init_value=.*num_blocks\*\*-0.5'):
    layer.init(jax.random.key(0), jnp.ones((1, 3, 3, 4)))


def test_a_number_of_features_is_no_initial_value():
  x = jnp.ones((2, 8))
  with pytest.raises(InputError, match=r'init_value=8: .*number of features'):
    SkipInit(x.shape[-1]).init(jax.random.key(0), x)
  SkipInit(1).init(jax.random.key(0), x)


def test_an_initial_value_may_be_computed():
  def alpha(value):
    layer = SkipInitDense(2, init_value=value)
    return layer.init(jax.random.key(0), jnp.ones((1, 2)))['params']['alpha']

  for value in (np.float32(0.5), jnp.asarray(0.5)):
    assert float(alpha(value)) == 0.5
  assert float(jax.jit(alpha)(0.5)) == 0.5

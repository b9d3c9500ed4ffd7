"""The Linen modules as parts of other people's programs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toys import flatten, normal

from skipinit_jax.models import (
  METHODS,
  FixupBlock,
  Join,
  ResidualBlock,
  ResNet,
  SkipInit,
  SkipInitConv,
  SkipInitDense,
  WideResNet,
  make_layers,
)


def block(kind, method, param_dtype='float32', dtype=None):
  layers = make_layers(
    METHODS[method],
    num_blocks=3,
    branch_layers=2,
    biases=True,
    statistics_group=None,
    axis_name=None,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  return kind((6, 6), (3, 3), 2, layers)


SMALL = {'num_classes': 3, 'features': 4, 'stem_features': 4}
MAPS, IMAGES = (4, 6, 6, 4), (4, 8, 8, 1)
# Part -> how it is made, the shape of its input, and whether it is told of
# training.
PARTS = {
  'skipinit': (SkipInit, MAPS, False),
  'conv': (functools.partial(SkipInitConv, 4, (3, 3)), MAPS, False),
  'dense': (functools.partial(SkipInitDense, 4), MAPS, False),
  'block': (functools.partial(block, ResidualBlock, 'skipinit'), MAPS, True),
  'fixup_block': (functools.partial(block, FixupBlock, 'fixup'), MAPS, True),
  'wide': (functools.partial(WideResNet, 10, 1, num_classes=3), IMAGES, True),
  'bottleneck': (
    functools.partial(ResNet, (1, 1), True, biases=True, **SMALL),
    IMAGES,
    True,
  ),
}
PATHS = {
  'skipinit': {'alpha': ()},
  'conv': {'kernel': (3, 3, 4, 4), 'bias': (4,), 'alpha': ()},
  'dense': {'kernel': (4, 4), 'bias': (4,), 'alpha': ()},
  'block': {
    'conv1/kernel': (3, 3, 4, 6),
    'conv1/bias': (6,),
    'conv2/kernel': (3, 3, 6, 6),
    'conv2/bias': (6,),
    'conv2/alpha': (),
    'projection/kernel': (1, 1, 4, 6),
    'projection/bias': (6,),
  },
  'fixup_block': {
    'bias1a/scalar_bias': (),
    'conv1/kernel': (3, 3, 4, 6),
    'conv1/bias': (6,),
    'bias1b/scalar_bias': (),
    'bias2a/scalar_bias': (),
    'conv2/kernel': (3, 3, 6, 6),
    'conv2/bias': (6,),
    'conv2/alpha': (),
    'bias2b/scalar_bias': (),
    'projection/kernel': (1, 1, 4, 6),
    'projection/bias': (6,),
  },
  'wide': {
    'stem/kernel': (3, 3, 1, 16),
    'stage1/block1/conv1/kernel': (3, 3, 16, 16),
    'stage1/block1/conv2/kernel': (3, 3, 16, 16),
    'stage1/block1/conv2/alpha': (),
    'stage2/block1/conv1/kernel': (3, 3, 16, 32),
    'stage2/block1/conv2/kernel': (3, 3, 32, 32),
    'stage2/block1/conv2/alpha': (),
    'stage2/block1/projection/kernel': (1, 1, 16, 32),
    'stage3/block1/conv1/kernel': (3, 3, 32, 64),
    'stage3/block1/conv2/kernel': (3, 3, 64, 64),
    'stage3/block1/conv2/alpha': (),
    'stage3/block1/projection/kernel': (1, 1, 32, 64),
    'classifier/kernel': (64, 3),
    'classifier/bias': (3,),
  },
  'bottleneck': {
    'stem/kernel': (7, 7, 1, 4),
    **{
      f'stage{s}/block1/{layer}': shape
      for s, c, w in ((1, 4, 4), (2, 16, 8))
      for layer, shape in {
        'conv1/kernel': (1, 1, c, w),
        'conv1/bias': (w,),
        'conv2/kernel': (3, 3, w, w),
        'conv2/bias': (w,),
        'conv3/kernel': (1, 1, w, 4 * w),
        'conv3/bias': (4 * w,),
        'conv3/alpha': (),
        'projection/kernel': (1, 1, c, 4 * w),
        'projection/bias': (4 * w,),
      }.items()
    },
    'classifier/kernel': (32, 3),
    'classifier/bias': (3,),
  },
}


def part(name, **fields):
  make, shape, trains = PARTS[name]
  return make(**fields), shape, {'train': True} if trains else {}


def shapes(name, **fields):
  module, shape, options = part(name, **fields)
  init = functools.partial(module.init, **options)
  return jax.eval_shape(
    init, jax.random.key(0), jax.ShapeDtypeStruct(shape, 'float32')
  )


def draw(shapes, seed=1):
  """Values of the size of He's for all parameters, those at zero too."""
  rng = np.random.default_rng(seed)

  def one(s):
    std = (2 / np.prod(s.shape[:-1])) ** 0.5 if len(s.shape) > 1 else 0.7
    return jnp.asarray(std * rng.standard_normal(s.shape), s.dtype)

  return jax.tree.map(one, shapes)


def assert_close(got, expected, rtol):
  got, expected = flatten(got), flatten(expected)
  assert set(got) == set(expected)
  for path, leaf in expected.items():
    scale = np.abs(leaf).max()
    assert scale > 0, path
    np.testing.assert_allclose(got[path], leaf, rtol, rtol * scale, path)


# What the modules are.


@pytest.mark.parametrize('name', PARTS)
def test_parameter_paths_stay(name):
  """A change here makes everybody's checkpoints unreadable."""
  got = flatten(shapes(name)['params'])
  assert {path: leaf.shape for path, leaf in got.items()} == PATHS[name]


@pytest.mark.parametrize('name', PARTS)
def test_there_is_no_state_and_no_axis_name(name):
  module, shape, options = part(name)
  variables = draw(shapes(name))
  assert set(variables) == {'params'}

  def run(variables, x):
    return module.apply(variables, x, mutable=True, **options)

  jaxpr, (_, changed) = jax.make_jaxpr(run, return_shape=True)(
    variables, jnp.ones(shape)
  )
  assert not set(changed) - {'params'}
  assert 'psum' not in str(jaxpr)


def test_the_check_for_state_and_axis_names_can_fail():
  x = jnp.ones(IMAGES)
  model = ResNet((1,), method='batchnorm', axis_name='batch', **SMALL)

  def run(variables, x):
    return model.apply(variables, x, train=True, mutable=True)[1]

  variables = model.init(jax.random.key(0), x, train=False)
  mapped = jax.vmap(run, (None, 0), axis_name='batch')
  changed = jax.eval_shape(mapped, variables, x[None])
  assert set(changed) == {'params', 'batch_stats'}
  with pytest.raises(NameError, match='batch'):
    jax.make_jaxpr(run)(variables, x)


def test_join_has_no_parameters():
  assert not Join().init(jax.random.key(0), jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', PARTS)
def test_dtypes_are_fields(name, dtype, param_dtype):
  fields = {'param_dtype': param_dtype}
  if name != 'skipinit':  # Its compute dtype is its branch's.
    fields['dtype'] = dtype
  params = shapes(name, **fields)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
  module, shape, options = part(name, **fields)

  def run(params, x):
    return module.apply(params, x, **options)

  x = 'bfloat16' if 'bfloat16' in (dtype, param_dtype) else 'float32'
  out = jax.eval_shape(run, params, jax.ShapeDtypeStruct(shape, x))
  if name in ('wide', 'bottleneck'):
    assert out.dtype == jnp.float32
  else:
    assert out.dtype == jnp.dtype(x)


# Under JAX's transformations: outputs of every example, and the gradient of
# a sum over the batch, so that devices' shares add up.


def plain(function):
  return function


def by_example(function):
  def run(params, x):
    outputs, grads = jax.vmap(function, (None, 0))(params, x[:, None])
    return outputs[:, 0], jax.tree.map(lambda g: g.sum(0), grads)

  return run


def by_micro_batches(function):
  def run(params, x):
    def two(total, x):
      outputs, grads = function(params, x)
      return jax.tree.map(jnp.add, total, grads), outputs

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, outputs = jax.lax.scan(two, zeros, x.reshape(2, 2, *x.shape[1:]))
    return outputs.reshape(-1, *outputs.shape[2:]), total

  return jax.jit(run)


def by_pmap(function):
  def run(params, x):
    devices = jax.device_count()
    x = x.reshape(devices, -1, *x.shape[1:])
    outputs, grads = jax.pmap(function, in_axes=(None, 0))(params, x)
    outputs = outputs.reshape(-1, *outputs.shape[2:])
    return outputs, jax.tree.map(lambda g: g.sum(0), grads)

  return run


def mesh():
  return Mesh(np.array(jax.devices()), ('data',))


def by_shard_map(function):
  # The gradient of what all devices share is summed over them by JAX itself.
  data, same = PartitionSpec('data'), PartitionSpec()
  return jax.jit(
    jax.shard_map(
      function, mesh=mesh(), in_specs=(same, data), out_specs=(data, same)
    )
  )


def by_sharded_jit(function):
  def run(params, x):
    same = NamedSharding(mesh(), PartitionSpec())
    data = NamedSharding(mesh(), PartitionSpec('data'))
    params, x = jax.device_put(params, same), jax.device_put(x, data)
    outputs, grads = jax.jit(function, out_shardings=(data, same))(params, x)
    assert len(outputs.sharding.device_set) == jax.device_count()
    return outputs, grads

  return run


TRANSFORMS = {
  'vmap': by_example,
  'scan': by_micro_batches,
  'pmap': by_pmap,
  'shard_map': by_shard_map,
  'sharded_jit': by_sharded_jit,
}


def outputs_and_gradient(module, options, wrap=plain):
  """The function of (params, x) that everything here is about."""

  @wrap
  def apply(params, x):
    return module.apply({'params': params}, x, **options)

  def function(params, x):
    def loss(params):
      y = apply(params, x)
      return jnp.square(y - 0.1).sum(), y

    grads, outputs = jax.grad(loss, has_aux=True)(params)
    return outputs, grads

  return function


@functools.cache
def reference(name):
  """Parameters, inputs, outputs and gradient, jitted on one device, float64."""
  module, shape, options = part(name, param_dtype='float64')
  params = draw(shapes(name, param_dtype='float64')['params'])
  x = normal(shape, dtype='float64')
  return params, x, jax.jit(outputs_and_gradient(module, options))(params, x)


# The blocks hold the convolutions. The bottleneck stands for the networks, and
# is slow: other tests run whole networks under pmap, scan and vmap.
TRANSFORMED = ['skipinit', 'dense', 'block', 'fixup_block', 'bottleneck']


@pytest.mark.sampled(10)
@pytest.mark.parametrize('transform', TRANSFORMS)
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name == 'bottleneck' else ())
    for name in TRANSFORMED
  ],
)
def test_a_transformation_changes_nothing(name, transform):
  with jax.enable_x64(True):
    params, x, expected = reference(name)
    module, _, options = part(name, param_dtype='float64')
    function = outputs_and_gradient(module, options)
    got = TRANSFORMS[transform](function)(params, x)
    assert_close(got, expected, 1e-9)


@pytest.mark.parametrize('name', TRANSFORMED)
def test_recomputation_changes_nothing(name):
  with jax.enable_x64(True):
    params, x, expected = reference(name)
    module, _, options = part(name, param_dtype='float64')
    wrapped = outputs_and_gradient(module, options, wrap=jax.checkpoint)
    assert_close(jax.jit(wrapped)(params, x), expected, 1e-9)


# In a reader's own modules.


class Block(nn.Module):
  """A residual block of dense layers, as a carry of a scan."""

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.relu(nn.Dense(2 * x.shape[-1])(x))
    y = SkipInitDense(x.shape[-1], init_value=0.5, name='last')(y)
    return Join(name='join')(x, y), None


@pytest.mark.parametrize('wrap', [plain, nn.remat])
def test_scanned_blocks_of_ones_own_are_a_loop(wrap):
  stack = nn.scan(
    wrap(Block), variable_axes={'params': 0}, split_rngs={'params': True}
  )
  stack, x = stack(), normal((3, 5))
  params = stack.init(jax.random.key(0), x, jnp.arange(4))['params']
  assert params['last']['alpha'].shape == (4,)
  kernels = np.asarray(params['last']['kernel'])
  assert np.abs(kernels[0] - kernels[1]).max() > 0.1

  def scanned(params):
    y, _ = stack.apply({'params': params}, x, jnp.arange(4))
    return jnp.square(y).sum(), y

  def unrolled(params):
    y = x
    for i in range(4):
      one = jax.tree.map(lambda p, i=i: p[i], params)
      y, _ = Block().apply({'params': one}, y)
    return jnp.square(y).sum(), y

  got = jax.grad(scanned, has_aux=True)(params)
  assert_close(got, jax.grad(unrolled, has_aux=True)(params), 1e-5)


def test_an_ensemble_is_a_vmap_over_parameters():
  many = nn.vmap(
    Block,
    in_axes=None,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    axis_size=3,
  )()
  x = normal((2, 5))
  params = many.init(jax.random.key(0), x)['params']
  y, _ = many.apply({'params': params}, x)
  assert y.shape == (3, 2, 5)
  for i in range(3):
    one = jax.tree.map(lambda p, i=i: p[i], params)
    expected, _ = Block().apply({'params': one}, x)
    np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-6)
  assert float(jnp.abs(y[0] - y[1]).max()) > 0.1


def test_training_steps_in_a_scan_are_a_loop():
  model, tx = Block(), optax.adam(0.01)
  params = model.init(jax.random.key(0), normal((2, 5)))['params']
  batches = normal((6, 2, 5), seed=3)

  def step(carry, x):
    params, opt_state = carry

    def loss(params):
      return jnp.square(model.apply({'params': params}, x)[0]).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), value

  start = carry = params, tx.init(params)
  losses = []
  for x in batches:
    carry, value = step(carry, x)
    losses.append(value)
  (got, _), values = jax.lax.scan(step, start, batches)
  np.testing.assert_allclose(values, jnp.stack(losses), rtol=1e-5)
  moved = jax.tree.map(lambda a, b: a - b, got, params)
  expected = jax.tree.map(lambda a, b: a - b, carry[0], params)
  assert_close(moved, expected, 1e-3)

"""The NNX modules against Linen's, and networks through Flax's bridge."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from toys import flatten, normal

from skipinit_jax import models
from skipinit_jax.errors import InputError
from skipinit_jax.models import ResNet
from skipinit_jax.models.nnx import SkipInit, SkipInitConv, SkipInitLinear

# Ours, NNX's own, Linen's of ours; arguments of the first two and the third.
LAYERS = {
  'linear': (
    SkipInitLinear,
    nnx.Linear,
    models.SkipInitDense,
    (4, 6),
    {},
    {'features': 6},
  ),
  'conv': (
    SkipInitConv,
    nnx.Conv,
    models.SkipInitConv,
    (4, 6, (3, 3)),
    {},
    {'features': 6, 'kernel_size': (3, 3)},
  ),
  'strides': (
    SkipInitConv,
    nnx.Conv,
    models.SkipInitConv,
    (4, 6, (3, 3)),
    {'strides': 2, 'use_bias': False},
    {'features': 6, 'kernel_size': (3, 3), 'strides': 2, 'use_bias': False},
  ),
}


def pure(module, *kinds):
  """Nested dicts of a module's arrays, without its random streams."""
  kinds = kinds or (nnx.Param, nnx.BatchStat)
  return nnx.to_pure_dict(nnx.state(module, nnx.Any(*kinds)))


def assert_close(got, expected, rtol, atol=0.0):
  got, expected = flatten(got), flatten(expected)
  assert set(got) == set(expected)
  for path, leaf in expected.items():
    np.testing.assert_allclose(got[path], leaf, rtol, atol, err_msg=path)


# Native modules.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_skipinit_is_linens(dtype):
  branch = normal((2, 3), dtype=dtype)
  scale = SkipInit()
  assert (scale.alpha.shape, scale.alpha.dtype) == ((), jnp.float32)
  assert not scale(branch).any()
  scale = SkipInit(0.3, param_dtype='float16')
  assert scale.alpha.dtype == jnp.float16
  linen = models.SkipInit(0.3, 'float16')
  expected = linen.apply(linen.init(jax.random.key(0), branch), branch)
  got = scale(branch)
  assert got.dtype == branch.dtype
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('name', LAYERS)
def test_a_folded_layer_is_alpha_on_the_activation_in_float64(name):
  ours, plain, linen, args, fields, linen_fields = LAYERS[name]
  with jax.enable_x64(True):
    x = normal((3, 5, 5, 4), dtype='float64')
    fields = {**fields, 'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
    layer = ours(*args, init_value=0.37, **fields)
    others = fields | {'rngs': nnx.Rngs(1)}
    inner = plain(*args, **others)
    if layer.bias is not None:
      layer.bias[...] = normal((6,), 1, 'float64')
      inner.bias[...] = layer.bias[...]
    inner.kernel[...] = layer.kernel[...]
    scale = SkipInit(0.37, param_dtype=jnp.float64)
    cotangent = normal(layer(x).shape, 2, 'float64')

    def folded(layer, x):
      return jnp.vdot(cotangent, layer(x))

    def unfolded(parts, x):
      inner, scale = parts
      return jnp.vdot(cotangent, scale(inner(x)))

    got = nnx.value_and_grad(folded, argnums=(0, 1))(layer, x)
    expected = nnx.value_and_grad(unfolded, argnums=(0, 1))((inner, scale), x)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(got[1][1], expected[1][1], rtol=1e-11)
    of_inner, of_scale = map(nnx.to_pure_dict, expected[1][0])
    assert_close(
      nnx.to_pure_dict(got[1][0]), {**of_inner, **of_scale}, 1e-11, 1e-12
    )

    # And Linen's layer under the same parameters.
    linen = linen(**linen_fields, param_dtype='float64')
    y = linen.apply({'params': pure(layer)}, x)
    np.testing.assert_allclose(y, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['linear', 'conv'])
def test_a_folded_layer_starts_at_zero_and_keeps_its_dtypes(name):
  ours, _, _, args, fields, _ = LAYERS[name]
  layer = ours(*args, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **fields)
  x = normal((2, 5, 5, 4), dtype='bfloat16')
  y = layer(x)
  assert y.dtype == jnp.bfloat16
  assert not y.any()
  assert float(jnp.abs(layer.kernel[...]).max()) > 0
  assert {v.dtype for v in flatten(pure(layer)).values()} == {np.dtype('f4')}


def test_alpha_multiplies_the_kernel_before_the_cast_to_bfloat16():
  # alpha rounds to 1 in bfloat16, where the product would be 1 + 2^-7.
  layer = SkipInitLinear(
    1, 1, init_value=1 + 2**-8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )
  layer.kernel[...] = jnp.full((1, 1), 1 + 2**-7)
  assert float(layer(jnp.ones((1, 1), 'bfloat16'))[0, 0]) == 1 + 2**-6


def test_a_folded_layer_keeps_no_output_for_the_gradient_of_alpha():
  x = jnp.ones((2, 5, 5, 4))

  def kept(module):
    graph, params = nnx.split(module, nnx.Param)

    def backward(params):
      return jax.vjp(lambda p: nnx.merge(graph, p)(x), params)[1]

    shapes = jax.eval_shape(backward, params)
    return [leaf.shape for leaf in jax.tree.leaves(shapes)]

  rngs = nnx.Rngs(0)
  conv = nnx.Conv(4, 7, (3, 3), rngs=rngs)
  folded = SkipInitConv(4, 7, (3, 3), rngs=rngs)
  assert kept(folded).count((2, 5, 5, 7)) == 0
  assert kept(nnx.Sequential(conv, SkipInit())).count((2, 5, 5, 7)) == 1


class Block(nnx.Module):
  """What a reader writes."""

  def __init__(self, width, *, rngs):
    self.dense1 = nnx.Linear(width, 2 * width, rngs=rngs)
    self.dense2 = SkipInitLinear(2 * width, width, init_value=0.5, rngs=rngs)

  def __call__(self, x):
    return x + self.dense2(nnx.relu(self.dense1(x)))


def test_blocks_stack_for_a_scan():
  @nnx.split_rngs(splits=3)
  @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0}),), out_axes=0)
  def stack(rngs):
    return Block(4, rngs=rngs)

  blocks, x = stack(nnx.Rngs(0)), normal((2, 4))
  assert blocks.dense2.alpha.shape == (3,)

  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  def forward(block, x):
    return block(x)

  graph, state = nnx.split(blocks)
  expected = x
  for i in range(3):
    block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
    expected = block(expected)
  np.testing.assert_allclose(forward(blocks, x), expected, rtol=1e-5)
  assert float(jnp.abs(expected - x).max()) > 0.1


def test_per_example_gradients_of_native_modules():
  graph, params = nnx.split(Block(4, rngs=nnx.Rngs(0)), nnx.Param)
  x = normal((5, 4))

  def loss(params, x):
    return jnp.square(nnx.merge(graph, params)(x)).sum()

  each = jax.vmap(jax.grad(loss), (None, 0))(params, x)
  for i in range(5):
    one = jax.grad(loss)(params, x[i : i + 1])
    assert_close(jax.tree.map(lambda g, i=i: g[i], each), one, 1e-4, 1e-5)


# Networks through the bridge.


FIELDS = {
  'num_classes': 3,
  'features': 4,
  'stem_features': 4,
  'small_images': True,
}
MODELS = {
  'skipinit': ResNet((1, 1), biases=True, **FIELDS),
  'batchnorm': ResNet((1, 1), method='batchnorm', **FIELDS),
  'fixup': ResNet((1, 1), method='fixup', **FIELDS),
  'scanned': ResNet((3,), True, scan=True, **FIELDS),
}
IMAGES, LABELS = normal((4, 6, 6, 1)), jnp.asarray([0, 2, 1, 2])


def bridged(model, seed=0):
  rngs = nnx.Rngs(seed, dropout=seed + 1)
  module = nnx.bridge.ToNNX(model, rngs=rngs)
  return module.lazy_init(IMAGES, train=False)


def cross_entropy(logits):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
  return losses.mean()


@nnx.jit
def train_step(model, optimizer):
  def loss(model):
    return cross_entropy(model(IMAGES, train=True, mutable=['batch_stats']))

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


@pytest.mark.sampled(2)
@pytest.mark.parametrize('name', MODELS)
def test_steps_on_nnx_are_the_steps_on_linen(name):
  model = MODELS[name]
  module, tx = bridged(model), optax.sgd(0.05, momentum=0.9)
  params, stats = pure(module, nnx.Param), pure(module, nnx.BatchStat)
  shapes = jax.eval_shape(
    lambda key: model.init(key, IMAGES, train=False), jax.random.key(0)
  )
  assert jax.tree.structure(params) == jax.tree.structure(shapes['params'])
  assert bool(stats) == (name == 'batchnorm')

  @jax.jit
  def linen_step(params, stats, opt_state):
    def loss(params):
      variables = {'params': params, 'batch_stats': stats}
      logits, new = model.apply(
        variables, IMAGES, train=True, mutable=['batch_stats']
      )
      return cross_entropy(logits), new.get('batch_stats', {})

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), stats, opt_state, value

  optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
  opt_state, start = tx.init(params), params
  for _ in range(3):
    params, stats, opt_state, expected = linen_step(params, stats, opt_state)
    got = train_step(module, optimizer)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
  assert min(flatten(moved['classifier']).values()) > 1e-3
  assert_close(pure(module, nnx.Param), params, 1e-3, 1e-5)
  assert_close(pure(module, nnx.BatchStat), stats, 1e-3, 1e-5)
  variables = {'params': params, 'batch_stats': stats}
  np.testing.assert_allclose(
    module(IMAGES, train=False),
    model.apply(variables, IMAGES, train=False),
    rtol=1e-3,
    atol=1e-4,
  )


def test_dropout_draws_from_the_stream_of_its_name():
  module = bridged(MODELS['skipinit'].clone(dropout=0.5))
  first, second = (module(IMAGES, train=True) for _ in range(2))
  assert float(jnp.abs(first - second).max()) > 1e-3
  still = [module(IMAGES, train=False) for _ in range(2)]
  np.testing.assert_array_equal(*still)


@pytest.mark.parametrize('name', ['skipinit', 'batchnorm'])
def test_a_saved_network_is_the_same_when_loaded(name, tmp_path):
  module = bridged(MODELS[name])
  optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
  train_step(module, optimizer)
  state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'state', nnx.to_pure_dict(state))

  other = bridged(MODELS[name], seed=5)
  expected = module(IMAGES, train=False)
  assert float(jnp.abs(other(IMAGES, train=False) - expected).max()) > 1e-3
  like = nnx.state(other, nnx.Any(nnx.Param, nnx.BatchStat))
  with ocp.StandardCheckpointer() as saver:
    loaded = saver.restore(tmp_path / 'state', nnx.to_pure_dict(like))
  nnx.replace_by_pure_dict(like, loaded)
  nnx.update(other, like)
  np.testing.assert_array_equal(other(IMAGES, train=False), expected)


def test_parameter_rules_know_nnx_variables():
  module = SkipInitLinear(4, 6, rngs=nnx.Rngs(0))
  state = nnx.state(module, nnx.Param)
  mask = nnx.to_pure_dict(models.decay_mask(state))
  assert mask == {'alpha': False, 'bias': False, 'kernel': True}
  tx = optax.chain(
    optax.add_decayed_weights(0.5, models.decay_mask), optax.sgd(1.0)
  )
  optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
  before = jax.tree.map(np.asarray, pure(module))
  optimizer.update(module, jax.tree.map(jnp.zeros_like, state))
  after = pure(module)
  np.testing.assert_allclose(after['kernel'], 0.5 * before['kernel'])
  np.testing.assert_array_equal(after['bias'], before['bias'])


def test_only_floating_branches_and_numbers_are_taken():
  with pytest.raises(InputError, match='floating dtype, got int32'):
    SkipInit(0.5)(jnp.arange(3))
  for make in (
    lambda value: SkipInit(value),
    lambda value: SkipInitLinear(2, 2, init_value=value, rngs=nnx.Rngs(0)),
  ):
    with pytest.raises(InputError, match=r"init_value='1/sqrt\(d\)': expected"):
      make('1/sqrt(d)')
    with pytest.raises(InputError, match=r'init_value=8: .*number of features'):
      make(8)


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [(SkipInitLinear, nnx.Linear), (SkipInitConv, nnx.Conv)],
)
def test_editors_see_the_arguments_of_the_layer(ours, theirs):
  shown = dict(inspect.signature(ours).parameters)
  assert shown.pop('init_value').default == 0.0
  assert ['self', *shown] == [*inspect.signature(theirs.__init__).parameters]

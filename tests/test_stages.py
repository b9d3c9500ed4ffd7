"""Stages: unrolled, scanned and recomputed are one network."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import normal, randomize, shapes_of

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  ResNet,
  WideResNet,
  stack_blocks,
  unstack_blocks,
)
from skipinit_jax.models.stages import group_size

SHAPE = (3, 8, 8, 2)


def network(blocks=3, **fields):
  """Stages of three blocks and of one."""
  return ResNet(
    (blocks, 1),
    num_classes=5,
    features=4,
    stem_features=4,
    small_images=True,
    **fields,
  )


def evaluate(model, variables, gradients=True):
  """Logits in training and evaluation, gradients and new statistics."""
  x = normal(SHAPE)

  def loss(variables):
    rngs = {'dropout': jax.random.key(1)}
    logits, new = model.apply(
      variables, x, train=True, rngs=rngs, mutable=['batch_stats']
    )
    weights = normal(SHAPE, 7).ravel()[: logits.size].reshape(logits.shape)
    return (logits * weights).sum(), (logits, new)

  @jax.jit
  def run(variables):
    params, stats = variables['params'], dict(variables)
    del stats['params']
    grads, out = jax.grad(lambda p: loss({**stats, 'params': p}), has_aux=True)(
      params
    )
    return grads, *out, model.apply(variables, x, train=False)

  grads, train, new, test = run(variables)
  return {'grads': grads, 'train': train, 'new': dict(new), 'test': test}


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    # Scalars' gradients cancel; those of biases before a norm are zero.
    scale = float(jnp.abs(b).max()) + 1
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale)


@functools.cache
def plain(method):
  model = network(method=method, biases=True)
  variables = randomize(model, SHAPE)
  return model, variables, evaluate(model, variables)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('method', METHODS)
def test_scanned_equals_unrolled(method):
  model, variables, expected = plain(method)
  got = evaluate(model.clone(scan=True), stack_blocks(variables))
  assert set(got['grads']['stage1']) == {'block1', 'blocks'}
  assert_equal(unstack_blocks(got), expected)
  stats = jax.tree.leaves(got['new'])
  assert bool(stats) == METHODS[method].normalize


@pytest.mark.sampled(3)
@pytest.mark.parametrize('method', METHODS)
def test_recomputed_equals_plain(method):
  model, variables, expected = plain(method)
  assert_equal(evaluate(model.clone(remat=True), variables), expected)


@pytest.mark.parametrize('method', ['skipinit', 'batchnorm'])
def test_scanned_and_recomputed_equals_plain(method):
  model, variables, expected = plain(method)
  model = model.clone(scan=True, remat=True)
  got = evaluate(model, stack_blocks(variables))
  assert_equal(unstack_blocks(got), expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('method', ['skipinit', 'batchnorm'])
def test_blocks_recomputed_by_groups_equal_plain(method):
  model = network(blocks=7, method=method)  # Six scanned: 3 groups of 2.
  variables = randomize(model, SHAPE)
  expected = evaluate(model, variables)
  model = model.clone(scan=True, remat=True)
  got = evaluate(model, stack_blocks(variables))
  assert_equal(unstack_blocks(got), expected)


def test_group_size_divides_and_is_near_the_square_root():
  assert [group_size(n) for n in (1, 2, 7, 12, 165, 1665)] == [
    1,
    1,
    1,
    3,
    11,
    37,
  ]


def test_a_scanned_network_can_be_differentiated_forward():
  model = network(scan=True)
  variables = randomize(model, SHAPE)

  def loss(params):
    logits = model.apply(
      {**variables, 'params': params}, normal(SHAPE), train=True
    )
    return (logits**2).sum()

  params = variables['params']
  rng = np.random.default_rng(3)
  v = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
  v = jax.tree.map(lambda v, x: v.astype(x.dtype), v, params)
  grads, curved = jax.jvp(jax.grad(loss), (params,), (v,))
  forward = jax.jvp(loss, (params,), (v,))[1]
  np.testing.assert_allclose(forward, optax.tree.vdot(grads, v), rtol=1e-4)
  twice = jax.grad(lambda p: optax.tree.vdot(jax.grad(loss)(p), v))(params)
  assert_equal(curved, twice)


def test_scanned_dropout_equals_unrolled():
  model, variables, without = plain('skipinit')
  model = model.clone(dropout=0.5)
  expected = model.apply(
    variables, normal(SHAPE), train=True, rngs={'dropout': jax.random.key(1)}
  )
  assert float(jnp.abs(expected - without['train']).max()) > 1e-2
  got = model.clone(scan=True, remat=True).apply(
    stack_blocks(variables),
    normal(SHAPE),
    train=True,
    rngs={'dropout': jax.random.key(1)},
  )
  assert_equal(got, expected)


def test_scanned_blocks_start_apart():
  model = network(scan=True)
  params = jax.jit(functools.partial(model.init, train=False))(
    jax.random.key(0, impl='rbg'), normal(SHAPE)
  )['params']
  kernels = np.asarray(params['stage1']['blocks']['conv1']['kernel'])
  assert kernels.shape == (2, 3, 3, 4, 4)
  assert np.abs(kernels[0] - kernels[1]).max() > 0.1
  # Each with the fan of one block, not of the stack.
  assert kernels.std() == pytest.approx((2 / 36) ** 0.5, rel=0.2)


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('scan', [False, True])
def test_parameters_of_the_other_form_are_refused_in_one_line(scan, remat):
  other = shapes_of(network(scan=not scan), SHAPE)
  model = network(scan=scan, remat=remat)
  turn = 'stack_blocks' if scan else 'unstack_blocks'
  message = f'stage1 has parameters .* expected .*scan={not scan}, or .*{turn}'
  for kwargs in ({}, {'mutable': ['intermediates']}):
    with pytest.raises(InputError, match=message) as error:
      jax.eval_shape(
        lambda v, kwargs=kwargs: model.apply(
          v, normal(SHAPE), train=True, **kwargs
        ),
        other,
      )
    assert '\n' not in str(error.value)
    assert len(str(error.value)) <= 300


def activations(model):
  """Shapes and dtypes of the images that the backward pass keeps."""
  variables = shapes_of(model, SHAPE)

  def backward(params):
    def forward(params):
      return model.apply(
        {**variables, 'params': params}, normal(SHAPE), train=True
      )

    return jax.vjp(forward, params)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, variables['params']))
  kept = [a for a in kept if a.shape[-4:-1] in ((3, 8, 8), (3, 4, 4))]
  return [(a.shape, a.dtype.name) for a in kept]


def test_remat_keeps_fewer_activations():
  plain, remat = activations(network()), activations(network(remat=True))
  # The images, the input of every block, and the final ReLU: no branch.
  assert len(remat) <= 1 + 4 + 2
  # The images, what every convolution reads, and the final ReLU: no masks.
  assert len(plain) == 1 + 2 * 4 + 1


def test_scanned_blocks_keep_what_their_convolutions_read():
  kept = activations(network(blocks=7, scan=True))
  inside = [(shape, dtype) for shape, dtype in kept if len(shape) == 5]
  assert inside == 2 * [((6, *SHAPE[:3], 4), 'float32')]
  kept = activations(network(blocks=7, scan=True, remat=True))
  inside = [(shape, dtype) for shape, dtype in kept if len(shape) == 5]
  assert inside == [((3, *SHAPE[:3], 4), 'float32')]


def test_a_scanned_program_does_not_grow_with_depth():
  def size(depth, scan):
    model = WideResNet(depth, 1, scan=scan)
    x = jnp.zeros((1, 8, 8, 1))
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    apply = functools.partial(model.apply, train=True)
    return len(jax.make_jaxpr(apply)(variables, x).eqns)

  assert size(16, True) == size(100, True)
  assert size(28, False) > size(16, False)


def test_a_stage_of_one_block_is_the_same_scanned():
  tree = shapes_of(network(scan=True), SHAPE)['params']
  assert list(tree['stage2']) == ['block1']
  assert sorted(tree['stage1']) == ['block1', 'blocks']


def numbered(blocks, make):
  stage = {f'block{i}': make(i) for i in range(1, blocks + 1)}
  # In the order in which names sort: block10 before block2.
  return {'stem': make(99), 'stage1': {k: stage[k] for k in sorted(stage)}}


@pytest.mark.parametrize('module', [np, jnp], ids=['numpy', 'jax'])
def test_stacking_and_unstacking_are_inverse(module):
  def make(i):
    return {
      'conv': {
        'kernel': module.full((2, 3), i, 'float32'),
        'alpha': module.asarray(i / 7, 'float32'),
      },
      'count': module.asarray(i, 'int32'),
    }

  tree = numbered(12, make)
  stacked = stack_blocks(tree)
  assert set(stacked['stage1']) == {'block1', 'blocks'}
  # Numeric order: the leaf of block i is row i - 2.
  counts = stacked['stage1']['blocks']['count']
  np.testing.assert_array_equal(counts, np.arange(2, 13))
  assert stacked['stage1']['blocks']['conv']['alpha'].shape == (11,)
  kind = np.ndarray if module is np else jax.Array
  assert all(isinstance(v, kind) for v in jax.tree.leaves(stacked))
  back = unstack_blocks(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('method', METHODS)
def test_the_trees_of_the_two_forms_turn_into_each_other(method):
  model = network(method=method)
  unrolled = shapes_of(model, SHAPE)
  scanned = shapes_of(model.clone(scan=True), SHAPE)
  stacked = jax.eval_shape(stack_blocks, unrolled)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scanned)
  back = jax.eval_shape(unstack_blocks, scanned)
  assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, unrolled)


def test_an_optimizer_state_is_stacked_with_its_parameters():
  variables = plain('skipinit')[1]
  params = variables['params']
  optimizer = optax.sgd(0.1, momentum=0.9)
  grads = jax.tree.map(jnp.cos, params)
  state = optimizer.update(grads, optimizer.init(params), params)[1]
  stacked = stack_blocks(flax.serialization.to_state_dict(state))
  target = optimizer.init(stack_blocks(params))
  restored = flax.serialization.from_state_dict(target, stacked)
  assert_equal(restored[0].trace, stack_blocks(grads))

"""Stage outputs against shorter networks; bodies under another classifier."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import normal, randomize

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  DenseResNet,
  ResNet,
  WideResNet,
  load_body,
  stack_blocks,
  stage_outputs,
  unstack_blocks,
)

MODELS = {
  'wide': (WideResNet(16, 1, num_classes=5), (2, 8, 8, 1)),
  'bottleneck': (
    ResNet((2, 1), True, 5, features=4, stem_features=4),
    (2, 32, 32, 3),
  ),
}


def randomized(model, shape, seed=0):
  """Variables, none of which leaves a path at zero, and images."""
  return randomize(model, shape, seed), normal(shape, seed)


def assert_trees_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def head_of(model, variables, x):
  """What a network does after its last stage, on arrays."""
  params = variables['params']
  if model.method == 'fixup':
    return x.mean((1, 2)) + params['bias2']['scalar_bias']
  if model.method == 'batchnorm':
    stats, norm = variables['batch_stats']['norm'], params['norm']
    scale = norm['scale'] / jnp.sqrt(stats['var'] + 1e-5)
    x = (x - stats['mean'].reshape(1, 1, 1, -1)) * scale.reshape(1, 1, 1, -1)
    x = x + norm['bias'].reshape(1, 1, 1, -1)
  factor = 1.7139588594436646 if model.method == 'nf' else 1.0
  return factor * jnp.maximum(x, 0).mean((1, 2))


def shorter(model, variables, stages):
  """The network of the first stages alone, and its part of the variables.

  Batch normalization's last layer is as wide as the stage, and is drawn anew.
  """
  model = model.clone(stage_sizes=model.stage_sizes[:stages], num_classes=None)
  drop = {f'stage{i}' for i in range(stages + 1, 4)} | {'classifier', 'norm'}
  kept = {
    collection: {k: v for k, v in tree.items() if k not in drop}
    for collection, tree in variables.items()
  }
  if model.method == 'batchnorm':
    width = kept['params'][f'stage{stages}']['block1']['conv2']['kernel']
    ones = jnp.linspace(0.5, 2, width.shape[-1])
    kept['params']['norm'] = {'scale': ones, 'bias': ones - 1}
    kept['batch_stats']['norm'] = {'mean': 0.1 * ones, 'var': 2 * ones}
  return model, kept


@pytest.mark.sampled(3)
@pytest.mark.parametrize('method', METHODS)
def test_stage_outputs_end_the_network_of_so_many_stages(method):
  model, shape = MODELS['wide']
  model = model.clone(method=method, biases=True)
  variables, images = randomized(model, shape)
  outputs = jax.jit(functools.partial(stage_outputs, model))(variables, images)
  assert set(outputs) == {'stem', 'stage1', 'stage2', 'stage3'}
  for stages in (1, 2, 3):
    x = outputs[f'stage{stages}']
    assert x.shape == (2, 16 // 2**stages, 16 // 2**stages, 8 * 2**stages)
    alone, kept = shorter(model, variables, stages)
    expected = jax.jit(functools.partial(alone.apply, train=False))(
      kept, images
    )
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(
      head_of(alone, kept, x), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('name', MODELS)
def test_the_streams_are_not_activated_and_the_stem_is_a_convolution(name):
  model, shape = MODELS[name]
  variables, images = randomized(model, shape)
  outputs = stage_outputs(model, variables, images)
  strides = 1 if model.small_images else 2
  stem = jax.lax.conv_general_dilated(
    images,
    variables['params']['stem']['kernel'],
    (strides, strides),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  np.testing.assert_allclose(outputs['stem'], stem, rtol=1e-5, atol=1e-5)
  for x in outputs.values():
    assert 0.1 < float((x < 0).mean()) < 0.9


def test_scanned_stages_give_the_outputs_of_unrolled_ones():
  model = WideResNet(22, 1, num_classes=None)
  variables, images = randomized(model, (2, 8, 8, 1))
  plain = stage_outputs(model, variables, images)
  stacked = {'params': stack_blocks(variables['params'])}
  for fields in ({'scan': True}, {'scan': True, 'remat': True}):
    scanned = stage_outputs(model.clone(**fields), stacked, images)
    assert list(scanned) == ['stem', 'stage1', 'stage2', 'stage3']
    for name, x in plain.items():
      np.testing.assert_allclose(scanned[name], x, rtol=1e-4, atol=1e-5)


def test_gradients_through_the_outputs_are_those_of_the_network():
  model, shape = MODELS['wide']
  variables, images = randomized(model, shape)

  def by_stages(params):
    x = stage_outputs(model, {'params': params}, images)['stage3']
    x, head = jnp.maximum(x, 0).mean((1, 2)), params['classifier']
    return jnp.square(x @ head['kernel'] + head['bias'][None]).sum()

  def by_model(params):
    y = model.apply({'params': params}, images, train=False)
    return jnp.square(y).sum()

  got = jax.jit(jax.grad(by_stages))(variables['params'])
  expected = jax.jit(jax.grad(by_model))(variables['params'])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert float(jnp.abs(b).max()) > 0
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * jnp.abs(b).max())


def test_training_mode_reads_the_statistics_of_the_batch():
  model, shape = MODELS['wide']
  model = model.clone(method='batchnorm')
  variables, images = randomized(model, shape)
  run = jax.jit(stage_outputs, static_argnums=0, static_argnames='train')
  train = run(model, variables, images, train=True)
  other = jax.tree.map(lambda x: x + 1, variables['batch_stats'])
  again = run(model, {**variables, 'batch_stats': other}, images, train=True)
  assert_trees_equal(again, train)
  still = run(model, variables, images)['stage3']
  assert float(jnp.abs(still - train['stage3']).max()) > 0.1


def test_dense_networks_and_bfloat16_have_stage_outputs_too():
  dense = DenseResNet(3, 6)
  variables, images = randomized(dense, (2, 4, 4, 1))
  outputs = stage_outputs(dense, variables, images)
  assert {k: v.shape for k, v in outputs.items()} == {
    'stem': (2, 6),
    'stage1': (2, 6),
  }
  features = dense.clone(num_classes=None).apply(variables, images, train=False)
  np.testing.assert_allclose(jnp.maximum(outputs['stage1'], 0), features)
  model, shape = MODELS['wide']
  variables, images = randomized(model, shape)
  low = stage_outputs(model.clone(dtype='bfloat16'), variables, images)
  assert {x.dtype for x in low.values()} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('fresh_scan', [False, True])
@pytest.mark.parametrize('saved_scan', [False, True])
@pytest.mark.parametrize('method', ['skipinit', 'batchnorm'])
def test_a_body_under_another_head(method, saved_scan, fresh_scan):
  model = WideResNet(22, 1, num_classes=5, method=method)
  saved, _ = randomized(model, (2, 8, 8, 1), seed=1)
  fresh, _ = randomized(model.clone(num_classes=3), (2, 8, 8, 1), seed=2)
  expected = {k: dict(v) for k, v in saved.items()}
  expected['params']['classifier'] = fresh['params']['classifier']

  def form(variables, scan):
    each = stack_blocks if scan else dict
    return {k: each(v) for k, v in variables.items()}

  loaded = load_body(form(saved, saved_scan), form(fresh, fresh_scan))
  assert_trees_equal(loaded, form(expected, fresh_scan))
  # The same of the parameters alone.
  loaded = load_body(
    form(saved, saved_scan)['params'], form(fresh, fresh_scan)['params']
  )
  assert_trees_equal(loaded, form(expected, fresh_scan)['params'])


def test_a_headless_network_and_another_dtype_take_a_body():
  model, shape = MODELS['wide']
  saved = randomized(model, shape)[0]['params']
  low = model.clone(num_classes=None, param_dtype='bfloat16')
  fresh = randomized(low, shape, seed=1)[0]['params']
  loaded = load_body(saved, fresh)
  assert 'classifier' not in loaded
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype('bfloat16')}
  expected = saved['stage2']['block1']['conv1']['kernel'].astype('bfloat16')
  got = loaded['stage2']['block1']['conv1']['kernel']
  np.testing.assert_array_equal(got, expected)
  back = load_body(loaded, saved)
  assert_trees_equal(back['classifier'], saved['classifier'])


@pytest.mark.parametrize(
  ('fields', 'path', 'shapes', 'others'),
  [
    # Two kernels in each of six blocks, and three projections.
    ({'features': 32}, 'stage1/block1/conv1/kernel', None, 14),
    (
      {'stage_sizes': (2, 3, 2)},
      'stage2/block3/conv1/kernel',
      ('absent', '(3, 3, 32, 32)'),
      2,
    ),
    (
      {'method': 'none'},
      'stage1/block1/conv2/alpha',
      ('()', 'absent'),
      5,
    ),
    ({'biases': True}, None, ('absent', None), None),
  ],
  ids=['width', 'depth', 'method', 'biases'],
)
@pytest.mark.parametrize('scan', [False, True])
def test_another_body_is_refused_by_name(fields, path, shapes, others, scan):
  model, shape = MODELS['wide']
  saved = randomized(model, shape)[0]['params']
  fresh = randomized(model.clone(**fields), shape)[0]['params']
  if scan:
    saved = stack_blocks(saved)
  with pytest.raises(InputError) as error:
    load_body(saved, fresh)
  message = str(error.value)
  assert '\n' not in message
  # Count by brute force what differs, outside the classifier.
  leaves = [
    {
      jax.tree_util.keystr(p, simple=True, separator='/'): x.shape
      for p, x in jax.tree_util.tree_leaves_with_path(unstack_blocks(tree))
    }
    for tree in (saved, fresh)
  ]
  differ = {
    p
    for p in {*leaves[0], *leaves[1]}
    if leaves[0].get(p) != leaves[1].get(p) and 'classifier' not in p
  }
  named = message.split(' is ')[0]
  assert named in differ
  assert f'; {len(differ) - 1} others differ too' in message
  if path:
    assert named == path
  if shapes and shapes[1]:
    assert f'is {shapes[0]} in the saved network and {shapes[1]}' in message
  if others is not None:
    assert len(differ) - 1 == others


def test_one_difference_has_no_others():
  params = {'stem': {'kernel': jnp.ones((3, 2))}}
  with pytest.raises(InputError, match=r'\(3, 2\).*\(3, 4\).*only$'):
    load_body(params, {'stem': {'kernel': jnp.ones((3, 4))}})


def test_stage_outputs_are_for_networks_of_this_package():
  images = jnp.ones((1, 4, 4, 1))
  with pytest.raises(InputError, match='got a value of type Dense; for other'):
    stage_outputs(nn.Dense(3), {}, images)

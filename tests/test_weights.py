"""Weights in safetensors files, and timm's against its own arithmetic."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from skipinit_jax.errors import InputError
from skipinit_jax.models import ResNet, stack_blocks
from skipinit_jax.weights import load_timm, load_weights, save_weights

# A tenth of the channels of ResNet-18 and ResNet-50, and other stage sizes.
SIZES = {False: (2, 1, 2), True: (1, 2)}
FIELDS = {
  'method': 'batchnorm',
  'symmetric_padding': True,
  'features': 6,
  'stem_features': 6,
}


def network(bottleneck, **fields):
  return ResNet(
    SIZES[bottleneck], bottleneck, **FIELDS | {'num_classes': 5} | fields
  )


def timm_weights(bottleneck, classifier=(1, 1)):
  """Random weights under the names and in the shapes of timm's ResNetV2."""
  rng = np.random.default_rng(0)
  weights = {}

  def conv(name, out, into, size):
    std = (into * size * size) ** -0.5
    weights[f'{name}.weight'] = std * rng.normal(size=(out, into, size, size))

  def norm(name, channels):
    for leaf in ('weight', 'bias', 'running_mean'):
      weights[f'{name}.{leaf}'] = rng.normal(size=channels)
    weights[f'{name}.running_var'] = rng.uniform(0.2, 2, channels)
    weights[f'{name}.num_batches_tracked'] = np.asarray(7)

  conv('stem.conv', 6, 3, 7)
  into = 6
  for s, blocks in enumerate(SIZES[bottleneck]):
    width = 6 * 2**s
    shapes = [(width, 3), (width, 3)]
    if bottleneck:
      shapes = [(width, 1), (width, 3), (4 * width, 1)]
    for b in range(blocks):
      name, before = f'stages.{s}.blocks.{b}', into
      for i, (out, size) in enumerate(shapes, start=1):
        norm(f'{name}.norm{i}', into)
        conv(f'{name}.conv{i}', out, into, size)
        into = out
      if before != into:
        conv(f'{name}.downsample.conv', into, before, 1)
  norm('norm', into)
  weights['head.fc.weight'] = rng.normal(size=(5, into, *classifier))
  weights['head.fc.bias'] = rng.normal(size=5)
  return {
    name: x if x.dtype.kind == 'i' else x.astype(np.float32)
    for name, x in weights.items()
  }


def timm_logits(weights, images):
  """What timm's ResNetV2 computes, with PyTorch's padding; float64.

  Written from its description: a 7x7 stem of stride 2 and a 3x3 max-pool of
  stride 2, padded by 3 and 1 on all sides; [norm, ReLU, conv] with the stride
  on the first 3x3; the shortcut convolves the first activation.
  """
  weights = {k: jnp.asarray(v, jnp.float64) for k, v in weights.items()}

  def conv(name, x, stride=1):
    kernel = weights[f'{name}.weight']
    pad = kernel.shape[-1] // 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), [(pad, pad)] * 2
    )

  def norm_relu(name, x):
    weight, bias, mean, var = (
      weights[f'{name}.{leaf}'][:, None, None]
      for leaf in ('weight', 'bias', 'running_mean', 'running_var')
    )
    y = (x - mean[None]) / jnp.sqrt(var[None] + 1e-5) * weight[None] + bias[
      None
    ]
    return jnp.maximum(y, 0)

  x = conv('stem.conv', jnp.asarray(images.transpose(0, 3, 1, 2)), 2)
  x = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-jnp.inf)
  rows, columns = (x.shape[2] - 3) // 2 + 1, (x.shape[3] - 3) // 2 + 1
  x = jnp.stack(
    [
      x[:, :, i : i + 2 * rows : 2, j : j + 2 * columns : 2][
        :, :, :rows, :columns
      ]
      for i in range(3)
      for j in range(3)
    ]
  ).max(0)
  blocks = sorted({n.rsplit('.', 2)[0] for n in weights if '.conv1.' in n})
  for block in blocks:
    first = block.endswith('.0') and not block.startswith('stages.0.')
    skip, stride = x, 2 if first else 1
    layers = [i for i in (1, 2, 3) if f'{block}.conv{i}.weight' in weights]
    for i in layers:
      x = norm_relu(f'{block}.norm{i}', x)
      if i == 1 and f'{block}.downsample.conv.weight' in weights:
        skip = conv(f'{block}.downsample.conv', x, stride)
      strided = weights[f'{block}.conv{i}.weight'].shape[-1] == 3
      x = conv(f'{block}.conv{i}', x, stride if strided else 1)
      stride = 1 if strided else stride
    x = x + skip
  x = norm_relu('norm', x).mean((2, 3))
  head = weights['head.fc.weight'].reshape(5, -1)
  return np.asarray(x @ head.T + weights['head.fc.bias'][None])


@pytest.mark.sampled(2)
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('bottleneck', [False, True])
def test_timm_weights_give_timm_logits(bottleneck, scan, tmp_path):
  weights = timm_weights(bottleneck)
  save_file(weights, tmp_path / 'timm.safetensors')
  sizes = {False: (49, 32), True: (24, 33)}[bottleneck]  # Odd and even.
  images = np.random.default_rng(1).normal(size=(2, *sizes, 3))
  model = network(bottleneck, scan=scan)
  variables = load_timm(tmp_path / 'timm.safetensors', model)
  ours = model.apply(variables, images.astype(np.float32), train=False)
  with jax.enable_x64(True):
    theirs = timm_logits(weights, images)
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)
  # The reason for the field: at even sizes 'SAME' pads otherwise.
  same = model.clone(symmetric_padding=False)
  other = same.apply(variables, images.astype(np.float32), train=False)
  assert np.abs(other - theirs).max() > 1e-3 * scale
  # The same leaves as a network of our own.
  wanted = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 33, 33, 3)), train=False)
  )
  jax.tree.map(lambda a, b: a.shape == b.shape or 1 / 0, variables, wanted)


def test_a_linear_classifier_and_none(tmp_path):
  path = tmp_path / 'timm.safetensors'
  weights = timm_weights(False, classifier=())
  save_file(weights, path)
  params = load_timm(path, network(False))['params']
  kernel = params['classifier']['kernel']
  np.testing.assert_array_equal(kernel, weights['head.fc.weight'].T)
  body = load_timm(path, network(False, num_classes=None))['params']
  assert params.keys() - body.keys() == {'classifier'}


def test_what_does_not_fit_is_named(tmp_path):
  path = tmp_path / 'timm.safetensors'
  weights = timm_weights(False)

  def refused(message, changes, model=None):
    changed = {k: v for k, v in (weights | changes).items() if v is not None}
    save_file(changed, path)
    with pytest.raises(InputError, match=message) as error:
      load_timm(path, model or network(False))
    assert '\n' not in str(error.value)

  refused(
    r'1 missing \(stem\.conv\.weight\); 2 unknown \(stem\.conv1\.weight, stem',
    {'stem.conv.weight': None}
    | {f'stem.conv{i}.weight': np.ones(1) for i in (1, 2)},
  )
  refused(
    r'15 unknown \(stages\.3\.a0, stages\.3\.a1, stages\.3\.a10, \.\.\.\)',
    {f'stages.3.a{i}': np.ones(1) for i in range(15)},
  )
  refused(
    r'1 other shapes \(head\.fc\.bias \(7,\) for \(5,\)\)',
    {'head.fc.bias': np.ones(7)},
  )
  refused(
    r'head\.fc\.weight \(5, 24, 1, 1\) for \(9, 24\)',
    {},
    network(False, num_classes=9),
  )
  refused(
    'symmetric_padding=False: not as in timm.*; expected True',
    {},
    network(False, symmetric_padding=False),
  )
  refused("method='skipinit': timm has", {}, network(False, method='skipinit'))
  refused(
    'biases=True: not as in timm.*; expected False',
    {},
    network(False, biases=True),
  )


def test_a_tree_comes_back_as_it_was(tmp_path):
  path = tmp_path / 'weights.safetensors'
  tree = {
    'params': {
      'stage1': {'alpha': np.float32(0.5), 'kernel': jnp.arange(6.0)},
      'half': {'kernel': jnp.linspace(0, 1, 5, dtype=jnp.bfloat16)},
      # Memory in another order than its elements.
      'turned': {'kernel': np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)},
    },
    'batch_stats': {},
  }
  save_weights(path, tree)
  loaded = load_weights(path, tree)
  assert loaded.keys() == {'params'}
  jax.tree.map(np.testing.assert_array_equal, loaded['params'], tree['params'])
  jax.tree.map(
    lambda a, b: a.dtype == b.dtype or 1 / 0, loaded['params'], tree['params']
  )
  assert load_file(path).keys() == {
    'params.stage1.alpha',
    'params.stage1.kernel',
    'params.half.kernel',
    'params.turned.kernel',
  }


def test_the_file_is_a_header_of_json_and_bytes(tmp_path):
  """Read by hand: nothing in it is pickled."""
  path = tmp_path / 'weights.safetensors'
  save_weights(path, {'params': {'kernel': np.float32([[1, 2], [3, 4]])}})
  data = path.read_bytes()
  (length,) = struct.unpack('<Q', data[:8])
  entry = json.loads(data[8 : 8 + length])['params.kernel']
  assert (entry['dtype'], entry['shape']) == ('F32', [2, 2])
  start, end = entry['data_offsets']
  values = np.frombuffer(data[8 + length :][start:end], '<f4')
  np.testing.assert_array_equal(values, [1, 2, 3, 4])


def test_another_network_is_named(tmp_path):
  path = tmp_path / 'weights.safetensors'
  model = ResNet((2,), num_classes=5, features=4, small_images=True)
  images = jnp.ones((1, 8, 8, 3))
  key = jax.random.key(0)
  variables = model.init(key, images, train=False)
  save_weights(path, variables)
  load_weights(path, variables)
  with pytest.raises(InputError, match=r'3 missing .*; 3 unknown'):
    load_weights(path, {'params': stack_blocks(variables['params']), 'x': {}})
  other = jax.eval_shape(
    lambda: model.clone(num_classes=7).init(key, images, train=False)
  )
  with pytest.raises(
    InputError,
    match=r'holds another network: 2 other shapes \(params\.classifier\.bias '
    r'\(5,\) for \(7,\), params\.classifier\.kernel',
  ):
    load_weights(path, other)


def test_what_is_no_file_of_weights(tmp_path):
  with pytest.raises(InputError, match=r'there is no file .*none'):
    load_weights(tmp_path / 'none')
  bad = tmp_path / 'bad'
  bad.write_bytes(b'\x80\x04\x95 pickled')
  with pytest.raises(InputError, match='bad is not a safetensors file'):
    load_weights(bad)
  with pytest.raises(InputError, match=r'can not write to .*nowhere'):
    save_weights(tmp_path / 'nowhere' / 'file', {'a': np.ones(1)})
  with pytest.raises(InputError, match=r"'a\.b': a name"):
    save_weights(tmp_path / 'file', {'a.b': np.ones(1)})


@pytest.mark.parametrize(
  ('tree', 'message'),
  [
    ({'layers': {0: np.ones(1)}}, r"layers\.0: the key 0 is no text; .* '0'"),
    ({'a': [np.ones(1), np.ones(1)]}, r'a: .* array, got \[array'),
    ({'a': {'b': None}}, r'a\.b: expected a NumPy or JAX array, got None'),
    ({'a': np.asarray([None])}, "a: unknown dtype 'object'"),
    ({'a': np.ones(1, 'complex128')}, "did you mean 'complex64'"),
    ({'a': jax.ShapeDtypeStruct((1,), 'float32')}, 'a: .* got ShapeDtypeStr'),
    ([np.ones(1)], 'nested dicts of arrays, got a value of type list'),
    (None, 'nested dicts of arrays, got a value of type NoneType'),
  ],
)
def test_what_is_no_tree_of_weights(tree, message, tmp_path):
  with pytest.raises(InputError, match=message) as error:
    save_weights(tmp_path / 'file', tree)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) <= 300
  assert not (tmp_path / 'file').exists()

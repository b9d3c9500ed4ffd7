"""Fixup against its authors' algorithm, written again after their paper.

Zhang, Dauphin, Ma 2019, and the networks and groups of parameters of their
code: names, order of axes (kernels are (out, in, height, width), images
(batch, channels, height, width)) and padding are theirs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.resident import Resident
from skipinit_jax.models import ResNet, WideResNet
from skipinit_jax.models.parameters import LEAVES
from skipinit_jax.training.config import default_config
from skipinit_jax.training.devices import message, replicate
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import make_program
from skipinit_jax.training.step import create_state

BLOCKS = re.compile(r'stage(\d+)/block(\d+)/(.*)')
CLASSES = 5
# Compiled without much optimization: they run a few times only.
OPTIONS = {'xla_backend_optimization_level': 0}


def their_name(path, last):
  """'stage1/block2/conv1/kernel' is their 'layer1.1.conv1.weight'."""
  if block := BLOCKS.fullmatch(path):
    stage, number, path = block.groups()
    prefix = f'layer{stage}.{int(number) - 1}.'
  else:
    prefix = ''
  renamed = {
    f'{last}/alpha': 'scale',
    'projection/kernel': 'downsample.weight',
    'stem/kernel': 'conv1.weight',
    'classifier/kernel': 'fc.weight',
    'classifier/bias': 'fc.bias',
  }
  path = path.removesuffix('/scalar_bias')
  path = renamed.get(path, path.replace('/kernel', '.weight'))
  return prefix + path


def to_theirs(params, last):
  """Our parameters under their names, with their axes."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = their_name(
      jax.tree_util.keystr(path, simple=True, separator='/'), last
    )
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(leaf.ndim, (0,) * leaf.ndim)
    named[name] = leaf.transpose(axes)
  return named


def conv(x, weight, stride=1):
  pad = weight.shape[-1] // 2
  return jax.lax.conv_general_dilated(
    x, weight, (stride,) * 2, [(pad, pad)] * 2
  )


def relu(x):
  return jnp.maximum(x, 0)


def basic_block(x, p, stride):
  out = relu(conv(x + p['bias1a'], p['conv1.weight'], stride) + p['bias1b'])
  out = conv(out + p['bias2a'], p['conv2.weight']) * p['scale'] + p['bias2b']
  identity = x
  if 'downsample.weight' in p:
    identity = conv(x + p['bias1a'], p['downsample.weight'], stride)
  elif stride != 1:  # CIFAR: pooled, and as many channels of zeros.
    identity = (x + p['bias1a'])[:, :, ::stride, ::stride]
    identity = jnp.concatenate([identity, jnp.zeros_like(identity)], 1)
  return relu(out + identity)


def bottleneck(x, p, stride):
  out = relu(conv(x + p['bias1a'], p['conv1.weight']) + p['bias1b'])
  out = relu(conv(out + p['bias2a'], p['conv2.weight'], stride) + p['bias2b'])
  out = conv(out + p['bias3a'], p['conv3.weight']) * p['scale'] + p['bias3b']
  identity = x
  if 'downsample.weight' in p:
    identity = conv(x + p['bias1a'], p['downsample.weight'], stride)
  return relu(out + identity)


def forward(p, x, layers, block, small):
  """Their logits; `layers` are the blocks of each stage."""
  x = relu(conv(x, p['conv1.weight'], 1 if small else 2) + p['bias1'])
  if not small:
    pads = ((0, 0), (0, 0), (1, 1), (1, 1))
    x = jax.lax.reduce_window(
      x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads
    )
  for stage, blocks in enumerate(layers, start=1):
    for number in range(blocks):
      prefix = f'layer{stage}.{number}.'
      own = {
        n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)
      }
      x = block(x, own, 2 if stage > 1 and number == 0 else 1)
  return (x.mean((2, 3)) + p['bias2']) @ p['fc.weight'].T + p['fc.bias'][None]


FIXUP = {'method': 'fixup', 'symmetric_padding': True}
# Network -> ours, the size of its images, their block and its last layer.
NETWORKS = {
  'cifar': (WideResNet(10, 1, CLASSES, **FIXUP), 8, basic_block, 'conv2'),
  'bottleneck': (
    ResNet((2, 1), True, CLASSES, features=8, stem_features=8, **FIXUP),
    32,
    bottleneck,
    'conv3',
  ),
}


def moved(network):
  """Parameters of one seed, every leaf moved away from where it starts."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda p: np.float32(p[0] + 0.1 * rng.normal(size=p.shape[1:])),
    start(network),
  )


@functools.cache
def start(network):
  """Our initialization for some seeds, with a leading axis of seeds."""
  model, size, *_ = NETWORKS[network]
  keys = jax.random.split(jax.random.key(0, impl='rbg'), 40)
  init = functools.partial(model.init, train=False)
  init = jax.jit(jax.vmap(init, (0, None)), compiler_options=OPTIONS)
  return jax.device_get(init(keys, jnp.zeros((1, size, size, 3)))['params'])


@pytest.mark.parametrize('network', NETWORKS)
def test_logits_are_those_of_the_authors(network):
  model, size, block, last = NETWORKS[network]
  params = moved(network)
  rng = np.random.default_rng(2)
  images = jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)
  ours = functools.partial(model.apply, train=True)
  ours = jax.jit(ours, compiler_options=OPTIONS)
  theirs = forward(
    to_theirs(params, last),
    images.transpose(0, 3, 1, 2),
    model.stage_sizes,
    block,
    model.small_images,
  )
  assert float(theirs.std()) > 0.1
  np.testing.assert_allclose(
    ours({'params': params}, images), theirs, rtol=1e-4, atol=1e-4
  )


def their_names(layers, depth, projections):
  """All parameters of their network; these blocks have projections."""
  names = {'conv1.weight', 'bias1', 'bias2', 'fc.weight', 'fc.bias'}
  for stage, blocks in enumerate(layers, start=1):
    for number in range(blocks):
      prefix = f'layer{stage}.{number}.'
      names.add(f'{prefix}scale')
      for i in range(1, depth + 1):
        names |= {prefix + n.format(i) for n in ('bias{}a', 'bias{}b')}
        names.add(f'{prefix}conv{i}.weight')
  return names | {f'{block}.downsample.weight' for block in projections}


def their_start(name, shape, branches, depth):
  """(mean, standard deviation) of a parameter by Fixup's steps 1 to 3."""
  module = name.split('.')[-2] if '.' in name else ''
  if 'bias' in name:
    return 0.0, 0.0
  if 'scale' in name:
    return 1.0, 0.0
  if module in ('fc', f'conv{depth}') and name != 'conv1.weight':
    return 0.0, 0.0
  out, _, height, width = shape
  he = (2 / (out * height * width)) ** 0.5
  inside = name.startswith('layer') and module.startswith('conv')
  return 0.0, he * branches ** (-1 / (2 * depth - 2)) if inside else he


@pytest.mark.parametrize('network', NETWORKS)
def test_parameters_start_as_the_authors_say(network):
  model, _, _, last = NETWORKS[network]
  params = start(network)
  one = to_theirs(jax.tree.map(lambda p: p[0], params), last)
  depth, branches = int(last[-1]), sum(model.stage_sizes)
  assert one.keys() == their_names(
    model.stage_sizes,
    depth,
    ('layer1.0', 'layer2.0') if network == 'bottleneck' else (),
  )
  drawn = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    name = their_name(name, last)
    mean, std = their_start(name, one[name].shape, branches, depth)
    values = np.asarray(leaf, np.float64)
    if not std:
      assert (values == mean).all(), name
      continue
    drawn += 1
    # Moments within four standard errors of a normal sample's; a truncated
    # normal of the same variance has a smaller fourth one.
    share = values / std
    n = share.size
    assert abs(share.mean()) < 4 * (1 / n) ** 0.5, name
    assert abs((share**2).mean() - 1) < 4 * (2 / n) ** 0.5, name
    assert abs((share**4).mean() - 3) < 4 * (96 / n) ** 0.5, name
  # The stem; but for its last all layers of the branches; the projections.
  assert drawn == {'cifar': 4, 'bottleneck': 9}[network]


def test_three_steps_of_training_are_those_of_the_authors():
  base, batch, l2, momentum = 0.8, 8, 0.05, 0.9
  config = default_config()
  config.batch_size, config.epochs = batch, 10.0
  config.model.depth, config.model.width = 10, 1
  config.model.method, config.model.symmetric_padding = 'fixup', True
  config.optimizer.learning_rate, config.optimizer.reference_batch = base, 128
  config.optimizer.momentum, config.optimizer.l2 = momentum, l2
  config.optimizer.decay = (*LEAVES,)  # They decay everything.
  config.schedule.name = 'constant'
  rng = np.random.default_rng(0)
  # All images in every batch, so that their order does not matter.
  pixels = rng.integers(0, 256, (batch, 8, 8, 3), np.uint8)
  labels = rng.integers(0, CLASSES, batch)
  augmentation = Augmentation(CLASSES, np.full(3, 127.0), np.full(3, 74.0))
  data = Resident('toy', pixels, labels, pixels, labels, augmentation)
  program = make_program(config, data)
  params = moved('cifar')
  rate = peak_rate(config)
  state = create_state({'params': params}, program.tx, rate=rate, seed=0)
  state = replicate(state)
  inputs, _ = next(data.inputs(replicate, config, 0))

  images = augmentation.normalize(pixels).transpose(0, 3, 1, 2)

  def loss(p):
    logits = forward(p, images, (1, 1, 1), basic_block, True)
    return -jax.nn.log_softmax(logits)[np.arange(batch), labels].mean()

  gradient = jax.jit(jax.grad(loss), compiler_options=OPTIONS)
  theirs = jax.device_get(to_theirs(params, 'conv2'))
  first, buffers = theirs, {n: np.zeros_like(v) for n, v in theirs.items()}
  for _ in range(3):
    state, _ = program.train_step(state, inputs, message(), 1)
    grads, new = jax.device_get(gradient(theirs)), {}
    for name, p in theirs.items():
      reduced = 'bias' in name or 'scale' in name
      lr = base / 10 if reduced else base * batch / 128
      buffers[name] = momentum * buffers[name] + grads[name] + l2 * p
      new[name] = p - lr * buffers[name]
    theirs = new
  ours = to_theirs(jax.device_get(state.params), 'conv2')
  assert ours.keys() == theirs.keys()
  for name, p in theirs.items():
    change = p - first[name]
    assert np.abs(change).max() > 1e-3, name
    tolerance = 1e-3 * np.abs(change).max()
    np.testing.assert_allclose(
      ours[name] - first[name], change, 1e-3, tolerance, err_msg=name
    )


def test_dropout_comes_before_the_last_bias():
  model = ResNet((1,), False, 2, features=4, stem_features=4, **FIXUP)
  model, images = model.clone(dropout=0.5), jnp.ones((4, 4, 4, 1))
  params = jax.tree.map(
    lambda p: jnp.zeros(p.shape),
    jax.eval_shape(
      functools.partial(model.init, train=False), jax.random.key(0), images
    )['params'],
  )
  params['bias2']['scalar_bias'] += 3
  params['classifier']['kernel'] += 1
  rngs = {'dropout': jax.random.key(0)}
  logits = model.apply({'params': params}, images, train=True, rngs=rngs)
  # Four features, all of them 0 before the bias.
  np.testing.assert_array_equal(logits, 3.0 * 4)

"""The two families of networks under every method."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import flatten, normal, randomize, shapes_of

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  RESNETS,
  DenseResNet,
  Join,
  ResNet,
  ResNet18,
  ResNet50,
  WideResNet,
)
from skipinit_jax.models.resnet import drop_by_example

FAMILIES = {
  'wide': (WideResNet(10, 1, num_classes=5), (4, 8, 8, 1)),
  'basic': (
    ResNet((2, 1), num_classes=5, features=4, stem_features=4),
    (4, 32, 32, 3),
  ),
  'bottleneck': (
    ResNet((2, 1), True, num_classes=5, features=4, stem_features=4),
    (4, 32, 32, 3),
  ),
}
NETWORKS = [(family, method) for family in FAMILIES for method in METHODS]


def compiled(model, f):
  """Eager, batch normalization compiles dozens of programs for each shape."""
  return jax.jit(f) if model.method == 'batchnorm' else f


def gradients(model, variables, x, seed=9):
  """Gradients of a random linear function of the logits in training."""

  def loss(params):
    y, _ = model.apply(
      {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
    )
    return (y * normal(y.shape, seed)).sum()

  return flatten(compiled(model, jax.grad(loss))(variables['params']))


@pytest.mark.sampled(7)
@pytest.mark.parametrize(('family', 'method'), NETWORKS)
def test_networks_start_with_finite_float32_logits(family, method):
  model, shape = FAMILIES[family]
  model, x = model.clone(method=method), normal(shape)
  variables = model.init(jax.random.key(0, impl='rbg'), x, train=False)
  params = variables['params']
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  expected = shapes_of(model, shape)['params']
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  for dtype in (None, 'bfloat16'):
    seen = []

    def record(call, args, kwargs, context, seen=seen):
      if isinstance(context.module, Join):
        seen.append(args[1].dtype)
      return call(*args, **kwargs)

    with nn.intercept_methods(record):
      apply = functools.partial(model.clone(dtype=dtype).apply, train=False)
      logits = compiled(model, apply)(variables, x)
    assert set(seen) == {jnp.dtype(dtype or 'float32')}
    assert logits.dtype == jnp.float32
    assert logits.shape == (4, 5)
    assert np.isfinite(logits).all()
    assert np.asarray(logits).any() == (method != 'fixup')


@pytest.mark.sampled(7)
@pytest.mark.parametrize(('family', 'method'), NETWORKS)
def test_every_parameter_reaches_the_logits(family, method):
  model, shape = FAMILIES[family]
  model = model.clone(method=method)
  grads = gradients(model, randomize(model, shape), normal(shape))
  dead = [p for p, g in grads.items() if not np.abs(g).max() > 1e-6]
  assert not dead
  assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize('family', FAMILIES)
def test_at_alpha_zero_the_branches_wait_for_alpha(family):
  model, shape = FAMILIES[family]
  model = model.clone(biases=True)
  variables = randomize(model, shape)
  variables['params'] = jax.tree_util.tree_map_with_path(
    lambda path, v: v * 0 if path[-1].key == 'alpha' else v,
    variables['params'],
  )
  grads = gradients(model, variables, normal(shape))
  inside = {p for p in grads if '/conv' in p and not p.endswith('alpha')}
  assert len(inside) == model.num_blocks * (6 if model.bottleneck else 4)
  for path, grad in grads.items():
    assert grad.any() == (path not in inside), path


@pytest.mark.parametrize('family', FAMILIES)
def test_at_its_start_fixup_trains_the_classifier_then_the_last_kernels(family):
  model, shape = FAMILIES[family]
  model = model.clone(method='fixup')
  last = 'conv3' if model.bottleneck else 'conv2'
  drawn, x = randomize(model, shape)['params'], normal(shape)

  def start(zeros):
    """Kernels as drawn but for `zeros`, scalars as Fixup starts them."""

    def value(path, leaf):
      module, name = path[-2].key, path[-1].key
      if name == 'alpha':
        return jnp.ones_like(leaf)
      return leaf * (name == 'kernel' and module not in zeros)

    return {'params': jax.tree_util.tree_map_with_path(value, drawn)}

  grads = gradients(model, start({'classifier', last}), x)
  alive = {path for path, grad in grads.items() if grad.any()}
  assert alive == {'classifier/kernel', 'classifier/bias'}

  # With a classifier, gradients stop at the zero kernels of the branches.
  expected = {p for p in grads if '/block' not in p or '/projection/' in p}
  width = model.features * (4 if model.bottleneck else 1)
  for i, n in enumerate(model.stage_sizes, start=1):
    for j in range(1, n + 1):
      block = f'stage{i}/block{j}'
      expected |= {
        f'{block}/{last}/kernel',
        f'{block}/bias{last[-1]}b/scalar_bias',
      }
      # The input's bias also reaches the shortcut where the shape changes.
      if j == 1 and (i > 1 or width != model.stem_features):
        expected.add(f'{block}/bias1a/scalar_bias')
  grads = gradients(model, start({last}), x)
  assert {path for path, grad in grads.items() if grad.any()} == expected


@pytest.mark.parametrize('method', METHODS)
def test_biases_and_dropout_go_with_every_method(method):
  plain = ResNet((1, 1), num_classes=5, method=method, features=4)
  model = plain.clone(biases=True, dropout=0.5)
  shape = (3, 16, 16, 2)
  variables = randomize(model, shape)
  added = set(flatten(variables['params']))
  added -= set(flatten(shapes_of(plain, shape)['params']))
  biases = {
    f'stage{s}/block1/{conv}/bias'
    for s in (1, 2)
    for conv in ('conv1', 'conv2', 'projection')
  }
  # Standardized kernels always have them.
  assert added == (set() if METHODS[method].standardize else biases)
  x = normal(shape)

  def train(seed, model=model):
    key = jax.random.key(seed)
    logits, _ = model.apply(
      variables, x, train=True, rngs={'dropout': key}, mutable=['batch_stats']
    )
    return np.asarray(logits)

  np.testing.assert_array_equal(train(0), train(0))
  assert np.abs(train(0) - train(1)).max() > 1e-2
  # At evaluation there is no Dropout, and no key is needed.
  logits = model.apply(variables, x, train=False)
  np.testing.assert_array_equal(
    logits, model.clone(dropout=0.0).apply(variables, x, train=False)
  )
  # Every bias counts, but where batch normalization takes it out again. Kernels
  # of mean 0 pass little of what is equal at all places.
  least = 1e-4 if METHODS[method].standardize else 1e-3
  for path in biases:
    moved = jax.tree_util.tree_map_with_path(
      lambda p, v, path=path: (
        v + (jax.tree_util.keystr(p, simple=True, separator='/') == path)
      ),
      variables['params'],
    )
    other = model.apply({**variables, 'params': moved}, x, train=False)
    assert np.abs(other - logits).max() > least, path


def test_jit_computes_what_eager_does():
  model, shape = FAMILIES['wide']
  variables, x = randomize(model, shape), normal(shape)
  apply = functools.partial(model.apply, train=True)
  np.testing.assert_allclose(
    jax.jit(apply)(variables, x), apply(variables, x), rtol=1e-4, atol=1e-5
  )


# Parameters and structure.


def sizes(model, shape=(1, 32, 32, 3)):
  shapes = flatten(shapes_of(model, shape)['params'])
  return {path: leaf.size for path, leaf in shapes.items()}


def test_skipinit_resnet50_has_the_published_number_of_parameters():
  model = ResNet50(num_classes=1000, method='skipinit', biases=True)
  assert sum(sizes(model).values()) == 25_530_424


# torchvision's counts for the same sizes, V1 with batch normalization.
TORCHVISION = {
  18: 11_689_512,
  34: 21_797_672,
  50: 25_557_032,
  101: 44_549_160,
  152: 60_192_808,
}


@pytest.mark.parametrize('depth', RESNETS)
def test_resnets_have_the_kernels_of_their_depth(depth):
  model = RESNETS[depth](method='none')
  model = model.clone(scan=True)
  shapes = flatten(shapes_of(model, (1, 32, 32, 3))['params'])
  # Weighted layers on the path: stem, convolutions of branches, classifier.
  convs = sum(
    v.shape[0] if 'blocks' in p else 1
    for p, v in shapes.items()
    if 'conv' in p and 'kernel' in p
  )
  assert convs + 2 == depth
  assert model.num_classes == 1000
  if depth not in TORCHVISION:
    return
  # V1 normalizes after every convolution: two numbers a channel.
  channels, inner = 64, (3 if model.bottleneck else 2)
  for i, n in enumerate(model.stage_sizes):
    width = 64 * 2**i
    out = width * (4 if model.bottleneck else 1)
    channels += n * ((inner - 1) * width + out)
    channels += out if i or model.bottleneck else 0  # The projection.
  expected = TORCHVISION[depth] - 2 * channels
  assert sum(v.size for v in shapes.values()) == expected


def test_batchnorm_resnet50_normalizes_before_every_convolution():
  model = ResNet50(method='batchnorm')
  channels = 0
  for i, n in enumerate((3, 4, 6, 3)):
    width = 64 * 2**i
    inputs = (2 * width if i else 64) + (n - 1) * 4 * width
    channels += inputs + n * 2 * width
  channels += 2048
  variables = shapes_of(model, (1, 32, 32, 3))
  stats = sum(v.size for v in jax.tree.leaves(variables['batch_stats']))
  assert stats == 2 * channels == 45_440
  plain = sum(sizes(ResNet50(method='none')).values())
  assert sum(sizes(model).values()) == plain + 2 * channels


def wide_resnet_size(n, k, classes, colors):
  """Kernels, classifier and alphas of an n-block-a-stage Wide-ResNet."""
  total, channels = 9 * colors * 16, 16
  for width in (16 * k, 32 * k, 64 * k):
    if channels != width:
      total += channels * width
    total += 9 * channels * width + 9 * width * width
    total += (n - 1) * 2 * 9 * width * width + n
    channels = width
  return total + channels * classes + classes


@pytest.mark.parametrize(
  ('depth', 'width', 'blocks_a_stage'),
  [(10, 1, 1), (16, 4, 2), (28, 10, 4), (40, 2, 6), (1000, 2, 166)],
)
def test_wide_resnets_have_6n_and_4_layers(depth, width, blocks_a_stage):
  model = WideResNet(depth, width, num_classes=7, scan=True)
  assert model.stage_sizes == (blocks_a_stage,) * 3
  assert model.num_blocks == 3 * blocks_a_stage
  found = sizes(model, (1, 8, 8, 3))
  expected = wide_resnet_size(blocks_a_stage, width, 7, 3)
  assert sum(found.values()) == expected
  assert sum(s for p, s in found.items() if 'alpha' in p) == model.num_blocks


def test_unrolled_depth_100_has_numbered_blocks():
  params = shapes_of(WideResNet(100, 1), (1, 8, 8, 1))['params']
  assert set(params) == {'stem', 'stage1', 'stage2', 'stage3', 'classifier'}
  for i in (1, 2, 3):
    names = [f'block{j}' for j in range(1, 17)]
    assert sorted(params[f'stage{i}']) == sorted(names)


def test_only_blocks_that_change_the_shape_project():
  def projecting(model):
    return sorted(
      p for p in sizes(model) if 'projection' in p and 'kernel' in p
    )

  assert len(projecting(ResNet((2, 2), features=64))) == 1
  assert len(projecting(ResNet((2, 2), True))) == 2
  assert len(projecting(WideResNet(16, 1))) == 2
  assert len(projecting(WideResNet(16, 2))) == 3
  assert not projecting(WideResNet(16, 2, method='fixup'))
  assert len(projecting(ResNet((2, 2), True, method='fixup'))) == 2


def test_without_classes_the_features_come_back():
  model, shape = FAMILIES['wide']
  variables, x = randomize(model, shape), normal(shape)
  headless = model.clone(num_classes=None)
  features = headless.apply(variables, x, train=False)
  assert features.shape == (4, 64)
  # The mean over the pixels is taken in float32.
  low = headless.clone(dtype='bfloat16').apply(variables, x, train=False)
  assert low.dtype == jnp.float32
  head = variables['params']['classifier']
  np.testing.assert_allclose(
    features @ head['kernel'] + head['bias'][None],
    model.apply(variables, x, train=False),
    rtol=1e-4,
    atol=1e-5,
  )


# Bad input.


@pytest.mark.parametrize(
  ('depth', 'message'),
  [
    (99, 'depth=99 .* 6n.4; nearest: 94 or 100'),
    (4, 'depth=4 .* nearest: 10$'),
    (0, 'depth=0 .* nearest: 10$'),
    (-2, 'depth=-2 .* nearest: 10$'),
  ],
)
def test_a_depth_that_is_not_6n_and_4_is_refused(depth, message):
  with pytest.raises(InputError, match=message):
    WideResNet(depth)


@pytest.mark.parametrize('width', [0, -1])
def test_a_width_below_one_is_refused(width):
  with pytest.raises(InputError, match=f'width={width} .*1 or more'):
    WideResNet(16, width)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'message'),
  [
    ((8, 8, 1), 'float32', r'got float32 of shape \(8, 8, 1\)'),
    ((2, 3, 8, 8, 1), 'float32', r'got float32 of shape \(2, 3, 8, 8, 1\)'),
    ((2, 8, 8, 1), 'uint8', r'must be floating .*got uint8'),
    ((2, 8, 8, 1), 'int32', r'must be floating .*got int32'),
    ((2, 0, 0, 1), 'float32', r'no axis empty, got float32 of shape \(2, 0, 0'),
    ((0, 8, 8, 1), 'float32', r'no axis empty, got float32 of shape \(0, 8, 8'),
    ((2, 3, 32, 32), 'float32', r'\(2, 3, 32, 32\): their channels come first'),
    ((2, 1, 9, 9), 'bfloat16', r'\(2, 1, 9, 9\): their channels come first'),
  ],
)
def test_images_of_wrong_rank_or_dtype_are_refused(shape, dtype, message):
  init = functools.partial(WideResNet(10, 1).init, train=False)
  x = jax.ShapeDtypeStruct(shape, dtype)
  with pytest.raises(InputError, match=message):
    jax.eval_shape(init, jax.random.key(0), x)


@pytest.mark.parametrize('method', ['skipinit', 'batchnorm'])
def test_no_images_and_no_arrays_are_refused_by_both_families(method):
  for model, of in (
    (ResNet((1,), method=method), 'images'),
    (DenseResNet(1, 3, method=method), 'inputs'),
  ):
    for x, got in (
      (np.ones((0, 8, 8, 1), np.float32), r'float32 of shape \(0, 8, 8, 1\)'),
      ([[[[0.5]]]], 'a value of type list'),
    ):
      with pytest.raises(InputError, match=f'{of} must be floating .*{got}'):
        model.init(jax.random.key(0), x, train=True)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ResNet(18), 'stage_sizes=18: expected a whole number of blocks'),
    (lambda: ResNet((2.0, 2.0)), r'stage_sizes=\(2.0, 2.0\): expected a whole'),
    (lambda: ResNet((2, 0)), r'stage_sizes=\(2, 0\): expected a whole number'),
    (lambda: ResNet(()), r'stage_sizes=\(\): expected a whole number'),
    (lambda: ResNet((1,), 10), 'bottleneck=10: expected True or False'),
    (lambda: ResNet((1,), 1), 'bottleneck=1: expected True or False'),
    (lambda: ResNet18('none'), "num_classes='none' must be a whole number"),
    (lambda: ResNet18(True), 'num_classes=True must be a whole number'),
    (lambda: ResNet18(2.6), 'num_classes=2.6 must be .*; nearest: 3'),
    (lambda: ResNet((1,), features=1.5), 'features=1.5 must be a whole number'),
    (lambda: ResNet((1,), features=None), 'features=None must be a whole'),
    (lambda: WideResNet(10, 1.5), 'width=1.5 must be a whole .*; nearest: 2'),
    (lambda: WideResNet('10'), "depth='10' of a Wide-ResNet must be a whole"),
    (lambda: WideResNet(10.0), 'depth=10.0 of a Wide-ResNet must be a whole'),
    (lambda: ResNet((1,), statistics_group=-2), 'statistics_group=-2 must be'),
    (lambda: ResNet((1,), statistics_group=0), 'statistics_group=0 must be'),
    (lambda: ResNet((1,), dtype='foo'), "unknown dtype 'foo'.*float32"),
    (lambda: ResNet((1,), dtype='bflaot16'), "did you mean 'bfloat16'"),
    (lambda: ResNet((1,), dtype='int32'), "unknown dtype 'int32'"),
    (lambda: ResNet((1,), param_dtype=[1]), r'unknown param_dtype \(1,\)'),
    (lambda: DenseResNet(1, 2, dtype='foo'), "unknown dtype 'foo'"),
    (lambda: DenseResNet(1.0, 2), 'blocks=1.0 must be .*; nearest: 1'),
    (lambda: DenseResNet(1, None), 'width=None must be a whole number'),
  ],
)
def test_arguments_of_the_wrong_kind_are_one_line(make, message):
  with pytest.raises(InputError, match=message) as error:
    shapes_of(make(), (2, 8, 8, 1))
  assert '\n' not in str(error.value)
  assert len(str(error.value)) <= 300


@pytest.mark.parametrize('depth', RESNETS)
def test_the_first_argument_of_a_resnet_is_its_classes(depth):
  for model in (RESNETS[depth](1), RESNETS[depth](num_classes=1)):
    assert model.num_classes == 1
    assert model.bottleneck is (depth >= 50)
    assert len(model.stage_sizes) == 4
  fields = {'method': 'fixup', 'features': 8}
  assert RESNETS[depth](7, **fields).method == 'fixup'
  assert RESNETS[depth](None).num_classes is None


# The same networks from the papers, on arrays alone.


def conv(x, p, strides=1):
  kernel = p['kernel']
  if 'gain' in p:
    fan_in = np.prod(kernel.shape[:3])
    kernel -= kernel.mean((0, 1, 2), keepdims=True)
    scale = jnp.maximum(fan_in * kernel.var((0, 1, 2)), 1e-4) ** -0.5
    kernel *= (p['gain'] * scale)[None, None, None]
  y = jax.lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return y + p['bias'][None, None, None] if 'bias' in p else y


def relu(x):
  return jnp.maximum(x, 0)


def normalize(x, p, stats):
  """Batch normalization at evaluation, or nothing."""
  if p is None:
    return x
  p, stats = (
    {k: v[None, None, None] for k, v in t.items()} for t in (p, stats)
  )
  x = (x - stats['mean']) / jnp.sqrt(stats['var'] + 1e-5)
  return x * p['scale'] + p['bias']


def preactivation_block(x, p, stats, strides, bottleneck, gain, beta):
  """gain * (skip + alpha * branch(relu(norm(x)))), He et al. 2016.

  With beta, that of Brock, De, Smith 2021.
  """
  if beta is not None:
    return normalizer_free_block(x, p, strides, bottleneck, beta)
  h = relu(normalize(x, p.get('norm1'), stats.get('norm1')))
  skip = conv(h, p['projection'], strides) if 'projection' in p else x
  if bottleneck:
    h = conv(h, p['conv1'])
    h = relu(normalize(h, p.get('norm2'), stats.get('norm2')))
    h = conv(h, p['conv2'], strides)
    h = relu(normalize(h, p.get('norm3'), stats.get('norm3')))
    h, last = conv(h, p['conv3']), p['conv3']
  else:
    h = conv(h, p['conv1'], strides)
    h = relu(normalize(h, p.get('norm2'), stats.get('norm2')))
    h, last = conv(h, p['conv2']), p['conv2']
  return gain * (skip + last.get('alpha', 1.0) * h)


def gamma_relu(x):
  return relu(x) * 1.7139588594436646


def normalizer_free_block(x, p, strides, bottleneck, beta):
  """skip + 0.2 * alpha * branch(beta * relu(x)), Brock, De, Smith 2021."""
  h = gamma_relu(x) * beta
  skip = conv(h, p['projection'], strides) if 'projection' in p else x
  if bottleneck:
    h = gamma_relu(conv(h, p['conv1']))
    h = conv(gamma_relu(conv(h, p['conv2'], strides)), last := p['conv3'])
  else:
    h = conv(gamma_relu(conv(h, p['conv1'], strides)), last := p['conv2'])
  return skip + 0.2 * last['alpha'] * h


def fixup_block(x, p, strides, bottleneck, pooled):
  """relu(skip + alpha * conv(...) + b), Zhang, Dauphin, Ma 2019."""
  b = {k: v['scalar_bias'] for k, v in p.items() if k.startswith('bias')}
  first = x + b['bias1a']
  if bottleneck:
    h = relu(conv(first, p['conv1']) + b['bias1b'])
    h = relu(conv(h + b['bias2a'], p['conv2'], strides) + b['bias2b'])
    h = p['conv3']['alpha'] * conv(h + b['bias3a'], p['conv3']) + b['bias3b']
  else:
    h = relu(conv(first, p['conv1'], strides) + b['bias1b'])
    h = p['conv2']['alpha'] * conv(h + b['bias2a'], p['conv2']) + b['bias2b']
  skip = x
  if 'projection' in p:
    skip = conv(first, p['projection'], strides)
  elif pooled and skip.shape != h.shape:
    # Average pooling with a window of one pixel, then channels of zeros.
    skip = jax.lax.reduce_window(
      first, 0.0, jax.lax.add, (1, 1, 1, 1), (1, strides, strides, 1), 'VALID'
    )
    missing = h.shape[-1] - skip.shape[-1]
    zeros = jnp.zeros((*skip.shape[:3], missing))
    skip = jnp.concatenate([skip, zeros], -1)
  return relu(skip + h)


def by_hand(model, variables, x):
  """Logits of `model` at evaluation, without the package's blocks."""
  params, stats = variables['params'], variables.get('batch_stats', {})
  fixup = model.method == 'fixup'
  gain = 0.5**0.5 if model.method == 'divide_sqrt2' else 1.0
  nf, std = model.method == 'nf', 1.0
  x = conv(x, params['stem'], 1 if model.small_images else 2)
  if fixup:
    x = relu(x + params['bias1']['scalar_bias'])
  if not model.small_images:
    x = jax.lax.reduce_window(
      x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME'
    )
  for i, n in enumerate(model.stage_sizes, start=1):
    for j in range(1, n + 1):
      p = params[f'stage{i}'][f'block{j}']
      strides = 2 if (i > 1 and j == 1) else 1
      if fixup:
        x = fixup_block(x, p, strides, model.bottleneck, model.small_images)
      else:
        s = stats.get(f'stage{i}', {}).get(f'block{j}', {})
        beta = 1 / std if nf else None
        std = ((1.0 if j == 1 else std) ** 2 + 0.2**2) ** 0.5
        x = preactivation_block(x, p, s, strides, model.bottleneck, gain, beta)
  if fixup:
    x = x.mean((1, 2)) + params['bias2']['scalar_bias']
  else:
    x = normalize(x, params.get('norm'), stats.get('norm'))
    x = (gamma_relu if nf else relu)(x).mean((1, 2))
  head = params['classifier']
  return x @ head['kernel'] + head['bias'][None]


BY_HAND = [
  ('wide', {'biases': True}, (3, 8, 8, 1)),
  ('basic', {'biases': True}, (2, 32, 32, 3)),
  ('bottleneck', {'biases': True}, (2, 33, 33, 3)),
]


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('family', 'fields', 'shape'), BY_HAND)
def test_logits_equal_an_implementation_on_arrays(
  family, fields, shape, method
):
  # Fixup has no bias vectors in its own networks.
  fields = {} if method == 'fixup' else fields
  model = FAMILIES[family][0].clone(method=method, **fields)
  variables, x = randomize(model, shape), normal(shape, 4)
  logits = compiled(model, functools.partial(model.apply, train=False))(
    variables, x
  )
  reference = functools.partial(by_hand, model)
  expected = compiled(model, reference)(variables, x)
  assert float(expected.std()) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# Dropout by example.


def test_cutting_a_batch_changes_no_dropout_mask():
  key, x = jax.random.key(3), normal((8, 30))
  whole = drop_by_example(key, x, 0.4, 0)
  parts = [drop_by_example(key, x[i : i + 2], 0.4, i) for i in (0, 2, 4, 6)]
  np.testing.assert_array_equal(whole, np.concatenate(parts))
  # By example: no two have the same mask; another key has others.
  masks = np.asarray(whole) != 0
  assert len({m.tobytes() for m in masks}) == 8
  other = np.asarray(drop_by_example(jax.random.key(4), x, 0.4, 0)) != 0
  assert (masks != other).any(1).all()


def test_dropout_drops_its_rate_and_keeps_the_mean():
  x = jnp.full((500, 64), 2.0)
  y = np.asarray(drop_by_example(jax.random.key(0), x, 0.3, 0))
  kept = y != 0
  np.testing.assert_allclose(y[kept], 2 / 0.7, rtol=1e-6)
  # Four standard errors of a share of .7 among 32,000.
  assert kept.mean() == pytest.approx(0.7, abs=4 * (0.21 / 32_000) ** 0.5)
  per_feature = kept.mean(0)
  assert np.abs(per_feature - 0.7).max() < 5 * (0.21 / 500) ** 0.5


def dropping(shape):
  """A small network with Dropout as train(x, first_example), and its images."""
  model = ResNet(
    (1,), num_classes=5, features=4, small_images=True, dropout=0.5
  )
  variables, x = randomize(model, shape), normal(shape)

  def train(x, first):
    rngs = {'dropout': jax.random.key(0)}
    return model.apply(variables, x, train=True, rngs=rngs, first_example=first)

  return train, x


def test_a_network_cut_into_micro_batches_gives_the_same_logits():
  train, x = dropping((6, 8, 8, 1))
  whole = train(x, 0)
  parts = np.concatenate([train(x[i : i + 3], i) for i in (0, 3)])
  np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
  wrong = np.concatenate([train(x[i : i + 3], 0) for i in (0, 3)])
  assert np.abs(whole[3:] - wrong[3:]).max() > 1e-2


def test_under_vmap_dropout_is_told_which_example_it_has():
  train, x = dropping((4, 4, 4, 1))
  each = jax.vmap(lambda image, i: train(image[None], i)[0])
  whole = train(x, 0)
  np.testing.assert_allclose(each(x, jnp.arange(4)), whole, 1e-4, 1e-5)
  # All with the mask of the first, as the documentation warns.
  same = np.abs(each(x, jnp.zeros(4, int)) - whole).max(1)
  assert same[0] < 1e-5
  assert same[1:].max() > 1e-2


def test_training_without_dropout_needs_no_key():
  model, shape = ResNet((1,), num_classes=2, features=4), (2, 8, 8, 1)
  variables, x = randomize(model, shape), normal(shape)
  train = model.apply(variables, x, train=True)
  np.testing.assert_array_equal(train, model.apply(variables, x, train=False))
  with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
    model.clone(dropout=0.1).apply(variables, x, train=True)


# Transformations.


@pytest.mark.sampled(1)
@pytest.mark.parametrize('method', ['skipinit', 'fixup'])
def test_per_example_gradients_average_to_the_batch_gradient(method):
  # 4x4, so that the product for 2x2 images is mapped too.
  model = ResNet(
    (1, 1),
    num_classes=5,
    method=method,
    features=4,
    stem_features=4,
    small_images=True,
  )
  shape = (4, 4, 4, 1)
  params, x = randomize(model, shape)['params'], normal(shape)
  labels = jnp.asarray([0, 3, 1, 4])

  def loss(params, x, labels):
    logits = model.apply({'params': params}, x, train=True)
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), labels[:, None], axis=1
    )
    return -picked.mean()

  batch = flatten(jax.grad(loss)(params, x, labels))
  each = jax.vmap(jax.grad(loss), (None, 0, 0))(
    params, x[:, None], labels[:, None]
  )
  for path, grads in flatten(each).items():
    assert grads.shape[0] == 4
    scale = np.abs(grads).max()
    assert grads.std(0).max() > 1e-3 * scale
    np.testing.assert_allclose(
      grads.mean(0), batch[path], rtol=1e-3, atol=2e-5 * scale, err_msg=path
    )

"""Normalizer-free networks: their definition, variances, forms and folding."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import flatten, normal, randomize, small_resnet

from skipinit_jax.analysis.capture import capture, second_moment
from skipinit_jax.analysis.propagation import expected
from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  Join,
  Method,
  ResNet,
  WideResNet,
  decay_mask,
  stack_blocks,
  unstack_blocks,
)
from skipinit_jax.models.activations import scaled_relu
from skipinit_jax.models.fold import fold, fold_params
from skipinit_jax.models.methods import resolve_method
from skipinit_jax.models.standardization import StandardizedConv, standardize

SHAPE = (3, 8, 8, 3)


def assert_close(got, want, tolerance=1e-4):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = float(np.abs(b).max()) + 1e-3
    np.testing.assert_allclose(a, b, atol=tolerance * scale)


@functools.cache
def network(**fields):
  model = small_resnet((3, 2), 'nf', **fields)
  return model, randomize(model, SHAPE)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, x):
  return model.apply({'params': params}, x, train=False)


# The definition, in numpy and float64.


def conv(x, p, stride=1):
  w, size = p['kernel'], p['kernel'].shape[0]
  w = w - w.mean((0, 1, 2))
  fan_in = size * size * w.shape[2]
  w = w * p['gain'] / np.sqrt(np.maximum(fan_in * w.var((0, 1, 2)), 1e-4))
  out = -(-x.shape[1] // stride)
  missing = max((out - 1) * stride + size - x.shape[1], 0)
  sides = (missing // 2, missing - missing // 2)
  x = np.pad(x, ((0, 0), sides, sides, (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  windows = windows[:, ::stride, ::stride]
  return np.einsum('bhwcij,ijco->bhwo', windows, w) + p['bias']


def act(x):
  return 1.7139588594436646 * np.maximum(x, 0)


def block(x, p, stride, beta):
  h = act(x) * beta
  skip = conv(h, p['projection'], stride) if 'projection' in p else x
  if 'conv3' in p:
    h = act(conv(h, p['conv1']))
    h = act(conv(h, p['conv2'], stride))
    last = p['conv3']
  else:
    h, last = act(conv(h, p['conv1'], stride)), p['conv2']
  return 0.2 * last['alpha'] * conv(h, last) + skip


def by_hand(model, params, x):
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  x = conv(np.asarray(x, np.float64), params['stem'])
  variance = 1.0
  for i, size in enumerate(model.stage_sizes, start=1):
    for j in range(1, size + 1):
      stride = 2 if i > 1 and j == 1 else 1
      p = params[f'stage{i}'][f'block{j}']
      x = block(x, p, stride, variance**-0.5)
      variance = 1.04 if j == 1 else variance + 0.04
  head = params['classifier']
  return act(x).mean((1, 2)) @ head['kernel'] + head['bias']


@pytest.mark.parametrize('bottleneck', [False, True])
def test_computes_what_its_authors_do(bottleneck):
  model, variables = network(bottleneck=bottleneck)
  x = normal(SHAPE, 1)
  want = by_hand(model, variables['params'], x)
  assert want.std() > 0.05
  got = logits_of(model, variables['params'], x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_betas_are_one_over_the_expected_standard_deviations():
  first, second, third = METHODS['nf'].betas((3, 2, 1))
  for found, variances in (
    (first, [1, 1.04, 1.08]),
    (second, [1.12, 1.04]),
    (third, [1.08]),
  ):
    np.testing.assert_allclose(np.square(found), 1 / np.array(variances))
  assert METHODS['skipinit'].betas((3, 2)) == [None, None]


def test_kernels_are_standardized_by_output_channel():
  kernel = 3 + 5 * normal((3, 3, 4, 6))
  gain = jnp.linspace(0.5, 3, 6)
  got = np.asarray(standardize(kernel, gain), np.float64)
  np.testing.assert_allclose(got.mean((0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(36 * got.var((0, 1, 2)), gain**2, rtol=1e-4)
  # The floor is on the variance of the output: kernels of 1e-3 / sqrt(fan-in).
  small = np.asarray(standardize((kernel - 3) / 5 * 1e-3 / 6, gain))
  unit = (kernel - 3) / 5
  unit = (unit - unit.mean((0, 1, 2), keepdims=True)) / 6
  np.testing.assert_allclose(small, 0.1 * unit * gain[None, None, None], 1e-4)
  # Stacked by a scan, each by itself.
  stack = jnp.stack([kernel, 2 * kernel[::-1]])
  for one, two in zip(
    standardize(stack, jnp.stack([gain, gain])),
    (got, standardize(kernel[::-1], gain)),
    strict=True,
  ):
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_standardizing_is_not_done_in_bfloat16():
  x = normal((2, 8, 8, 16))
  layer = StandardizedConv(8, (3, 3), use_bias=False)
  params = layer.init(jax.random.key(0), x)
  params = jax.tree.map(lambda v: v + 1, params)  # Its mean is not small.
  params['params']['gain'] = jnp.ones(8)
  want = layer.apply(params, x)
  got = layer.clone(dtype='bfloat16').apply(params, x)
  assert got.dtype == jnp.bfloat16
  assert_close(got.astype('float32'), want, 0.02)


def test_parameters_start_as_its_authors_say():
  model = ResNet((2, 1), True, num_classes=500, method='nf', features=8)
  x = jnp.zeros((1, 32, 32, 3))
  key = jax.random.key(0, impl='rbg')
  init = jax.jit(functools.partial(model.init, train=False))
  params = init(key, x)['params']
  leaves = flatten(params)
  for path, leaf in leaves.items():
    name = path.split('/')[-1]
    if name in ('gain', 'bias', 'alpha'):
      assert (np.asarray(leaf) == (1 if name == 'gain' else 0)).all(), path
  classifier = np.asarray(leaves['classifier/kernel'])
  assert classifier.std() == pytest.approx(0.01, rel=0.05)
  stem = np.asarray(leaves['stem/kernel'])
  assert stem.var() * 147 == pytest.approx(1, rel=0.1)
  assert {'stem/bias', 'stage1/block1/projection/bias'} <= set(leaves)
  decays = {path for path, yes in flatten(decay_mask(params)).items() if yes}
  assert decays == {path for path in leaves if path.endswith('/kernel')}


# The claim: the variance is known everywhere.


def circular(x, kernel, strides, padding, *, symmetric, **options):
  """A convolution without borders, whose zeros the theory does not know."""
  sides = (kernel.shape[0] // 2,) * 2
  x = jnp.pad(x, ((0, 0), sides, sides, (0, 0)), mode='wrap')
  return jax.lax.conv_general_dilated(x, kernel, strides, 'VALID', **options)


def measured(depth, monkeypatch):
  """Second moments of every block's output and branch, and their theory's."""
  monkeypatch.setattr('skipinit_jax.models.layers.convolve', circular)
  model = WideResNet(depth, 2, method='nf', alpha=1.0, scan=True)
  images = normal((2, 16, 16, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0, impl='rbg'), images[:1])
  captured = capture(model, variables, images)
  theory = expected(resolve_method('nf', 1.0), model.stage_sizes)
  size = model.stage_sizes[0]
  stage = 1 + 0.04 * np.arange(1, size + 1)
  np.testing.assert_allclose(theory['output'], np.tile(stage, 3))
  np.testing.assert_allclose(theory['branch'], 0.04)
  return captured, theory


def test_the_variance_of_every_block_is_the_expected_one(monkeypatch):
  """At depth 100 the last block of a stage has 1.64, a plain one 2^16."""
  captured, theory = measured(100, monkeypatch)
  for path, tolerance in (('output', 0.15), ('branch', 0.3)):
    np.testing.assert_allclose(
      second_moment(captured, path), theory[path], rtol=tolerance
    )


@pytest.mark.slow
def test_also_at_a_thousand_layers(monkeypatch):
  """There the last block of a stage has 7.64."""
  captured, theory = measured(1000, monkeypatch)
  np.testing.assert_allclose(
    second_moment(captured, 'output'), theory['output'], rtol=0.3
  )


def test_the_activation_keeps_the_variance():
  x = normal((200_000,))
  assert float(scaled_relu(x).var()) == pytest.approx(1, rel=0.02)
  got = scaled_relu(x.astype(jnp.bfloat16)).astype(jnp.float32)
  np.testing.assert_allclose(got, scaled_relu(x), rtol=0.01)


# Forms of one network.


def outcome(model, variables, x):
  """Logits, and the gradient of a function of them."""

  def loss(params):
    logits = model.apply({'params': params}, x, train=True)
    weights = jnp.linspace(-1, 1, logits.size).reshape(logits.shape)
    return (logits * weights).sum(), logits

  grads, logits = jax.grad(loss, has_aux=True)(variables['params'])
  return {'grads': grads, 'logits': logits}


@pytest.mark.sampled(1)
@pytest.mark.parametrize('sizes', [(3, 2), (7, 1)])
def test_scanned_and_recomputed_networks_are_the_same(sizes):
  model = small_resnet(sizes, 'nf')
  variables, x = randomize(model, SHAPE), normal(SHAPE, 1)
  run = jax.jit(outcome, static_argnums=0)
  want = run(model, variables, x)
  assert_close(run(model.clone(remat=True), variables, x), want)
  for remat in (False, True):
    scanned = model.clone(scan=True, remat=remat)
    got = run(scanned, stack_blocks(variables), x)
    assert_close(unstack_blocks(got), want)


def test_a_scan_starts_every_block_apart_with_the_leaves_of_an_unrolled_one():
  model, variables = network()
  init = functools.partial(model.clone(scan=True).init, train=False)
  drawn = jax.jit(init)(jax.random.key(0), normal(SHAPE))
  kernels = drawn['params']['stage1']['blocks']['conv1']['kernel']
  assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.1
  shapes = jax.tree.map(jnp.shape, unstack_blocks(drawn))
  assert shapes == jax.tree.map(jnp.shape, variables)


def test_in_bfloat16_it_is_almost_the_same():
  model, variables = network()
  params, x = variables['params'], normal(SHAPE, 1)
  want = logits_of(model, params, x)
  got = logits_of(model.clone(dtype='bfloat16'), params, x)
  assert got.dtype == jnp.float32
  assert_close(got, want, 0.05)


# Folding.


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'scan': True},
    {'bottleneck': True, 'scan': True},
    {'alpha': 'none'},
    {'num_classes': None},
  ],
)
def test_a_folded_network_is_plain_and_the_same(fields):
  model = small_resnet((3, 2), 'nf').clone(**fields)
  params = randomize(model, SHAPE)['params']
  plain, folded = fold(model, params)
  assert plain.method == METHODS['none']
  names = {path.split('/')[-1] for path in flatten(folded)}
  assert names == {'kernel', 'bias'}
  shapes = jax.eval_shape(
    functools.partial(plain.init, train=False), jax.random.key(0), normal(SHAPE)
  )
  assert flatten(shapes['params']).keys() == flatten(folded).keys()
  x = normal(SHAPE, 1)
  want = logits_of(model, params, x)
  assert_close(logits_of(plain, folded, x), want, 1e-5)


def test_a_body_of_one_stage_without_projection_folds_too():
  """The last activation's factor goes into the stem."""
  model = small_resnet((2,), 'nf', symmetric_padding=True)
  params = randomize(model, SHAPE)['params']
  assert 'projection' not in params['stage1']['block1']
  x = normal(SHAPE, 1)
  plain, folded = fold(model, params)
  want = logits_of(model, params, x)
  assert_close(logits_of(plain, folded, x), want, 1e-5)


def test_a_standardized_layer_alone_does_not_fold():
  layer = {name: np.ones((1, 1, 1, 1)) for name in ('alpha', 'gain', 'kernel')}
  with pytest.raises(InputError, match=r"'conv2' has a gain, .*fold\(model"):
    fold_params({'conv2': layer})


# Gradients.


def test_the_gradient_of_alpha_is_the_branch_without_it():
  """<dL/dbranch, 0.2 conv(h)>, though the scalar is folded into the kernel."""
  model, variables = network()
  x, inside = normal(SHAPE, 1), {}

  def loss(params, moves):
    def move(call, args, kwargs, context):
      if isinstance(context.module, Join):
        skip, branch = args
        name = '/'.join(context.module.path[:-1])
        inside[name] = branch
        args = skip, branch + moves.get(name, 0.0)
      return call(*args, **kwargs)

    with nn.intercept_methods(move):
      logits = model.apply({'params': params}, x, train=True)
    return (logits * jnp.linspace(-1, 1, logits.size).reshape(3, 5)).sum()

  params = variables['params']

  @jax.jit
  def branches_of(params):
    loss(params, {})
    return dict(inside)

  branches = branches_of(params)
  assert len(branches) == 5
  zeros = jax.tree.map(jnp.zeros_like, branches)
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  grads, of_branches = gradient(params, zeros)
  for name, branch in branches.items():
    stage, block = name.split('/')
    alpha = params[stage][block]['conv2']['alpha']
    # The branch is 0.2 alpha conv(h).
    want = float(jnp.vdot(of_branches[name], branch / alpha))
    got = float(grads[stage][block]['conv2']['alpha'])
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4), name


def test_at_its_start_every_block_is_the_identity_and_only_alpha_moves():
  model = small_resnet((3,), 'nf')
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), normal(SHAPE))
  run = jax.jit(outcome, static_argnums=0)
  grads = run(model, variables, normal(SHAPE, 1))['grads']
  for path, grad in flatten(grads['stage1']).items():
    assert bool(np.asarray(grad).any()) == path.endswith('alpha'), path


def test_gradients_of_examples_under_vmap_are_those_of_each():
  model, variables = network()
  x = normal(SHAPE, 1)

  def gradient(image):
    def loss(params):
      logits = model.apply({'params': params}, image[None], train=True)
      return jax.nn.logsumexp(logits) - logits[0, 0]

    return jax.grad(loss)(variables['params'])

  every = jax.jit(jax.vmap(gradient))(x)
  one = jax.jit(gradient)
  for i, image in enumerate(x):
    assert_close(jax.tree.map(lambda g, i=i: g[i], every), one(image))


# What can not be.

NF = METHODS['nf']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'activation': 'crelu'}, "activation='crelu' with standardize=True"),
    (
      {'activation': 'crelu', 'kernel_init': 'looks_linear'},
      "activation='crelu' with standardize=True",
    ),
    ({'kernel_init': 'looks_linear'}, "kernel_init='looks_linear' mirrors"),
    ({'skip': False}, 'skip=False with standardize=True'),
    ({'skip': False, 'alpha': 1.0}, 'skip=False with standardize=True'),
    *(
      (
        {'method': dataclasses.replace(NF, **{name: True})},
        f'{name}=True with standardize=True.* expected {name}=False',
      )
      for name in (
        'normalize',
        'fixup_block',
        'scalar_biases',
        'rescale',
        'zero_last',
      )
    ),
    (
      {'method': dataclasses.replace(NF, gain=0.5)},
      r'gain=0\.5 with standardize=True.* expected gain=1',
    ),
    (
      {'method': dataclasses.replace(NF, branch_scale=0.0)},
      r'branch_scale=0\.0: expected a positive',
    ),
    (
      {'method': dataclasses.replace(NF, branch_scale='x')},
      'branch_scale=.*: expected a positive',
    ),
    (
      {'method': Method(branch_scale=0.2)},
      r'branch_scale=0\.2 is for standardize=True',
    ),
  ],
)
def test_choices_that_exclude_each_other_are_one_line(fields, message):
  fields = {'method': 'nf', **fields}
  model = ResNet((1,), num_classes=2, **fields)
  with pytest.raises(InputError, match=message) as error:
    jax.eval_shape(
      functools.partial(model.init, train=False),
      jax.random.key(0),
      jnp.zeros((1, 8, 8, 3)),
    )
  assert '\n' not in str(error.value)

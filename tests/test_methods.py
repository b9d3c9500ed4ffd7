"""What the methods say, and their initialization against theory."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import flatten

from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  DenseResNet,
  Join,
  Method,
  ResNet,
  WideResNet,
  fixup_kernel_init,
  he_normal,
)
from skipinit_jax.models.methods import resolve_method


def leaves(params, name):
  """Path (joined by '/') -> value of the leaves called `name`."""
  return {
    path: np.asarray(leaf)
    for path, leaf in flatten(params).items()
    if path.split('/')[-1] == name
  }


def initialize(model, shape, seed=0):
  # rbg compiles in a third of threefry's time.
  key = jax.random.key(seed, impl='rbg')
  return model.init(key, jnp.zeros(shape), train=False)


def assert_std(values, expected):
  """Within four standard errors of a normal sample's standard deviation."""
  error = 4 / math.sqrt(2 * values.size)
  assert values.std() == pytest.approx(expected, rel=error)
  assert abs(values.mean()) < 4 * expected / math.sqrt(values.size)


def test_the_six_methods():
  assert list(METHODS) == [
    'batchnorm',
    'skipinit',
    'fixup',
    'divide_sqrt2',
    'nf',
    'none',
  ]
  assert [n for n, m in METHODS.items() if m.normalize] == ['batchnorm']
  assert METHODS['skipinit'].alpha == 0
  assert METHODS['fixup'].alpha == 1


def test_a_method_of_ones_own_is_taken_as_it_is():
  method = dataclasses.replace(METHODS['none'], alpha=0.75, zero_last=True)
  model = ResNet((1,), num_classes=2, method=method, features=4)
  params = initialize(model, (1, 8, 8, 1))['params']['stage1']['block1']
  assert float(params['conv2']['alpha']) == 0.75
  assert not np.asarray(params['conv2']['kernel']).any()
  assert np.asarray(params['conv1']['kernel']).any()


@pytest.mark.parametrize(
  ('method', 'alpha', 'message'),
  [
    ('skipint', None, r"unknown method 'skipint'; did you mean 'skipinit'\?"),
    ('none', 0.5, "alpha=0.5 was given, but method 'none' .*skipinit or fixup"),
    ('batchnorm', '1/sqrt(d)', "method 'batchnorm' has no such scalar"),
    (METHODS['none'], 0.0, 'this method has no such scalar'),
    ('skipinit', '1/sqrt', r"alpha='1/sqrt': .*'1/sqrt\(d\)'"),
    ('skipinit', float('nan'), 'finite number'),
    ('skipinit', 'inf', 'finite number'),
    ('skipinit', [1], r'alpha=\(1,\): expected a finite number'),
    ('skipinit', np.ones((9, 9)), 'alpha=array.*: expected a finite number'),
    (['skipinit'], None, r"unknown method .*; did you mean 'skipinit'"),
    ('fixup', 0, 'alpha=0 with zero_last=True: .*expected another alpha'),
    ('fixup', '0.0', "alpha='0.0' with zero_last=True"),
    (Method(alpha=0.0, zero_last=True), None, 'alpha=0.0 with zero_last=True'),
    (Method(scalar_biases=True), None, 'scalar_biases=True is for fixup_block'),
  ],
)
def test_a_wrong_method_or_alpha_is_one_line(method, alpha, message):
  fields = {'method': method, 'alpha': alpha}
  for model in (WideResNet(10, 1, **fields), DenseResNet(2, 3, **fields)):
    with pytest.raises(InputError, match=message) as error:
      jax.eval_shape(
        functools.partial(model.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
      )
    assert '\n' not in str(error.value)
    assert len(str(error.value)) <= 300


def test_an_alpha_of_zero_is_for_last_kernels_that_are_not():
  for method in (
    dataclasses.replace(METHODS['fixup'], alpha=0, zero_last=False),
    dataclasses.replace(METHODS['fixup'], alpha=None),
    dataclasses.replace(METHODS['fixup'], alpha=0.1),
  ):
    model = ResNet((1,), num_classes=2, method=method, features=4)
    jax.eval_shape(
      functools.partial(model.init, train=False),
      jax.random.key(0),
      jnp.zeros((1, 8, 8, 1)),
    )


@pytest.mark.parametrize(
  ('alpha', 'expected'),
  [(None, 0.0), (1, 1.0), (0.3, 0.3), ('0.3', 0.3), ('1/sqrt(d)', 498**-0.5)],
)
def test_alpha_value_in_a_network_of_depth_1000(alpha, expected):
  method = resolve_method('skipinit', alpha)
  blocks = WideResNet(1000, 2).num_blocks
  assert method.alpha_value(blocks) == pytest.approx(expected, rel=1e-12)
  assert METHODS['skipinit'].alpha == 0  # The table is not changed.


@pytest.mark.parametrize(
  ('alpha', 'expected'), [(None, 0.0), (0.3, 0.3), ('1/sqrt(d)', 3**-0.5)]
)
def test_every_branch_of_a_network_starts_at_alpha(alpha, expected):
  model = ResNet((1, 2), num_classes=2, alpha=alpha, features=4)
  alphas = leaves(initialize(model, (1, 8, 8, 1))['params'], 'alpha')
  assert sorted(alphas) == [
    f'{block}/conv2/alpha'
    for block in ('stage1/block1', 'stage2/block1', 'stage2/block2')
  ]
  for value in alphas.values():
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_kernels_start_as_he_says():
  params = initialize(WideResNet(10, 2), (1, 8, 8, 3))['params']
  kernels = leaves(params, 'kernel')
  assert len(kernels) == 1 + 3 * 3 + 1  # Every block projects at width 2.
  for kernel in kernels.values():
    fan_in = math.prod(kernel.shape[:-1])
    assert_std(kernel, math.sqrt(2 / fan_in))
  assert not any(b.any() for b in leaves(params, 'bias').values())


@pytest.mark.parametrize('fan', ['fan_in', 'fan_out'])
def test_he_normal_is_normal_with_variance_two_over_fan(fan):
  shape = (3, 3, 8, 64)
  values = np.asarray(he_normal(fan)(jax.random.key(0), shape, 'float32'))
  std = math.sqrt(2 / (9 * {'fan_in': 8, 'fan_out': 64}[fan]))
  assert_std(values, std)
  # Not truncated: 1.24 % of a normal lie beyond 2.5 standard deviations.
  assert np.mean(np.abs(values) > 2.5 * std) == pytest.approx(0.0124, rel=0.4)


def test_fixup_kernel_init_follows_the_rule():
  shape = (3, 3, 16, 32)
  for branches, layers in ((16, 2), (16, 3), (54, 4)):
    init = fixup_kernel_init(branches, layers)
    values = np.asarray(init(jax.random.key(1), shape, 'float32'))
    rule = branches ** (-1 / (2 * layers - 2))
    assert_std(values, math.sqrt(2 / (9 * 32)) * rule)
  for branches, layers in ((0, 2), (3, 1)):
    with pytest.raises(InputError, match=f'num_branches={branches}'):
      fixup_kernel_init(branches, layers)


@pytest.mark.parametrize('method', METHODS)
def test_the_classifier_starts_as_told(method):
  def classifier(init):
    model = ResNet(
      (1,), num_classes=7, method=method, features=64, classifier_init=init
    )
    return initialize(model, (1, 8, 8, 1))['params']['classifier']

  default = classifier(None)
  assert not np.asarray(default['bias']).any()
  if method == 'fixup':
    assert not np.asarray(default['kernel']).any()
    assert_std(np.asarray(classifier(he_normal())['kernel']), (2 / 64) ** 0.5)
  else:
    std = 0.01 if method == 'nf' else (2 / 64) ** 0.5
    assert_std(np.asarray(default['kernel']), std)
    zero = classifier(nn.initializers.zeros)
    assert not np.asarray(zero['kernel']).any()


BLOCKS = 4


@functools.cache
def stream(method, alpha=None):
  """Second moments of skip, branch and sum at every join, mean of 4 networks.

  One stage of equal channels, and only pixels that no padding reaches: what
  the theory speaks of.
  """
  model = ResNet(
    (BLOCKS,),
    num_classes=2,
    method=method,
    alpha=alpha,
    features=32,
    stem_features=32,
    small_images=True,
  )
  size = 2 * (1 + 2 * BLOCKS) + 6
  moments, exact = [], []

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if isinstance(context.module, Join):
      center = slice(1 + 2 * BLOCKS, -1 - 2 * BLOCKS)
      three = (*args, out)
      cut = [np.asarray(a)[:, center, center] for a in three]
      moments.append([np.square(a, dtype='float64').mean() for a in cut])
      exact.append(np.array_equal(args[0], out))
    return out

  for seed in range(4):
    variables = initialize(model, (1, size, size, 3), seed)
    images = np.random.default_rng(seed).standard_normal((4, size, size, 3))
    with nn.intercept_methods(record):
      model.apply(
        variables,
        jnp.asarray(images, 'float32'),
        train=True,
        mutable=['batch_stats'],
      )
  skip, branch, out = np.reshape(moments, (4, BLOCKS, 3)).mean(0).T
  return skip, branch, out, all(exact)


def test_without_normalization_variance_doubles_with_every_block():
  skip, branch, out, _ = stream('none')
  np.testing.assert_allclose(branch / skip, 1, rtol=0.3)
  assert (out[-1] / skip[0]) ** (1 / BLOCKS) == pytest.approx(2, rel=0.08)


def test_dividing_by_sqrt2_keeps_the_variance():
  skip, _, out, _ = stream('divide_sqrt2')
  assert (out[-1] / skip[0]) ** (1 / BLOCKS) == pytest.approx(1, rel=0.08)


def test_one_over_sqrt_d_multiplies_variance_by_one_and_one_over_d():
  skip, branch, out, _ = stream('skipinit', '1/sqrt(d)')
  np.testing.assert_allclose(branch / skip, 1 / BLOCKS, rtol=0.3)
  growth = 1 + 1 / BLOCKS
  assert (out[-1] / skip[0]) ** (1 / BLOCKS) == pytest.approx(growth, rel=0.04)


def test_alpha_zero_makes_every_block_the_identity():
  assert stream('skipinit')[3]
  assert not stream('none')[3]


def test_normalized_branches_have_variance_one_so_the_stream_grows_by_one():
  skip, branch, out, _ = stream('batchnorm')
  np.testing.assert_allclose(branch, 1, rtol=0.3)
  assert (out[-1] - skip[0]) / BLOCKS == pytest.approx(1, rel=0.15)


def test_fixup_branches_start_at_zero():
  _, branch, out, _ = stream('fixup')
  assert not branch.any()
  assert out.all()

"""Captured statistics, effective depth and path lengths, against theory."""

import functools
import itertools
import math
import xml.etree.ElementTree as ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.analysis import propagation
from skipinit_jax.analysis.capture import capture, second_moment
from skipinit_jax.analysis.propagation import (
  effective_depth,
  expected,
  path_lengths,
)
from skipinit_jax.errors import InputError
from skipinit_jax.models import (
  METHODS,
  DenseResNet,
  Join,
  ResNet,
  SkipInit,
  SkipInitDense,
  WideResNet,
  stack_blocks,
)
from skipinit_jax.models.methods import resolve_method

WIDTH, BLOCKS = 1024, 8
# Of the mean growth by a block: each multiplies Var(branch), half of the
# output, by two means over WIDTH units of relative variance 5 / WIDTH.
GROWTH_ERROR = 4 * math.sqrt(2 * 5 / WIDTH / BLOCKS) / 2


def normal(shape, seed=0, dtype='float32'):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def initialize(model, x, seed=0):
  key = jax.random.key(seed, impl='rbg')
  return model.init(key, x, train=False)


@functools.cache
def dense(method, alpha=None):
  x = normal((64, WIDTH))
  model = DenseResNet(BLOCKS, WIDTH, None, method, alpha)
  return capture(model, initialize(model, x), x)


def growth(captured):
  total = second_moment(captured, 'output')[-1]
  return (total / second_moment(captured, 'skip')[0]) ** (1 / BLOCKS)


def test_without_normalization_variance_doubles_with_every_block():
  captured = dense('none')
  assert growth(captured) == pytest.approx(2, rel=GROWTH_ERROR)
  np.testing.assert_allclose(captured['share'], 0.5, atol=0.12)
  assert effective_depth(captured['share']) == pytest.approx(
    BLOCKS / 2, rel=0.1
  )


def test_one_over_sqrt_d_multiplies_variance_by_one_and_one_over_d():
  captured = dense('skipinit', '1/sqrt(d)')
  assert growth(captured) == pytest.approx(1 + 1 / BLOCKS, rel=0.05)
  share = 1 / (BLOCKS + 1)
  np.testing.assert_allclose(captured['share'], share, rtol=0.3)
  np.testing.assert_allclose(
    captured['unscaled_variance'], captured['branch_variance'] * BLOCKS, 1e-4
  )


def test_with_batch_normalization_variance_grows_by_one_a_block():
  captured = dense('batchnorm')
  start = second_moment(captured, 'skip')[0]
  blocks = np.arange(1, BLOCKS + 1)
  np.testing.assert_allclose(
    second_moment(captured, 'output'), start + blocks, rtol=0.06
  )
  np.testing.assert_allclose(captured['share'], 1 / (start + blocks), rtol=0.15)


def test_skipinit_at_zero_keeps_everything():
  captured = dense('skipinit')
  for name in ('variance', 'squared_mean'):
    every = captured[f'output_{name}'], captured[f'skip_{name}']
    assert len(np.unique(every)) == 1
  assert not captured['branch_variance'].any()
  assert not captured['share'].any()
  assert np.isnan(captured['unscaled_variance']).all()
  assert (path_lengths(captured['share']) == [1] + [0] * BLOCKS).all()


@pytest.mark.parametrize('method', ['none', 'batchnorm'])
def test_variance_over_the_images_follows_the_arc_cosine_kernel(method):
  """The part of the second moment that differs between images, in theory.

  A ReLU layer of He's gain takes the correlation r of two inputs to k(r) (Cho &
  Saul 2009): k(k(r)) after two, k(0) after a layer that is normalized.
  """

  def k(r):
    return (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / math.pi

  captured = dense(method)
  apart = {
    path: captured[f'{path}_variance'] / second_moment(captured, path)
    for path in ('skip', 'branch', 'output')
  }
  lost = 1 - 1 / 64  # Of the variance among 64 images.
  for i in range(BLOCKS):
    r = 0.0 if method == 'batchnorm' else k(1 - apart['skip'][i] / lost)
    theory = (1 - k(r)) * lost
    assert apart['branch'][i] == pytest.approx(theory, rel=0.2), i
  # Far from 1, so that this is not the second moment.
  assert apart['output'][-1] < {'none': 0.4, 'batchnorm': 0.8}[method]


def test_the_count_restarts_where_a_stage_begins():
  model = WideResNet(28, 4, method='batchnorm')
  images = normal((4, 32, 32, 3))
  captured = capture(model, initialize(model, images), images)
  shares = captured['share'].reshape(3, 4)
  theory = np.broadcast_to([[1 / 2, 1 / 3, 1 / 4, 1 / 5]], (3, 4))
  np.testing.assert_allclose(shares, theory, rtol=0.2)
  never = 1 / np.arange(2, 14)
  assert abs(shares.sum() - theory.sum()) < 0.1 * abs(
    shares.sum() - never.sum()
  )
  want = expected(METHODS['batchnorm'], model.stage_sizes)
  np.testing.assert_allclose(want['share'], theory.ravel())


def test_theory_is_that_of_the_paper():
  d, blocks = 48, np.arange(1, 49)
  none = expected(METHODS['none'], (16, 16, 16))
  np.testing.assert_allclose(none['output'], 2.0**blocks)
  root = expected(resolve_method('skipinit', '1/sqrt(d)'), (16, 16, 16))
  np.testing.assert_allclose(root['output'], (1 + 1 / d) ** blocks)
  zero = expected(METHODS['skipinit'], (16, 16, 16), start=3.0)
  np.testing.assert_allclose(zero['output'], 3.0)
  norm = expected(METHODS['batchnorm'], (16, 16, 16))
  np.testing.assert_allclose(norm['output'].reshape(3, 16)[1], 1 + blocks[:16])
  halved = expected(METHODS['divide_sqrt2'], (16, 16, 16))
  np.testing.assert_allclose(halved['output'], 1.0)
  first = expected(METHODS['batchnorm'], (2, 1), start=2.0, project_first=False)
  np.testing.assert_allclose(first['share'], [1 / 3, 1 / 4, 1 / 2])
  with pytest.raises(InputError, match="Fixup's block"):
    expected(METHODS['fixup'], (1,))


@pytest.mark.parametrize('sizes', [(2,) * 3, (166,) * 3, (3, 4, 6, 3)])
def test_effective_depth_in_theory(sizes):
  d = sum(sizes)
  harmonic = sum(sum(1 / k for k in range(2, n + 2)) for n in sizes)
  for method, alpha, depth in (
    ('batchnorm', None, harmonic),
    ('none', None, d / 2),
    ('skipinit', '1/sqrt(d)', d / (d + 1)),
    ('skipinit', None, 0),
  ):
    theory = expected(resolve_method(method, alpha), sizes)
    assert effective_depth(theory['share']) == pytest.approx(depth)


def test_path_lengths_equal_those_of_all_subsets():
  shares = np.random.default_rng(0).uniform(size=9)
  chances = np.zeros(10)
  for path in itertools.product((0, 1), repeat=9):
    chances[sum(path)] += np.prod(np.where(path, shares, 1 - shares))
  np.testing.assert_allclose(path_lengths(shares), chances, rtol=1e-12)


def test_path_lengths_of_half_shares_are_binomial():
  """Veit et al. 2016: 95% of 54 blocks' paths have a length of 19 to 35."""
  chances = path_lengths(np.full(54, 0.5))
  theory = [math.comb(54, k) / 2**54 for k in range(55)]
  np.testing.assert_allclose(chances, theory, rtol=1e-12)
  assert chances[19:36].sum() > 0.95 > chances[21:34].sum()


def test_path_lengths_are_stable_for_498_blocks():
  for shares in (np.full(498, 0.5), expected(METHODS['batchnorm'], [166] * 3)):
    shares = shares['share'] if isinstance(shares, dict) else shares
    chances = path_lengths(shares)
    lengths = np.arange(499)
    assert (chances >= 0).all()
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    mean = (chances * lengths).sum()
    assert mean == pytest.approx(effective_depth(shares), rel=1e-10)
    variance = (chances * (lengths - mean) ** 2).sum()
    assert variance == pytest.approx((shares * (1 - shares)).sum(), rel=1e-8)


@pytest.mark.parametrize('bad', [1.5, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(bad):
  for function in (effective_depth, path_lengths):
    with pytest.raises(InputError, match=f'share {bad}: .* from 0 to 1'):
      function(np.array([0.5, bad]))


SMALL = functools.partial(
  ResNet,
  (3, 2),
  num_classes=3,
  features=4,
  stem_features=4,
  small_images=True,
)


def randomized(model, x):
  shapes = jax.eval_shape(functools.partial(initialize, model), x)
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    value = 0.4 * rng.standard_normal(leaf.shape)
    if path[-1].key in ('var', 'scale', 'alpha'):
      value = 0.5 + np.abs(value)
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('method', METHODS)
def test_captures_what_numpy_says_scanned_or_not(method):
  model, images = SMALL(method=method), normal((3, 8, 8, 2))
  variables = randomized(model, images)
  joins = []

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if isinstance(context.module, Join):
      joins.append([np.asarray(a, 'float64') for a in (*args, out)])
    return out

  with nn.intercept_methods(record):
    model.apply(variables, images, train=True, mutable=['batch_stats'])
  captured = capture(model, variables, images)
  names = [f'stage1/block{i}' for i in (1, 2, 3)]
  assert [*captured['name']] == [*names, 'stage2/block1', 'stage2/block2']
  for i, arrays in enumerate(joins):
    moments = {}
    for path, a in zip(('skip', 'branch', 'output'), arrays, strict=True):
      channels = a.reshape(-1, a.shape[-1])
      variance, mean2 = channels.var(0).mean(), (channels.mean(0) ** 2).mean()
      moments[path] = np.mean(a**2)
      for name, value in (('variance', variance), ('squared_mean', mean2)):
        got = captured[f'{path}_{name}'][i]
        assert got == pytest.approx(value, rel=1e-4), (path, name)
      assert second_moment(captured, path)[i] == pytest.approx(
        moments[path], rel=1e-4
      )
    share = moments['branch'] / (moments['branch'] + moments['skip'])
    assert captured['share'][i] == pytest.approx(share, rel=1e-4)

  scanned = capture(model.clone(scan=True), stack_blocks(variables), images)
  assert list(scanned) == list(captured)
  for name, values in captured.items():
    if name == 'name':
      assert (scanned[name] == values).all()
    else:
      assert scanned[name].shape == values.shape
      np.testing.assert_allclose(scanned[name], values, rtol=1e-3, err_msg=name)


def test_the_branch_before_its_scalar():
  model, images = SMALL(method='skipinit'), normal((3, 8, 8, 2))
  variables = randomized(model, images)
  captured = capture(model, variables, images)
  assert (captured['alpha'] != 1).all()
  ones = jax.tree_util.tree_map_with_path(
    lambda path, v: jnp.ones_like(v) if path[-1].key == 'alpha' else v,
    variables,
  )
  # Only the first block has the same input in both.
  first = capture(model, ones, images)
  assert captured['unscaled_variance'][0] == pytest.approx(
    first['branch_variance'][0], rel=1e-4
  )
  assert (first['alpha'] == 1).all()


class Foreign(nn.Module):
  """A network of someone else's: SkipInit beside its layers, and a scan."""

  stacked: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='first')(x)
    y = SkipInit(0.5)(nn.Dense(6)(x))
    x = Join(name='sum')(x, y)
    axes = {'params': 0} | ({'intermediates': 0} if self.stacked else {})
    layers = nn.scan(
      lambda layer, x, _: (nn.tanh(layer(x)), None),
      variable_axes=axes,
      split_rngs={'params': True},
      length=3,
    )
    return layers(nn.Dense(6, name='layers'), x, None)[0]


def test_any_modules_of_any_network_by_a_pattern():
  model, x = Foreign(True), normal((5, 4))
  variables = model.init(jax.random.key(0), x)
  captured = capture(model, variables, x, pattern='first|layers', train=None)
  names = ['first', 'layers[0]', 'layers[1]', 'layers[2]']
  assert [*captured['name']] == names
  assert set(captured) == {'name', 'output_variance', 'output_squared_mean'}
  params = variables['params']
  first = np.asarray(x) @ np.asarray(params['first']['kernel'])
  assert captured['output_variance'][0] == pytest.approx(
    np.var(first, axis=0).mean(), rel=1e-4
  )
  x = normal((5, 4))
  at_join = capture(model, variables, x, train=None)
  assert [*at_join['name']] == ['sum']
  assert at_join['alpha'] == [0.5]


class TwoBranches(nn.Module):
  """Two joins in one module, each with a folded scalar."""

  @nn.compact
  def __call__(self, x):
    for i in (1, 2):
      branch = SkipInitDense(4, init_value=0.5 * i, name=f'branch{i}')(x)
      x = Join(name=f'join{i}')(x, branch)
    return x


def test_one_of_several_scalars_is_not_taken_for_that_of_a_branch():
  model, x = TwoBranches(), normal((5, 4))
  variables = model.init(jax.random.key(0), x)
  captured = capture(model, variables, x, train=None)
  assert [*captured['name']] == ['join1', 'join2']
  assert np.isnan(captured['alpha']).all()
  assert np.isnan(captured['unscaled_variance']).all()
  assert (captured['branch_variance'] > 0).all()


def test_what_can_not_be_captured_is_one_line():
  x = normal((5, 4))
  model = Foreign(False)
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(InputError, match=r"scan that drops .*'intermediates': 0"):
    capture(model, variables, x, pattern='layers', train=None)
  with pytest.raises(InputError, match="'lairs' matches no module of Foreign"):
    capture(model, variables, x, pattern='lairs', train=None)
  layer = nn.Dense(3)
  variables = layer.init(jax.random.key(0), x)
  with pytest.raises(InputError, match=r'Dense has no block .* Join'):
    capture(layer, variables, x, train=None)


def test_float64_goes_where_float32_overflows():
  def run(dtype):
    model = DenseResNet(
      600, 8, None, 'none', activation='linear', scan=True, param_dtype=dtype
    )
    x = normal((4, 8), dtype=dtype)
    variables = initialize(model, x)
    return second_moment(capture(model, variables, x), 'output')

  with jax.enable_x64(True):
    moments = run('float64')
  assert moments.dtype == np.float64
  assert np.isfinite(moments).all()
  assert moments[-1] > 2.0**200
  assert not np.isfinite(run('float32')).all()


def test_measures_and_draws(tmp_path):
  measured = propagation.measure((10,), image_size=8, batch=2, draws=3)
  assert list(measured[10]) == list(propagation.COLUMNS)
  for captured in measured[10].values():
    assert captured['share'].dtype == np.float64
    assert captured['share'].shape == captured['expected_share'].shape == (3,)
    depths = captured['effective_depth']
    assert depths[0] == pytest.approx(captured['share'].sum())
    # Student's t of 2 degrees of freedom: 4.303.
    half = 4.3027 * np.std(depths, ddof=1) / 3**0.5
    assert captured['interval'] == pytest.approx(half, rel=1e-4)
  norm = measured[10]['batchnorm']
  assert len({*norm['effective_depth']}) == 3
  lines = propagation.table(measured).splitlines()
  assert len(lines) == 3
  mean = norm['effective_depth'].mean()
  assert f'| {mean:.2f} ± {norm["interval"]:.2f} (' in lines[2]
  assert lines[2].startswith('| 10 | 3 | ')
  assert ' | 0.00 (0.00) | ' in lines[2]
  files = propagation.draw(measured, tmp_path)
  share = tmp_path / 'share.svg'
  assert share.read_text().count('(share 0)') == 1  # SkipInit at 0.
  measured[10]['skipinit']['share'] += 0.5  # As after training.
  propagation.draw(measured, tmp_path)
  assert '(share 0)' not in share.read_text()
  assert {f.name for f in files} == {
    f'{name}.{kind}'
    for name in ('variance-depth-10', 'share', 'path-lengths')
    for kind in ('svg', 'png')
  }
  for file in files:
    assert file.stat().st_size < 200_000
    if file.suffix == '.svg':
      text = ''.join(ElementTree.parse(file).getroot().itertext())
      assert 'BatchNorm' in text
  before = [file.read_bytes() for file in files]
  propagation.draw(measured, tmp_path)
  assert [file.read_bytes() for file in files] == before

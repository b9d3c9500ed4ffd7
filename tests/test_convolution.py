"""Convolutions: equal to JAX's, and fast in loops on CPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import flatten, normal

from skipinit_jax.models import ResNet, WideResNet, convolution
from skipinit_jax.models.convolution import convolve

plain = functools.partial(
  jax.lax.conv_general_dilated, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
)


def value(f, x, kernel, y):
  return f(x, kernel)


def gradients(f, x, kernel, y):
  return jax.vjp(f, x, kernel)[1](y)


def forward(f, x, kernel, y):
  return jax.jvp(f, (x, kernel), (x**2, kernel**2))


def second(f, x, kernel, y):
  """The gradient of a norm of the gradient."""

  def norm(x, kernel):
    return sum((g**2).sum() for g in gradients(f, x, kernel, y))

  return jax.grad(norm, (0, 1))(x, kernel)


def hessian_product(f, x, kernel, y):
  def loss(x, kernel):
    return jnp.sin(f(x, kernel) * y).sum()

  gradient = jax.grad(loss, (0, 1))
  return jax.jvp(gradient, (x, kernel), (x**2, kernel**2))[1]


def by_example(f, x, kernel, y):
  def of_one(x, y):
    return gradients(f, x[None], kernel, y[None])

  return jax.vmap(of_one)(x, y)


def of_kernels(f, x, kernel, y):
  """One kernel for each example, as in a batch of networks."""
  numbers = jnp.arange(1, len(x) + 1, dtype=x.dtype)
  kernels = jax.vmap(jnp.multiply, (0, None))(numbers, kernel)

  def of_one(x, kernel, y):
    return gradients(f, x[None], kernel, y[None])

  return jax.vmap(of_one)(x, kernels, y)


def rematerialized(f, x, kernel, y):
  return gradients(jax.checkpoint(f), x, kernel, y)


def scanned(f, x, kernel, y):
  """Gradients summed over the examples one by one."""

  def add(total, xy):
    of_one = gradients(f, xy[0][None], kernel, xy[1][None])[1]
    return total + of_one, None

  return jax.lax.scan(add, jnp.zeros_like(kernel), (x, y))[0]


USES = (
  value,
  gradients,
  forward,
  second,
  hessian_product,
  by_example,
  of_kernels,
  rematerialized,
  scanned,
)


def all_uses(f, x, kernel, y):
  return {use.__name__: use(f, x, kernel, y) for use in USES}


# Those of the networks, then others: sizes, kernel, strides, padding, dilation.
CASES = [
  ((6, 6), (3, 3), (1, 1), 'SAME', 1),
  ((6, 6), (3, 3), (2, 2), 'SAME', 1),
  ((5, 7), (3, 3), (2, 2), [(1, 1), (1, 1)], 1),
  ((5, 4), (1, 1), (1, 1), 'SAME', 1),
  ((5, 4), (1, 1), (2, 2), 'SAME', 1),
  ((5, 4), (1, 1), (3, 1), 'VALID', 2),
  ((5, 4), (1, 1), (2, 1), [(1, 1), (0, 2)], 1),
  ((9, 9), (7, 7), (2, 2), [(3, 3), (3, 3)], 1),
  ((2, 2), (3, 3), (1, 1), 'SAME', 1),
  ((1, 1), (3, 3), (1, 1), 'SAME', 1),
  ((2, 2), (3, 3), (2, 2), 'SAME', 1),
  ((7, 5), (2, 3), (3, 1), 'VALID', 1),
  ((8, 7), (3, 2), (1, 2), [(4, 0), (0, 5)], 2),
  ((7, 7), (3, 3), (2, 2), [(-1, 1), (2, -2)], 1),
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
  ('sizes', 'window', 'strides', 'padding', 'dilation'), CASES
)
def test_convolutions_are_those_of_jax(
  sizes, window, strides, padding, dilation
):
  options = {
    'window_strides': strides,
    'padding': padding,
    'rhs_dilation': (dilation, dilation),
  }
  theirs = functools.partial(plain, **options)
  ours = functools.partial(
    convolve,
    strides=options.pop('window_strides'),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **options,
  )
  for dtype, tolerance in (('float32', 1e-5), ('float64', 1e-12)):
    with jax.enable_x64(dtype == 'float64'):
      x = normal((3, *sizes, 2), 0, dtype)
      kernel = normal((*window, 2, 4), 1, dtype)
      y = normal(theirs(x, kernel).shape, 2, dtype)
      got, expected = (
        flatten(jax.jit(functools.partial(all_uses, f))(x, kernel, y))
        for f in (ours, theirs)
      )
    assert got.keys() == expected.keys()
    for use, a in got.items():
      b = expected[use]
      assert a.dtype == b.dtype == dtype
      scale = np.abs(b).max(initial=1e-3)
      np.testing.assert_allclose(
        a, b, rtol=0, atol=tolerance * scale, err_msg=use
      )


@pytest.mark.parametrize(
  ('layouts', 'groups', 'kernel'),
  [
    (('NCHW', 'OIHW', 'NCHW'), 1, (4, 6, 3, 3)),
    (('NHWC', 'HWIO', 'NHWC'), 2, (3, 3, 3, 4)),
    (('NWC', 'WIO', 'NWC'), 1, (3, 6, 4)),
  ],
)
def test_other_layouts_and_groups_are_left_to_jax(layouts, groups, kernel):
  x = normal(
    (2, *{'NCHW': (6, 5, 5), 'NWC': (5, 6)}.get(layouts[0], (5, 5, 6)))
  )
  options = {'dimension_numbers': layouts, 'feature_group_count': groups}
  strides = (1,) * (len(kernel) - 2)
  ours = functools.partial(convolve, strides=strides, padding='SAME', **options)
  theirs = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding='SAME',
    **options,
  )
  args = x, normal(kernel, 1)
  assert str(jax.make_jaxpr(ours)(*args)) == str(jax.make_jaxpr(theirs)(*args))


def gradient_in_a_loop(conv, strides, platform):
  """The program of a gradient through four layers of one scan."""

  def loss(kernels, x):
    def layer(x, kernel):
      y = jnp.sin(conv(x, kernel, strides, 'SAME'))
      return x + jax.image.resize(y, x.shape, 'nearest'), None

    return jax.lax.scan(layer, x, kernels)[0].sum()

  args = normal((4, 3, 3, 8, 8)), normal((2, 6, 6, 8))
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(*args)
  return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
def test_on_cpus_all_convolutions_of_a_loop_have_the_usual_layout(strides):
  layouts = [
    re.findall(r'dim_labels=(\S+?),? ', program.compile().as_text())
    for program in (
      gradient_in_a_loop(conv, strides, 'cpu') for conv in (convolve, plain)
    )
  ]
  assert set(layouts[0]) == {'b01f_01io->b01f'}
  assert len(layouts[0]) == 3
  assert set(layouts[1]) > {'b01f_01io->b01f'}


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_elsewhere_the_convolutions_are_those_that_jax_derives(platform):
  def convolutions(conv):
    program = gradient_in_a_loop(conv, (2, 2), platform).as_text()
    lines = re.findall(r'stablehlo\.convolution\(.*', program)
    return sorted(re.sub(r'%[\w#]+', '', line) for line in lines)

  assert convolutions(convolve) == convolutions(plain)
  assert len(convolutions(plain)) == 3


def test_a_program_for_several_platforms_is_exported():
  def gradient(x, kernel):
    return gradients(
      lambda x, k: convolve(x, k, (1, 1), 'SAME'), x, kernel, jnp.cos(x)
    )

  args = normal((2, 6, 6, 3)), normal((3, 3, 3, 3), 1)
  exported = jax.export.export(jax.jit(gradient), platforms=('cpu', 'tpu'))
  again = jax.export.deserialize(exported(*args).serialize())
  for a, b in zip(again.call(*args), gradient(*args), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_transposed_is_kept_for_the_backward_pass():
  def layer(x, kernel):
    return convolve(x, kernel, (1, 1), 'SAME')

  x, kernel = normal((2, 6, 6, 3)), normal((3, 3, 3, 5), 1)
  _, vjp = jax.vjp(layer, x, kernel)
  shapes = sorted(a.shape for a in jax.tree.leaves(vjp))
  assert shapes == [x.shape, kernel.shape]


# 2x2 images as a matrix product.


@pytest.mark.parametrize(('inputs', 'outputs'), [(1, 1), (5, 3)])
def test_the_product_for_2x2_images_is_the_convolution(inputs, outputs):
  x, kernel = normal((3, 2, 2, inputs)), normal((3, 3, inputs, outputs), 1)
  theirs = functools.partial(plain, window_strides=(1, 1), padding='SAME')
  y = normal((3, 2, 2, outputs), 2)
  for use in (value, gradients):
    got, expected = (
      jax.tree.leaves(use(f, x, kernel, y))
      for f in (convolution.convolve_2x2, theirs)
    )
    for a, b in zip(got, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_2x2_images_in_bfloat16_stay_bfloat16():
  x = normal((3, 2, 2, 4), 0, 'bfloat16')
  kernel = normal((3, 3, 4, 6), 1, 'bfloat16')
  y = convolution.convolve_2x2(x, kernel)
  exact = plain(*(a.astype('float32') for a in (x, kernel)), (1, 1), 'SAME')
  assert y.dtype == jnp.bfloat16
  error = np.abs(y.astype('float32') - exact).max()
  assert error < 2**-7 * np.abs(exact).max()


def test_networks_on_8x8_images_take_the_product_for_their_last_stage(
  monkeypatch,
):
  seen = set()

  def note(x, kernel):
    seen.add((x.shape, kernel.shape))
    return plain(x, kernel, (1, 1), 'SAME')

  monkeypatch.setattr(convolution, 'convolve_2x2', note)

  def trace(model, size):
    init = functools.partial(model.init, train=False)
    jax.eval_shape(init, jax.random.key(0), jnp.zeros((3, size, size, 1)))

  trace(WideResNet(10, 1, num_classes=5), 8)
  # The strided one of the stage reads 4x4.
  assert seen == {((3, 2, 2, 64), (3, 3, 64, 64))}
  seen.clear()
  small = ResNet((1, 1), num_classes=2, features=4, small_images=True)
  for size in (5, 8):
    trace(small, size)
  strided = functools.partial(convolve, strides=(2, 2), padding='SAME')
  jax.eval_shape(strided, jnp.zeros((1, 2, 2, 4)), jnp.zeros((3, 3, 4, 4)))
  assert not seen

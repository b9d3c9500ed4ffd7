"""The max-pool: its gradient on CPUs is that of JAX, ties included."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import normal

from skipinit_jax.models.pooling import max_pool

SYMMETRIC = ((1, 1), (1, 1))


def theirs(x, symmetric):
  return nn.max_pool(x, (3, 3), (2, 2), SYMMETRIC if symmetric else 'SAME')


def value(f, x, y):
  return f(x)


def gradient(f, x, y):
  return jax.vjp(f, x)[1](y)[0]


def forward(f, x, y):
  return jax.jvp(f, (x,), (jnp.cos(3 * x),))[1]


def hessian_product(f, x, y):
  loss = jax.grad(lambda x: (f(jnp.sin(x)) ** 2 * y).sum())
  return jax.jvp(loss, (x,), (jnp.cos(3 * x),))[1]


def by_example(f, x, y):
  return jax.vmap(lambda x, y: gradient(f, x[None], y[None])[0])(x, y)


@pytest.mark.sampled(20)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('sizes', [(8, 8), (7, 7), (5, 8), (1, 2), (3, 1)])
@pytest.mark.parametrize(
  'use', [value, gradient, forward, hessian_product, by_example]
)
def test_the_pool_is_that_of_jax(use, sizes, symmetric):
  # Few different values, so that most windows have several maxima.
  x = jnp.round(normal((3, *sizes, 4)))
  pools = [
    functools.partial(f, symmetric=symmetric) for f in (max_pool, theirs)
  ]
  y = normal(pools[1](x).shape, 1)
  if use in (forward, hessian_product):
    x = x + jnp.arange(x.size).reshape(x.shape) / 1e4  # See the next test.
  got, expected = (jax.jit(functools.partial(use, f))(x, y) for f in pools)
  assert got.dtype == expected.dtype
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_of_equal_values_the_first_has_the_gradient():
  x = jnp.full((1, 6, 6, 1), -3.0, jnp.bfloat16)
  g = gradient(
    functools.partial(max_pool, symmetric=True),
    x,
    jnp.ones((1, 3, 3, 1), 'bfloat16'),
  )
  # The windows begin at -1, 1 and 3; the pixels before 0 are padding.
  rows = np.isin(np.arange(6), (0, 1, 3))
  assert g.dtype == jnp.bfloat16
  np.testing.assert_array_equal(g[0, ..., 0], np.outer(rows, rows))


def test_only_the_image_is_kept_for_the_backward_pass():
  x = normal((2, 8, 8, 3))
  vjp = jax.vjp(functools.partial(max_pool, symmetric=False), x)[1]
  assert [a.shape for a in jax.tree.leaves(vjp)] == [x.shape]


def test_only_tpus_have_the_gradient_of_jax():
  def scatters(f, platform):
    f = functools.partial(f, symmetric=False)
    traced = jax.jit(jax.grad(lambda x: f(x).sum())).trace(normal((2, 8, 8, 3)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r'scatter"', text))

  assert scatters(theirs, 'cpu') == scatters(theirs, 'tpu') == 1
  assert scatters(max_pool, 'tpu') == 1
  assert scatters(theirs, 'cuda') == 1
  assert scatters(max_pool, 'cpu') == scatters(max_pool, 'cuda') == 0

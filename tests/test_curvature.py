"""The largest eigenvalue of a Hessian, against numpy's of the whole matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from skipinit_jax.analysis import curvature
from skipinit_jax.analysis.curvature import (
  curvature_along,
  largest_eigenvalue,
  longest_step,
)
from skipinit_jax.models import DenseResNet

KEY = jax.random.key(0)


def symmetric(values, seed=0):
  """A matrix with these eigenvalues and random eigenvectors."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.standard_normal((len(values),) * 2))
  return (q * values) @ q.T


def quadratic(values):
  matrix = jnp.asarray(symmetric(np.asarray(values)), jnp.float32)
  return lambda x: x @ matrix @ x / 2


@pytest.mark.parametrize(
  'values',
  [
    np.linspace(-3, 7, 20),
    np.linspace(-50, 0.5, 15),  # The largest, not the one of largest modulus.
    -np.geomspace(1e-2, 1, 12),
    np.repeat([1.0, 5.0], 8),  # Krylov's space has two dimensions.
  ],
)
def test_of_a_quadratic(values):
  found = largest_eigenvalue(
    quadratic(values), jnp.ones(len(values)), jax.random.key(0), tolerance=1e-7
  )
  assert found.value == pytest.approx(max(values), abs=2e-5 * 50)
  assert found.error < 1e-3


def tiny(method):
  """A loss, its parameters, and the whole of its Hessian."""
  model = DenseResNet(2, 4, 3, method)
  x, labels = np.random.default_rng(0).standard_normal((2, 12, 3))
  x = jnp.asarray(x, jnp.float32)
  params = model.init(jax.random.key(1), x, train=False)['params']

  def loss(params):
    out, _ = model.apply(
      {'params': params}, x, train=True, mutable=['batch_stats']
    )
    return -(jax.nn.log_softmax(out) * jax.nn.softmax(labels)).sum(-1).mean()

  flat, unravel = ravel_pytree(params)
  hessian = jax.hessian(lambda flat: loss(unravel(flat)))(flat)
  return loss, params, np.asarray(hessian, np.float64)


@pytest.mark.parametrize(
  'method',
  ['skipinit', 'batchnorm', pytest.param('none', marks=pytest.mark.slow)],
)
def test_of_a_tiny_network(method):
  loss, params, hessian = tiny(method)
  expected = np.linalg.eigvalsh(hessian)[-1]
  found = largest_eigenvalue(loss, params, jax.random.key(2), tolerance=1e-6)
  assert found.value == pytest.approx(expected, rel=1e-4)
  early = largest_eigenvalue(loss, params, jax.random.key(2))
  assert early.error <= 1e-3 * early.value
  assert abs(early.value - expected) < early.error + 1e-4 * expected


def test_the_curvature_along_a_direction_is_that_of_the_whole_hessian():
  loss, params, hessian = tiny('batchnorm')
  flat, unravel = ravel_pytree(params)
  gradient = np.asarray(ravel_pytree(jax.grad(loss)(params))[0], np.float64)
  other = np.random.default_rng(1).standard_normal(flat.size)
  for v in (gradient, other):
    found = curvature_along(loss, params, unravel(jnp.asarray(v, flat.dtype)))
    assert found == pytest.approx(v @ hessian @ v / (v @ v), rel=1e-3)
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert np.isnan(curvature_along(loss, params, zeros))


@pytest.mark.parametrize('value', [0.003, 0.3, 1.0, 7.0, 900.0])
def test_the_longest_step_of_a_parabola_is_below_2_over_its_curvature(value):
  step = longest_step(lambda x: value * (x**2).sum() / 2, jnp.ones(3))
  assert step < 2 / value <= 2 * step
  assert np.log2(step) % 1 == 0


def test_the_longest_step_sees_a_wall_that_the_curvature_does_not():
  def slope(x):
    return (x**2).sum() / 4

  def wall(x):
    return slope(x) + 500 * (jnp.maximum(1 - x, 0) ** 2).sum()

  x = jnp.full(2, 4.0)  # A step of 1 goes to 2, and one of 2 to 0.
  ones = jnp.ones(2)
  assert (
    curvature_along(wall, x, ones) == curvature_along(slope, x, ones) == 0.5
  )
  assert longest_step(slope, x) == 2
  assert longest_step(wall, x) == 1
  assert longest_step(slope, jnp.zeros(2)) == 0


def test_the_error_says_how_far_an_eigenvalue_is():
  values = np.linspace(0, 10, 200)
  errors = []
  for tolerance in (0.1, 0.01, 1e-4):
    found = largest_eigenvalue(
      quadratic(values), jnp.ones(200), jax.random.key(3), tolerance=tolerance
    )
    assert np.abs(values - found.value).min() < found.error + 1e-5
    assert found.value < 10 + 1e-4
    assert found.error < tolerance * found.value
    errors.append(found.error)
  assert errors == sorted(errors, reverse=True)


def test_where_nothing_is_found_is_not_a_number():
  zero = largest_eigenvalue(quadratic(np.zeros(5)), jnp.ones(5), KEY)
  assert np.isnan(zero.value)
  assert zero.error == float('inf')


def test_a_loss_that_is_not_finite_has_an_infinite_one():
  found = largest_eigenvalue(
    lambda x: jnp.exp(100 * x).sum(), jnp.ones(3), jax.random.key(0)
  )
  assert found.value == found.error == float('inf')


def test_gradient_descent_is_stable_up_to_2_over_it():
  loss = quadratic(np.linspace(0.1, 4, 10))
  rate = 2 / largest_eigenvalue(loss, jnp.ones(10), jax.random.key(0)).value

  @functools.partial(jax.jit, static_argnums=1)
  def after(rate, steps):
    def step(_, x):
      return x - rate * jax.grad(loss)(x)

    return loss(jax.lax.fori_loop(0, steps, step, jnp.ones(10)))

  assert after(0.97 * rate, 500) < 1e-3 < 1e3 < after(1.03 * rate, 500)


def test_measures_and_draws(tmp_path):
  measured = curvature.measure((10,), images=32, seeds=2)
  assert list(measured) == [10]
  assert list(measured[10]) == list(curvature.DRAWN)
  for found in measured[10].values():
    assert found['value'].shape == found['error'].shape == (2,)
    assert (found['value'] > 0).all()
    assert found['value'][0] != found['value'][1]
  none, zero = (measured[10][m]['value'] for m in ('none', 'skipinit'))
  assert none.min() > 3 * zero.max()
  files = curvature.draw(measured, tmp_path)
  assert [f.name for f in files] == ['curvature.svg', 'curvature.png']
  assert all(0 < f.stat().st_size < 200_000 for f in files)

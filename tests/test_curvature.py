"""The largest eigenvalue of a Hessian, against numpy's of the whole matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from skipinit_jax.analysis import curvature
from skipinit_jax.analysis.curvature import largest_eigenvalue

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


@pytest.mark.parametrize(
  'method',
  ['skipinit', 'batchnorm', pytest.param('none', marks=pytest.mark.slow)],
)
def test_of_a_tiny_network(method):
  loss, params, hessian = toys.curved_loss(method)
  expected = np.linalg.eigvalsh(hessian)[-1]
  found = largest_eigenvalue(loss, params, jax.random.key(2), tolerance=1e-6)
  assert found.value == pytest.approx(expected, rel=1e-4)
  early = largest_eigenvalue(loss, params, jax.random.key(2))
  assert early.error <= 1e-3 * early.value
  assert abs(early.value - expected) < early.error + 1e-4 * expected


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

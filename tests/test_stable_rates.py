"""The benchmark of largest stable rates, on losses that theory knows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.flatten_util import ravel_pytree

from benchmarks import stable_rates

CURVED = jnp.array([0.5, 4.0])


def quadratic(params):
  return (CURVED * params['kernel'] ** 2).sum() / 2


@pytest.mark.parametrize('limit', [-5, -3, -2, 0, 3])
def test_the_largest_stable_exponent_is_found_from_both_sides(limit):
  tried = []

  def stable(exponent):
    tried.append(exponent)
    return exponent <= limit

  assert stable_rates.largest(stable) == limit
  assert limit in tried
  assert len(tried) == len({*tried})


def test_descent_is_stable_up_to_the_bound_of_momentum():
  """2 (1 + m) / curvature, on a quadratic."""
  step = stable_rates.stepper(quadratic)
  params = {'kernel': jnp.ones(2)}
  start = params, jax.tree.map(jnp.zeros_like, params)
  bound = 2 * 1.9 / 4
  for factor, ends in ((0.97, True), (1.03, False)):
    _, loss = stable_rates.descend(step, start, 600, factor * bound)
    assert (loss < quadratic(params)) == ends
  # In two parts it goes where it goes in one.
  whole, _ = stable_rates.descend(step, start, 7, 0.1)
  half, _ = stable_rates.descend(step, start, 3, 0.1)
  parts, _ = stable_rates.descend(step, half, 4, 0.1)
  np.testing.assert_allclose(parts[0]['kernel'], whole[0]['kernel'], rtol=1e-6)


def test_curvatures_of_a_quadratic():
  params = {'kernel': jnp.array([3.0, 4.0])}
  found = stable_rates.curvatures(quadratic, params, {'kernel': jnp.ones(2)})
  assert found['eigenvalue'] == pytest.approx(4, rel=0.02)
  assert found['normalized'] == pytest.approx(25 * 4, rel=0.02)
  gradient = CURVED * params['kernel']
  expected = (CURVED * gradient**2).sum() / (gradient**2).sum()
  assert found['gradient'] == pytest.approx(float(expected), rel=1e-5)
  assert found['momentum'] == pytest.approx(4.5 / 2, rel=1e-5)
  # A step of 1/2 goes to (2.25, -4), one of 1 to (1.5, -12).
  assert found['step'] == 2


def test_the_table_has_medians_and_their_ratios():
  def seeds(exponent, values):
    return [
      {
        'stable': exponent,
        'along': {'10': dict.fromkeys(stable_rates.QUANTITIES, value)},
        'at_stable': dict.fromkeys(stable_rates.QUANTITIES, None),
      }
      for value in values
    ]

  methods = {
    'batchnorm': seeds(1, [1.0, 2.0, 9.0]),
    'skipinit': seeds(-3, [5.0, 7.0, float('nan')]),
  }
  lines = stable_rates.table(methods).splitlines()
  assert lines[2] == '| largest stable rate | - | 2 | 0.125 | 16 |'
  assert lines[3].endswith('| 10 | 2 | 6 | 3 |')
  assert lines[4].endswith('| end | - | - | - |')


def test_the_curvature_along_a_direction_is_that_of_the_whole_hessian():
  loss, params, hessian = toys.curved_loss('batchnorm')
  flat, unravel = ravel_pytree(params)
  gradient = np.asarray(ravel_pytree(jax.grad(loss)(params))[0], np.float64)
  other = np.random.default_rng(1).standard_normal(flat.size)
  for v in (gradient, other):
    found = stable_rates.curvature_along(
      loss, params, unravel(jnp.asarray(v, flat.dtype))
    )
    assert found == pytest.approx(v @ hessian @ v / (v @ v), rel=1e-3)
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert np.isnan(stable_rates.curvature_along(loss, params, zeros))


@pytest.mark.parametrize('value', [0.003, 0.3, 1.0, 7.0, 900.0])
def test_the_longest_step_of_a_parabola_is_below_2_over_its_curvature(value):
  step = stable_rates.longest_step(
    lambda x: value * (x**2).sum() / 2, jnp.ones(3)
  )
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
    stable_rates.curvature_along(wall, x, ones)
    == stable_rates.curvature_along(slope, x, ones)
    == 0.5
  )
  assert stable_rates.longest_step(slope, x) == 2
  assert stable_rates.longest_step(wall, x) == 1
  assert stable_rates.longest_step(slope, jnp.zeros(2)) == 0


def test_the_documented_table_is_that_of_the_file():
  docs = Path(__file__).resolve().parents[1] / 'docs'
  methods = json.loads((docs / 'stable_rates.json').read_text())['methods']
  table = stable_rates.table(methods)
  assert table in (docs / 'measurements.md').read_text()

"""Which curvature tells the largest stable rate of 16-1 networks on the digits?

  python -m benchmarks.stable_rates --out=docs/stable_rates.json

Gradient descent with momentum on the first 512 training images at a constant
rate, with batch normalization and with SkipInit. A run is stable if its last
ten of 100 losses are on average below half of chance's; for every seed, the
largest stable rate is found among powers of 2. Along a run at a small rate, and
at the end of the run at the largest stable one: measures of the loss's
curvature on the first 128 images. Writes JSON after every seed, and prints a
table.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.flatten_util import ravel_pytree

from benchmarks.input_pipeline import machine
from skipinit_jax import cli, markdown
from skipinit_jax.analysis.curvature import (
  largest_eigenvalue,
  training_loss,
)
from skipinit_jax.data import open_dataset
from skipinit_jax.files import write_json
from skipinit_jax.models.parameters import param_labels
from skipinit_jax.training.devices import set_cpu_flag
from skipinit_jax.training.network import build_model, init_variables
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.result import versions
from skipinit_jax.variants import VARIANTS

METHODS = ('batchnorm', 'skipinit')
MOMENTUM = 0.9
START = -2  # The exponent of the first rate that is tried.
WIDEST = 8  # And of the last.
SMALL = -6  # Of the run along which the curvature is measured.
MEASURED = (0, 10, 100)  # Its steps.
IMAGES, IMAGES_OF_CURVATURE = 512, 128
# Field -> its words in the table.
QUANTITIES = {
  'eigenvalue': 'largest eigenvalue of the Hessian',
  'normalized': 'the same, kernels scaled to norm 1',
  'gradient': 'curvature along the gradient',
  'momentum': 'curvature along the momentum',
  'step': '1 / longest step along the gradient',
}

Losses = Callable[[Any], jax.Array]


def main() -> None:
  count = cli.number(int, 1, 10**3)
  parser = cli.Parser(description='Curvatures and the largest stable rate.')
  parser.add_argument('--seeds', type=count, default=3)
  parser.add_argument('--steps', type=count, default=100)
  parser.add_argument('--out', type=cli.file, required=True)
  args = parser.parse_args()
  set_cpu_flag()
  with cli.errors_in_one_line():
    measurers = {method: measurer(method, args.steps) for method in METHODS}
    methods: dict[str, list] = {method: [] for method in METHODS}
    for seed in tqdm.trange(args.seeds):
      for method, measure in measurers.items():
        methods[method].append(measure(seed))
      command = ['python', '-m', 'benchmarks.stable_rates', *sys.argv[1:]]
      result = {
        'command': ' '.join(command),
        'machine': machine(),
        'versions': versions(),
        'methods': methods,
      }
      write_json(args.out, result)
  print(table(methods))


def measurer(method: str, steps: int) -> Callable[[int], dict[str, Any]]:
  """A function that measures a method's network of a seed.

  It returns 'losses': exponent of a rate -> loss at the end; 'stable': the
  largest stable exponent; 'along': step -> QUANTITIES, of the run at SMALL; and
  'at_stable': QUANTITIES at the end of the run at the largest stable rate.
  """
  config = set_fields(
    load_recipe('digits'),
    {'model.depth': 16, 'model.scan': False, **VARIANTS[method].fields},
  )
  data = open_dataset(config.data)
  model = build_model(config, data.num_classes).clone(axis_name=None)
  step = stepper(training_loss(model, data, IMAGES))
  of = functools.partial(
    curvatures, training_loss(model, data, IMAGES_OF_CURVATURE)
  )

  def measure(seed: int) -> dict[str, Any]:
    params = init_variables(model, data.image_shape, seed)['params']
    start = params, jax.tree.map(jnp.zeros_like, params)
    ends, losses = {}, {}

    def stable(exponent: int) -> bool:
      ends[exponent], losses[str(exponent)] = descend(
        step, start, steps, 2.0**exponent
      )
      return losses[str(exponent)] < math.log(data.num_classes) / 2

    exponent = largest(stable)
    along, state, made = {}, start, 0
    for number in MEASURED:
      state, _ = descend(step, state, number - made, 2.0**SMALL)
      along[str(number)], made = of(*state), number
    return {
      'losses': losses,
      'stable': exponent,
      'along': along,
      'at_stable': of(*ends[exponent]),
    }

  return measure


def largest(stable: Callable[[int], bool]) -> int:
  """The largest stable exponent, up from START or, if it is not, down."""
  exponent = START
  if stable(exponent):
    while exponent < WIDEST and stable(exponent + 1):
      exponent += 1
    return exponent
  for exponent in range(START - 1, SMALL, -1):
    if stable(exponent):
      return exponent
  return SMALL


def stepper(loss: Losses) -> Callable:
  """A compiled step of gradient descent with momentum."""

  @jax.jit
  def step(params, momentum, rate):
    value, gradient = jax.value_and_grad(loss)(params)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradient)
    return (
      jax.tree.map(lambda p, m: p - rate * m, params, momentum),
      momentum,
      value,
    )

  return step


def descend(
  step: Callable, state: tuple[Any, Any], steps: int, rate: float
) -> tuple[tuple[Any, Any], float]:
  """Parameters and momentum after some steps; the mean of ten losses."""
  losses = []
  for _ in range(steps):
    params, momentum, loss = step(*state, rate)
    state = params, momentum
    losses.append(float(loss))
    if not math.isfinite(losses[-1]):
      break
  return state, sum(losses[-10:]) / max(len(losses[-10:]), 1)


def curvatures(loss: Losses, params: Any, momentum: Any) -> dict[str, float]:
  """QUANTITIES at some parameters."""
  key = jax.random.key(0)
  gradient = jax.grad(loss)(params)
  # With p = p0 + |w| v the Hessian in v is D^(1/2) H D^(1/2), D = |w|^2.
  norms = jax.tree.map(
    lambda p, label: jnp.linalg.norm(p.ravel()) if label == 'kernel' else 1.0,
    params,
    param_labels(params),
  )

  def scaled(v: Any) -> jax.Array:
    return loss(jax.tree.map(lambda p, d, v: p + d * v, params, norms, v))

  zeros = jax.tree.map(jnp.zeros_like, params)
  return {
    'eigenvalue': largest_eigenvalue(loss, params, key, tolerance=0.01).value,
    'normalized': largest_eigenvalue(scaled, zeros, key, tolerance=0.01).value,
    'gradient': curvature_along(loss, params, gradient),
    'momentum': curvature_along(loss, params, momentum),
    'step': 1 / step if (step := longest_step(loss, params)) else math.inf,
  }


def curvature_along(loss: Losses, params: Any, direction: Any) -> float:
  """v'Hv / v'v, of the Hessian H of `loss` and a direction v, a tree like it.

  NaN for a direction of zeros.
  """
  product = _product(loss, params, direction)
  v, hv = (
    np.asarray(ravel_pytree(tree)[0], np.float64)
    for tree in (direction, product)
  )
  square = v @ v
  return float(v @ hv / square) if square else math.nan


def longest_step(
  loss: Losses, params: Any, *, longest: float = 2.0**20
) -> float:
  """The largest rate, a power of 2, at which one step lowers the loss.

  Along the negative gradient, doubled while the loss is below that at `params`.
  Unlike an eigenvalue it sees the loss as far as the step goes.

  Args:
    loss: of the parameters alone, scalar.
    params: tree of floating arrays.
    longest: where it ends, and what it starts to halve from 1 over.

  Returns:
    0 where no step lowers it, as at a minimum.
  """
  value, gradient = _value_and_gradient(loss, params)

  def lowers(rate: float) -> bool:
    return bool(_after(loss, params, gradient, rate) < value)

  rate = 1.0
  while rate > 1 / longest and not lowers(rate):
    rate /= 2
  if rate <= 1 / longest:
    return 0.0
  while rate < longest and lowers(2 * rate):
    rate *= 2
  return rate


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(loss: Losses, params: Any) -> tuple[jax.Array, Any]:
  return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def _after(
  loss: Losses, params: Any, gradient: Any, rate: jax.typing.ArrayLike
) -> jax.Array:
  """The loss after a step along the negative gradient."""
  return loss(jax.tree.map(lambda p, g: p - rate * g, params, gradient))


@functools.partial(jax.jit, static_argnums=0)
def _product(loss: Losses, params: Any, v: Any) -> Any:
  """The Hessian times v."""
  return jax.jvp(jax.grad(loss), (params,), (v,))[1]


def middle(values: Iterable[float | None]) -> float:
  """The median over the seeds, without those that have no value."""
  finite = [v for v in values if v is not None and math.isfinite(v)]
  return float(np.median(finite)) if finite else math.nan


def table(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Medians over the seeds, and the ratio of rates that they predict."""
  norm, scalar = (methods[method] for method in METHODS)
  rates = [
    2.0 ** middle(x['stable'] for x in seeds) for seeds in (norm, scalar)
  ]
  labels = [VARIANTS[method].label for method in METHODS]
  rows = [['', 'step', *labels, 'ratio']]
  rates.append(rates[0] / rates[1])
  rows.append(['largest stable rate', '-', *(f'{r:.3g}' for r in rates)])
  for name, words in QUANTITIES.items():
    for at in (*norm[0]['along'], 'end'):
      values = [
        middle((x['along'] | {'end': x['at_stable']})[at][name] for x in seeds)
        for seeds in (norm, scalar)
      ]
      values.append(values[1] / values[0])
      cells = (f'{v:.3g}' if math.isfinite(v) else '-' for v in values)
      rows.append([words, at, *cells])
  return markdown.table(rows)


if __name__ == '__main__':
  main()

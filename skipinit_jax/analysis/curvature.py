"""The largest eigenvalue of the loss's Hessian, which limits the rate.

Gradient descent on a quadratic diverges along an eigenvector whose eigenvalue
exceeds 2 / rate. De & Smith 2020 find that batch normalization allows larger
rates, and lay it to a better conditioned loss.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from skipinit_jax import plotting
from skipinit_jax.analysis.propagation import COLUMNS
from skipinit_jax.data import open_dataset
from skipinit_jax.data.resident import Resident
from skipinit_jax.errors import InputError
from skipinit_jax.models.resnet import WideResNet
from skipinit_jax.training.config import default_config
from skipinit_jax.training.step import cross_entropy
from skipinit_jax.variants import VARIANTS

DRAWN = ('batchnorm', 'skipinit', 'none')  # Of `COLUMNS`.


class Eigenvalue(NamedTuple):
  """An eigenvalue of a Hessian, found by Lanczos's method.

  Attributes:
    value: the largest Ritz value; never above the largest eigenvalue, but for
      rounding.
    error: norm of the residual: an eigenvalue lies within so much of `value`.
  """

  value: float
  error: float


def largest_eigenvalue(
  loss: Callable[[Any], jax.Array],
  params: Any,
  key: jax.Array,
  steps: int = 30,
  *,
  tolerance: float = 1e-3,
) -> Eigenvalue:
  """The largest (most positive) eigenvalue of the Hessian of `loss`.

  Lanczos's method with full reorthogonalization, on Hessian-vector products
  (forward over reverse), from a random start.

  Args:
    loss: of the parameters alone, scalar.
    params: tree of floating arrays of one dtype, n numbers in all.
    key: scalar PRNG key, of the start.
    steps: Hessian-vector products at most; `steps` vectors (n,) are kept.
    tolerance: stop once the error is no more than this share of the value.

  >>> loss = lambda x: x[0] ** 2 - 4 * x[1] ** 2
  >>> found = largest_eigenvalue(loss, jnp.ones(2), jax.random.key(0))
  >>> round(found.value, 3)
  2.0
  """
  flat, unravel = ravel_pytree(params)
  start = jax.random.normal(key, flat.shape, flat.dtype)

  def product(v: np.ndarray) -> np.ndarray:
    out = _hessian_product(loss, params, unravel(jnp.asarray(v, flat.dtype)))
    return np.asarray(ravel_pytree(out)[0], np.float64)

  rounding = float(jnp.finfo(flat.dtype).eps)
  return _lanczos(
    product, np.asarray(start, np.float64), steps, tolerance, rounding
  )


@functools.partial(jax.jit, static_argnums=0)
def _hessian_product(loss: Callable, params: Any, v: Any) -> Any:
  return jax.jvp(jax.grad(loss), (params,), (v,))[1]


def _lanczos(
  product: Callable[[np.ndarray], np.ndarray],
  start: np.ndarray,
  steps: int,
  tolerance: float,
  rounding: float,
) -> Eigenvalue:
  """Largest Ritz value of a symmetric matrix, given by its products."""
  vectors = [start / np.linalg.norm(start)]
  diagonal, beside = [], []
  for _ in range(min(steps, start.size)):
    v = product(vectors[-1])
    if not np.isfinite(v).all():
      return Eigenvalue(math.inf, math.inf)
    diagonal.append(vectors[-1] @ v)
    basis = np.stack(vectors)
    for _ in range(2):  # Once leaves the rounding of what it takes away.
      v = v - basis.T @ (basis @ v)
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values, ritz = np.linalg.eigh(matrix)
    beside.append(np.linalg.norm(v))
    value, error = values[-1], abs(beside[-1] * ritz[-1, -1])
    ended = beside[-1] <= 10 * rounding * abs(values).max()  # Krylov's space.
    if ended or error <= tolerance * abs(value):
      break
    vectors.append(v / beside[-1])
  return Eigenvalue(float(value), float(error))


def measure(
  depths: Sequence[int] = (10, 16, 22),
  *,
  images: int = 128,
  steps: int = 24,
  seeds: int = 3,
) -> dict[int, dict[str, dict[str, np.ndarray]]]:
  """Of the training loss of n-1 Wide-ResNets on the digits, at initialization.

  The loss is the mean cross-entropy of so many training images; batch
  normalization takes its statistics over all of them. No L2. It takes about a
  minute on two CPU cores, most of it to compile.

  Args:
    depths: 6n + 4.
    images: number of training images, the first.
    steps: of Lanczos's method.
    seeds: draws of the weights.

  Returns:
    Depth -> name in `DRAWN` -> 'value' and 'error' of `Eigenvalue`, float64
    (seeds,).
  """
  data = open_dataset(default_config().data)
  measured: dict[int, dict[str, dict[str, np.ndarray]]] = {}
  for depth in depths:
    measured[depth] = {}
    for column in DRAWN:
      method, alpha = COLUMNS[column]
      model = WideResNet(depth, 1, data.num_classes, method=method, alpha=alpha)
      loss = training_loss(model, data, images)  # Compiled once.
      like = jnp.zeros((1, *data.image_shape))
      found = []
      for seed in range(seeds):
        key, start = jax.random.split(jax.random.key(seed))
        params = model.init(key, like, train=False)['params']
        found.append(largest_eigenvalue(loss, params, start, steps))
      value, error = np.array(found).T
      measured[depth][column] = {'value': value, 'error': error}
  return measured


def of_loss(
  model: nn.Module, data: Resident, params: Any, images: int = 128
) -> dict[str, float]:
  """`value` and `error` of a network's `training_loss`."""
  loss = training_loss(model, data, images)
  return largest_eigenvalue(loss, params, jax.random.key(0))._asdict()


def draw(
  measured: Mapping[int, Mapping[str, Mapping[str, np.ndarray]]], out: Path
) -> list[Path]:
  """Draws what `measure` returns: SVG and PNG files in the folder `out`.

  Above, the largest eigenvalue against the depth, the median of the draws and
  their range; below, 2 over it: the largest rate at which gradient descent on
  the quadratic around the start is stable.
  """
  depths = list(measured)
  with plotting.style():
    figure, panels = plotting.new_figure(2, height=4.6, sharex=True)
    for i, column in enumerate(measured[depths[0]]):
      aside = np.add(depths, 0.15 * (i - 1))  # Else ranges hide one another.
      values = np.stack([measured[d][column]['value'] for d in depths])
      for axes, y in zip(panels, (values, 2 / values), strict=True):
        middle = np.median(y, 1)
        axes.errorbar(
          aside,
          middle,
          (middle - y.min(1), y.max(1) - middle),
          **plotting.line_style(column),
          marker=VARIANTS[column].marker,
          capsize=3,
          elinewidth=1,
          label=VARIANTS[column].label,
        )
    for axes in panels:
      plotting.log_axis(axes)
    panels[0].set_ylabel('largest eigenvalue')
    panels[1].set_ylabel('2 / largest eigenvalue')
    panels[1].set_xlabel('depth (layers)')
    panels[1].set_xticks(depths)
    figure.legend(
      *panels[0].get_legend_handles_labels(),
      loc='outside upper left',
      ncols=2,
      handlelength=3,
    )
    return plotting.save(figure, out, 'curvature')


def training_loss(
  model: nn.Module, data: Resident, images: int
) -> Callable[[Any], jax.Array]:
  """The mean cross-entropy of the first so many training images, no L2.

  Args:
    model: batch normalization takes its statistics over all of the images.
    data: of `data.open_dataset`, one that fits on a device.
    images: their number.

  Returns:
    A function of the parameters alone, for `largest_eigenvalue`.

  Raises:
    InputError: data that comes in batches.
  """
  if not isinstance(data, Resident):
    raise InputError(
      f'the loss is that of images that fit on a device; {data.name} comes in '
      'batches'
    )
  inputs = data.augmentation.normalize(jnp.asarray(data.images[:images]))
  targets = jax.nn.one_hot(data.labels[:images], data.num_classes)
  whole = model.clone(statistics_group=None)
  return functools.partial(_loss, whole, inputs, targets)


def _loss(model, images, targets, params) -> jax.Array:
  logits, _ = model.apply(
    {'params': params},
    images,
    train=True,
    mutable=['batch_stats'],
    rngs={'dropout': jax.random.key(0)},
  )
  return cross_entropy(logits, targets).mean()

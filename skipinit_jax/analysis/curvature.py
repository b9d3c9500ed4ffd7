"""The largest eigenvalue of the loss's Hessian, which limits the rate.

Gradient descent on a quadratic diverges along an eigenvector whose eigenvalue
exceeds 2 / rate. De & Smith 2020 find that batch normalization allows larger
rates, and attribute this to a better conditioned loss.
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
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from skipinit_jax import plotting
from skipinit_jax.analysis.propagation import wide_resnet
from skipinit_jax.data import open_dataset
from skipinit_jax.data.resident import Resident
from skipinit_jax.errors import InputError
from skipinit_jax.training.config import default_config
from skipinit_jax.training.saved import Saved
from skipinit_jax.training.step import cross_entropy
from skipinit_jax.variants import VARIANTS

DRAWN = ('batchnorm', 'skipinit', 'none')  # Of `VARIANTS`.


# Of ARPACK: how many vectors it keeps, and how often it starts again with them.
VECTORS, RESTARTS = 10, 100


class Eigenvalue(NamedTuple):
  """An eigenvalue of a Hessian.

  Attributes:
    value: NaN where ARPACK finds none: it does not converge, or the Hessian is
      zero.
    error: norm of the residual; an eigenvalue lies this close to `value`.
  """

  value: float
  error: float


def largest_eigenvalue(
  loss: Callable[[Any], jax.Array],
  params: Any,
  key: jax.Array,
  *,
  tolerance: float = 1e-3,
) -> Eigenvalue:
  """The largest (most positive) eigenvalue of the Hessian of `loss`.

  ARPACK's Lanczos method on Hessian-vector products (forward over reverse),
  from a random start. Takes 11 of them or more, and keeps 10 vectors.

  Args:
    loss: of the parameters alone, scalar.
    params: tree of floating arrays of one dtype, two numbers or more in all.
    key: scalar PRNG key of the start.
    tolerance: of the error, as a share of the value.

  Returns:
    The eigenvalue; infinite where a product is not finite.

  >>> loss = lambda x: x[0] ** 2 - 4 * x[1] ** 2
  >>> found = largest_eigenvalue(loss, jnp.ones(2), jax.random.key(0))
  >>> round(found.value, 3)
  2.0
  """
  flat, unravel = ravel_pytree(params)
  start = jax.random.normal(key, flat.shape, flat.dtype)

  def product(v: np.ndarray) -> np.ndarray:
    out = _hessian_product(loss, params, unravel(jnp.asarray(v, flat.dtype)))
    out = np.asarray(ravel_pytree(out)[0], np.float64)
    if not np.isfinite(out).all():
      raise FloatingPointError
    return out

  shape = flat.size, flat.size
  try:
    (value,), vectors = eigsh(
      LinearOperator(shape, product, dtype=np.float64),  # pyright: ignore
      k=1,
      which='LA',
      v0=np.asarray(start, np.float64),
      ncv=min(VECTORS, flat.size),
      maxiter=RESTARTS,
      tol=tolerance,  # pyright: ignore[reportArgumentType]
    )
    residual = product(vectors[:, 0]) - value * vectors[:, 0]
  except FloatingPointError:
    return Eigenvalue(math.inf, math.inf)
  except ArpackError:
    return Eigenvalue(math.nan, math.inf)
  return Eigenvalue(float(value), float(np.linalg.norm(residual)))


@functools.partial(jax.jit, static_argnums=0)
def _hessian_product(loss: Callable, params: Any, v: Any) -> Any:
  return jax.jvp(jax.grad(loss), (params,), (v,))[1]


def measure(
  depths: Sequence[int] = (10, 16, 22), *, images: int = 128, seeds: int = 3
) -> dict[int, dict[str, dict[str, np.ndarray]]]:
  """Measures n-1 Wide-ResNets on the digits, at initialization.

  Batch normalization takes its statistics over all of the images. Takes about a
  minute on two CPU cores, most of it to compile.

  Args:
    depths: 6n + 4.
    images: number of training images, the first.
    seeds: draws of the weights.

  Returns:
    Depth -> name in `DRAWN` -> 'value' and 'error' of `Eigenvalue`, float64
    (seeds,).
  """
  data = open_dataset(default_config().data)
  like = jnp.zeros((1, *data.image_shape))

  def of_variant(depth: int, variant: str) -> dict[str, np.ndarray]:
    model = wide_resnet(variant, depth, 1, num_classes=data.num_classes)
    loss = training_loss(model, data, images)  # Compiled once.
    found = []
    for seed in range(seeds):
      key, start = jax.random.split(jax.random.key(seed))
      params = model.init(key, like, train=False)['params']
      found.append(largest_eigenvalue(loss, params, start))
    return _as_arrays(found)

  return {d: {v: of_variant(d, v) for v in DRAWN} for d in depths}


def measure_run(run: Saved) -> dict[str, np.ndarray]:
  """'value' and 'error' of a run's network, float64 (1,)."""
  loss = training_loss(run.model, run.data)
  key = jax.random.key(0)
  return _as_arrays([largest_eigenvalue(loss, run.variables['params'], key)])


def _as_arrays(found: Sequence[Eigenvalue]) -> dict[str, np.ndarray]:
  return dict(zip(Eigenvalue._fields, np.array(found).T, strict=True))


@plotting.style()
def draw(
  measured: Mapping[int, Mapping[str, Mapping[str, np.ndarray]]], out: Path
) -> list[Path]:
  """Draws the arrays of `measure`: SVG and PNG files in the folder `out`.

  Above, the largest eigenvalue against the depth, the median of the draws and
  their range; below, 2 over it: the largest rate at which gradient descent on
  the quadratic around the start is stable.
  """
  depths = list(measured)
  figure, panels = plotting.new_figure(2, height=4.6, sharex=True)
  for i, column in enumerate(measured[depths[0]]):
    aside = np.add(depths, 0.15 * (i - 1))  # Or ranges would hide each other.
    values = np.stack([measured[d][column]['value'] for d in depths])
    for axes, y in zip(panels, (values, 2 / values), strict=True):
      middle = np.median(y, 1)
      axes.errorbar(
        aside,
        middle,
        (middle - y.min(1), y.max(1) - middle),
        **plotting.marked_style(column),
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
  labels = panels[0].get_legend_handles_labels()
  plotting.legend(figure, *labels, columns=2)
  return plotting.save(figure, out, 'curvature')


def training_loss(
  model: nn.Module, data: Any, images: int = 128
) -> Callable[[Any], jax.Array]:
  """The mean cross-entropy of the first training images, without L2.

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
      f'data {data.name!r} comes in batches; expected a data set that fits on '
      'a device'
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

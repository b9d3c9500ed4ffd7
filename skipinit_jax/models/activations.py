"""ReLU and concatenated ReLU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from skipinit_jax.models.precision import widen

Activation = Callable[[jax.Array], jax.Array]


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0), whose derivative is read from the output.

  The next convolution keeps the output anyway, so that neither the input nor
  a mask need be kept for the backward pass.
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents
  y = relu(x)
  return y, _masked(y, dx)


# Not to be differentiated with the mask kept: a scan would keep it beside y.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _masked(y: jax.Array, dx: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(y, dx, cuda=_barred, default=_where)


def _where(y: jax.Array, dx: jax.Array) -> jax.Array:
  return jnp.where(y > 0, dx, jnp.zeros_like(y))


def _barred(y: jax.Array, dx: jax.Array) -> jax.Array:
  """For CUDA, where XLA would turn `max(x, 0) > 0` into `x > 0` and keep x.

  On TPUs the barrier costs memory and traffic instead.
  """
  return _where(jax.lax.optimization_barrier(y), dx)


# 1 over the standard deviation of max(x, 0) for standard normal x, which is
# sqrt(2 / (1 - 1/pi)) = 1.7129; as the authors have it, from a sample.
GAMMA = 1.7139588594436646


def scaled_relu(x: jax.Array) -> jax.Array:
  """GAMMA max(x, 0): variance 1 for standard normal inputs.

  Brock, De, Smith 2021. The factor comes first, so that `relu`'s output is all
  that the backward pass keeps.
  """
  return relu(times(x, GAMMA))


def times(x: jax.Array, factor: jax.Array | float) -> jax.Array:
  """x * factor with the dtype of x; the factor isn't rounded to it."""
  return (widen(x) * factor).astype(x.dtype)


def crelu(x: jax.Array) -> jax.Array:
  """Concatenated ReLU: max(x, 0), then max(-x, 0), twice the channels.

  Shang et al. 2016, https://arxiv.org/abs/1603.05201.
  """
  return relu(jnp.concatenate([x, -x], axis=-1))


ACTIVATIONS: dict[str, Activation] = {'relu': relu, 'crelu': crelu}

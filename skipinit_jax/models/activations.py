"""ReLU and concatenated ReLU."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose derivative is read from its output, not from its input.

  The next convolution keeps that output anyway; see `stages.keep`.
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = relu(*primals)
  return y, jnp.where(y > 0, *tangents, jnp.zeros_like(y))


def crelu(x: jax.Array) -> jax.Array:
  """Concatenated ReLU: max(x, 0), then max(-x, 0), twice the channels."""
  return relu(jnp.concatenate([x, -x], axis=-1))


ACTIVATIONS = {'relu': relu, 'crelu': crelu}

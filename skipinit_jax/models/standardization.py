"""Scaled weight standardization (Brock, De, Smith 2021).

https://arxiv.org/abs/2101.08692, with the epsilon, the biases and the factors
of the authors' code (deepmind-research, nfnets/base.py).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skipinit_jax.models.precision import Conv, widen

# A floor of the variance of a kernel's outputs, not of its elements.
EPSILON = 1e-4


def standardize(kernel: jax.Array, gain: jax.Array) -> jax.Array:
  """Kernels of mean 0 and variance gain^2 / fan-in, for each output channel.

  (W - mean) * gain / sqrt(max(fan_in * variance, 1e-4)), in float32 or wider.

  Args:
    kernel: (..., height, width, inputs, outputs), with any number of spatial
      axes, and a first axis that `gain` has too if a scan stacks them.
    gain: (..., outputs).

  Returns:
    The shape and dtype of `kernel`.
  """
  axes = tuple(range(gain.ndim - 1, kernel.ndim - 1))
  fan_in = math.prod(kernel.shape[axis] for axis in axes)
  wide = widen(kernel)
  mean = wide.mean(axes, keepdims=True)
  variance = jnp.square(wide - mean).mean(axes, keepdims=True)
  scale = jax.lax.rsqrt(jnp.maximum(fan_in * variance, EPSILON))
  scale *= jnp.expand_dims(widen(gain), axes)
  return ((wide - mean) * scale).astype(kernel.dtype)


class StandardizedConv(Conv):
  """`nn.Conv` with standardized kernels, a gain and a factor.

  Parameters: `kernel`, `bias`, and `gain`, shape (outputs,), 1 at first; all of
  `param_dtype`.

  Attributes:
    scale: factor on the output, folded into the kernel and the bias.
  """

  scale: float = 1.0

  @nn.nowrap
  def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
    """Makes a parameter; returns the kernel or the bias that is used."""
    value = super().param(name, *args, **kwargs)
    if name == 'kernel':
      gain = super().param(
        'gain', nn.initializers.ones, (self.features,), self.param_dtype
      )
      # Recomputed: a scan would keep what its gradient needs for every block.
      value = jax.checkpoint(standardize, prevent_cse=False)(value, gain)
    elif name != 'bias':
      return value
    return value if self.scale == 1.0 else self.scale * value

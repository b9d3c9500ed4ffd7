"""Layers whose biases and scalars get gradients summed in float32 or wider.

Flax casts a bias to the compute dtype before adding it, so the bias's gradient
is a sum over a whole feature map in that dtype. A bfloat16 sum stops growing at
256 equal terms. Here the map is widened, the bias added, and the result cast
back; compilers fuse the casts, so they cost no memory traffic.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype


def widen(x: jax.Array) -> jax.Array:
  """Returns x in float32, or unchanged if its dtype is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def promote_but_bias(
  inputs: Any, kernel: Any, bias: Any, *, dtype: Dtype | None = None
) -> list[Any]:
  """Flax's `promote_dtype`, except that the bias stays in float32 or wider."""
  promoted = promote_dtype(inputs, kernel, bias, dtype=dtype)
  if bias is not None:
    wide = jnp.promote_types(promoted[1].dtype, jnp.float32)
    promoted[2] = jnp.asarray(bias, wide)
  return promoted


class Conv(nn.Conv):
  """`nn.Conv` whose bias gets a gradient summed in float32 or wider."""

  promote_dtype: Callable[..., list[Any]] = promote_but_bias

  @nn.nowrap  # Interceptors see only the call of Flax's layer.
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns what `nn.Conv` returns, in its compute dtype."""
    return super().__call__(inputs).astype(_compute_dtype(self, inputs))


class Dense(nn.Dense):
  """`nn.Dense` whose bias gets a gradient summed in float32 or wider."""

  promote_dtype: Callable[..., list[Any]] = promote_but_bias

  @nn.nowrap
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns what `nn.Dense` returns, in its compute dtype."""
    return super().__call__(inputs).astype(_compute_dtype(self, inputs))


def _compute_dtype(layer: nn.Conv | nn.Dense, inputs: jax.Array) -> Dtype:
  return layer.dtype or jnp.result_type(inputs, layer.param_dtype)


class ScalarBias(nn.Module):
  """Adds one learnable scalar, `scalar_bias`, to all of its input (Fixup)."""

  param_dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x + scalar_bias, with the shape and dtype of x."""
    bias = self.param(
      'scalar_bias', nn.initializers.zeros, (), self.param_dtype
    )
    return (widen(x) + widen(bias)).astype(x.dtype)

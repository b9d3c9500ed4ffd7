"""Layers whose biases and scalars get gradients summed in float32 or wider.

Flax casts a bias to the compute dtype before it adds it, so that its gradient
is a sum over a whole feature map in that dtype. A bfloat16 sum stops growing at
256 equal terms. Here the map is widened, the bias added, and the result cast
back: compilers fuse the casts, so that they cost no memory traffic.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, PromoteDtypeFn


def widen(x: jax.Array) -> jax.Array:
  """x in float32, or as it is where its dtype is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def promote_but_bias(
  inputs: Any, kernel: Any, bias: Any, *, dtype: Dtype | None = None
) -> list[Any]:
  """Flax's `promote_dtype`, which leaves the bias in float32 or wider."""
  promoted = promote_dtype(inputs, kernel, bias, dtype=dtype)
  if bias is not None:
    wide = jnp.promote_types(promoted[1].dtype, jnp.float32)
    promoted[2] = jnp.asarray(bias, wide)
  return promoted


class _WideBias(nn.Module):
  """Flax's layer, with its bias added in float32 or wider."""

  promote_dtype: PromoteDtypeFn = promote_but_bias

  @nn.nowrap  # Interceptors see the one call of Flax's own layer.
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """What Flax's layer returns, of its compute dtype."""
    dtype = self.dtype or jnp.result_type(inputs, self.param_dtype)
    return super().__call__(inputs).astype(dtype)


class Conv(_WideBias, nn.Conv):
  """`nn.Conv` whose bias gets a gradient summed in float32 or wider."""


class Dense(_WideBias, nn.Dense):
  """`nn.Dense` whose bias gets a gradient summed in float32 or wider."""


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

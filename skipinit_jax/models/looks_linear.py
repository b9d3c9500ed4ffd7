"""Orthogonal and looks-linear kernels (Balduzzi et al. 2017, section 4)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import Initializer

KERNEL_INITS = ('he', 'orthogonal', 'looks_linear')


def kernel_initializer(name: str, he: Initializer) -> Initializer:
  """Looks up the initializer of a network's kernels.

  Args:
    name: one of `KERNEL_INITS`: 'he'; 'orthogonal', with a gain of sqrt(2), as
      ReLU halves the second moment; or 'looks_linear', orthogonal kernels
      mirrored for concatenated ReLU, which need no gain.
    he: the initializer for 'he'.
  """
  if name == 'he':
    return he
  return orthogonal(2**0.5) if name == 'orthogonal' else mirrored(orthogonal())


def orthogonal(scale: float = 1.0) -> Initializer:
  """Orthogonal matrices, at the center tap of a convolution's kernel.

  A convolution with such a kernel ("delta-orthogonal", Xiao et al. 2018) maps
  each pixel by one orthogonal matrix. With stride 1 and at least as many output
  as input channels it keeps the norm of an image, times `scale`; with fewer it
  is a projection.

  Args:
    scale: factor on the kernel.

  Returns:
    init(key, shape, dtype) for shapes (inputs, outputs) and (..., inputs,
    outputs) with one to three spatial axes.

  >>> import jax
  >>> kernel = orthogonal()(jax.random.key(0), (3, 3, 2, 4))
  >>> bool(jnp.allclose(kernel[1, 1] @ kernel[1, 1].T, jnp.eye(2), atol=1e-6))
  True
  """
  delta = nn.initializers.delta_orthogonal(scale)

  def init(
    key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32
  ) -> jax.Array:
    *spatial, inputs, outputs = shape
    if not spatial:
      return nn.initializers.orthogonal(scale)(key, shape, dtype)
    if inputs <= outputs:
      return delta(key, shape, dtype)
    return delta(key, (*spatial, outputs, inputs), dtype).swapaxes(-1, -2)

  return init


def mirrored(init: Initializer) -> Initializer:
  """Kernels (W, -W) over the two halves of their inputs.

  After `activations.crelu` such a layer computes W relu(x) - W relu(-x) = W x:
  the network looks linear at the start.

  Args:
    init: makes W, for half of the inputs.

  Raises:
    InputError: when called for an odd number of inputs.

  >>> import jax
  >>> init = mirrored(nn.initializers.ones)
  >>> init(jax.random.key(0), (4, 1), 'float32').tolist()
  [[1.0], [1.0], [-1.0], [-1.0]]
  """

  def mirror(
    key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32
  ) -> jax.Array:
    *spatial, inputs, outputs = shape
    if inputs % 2:
      raise InputError(
        'a mirrored kernel follows concatenated ReLUs: expected an even number '
        f'of inputs, got {inputs}'
      )
    half = init(key, (*spatial, inputs // 2, outputs), dtype)
    return jnp.concatenate([half, -half], axis=-2)

  return mirror

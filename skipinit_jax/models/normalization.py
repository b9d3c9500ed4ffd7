"""Batch normalization over a stated group of images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.checks import check_whole


class BatchNorm(nn.Module):
  """Batch normalization whose statistics group is a number of images.

  Flax's own layer always takes the whole batch that a device holds. Here a
  smaller group may be named ("ghost batches"), and the statistics are averaged
  over `axis_name` where they should span all devices.

  Attributes:
    group: images that share their statistics; None: all that this call sees.
      It must divide their number.
    axis_name: mapped axis to average the statistics over, or None.
    momentum: of the running averages used at evaluation.
    epsilon: added to the variance.
    dtype: of the result; the statistics are always float32.
    param_dtype: of `scale` and `bias`, shape (channels,).
  """

  group: int | None = None
  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Dtype | None = None
  param_dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalizes x: (batch, height, width, channels).

    Raises:
      InputError: a `group` that does not divide the batch, or no images.
    """
    if self.group is not None:
      check_whole('group', self.group)
    channels = x.shape[-1]
    scale = self.param(
      'scale', nn.initializers.ones, (channels,), self.param_dtype
    )
    bias = self.param(
      'bias', nn.initializers.zeros, (channels,), self.param_dtype
    )
    stats = functools.partial(self.variable, 'batch_stats')
    running_mean = stats('mean', jnp.zeros, channels, jnp.float32)
    running_var = stats('var', jnp.ones, channels, jnp.float32)
    if train:
      if 0 in x.shape:
        raise InputError(
          f'batch statistics need images with pixels, got {kind(x)}'
        )
      group = self.group or x.shape[0]
      if x.shape[0] % group:
        raise InputError(
          f'a batch of {x.shape[0]} images does not split into statistics '
          f'groups of {group}'
        )
      groups = x.reshape(-1, group, *x.shape[1:])
      mean, var = self._statistics(groups)
      if not self.is_initializing():
        m = self.momentum
        running_mean.value = m * running_mean.value + (1 - m) * mean.mean(0)
        running_var.value = m * running_var.value + (1 - m) * var.mean(0)
    else:
      groups = x[None]
      mean, var = running_mean.value[None], running_var.value[None]
    factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
    shift = bias[None] - mean * factor
    factor, shift = (v[:, None, None, None] for v in (factor, shift))
    y = groups * factor + shift
    return y.reshape(x.shape).astype(self.dtype or x.dtype)

  def _statistics(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance per group and channel, shape (groups, channels)."""
    values = groups.astype(jnp.float32)
    mean = values.mean((1, 2, 3))
    square = jnp.square(values).mean((1, 2, 3))
    if self.axis_name is not None and not self.is_initializing():
      mean, square = jax.lax.pmean((mean, square), self.axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)

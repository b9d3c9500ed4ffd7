"""Batch normalization over groups of a given number of images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.checks import check_whole


class BatchNorm(nn.Module):
  """Batch normalization with statistics over a given number of examples.

  Flax's layer always uses the whole batch of a device. Here statistics may be
  those of smaller groups ("ghost batches", Hoffer et al. 2017), or be averaged
  over devices (Ioffe & Szegedy 2015 for the layer).

  Attributes:
    group: consecutive examples that share statistics, a divisor of the batch;
      None: the whole batch of this call.
    axis_name: mapped axis over which to average the statistics, or None.
    momentum: of the running averages used at evaluation.
    epsilon: added to the variance.
    dtype: of the result; None: that of the input. Statistics are float32.
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
    """Normalizes every channel.

    Args:
      x: (batch, ..., channels), floating.
      train: use the statistics of the batch, and update the running averages.

    Returns:
      An array like `x`, of `dtype`.

    Raises:
      InputError: a `group` that does not divide the batch, or an empty batch.
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
    shape = (len(groups), *(1,) * (x.ndim - 1), channels)
    y = groups * factor.reshape(shape) + shift.reshape(shape)
    return y.reshape(x.shape).astype(self.dtype or x.dtype)

  def _statistics(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance, float32 (groups, channels) each."""
    values = groups.astype(jnp.float32)
    axes = tuple(range(1, groups.ndim - 1))
    mean = values.mean(axes)
    square = jnp.square(values).mean(axes)
    if self.axis_name is not None and not self.is_initializing():
      mean, square = jax.lax.pmean((mean, square), self.axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)

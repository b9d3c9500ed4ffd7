"""Fully connected residual networks: what theory speaks of, without images."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from skipinit_jax.errors import InputError, kind, unknown
from skipinit_jax.models.activations import relu
from skipinit_jax.models.checks import check_floating_dtype, check_whole
from skipinit_jax.models.methods import METHODS, Method, resolve_method
from skipinit_jax.models.normalization import BatchNorm
from skipinit_jax.models.skipinit import Join, SkipInitDense
from skipinit_jax.models.stages import Stage

# Activation -> its function, and the variance of a kernel times its fan-in
# that keeps the second moment of what the activation is given.
ACTIVATIONS: dict[str, tuple[Callable, float]] = {
  'relu': (relu, 2.0),  # He et al. 2015.
  'linear': (lambda x: x, 1.0),
}


class DenseResNet(nn.Module):
  """A residual network of dense layers, all of one width, without biases.

  A stem, blocks of [norm, activation, dense] for each layer of the branch, a
  last norm and activation, and a classifier. The blocks are those of one stage,
  so that the parameters have the names of `ResNet`'s.

  Attributes:
    blocks: number of residual blocks, d in 1/sqrt(d).
    width: features of the stem and of every layer.
    num_classes: of the classifier; None returns the features before it.
    method: a name in `METHODS`, or a `Method`; its `normalize`, `alpha`, `gain`
      and `zero_last` are read, and Fixup's blocks and rescaling refused.
    alpha: initial value of the scalar, a number or '1/sqrt(d)' for d blocks;
      None: the method's own.
    activation: 'relu' with kernels of variance 2 / fan-in, or 'linear' with
      1 / fan-in.
    skip: False makes the feed-forward network of the same layers; there is no
      sum, and so no `gain`. A scalar at 0 makes its output constant.
    branch_layers: dense layers in a branch, 1 or 2.
    scan: all blocks but the first as one scanned block; see `stages`.
    dtype: of the computation; None: that of inputs and parameters. The logits
      are float32 at least.
    param_dtype: of the parameters.
  """

  blocks: int
  width: int
  num_classes: int | None = 10
  method: str | Method = 'skipinit'
  alpha: float | str | None = None
  activation: Literal['relu', 'linear'] = 'relu'
  skip: bool = True
  branch_layers: int = 2
  scan: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = 'float32'

  @property
  def num_blocks(self) -> int:
    """Residual blocks in the network, d in 1/sqrt(d)."""
    return self.blocks

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Computes the logits.

    Args:
      inputs: (batch, ...), floating; flattened to (batch, features).
      train: use batch statistics.

    Returns:
      Logits (batch, num_classes), or features (batch, width) if num_classes is
      None; float32 unless the parameters are wider.

    Raises:
      InputError: inputs that are not floating or have no batch, an unknown
        method or dtype, sizes that can't be, or an alpha of 0 with `zero_last`.
    """
    method = self._check(inputs)
    act, variance = ACTIVATIONS[self.activation]
    init = nn.initializers.variance_scaling(variance, 'fan_in', 'normal')
    dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    dense = functools.partial(
      nn.Dense, use_bias=False, kernel_init=init, **dtypes
    )
    last = dense
    if (alpha := method.alpha_value(self.blocks)) is not None:
      last = functools.partial(
        SkipInitDense, init_value=alpha, **dense.keywords
      )
    if method.zero_last:
      last = functools.partial(last, kernel_init=nn.initializers.zeros)
    norm = None
    if method.normalize:
      norm = functools.partial(BatchNorm, **dtypes)

    x = inputs.reshape(inputs.shape[0], -1)
    x = dense(self.width, name='stem')(x)
    x = Stage(
      lambda strides, name: DenseBlock(
        dense,
        last,
        norm,
        act,
        self.branch_layers,
        join=functools.partial(Join, method.gain) if self.skip else None,
        name=name,
      ),
      size=self.blocks,
      strides=1,
      scan=self.scan,
      name='stage1',
    )(x, train=train)
    if norm:
      x = normalized(norm(name='norm'), x, train)
    x = act(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.num_classes is None:
      return x
    return nn.Dense(
      self.num_classes,
      kernel_init=init,
      param_dtype=self.param_dtype,
      name='classifier',
    )(x)

  def _check(self, inputs: jax.Array) -> Method:
    if (
      getattr(inputs, 'ndim', 0) < 2
      or not jnp.issubdtype(inputs.dtype, jnp.floating)
      or 0 in inputs.shape
    ):
      raise InputError(
        'inputs must be floating and of shape (batch, ...), no axis empty, got '
        f'{kind(inputs)}'
      )
    check_whole('blocks', self.blocks)
    check_whole('width', self.width)
    if self.num_classes is not None:
      check_whole('num_classes', self.num_classes)
    check_floating_dtype('dtype', self.dtype)
    check_floating_dtype('param_dtype', self.param_dtype)
    if self.activation not in ACTIVATIONS:
      raise InputError(unknown('activation', self.activation, ACTIVATIONS))
    if self.branch_layers not in (1, 2):
      raise InputError(f'branch_layers={self.branch_layers}: expected 1 or 2')
    method = resolve_method(self.method, self.alpha)
    method.check(self.blocks)
    if method.fixup_block or method.rescale or method.scalar_biases:
      good = [name for name in METHODS if name != 'fixup']
      raise InputError(
        f'method={self.method!r}: a DenseResNet has no part of Fixup but '
        f'zero_last; expected one of {", ".join(good)}'
      )
    return method


class DenseBlock(nn.Module):
  """[norm, activation, dense] once or twice, and the skip path if there is one.

  Attributes:
    dense, last: make the layers of the branch, the last one with the scalar.
    norm: makes a `BatchNorm`, or None.
    activation: of arrays.
    branch_layers: dense layers in the branch.
    join: makes the `Join`; None: no skip path.
  """

  dense: Callable
  last: Callable
  norm: Callable | None
  activation: Callable
  branch_layers: int
  join: Callable | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: (batch, width)."""
    skip, width = x, x.shape[-1]
    for i in range(1, self.branch_layers + 1):
      if self.norm:
        x = normalized(self.norm(name=f'norm{i}'), x, train)
      layer = self.last if i == self.branch_layers else self.dense
      x = layer(width, name=f'dense{i}')(self.activation(x))
    return self.join(name='join')(skip, x) if self.join else x


def normalized(norm: BatchNorm, x: jax.Array, train: bool) -> jax.Array:
  """Applies `norm`, which takes images, to x: (batch, features)."""
  return norm(x[:, None, None, :], train=train)[:, 0, 0, :]

"""Fully connected residual networks, the ones that theory is about."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
from flax.typing import Dtype

from skipinit_jax.errors import InputError, unknown
from skipinit_jax.models.activations import Activation, relu
from skipinit_jax.models.checks import (
  check_floating_dtype,
  check_inputs,
  check_whole,
)
from skipinit_jax.models.layers import Norm, last_layer, make_norm
from skipinit_jax.models.methods import METHODS, Method, resolve_method
from skipinit_jax.models.precision import widen
from skipinit_jax.models.skipinit import Join, SkipInitDense
from skipinit_jax.models.stages import Stage

# Activation -> its function, and the variance of a kernel times its fan-in
# that keeps the second moment of the activation's input.
ACTIVATIONS: dict[str, tuple[Activation, float]] = {
  'relu': (relu, 2.0),  # He et al. 2015.
  'linear': (lambda x: x, 1.0),
}


class DenseResNet(nn.Module):
  """A residual network of dense layers, all of one width, without biases.

  A stem, blocks of [norm, activation, dense] for each layer of the branch, a
  last norm and activation, and a classifier. All blocks are in one stage, so
  parameters are named as in `ResNet`.

  Attributes:
    blocks: number of residual blocks, d in 1/sqrt(d).
    width: features of the stem and of every layer.
    num_classes: of the classifier; None returns the features before it.
    method: a name in `METHODS`, or a `Method`; its `normalize`, `alpha`, `gain`
      and `zero_last` apply, Fixup's blocks, rescaling and standardized kernels
      are refused.
    alpha: initial value of the scalar, a number or '1/sqrt(d)' for d blocks;
      None: the method's own.
    activation: 'relu' with kernels of variance 2 / fan-in, or 'linear' with
      1 / fan-in.
    skip: False: a feed-forward network of the same layers. It has no sums, so
      no `gain`; a scalar at 0 makes its output constant.
    branch_layers: dense layers in a branch, 1 or 2.
    scan: run all blocks but the first as one scanned block; see `stages`.
    dtype: of the computation; None: that of inputs and parameters. The logits
      are at least float32.
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
        method or dtype, impossible sizes, or an alpha of 0 with `zero_last`.
    """
    method = self._check(inputs)
    activation, variance = ACTIVATIONS[self.activation]
    init = nn.initializers.variance_scaling(variance, 'fan_in', 'normal')
    dense = functools.partial(
      nn.Dense,
      use_bias=False,
      kernel_init=init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    norm = make_norm(method, dtype=self.dtype, param_dtype=self.param_dtype)

    def make_block(strides: int, name: str) -> DenseBlock:
      return DenseBlock(
        dense=dense,
        last=last_layer(method, self.blocks, dense, SkipInitDense),
        norm=norm,
        activation=activation,
        branch_layers=self.branch_layers,
        join=functools.partial(Join, method.gain) if self.skip else None,
        name=name,
      )

    x = inputs.reshape(inputs.shape[0], -1)
    x = dense(self.width, name='stem')(x)
    x = Stage(
      make_block,
      size=self.blocks,
      strides=1,
      scan=self.scan,
      name='stage1',
    )(x, train=train)
    x = widen(activation(norm('norm')(x, train=train)))
    if self.num_classes is None:
      return x
    return nn.Dense(
      self.num_classes,
      kernel_init=init,
      param_dtype=self.param_dtype,
      name='classifier',
    )(x)

  def _check(self, inputs: jax.Array) -> Method:
    check_inputs('inputs', inputs, '(batch, ...)', rank=2, or_more=True)
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
    if method.standardize:
      raise InputError(
        f'method={self.method!r}: the layers of a DenseResNet are not '
        'standardized; expected a ResNet or WideResNet, or another method'
      )
    if method.fixup_block or method.rescale or method.scalar_biases:
      good = [name for name in METHODS if name not in ('fixup', 'nf')]
      raise InputError(
        f'method={self.method!r}: a DenseResNet has no part of Fixup except '
        f'zero_last; expected one of {", ".join(good)}'
      )
    return method


class DenseBlock(nn.Module):
  """[norm, activation, dense] once or twice, and the skip path if there is one.

  Attributes:
    dense, last: make the layers of the branch, the last one with the scalar.
    norm: called as norm(name)(x, train=train).
    activation: before each layer.
    branch_layers: dense layers in the branch.
    join: makes the `Join`; None: no skip path.
  """

  dense: Callable[..., nn.Dense]
  last: Callable[..., nn.Dense]
  norm: Callable[[str], Norm]
  activation: Activation
  branch_layers: int
  join: Callable[..., Join] | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (batch, width) to (batch, width)."""
    skip, width = x, x.shape[-1]
    for i in range(1, self.branch_layers + 1):
      x = self.activation(self.norm(f'norm{i}')(x, train=train))
      layer = self.last if i == self.branch_layers else self.dense
      x = layer(width, name=f'dense{i}')(x)
    return self.join(name='join')(skip, x) if self.join else x

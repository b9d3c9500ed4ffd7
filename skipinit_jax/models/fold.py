"""Scalars into kernels: the plain network that computes the same function."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.dense import DenseResNet
from skipinit_jax.models.methods import resolve_method
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import stack_blocks, unstack_blocks

Network = TypeVar('Network', ResNet, DenseResNet)

# Of the factors that `gain` becomes: float32 and bfloat16 end at 2^127, and
# what is left is for the activations.
LIMIT = 2.0**96


def fold(
  model: Network, params: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
  """The network without its scalars, and the parameters that go with it.

  Every alpha is multiplied into the kernel and the bias of its layer. The
  factor `gain` on every block's sum goes into the stem, the projections and the
  biases, see `_fold_gain`. What is left are convolutions, biases, ReLU and
  sums; the outputs, and those of every stage that a projection follows, are
  the same to rounding.

  Fixup's scalar biases stay: those before a convolution come before its zero
  padding too. Batch normalization stays as it is: a `batchnorm` network, which
  has no scalars, comes back unchanged.

  Args:
    model: a `ResNet` or `DenseResNet`, scanned or not.
    params: its parameters, nested dicts of NumPy or JAX arrays.

  Returns:
    The model with a method that has no alpha and a gain of 1, and its
    parameters, of the dtypes they had; products are taken in float32 or wider.

  Raises:
    InputError: a gain that is not positive, that goes with batch
      normalization, or whose powers leave float32; another network; variables
      in the place of parameters.
  """
  if not isinstance(model, ResNet | DenseResNet):
    raise InputError(
      f'fold takes a ResNet or DenseResNet, got {kind(model)}; expected '
      'fold_params(params) for any other network'
    )
  if 'params' in params:
    raise InputError(
      f'fold takes parameters, got variables of {", ".join(params)}; expected '
      "fold(model, variables['params'])"
    )
  method = resolve_method(model.method, model.alpha)
  folded = fold_params(params)
  # Without skip paths there are no sums for the gain to be on.
  if method.gain != 1 and model.skip:
    if method.normalize or not method.gain > 0:
      raise InputError(
        f'gain={method.gain:g} folds where ReLU passes positive factors on: '
        'expected a positive gain, and a method without batch normalization'
      )
    folded = _fold_gain(unstack_blocks(folded), method.gain)
    if model.scan:
      folded = stack_blocks(folded)
  plain = dataclasses.replace(method, alpha=None, gain=1.0)
  return model.clone(method=plain, alpha=None), folded


def fold_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """Multiplies every `alpha` into the `kernel` and `bias` next to it.

  For any Flax model: afterwards `nn.Conv` takes the place of `SkipInitConv` and
  `nn.Dense` that of `SkipInitDense`, under the same names.

  Args:
    params: nested dicts of arrays. An alpha has the first axes of its kernel,
      none at all unless a scan stacks them.

  Returns:
    The same without the leaves `alpha`; dtypes stay, products are taken in
    float32 or wider.

  Raises:
    InputError: an alpha with no kernel next to it, as `SkipInit()` has.

  >>> import numpy as np
  >>> layer = {'alpha': np.float32(0.5), 'kernel': np.ones((1, 2))}
  >>> fold_params({'conv2': layer})
  {'conv2': {'kernel': array([[0.5, 0.5]])}}
  """
  return _fold_layers(params, '')


def _fold_layers(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
  tree = {
    name: _fold_layers(value, f'{where}/{name}')
    if isinstance(value, Mapping)
    else value
    for name, value in tree.items()
  }
  if 'alpha' not in tree or isinstance(tree['alpha'], Mapping):
    return tree
  if 'kernel' not in tree:
    raise InputError(
      f"'{where.lstrip('/')}' has an alpha and no kernel to fold it into: "
      'expected a branch that ends in SkipInitConv or SkipInitDense'
    )
  alpha = tree.pop('alpha')
  for name in {'kernel', 'bias'} & tree.keys():
    axes = tree[name].ndim - alpha.ndim
    tree[name] = _times(tree[name], alpha.reshape(alpha.shape + (1,) * axes))
  return tree


def _fold_gain(params: dict[str, Any], gain: float) -> dict[str, Any]:
  """Folds x = gain * (skip + branch) at the end of every block.

  The plain network's stream is x / s, with an s that starts anew at every
  projection and is 1 at the last block before one: so that a block without
  projection, whose skip path can't be scaled, has s_out = gain * s_in. Biases
  inside the branch are divided by s_in, as the layers and ReLU between them
  pass positive factors on. The convolutions that end a block take
  gain * s_in / s_out, which is 1 but for blocks that project, and their biases
  gain / s_out.

  Args:
    params: without alphas, unrolled.
    gain: positive.
  """
  blocks = [
    (stage, block)
    for stage in _numbered(params, 'stage')
    for block in _numbered(params[stage], 'block')
  ]
  params = dict(params)
  s = 1.0  # After the block; s_out, going backwards.
  for stage, block in reversed(blocks):
    layers, s_out = params[stage][block], s
    s = 1.0 if 'projection' in layers else s_out / gain
    if not 1 / LIMIT <= s <= LIMIT:
      raise InputError(
        f'gain={gain:g} to the power of the blocks from {stage}/{block} to the '
        f'next projection is {1 / s:.3g}, which leaves no room for the '
        f'activations in float32; expected {1 / LIMIT:.0e} to {LIMIT:.0e}'
      )
    last = max(int(m[1]) for n in layers if (m := re.search(r'(\d+)$', n)))
    ends = ('projection', f'conv{last}', f'dense{last}', f'bias{last}b')
    folded = {
      name: _scale(layer, gain * s / s_out, gain / s_out)
      if name in ends
      else _scale(layer, 1.0, 1 / s)
      for name, layer in layers.items()
    }
    params[stage] = params[stage] | {block: folded}
  for name in {'stem', 'bias1'} & params.keys():
    params[name] = _scale(params[name], 1 / s, 1 / s)
  return params


def _numbered(tree: Mapping[str, Any], name: str) -> list[str]:
  """The keys `name1`, `name2`, ... in order."""
  found = [key for key in tree if re.fullmatch(rf'{name}\d+', key)]
  return sorted(found, key=lambda key: int(key.removeprefix(name)))


def _scale(layer: Mapping[str, Any], kernel: float, bias: float):
  factors = {'kernel': kernel, 'bias': bias, 'scalar_bias': bias}
  return {name: _times(leaf, factors[name]) for name, leaf in layer.items()}


def _times(leaf: Any, factor: Any) -> Any:
  """leaf * factor with the dtype of leaf, multiplied in float32 or wider."""
  wide = jnp.promote_types(leaf.dtype, jnp.float32)
  if not isinstance(factor, float):
    wide = jnp.promote_types(wide, factor.dtype)
  return (leaf.astype(wide) * factor).astype(leaf.dtype)

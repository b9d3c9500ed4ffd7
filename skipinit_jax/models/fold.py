"""Folding of scalars into kernels, for a plain network of the same function."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.activations import GAMMA
from skipinit_jax.models.dense import DenseResNet
from skipinit_jax.models.methods import Method, resolve_method
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import stack_blocks, unstack_blocks
from skipinit_jax.models.standardization import standardize

Network = TypeVar('Network', ResNet, DenseResNet)

# The largest factor that a gain may become: float32 and bfloat16 end at 2^127,
# and activations need the rest.
LIMIT = 2.0**96


def fold(
  model: Network, params: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
  """Returns the network without its scalars, and its parameters.

  Every alpha is multiplied into the kernel and the bias of its layer. The
  factor `gain` on every block's sum goes into the stem, the projections and the
  biases, see `_fold_gain`. Convolutions, biases, ReLU and sums remain. The
  outputs, and those of every stage that a projection follows, are the same to
  rounding.

  With `nf`, kernels are replaced by standardized ones, and all other factors go
  into kernels and biases: a network with biases, one on the stem too, remains.

  Fixup's scalar biases stay, as those before a convolution come before its zero
  padding too. Batch normalization stays: a `batchnorm` network, which has no
  scalars, is returned unchanged.

  Args:
    model: a `ResNet` or `DenseResNet`, scanned or not.
    params: its parameters, nested dicts of NumPy or JAX arrays.

  Returns:
    The model, its method without alpha, with a gain of 1 and not standardized,
    and its parameters, of the same dtypes; products are taken in float32 or
    wider.

  Raises:
    InputError: a gain that is not positive, that comes with batch
      normalization, or whose powers leave float32; another network; variables
      instead of parameters.
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
  if method.standardize:
    return _fold_standardized(model, method, params)
  folded = fold_params(params)
  # Without skip paths there are no sums to multiply by the gain.
  if method.gain != 1 and model.skip:
    if method.normalize or not method.gain > 0:
      raise InputError(
        f'gain={method.gain:g} folds only if ReLU passes it through: expected '
        'a positive gain, and a method without batch normalization'
      )
    folded = _fold_gain(unstack_blocks(folded), method.gain)
    if model.scan:
      folded = stack_blocks(folded)
  plain = dataclasses.replace(method, alpha=None, gain=1.0)
  return model.clone(method=plain, alpha=None), folded


def fold_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """Multiplies every `alpha` into the `kernel` and `bias` next to it.

  For any Flax model: afterwards `nn.Conv` and `nn.Dense` replace `SkipInitConv`
  and `SkipInitDense` under the same names.

  Args:
    params: nested dicts of arrays. Each alpha has shape (), or the first axes
      of its kernel if a scan stacks them.

  Returns:
    The same without the leaves `alpha`; dtypes stay, products are taken in
    float32 or wider.

  Raises:
    InputError: an alpha without a kernel next to it, as that of `SkipInit`, or
      a kernel that is standardized.

  >>> import numpy as np
  >>> layer = {'alpha': np.float32(0.5), 'kernel': np.ones((1, 2))}
  >>> fold_params({'conv2': layer})
  {'conv2': {'kernel': array([[0.5, 0.5]])}}
  """
  leaves: dict[Any, Any] = flatten_dict(_dicts(params), keep_empty_nodes=True)
  for *layer, name in [path for path in leaves if path[-1] == 'alpha']:
    if (*layer, 'kernel') not in leaves:
      raise InputError(
        f"'{'/'.join(layer)}' has an alpha and no kernel to fold it into: "
        'expected a branch that ends in SkipInitConv or SkipInitDense'
      )
    if (*layer, 'gain') in leaves:
      raise InputError(
        f"'{'/'.join(layer)}' has a gain, as of a standardized kernel, which "
        'needs more than its alpha: expected fold(model, params)'
      )
    alpha = leaves.pop((*layer, name))
    for path in ((*layer, 'kernel'), (*layer, 'bias')):
      if path in leaves:
        axes = leaves[path].ndim - alpha.ndim
        factor = alpha.reshape(alpha.shape + (1,) * axes)
        leaves[path] = _times(leaves[path], factor)
  return unflatten_dict(leaves)


def _dicts(tree: Any) -> Any:
  """Mappings of any kind as dicts, which `flatten_dict` looks into."""
  if not isinstance(tree, Mapping):
    return tree
  return {name: _dicts(value) for name, value in tree.items()}


def _fold_standardized(
  model: Any, method: Method, params: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
  """`fold` for methods with `standardize`."""
  folded = unstack_blocks(fold_params(_standardized(_dicts(params))))
  for stage, betas in enumerate(method.betas(model.stage_sizes), start=1):
    blocks = folded[f'stage{stage}']
    for block, beta in enumerate(betas or [], start=1):
      layers = blocks[f'block{block}']
      blocks[f'block{block}'] = _fold_block(layers, beta, method.branch_scale)
  # The last activation's factor goes back to where the stream begins.
  folded = _fold_gain(folded, 1.0, GAMMA)
  plain = dataclasses.replace(
    method,
    alpha=None,
    standardize=False,
    branch_scale=1.0,
    classifier_std=None,
  )
  model = model.clone(method=plain, alpha=None, biases=True, stem_bias=True)
  return model, stack_blocks(folded) if model.scan else folded


def _standardized(params: dict[str, Any]) -> dict[str, Any]:
  """Replaces every `gain` and the kernel next to it by a kernel."""
  leaves: dict[Any, Any] = flatten_dict(params, keep_empty_nodes=True)
  for *layer, name in [path for path in leaves if path[-1] == 'gain']:
    gain, kernel = leaves.pop((*layer, name)), leaves[*layer, 'kernel']
    new: Any = standardize(jnp.asarray(kernel), jnp.asarray(gain))
    if isinstance(kernel, np.ndarray):
      new = np.asarray(new, kernel.dtype)
    leaves[*layer, 'kernel'] = new
  return unflatten_dict(leaves)


def _fold_block(
  layers: Mapping[str, Any], beta: float, branch_scale: float
) -> dict[str, Any]:
  """Folds the factors of one block: each layer's input's, and the branch's."""
  last = _last_layer(layers)
  folded: dict[str, Any] = {}
  for name, layer in layers.items():
    before = GAMMA * beta if name in ('conv1', 'projection') else GAMMA
    after = branch_scale if name == f'conv{last}' else 1.0
    folded[name] = _scale(layer, before * after, after)
  return folded


def _last_layer(layers: Mapping[str, Any]) -> int:
  return max(int(m[1]) for n in layers if (m := re.search(r'(\d+)$', n)))


def _fold_gain(
  params: dict[str, Any], gain: float, end: float = 1.0
) -> dict[str, Any]:
  """Folds the gain in x = gain * (skip + branch) at the end of every block.

  The plain network's stream is x / s, where s is 1 at the last block before
  each projection, and 1 / `end` at the last of all. A block without projection
  can't scale its skip path, so it has s_out = gain * s_in. Biases inside the
  branch are divided by s_in, as layers and ReLU pass positive factors through.
  The convolutions that end a block are multiplied by gain * s_in / s_out, which
  is 1 in blocks without projection, and their biases by gain / s_out.

  Args:
    params: without alphas, unrolled.
    gain, end: positive.
  """
  blocks = [
    (stage, block)
    for stage in _numbered(params, 'stage')
    for block in _numbered(params[stage], 'block')
  ]
  params = dict(params)
  s = 1 / end  # s_out of the last block; the loop goes backwards.
  for stage, block in reversed(blocks):
    layers, s_out = params[stage][block], s
    s = 1.0 if 'projection' in layers else s_out / gain
    if not 1 / LIMIT <= s <= LIMIT:
      raise InputError(
        f'gain={gain:g} to the power of the blocks from {stage}/{block} to the '
        f'next projection is {1 / s:.3g}, which leaves no room for activations '
        f'in float32; expected {1 / LIMIT:.0e} to {LIMIT:.0e}'
      )
    last = _last_layer(layers)
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


def _scale(
  layer: Mapping[str, Any], kernel: float, bias: float
) -> dict[str, Any]:
  factors = {'kernel': kernel, 'bias': bias, 'scalar_bias': bias}
  return {name: _times(leaf, factors[name]) for name, leaf in layer.items()}


def _times(leaf: Any, factor: Any) -> Any:
  """leaf * factor with the dtype of leaf, multiplied in float32 or wider."""
  wide = jnp.promote_types(leaf.dtype, jnp.float32)
  if not isinstance(factor, float):
    wide = jnp.promote_types(wide, factor.dtype)
  return (leaf.astype(wide) * factor).astype(leaf.dtype)

"""Weights as safetensors files: ours, and those of timm's `resnetv2_*`.

A safetensors file holds named arrays and no code. The names here are those of
the tree, joined by dots, as in `params.stage1.block2.conv1.kernel`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from skipinit_jax.errors import InputError, kind, shown, unknown
from skipinit_jax.models.methods import METHODS, resolve_method
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import stack_blocks

SEPARATOR = '.'
# The dtypes that safetensors can write, and read again as NumPy arrays.
FLOATS = ('float64', 'float32', 'float16', 'bfloat16', 'complex64')
INTEGERS = ('int64', 'int32', 'int16', 'int8')
SAVED = (*FLOATS, 'bool', *INTEGERS, *(f'u{name}' for name in INTEGERS))
SHOWN = 3  # Names shown in an error message.
# A buffer of torch's batch normalization, which evaluation does not read.
COUNTER = 'num_batches_tracked'


def save_weights(path: os.PathLike | str, tree: Mapping[str, Any]) -> None:
  """Writes a tree of arrays to a safetensors file.

  Args:
    path: of the file.
    tree: nested dicts of NumPy or JAX arrays, such as {'params': ...,
      'batch_stats': ...}; an empty dict leaves no trace.

  Raises:
    InputError: a name that is no text or has a dot, a leaf that is no array or
      of a dtype that the format lacks, or a file that can't be written.
  """
  if not isinstance(tree, Mapping):
    raise InputError(f'expected nested dicts of arrays, got {kind(tree)}')
  flat = flatten_dict(tree)
  for names, leaf in flat.items():
    where = SEPARATOR.join(map(str, names))
    for name in names:
      if not isinstance(name, str):
        raise InputError(
          f'{where}: the key {name!r} is no text; expected {str(name)!r}'
        )
      if SEPARATOR in name:
        raise InputError(f'{name!r}: a name in a tree of weights has no dot')
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
      raise InputError(
        f'{where}: expected a NumPy or JAX array, got {shown(leaf)}'
      )
    if str(leaf.dtype) not in SAVED:
      raise InputError(f'{where}: {unknown("dtype", str(leaf.dtype), SAVED)}')
  # safetensors writes memory as it lies.
  arrays = {
    SEPARATOR.join(names): np.asarray(leaf, order='C')
    for names, leaf in flat.items()
  }
  try:
    Path(path).write_bytes(save(arrays))
  except OSError as error:
    raise InputError(f'can not write to {path}: {error.strerror}') from None


def load_weights(
  path: os.PathLike | str, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Reads a tree that `save_weights` wrote.

  Args:
    path: of the file.
    like: a tree with the names and shapes that are expected, of arrays or
      `jax.ShapeDtypeStruct`s, as `jax.eval_shape(model.init, ...)` gives it.

  Returns:
    Nested dicts of NumPy arrays.

  Raises:
    InputError: no such file, not a safetensors file, or names or shapes other
      than those of `like`.
  """
  arrays = _read(path)
  if like is not None:
    flat: dict[str, Any] = flatten_dict(like, sep=SEPARATOR)
    _compare(path, arrays, {name: (x.shape,) for name, x in flat.items()})
  return unflatten_dict(arrays, sep=SEPARATOR)


def load_timm(path: os.PathLike | str, model: ResNet) -> dict[str, Any]:
  """Variables of a `batchnorm` network from timm's weights for the same one.

  timm's resnetv2_18, 34, 50, 101 and 152 (Wightman, `timm/models/resnetv2.py`)
  are `ResNet18` ... `ResNet152` with method='batchnorm' and
  symmetric_padding=True: the same blocks, with the stride on the first 3x3
  convolution, projections of the activated input, and epsilon.

  Refused, as they do not fit: the -d and -t networks (deep stems, average
  pooling), GroupNorm, EvoNorm and FRN, and BiT's `x1_bit` (GroupNorm,
  standardized kernels).

  Args:
    path: of a safetensors file with timm's names.
    model: with method='batchnorm', symmetric_padding=True and without biases,
      scanned or not. With num_classes=None the classifier is left out. timm's
      images are scaled to [-1, 1] for these networks: mean and standard
      deviation 127.5 of 255.

  Returns:
    {'params': ..., 'batch_stats': ...} of float32 NumPy arrays.

  Raises:
    InputError: another network, no such file, or names or shapes
      that differ; names what differs.
  """
  _check_network(model)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(
    lambda x: model.clone(scan=False).init(jax.random.key(0), x, train=False),
    images,
  )
  wanted: dict[Any, Any] = flatten_dict(shapes)
  names = {path: _timm_name(path) for path in wanted}
  arrays = {k: v for k, v in _read(path).items() if not k.endswith(COUNTER)}
  if model.num_classes is None:
    arrays = {k: v for k, v in arrays.items() if not k.startswith('head.')}
  allowed = {names[path]: _timm_shapes(leaf) for path, leaf in wanted.items()}
  _compare(path, arrays, allowed)
  variables = unflatten_dict(
    {
      path: _from_torch(arrays[names[path]], leaf.shape)
      for path, leaf in wanted.items()
    }
  )
  return stack_blocks(variables) if model.scan else variables


def _check_network(model: ResNet) -> None:
  """Raises InputError for a network that timm does not have."""
  method = resolve_method(model.method, model.alpha)
  if method != METHODS['batchnorm']:
    raise InputError(
      f'method={model.method!r}: timm has these networks with batch '
      "normalization; expected method='batchnorm'"
    )
  for field, value in (
    ('biases', False),
    ('stem_bias', False),
    ('small_images', False),
    ('activation', 'relu'),
    ('skip', True),
    ('symmetric_padding', True),
  ):
    if (found := getattr(model, field)) != value:
      raise InputError(
        f"{field}={found!r}: not as in timm's networks; expected {value!r}"
      )


def _timm_name(path: tuple[str, ...]) -> str:
  """timm's name of one of our leaves.

  >>> _timm_name(('batch_stats', 'stage1', 'block2', 'norm3', 'var'))
  'stages.0.blocks.1.norm3.running_var'
  """
  modules = {
    'stage': 'stages.{}',
    'block': 'blocks.{}',
    'projection': 'downsample.conv',
    'stem': 'stem.conv',
    'classifier': 'head.fc',
  }
  leaves = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
  }
  parts = []
  for name in path[1:-1]:
    stem = name.rstrip('0123456789')
    number = int(name[len(stem) :] or 0)
    parts.append(
      name if stem in ('conv', 'norm') else modules[stem].format(number - 1)
    )
  return '.'.join([*parts, leaves[path[-1]]])


def _timm_shapes(leaf: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], ...]:
  """The shapes that one of our leaves may have in timm."""
  if len(leaf.shape) == 4:  # Ours is height, width, in, out.
    return (tuple(leaf.shape[i] for i in (3, 2, 0, 1)),)
  if len(leaf.shape) == 2:  # timm's classifier is a 1x1 convolution.
    return leaf.shape[::-1], (*leaf.shape[::-1], 1, 1)
  return (leaf.shape,)


def _from_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """One of timm's arrays with our axes, of our shape, float32."""
  axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]
  array = array.reshape(array.shape[: len(shape)]).transpose(axes)
  return np.ascontiguousarray(array, np.float32)


def _read(path: os.PathLike | str) -> dict[str, np.ndarray]:
  if not Path(path).is_file():
    raise InputError(f'there is no file {path}')
  try:
    return load_file(path)
  except OSError as error:
    raise InputError(f'can not read {path}: {error}') from None
  except SafetensorError as error:
    raise InputError(f'{path} is not a safetensors file ({error})') from None


def _compare(
  path: os.PathLike | str,
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[tuple[int, ...], ...]],
) -> None:
  """Raises InputError for names and shapes that are not the expected ones.

  Args:
    path: for the message.
    arrays: of a file.
    shapes: expected name -> the shapes that it may have.
  """
  wrong = [
    f'{name} {arrays[name].shape} for {allowed[0]}'
    for name, allowed in shapes.items()
    if name in arrays and arrays[name].shape not in allowed
  ]
  found = {
    'missing': [name for name in shapes if name not in arrays],
    'unknown': [name for name in arrays if name not in shapes],
    'other shapes': wrong,
  }
  parts = [f'{len(v)} {k} ({_first(v)})' for k, v in found.items() if v]
  if parts:
    raise InputError(f'{path} holds another network: {"; ".join(parts)}')


def _first(names: Iterable[str]) -> str:
  names = list(names)
  more = ', ...' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more

"""Small trained networks that come with the package."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from skipinit_jax.errors import InputError, RunError, unknown
from skipinit_jax.models.methods import Method
from skipinit_jax.models.resnet import ResNet

FOLDER = Path(__file__).parent / 'trained'
CARDS = 'models.json'
SCALE = ':scale'  # Ends the name of an int8 kernel's scales.


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A trained network; called with images, it returns logits.

  Attributes:
    model: for `model.apply(variables, images, train=False)`, with normalized
      images.
    variables: {'params': ..., 'batch_stats': ...}, float32 NumPy arrays.
    mean, std: (1, 1, 1, channels), float32; normalized images are (pixels -
      mean) / std. Pixels are on the data set's own scale, `card['pixels']`:
      scikit-learn's digits go from 0 to 16.
    card: how it was trained and what it reaches, as on the page "Trained
      networks" of the documentation.
  """

  model: ResNet
  variables: dict[str, Any] = dataclasses.field(repr=False)
  mean: np.ndarray = dataclasses.field(repr=False)
  std: np.ndarray = dataclasses.field(repr=False)
  card: dict[str, Any] = dataclasses.field(repr=False)

  def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
    """The logits of images.

    Args:
      images: uint8 (n, height, width, channels), as the data set has them.

    Returns:
      float32 (n, classes).

    Raises:
      InputError: images of another size or dtype.
    """
    images, shape = jnp.asarray(images), tuple(self.card['input']['shape'][1:])
    if images.dtype != jnp.uint8 or images.shape[1:] != shape:
      low, high = self.card['pixels']
      raise InputError(
        f'expected uint8 images (n, {", ".join(map(str, shape))}) with pixels '
        f'from {low} to {high}, got {images.dtype} of shape {images.shape}'
      )
    normalized = (images.astype(jnp.float32) - self.mean) / self.std
    logits = self.model.apply(self.variables, normalized, train=False)
    assert isinstance(logits, jax.Array)
    return logits


@functools.cache
def cards() -> dict[str, dict[str, Any]]:
  """What is known of each network that comes with the package, by name."""
  return json.loads((FOLDER / CARDS).read_text())


def load_pretrained(name: str) -> Pretrained:
  """A trained network by its name, such as 'digits-wrn16-skipinit'.

  Raises:
    InputError: a name that is not in `cards()`.
    RunError: its file is missing, or not the one that was published.
  """
  if not isinstance(name, str) or name not in cards():
    raise InputError(unknown('trained network', name, cards()))
  card, path = cards()[name], FOLDER / f'{name}.npz'
  try:
    data = path.read_bytes()
  except OSError as error:
    raise RunError(
      f'can not read {path}: {error.strerror}; install the package again'
    ) from None
  if (found := hashlib.sha256(data).hexdigest()) != card['sha256']:
    raise RunError(
      f'{path} is damaged: its SHA-256 is {found[:12]}..., expected '
      f'{card["sha256"][:12]}...; install the package again'
    )
  mean, std = (
    np.asarray(card['normalization'][key], np.float32)[None, None, None]
    for key in ('mean', 'std')
  )
  model = network_of(card['network'])
  return Pretrained(model, unpack(data), mean, std, dict(card))


def network_of(fields: Mapping[str, Any]) -> ResNet:
  """The network that a description in JSON names, field by field."""
  others = {
    'stage_sizes': tuple(fields['stage_sizes']),
    'method': Method(**fields['method']),
  }
  merged = {**fields, **others}
  return ResNet(**merged)


def pack(variables: Mapping[str, Any]) -> bytes:
  """A .npz file of a network's variables with kernels of 8 bits.

  An entry of a kernel is a whole number from -127 to 127 times a scale for each
  of its outputs, so it is off by half a scale at most. All else is float32.
  """
  arrays = {}
  for name, leaf in flatten_dict(dict(variables), sep='/').items():
    leaf = np.asarray(leaf, np.float32)
    if leaf.ndim > 1:
      scale = np.abs(leaf).max(tuple(range(leaf.ndim - 1))) / 127
      arrays[name + SCALE] = scale
      leaf = np.rint(leaf / np.where(scale, scale, 1)).astype(np.int8)
    arrays[name] = leaf
  file = io.BytesIO()
  np.savez_compressed(file, **arrays)
  return file.getvalue()


def unpack(data: bytes) -> dict[str, Any]:
  """The variables, float32 NumPy arrays, from what `pack` made."""
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    leaves = {
      name: np.asarray(arrays[name] * arrays.get(name + SCALE, np.float32(1)))
      for name in arrays
      if not name.endswith(SCALE)
    }
  return unflatten_dict(leaves, sep='/')

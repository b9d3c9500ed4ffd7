"""A trained body for other uses: its stages' outputs, and another head."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from skipinit_jax.errors import InputError, kind
from skipinit_jax.models.dense import DenseResNet
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import (
  STACKED,
  Stage,
  stack_blocks,
  unstack_blocks,
)

HEAD = 'classifier'


def stage_outputs(
  model: ResNet | DenseResNet,
  variables: Mapping[str, Any],
  images: jax.Array,
  *,
  train: bool = False,
) -> dict[str, jax.Array]:
  """What the stem and each stage return: feature maps for another head.

  The maps are the streams themselves. In pre-activation networks nothing has
  normalized or activated them yet, so that a head wants an activation first;
  Fixup's stages end in a ReLU. The stem's is its convolution alone, before the
  max-pool of networks for large images, and before Fixup's bias and ReLU.

  Args:
    model: with or without a classifier, which isn't run; scanned or not.
    variables: as `model.init` gives them; the function is differentiable in
      them and in the images.
    images: what the model takes, (batch, height, width, channels), floating.
    train: use batch statistics; those of the running averages stay as they
      are. Without batch normalization it makes no difference.

  Returns:
    'stem', 'stage1', ... -> (batch, height, width, channels) of the model's
    compute dtype; of a `DenseResNet`, (batch, width).

  Raises:
    InputError: a module that is neither.

  >>> from skipinit_jax.models import WideResNet
  >>> model, images = WideResNet(10, 1), jnp.ones((2, 8, 8, 1))
  >>> variables = model.init(jax.random.key(0), images, train=False)
  >>> outputs = stage_outputs(model, variables, images)
  >>> [(name, x.shape) for name, x in outputs.items()][-1]
  ('stage3', (2, 2, 2, 64))
  """

  if not isinstance(model, ResNet | DenseResNet):
    raise InputError(
      f'stage_outputs takes a ResNet or DenseResNet, got {kind(model)}; for '
      "other modules there is Flax's capture_intermediates"
    )

  def wanted(module: nn.Module, method: str) -> bool:
    stem = module.path == ('stem',)
    return method == '__call__' and (stem or isinstance(module, Stage))

  _, new = model.clone(num_classes=None).apply(
    variables,
    images,
    train=train,
    capture_intermediates=wanted,
    mutable=['intermediates', 'batch_stats'],
  )
  seen = new['intermediates']
  names = ['stem', *(f'stage{i}' for i in range(1, len(seen)))]
  return {name: seen[name]['__call__'][0] for name in names}


def load_body(
  saved: Mapping[str, Any], fresh: Mapping[str, Any]
) -> dict[str, Any]:
  """Everything but the classifier from `saved`, the classifier from `fresh`.

  Args:
    saved: of a trained network: its parameters, or all its variables where
      batch normalization has statistics too. Scanned or not.
    fresh: the same of the network to be trained, as `init` gives it; it may
      have another number of classes, or no classifier.

  Returns:
    A tree like `fresh`, its form and dtypes included. Arrays are shared with
    the two trees.

  Raises:
    InputError: the bodies differ; names the first parameter with both shapes.
  """
  ours, theirs = _flatten(fresh), _flatten(saved)
  body = [path for path in {**ours, **theirs} if HEAD not in path]
  wrong = [p for p in body if _shape(theirs, p) != _shape(ours, p)]
  if wrong:
    first, more = wrong[0], len(wrong) - 1
    rest = f'; {more} others differ too' if more else ''
    raise InputError(
      f'{"/".join(first)} is {_shape(theirs, first)} in the saved network and '
      f'{_shape(ours, first)} in the new one; expected networks that differ in '
      f'the classifier only{rest}'
    )
  loaded = {
    path: leaf if HEAD in path else jnp.asarray(theirs[path], leaf.dtype)
    for path, leaf in ours.items()
  }
  tree = flax.traverse_util.unflatten_dict(loaded)
  scanned = any(
    STACKED in path for path in flax.traverse_util.flatten_dict(fresh)
  )
  return stack_blocks(tree) if scanned else tree


def _flatten(tree: Mapping[str, Any]) -> dict[tuple[str, ...], jax.Array]:
  """Path -> leaf of the unrolled form."""
  return flax.traverse_util.flatten_dict(unstack_blocks(tree))


def _shape(leaves: Mapping[tuple[str, ...], jax.Array], path: tuple) -> str:
  return str(leaves[path].shape) if path in leaves else 'absent'

"""Reuse of a trained body: the outputs of its stages, and another head."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

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
  """Returns the outputs of the stem and of each stage, for another head.

  In pre-activation networks these are neither normalized nor activated, so a
  head should start with an activation; Fixup's stages end in a ReLU. The stem's
  output is that of its convolution, before the max-pool of networks for large
  images, and before Fixup's bias and ReLU.

  Args:
    model: with or without a classifier, which isn't run; scanned or not.
    variables: as `model.init` returns them; the outputs are differentiable in
      them and in the images.
    images: (batch, height, width, channels), floating; for a `DenseResNet`,
      (batch, ...).
    train: use batch statistics, without updating the running averages. It makes
      no difference without batch normalization.

  Returns:
    'stem', 'stage1', ... -> (batch, height, width, channels), or (batch, width)
    for a `DenseResNet`, of the model's compute dtype.

  Raises:
    InputError: another module.

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
  outputs: Any = new['intermediates']
  names = ['stem', *(f'stage{i}' for i in range(1, len(outputs)))]
  return {name: outputs[name]['__call__'][0] for name in names}


def load_body(
  saved: Mapping[str, Any], fresh: Mapping[str, Any]
) -> dict[str, Any]:
  """Takes the classifier from `fresh`, and everything else from `saved`.

  Args:
    saved: the parameters of a trained network, or all its variables, which
      include the statistics of batch normalization. Scanned or not.
    fresh: the same for the network to train, as `init` returns it; it may have
      another number of classes, or no classifier.

  Returns:
    A tree of the structure, shapes and dtypes of `fresh`. Arrays are shared
    with both trees.

  Raises:
    InputError: the bodies differ; names the first parameter and both shapes.
  """
  new: dict[Any, Any] = flatten_dict(unstack_blocks(fresh))
  old: dict[Any, Any] = flatten_dict(unstack_blocks(saved))
  body = [path for path in {**new, **old} if HEAD not in path]
  wrong = [path for path in body if _shape(old, path) != _shape(new, path)]
  if wrong:
    first, more = wrong[0], len(wrong) - 1
    rest = f'; {more} others differ too' if more else ''
    raise InputError(
      f'{"/".join(first)} is {_shape(old, first)} in the saved network and '
      f'{_shape(new, first)} in the new one; expected networks that differ in '
      f'the classifier only{rest}'
    )
  tree = unflatten_dict(
    {
      path: leaf if HEAD in path else jnp.asarray(old[path], leaf.dtype)
      for path, leaf in new.items()
    }
  )
  scanned = any(STACKED in path for path in flatten_dict(fresh))
  return stack_blocks(tree) if scanned else tree


def _shape(leaves: Mapping[Any, jax.Array], path: Any) -> str:
  return str(leaves[path].shape) if path in leaves else 'absent'

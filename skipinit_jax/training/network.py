"""The network of a recipe and its initial variables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.models.checks import check_choices
from skipinit_jax.models.methods import Method, he_normal, resolve_method
from skipinit_jax.models.resnet import RESNETS, ResNet, WideResNet
from skipinit_jax.models.stages import unstack_blocks
from skipinit_jax.training.devices import AXIS

# Blocks in a stage from which it is scanned: an unrolled program would take
# minutes to compile. For TPUs 48 blocks in all take two minutes, a scan of any
# number half a minute.
SCAN_FROM = 40


def build_model(
  config: ConfigDict, num_classes: int, platform: str | None = None
) -> ResNet:
  """The network of a recipe.

  Args:
    config: a recipe.
    num_classes: of its data set.
    platform: where it will run: 'cpu', 'gpu' or 'tpu'; None: JAX's default.

  Raises:
    InputError: a network that can't be built.
  """
  platform = platform or jax.default_backend()
  model = config.model
  group = model.statistics_group
  inits = {None: None, 'he': he_normal(), 'zero': nn.initializers.zeros}
  dtype = config.dtype
  if dtype == 'auto':
    dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  method = build_method(config)
  method.alpha_value(1)
  fields = {
    'num_classes': num_classes,
    'method': method,
    'biases': model.biases,
    'dropout': model.dropout,
    'classifier_init': inits[model.classifier_init],
    'activation': model.activation,
    'kernel_init': model.kernel_init,
    'skip': model.skip,
    'symmetric_padding': model.symmetric_padding,
    'scan': bool(model.scan),
    'remat': model.remat,
    'statistics_group': int(group) if group.isdecimal() else None,
    'axis_name': AXIS if group == 'all' else None,
    'dtype': dtype,
  }
  if model.name == 'wide_resnet':
    width = 1 if model.width is None else model.width
    network = WideResNet(model.depth, width, **fields)
  else:
    network = _resnet(model, fields)
  check_choices(
    method, network.num_blocks, model.activation, model.kernel_init, model.skip
  )
  if model.scan is None:
    network = network.clone(scan=max(network.stage_sizes) >= SCAN_FROM)
  return network


def _resnet(model: ConfigDict, fields: dict) -> ResNet:
  if model.width is not None:
    raise InputError(
      f'model.width={model.width} is for a wide_resnet, not for a resnet'
    )
  if model.depth not in RESNETS:
    depths = ', '.join(map(str, RESNETS))
    raise InputError(
      f'model.depth={model.depth} of a resnet: expected {depths}'
    )
  return RESNETS[model.depth](**fields)


def build_method(config: ConfigDict) -> Method:
  """The method of a recipe, with the recipe's changes to it."""
  method = resolve_method(config.model.method, config.model.alpha)
  names = ('zero_last', 'rescale', 'scalar_biases')
  changes = {n: v for n in names if (v := config.model[n]) is not None}
  if changes.get('scalar_biases') and not method.fixup_block:
    raise InputError(
      f'model.scalar_biases=True is for fixup, not for {config.model.method}'
    )
  return dataclasses.replace(method, **changes)


def init_variables(
  model: ResNet, image_shape: tuple[int, int, int], seed: jax.typing.ArrayLike
) -> Mapping[str, Any]:
  """The model's initial variables, a function of the seed alone.

  They are drawn for the scanned form, whose program is small at any depth, and
  unstacked if the model is not scanned: both forms start from the same.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  images = jnp.zeros((1, *image_shape))
  scanned = model.clone(scan=True, axis_name=None)
  variables = scanned.init(key, images, train=False)
  return variables if model.scan else unstack_blocks(variables)

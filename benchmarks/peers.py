"""The networks that the cost and throughput benchmarks compare."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from ml_collections import ConfigDict

from skipinit_jax.models import activations, convolution, layers, resnet
from skipinit_jax.models.precision import Conv, widen
from skipinit_jax.training import cuda
from skipinit_jax.training.config import default_config
from skipinit_jax.training.devices import AXIS
from skipinit_jax.training.recipes import load_recipe

IMAGE = (224, 224, 3)
CLASSES = 1000
NETWORKS = {
  'example': "Flax's example: V1.5, batch normalization",
  'torch': 'PyTorch: V1.5, batch normalization, channels-last, compiled',
  'batchnorm': 'ours: batch normalization',
  'batchnorm_micro4': 'ours: batch normalization, 4 micro-batches',
  'fixup': 'ours: Fixup',
  'fixup_micro4': 'ours: Fixup, 4 micro-batches',
  'activation': 'ours: SkipInit, alpha on the activation',
  'skipinit': 'ours: SkipInit, alpha folded',
  'jax': "ours: SkipInit, with JAX's own gradients and sums",
  'micro2': 'ours: SkipInit, 2 micro-batches',
  'micro4': 'ours: SkipInit, 4 micro-batches',
  'micro8': 'ours: SkipInit, 8 micro-batches',
  'calls8': 'ours: SkipInit, 8 steps a call',
}


def recipe(network: str, data: str, batch_size: int) -> ConfigDict:
  """Ours: a ResNet-50 on ImageNet, or a 16-4 Wide-ResNet on CIFAR-10.

  SGD with Nesterov momentum and L2, as in Flax's example. `activation` must be
  built inside `as_network`.
  """
  config = default_config()
  config.batch_size = batch_size
  config.data = load_recipe(data.removesuffix('2012')).data
  config.data.shift, config.data.flip = 0, False  # Only networks are compared.
  config.optimizer.nesterov = True
  config.optimizer.l2 = 1e-4
  config.schedule.name = 'cosine'
  method, _, micro = network.partition('micro')
  method = method.removesuffix('_')
  method = method if method in ('batchnorm', 'fixup') else 'skipinit'
  config.model.method = method
  config.model.biases = method == 'skipinit'
  config.model.statistics_group = '64' if micro else 'device'
  if data == 'imagenet2012':
    config.model.name = 'resnet'
    config.model.depth = 50
  else:
    config.model.depth = 16
    config.model.width = 4
  if micro:
    config.micro_batches = int(micro)
  if network.startswith('calls'):
    config.steps_per_call = int(network.removeprefix('calls'))
  return config


def as_network(network: str) -> contextlib.AbstractContextManager:
  """A context in which our networks are built as `network` names them.

  'jax': with the convolutions, ReLU and pool that JAX derives gradients of, and
  the sums that XLA makes of Optax's.
  """
  context = contextlib.ExitStack()
  if network == 'activation':
    context.enter_context(mock.patch.object(layers, 'SkipInitConv', ScaledConv))
  if network == 'jax':
    for module, name, function in (
      (layers, 'convolve', convolve_by_jax),
      (resnet, 'max_pool', max_pool_by_jax),
      (activations, '_barred', activations._where),
      (cuda, 'settle', lambda grads, *, summed: grads),
      (cuda, 'norm', optax.tree.norm),
      (cuda, 'join_scalars', lambda tree: tree),
    ):
      context.enter_context(mock.patch.object(module, name, function))
  return context


def convolve_by_jax(
  x: jax.Array,
  kernel: jax.Array,
  strides: Any,
  padding: Any,
  *,
  symmetric: bool = False,
  **options: Any,
) -> jax.Array:
  """`convolution.convolve` without forms for CPUs."""
  if symmetric:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  options = {'dimension_numbers': convolution.LAYOUTS} | options
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def max_pool_by_jax(x: jax.Array, *, symmetric: bool) -> jax.Array:
  """`pooling.max_pool` without a form for CPUs."""
  padding: Any = ((1, 1), (1, 1)) if symmetric else 'SAME'
  return nn.max_pool(x, (3, 3), (2, 2), padding)


class ScaledConv(Conv):
  """`SkipInitConv` without the folding: alpha times the convolution."""

  init_value: float = 0.0

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(self.init_value)
    alpha = self.param('alpha', init, (), self.param_dtype)
    y = Conv.__call__(self, x)
    return (alpha * widen(y)).astype(y.dtype)


class ExampleBlock(nn.Module):
  """The bottleneck of ResNet V1.5: post-activation, stride on the 3x3."""

  features: int
  strides: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x):
    y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
    y = self.conv(self.features, (3, 3), self.strides)(y)
    y = self.conv(4 * self.features, (1, 1))(nn.relu(self.norm()(y)))
    y = self.norm(scale_init=nn.initializers.zeros)(y)
    if x.shape != y.shape:
      x = self.conv(4 * self.features, (1, 1), self.strides)(x)
      x = self.norm()(x)
    return nn.relu(x + y)


class ExampleResNet50(nn.Module):
  """The network of Flax's ImageNet example, from its description."""

  dtype: Dtype = 'bfloat16'

  @nn.compact
  def __call__(self, x, *, train: bool):
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)])(x)
    x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), 'SAME')
    for i, size in enumerate((3, 4, 6, 3)):
      for j in range(size):
        strides = 2 if i > 0 and j == 0 else 1
        x = ExampleBlock(64 * 2**i, strides, conv, norm)(x)
    return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2)))


def example_step(state, images, labels, *, model, tx):
  """Cross-entropy, L2 of 1e-4 in the loss, one update, as in the example."""

  def loss_fn(params):
    variables = {'params': params, 'batch_stats': state['batch_stats']}
    logits, changed = model.apply(
      variables, images, train=True, mutable=['batch_stats']
    )
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    l2 = sum(jnp.sum(x**2) for x in kernels)
    return loss.mean() + 0.5e-4 * l2, (logits, changed['batch_stats'])

  grads, (logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(
    state['params']
  )
  top1 = (logits.argmax(-1) == labels).mean()
  grads, batch_stats, top1 = jax.lax.pmean((grads, batch_stats, top1), AXIS)
  updates, opt_state = tx.update(grads, state['opt_state'])
  params = optax.apply_updates(state['params'], updates)
  new = {'params': params, 'batch_stats': batch_stats, 'opt_state': opt_state}
  return new, top1


def example_state(model: nn.Module, tx: optax.GradientTransformation) -> Any:
  """Parameters, statistics and optimizer state of the example."""
  images = jnp.zeros((1, *IMAGE))
  variables = model.init(jax.random.key(0), images, train=False)
  return {**variables, 'opt_state': tx.init(variables['params'])}

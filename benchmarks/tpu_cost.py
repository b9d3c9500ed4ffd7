"""What a ResNet-50 training step costs a TPU chip, network by network.

  python benchmarks/tpu_cost.py --out=docs/tpu_cost.json

Compiles one step per network for v5e:2x2 with the TPU compiler (`pip install
libtpu`; no chip is needed, a few minutes each), 128 images of 224x224 a chip,
bfloat16, float32 parameters, SGD with Nesterov momentum. Prints what each costs
relative to the network of Flax's own ImageNet example: the compiler's bytes
accessed, bytes to and from HBM (see `skipinit_jax.ahead_of_time.hlo`) and
activations.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from skipinit_jax.ahead_of_time.chips import GIB, Slice, topology
from skipinit_jax.ahead_of_time.measure import cost, measure
from skipinit_jax.models import blocks
from skipinit_jax.training.config import default_config
from skipinit_jax.training.devices import AXIS, map_over_devices

BATCH = 128
IMAGE = (224, 224, 3)
CLASSES = 1000
ROWS = {
  'example': "Flax's example: V1.5, batch normalization",
  'batchnorm': 'ours: V2, batch normalization',
  'activation': 'ours: SkipInit, alpha on the activation',
  'skipinit': 'ours: SkipInit, alpha folded',
  'micro2': 'ours: SkipInit, 2 micro-batches',
  'micro4': 'ours: SkipInit, 4 micro-batches',
  'micro8': 'ours: SkipInit, 8 micro-batches',
}


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

  @nn.compact
  def __call__(self, x, *, train: bool):
    conv = functools.partial(nn.Conv, use_bias=False, dtype='bfloat16')
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype='bfloat16',
    )
    x = conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)])(x)
    x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), 'SAME')
    for i, size in enumerate((3, 4, 6, 3)):
      for j in range(size):
        strides = 2 if i > 0 and j == 0 else 1
        x = ExampleBlock(64 * 2**i, strides, conv, norm)(x)
    return nn.Dense(CLASSES, dtype='bfloat16')(x.mean((1, 2)))


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


def example(where: Slice) -> dict[str, Any]:
  """The example's step; its images come normalized, in bfloat16."""
  model, tx = ExampleResNet50(), optax.sgd(0.1, 0.9, nesterov=True)

  def create():
    images = jnp.zeros((1, *IMAGE))
    variables = model.init(jax.random.key(0), images, train=False)
    return {**variables, 'opt_state': tx.init(variables['params'])}

  shape = (len(where.devices), BATCH // where.cores)
  args = (
    jax.eval_shape(create),
    jax.ShapeDtypeStruct((*shape, *IMAGE), jnp.bfloat16),
    jax.ShapeDtypeStruct(shape, np.int32),
  )
  step = functools.partial(example_step, model=model, tx=tx)
  mapped = map_over_devices(step, (None, 0, 0), where.devices, donate_argnums=0)
  return cost(mapped, args, where)


class ScaledConv(nn.Conv):
  """`SkipInitConv` without the folding: alpha times the convolution."""

  init_value: float = 0.0

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(self.init_value)
    alpha = self.param('alpha', init, (), self.param_dtype)
    y = nn.Conv.__call__(self, x)
    return alpha.astype(y.dtype) * y


def ours(
  where: Slice, method: str = 'skipinit', micro_batches: int = 1
) -> dict[str, Any]:
  """The real training step of a recipe."""
  config = default_config()
  config.batch_size = BATCH * where.chips
  config.micro_batches = micro_batches
  config.model.name = 'resnet'
  config.model.depth = 50
  config.model.method = method
  config.model.biases = method != 'batchnorm'
  config.model.statistics_group = 'device'
  config.data.name = 'imagenet2012'
  config.optimizer.nesterov = True
  config.optimizer.l2 = 1e-4
  config.schedule.name = 'cosine'
  return measure(config, where, evaluation=False)


def row(name: str, where: Slice) -> dict[str, Any]:
  if name == 'example':
    return example(where)
  if name.startswith('micro'):
    return ours(where, micro_batches=int(name.removeprefix('micro')))
  patch: Any = contextlib.nullcontext()
  if name == 'activation':
    patch = mock.patch.object(blocks, 'SkipInitConv', ScaledConv)
  with patch:
    return ours(where, 'batchnorm' if name == 'batchnorm' else 'skipinit')


def table(results: dict[str, dict[str, Any]]) -> str:
  """Markdown, relative to the example where that was compiled."""
  fields = ('bytes_accessed', 'hbm_bytes', 'activation_bytes')
  base = results.get('example')
  lines = [
    '| network | bytes accessed | HBM bytes | activations | images/s a chip, '
    'at most |',
    '|---|---|---|---|---|',
  ]
  for name, result in results.items():
    cells = []
    for field in fields:
      value = result[field]
      unit, scale = ('GiB', GIB) if field == 'activation_bytes' else ('GB', 1e9)
      share = f' = {value / base[field]:.2f}' if base else ''
      cells.append(f'{value / scale:.2f} {unit}{share}')
    seconds = max(result['compute_seconds'], result['memory_seconds'])
    cells.append(f'{BATCH / seconds:,.0f}')
    lines.append(f'| {ROWS[name]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--rows', nargs='+', default=list(ROWS), choices=ROWS)
  parser.add_argument('--out', type=Path, help='JSON file')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  where = topology(args.topology)
  results = {}
  for name in args.rows:
    results[name] = row(name, where)
    seconds = results[name]['compile_seconds']
    print(f'{name}: compiled in {seconds:.0f} s', flush=True)
    if args.out:
      args.out.write_text(json.dumps(results, indent=2) + '\n')
  print(table(results))


if __name__ == '__main__':
  main()

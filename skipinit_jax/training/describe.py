"""What a run prints about its recipe."""

import jax
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax import published
from skipinit_jax.models.parameters import count_parameters
from skipinit_jax.training.network import build_method
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState
from skipinit_jax.training.timetable import Timetable
from skipinit_jax.variants import VARIANTS

LARGE_BATCH = 2048


def less_memory(config: ConfigDict) -> str:
  """What to try, in this order, if a step does not fit in memory."""
  remedies = []
  group = config.model.statistics_group
  if not build_method(config).normalize or group.isdecimal():
    remedies.append(f'--config.micro_batches={2 * config.micro_batches}')
  if not config.model.remat:
    remedies.append('--config.model.remat=True')
  remedies.append('a smaller --config.batch_size')
  return f'first try {", then ".join(remedies)}'


def describe(
  program: Program,
  state: TrainState,
  times: Timetable,
  workdir: epath.Path,
) -> str:
  """The lines that a run starts with."""
  config, data, model = program.config, program.data, program.model
  method = build_method(config)
  name = config.model.method
  if method.alpha is not None:
    name += f' (alpha at {method.alpha_value(model.num_blocks):.4g})'
  devices = jax.devices()
  platform = devices[0].platform
  start = int(state.step)
  form = f' ({data.form})' if data.form else ''
  lines = [
    f'workdir: {workdir}',
    f'devices: {len(devices)} x {devices[0].device_kind} ({platform}), '
    f'{model.dtype} computation',
    f'data: {data.name}{form}, {data.train_size:,} images to train on, '
    f'{data.eval_size:,} to evaluate on, {data.num_classes} classes',
    f'model: {config.model.name} of depth {config.model.depth}, '
    f'{model.num_blocks} residual blocks, {name}',
    f'parameters: {_parameters(config, state)}',
    f'training: {times.total:,} steps of {config.batch_size} images, peak rate '
    f'{peak_rate(config):.4g}' + (f', from step {start:,}' if start else ''),
  ]
  if method.normalize:
    lines.append(f'batch statistics over: {_group(config)}')
  elif config.batch_size >= LARGE_BATCH:
    lines.append(_large_batch_note(config.batch_size))
  return '\n'.join(lines)


def _parameters(config: ConfigDict, state: TrainState) -> str:
  decaying = config.optimizer.decay if config.optimizer.l2 else ()
  return ', '.join(
    f'{label} {arrays} arrays of {elements:,}'
    + (' (decays)' if label in decaying else '')
    for label, (arrays, elements) in count_parameters(state.params).items()
  )


def _large_batch_note(batch_size: int) -> str:
  changes = ', '.join(
    f'{VARIANTS[row].label} {at[256].value} -> {at[4096].value}'
    for row, at in published.IMAGENET.items()
  )
  return (
    f'note: batches of {batch_size} without normalization. Top-1 % on ImageNet '
    f'from batch 256 to 4096 ({published.IMAGENET_SOURCE}): {changes}'
  )


def _group(config: ConfigDict) -> str:
  group = config.model.statistics_group
  share = config.batch_size // jax.device_count()
  images = {'device': share, 'all': config.batch_size}.get(group, group)
  return f'{images} images ({group})' if group.isalpha() else f'{group} images'

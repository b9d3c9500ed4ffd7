"""Checks of a recipe that need no data."""

from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from skipinit_jax.data.fields import MOST
from skipinit_jax.errors import InputError, check_folder, unknown
from skipinit_jax.models.activations import ACTIVATIONS
from skipinit_jax.models.looks_linear import KERNEL_INITS
from skipinit_jax.models.parameters import LEAVES
from skipinit_jax.training.config import default_config
from skipinit_jax.training.network import build_method
from skipinit_jax.training.optimizer import peak_rate

CHOICES = {
  'model.name': ('wide_resnet', 'resnet'),
  'optimizer.name': ('sgd', 'lars', 'muon'),
  'schedule.name': ('constant', 'halving', 'step', 'cosine'),
  'dtype': ('auto', 'float32', 'bfloat16'),
  'on_divergence': ('stop', 'skip', 'back'),
  'model.classifier_init': ('he', 'zero'),
  'model.activation': ACTIVATIONS,
  'model.kernel_init': KERNEL_INITS,
}
# The lowest and the highest value of any use.
LIMITS = {
  'seed': (0, 2**32 - 1),
  'batch_size': (1, 2**20),
  'eval_batch_size': (1, 2**20),
  'optimizer.reference_batch': (1, 2**20),
  'micro_batches': (1, 2**20),
  'steps_per_call': (1, MOST),
  'log_every_steps': (1, MOST),
  'watch_every_steps': (1, MOST),
  'checkpoint_every_steps': (1, MOST),
  'keep_checkpoints': (1, MOST),
  'divergence_limit': (1, MOST),
  'profile_at': (0, MOST),
  'profile_steps': (1, MOST),
  'diverged_status': (0, 125),  # Higher ones are the shell's.
  'model.depth': (1, 20_000),
  'model.width': (1, 1024),
  'data.validation': (0, MOST),
  'data.shift': (0, 2**12),
  'data.cutout': (0, 2**12),
  'data.mixup': (0, 1e3),
  'data.cutmix': (0, 1e3),
  'data.bad_share': (1e-9, 1 - 1e-6),
  'epochs': (1e-6, 1e6),
  'eval_every_epochs': (1e-6, 1e6),
  'schedule.warmup_epochs': (0, 1e6),
  'schedule.hold_epochs': (0, 1e6),
  'schedule.every_epochs': (1e-3, 1e6),
  'schedule.factor': (0, 1e3),
  'optimizer.learning_rate': (1e-12, 1e12),
  'optimizer.clip_norm': (1e-12, 1e12),
  'optimizer.adaptive_clip': (1e-12, 1e12),
  'optimizer.l2': (0, 1e6),
  'optimizer.momentum': (0, 1 - 1e-6),
  'label_smoothing': (0, 1 - 1e-6),
  'ema_decay': (0, 1 - 1e-6),
  'model.dropout': (0, 1 - 1e-6),
  'divergence_factor': (1e-6, 1 - 1e-6),
  'stuck_after_seconds': (1e-3, 1e8),
  'stuck_at_start_seconds': (1e-3, 1e8),
}
SMALLEST = 1e-12  # Number other than 0: products stay in float32's range.


def check_config(config: ConfigDict, device_count: int) -> None:
  """Raises InputError for values that no run can have; reads no data.

  Args:
    config: a recipe.
    device_count: devices of all processes.
  """
  check_types(config)
  fields: dict[str, Any] = flatten_dict(config.to_dict(), sep='.')
  for field, (low, high) in LIMITS.items():
    _check_number(field, fields[field], low, high)
  for field, known in CHOICES.items():
    if fields[field] is not None and fields[field] not in known:
      raise InputError(unknown(field, fields[field], known))
  for name in config.optimizer.decay:
    if name not in LEAVES:
      raise InputError(unknown('leaf name in optimizer.decay', name, LEAVES))
  if config.ema_warmup and config.ema_decay is None:
    raise InputError(
      'ema_warmup=True warms up the decay of averaged parameters: expected '
      'ema_decay to be set too, such as 0.9999'
    )
  _check_schedule(config)
  _check_rate(config)
  _check_cache(config.compilation_cache)
  _check_batch(config, device_count)


def _check_cache(folder: str) -> None:
  if folder:
    try:
      check_folder(folder)
    except InputError as error:
      raise InputError(f'compilation_cache={error}') from None


def _check_batch(config: ConfigDict, device_count: int) -> None:
  """That devices, micro-batches, pairs and groups all divide the batch."""
  share, rest = divmod(config.batch_size, device_count)
  if rest:
    below = share * device_count
    near = f'{below} or ' if below else ''
    raise InputError(
      f'batch_size={config.batch_size} does not divide over {device_count} '
      f'devices; nearest: {near}{below + device_count}'
    )
  parts = config.micro_batches
  if share % parts:
    raise InputError(
      f"micro_batches={parts} does not divide a device's share of the batch, "
      f'{share} images; nearest: {_nearest_divisor(share, parts)}'
    )
  if (config.data.mixup or config.data.cutmix) and share // parts % 2:
    raise InputError(
      f'mixup and cutmix mix pairs, so that {share // parts} images a device '
      'and micro-batch must be an even number'
    )
  _check_group(config, share // parts)


def _nearest_divisor(n: int, wanted: int) -> int:
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  return min(divisors, key=lambda d: abs(d - wanted))


def _check_schedule(config: ConfigDict) -> None:
  schedule = config.schedule
  lengths = {'warmup_epochs': schedule.warmup_epochs}
  if schedule.name == 'halving':
    lengths['hold_epochs'] = schedule.hold_epochs
  if schedule.name == 'step':
    for i, boundary in enumerate(schedule.boundaries):
      if not isinstance(boundary, int | float) or not boundary > 0:
        raise InputError(
          f'schedule.boundaries={schedule.boundaries}: expected numbers of '
          f'epochs, more than 0'
        )
      lengths[f'boundaries[{i}]'] = boundary
  for name, length in lengths.items():
    if length > config.epochs:
      raise InputError(
        f'schedule.{name}={length:g} is longer than training, '
        f'epochs={config.epochs:g}'
      )


def _check_group(config: ConfigDict, share: int) -> None:
  group = config.model.statistics_group
  normalizes = build_method(config).normalize
  if group in ('device', 'all'):
    if normalizes and config.micro_batches > 1:
      raise InputError(
        f'micro_batches={config.micro_batches} would change what {group!r} '
        'batch statistics are taken over; expected model.statistics_group to '
        f'be a number of images that divides a micro-batch, {share}'
      )
    return
  number = group.isdecimal() and group.isascii() and len(group) < 10
  if not number or int(group) < 1:
    raise InputError(
      f'model.statistics_group={group!r}: expected a number of images, '
      "'device' or 'all'"
    )
  if normalizes and share % int(group):
    near = _nearest_divisor(share, int(group))
    raise InputError(
      f'model.statistics_group={group} does not divide the {share} images '
      f"that a device takes at a time; nearest: {near} (or 'device', 'all')"
    )


def _check_rate(config: ConfigDict) -> None:
  """The scaled learning rate and alpha are numbers that float32 holds."""
  low, high = LIMITS['optimizer.learning_rate']
  if not low <= peak_rate(config) <= high:
    raise InputError(
      f'optimizer.learning_rate={config.optimizer.learning_rate} for '
      f'optimizer.reference_batch={config.optimizer.reference_batch} is '
      f'{peak_rate(config):g} at batch_size={config.batch_size}: expected a '
      f'rate from {low:g} to {high:g}'
    )
  alpha = abs(build_method(config).alpha_value(1) or 0)
  if alpha > 1e6 or 0 < alpha < SMALLEST:
    raise InputError(
      f'model.alpha={config.model.alpha!r}: expected 0, or a size from '
      f'{SMALLEST:g} to 1e6'
    )


def check_types(
  config: ConfigDict, defaults: ConfigDict | None = None, prefix: str = ''
) -> None:
  """Raises InputError unless every field exists and has its default's type."""
  defaults = default_config() if defaults is None else defaults
  for name in defaults:
    field = prefix + name
    if name not in config:
      raise InputError(
        f'there is no field {field!r}; a recipe starts from default_config()'
      )
    value, kind = config[name], defaults.get_type(name)
    if isinstance(value, kind) and isinstance(value, ConfigDict):
      check_types(value, defaults[name], f'{field}.')
      continue
    unset = value is None and defaults[name] is None
    takes = (int, float) if kind is float else kind
    flag = isinstance(value, bool) == (kind is bool)
    right = isinstance(value, takes) and flag
    if not (right or unset):
      raise InputError(
        f'{field}={value!r}: expected a value of type {kind.__name__}'
      )


def _check_number(
  field: str, value: float | None, low: float, high: float
) -> None:
  if value is None or (low <= value <= high and not 0 < value < SMALLEST):
    return
  if isinstance(high, int):
    span = f'from {low} to {high}'
  elif low == 0:
    span = f'that is 0 or from {SMALLEST:g} to {high:g}'
  else:
    span = f'from {low:g} to {high:g}'
  raise InputError(f'{field}={value}: expected a finite number {span}')

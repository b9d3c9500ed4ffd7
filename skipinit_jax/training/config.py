"""The fields of a recipe: defaults, checks, and the network they describe."""

import dataclasses

import jax
from flax import linen as nn
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from skipinit_jax.errors import InputError, check_folder, unknown
from skipinit_jax.models.blocks import ACTIVATIONS, check_choices
from skipinit_jax.models.looks_linear import KERNEL_INITS
from skipinit_jax.models.methods import Method, he_normal, resolve_method
from skipinit_jax.models.parameters import LEAVES
from skipinit_jax.models.resnet import RESNETS, ResNet, WideResNet

MODELS = ('wide_resnet', 'resnet')
SCHEDULES = ('constant', 'halving', 'step', 'cosine')
DTYPES = ('auto', 'float32', 'bfloat16')
ON_DIVERGENCE = ('stop', 'skip', 'back')
CLASSIFIER_INITS = ('he', 'zero')
# Blocks in a stage from which an unrolled program takes minutes to compile (by
# the TPU compiler, 48 blocks in all: two; a scan of any number: half of one).
SCAN_FROM = 40


def default_config() -> ConfigDict:
  """Every field with its default; recipes start from this and change it."""
  config = ConfigDict()
  config.seed = 0
  config.batch_size = 128  # Images per step, over all devices.
  config.eval_batch_size = 500  # Rounded up to a multiple of the devices.
  config.epochs = 200.0
  config.label_smoothing = 0.0
  # Parts that each device's share of a batch is cut into, one after the other:
  # the same gradient with less memory, and gradient accumulation.
  config.micro_batches = 1
  config.steps_per_call = 1  # Steps in one call of the device.
  config.ema_decay = placeholder(float)  # Of averaged parameters; unset: none.
  # At most (1 + step) / (10 + step): a short run's averages are not mostly its
  # initialization.
  config.ema_warmup = False
  config.dtype = 'auto'  # Of the computation: float32 on CPUs, else bfloat16.

  config.model = ConfigDict()
  config.model.name = 'wide_resnet'  # One of MODELS.
  config.model.depth = 16
  config.model.width = placeholder(int)  # Of a wide_resnet.
  config.model.method = 'skipinit'  # One of skipinit_jax.METHODS.
  # A number, '1/sqrt(d)' or 'none'; unset, like the three below: the method's
  # own.
  config.model.alpha = placeholder(str)
  config.model.zero_last = placeholder(bool)
  config.model.rescale = placeholder(bool)
  config.model.scalar_biases = placeholder(bool)
  config.model.biases = False  # On all convolutions but the stem.
  config.model.dropout = 0.0  # On the pooled features.
  # One of CLASSIFIER_INITS; unset: the method's own.
  config.model.classifier_init = placeholder(str)
  config.model.activation = 'relu'  # Or 'crelu', concatenated ReLU.
  config.model.kernel_init = 'he'  # One of KERNEL_INITS.
  config.model.skip = True  # False: no skip paths, a feed-forward network.
  # Strided layers padded alike on both sides, as PyTorch does.
  config.model.symmetric_padding = False
  # batchnorm's: a number of images, 'device' or 'all'.
  config.model.statistics_group = '64'
  # Equal blocks of a stage as one scanned block. Unset: where a stage has
  # SCAN_FROM blocks or more, but on CPUs never, where loops are slow.
  config.model.scan = placeholder(bool)
  # Keep inputs of blocks only, and compute the rest again: less memory, a third
  # more computation.
  config.model.remat = False

  config.data = ConfigDict()
  config.data.name = 'digits'  # One of skipinit_jax.data.DATASETS.
  config.data.validation = 0  # Training images held out to evaluate on.
  config.data.shift = 0  # Pixels of the pad-and-crop augmentation.
  config.data.flip = False
  config.data.cutout = 0  # Side in pixels of the square that is blanked.
  config.data.mixup = 0.0  # alpha; see `data.augment.mix`.
  config.data.cutmix = 0.0
  config.data.bad_share = 1e-3  # Of images that may be unreadable.

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 0.1
  # Batch size that learning_rate is meant for; the rate is scaled by
  # batch_size / reference_batch. Unset: not scaled.
  config.optimizer.reference_batch = placeholder(int)
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = False
  # The method's own rate for all but the kernels, if it has one: fixup's, as in
  # its authors' code. False: one rate for all.
  config.optimizer.reduced_rate = True
  config.optimizer.l2 = 5e-4  # Added to the gradient: l2 * parameter.
  config.optimizer.decay = ('kernel',)  # Leaf names that L2 applies to.
  config.optimizer.clip_norm = placeholder(float)  # Of the whole gradient.
  # lambda of Brock et al. 2021; see `optimizer.adaptive_clip`.
  config.optimizer.adaptive_clip = placeholder(float)

  config.schedule = ConfigDict()
  config.schedule.name = 'halving'  # One of SCHEDULES.
  config.schedule.warmup_epochs = 0.0  # Linear from 0, with any schedule.
  config.schedule.hold_epochs = 100.0  # halving: constant so long,
  config.schedule.every_epochs = 10.0  # then halved once in so many.
  config.schedule.boundaries = ()  # step: epochs at which the rate falls
  config.schedule.factor = 0.1  # by this factor.

  config.log_every_steps = 100
  # Every block's scalar, its branch's share of the signal and the norm of its
  # gradient, once in so many steps; unset: never.
  config.watch_every_steps = placeholder(int)
  config.eval_every_epochs = 1.0
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.compilation_cache = '~/.cache/skipinit_jax'  # Empty: none.
  config.allow_cpu = False  # Train on the CPU of a machine with accelerators.
  config.on_divergence = 'stop'  # One of ON_DIVERGENCE.
  config.divergence_limit = 3  # skip: steps in a row; back: times.
  config.divergence_factor = 0.5  # back: on the learning rate, each time.
  config.diverged_status = 3  # Exit status of a run that diverged.
  # Without a step the process ends: before the first, with all compiling, and
  # between two.
  config.stuck_at_start_seconds = 3600.0
  config.stuck_after_seconds = 1800.0
  config.fall_back = True  # From a damaged checkpoint to the one before it.
  config.accept_changes = False  # Go on in a workdir of another config.
  config.deterministic = False  # Same bits from run to run on GPUs; slower.
  config.profile_at = placeholder(int)  # First step to trace; unset: none.
  config.profile_steps = 10
  return config


# Field -> lowest and highest value of any use. Steps are counted in 32 bits.
MOST = 2**31 - 1
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
SMALLEST = 1e-12  # Of numbers other than 0: products stay float32's.


def check_config(config: ConfigDict, device_count: int) -> None:
  """Raises InputError for values that no run can have; looks at no data."""
  check_types(config)
  for field, (low, high) in LIMITS.items():
    check_number(field, _get(config, field), low, high)
  for field, known in (
    ('model.name', MODELS),
    ('schedule.name', SCHEDULES),
    ('dtype', DTYPES),
    ('on_divergence', ON_DIVERGENCE),
    ('model.classifier_init', CLASSIFIER_INITS),
    ('model.activation', ACTIVATIONS),
    ('model.kernel_init', KERNEL_INITS),
  ):
    value = _get(config, field)
    if value is not None and value not in known:
      raise InputError(unknown(field, value, known))
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
  if config.compilation_cache:
    try:
      check_folder(config.compilation_cache)
    except InputError as error:
      raise InputError(f'compilation_cache={error}') from None
  share, rest = divmod(config.batch_size, device_count)
  if rest:
    below = share * device_count
    near = f'{below} or ' if below else ''
    raise InputError(
      f'batch_size={config.batch_size} does not divide over {device_count} '
      f'devices; nearest: {near}{below + device_count}'
    )
  _check_parts(config, share)


def _check_parts(config: ConfigDict, share: int) -> None:
  """What a device's share of the batch must be divisible by."""
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


def build_model(
  config: ConfigDict, num_classes: int, platform: str | None = None
) -> ResNet:
  """The network of a recipe.

  Args:
    config: a recipe.
    num_classes: of its data.
    platform: where it will run: 'cpu', 'gpu' or 'tpu'; None: where JAX does.

  Raises:
    InputError: a network that can't be.
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
    'axis_name': 'batch' if group == 'all' else None,
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
  if model.scan is None and platform != 'cpu':
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


def loops(config: ConfigDict) -> list[str]:
  """The fields that make a recipe's step compute its convolutions in a loop."""
  named = {
    'micro_batches': config.micro_batches > 1,
    'steps_per_call': config.steps_per_call > 1,
    'model.scan': config.model.scan,
  }
  return [field for field, loop in named.items() if loop]


def less_memory(config: ConfigDict) -> str:
  """What to try, in this order, where a recipe's step does not fit."""
  remedies = []
  group = config.model.statistics_group
  if not build_method(config).normalize or group.isdecimal():
    remedies.append(f'--config.micro_batches={2 * config.micro_batches}')
  if not config.model.remat:
    remedies.append('--config.model.remat=True')
  remedies.append('a smaller --config.batch_size')
  return f'first try {", then ".join(remedies)}'


def build_method(config: ConfigDict) -> Method:
  """The method of a recipe, with what the recipe changes of it."""
  method = resolve_method(config.model.method, config.model.alpha)
  names = ('zero_last', 'rescale', 'scalar_biases')
  changes = {n: v for n in names if (v := config.model[n]) is not None}
  if changes.get('scalar_biases') and not method.fixup_block:
    raise InputError(
      f'model.scalar_biases=True is for fixup, not for {config.model.method}'
    )
  return dataclasses.replace(method, **changes)


def peak_rate(config: ConfigDict) -> float:
  """The recipe's learning rate, scaled with the batch where it says so."""
  optimizer = config.optimizer
  scale = config.batch_size / (optimizer.reference_batch or config.batch_size)
  return optimizer.learning_rate * scale


def epochs_to_steps(config: ConfigDict, epochs: float, train_size: int) -> int:
  """Steps in so many epochs, rounded; the one place that converts."""
  return round(epochs * train_size / config.batch_size)


def _get(config: ConfigDict, field: str):
  for part in field.split('.'):
    config = config[part]
  return config


def check_number(
  field: str, value: float | None, low: float, high: float
) -> None:
  """Raises InputError for a number outside its range; None is unset."""
  if value is None or (low <= value <= high and not 0 < value < SMALLEST):
    return
  least = f'that is 0 or from {SMALLEST:g}' if low == 0 else f'from {low:g}'
  most = f'{high:g}'
  if isinstance(high, int):
    least, most = f'from {low}', f'{high}'
  raise InputError(
    f'{field}={value}: expected a finite number {least} to {most}'
  )


def check_types(
  config: ConfigDict, defaults: ConfigDict | None = None, prefix: str = ''
) -> None:
  """Raises InputError unless every field is there, with its default's type."""
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


def _check_rate(config: ConfigDict) -> None:
  """Of alpha too: both must be numbers of float32."""
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

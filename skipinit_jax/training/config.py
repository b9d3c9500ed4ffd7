"""The fields of a recipe and their defaults."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


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

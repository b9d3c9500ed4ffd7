"""The fields of a recipe and their defaults."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
  """Every field with its default; a recipe starts from this."""
  config = ConfigDict()
  config.seed = 0
  config.batch_size = 128  # Images per step, over all devices.
  config.eval_batch_size = 500  # Rounded up to a multiple of the devices.
  config.epochs = 200.0
  config.label_smoothing = 0.0
  # Parts of each device's share of a batch, computed one after the other: the
  # same gradient with less memory (gradient accumulation).
  config.micro_batches = 1
  config.steps_per_call = 1  # Steps in one call of the devices.
  config.ema_decay = placeholder(float)  # Unset: no averages of parameters.
  # Limits ema_decay to (1 + step) / (10 + step), so that the averages of a
  # short run are not mostly its initialization.
  config.ema_warmup = False
  # Computation in 'float32' or 'bfloat16'; 'auto': float32 on CPUs only.
  config.dtype = 'auto'

  config.model = ConfigDict()
  config.model.name = 'wide_resnet'  # Or 'resnet'.
  config.model.depth = 16
  config.model.width = placeholder(int)  # For wide_resnet only; unset: 1.
  config.model.method = 'skipinit'  # One of skipinit_jax.METHODS.
  # A number, '1/sqrt(d)' or 'none'. Unset, here and in the three fields below:
  # as the method has it.
  config.model.alpha = placeholder(str)
  config.model.zero_last = placeholder(bool)
  config.model.rescale = placeholder(bool)
  config.model.scalar_biases = placeholder(bool)
  config.model.biases = False  # In all convolutions but the stem.
  config.model.dropout = 0.0  # Of the pooled features.
  # 'he' or 'zero'; unset: as the method has it.
  config.model.classifier_init = placeholder(str)
  config.model.activation = 'relu'  # Or 'crelu', concatenated ReLU.
  config.model.kernel_init = 'he'  # One of looks_linear.KERNEL_INITS.
  config.model.skip = True  # False: a feed-forward network without skip paths.
  # Pads strided layers equally on both sides, as PyTorch does.
  config.model.symmetric_padding = False
  # Images in one batch statistic: a number, 'device' or 'all'.
  config.model.statistics_group = '64'
  # Equal blocks of a stage as one scanned block. Unset: if a stage has
  # `network.SCAN_FROM` blocks or more.
  config.model.scan = placeholder(bool)
  # Keeps only the inputs of blocks for the gradient, computes the rest again:
  # less memory, a third more computation.
  config.model.remat = False

  config.data = ConfigDict()
  config.data.name = 'digits'  # One of skipinit_jax.data.DATASETS.
  config.data.validation = 0  # Training images held out to evaluate on.
  config.data.shift = 0  # Pixels of the pad-and-crop augmentation.
  config.data.flip = False
  config.data.cutout = 0  # Side in pixels of the square that is blanked.
  config.data.mixup = 0.0  # alpha; see `data.augment.mix`.
  config.data.cutmix = 0.0
  config.data.bad_share = 1e-3  # Share of images that may be unreadable.

  config.optimizer = ConfigDict()
  config.optimizer.name = 'sgd'  # Or 'lars', 'muon'; see `make_optimizer`.
  config.optimizer.learning_rate = 0.1
  # Batch size that learning_rate is for; the rate is scaled by batch_size /
  # reference_batch. Unset: not scaled.
  config.optimizer.reference_batch = placeholder(int)
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = False
  # Lower rate for all but the kernels, if the method has one (fixup, as in its
  # authors' code). False: one rate for all.
  config.optimizer.reduced_rate = True
  config.optimizer.l2 = 5e-4  # Added to the gradient: l2 * parameter.
  config.optimizer.decay = ('kernel',)  # Leaf names that L2 applies to.
  config.optimizer.clip_norm = placeholder(float)  # Of the whole gradient.
  # lambda of Brock et al. 2021; see `optimizer.adaptive_clip`.
  config.optimizer.adaptive_clip = placeholder(float)
  config.optimizer.clip_alpha = True  # Whether it clips the scalars too.

  config.schedule = ConfigDict()
  config.schedule.name = 'halving'  # Or 'constant', 'step', 'cosine'.
  config.schedule.warmup_epochs = 0.0  # Linear from 0, with any schedule.
  config.schedule.hold_epochs = 100.0  # halving: constant this long,
  config.schedule.every_epochs = 10.0  # then halved at this interval.
  config.schedule.boundaries = ()  # step: epochs at which the rate falls
  config.schedule.factor = 0.1  # by this factor.

  config.log_every_steps = 100
  # Interval of the metrics of each block (alpha, branch share, gradient norm);
  # unset: never.
  config.watch_every_steps = placeholder(int)
  config.eval_every_epochs = 1.0
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.compilation_cache = '~/.cache/skipinit_jax'  # Empty: none.
  config.allow_cpu = False  # Train on the CPU of a machine with accelerators.
  config.on_divergence = 'stop'  # Or 'skip', 'back'.
  config.divergence_limit = 3  # skip: steps in a row; back: times.
  config.divergence_factor = 0.5  # back: of the learning rate, each time.
  config.diverged_status = 3  # Exit status of a run that diverged.
  # Time without a step after which the process ends: before the first step,
  # which includes compiling, and between steps.
  config.stuck_at_start_seconds = 3600.0
  config.stuck_after_seconds = 1800.0
  config.fall_back = True  # From a damaged checkpoint to the one before it.
  config.accept_changes = False  # Resume in a workdir of another config.
  config.deterministic = False  # Same bits from run to run on GPUs; slower.
  config.profile_at = placeholder(int)  # First step to trace; unset: none.
  config.profile_steps = 10
  return config

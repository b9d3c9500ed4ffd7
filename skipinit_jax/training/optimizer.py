"""The optimizer: its schedules, clipping, and rates by parameter."""

import math
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import Method
from skipinit_jax.models.parameters import decay_mask, param_labels
from skipinit_jax.models.stages import STACKED
from skipinit_jax.training.timetable import epochs_to_steps

CLASSIFIER = 'classifier'
RMS = 0.2  # Of a step by Muon, as Adam's (Liu et al. 2025).


def make_schedule(config: ConfigDict, train_size: int) -> optax.Schedule:
  """The learning rate by step, as a fraction of its peak.

  constant: 1. halving: constant for `hold_epochs`, then halved every
  `every_epochs` (De & Smith 2020 on CIFAR: 100, then every 10). step: times
  `factor` at each of `boundaries`. cosine: to 0 at the end of training (on
  ImageNet, after 5 epochs of warmup). A linear warmup from 0 comes before any
  of them; durations count from the start of training.

  Raises:
    InputError: `every_epochs` is less than one step.
  """
  schedule = config.schedule

  def steps(epochs: float) -> int:
    return epochs_to_steps(config, epochs, train_size)

  total, warmup = steps(config.epochs), steps(schedule.warmup_epochs)
  if schedule.name == 'cosine':
    main = optax.cosine_decay_schedule(1.0, max(total - warmup, 1))
  elif schedule.name == 'constant':
    main = optax.constant_schedule(1.0)
  else:
    if schedule.name == 'step':
      factor, boundaries = schedule.factor, schedule.boundaries
    else:
      hold, every = schedule.hold_epochs, schedule.every_epochs
      if every * train_size < config.batch_size:
        least = math.ceil(1e4 * config.batch_size / train_size) / 1e4
        raise InputError(
          f'schedule.every_epochs={every:g} of {train_size} images is less '
          f'than one step of batch_size={config.batch_size}; expected at least '
          f'{least:g}'
        )
      # 150 halvings leave nothing of a float32.
      boundaries = [hold + i * every for i in range(150)]
      factor, boundaries = 0.5, [b for b in boundaries if b < config.epochs]
    scales: dict[int, float] = {}
    for boundary in boundaries:
      step = max(steps(boundary) - warmup, 0)
      scales[step] = scales.get(step, 1.0) * factor
    main = optax.piecewise_constant_schedule(1.0, scales)
  if not warmup:
    return main
  ramp = optax.linear_schedule(0.0, 1.0, warmup)
  return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(
  config: ConfigDict, method: Method
) -> optax.GradientTransformation:
  """Clipping, L2, rates by parameter, then the rule of `optimizer.name`.

  Updates are for a learning rate of 1; the training step multiplies them by the
  rate, so that only the state counts steps.

  sgd: with momentum. L2 is the gradient of l2/2 ||w||^2 for the leaves that
  decay: it passes through the momentum, and is not clipped.

  lars: the same, with the gradient of each kernel scaled to the kernel's norm
  (You, Gitman, Ginsburg 2017, eq. 6). Their trust coefficient is 1 here, so
  that the rate is a relative step; they have 0.001, and rates to match.

  muon: kernels but the classifier's move by their orthogonalized momentum
  (Jordan et al. 2024), scaled to a root mean square of RMS (Liu et al. 2025);
  all else by Adam. `l2` is decoupled: it adds -l2 * w to the update.
  """
  optimizer = config.optimizer
  transforms = []
  if optimizer.clip_norm is not None:
    transforms.append(optax.clip_by_global_norm(optimizer.clip_norm))
  if optimizer.adaptive_clip is not None:
    transforms.append(
      adaptive_clip(optimizer.adaptive_clip, alpha=optimizer.clip_alpha)
    )
  decoupled = optimizer.name == 'muon'
  if optimizer.l2 and not decoupled:
    transforms.append(_decay(config, optimizer.l2))
  if method.reduced_rate is not None and optimizer.reduced_rate:
    # A fraction of the rate *before* it was scaled with the batch.
    factor = method.reduced_rate * optimizer.learning_rate / peak_rate(config)
    transforms.append(optax.masked(optax.scale(factor), _all_but_kernels))
  if decoupled:
    transforms.append(muon(optimizer.momentum, nesterov=optimizer.nesterov))
    if optimizer.l2:
      transforms.append(_decay(config, -optimizer.l2))
    return optax.chain(*transforms)
  if optimizer.name == 'lars':
    transforms.append(trust_ratio())
  return optax.chain(
    *transforms,
    optax.sgd(1.0, optimizer.momentum, optimizer.nesterov),
  )


def _decay(config: ConfigDict, l2: float) -> optax.GradientTransformation:
  decay = tuple(config.optimizer.decay)
  return optax.add_decayed_weights(l2, lambda p: decay_mask(p, decay=decay))


def trust_ratio() -> optax.GradientTransformation:
  """LARS's scaling of kernels, each block of a scanned stage by itself."""
  one = optax.scale_by_trust_ratio()

  def by_block(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
      return one.update(update, one.init(param), param)[0]  # pyright: ignore

    return jax.tree.map(jax.vmap(scale), updates, params), state

  def label(path, _) -> str:
    names = [jax.tree_util.keystr((k,), simple=True) for k in path]
    if names[-1] != 'kernel':
      return 'other'
    return STACKED if STACKED in names else 'kernel'

  return optax.partition(
    {
      'kernel': one,
      STACKED: optax.GradientTransformation(one.init, by_block),
      'other': optax.identity(),
    },
    lambda params: jax.tree_util.tree_map_with_path(label, params),
  )


def muon(beta: float, *, nesterov: bool) -> optax.GradientTransformation:
  """Optax's Muon for these networks, at a rate of 1.

  A kernel is a matrix of its inputs, places and channels, by its outputs; of a
  scanned stage there is one for each block.
  """

  def axes(path, param) -> optax.contrib.MuonDimensionNumbers | None:
    names = [jax.tree_util.keystr((k,), simple=True) for k in path]
    if names[-1] != 'kernel' or CLASSIFIER in names:
      return None
    first = 1 if STACKED in names else 0
    return optax.contrib.MuonDimensionNumbers(
      tuple(range(first, param.ndim - 1)), param.ndim - 1
    )

  return optax.contrib.muon(
    1.0,
    beta=beta,
    nesterov=nesterov,
    consistent_rms=RMS,
    muon_weight_dimension_numbers=lambda params: (
      jax.tree_util.tree_map_with_path(axes, params)
    ),
  )


def adaptive_clip(
  threshold: float, *, alpha: bool = True
) -> optax.GradientTransformation:
  """Adaptive gradient clipping (Brock et al. 2021, eq. 3), eps = 1e-3.

  The gradient G_i of each output unit i is scaled down to
  threshold * max(||W_i||, eps) if it is longer. Norms are over all axes of a
  kernel but the last, and over whole vectors. The classifier is exempt.

  Args:
    threshold: lambda.
    alpha: whether the scalars of the branches are clipped too. At 0 that limits
      their gradients to threshold * eps.
  """

  def axes(path, param) -> str:
    names = [jax.tree_util.keystr((k,), simple=True) for k in path]
    if CLASSIFIER in names or (names[-1] == 'alpha' and not alpha):
      return 'exempt'
    first = 1 if STACKED in names else 0  # A scanned stage's leading axis.
    last = param.ndim - 1 if names[-1] == 'kernel' else param.ndim
    return str(tuple(range(first, last)))

  def label(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(axes, params)

  clips = {
    str(tuple(range(first, last))): optax.adaptive_grad_clip(
      threshold, axis=tuple(range(first, last))
    )
    for first in (0, 1)
    for last in range(first, 5)
  }
  return optax.partition({**clips, 'exempt': optax.identity()}, label)


def _all_but_kernels(params: Any) -> Any:
  return jax.tree.map(lambda label: label != 'kernel', param_labels(params))


def peak_rate(config: ConfigDict) -> float:
  """The learning rate, scaled with the batch if there is a reference batch."""
  optimizer = config.optimizer
  scale = config.batch_size / (optimizer.reference_batch or config.batch_size)
  return optimizer.learning_rate * scale

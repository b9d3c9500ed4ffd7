"""The training and evaluation steps: pure functions under the axis `AXIS`."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from skipinit_jax.models.moments import branch_moments
from skipinit_jax.models.parameters import alphas, block_norms
from skipinit_jax.training import cuda
from skipinit_jax.training.devices import AXIS


class TrainState(flax.struct.PyTreeNode):
  """Everything that training changes, and the two numbers that a run is given.

  Attributes:
    step: int32 (), number of steps made.
    params: float32 parameters.
    batch_stats: running statistics of batch normalization, else {}.
    ema: moving averages, {'params': ..., 'batch_stats': ...}, or None.
    opt_state: Optax's.
    sums: float32 (), loss and top1 summed over the steps since the last log,
      and the number of these steps; skipped ones are left out.
    skipped: int32 (), steps in a row whose update was skipped.
    rate: float32 (), the peak learning rate, lower after going back from a
      divergence; the schedule is a fraction of it.
    seed: uint32 (), of the run. Seed and rate are here so that runs which
      differ in nothing else share one compiled program.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  ema: Any
  opt_state: Any
  sums: dict[str, jax.Array]
  skipped: jax.Array
  rate: jax.Array
  seed: jax.Array


def create_state(
  variables: Any,
  tx: optax.GradientTransformation,
  *,
  rate: jax.typing.ArrayLike,
  seed: jax.typing.ArrayLike,
  ema: bool = False,
) -> TrainState:
  """The state before the first step, from a model's variables."""
  params = variables['params']
  batch_stats = variables.get('batch_stats', {})
  # Copies: the state's memory is donated to the step.
  averages = {'params': params, 'batch_stats': batch_stats}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    ema=jax.tree.map(jnp.copy, averages) if ema else None,
    opt_state=tx.init(params),
    sums={name: jnp.zeros(()) for name in ('loss', 'top1', 'steps')},
    skipped=jnp.zeros((), jnp.int32),
    rate=jnp.asarray(rate, jnp.float32),
    seed=jnp.asarray(seed, jnp.uint32),
  )


def cross_entropy(
  logits: jax.Array, targets: jax.Array, smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy in float32, (batch,).

  Args:
    logits: (batch, classes).
    targets: float32 (batch, classes), probabilities.
    smoothing: part of the target that is spread evenly over all classes.
  """
  return optax.softmax_cross_entropy(
    logits.astype(jnp.float32), optax.smooth_labels(targets, smoothing)
  )


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether the label is among the k largest logits, bool (batch,).

  Among equal logits the lower class comes first. A row with a logit that is
  not finite is wrong.
  """
  classes, labels = jnp.arange(logits.shape[-1])[None], labels[:, None]
  own = jnp.where(classes == labels, logits, -jnp.inf).max(-1, keepdims=True)
  before = (logits > own) | ((logits == own) & (classes < labels))
  known = (classes == labels).any(-1)
  return known & (before.sum(-1) < k) & jnp.isfinite(logits).all(-1)


def train_step(
  state: TrainState,
  inputs: Any,
  message: dict[str, jax.Array],
  *,
  gradient: Callable,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  ema_decay: float | None,
  ema_warmup: bool,
  log_every: int,
  max_skips: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update, under the mapped axis `AXIS`.

  All randomness is a function of (seed, step). If the loss, the gradient or the
  update is not finite, nothing is updated. Unless `max_skips` lets it pass, the
  step is not counted either: the state stays at its last finite parameters, and
  every later call returns the same, so the caller may notice late. A step that
  is skipped counts: the next one has the rate and the draws of the next step.

  Args:
    state: replicated.
    inputs: an element of the data set's `inputs`, this device's part.
    message: what this device's process tells the others, int32 (): `stop`,
      whether it was asked to, and `replaced`, images of the batch that could
      not be read. See `devices.message`.
    gradient: (state, inputs) -> what `gradient` returns.
    tx: the optimizer, for a learning rate of 1.
    schedule: the learning rate by step, as a fraction of the peak rate.
    ema_decay: of the averaged parameters, None for none.
    ema_warmup: keep at most (1 + step) / (10 + step) of the averages, so that
      they soon leave the initialization.
    log_every: steps over which the reported loss and top1 are averaged.
    max_skips: updates in a row that may be skipped as not finite.

  Returns:
    The new state and the metrics, scalars equal on all devices: loss and top1,
    averaged over the steps since the last multiple of `log_every` (skipped ones
    left out; if all were skipped, over the steps before); learning_rate as
    applied, grad_norm, param_norm, skipped, finite; stop and replaced, summed
    over the processes.
  """
  (loss, top1, batch_stats), grads = gradient(state, inputs)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  rate = schedule(state.step) * state.rate
  updates = jax.tree.map(lambda u: u * rate, updates)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay is not None:
    ema = _averages(state, params, batch_stats, ema_decay, ema_warmup)
  grad_norm, param_norm = cuda.norm(grads), cuda.norm(params)
  finite = jnp.isfinite(jnp.stack([loss, grad_norm, param_norm])).all()

  skips = ~finite & (state.skipped < max_skips)

  sums = _sums(state, loss, top1, log_every)
  updated = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    ema=ema,
    opt_state=opt_state,
    sums=sums,
    skipped=jnp.zeros_like(state.skipped),
  )
  passed_over = state.replace(step=state.step + 1, skipped=state.skipped + 1)
  shown = select(skips, state.sums, sums)
  metrics = {
    'loss': shown['loss'] / shown['steps'],
    'top1': shown['top1'] / shown['steps'],
    'learning_rate': rate,
    'grad_norm': grad_norm,
    'param_norm': param_norm,
    'skipped': state.skipped + skips,
    'finite': finite | skips,
    **jax.lax.psum(message, AXIS),
  }
  updated = cuda.join_scalars(updated)
  return select(finite, updated, select(skips, passed_over, state)), metrics


def _averages(
  state: TrainState, params: Any, batch_stats: Any, decay: float, warmup: bool
) -> Any:
  """The moving averages with new parameters and batch statistics."""
  limit: Any = decay
  if warmup:
    count = state.step.astype(jnp.float32)
    limit = jnp.minimum(decay, (1 + count) / (10 + count))
  new = {'params': params, 'batch_stats': batch_stats}
  return optax.incremental_update(new, state.ema, 1 - limit)


def _sums(
  state: TrainState, loss: jax.Array, top1: jax.Array, log_every: int
) -> dict[str, jax.Array]:
  """`TrainState.sums` with one more step, begun anew after a log."""
  # Whether every step since the last log was skipped, or there is none.
  starts = state.skipped >= state.step % log_every
  before = select(starts, jax.tree.map(jnp.zeros_like, state.sums), state.sums)
  return jax.tree.map(
    jnp.add, before, {'loss': loss, 'top1': top1, 'steps': jnp.ones(())}
  )


def draw(
  state: TrainState, inputs: Any, choose: Callable, batch_size: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """This device's examples in the step after `state`, and the step's keys.

  Returns:
    Images, labels, and indices in the batch, of this device's examples; and the
    keys for Dropout and for augmentation.
  """
  share = batch_size // jax.lax.axis_size(AXIS)
  examples = share * jax.lax.axis_index(AXIS) + jnp.arange(share)
  dropout_key, data_key, augment_key = jax.random.split(
    jax.random.fold_in(jax.random.key(state.seed), 1), 3
  )
  images, labels = choose(inputs, data_key, state.step, batch_size, examples)
  dropout_key, augment_key = (
    jax.random.fold_in(key, state.step) for key in (dropout_key, augment_key)
  )
  return (images, labels, examples), (dropout_key, augment_key)


def watch_step(
  state: TrainState,
  inputs: Any,
  *,
  gradient: Callable,
  model: nn.Module,
  choose: Callable,
  augment: Callable,
  batch_size: int,
) -> dict[str, jax.Array]:
  """Metrics of each block, on the images of the step to come.

  Args:
    state, inputs, gradient: see `train_step`.
    model, choose, augment, batch_size: see `gradient`.

  Returns:
    alpha, float32, in the order of `alphas`; block_grad_norm and branch_share
    (the branch's second moment over the sum of both paths'), float32 (blocks,),
    in the order of `block_names`. Only what the network has.
  """
  drawn, (dropout_key, augment_key) = draw(state, inputs, choose, batch_size)
  images, labels, examples = drawn
  images, _ = augment(images, labels, augment_key, examples)
  moments = branch_moments(
    model,
    {'params': state.params, 'batch_stats': state.batch_stats},
    images,
    train=True,
    first_example=examples[0],
    rngs={'dropout': dropout_key},
  )
  skip, branch = jnp.moveaxis(jax.lax.pmean(moments, AXIS), -1, 0)
  total = skip + branch
  _, grads = gradient(state, inputs)
  watched = {
    'branch_share': jnp.where(total == 0, 0.0, branch / total),
    'block_grad_norm': block_norms(grads),
  }
  if scalars := alphas(state.params):
    watched['alpha'] = jnp.stack([*scalars.values()])
  return {name: value for name, value in watched.items() if value.size}


def gradient(
  state: TrainState,
  inputs: Any,
  *,
  model: nn.Module,
  choose: Callable,
  augment: Callable,
  batch_size: int,
  micro_batches: int,
  label_smoothing: float,
) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
  """The gradient of the step after `state`, the mean over `AXIS`.

  Args:
    state, inputs: see `train_step`.
    model: the network.
    choose, augment: of the data set; see `data.Resident.choose` and
      `data.Augmentation`.
    batch_size: over all devices.
    micro_batches: parts that this device's share is cut into.
    label_smoothing: see `cross_entropy`.

  Returns:
    (loss, top1, new batch statistics), and the gradient, like the parameters.
  """
  drawn, (dropout_key, augment_key) = draw(state, inputs, choose, batch_size)

  def loss_fn(params, images, labels, examples):
    images, targets = augment(images, labels, augment_key, examples)
    logits, changed = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      first_example=examples[0],
      rngs={'dropout': dropout_key},
      mutable=['batch_stats'],
    )
    loss = cross_entropy(logits, targets, label_smoothing).mean()
    top1 = in_top_k(logits, targets.argmax(-1), 1).mean()
    return loss, (top1, changed.get('batch_stats', {}))

  def grad_fn(*part):
    out, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
    return out, cuda.settle(grads, summed=micro_batches > 1)

  (loss, (top1, batch_stats)), grads = accumulate(grad_fn, drawn, micro_batches)
  return jax.lax.pmean(((loss, top1, batch_stats), grads), AXIS)


def accumulate(grad_fn: Callable, batch: Any, parts: int) -> Any:
  """The mean of grad_fn(*part) over consecutive parts of a batch, in a loop.

  Args:
    grad_fn: takes leaves (n / parts, ...); its results are summed in their
      dtype, float32 gradients in float32.
    batch: leaves (n, ...). Each part is sliced where it is used: a scan over
      stacked parts would copy the stack (TPU, ResNet-50, 4 parts: 6 % more
      memory traffic; as much with `optax.microbatch`).
    parts: 1 for no loop.
  """
  if parts == 1:
    return grad_fn(*batch)

  def part(i):
    def cut(x):
      size = x.shape[0] // parts
      return jax.lax.dynamic_slice_in_dim(x, i * size, size)

    return grad_fn(*jax.tree.map(cut, batch))

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0)
  )
  total = jax.lax.fori_loop(
    0, parts, lambda i, total: jax.tree.map(jnp.add, total, part(i)), zeros
  )
  return jax.tree.map(lambda x: x / parts, total)


def select(condition: jax.Array, new: Any, old: Any) -> Any:
  """`new` where the scalar `condition` holds, else `old`, leaf by leaf."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def eval_step(
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  message: dict[str, jax.Array],
  *,
  model: nn.Module,
  normalize: Callable,
) -> dict[str, jax.Array]:
  """Sums over one batch, under the mapped axis `AXIS`; masked rows count 0.

  Args:
    params, batch_stats: replicated.
    images: uint8 (share, height, width, channels).
    labels: int32 (share,); -1 for an image that could not be read, which
      counts as wrong and is left out of the loss.
    mask: bool (share,).
    message: see `train_step`.
    model: the network.
    normalize: uint8 images to floating ones.

  Returns:
    Sums over all devices: seen, read, top1, top5, stop (int32 counts) and loss
    (float32).
  """
  variables = {'params': params, 'batch_stats': batch_stats}
  logits: Any = model.apply(variables, normalize(images), train=False)
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  read = mask & (labels >= 0)
  sums = {
    'seen': mask,
    'read': read,
    'stop': message['stop'],
    'top1': mask & in_top_k(logits, labels, 1),
    'top5': mask & in_top_k(logits, labels, 5),
    'loss': jnp.where(read, cross_entropy(logits, targets), 0.0),
  }
  return jax.lax.psum(jax.tree.map(lambda x: x.sum(), sums), AXIS)

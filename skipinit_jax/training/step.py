"""The training and evaluation steps: pure functions of one device's share."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'batch'


class TrainState(flax.struct.PyTreeNode):
  """Everything that training changes.

  Attributes:
    step: int32 (), number of updates made.
    params: float32 parameters.
    batch_stats: running statistics of batch normalization, else {}.
    opt_state: Optax's.
    sums: float32 (), loss and top-1 summed over the steps since the last log.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  sums: dict[str, jax.Array]


def create_state(variables: Any, tx: optax.GradientTransformation):
  """The state before the first step, from a model's variables."""
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=tx.init(params),
    sums={'loss': jnp.zeros(()), 'top1': jnp.zeros(())},
  )


def cross_entropy(
  logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy in float32, (batch,).

  Args:
    logits: (batch, classes).
    labels: integers (batch,).
    smoothing: share of the target spread evenly over all classes.
  """
  logits = logits.astype(jnp.float32)
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  return optax.softmax_cross_entropy(
    logits, optax.smooth_labels(targets, smoothing)
  )


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether the label is among the k largest logits, bool (batch,).

  Among equal logits the lower class comes first. A row of logits that are not
  all finite is wrong.
  """
  _, classes = jax.lax.top_k(logits, min(k, logits.shape[-1]))
  found = (classes == labels[:, None]).any(-1)
  return found & jnp.isfinite(logits).all(-1)


def train_step(
  state: TrainState,
  arrays: Any,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  train_batch: Callable,
  seed: int,
  batch_size: int,
  label_smoothing: float,
  log_every: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update, under the mapped axis `AXIS`.

  Where the loss or the gradient is not finite, nothing is updated and the step
  is not counted: the state stays at its last finite parameters, and every later
  call gives the same answer, so the caller may look at it late.

  Args:
    state: replicated.
    arrays: of the data set, see `data.Resident.arrays`.
    model, tx, schedule: the network, its optimizer and learning rate.
    train_batch: `data.Resident.train_batch`.
    seed: of the run; all randomness is a function of (seed, step).
    batch_size: over all devices.
    label_smoothing: see `cross_entropy`.
    log_every: steps over which the reported loss and top1 are averaged.

  Returns:
    The new state and the metrics, scalars equal on all devices: loss and top1
    (averaged since the last multiple of `log_every`), learning_rate, grad_norm,
    param_norm, finite.
  """
  share = batch_size // jax.lax.axis_size(AXIS)
  first = share * jax.lax.axis_index(AXIS)
  key = jax.random.key(seed)
  dropout_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
  images, labels = train_batch(
    arrays, jax.random.fold_in(key, 2), state.step, batch_size, first, share
  )

  def loss_fn(params):
    logits, changed = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      first_example=first,
      rngs={'dropout': dropout_key},
      mutable=['batch_stats'],
    )
    loss = cross_entropy(logits, labels, label_smoothing).mean()
    top1 = in_top_k(logits, labels, 1).mean()
    return loss, (top1, changed.get('batch_stats', {}))

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (top1, batch_stats)), grads = grad_fn(state.params)
  loss, top1, batch_stats, grads = jax.lax.pmean(
    (loss, top1, batch_stats, grads), AXIS
  )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  fresh = state.step % log_every == 0
  sums = jax.tree.map(
    lambda total, value: jnp.where(fresh, 0.0, total) + value,
    state.sums,
    {'loss': loss, 'top1': top1},
  )
  metrics = {
    name: total / (state.step % log_every + 1) for name, total in sums.items()
  }
  metrics |= {
    'learning_rate': schedule(state.step),
    'grad_norm': grad_norm,
    'param_norm': optax.tree.norm(state.params),
    'finite': finite,
  }
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
    sums=sums,
  )
  return select(finite, new_state, state), metrics


def select(condition: jax.Array, new: Any, old: Any) -> Any:
  """`new` where the scalar `condition` holds, else `old`, leaf by leaf."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def eval_step(
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  *,
  model: nn.Module,
  normalize: Callable,
) -> dict[str, jax.Array]:
  """Sums over one batch, under the mapped axis `AXIS`; masked rows count 0.

  Args:
    params, batch_stats: replicated.
    images: uint8 (share, height, width, channels).
    labels: int32 (share,).
    mask: bool (share,).
    model: the network.
    normalize: uint8 images to floating ones.

  Returns:
    Sums over all devices: seen, top1, top5 (int32 counts) and loss (float32).
  """
  variables = {'params': params, 'batch_stats': batch_stats}
  logits = model.apply(variables, normalize(images), train=False)
  sums = {
    'seen': mask,
    'top1': mask & in_top_k(logits, labels, 1),
    'top5': mask & in_top_k(logits, labels, 5),
    'loss': jnp.where(mask, cross_entropy(logits, labels), 0.0),
  }
  return jax.lax.psum(jax.tree.map(lambda x: x.sum(), sums), AXIS)


def map_over_devices(step: Callable, in_axes: tuple, **pmap_args) -> Callable:
  """Maps a step over this process's devices; results are equal on all.

  Everything about `jax.pmap` is here: arguments with axis None are ordinary
  replicated trees, arguments with axis 0 are stacked by device, and what comes
  back is not stacked.
  """
  # pmap wants one mapped argument at least; a resident data set has none.
  device = jax.device_put(np.arange(jax.local_device_count()), _sharding(AXIS))
  mapped = jax.pmap(
    lambda *args: step(*args[:-1]),
    axis_name=AXIS,
    in_axes=(*in_axes, 0),
    out_axes=None,
    **pmap_args,
  )
  return lambda *args: mapped(*args, device)


def replicate(tree: Any) -> Any:
  """Puts a tree on every device, where pmap expects it."""
  return jax.device_put(tree, _sharding())


def _sharding(*axes: str) -> NamedSharding:
  # The mesh is pmap's own, so that the step compiles once and not twice.
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(*axes))


def split_over_devices(tree: Any) -> Any:
  """Reshapes leaves (batch, ...) to (devices, batch / devices, ...)."""
  n = jax.local_device_count()
  return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree)

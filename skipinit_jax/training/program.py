"""What a recipe computes: its network, its optimizer and its steps."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from skipinit_jax.data.dataset import Dataset
from skipinit_jax.errors import InputError
from skipinit_jax.files import dumps
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.training import step as steps
from skipinit_jax.training.devices import map_over_devices
from skipinit_jax.training.network import (
  build_method,
  build_model,
  init_variables,
)
from skipinit_jax.training.optimizer import make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Program:
  """The computation of a run, not yet compiled.

  Attributes:
    config, data: what it was made of.
    model: the network.
    tx: its optimizer, for a learning rate of 1.
    initial_state: (seed, rate) -> the state before the first step; pure.
    train_step: mapped (state, inputs, message, count) -> (state, metrics),
      several steps where count is more than 1; the state is donated. See
      `step.train_step`.
    watch_step: mapped (state, inputs) -> metrics of each block; see
      `step.watch_step`.
    eval_step: mapped (params, batch_stats, images, labels, mask, message) ->
      sums; see `step.eval_step`.
  """

  config: ConfigDict
  data: Dataset
  model: ResNet
  tx: optax.GradientTransformation
  initial_state: Callable[[ArrayLike, ArrayLike], steps.TrainState]
  train_step: Callable
  watch_step: Callable
  eval_step: Callable


# Fields that are numbers in the state, so that no program depends on them.
IN_STATE = ('seed', 'optimizer.learning_rate')


def program_key(config: ConfigDict) -> str:
  """A digest, the same for configs that can share one program."""
  fields = flatten_dict(config.to_dict(), sep='.')
  fields = {k: v for k, v in fields.items() if k not in IN_STATE}
  return hashlib.sha256(dumps(fields, sort_keys=True).encode()).hexdigest()


def make_program(
  config: ConfigDict, data: Dataset, devices: Sequence[Any] | None = None
) -> Program:
  """Builds the computation of `config` on `data`.

  Args:
    config: a recipe.
    data: of `data.open_dataset`; only its sizes and its pure functions are
      used, no image.
    devices: of JAX, to compile for; None: all of every process.

  Raises:
    InputError: a network that can't be built, or steps_per_call > 1 with a
      data set that comes in batches.
  """
  if config.steps_per_call > 1 and not data.resident:
    raise InputError(
      f'steps_per_call={config.steps_per_call} is for data sets that fit on a '
      f'device; {data.name} comes in batches, one step a call'
    )
  platform = devices[0].platform if devices else None
  model = build_model(config, data.num_classes, platform)
  tx = make_optimizer(config, build_method(config))
  of_data = {
    'model': model,
    'choose': data.choose,
    'augment': data.augmentation,
    'batch_size': config.batch_size,
  }
  gradient = functools.partial(
    steps.gradient,
    **of_data,
    micro_batches=config.micro_batches,
    label_smoothing=config.label_smoothing,
  )

  def initial_state(seed: ArrayLike, rate: ArrayLike) -> steps.TrainState:
    variables = init_variables(model, data.image_shape, seed)
    ema = config.ema_decay is not None
    return steps.create_state(variables, tx, rate=rate, seed=seed, ema=ema)

  normalize = data.augmentation.normalize
  split = not data.resident
  return Program(
    config=config,
    data=data,
    model=model,
    tx=tx,
    initial_state=initial_state,
    train_step=map_over_devices(
      _train_steps(config, data, tx, gradient),
      (False, split, True, False),
      devices,
      donate_argnums=0,
    ),
    watch_step=map_over_devices(
      functools.partial(steps.watch_step, gradient=gradient, **of_data),
      (False, split),
      devices,
    ),
    eval_step=map_over_devices(
      functools.partial(steps.eval_step, model=model, normalize=normalize),
      (False, False, True, True, True, True),
      devices,
    ),
  )


class LastProgram:
  """`make_program` that has the last one at hand, for runs in one process."""

  def __init__(self):
    self._key, self._program = '', None

  def __call__(self, config: ConfigDict, data: Dataset) -> Program:
    """The program of `config`, with what is compiled of one that shares it."""
    key = program_key(config)
    if self._program is None or key != self._key:
      self._key, self._program = '', None
      jax.clear_caches()
      self._key, self._program = key, make_program(config, data)
    return dataclasses.replace(self._program, config=config)


def _train_steps(
  config: ConfigDict,
  data: Dataset,
  tx: optax.GradientTransformation,
  gradient: Callable,
) -> Callable:
  step = functools.partial(
    steps.train_step,
    gradient=gradient,
    tx=tx,
    schedule=make_schedule(config, data.train_size),
    ema_decay=config.ema_decay,
    ema_warmup=config.ema_warmup,
    log_every=config.log_every_steps,
    max_skips=config.divergence_limit if config.on_divergence == 'skip' else 0,
  )
  return functools.partial(_several, step, in_loop=config.steps_per_call > 1)


def _several(step, state, inputs, message, count, *, in_loop):
  """`count` steps in a loop on the device; without one, `count` is 1.

  The loop's length is an argument of the compiled program, so that a step is
  the same machine code in calls of any length: resuming stays exact.
  """
  if not in_loop:
    return step(state, inputs, message)
  _, shapes = jax.eval_shape(step, state, inputs, message)
  metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.fori_loop(
    0, count, lambda _, carry: step(carry[0], inputs, message), (state, metrics)
  )

"""What a recipe computes: its network, its optimizer and its two steps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.training import step as steps
from skipinit_jax.training.devices import map_over_devices
from skipinit_jax.training.network import (
  build_method,
  build_model,
  init_variables,
)
from skipinit_jax.training.optimizer import make_optimizer, make_schedule
from skipinit_jax.training.step import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Program:
  """The computation of a run, not yet compiled.

  Attributes:
    model, tx: the network, and its optimizer for a rate of 1.
    train_step: mapped (state, inputs, host, count) -> (state, metrics), several
      steps where count is more than 1; the state is donated. See
      `step.train_step`.
    watch_step: mapped (state, inputs, host) -> what is watched; see
      `step.watch_step`.
    eval_step: mapped (params, batch_stats, images, labels, mask, host) -> sums;
      see `step.eval_step`.
  """

  model: ResNet
  tx: optax.GradientTransformation
  train_step: Callable
  watch_step: Callable
  eval_step: Callable


def make_program(
  config: ConfigDict, data: Any, devices: Sequence[jax.Device] | None = None
) -> Program:
  """Builds the computation of `config` on `data`.

  Args:
    config: a recipe.
    data: of `data.open_dataset`; only its sizes and its pure functions are
      used, no image.
    devices: to compile for; None: all of every process.

  Raises:
    InputError: a network that can't be.
  """
  if config.steps_per_call > 1 and data.input_axis is not None:
    raise InputError(
      f'steps_per_call={config.steps_per_call} is for data sets that fit on a '
      f'device; {data.name} comes in batches, one step a call'
    )
  platform = devices[0].platform if devices else None
  model = build_model(config, data.num_classes, platform)
  schedule = make_schedule(config, data.train_size)
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
  train_step = functools.partial(
    steps.train_step,
    gradient=gradient,
    tx=tx,
    schedule=schedule,
    ema_decay=config.ema_decay,
    ema_warmup=config.ema_warmup,
    log_every=config.log_every_steps,
    max_skips=config.divergence_limit if config.on_divergence == 'skip' else 0,
  )
  eval_step = functools.partial(
    steps.eval_step, model=model, normalize=data.augmentation.normalize
  )
  several = functools.partial(
    _several, train_step, in_loop=config.steps_per_call > 1
  )
  watch = functools.partial(steps.watch_step, gradient=gradient, **of_data)

  def watch_step(state, inputs, host):
    del host  # pmap wants an argument that differs between devices.
    return watch(state, inputs)

  return Program(
    model=model,
    tx=tx,
    train_step=map_over_devices(
      several, (None, data.input_axis, 0, None), devices, donate_argnums=0
    ),
    watch_step=map_over_devices(
      watch_step, (None, data.input_axis, 0), devices
    ),
    eval_step=map_over_devices(eval_step, (None, None, 0, 0, 0, 0), devices),
  )


def _several(step, state, inputs, host, count, *, in_loop):
  """`count` steps in a loop on the device; without one, `count` is 1.

  The loop's length is an argument of the compiled program, so that a step is
  the same machine code in calls of any length: resuming stays exact.
  """
  if not in_loop:
    return step(state, inputs, host)
  _, shapes = jax.eval_shape(step, state, inputs, host)
  metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.fori_loop(
    0, count, lambda _, carry: step(carry[0], inputs, host), (state, metrics)
  )


def initial_state(
  program: Program,
  config: ConfigDict,
  data: Any,
  seed: jax.typing.ArrayLike,
  rate: jax.typing.ArrayLike,
) -> TrainState:
  """The state before the first step; pure, for `jax.jit`."""
  return create_state(
    init_variables(program.model, data.image_shape, seed),
    program.tx,
    rate=rate,
    seed=seed,
    ema=config.ema_decay is not None,
  )

"""Training: the order of things, nothing else."""

import functools
import itertools
import os
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.training import startup
from skipinit_jax.training import step as steps
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import (
  build_method,
  build_model,
  check_config,
  epochs_to_steps,
)
from skipinit_jax.training.evaluate import evaluate
from skipinit_jax.training.metrics import Reporter
from skipinit_jax.training.optimizer import make_optimizer, make_schedule
from skipinit_jax.training.result import read_result, write_result


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict:
  """Trains what `config` says and leaves everything in `workdir`.

  Called again with the same arguments, goes on from the last checkpoint, or
  returns the result of a run that has ended.

  Args:
    config: a recipe, see `training.config.default_config`.
    workdir: a folder, made if it does not exist.

  Returns:
    What `result.json` holds, see `training.result`.

  Raises:
    InputError: a recipe that can't run, or a workdir of another run; one line,
      before anything is compiled or written.
  """
  began = time.perf_counter()
  workdir = Path(workdir)
  startup.check_devices(config)
  check_config(config, jax.local_device_count())
  data = open_dataset(config.data)
  model = build_model(config, data.num_classes)
  startup.open_workdir(workdir, config)
  if (result := read_result(workdir)) is not None:
    return result
  startup.set_compilation_cache(config.compilation_cache)

  total = epochs_to_steps(config, config.epochs, data.train_size)
  eval_every = epochs_to_steps(
    config, config.eval_every_epochs, data.train_size
  )
  schedule = make_schedule(config, data.train_size)
  tx = make_optimizer(config, build_method(config), schedule)
  variables = startup.init_variables(model, data.image_shape, config.seed)
  state = steps.replicate(steps.create_state(variables, tx))
  checkpoints = Checkpoints(workdir, config.keep_checkpoints)
  start = checkpoints.latest_step() or 0
  if start:
    state = checkpoints.restore(start, state)
  reporter = Reporter(
    workdir,
    start=start,
    total=total,
    every=config.log_every_steps,
    steps_per_epoch=data.train_size / config.batch_size,
    batch_size=config.batch_size,
  )
  reporter.say(startup.describe(config, model, data, state, total))

  train_step = steps.map_over_devices(
    functools.partial(
      steps.train_step,
      model=model,
      tx=tx,
      schedule=schedule,
      train_batch=data.train_batch,
      seed=config.seed,
      batch_size=config.batch_size,
      label_smoothing=config.label_smoothing,
      log_every=config.log_every_steps,
    ),
    in_axes=(None, None),
    donate_argnums=0,
  )
  eval_step = steps.map_over_devices(
    functools.partial(steps.eval_step, model=model, normalize=data.normalize),
    in_axes=(None, None, 0, 0, 0),
  )
  inputs = itertools.repeat(steps.replicate(data.arrays()))

  for step in range(start + 1, total + 1):
    with reporter.waiting():
      batch = next(inputs)
    state, metrics = train_step(state, batch)
    reporter.train(step, metrics)
    evaluates = step % max(eval_every, 1) == 0 or step == total
    saves = step % config.checkpoint_every_steps == 0 or step == total
    if evaluates or saves:
      reporter.flush()
    if reporter.diverged:
      break
    if evaluates:
      reporter.eval(step, evaluate(eval_step, state, config, data))
    if saves:
      checkpoints.save(step, state)
      reporter.restart_clock(step)

  if reporter.diverged:  # The state is that of the last finite step.
    step = int(state.step)
    reporter.eval(step, evaluate(eval_step, state, config, data))
  checkpoints.close()
  reporter.close()
  return write_result(
    workdir,
    status='diverged' if reporter.diverged else 'completed',
    steps=int(state.step),
    params=state.params,
    seconds=time.perf_counter() - began,
  )

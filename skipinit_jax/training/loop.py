"""Training: the order of things, nothing else."""

import os
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.training import devices, startup
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import check_config
from skipinit_jax.training.evaluate import evaluate
from skipinit_jax.training.metrics import Reporter
from skipinit_jax.training.program import make_program
from skipinit_jax.training.result import read_result, write_result
from skipinit_jax.training.step import create_state
from skipinit_jax.training.timetable import make_timetable


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
  program = make_program(config, data)
  startup.open_workdir(workdir, config)
  if (result := read_result(workdir)) is not None:
    return result
  startup.set_compilation_cache(config.compilation_cache)

  times = make_timetable(config, data.train_size)
  state = devices.replicate(
    create_state(
      startup.init_variables(program.model, data.image_shape, config.seed),
      program.tx,
      ema=config.ema_decay is not None,
    )
  )
  checkpoints = Checkpoints(workdir, config.keep_checkpoints)
  start = checkpoints.latest_step() or 0
  if start:
    state = checkpoints.restore(start, state)
  reporter = Reporter(
    workdir,
    start=start,
    times=times,
    batch_size=config.batch_size,
  )
  reporter.say(
    startup.describe(config, program.model, data, state, times.total)
  )
  no_stop = devices.shard(np.zeros(jax.local_device_count(), bool))
  place = devices.replicate if data.input_axis is None else devices.shard
  inputs = data.inputs(place, start)

  step = start
  while step < times.total:
    with reporter.waiting():
      batch = next(inputs)
    count = times.count(step)
    state, metrics = program.train_step(state, batch, no_stop, count)
    step += count
    reporter.train(step, count, metrics)
    if times.evaluates(step) or times.saves(step):
      reporter.flush()
    if reporter.diverged:
      break
    if times.evaluates(step):
      reporter.eval(step, evaluate(program, state, config, data))
    if times.saves(step):
      checkpoints.save(step, state)
      reporter.restart_clock(step)

  if reporter.diverged:  # The state is that of the last finite step.
    step = int(state.step)
    reporter.eval(step, evaluate(program, state, config, data))
  checkpoints.close()
  reporter.close()
  return write_result(
    workdir,
    status='diverged' if reporter.diverged else 'completed',
    steps=int(state.step),
    params=state.params,
    seconds=time.perf_counter() - began,
  )

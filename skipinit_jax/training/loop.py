"""Training: the order of things, nothing else."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.models.parameters import alphas, block_names
from skipinit_jax.training import devices, processes
from skipinit_jax.training.checkpoints import FOLDER, Checkpoints
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.describe import describe
from skipinit_jax.training.evaluate import evaluate, warm_up
from skipinit_jax.training.feed import Feed
from skipinit_jax.training.lock import hold_for_all
from skipinit_jax.training.metrics import Reporter, read_evals, say
from skipinit_jax.training.profile import Profiler
from skipinit_jax.training.program import Program, make_program
from skipinit_jax.training.result import take_result, write_result
from skipinit_jax.training.resume import go_back, may_go_back, restore_or_create
from skipinit_jax.training.signals import Stopped, StopRequest
from skipinit_jax.training.timetable import Timetable, make_timetable
from skipinit_jax.training.watchdog import Watchdog
from skipinit_jax.training.workdir import open_workdir, record_changes


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
    InputError: a recipe that can't run, or a workdir of another run, or one
      whose run is going on; one line, before anything is compiled or written.
      In mid-run, too many images that can't be read; all steps made are saved.
    RunError: the run can't go on, for a reason outside it; what was saved stays
      good. Images that can't be read for a reason of the system: all steps made
      are saved.
    Stopped: asked to stop by one of `signals.SIGNALS`; all steps made are
      saved.
  """
  # From here on: devices, files and other processes may hang as well.
  with Watchdog(
    config.stuck_at_start_seconds, config.stuck_after_seconds
  ) as watchdog:
    return _hold_and_train(config, epath.Path(workdir), watchdog)


def _hold_and_train(
  config: ConfigDict, workdir: epath.Path, watchdog: Watchdog
) -> dict:
  """The run, in a workdir that nobody else writes to meanwhile."""
  began = time.perf_counter()
  devices.check_devices(config)
  check_config(config, jax.device_count())
  data = open_dataset(config.data)
  program = make_program(config, data)
  times = make_timetable(config, data.train_size)
  with hold_for_all(workdir, say) as check_held:
    changes = open_workdir(workdir, config, times.total)
    result = take_result(workdir)
    if result is not None and not any(c['step'] == math.inf for c in changes):
      return result
    try:
      return _make_steps(
        config,
        workdir,
        data,
        program,
        times,
        changes,
        check_held,
        watchdog,
        began,
      )
    except (OSError, RunError) as error:
      check_held()  # The cause, where the workdir was moved away.
      if isinstance(error, RunError):
        raise
      reason = error.strerror or error
      raise RunError(f'{error.filename or workdir}: {reason}') from error


def _make_steps(
  config: ConfigDict,
  workdir: epath.Path,
  data: Any,
  program: Program,
  times: Timetable,
  changes: Sequence[dict[str, Any]],
  check_held: Callable[[], None],
  watchdog: Watchdog,
  began: float,
) -> dict:
  """The steps that are left, and the result."""
  devices.set_compilation_cache(config.compilation_cache)

  place = devices.replicate if data.input_axis is None else devices.shard
  with (
    StopRequest(say) as request,
    Checkpoints(workdir, config, say) as checkpoints,
    contextlib.ExitStack() as at_end,
    contextlib.ExitStack() as open_inputs,
  ):

    def feed(step: int) -> Feed:
      open_inputs.close()  # Those from before going back.
      inputs = data.inputs(place, config, step)
      open_inputs.enter_context(contextlib.closing(inputs))
      return Feed(inputs, times.total - step)

    def asked() -> bool:
      watchdog.beat()
      check_held()
      return request.requested is not None

    step, state = restore_or_create(program, config, data, checkpoints, changes)
    record_changes(workdir, config, changes, step)
    blocks = block_names(state.params)
    reporter = Reporter(
      workdir,
      step,
      times,
      config.batch_size,
      {
        'alpha': [*alphas(state.params)],
        **dict.fromkeys(('branch_share', 'block_grad_norm'), blocks),
      },
      config.data.bad_share,
    )
    at_end.callback(reporter.close)
    reporter.say(describe(config, program.model, data, state, times, workdir))
    warm_up(program, state, config, data)
    inputs = feed(step)
    profiler = Profiler(config, workdir)
    # Step of the last evaluation.
    seen = max((e['step'] for e in read_evals(workdir, step)), default=0)

    stopped, trouble = False, None
    while not (reporter.diverged or stopped):
      # First what is due: a run that was stopped here begins with it.
      results = {}
      if times.evaluates(step) and step > seen:
        try:
          results = evaluate(program, state, config, data, asked)
        except (InputError, RunError) as error:  # The same in all processes.
          results, trouble = None, error
        if results is None:
          stopped = True
          break
        reporter.eval(step, results)
        seen = step
      if times.saves(step):
        reporter.sync()
        checkpoints.save(step, state, results.get('eval'))
        reporter.restart_clock(step)
      if step == times.total:
        break

      profiler.before(step)
      with reporter.waiting():
        batch, unreadable = next(inputs)
      count = times.count(step)
      host = devices.tell(
        asked() or inputs.trouble is not None, reporter.unreadable(unreadable)
      )
      if step == 0 and times.watches(0):
        reporter.watch(0, program.watch_step(state, batch, host))
      state, metrics = program.train_step(state, batch, host, count)
      step += count
      if times.watches(step):
        metrics |= program.watch_step(state, batch, host)
      reporter.train(step, count, metrics)
      request.nothing_to_lose = False
      watchdog.beat(step)
      if times.evaluates(step) or times.saves(step):
        reporter.flush()
      if reporter.diverged and may_go_back(state, config):
        step, state = go_back(state, program, config, data, checkpoints)
        reporter.go_back(step)
        inputs = feed(step)
        seen = step
      stopped = reporter.stop

    reporter.flush()
    profiler.close()
    check_held()
    if stopped:
      if not reporter.diverged:
        reporter.sync()
        checkpoints.save(step, state)
        checkpoints.wait()
      trouble = trouble or reporter.trouble or processes.agree(inputs.trouble)
      if trouble:
        raise type(trouble)(f'{trouble}; step {int(state.step):,} is saved')
      raise Stopped(request.requested, int(state.step))
    if reporter.diverged:
      step = int(state.step)  # That of the last finite parameters.
      if step > seen or step == 0:
        reporter.eval(step, evaluate(program, state, config, data))
    checkpoints.wait()
    reporter.close()
    return write_result(
      workdir, state, reporter, data, seconds=time.perf_counter() - began
    )


def evaluate_latest(config: ConfigDict, workdir: str | os.PathLike) -> dict:
  """Evaluates the newest checkpoint of a run, which may be going on.

  Nothing in the workdir is changed.

  Args:
    config: of the run.
    workdir: of the run.

  Returns:
    The step, and what `evaluate` returns.

  Raises:
    InputError: a recipe that can't run, or a workdir without a checkpoint.
  """
  workdir = epath.Path(workdir)
  devices.check_devices(config)
  check_config(config, jax.device_count())
  if not (workdir / FOLDER).is_dir():
    raise InputError(f'{workdir} holds no checkpoint')
  data = open_dataset(config.data)
  program = make_program(config, data)
  devices.set_compilation_cache(config.compilation_cache)
  with Checkpoints(workdir, config, say, read_only=True) as checkpoints:
    if not checkpoints.steps():
      raise InputError(f'{workdir} holds no checkpoint')
    step, state = restore_or_create(program, config, data, checkpoints)
  return {'step': step, **evaluate(program, state, config, data)}

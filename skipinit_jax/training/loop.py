"""Training: the order of things, nothing else."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.data.dataset import Dataset
from skipinit_jax.errors import InputError, RunError, reason
from skipinit_jax.models.parameters import alphas, block_names
from skipinit_jax.training import devices, processes, resume
from skipinit_jax.training.checkpoints import Checkpoints, saved_steps
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.describe import describe
from skipinit_jax.training.evaluate import AskedToStop, evaluate, warm_up
from skipinit_jax.training.feed import Feed
from skipinit_jax.training.lock import hold_for_all
from skipinit_jax.training.metrics import Reporter, say
from skipinit_jax.training.profile import Profiler
from skipinit_jax.training.program import Program, make_program
from skipinit_jax.training.result import take_result, write_result
from skipinit_jax.training.signals import Stopped, StopRequest
from skipinit_jax.training.step import TrainState
from skipinit_jax.training.timetable import Timetable, make_timetable
from skipinit_jax.training.watchdog import Watchdog
from skipinit_jax.training.workdir import open_workdir, record_changes


def train(
  config: ConfigDict,
  workdir: str | os.PathLike,
  make: Callable[[ConfigDict, Dataset], Program] = make_program,
) -> dict[str, Any]:
  """Trains a recipe and leaves everything in `workdir`.

  Called again with the same arguments, it resumes from the last checkpoint, or
  returns the result of a run that has ended.

  Args:
    config: a recipe, see `training.config.default_config`.
    workdir: a folder, made if it does not exist.
    make: makes the program, or has it from a run before.

  Returns:
    What `result.json` holds, see `training.result`.

  Raises:
    InputError: a recipe that can't run, a workdir of another run, or one whose
      run is still going; one line, before anything is compiled or written. In
      mid-run: too many images that can't be read; all steps made are saved.
    RunError: the run can't continue for a reason outside it; what was saved
      stays good. If images can't be read for such a reason, all steps made are
      saved.
    Stopped: asked to stop by one of `signals.SIGNALS`; all steps made are
      saved.
  """
  began = time.perf_counter()
  workdir = epath.Path(workdir)
  with contextlib.ExitStack() as at_end:
    # From here on devices, files and other processes may hang.
    watchdog = at_end.enter_context(
      Watchdog(config.stuck_at_start_seconds, config.stuck_after_seconds)
    )
    program = _open_program(config, make)
    times = make_timetable(config, program.data.train_size)
    check_held = at_end.enter_context(hold_for_all(workdir, say))
    changes = open_workdir(workdir, config, times.total)
    result = take_result(workdir)
    if result is not None and not any(c['step'] == math.inf for c in changes):
      return result

    at_end.enter_context(_errors_with_files(workdir, check_held))
    devices.set_compilation_cache(config.compilation_cache)
    request = at_end.enter_context(StopRequest(say))
    checkpoints = at_end.enter_context(
      Checkpoints(workdir, config, say, program.data.form)
    )
    step, state = resume.restore_or_create(program, checkpoints, changes)
    record_changes(workdir, config, changes, step)
    reporter = _open_reporter(workdir, config, times, step, state)
    at_end.callback(reporter.close)
    if jax.process_index() == 0:
      say(describe(program, state, times, workdir))
    warm_up(program, state)
    feed = Feed(program, times.total)
    at_end.callback(feed.close)
    feed.start(step)
    run = Run(
      program=program,
      times=times,
      check_held=check_held,
      watchdog=watchdog,
      request=request,
      checkpoints=checkpoints,
      reporter=reporter,
      feed=feed,
      profiler=Profiler(config, workdir),
      step=step,
      state=state,
    )
    run.make_steps()
    run.end()
    return write_result(
      workdir,
      run.state,
      reporter,
      program.data,
      seconds=time.perf_counter() - began,
    )


@dataclasses.dataclass
class Run:
  """A run in progress: what its steps need, and how far they are."""

  program: Program
  times: Timetable
  check_held: Callable[[], None]  # Raises RunError if the lock was lost.
  watchdog: Watchdog
  request: StopRequest
  checkpoints: Checkpoints
  reporter: Reporter
  feed: Feed
  profiler: Profiler
  step: int  # Steps made.
  state: TrainState  # After these.
  stopped: bool = False  # Whether all processes stop after `step`.
  trouble: InputError | RunError | None = None  # Why, unless by request.

  def make_steps(self) -> None:
    """Makes the steps that are left, unless the run diverges or is stopped."""
    program, times, reporter = self.program, self.times, self.reporter
    while not (reporter.diverged or self.stopped):
      # What is due comes first: a run that was stopped here resumes with it.
      results = {}
      if times.evaluates(self.step) and self.step > reporter.evaluated:
        results = self.evaluate()
        if self.stopped:
          break
      if times.saves(self.step):
        reporter.sync()
        self.checkpoints.save(self.step, self.state, results.get('eval'))
        reporter.restart_clock(self.step)
      if self.step == times.total:
        break

      self.profiler.before(self.step)
      batch, message = self.next_batch()
      if self.step == 0 and times.watches(0):
        reporter.watch(0, program.watch_step(self.state, batch))
      count = times.count(self.step)
      self.state, metrics = program.train_step(
        self.state, batch, message, count
      )
      self.step += count
      if times.watches(self.step):
        metrics |= program.watch_step(self.state, batch)
      reporter.train(self.step, count, metrics)
      self.request.nothing_to_lose = False
      self.watchdog.beat(self.step)
      if times.evaluates(self.step) or times.saves(self.step):
        reporter.flush()
      if reporter.diverged and resume.may_go_back(self.state, program.config):
        self.go_back()
      self.stopped = reporter.stop
    reporter.flush()
    self.profiler.close()

  def asked_to_stop(self) -> bool:
    """Whether this process was; also a sign of life, and a look at the lock."""
    self.watchdog.beat()
    self.check_held()
    return self.request.requested is not None

  def evaluate(self) -> dict[str, dict[str, float]]:
    """Evaluates and reports; {} if all processes stop instead."""
    try:
      results = evaluate(self.program, self.state, self.asked_to_stop)
    except AskedToStop:
      self.stopped = True
      return {}
    except (InputError, RunError) as error:
      self.stopped, self.trouble = True, error
      return {}
    self.reporter.eval(self.step, results)
    return results

  def next_batch(self) -> tuple[Any, dict[str, jax.Array]]:
    """The inputs of the next step, and the message of this process in it."""
    with self.reporter.waiting():
      batch, unreadable = next(self.feed)
    stop = self.asked_to_stop() or self.feed.trouble is not None
    return batch, devices.message(stop, self.reporter.unreadable(unreadable))

  def go_back(self) -> None:
    """Returns to the last checkpoint, with a smaller learning rate."""
    self.step, self.state = resume.go_back(
      self.program, self.state, self.checkpoints
    )
    self.reporter.go_back(self.step)
    self.feed.start(self.step)

  def end(self) -> None:
    """Leaves all in the workdir.

    Raises:
      InputError, RunError, Stopped: the run stops before its end; see `train`.
    """
    self.check_held()
    if self.stopped:
      self.stop()
    if self.reporter.diverged:
      step = int(self.state.step)  # That of the last finite parameters.
      if step > self.reporter.evaluated or step == 0:
        self.reporter.eval(step, evaluate(self.program, self.state))
    self.checkpoints.wait()
    self.reporter.close()

  def stop(self) -> NoReturn:
    """Saves the steps made, and raises the reason to stop."""
    if not self.reporter.diverged:
      self.reporter.sync()
      self.checkpoints.save(self.step, self.state)
      self.checkpoints.wait()
    step = int(self.state.step)
    trouble = self.trouble or self.reporter.trouble
    if trouble := trouble or processes.agree(self.feed.trouble):
      raise type(trouble)(f'{trouble}; step {step:,} is saved')
    raise Stopped(self.request.requested, step)


def _open_program(config: ConfigDict, make: Callable = make_program) -> Program:
  """Checks a recipe and the devices, and opens its data set."""
  devices.check_devices(config)
  check_config(config, jax.device_count())
  return make(config, open_dataset(config.data))


def _open_reporter(
  workdir: epath.Path,
  config: ConfigDict,
  times: Timetable,
  step: int,
  state: TrainState,
) -> Reporter:
  blocks = block_names(state.params)
  names = {
    'alpha': [*alphas(state.params)],
    'branch_share': blocks,
    'block_grad_norm': blocks,
  }
  return Reporter(
    workdir, step, times, config.batch_size, names, config.data.bad_share
  )


@contextlib.contextmanager
def _errors_with_files(
  workdir: epath.Path, check_held: Callable[[], None]
) -> Iterator[None]:
  """Turns errors of the system into RunErrors that name a file."""
  try:
    yield
  except (OSError, RunError) as error:
    check_held()  # The cause, if the workdir was moved away.
    if isinstance(error, RunError):
      raise
    name = error.filename or workdir
    raise RunError(f'{name}: {reason(error)}') from error


def evaluate_latest(
  config: ConfigDict, workdir: str | os.PathLike
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run, which may still be going.

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
  if not saved_steps(workdir):
    raise InputError(f'{workdir} holds no checkpoint')
  program = _open_program(config)
  devices.set_compilation_cache(config.compilation_cache)
  step, state = resume.restore_saved(program, workdir)
  return {'step': step, **evaluate(program, state)}

"""The state that a run starts with, resumes from or goes back to."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.training.changes import changes_rate
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.devices import replicate
from skipinit_jax.training.metrics import say
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState


def restore_or_create(
  program: Program,
  checkpoints: Checkpoints,
  changes: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, TrainState]:
  """The newest saved state and its step, or the state before the first step.

  Seed and learning rate are part of the state. The seed is the config's; so is
  the rate if it was changed since, whatever divergences had made of it.

  Args:
    program: of the run.
    checkpoints: of the run.
    changes: of the config, see `changes.differences`.
  """
  config = program.config
  seed, rate = np.uint32(config.seed), np.float32(peak_rate(config))
  saved = checkpoints.restore_latest(_shapes(program))
  if saved[0] is None:
    # The program runs once; optimizing it takes longer than running it.
    on_cpu = jax.default_backend() == 'cpu'
    options = {'xla_backend_optimization_level': 0} if on_cpu else {}
    create = jax.jit(program.initial_state, compiler_options=options)
    return 0, replicate(create(seed, rate))
  step, state = saved
  state = state.replace(seed=replicate(seed))
  if changes_rate(changes, step):
    state = state.replace(rate=replicate(rate))
  return step, state


def restore_saved(
  program: Program, workdir: epath.PathLike, step: int | None = None
) -> tuple[int, TrainState]:
  """A saved state of a run, which may still be going, and its step.

  Args:
    program: of the run.
    workdir: of the run; nothing in it is changed.
    step: of the checkpoint; None: the newest.

  Raises:
    InputError, RunError: see `Checkpoints.restore_latest`; or none is whole.
  """
  like = _shapes(program)
  with Checkpoints(workdir, program.config, say, read_only=True) as checkpoints:
    if step is not None:
      return step, checkpoints.restore(step, like)
    saved = checkpoints.restore_latest(like)
  if saved[0] is None:
    raise InputError(f'{workdir} holds no checkpoint')
  return saved


def _shapes(program: Program) -> TrainState:
  return jax.eval_shape(program.initial_state, 0, 0.0)


def may_go_back(state: TrainState, config: ConfigDict) -> bool:
  """Whether a diverged run resumes from its last checkpoint."""
  limit = config.divergence_factor ** (config.divergence_limit - 0.5)
  lowest = limit * peak_rate(config)
  return config.on_divergence == 'back' and state.rate > lowest


def go_back(
  program: Program, state: TrainState, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
  """The last saved state, with a smaller learning rate than `state`."""
  rate = np.float32(state.rate * program.config.divergence_factor)
  diverged = int(state.step)
  step, state = restore_or_create(program, checkpoints)
  say(
    f'diverged after step {diverged:,}; back to step {step:,} with the '
    f'peak learning rate at {rate:.4g}'
  )
  return step, state.replace(rate=replicate(rate))

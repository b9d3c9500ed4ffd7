"""Which step of a run evaluates, saves, logs or watches."""

import dataclasses

from ml_collections import ConfigDict

from skipinit_jax.data.fields import MOST
from skipinit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Timetable:
  """Intervals of a run, in steps.

  Attributes:
    total: steps of the whole run.
    log_every, eval_every, checkpoint_every, watch_every: intervals; all of
      these also happen at the end. None: never.
    per_call: the most steps in one call of the devices.
    per_epoch: steps in an epoch, not rounded.
  """

  total: int
  log_every: int
  eval_every: int
  checkpoint_every: int
  per_call: int
  per_epoch: float
  watch_every: int | None = None

  def logs(self, step: int) -> bool:
    """Whether a line of training metrics is due when `step` steps are made."""
    return step % self.log_every == 0 or step == self.total

  def evaluates(self, step: int) -> bool:
    """Whether an evaluation is due."""
    return step % self.eval_every == 0 or step == self.total

  def saves(self, step: int) -> bool:
    """Whether a checkpoint is due."""
    return step % self.checkpoint_every == 0 or step == self.total

  def watches(self, step: int) -> bool:
    """Whether the metrics of each block are due, see `step.watch_step`."""
    every = self.watch_every
    return every is not None and (step % every == 0 or step == self.total)

  def count(self, step: int) -> int:
    """Steps in the call after `step`, which ends where something is due."""
    intervals = (
      self.log_every,
      self.eval_every,
      self.checkpoint_every,
      self.watch_every,
    )
    due = [step - step % every + every for every in intervals if every]
    return min(step + self.per_call, self.total, *due) - step


def make_timetable(config: ConfigDict, train_size: int) -> Timetable:
  """The intervals of a recipe.

  Args:
    config: a recipe.
    train_size: images in an epoch.

  Raises:
    InputError: less than one step, or too many to count.
  """
  total = epochs_to_steps(config, config.epochs, train_size)
  if total < 1:
    raise InputError(
      f'epochs={config.epochs:g} of {train_size} images are less than one step '
      f'of batch_size={config.batch_size}'
    )
  if config.epochs * train_size > MOST:
    raise InputError(
      f'epochs={config.epochs:g} of {train_size} images are more than '
      f'{MOST:,} images; expected at most {MOST // train_size}'
    )
  return Timetable(
    total=total,
    log_every=config.log_every_steps,
    eval_every=max(
      epochs_to_steps(config, config.eval_every_epochs, train_size), 1
    ),
    checkpoint_every=config.checkpoint_every_steps,
    per_call=config.steps_per_call,
    per_epoch=train_size / config.batch_size,
    watch_every=config.watch_every_steps,
  )


def epochs_to_steps(config: ConfigDict, epochs: float, train_size: int) -> int:
  """Converts epochs to steps, rounded; nothing else does."""
  return round(epochs * train_size / config.batch_size)

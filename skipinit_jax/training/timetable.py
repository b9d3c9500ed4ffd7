"""What happens at which step of a run."""

import dataclasses

from ml_collections import ConfigDict

from skipinit_jax.errors import InputError

# Steps and images are counted in int32.
MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Timetable:
  """Intervals of a run, in steps.

  Attributes:
    total: steps of the whole run.
    log_every, eval_every, checkpoint_every: from one to the next; all of them
      also happen at the end.
    per_call: the most steps in one call of the device.
    per_epoch: a real number.
    watch_every: like the other intervals; None: never.
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
    """Whether a look into the blocks is due."""
    every = self.watch_every
    return every is not None and (step % every == 0 or step == self.total)

  def count(self, step: int) -> int:
    """Steps in the call after `step`, which ends where something is due."""
    ends = [step + self.per_call, self.total]
    for every in (
      self.log_every,
      self.eval_every,
      self.checkpoint_every,
      self.watch_every,
    ):
      if every is not None:
        ends.append(step - step % every + every)
    return min(ends) - step


def make_timetable(config: ConfigDict, train_size: int) -> Timetable:
  """The intervals of a recipe on so many images."""

  def steps(epochs: float) -> int:
    return epochs_to_steps(config, epochs, train_size)

  if steps(config.epochs) < 1:
    raise InputError(
      f'epochs={config.epochs:g} of {train_size} images are less than one step '
      f'of batch_size={config.batch_size}'
    )
  if config.epochs * train_size > MOST:
    raise InputError(
      f'epochs={config.epochs:g} of {train_size} images are more than are '
      f'counted, {MOST:,}; expected at most {MOST // train_size}'
    )
  return Timetable(
    total=steps(config.epochs),
    log_every=config.log_every_steps,
    eval_every=max(steps(config.eval_every_epochs), 1),
    checkpoint_every=config.checkpoint_every_steps,
    per_call=config.steps_per_call,
    per_epoch=train_size / config.batch_size,
    watch_every=config.watch_every_steps,
  )


def epochs_to_steps(config: ConfigDict, epochs: float, train_size: int) -> int:
  """Steps in so many epochs, rounded; the one place that converts."""
  return round(epochs * train_size / config.batch_size)

"""Saving and restoring the training state with Orbax."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.models.stages import STACKED, stack_blocks, unstack_blocks
from skipinit_jax.training.devices import replicate
from skipinit_jax.training.step import TrainState

FOLDER = 'checkpoints'


class Checkpoints:
  """The checkpoints of a run, by number of steps made.

  A checkpoint is written in the background and gets its name when it is whole,
  so that a save that was cut off leaves the earlier ones as they are. Orbax
  keeps no checksum of arrays: a digest is saved beside them and compared.

  Args:
    workdir: of the run; they lie in its folder `checkpoints`.
    config: its `keep_checkpoints` newest are kept, and the one with the best
      top-1 of those saved after an evaluation; `fall_back` lets a damaged one
      be passed over.
    say: called with a line about each damaged checkpoint.
  """

  def __init__(
    self, workdir: os.PathLike, config: ConfigDict, say: Callable[[str], None]
  ):
    self._folder = epath.Path(workdir) / FOLDER
    self._config, self._say = config, say
    self._saving = None
    self._open()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if kind is None:
      self.wait()
    with contextlib.suppress(Exception if kind else ()):
      self._manager.close()

  def _open(self) -> None:

    def top1(metrics: Mapping[str, float]) -> float:
      return metrics['top1']

    best = checkpoint_managers.BestN(
      get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False
    )
    newest = checkpoint_managers.LatestN(self._config.keep_checkpoints)
    with _reasons(f'checkpoints in {self._folder} can not be used'):
      self._manager = ocp.CheckpointManager(
        self._folder if '://' in str(self._folder) else self._folder.resolve(),
        # Without them a fresh manager tells nothing of what was saved.
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'check': ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          best_fn=top1,  # Without it metrics are not written.
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            [newest, best]
          ),
        ),
      )

  def steps(self) -> list[int]:
    """The steps that were saved whole, in order."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: TrainState, evals: Mapping[str, float] | None = None
  ) -> None:
    """Starts to save; returns before it is written. A step is saved once.

    Args:
      step: number of steps made.
      state: replicated.
      evals: the evaluation of this very state, if there was one.

    Raises:
      RunError: this save or the one before it went wrong.
    """
    if step in self.steps():
      return
    self.wait()  # Orbax would too, and blame this step for the one before.
    self._saving = step
    tree = jax.tree.map(np.asarray, serialization.to_state_dict(state))
    with _reasons(self._not_written()):
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(tree),
          check=ocp.args.JsonSave({'sha256': digest(tree)}),
        ),
        metrics=None if evals is None else {'top1': evals['top1']},
      )
      if not saved:
        raise OSError('Orbax declined to save it')

  def restore_latest(
    self, like: TrainState
  ) -> tuple[int, TrainState] | tuple[None, None]:
    """The newest state that is whole, on every device, and its step.

    Checkpoints of scanned and of unrolled networks serve both: blocks are
    stacked or unstacked as `like` needs them. A damaged checkpoint is reported
    and moved out of the way.

    Raises:
      RunError: the newest is damaged and there is none before it, or it may not
        be passed over.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return step, self.restore(step, like)
      except Damaged as error:
        before = [s for s in steps if s < step]
        if not before:
          raise RunError(f'{error}, and there is none before it') from None
        if not self._config.fall_back:
          raise RunError(
            f'{error}; --config.fall_back=True goes on from step {before[-1]}'
          ) from None
        self._say(f'{error}; going on from step {before[-1]}')
        self._set_aside(step)
    return None, None

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`; see `restore_latest`.

    Raises:
      Damaged: it can't be read, or not as it was written.
    """
    wanted = serialization.to_state_dict(like)
    try:
      saved = self._manager.item_metadata(step)['state']
      convert = dict
      if _has_stacked(saved) and not _has_stacked(wanted):
        wanted, convert = _shapes(stack_blocks, wanted), unstack_blocks
      elif _has_stacked(wanted) and not _has_stacked(saved):
        wanted, convert = _shapes(unstack_blocks, wanted), stack_blocks
      _check_shapes(saved, wanted)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(
            jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wanted)
          ),
          check=ocp.args.JsonRestore(),
        ),
      )
    except InputError:
      raise
    except Exception as error:  # Orbax raises bare exceptions here.
      raise Damaged(step, _first_line(error)) from None
    tree = restored['state']
    if digest(tree) != restored['check']['sha256']:
      raise Damaged(step, 'its arrays are not those that were saved')
    return replicate(serialization.from_state_dict(like, convert(tree)))

  def wait(self) -> None:
    """Waits until all is written; raises RunError if that went wrong."""
    with _reasons(self._not_written()):
      self._manager.wait_until_finished()

  def _not_written(self) -> str:
    steps = sorted(
      int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()
    )
    good = ', '.join(map(str, steps)) or 'none'
    return (
      f'the checkpoint of step {self._saving} could not be written '
      f'(whole ones: {good})'
    )

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    aside = self._folder.parent / f'damaged-checkpoint-{step}'
    if aside.exists():
      aside.rmtree()
    if jax.process_index() == 0:
      (self._folder / str(step)).rename(aside)
    self._open()


def saved_steps(workdir: os.PathLike | str) -> list[int]:
  """The steps whose states a run has kept, in order."""
  folder = epath.Path(workdir) / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


class Damaged(RunError):
  """A checkpoint that can't be read, or not as it was written."""

  def __init__(self, step: int, reason: str):
    super().__init__(f'checkpoint of step {step} is damaged ({reason})')


class _reasons:
  """Turns what Orbax and the file system raise into one line."""

  def __init__(self, what: str):
    self._what = what

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, Exception) and not isinstance(error, RunError):
      raise RunError(f'{self._what}: {_first_line(error)}') from None


def digest(tree: Any) -> str:
  """SHA-256 over the names, types, shapes and bytes of all leaves."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    total.update(f'{name} {leaf.dtype} {leaf.shape} '.encode())
    total.update(np.ascontiguousarray(leaf).data)
  return total.hexdigest()


def _has_stacked(tree: Any) -> bool:
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return any(f"'{STACKED}'" in jax.tree_util.keystr(path) for path, _ in paths)


def _check_shapes(saved: Any, wanted: Any) -> None:
  """Raises InputError where a checkpoint is of another network."""

  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
      for path, leaf in leaves
      if hasattr(leaf, 'shape')
    }

  there, here = shapes(saved), shapes(wanted)
  for name in {**here, **there}:
    if there.get(name) != here.get(name):
      raise InputError(
        f'the checkpoint is of another network: {name} is '
        f'{there.get(name, "missing")} there, {here.get(name, "missing")} here'
      )


def _shapes(convert: Callable, tree: Any) -> Any:
  return jax.eval_shape(convert, tree)


def _first_line(error: BaseException) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  # TensorStore: a line of paths, then: No space left on device [os_error_...
  if of_system := re.search(r"([^:]+) \[os_error_code='", str(error)):
    return of_system[1].strip()
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = lines[0] if lines else type(error).__name__
  return text if len(text) < 200 else f'{text[:200]}...'

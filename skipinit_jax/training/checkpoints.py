"""Saving and restoring the training state with Orbax."""

import contextlib
import errno
import hashlib
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from skipinit_jax.data.order import order_of
from skipinit_jax.errors import InputError, RunError, of_system, reason
from skipinit_jax.files import retry
from skipinit_jax.models.stages import STACKED, stack_blocks, unstack_blocks
from skipinit_jax.training.changes import (
  check_form,
  check_order,
  check_origin,
  run_fields,
)
from skipinit_jax.training.devices import replicate
from skipinit_jax.training.processes import wait_for_all
from skipinit_jax.training.step import TrainState

FOLDER = 'checkpoints'


class Checkpoints:
  """The checkpoints of a run, by number of steps made.

  A checkpoint is written in the background and gets its name when it is whole,
  so that a save that was cut off leaves the earlier ones as they are. Orbax
  keeps no checksum of arrays: a digest is saved beside them and compared.

  A read that fails for a reason of the system (a network disk that does not
  answer) is tried again, and then ends the run. A checkpoint is damaged if it
  can be read, but not as it was written.

  Args:
    workdir: of the run; checkpoints are in its folder `checkpoints`.
    config: its `keep_checkpoints` newest are kept, and the one with the best
      top-1 of those saved after an evaluation; `fall_back` lets a damaged one
      be passed over.
    say: called with a line about each damaged checkpoint.
    form: of the images that are trained on, see `Dataset`.
    read_only: changes nothing in the workdir, whose run may be in progress.
  """

  def __init__(
    self,
    workdir: os.PathLike | str,
    config: ConfigDict,
    say: Callable[[str], None],
    form: str = '',
    read_only: bool = False,
  ):
    self._folder = epath.Path(workdir) / FOLDER
    self._config, self._say, self._read_only = config, say, read_only
    self._form = form
    self._saving = None
    self._open()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if kind is None:
      self.wait()
      self._manager.close()
    else:
      with contextlib.suppress(Exception):
        self._manager.close()

  def _open(self) -> None:
    top1 = operator.itemgetter('top1')
    best = checkpoint_managers.BestN(
      get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False
    )
    newest = checkpoint_managers.LatestN(self._config.keep_checkpoints)
    folder = self._folder
    with _errors_as(f'checkpoints in {folder} can not be used'):
      self._manager = ocp.CheckpointManager(
        folder if '://' in str(folder) else folder.resolve(),
        # Without them a new manager can't read the metadata of a checkpoint.
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'check': ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          read_only=self._read_only,
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
    check = {
      'sha256': digest(tree),
      'step': step,
      'fields': run_fields(self._config),
      'order': order_of(self._config.data),
      'form': self._form,
    }
    with _errors_as(self._not_written()):
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(tree), check=ocp.args.JsonSave(check)
        ),
        metrics=None if evals is None else {'top1': evals['top1']},
      )
      if not saved:
        raise OSError('Orbax declined to save it')

  def wait(self) -> None:
    """Waits until all is written; raises RunError if that went wrong."""
    with _errors_as(self._not_written()):
      self._manager.wait_until_finished()

  def _not_written(self) -> str:
    try:
      steps = saved_steps(self._folder.parent)
    except OSError:  # The folder is gone.
      steps = []
    return (
      f'the checkpoint of step {self._saving} could not be written '
      f'(whole ones: {", ".join(map(str, steps)) or "none"})'
    )

  def restore_latest(
    self, like: TrainState
  ) -> tuple[int, TrainState] | tuple[None, None]:
    """The newest state that is whole, on every device, and its step.

    Checkpoints of scanned and of unrolled networks serve both: blocks are
    stacked or unstacked as `like` needs them. A damaged checkpoint is reported
    and, unless this is read-only, moved out of the way.

    Raises:
      InputError: the newest was made by another run, at another step, in
        another order of images, or on images in another form.
      RunError: the newest is damaged and there is none before it, or it may not
        be passed over; or it can't be read for now.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return step, self.restore(step, like)
      except Damaged as error:
        if self._read_only:  # Its run may have deleted it meanwhile.
          self._manager.reload()
          if self.steps() != steps:
            return self.restore_latest(like)
        before = [s for s in steps if s < step]
        if not before:
          raise RunError(f'{error}, and there is none before it') from None
        if not self._config.fall_back:
          raise RunError(
            f'{error}; --config.fall_back=True resumes from step {before[-1]}'
          ) from None
        self._say(f'{error}; resuming from step {before[-1]}')
        if not self._read_only:
          self._set_aside(step)
    return None, None

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`; see `restore_latest`.

    Raises:
      InputError: it was made by another run or network, at another step, in
        another order of images, or on images in another form.
      Damaged: it can be read, but not as it was written.
      RunError: it can't be read for now.
    """

    def attempt() -> tuple[TrainState, dict[str, Any]]:
      try:
        return self._restore(step, like)
      except InputError:
        raise
      except Exception as error:  # Orbax raises bare exceptions here.
        if trouble := of_system(error) or self._unreadable(step):
          name = f'checkpoint of step {step}'
          raise OSError(errno.EIO, trouble, name) from None
        raise Damaged(step, reason(error)) from None

    try:
      state, check = retry(attempt, say=self._say)
    except Damaged:  # Or it was trouble that passed before a reason was found.
      state, check = retry(attempt, say=self._say)
    path, accept = self._folder / str(step), self._config.accept_changes
    check_origin(path, check, self._folder.parent, accept)
    if not self._read_only:  # Else no step follows.
      check_order(path, check, order_of(self._config.data), accept)
      check_form(path, check, self._form, accept)
    return replicate(state)

  def _restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    wanted = serialization.to_state_dict(like)
    saved = self._manager.item_metadata(step)['state']
    if saved is None:
      raise ValueError('the list of its arrays is missing')
    convert = dict
    if _is_stacked(saved) and not _is_stacked(wanted):
      wanted, convert = jax.eval_shape(stack_blocks, wanted), unstack_blocks
    elif _is_stacked(wanted) and not _is_stacked(saved):
      wanted, convert = jax.eval_shape(unstack_blocks, wanted), stack_blocks
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
    tree, check = restored['state'], restored['check']
    if digest(tree) != check['sha256']:
      raise ValueError('its arrays are not those that were saved')
    state: Any = serialization.from_state_dict(like, convert(tree))
    return state, check

  def _unreadable(self, step: int) -> str | None:
    """Why the files of a checkpoint can't be read; None if they can."""
    try:
      for path in _files(self._folder / str(step)):
        with path.open('rb') as file:
          while file.read(2**24):
            pass
    except FileNotFoundError:
      return None
    except Exception as error:
      return reason(error)
    return None

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    aside = self._folder.parent / f'damaged-checkpoint-{step}'
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      (self._folder / str(step)).rename(aside)
    wait_for_all(f'{aside.name} is set aside')
    self._open()


class Damaged(RunError):
  """A checkpoint that can be read, but not as it was written."""

  def __init__(self, step: int, flaw: str):
    super().__init__(f'checkpoint of step {step} is damaged ({flaw})')


def saved_steps(workdir: os.PathLike | str) -> list[int]:
  """The steps whose states a run has kept, in order."""
  folder = epath.Path(workdir) / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def digest(tree: Any) -> str:
  """SHA-256 over the names, types, shapes and bytes of all leaves."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    total.update(f'{name} {leaf.dtype} {leaf.shape} '.encode())
    total.update(np.ascontiguousarray(leaf).data)
  return total.hexdigest()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shape of each array by its name, such as 'params/stem/kernel'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in leaves
    if hasattr(leaf, 'shape')
  }


def _is_stacked(tree: Any) -> bool:
  return any(STACKED in name.split('/') for name in _shapes(tree))


def _check_shapes(saved: Any, wanted: Any) -> None:
  """Raises InputError if a checkpoint is of another network."""
  there, here = _shapes(saved), _shapes(wanted)
  for name in {**here, **there}:
    if there.get(name) != here.get(name):
      raise InputError(
        f'the checkpoint is of another network: {name} is '
        f'{there.get(name, "missing")} there, {here.get(name, "missing")} here'
      )


@contextlib.contextmanager
def _errors_as(what: str) -> Iterator[None]:
  """Turns what Orbax and the file system raise into a RunError of one line."""
  try:
    yield
  except RunError:
    raise
  except Exception as error:
    raise RunError(f'{what}: {reason(error)}') from None


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path

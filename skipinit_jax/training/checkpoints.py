"""Saving and restoring the training state with Orbax."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import DamagedFile, dumps, retry
from skipinit_jax.models.stages import STACKED, stack_blocks, unstack_blocks
from skipinit_jax.training.changes import FREE, read_config
from skipinit_jax.training.devices import replicate
from skipinit_jax.training.step import TrainState

FOLDER = 'checkpoints'
# Errors that tell of what is in a folder, not of trouble with reading it.
CONTENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Checkpoints:
  """The checkpoints of a run, by number of steps made.

  A checkpoint is written in the background and gets its name when it is whole,
  so that a save that was cut off leaves the earlier ones as they are. Orbax
  keeps no checksum of arrays: a digest is saved beside them and compared.

  A read that fails for a reason of the system (a network disk that does not
  answer) is tried again, and then ends the run; it says nothing about the
  checkpoint. One is damaged if it can be read, but not as it was written.

  Args:
    workdir: of the run; they lie in its folder `checkpoints`.
    config: its `keep_checkpoints` newest are kept, and the one with the best
      top-1 of those saved after an evaluation; `fall_back` lets a damaged one
      be passed over.
    say: called with a line about each damaged checkpoint.
    read_only: changes nothing in the workdir, whose run may be going on.
  """

  def __init__(
    self,
    workdir: os.PathLike,
    config: ConfigDict,
    say: Callable[[str], None],
    read_only: bool = False,
  ):
    self._folder = epath.Path(workdir) / FOLDER
    self._config, self._say, self._read_only = config, say, read_only
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
    folder = self._folder
    with _reasons(f'checkpoints in {folder} can not be used'):
      self._manager = ocp.CheckpointManager(
        folder if '://' in str(folder) else folder.resolve(),
        # Without them a fresh manager tells nothing of what was saved.
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
    fields = run_fields(self._config.to_dict())
    with _reasons(self._not_written()):
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(tree),
          check=ocp.args.JsonSave(
            {
              'sha256': digest(tree),
              'step': step,
              'run': run_hash(fields),
              'fields': fields,
            }
          ),
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
    and, unless this is read-only, moved out of the way.

    Raises:
      InputError: the newest was made by another run, or at another step.
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
            f'{error}; --config.fall_back=True goes on from step {before[-1]}'
          ) from None
        self._say(f'{error}; going on from step {before[-1]}')
        if not self._read_only:
          self._set_aside(step)
    return None, None

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`; see `restore_latest`.

    Raises:
      InputError: it was made by another run or network, or at another step.
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
        raise Damaged(step, _first_line(error)) from None

    try:
      state, check = retry(attempt, say=self._say)
    except Damaged:  # Or it was trouble that passed before a reason was found.
      state, check = retry(attempt, say=self._say)
    self._check_origin(step, check)
    return replicate(state)

  def _restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    wanted = serialization.to_state_dict(like)
    saved = self._manager.item_metadata(step)['state']
    if saved is None:
      raise ValueError('the list of its arrays is missing')
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
    tree, check = restored['state'], restored['check']
    if digest(tree) != check['sha256']:
      raise ValueError('its arrays are not those that were saved')
    return serialization.from_state_dict(like, convert(tree)), check

  def _check_origin(self, step: int, check: Mapping[str, Any]) -> None:
    """Raises InputError for a checkpoint of another step or run."""
    path = self._folder / str(step)
    if check.get('step', step) != step:  # Older ones do not have it.
      raise InputError(
        f'{path} holds the state after step {check["step"]}: it was renamed; '
        'name it by its step, or move it away'
      )
    try:  # Of the run that is there, whatever this one is.
      ours, changes = read_config(self._folder.parent)
    except DamagedFile:
      return
    # Values that fields of this run once had.
    before = [(change['field'], change['old']) for change in changes]
    ours = run_fields(ours or {})
    if not ours or check.get('run') in (None, run_hash(ours)):
      return
    theirs = run_fields(check['fields'])
    changed = [
      f'{name}={theirs.get(name)!r} there, {ours.get(name)!r} here'
      for name in {**theirs, **ours}
      if theirs.get(name) != ours.get(name)
      and (name, theirs.get(name)) not in before
    ]
    if changed and not self._config.accept_changes:
      more = f'; and {len(changed) - 2} more' if len(changed) > 2 else ''
      raise InputError(
        f'{path} is of another run ({"; ".join(changed[:2])}{more}); move it '
        'away, or take it with --config.accept_changes=True'
      )

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
      return _first_line(error)
    return None

  def wait(self) -> None:
    """Waits until all is written; raises RunError if that went wrong."""
    with _reasons(self._not_written()):
      self._manager.wait_until_finished()

  def _not_written(self) -> str:
    good = 'none'
    with contextlib.suppress(OSError):  # The folder is gone.
      names = [p.name for p in self._folder.iterdir() if p.name.isdecimal()]
      good = ', '.join(sorted(names, key=int)) or 'none'
    return (
      f'the checkpoint of step {self._saving} could not be written '
      f'(whole ones: {good})'
    )

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    aside = self._folder.parent / f'damaged-checkpoint-{step}'
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      (self._folder / str(step)).rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'{aside.name} is set aside')
    self._open()


def saved_steps(workdir: os.PathLike | str) -> list[int]:
  """The steps whose states a run has kept, in order."""
  folder = epath.Path(workdir) / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


class Damaged(RunError):
  """A checkpoint that can be read, but not as it was written."""

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


def run_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a config that make its run, by dotted name, as in JSON."""
  fields = flatten_dict(json.loads(dumps(config)), sep='.')
  return {
    name: value
    for name, value in fields.items()
    if name not in FREE and value is not None
  }


def run_hash(fields: Mapping[str, Any]) -> str:
  """SHA-256 over the fields that make a run."""
  text = dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def of_system(error: BaseException | None) -> str | None:
  """The system's reason for an error, or for what it came from; else None.

  What is missing or of the wrong kind is a matter of content, not of trouble.
  """
  seen = []
  while error is not None and error not in seen:
    seen.append(error)
    if isinstance(error, TimeoutError | ConnectionError):
      return _first_line(error)
    if isinstance(error, OSError) and error.errno not in CONTENT:
      return _first_line(error)
    found = re.search(r"([^:]+) \[os_error_code='(\d+)'", str(error))
    if found and int(found[2]) not in CONTENT:
      return found[1].strip()
    error = error.__cause__ or error.__context__
  return None


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


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

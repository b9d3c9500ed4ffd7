"""Saving and restoring the training state with Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization

from skipinit_jax.models.stages import STACKED, stack_blocks, unstack_blocks
from skipinit_jax.training.devices import replicate
from skipinit_jax.training.step import TrainState


class Checkpoints:
  """The checkpoints of a run, by number of steps made.

  Args:
    workdir: of the run; they lie in its folder `checkpoints`.
    keep: number of newest checkpoints to keep.
  """

  def __init__(self, workdir: Path, keep: int = 2):
    self._manager = ocp.CheckpointManager(
      (workdir / 'checkpoints').absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )

  def latest_step(self) -> int | None:
    """The newest step that was saved, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState) -> None:
    """Starts to save; returns before it is written. A step is saved once."""
    if step != self.latest_step():
      tree = serialization.to_state_dict(state)
      saved = self._manager.save(step, args=ocp.args.StandardSave(tree))
      if not saved:
        raise RuntimeError(f'checkpoint of step {step} was not saved')

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, on every device.

    Checkpoints of scanned and of unrolled networks serve both: blocks are
    stacked or unstacked as `like` needs them.
    """
    wanted = serialization.to_state_dict(like)
    saved = self._manager.item_metadata(step)
    if _has_stacked(saved) and not _has_stacked(wanted):
      abstract, convert = _abstract(stack_blocks, wanted), unstack_blocks
    elif _has_stacked(wanted) and not _has_stacked(saved):
      abstract, convert = _abstract(unstack_blocks, wanted), stack_blocks
    else:
      abstract, convert = _abstract(dict, wanted), dict
    tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    return replicate(serialization.from_state_dict(like, convert(tree)))

  def close(self) -> None:
    """Waits until all is written; raises what went wrong in writing."""
    self._manager.wait_until_finished()
    self._manager.close()


def _has_stacked(tree: Any) -> bool:
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return any(f"'{STACKED}'" in jax.tree_util.keystr(path) for path, _ in paths)


def _abstract(convert, tree):
  shapes = jax.eval_shape(convert, tree)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
  )

"""Which run a checkpoint is of."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from skipinit_jax.errors import InputError
from skipinit_jax.files import DamagedFile, dumps
from skipinit_jax.training.changes import (
  FREE,
  describe_changes,
  differences,
  read_config,
)


def run_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a config that make its run, by dotted name, as in JSON."""
  fields = flatten_dict(json.loads(dumps(config)), sep='.')
  return {
    name: value
    for name, value in fields.items()
    if name not in FREE and value is not None
  }


def check_origin(
  path: epath.Path,
  saved: Mapping[str, Any],
  workdir: os.PathLike | str,
  accept: bool,
) -> None:
  """Compares a checkpoint with its name, and with the run in its workdir.

  Args:
    path: of the checkpoint, named by its step.
    saved: the `step` and the `run_fields` that were saved with it as `fields`.
    workdir: of the run.
    accept: take the checkpoint of another run.

  Raises:
    InputError: it is of another step or run.
  """
  if saved.get('step', int(path.name)) != int(path.name):
    raise InputError(
      f'{path} holds the state after step {saved["step"]}: it was renamed; '
      'name it by its step, or move it away'
    )
  try:
    ours, changes = read_config(workdir)
  except DamagedFile:
    return
  if ours is None or accept or 'fields' not in saved:
    return
  # Values that fields of this run once had.
  before = [(change['field'], change['old']) for change in changes]
  changed = [
    change
    for change in differences(saved['fields'], ours)
    if (change['field'], change['old']) not in before
  ]
  if changed:
    raise InputError(
      f'{path} is of another run ({describe_changes(changed)}); move it away, '
      'or take it with --config.accept_changes=True'
    )

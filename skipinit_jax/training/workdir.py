"""The folder of a run: its config, and how that changed between its parts."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, unwritable
from skipinit_jax.files import DamagedFile, set_aside, write_json
from skipinit_jax.training.changes import (
  CHANGES,
  CONFIG,
  check_changes,
  describe_changes,
  differences,
  plain,
  read_config,
)
from skipinit_jax.training.checkpoints import saved_steps
from skipinit_jax.training.metrics import say
from skipinit_jax.training.processes import wait_for_all
from skipinit_jax.training.result import RESULT


def open_workdir(
  workdir: epath.Path, config: ConfigDict, total: int
) -> list[dict[str, Any]]:
  """Makes the folder and writes config.json, or compares the one in it.

  A damaged config.json is set aside. Changes that `accept_changes` allows are
  written later, by `record_changes`, once the state is restored.

  Args:
    workdir: of the run.
    config: of the run.
    total: steps of the whole run.

  Returns:
    All changes of the run's config so far, see `changes.differences`.

  Raises:
    InputError: the folder holds a run of another config, can't be used, or is
      not the same folder for all processes.
  """
  path = workdir / CONFIG
  ours = plain(config)
  try:
    theirs, changes = read_config(workdir)
    damage = None
  except ImportError as error:  # A bucket, and no package to reach it.
    raise InputError(f'--workdir={workdir}: {error}') from None
  except DamagedFile as error:
    theirs, changes, damage = None, [], error
  steps = saved_steps(workdir)
  new = [] if theirs is None else differences(theirs, ours)
  if new and not config.accept_changes:
    raise InputError(
      f'{workdir} holds the run of another config ({describe_changes(new)}); '
      'choose another --workdir, or --config.accept_changes=True'
    )
  if steps and steps[-1] > total:
    raise InputError(
      f'epochs={config.epochs:g} are {total} steps, but {workdir} has already '
      f'made {steps[-1]}'
    )
  if steps:
    check_changes(workdir, new, steps[-1], total)
  elif theirs is None and (workdir / RESULT).exists():
    raise InputError(
      f'{damage or f"{workdir} has no {CONFIG}"}; {RESULT} may be of another '
      'config, and there is no checkpoint; choose another --workdir'
    )
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if theirs is None:
        _report_missing_config(workdir, steps, damage)
      if not new:
        write_json(path, ours | ({CHANGES: changes} if changes else {}))
    except OSError as error:
      raise unwritable(workdir, error) from None
  wait_for_all('config.json is written')
  if jax.process_count() > 1 and not path.exists():
    raise InputError(
      f'process {jax.process_index()} does not see {path}, which process 0 '
      'has written: the workdir must be a folder that all hosts share'
    )
  return changes + new


def _report_missing_config(
  workdir: epath.Path, steps: Sequence[int], damage: DamagedFile | None
) -> None:
  """Sets aside what is of an unknown config, and says what is assumed."""
  found = f'{workdir} has no {CONFIG}'
  if damage:
    found = f'{damage}; moved to {set_aside(damage.path)}'
  if (workdir / RESULT).exists():
    found += f'; {RESULT} moved to {set_aside(workdir / RESULT)}'
  if steps:
    found += f'; assuming that step {steps[-1]:,} is of this config'
  if damage or steps:
    say(found)


def record_changes(
  workdir: epath.Path,
  config: ConfigDict,
  changes: Sequence[dict[str, Any]],
  step: int,
) -> None:
  """Writes the changes that take effect from `step`, which was restored."""
  if jax.process_index() > 0 or all(c['step'] <= step for c in changes):
    return
  since = [c | {'step': min(c['step'], step)} for c in changes]
  try:
    (workdir / RESULT).unlink(missing_ok=True)  # It is no longer the end.
    write_json(workdir / CONFIG, plain(config) | {CHANGES: since})
  except OSError as error:
    raise unwritable(workdir, error) from None
  for change in since:
    if change['step'] == step:
      field, old, new = (change[key] for key in ('field', 'old', 'new'))
      say(f'from step {step:,} on: {field}={new!r}, before {old!r}')

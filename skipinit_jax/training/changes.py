"""Fields that make a run: which may change, and whose a checkpoint is."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.files import DamagedFile, dumps, read_json
from skipinit_jax.training.config import default_config
from skipinit_jax.training.lines import is_number

CONFIG = 'config.json'
CHANGES = 'changes'  # In config.json, beside the fields.
# Fields that may differ when a run resumes: they don't change its numbers.
FREE = (
  'eval_batch_size',
  'checkpoint_every_steps',
  'keep_checkpoints',
  'compilation_cache',
  'allow_cpu',
  'diverged_status',
  'fall_back',
  'stuck_at_start_seconds',
  'stuck_after_seconds',
  'accept_changes',
  'data.dir',
  'data.workers',
  'data.bad_share',
  'profile_at',
  'profile_steps',
)
# Fields that came later, and the value that runs had before.
ADDED = {'optimizer.name': 'sgd', 'optimizer.clip_alpha': True}
# The other fields of the network and of the images define the run.
OF_MODEL = ('dropout', 'statistics_group', 'scan', 'remat')
OF_DATA = ('shift', 'flip', 'area', 'aspect', 'cutout', 'mixup', 'cutmix')
# Each of these that is set has a part in the training state.
PARTS = (
  'ema_decay',
  'optimizer.l2',
  'optimizer.clip_norm',
  'optimizer.adaptive_clip',
  'optimizer.reduced_rate',
)
RATE = ('optimizer.learning_rate', 'optimizer.reference_batch')
SHOWN = 2  # Fields named in an error, of those that differ.


def read_config(
  workdir: os.PathLike | str,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
  """The fields in a workdir's config.json (None: no file), and their changes.

  Raises:
    DamagedFile: it is not the config of a run.
    RunError: it can't be read.
  """
  path = epath.Path(workdir) / CONFIG
  fields = read_json(path)
  if fields is None:
    return None, []
  changes = fields.pop(CHANGES, [])
  if not _are_changes(changes) or not fields.keys() & default_config().keys():
    raise DamagedFile(path, 'it is not the config of a run')
  return fields, changes


def differences(
  theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """The fields that change the numbers of a run, but for those in FREE.

  Args:
    theirs: the config in the workdir, nested.
    ours: the config to resume with.

  Returns:
    For each field: `field`, `old`, `new` and `step`, the number of steps made
    before the change; infinity until a step is made with it.
  """
  theirs = ADDED | flatten_dict(theirs, sep='.')
  ours = flatten_dict(ours, sep='.')
  return [
    {
      'step': math.inf,
      'field': name,
      'old': theirs.get(name),
      'new': ours.get(name),
    }
    for name in {**theirs, **ours}
    if name not in FREE and theirs.get(name) != ours.get(name)
  ]


def check_changes(
  workdir: Any, changes: Iterable[Mapping[str, Any]], made: int, total: int
) -> None:
  """Raises InputError for a change that can no longer take effect.

  Args:
    workdir: of the run.
    changes: from `differences`.
    made: steps made and saved.
    total: steps of the whole run by the new config.
  """
  for change in changes:
    field, old, new = change['field'], change['old'], change['new']
    if not _can_change(field, old, new):
      why = 'steps were already made and saved with the other value'
    elif made == total and field != 'epochs':
      why = f'all {total} steps are made; give more epochs too'
    else:
      continue
    raise InputError(
      f'{workdir}: {_shown(change)}; this run can not change it: {why}, or '
      'choose another --workdir'
    )


def _can_change(field: str, old: Any, new: Any) -> bool:
  part, _, name = field.partition('.')
  if part == 'model':
    return name in OF_MODEL
  if part == 'data':
    return name in OF_DATA
  if field in PARTS:
    return bool(old) == bool(new)
  # Steps are counted in batches; each optimizer has a state of its own.
  return field not in ('batch_size', 'optimizer.name')


def describe_changes(changes: Sequence[Mapping[str, Any]]) -> str:
  """The first fields that differ, with both values."""
  more = len(changes) - SHOWN
  shown = '; '.join(map(_shown, changes[:SHOWN]))
  return shown + (f'; and {more} more' if more > 0 else '')


def changes_rate(changes: Iterable[Mapping[str, Any]], step: int) -> bool:
  """Whether the learning rate changed after the state of `step` was saved."""
  return any(c['field'] in RATE and c['step'] >= step for c in changes)


def plain(config: ConfigDict) -> dict[str, Any]:
  """The fields as JSON returns them."""
  return json.loads(dumps(config.to_dict()))


def run_fields(config: ConfigDict) -> dict[str, Any]:
  """The fields of a config that make its run, by dotted name, as in JSON."""
  fields = flatten_dict(plain(config), sep='.')
  return {k: v for k, v in fields.items() if k not in FREE and v is not None}


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


def check_order(
  path: epath.Path,
  saved: Mapping[str, Any],
  ours: Mapping[str, str],
  accept: bool,
) -> None:
  """Compares the order of images that a run was made in with the one here.

  Args:
    path: of the checkpoint.
    saved: what was saved with it; `order` is missing in older ones.
    ours: see `data.order.order_of`.
    accept: go on in the order that is drawn here.

  Raises:
    InputError: it is another one.
  """
  theirs = saved.get('order', ours)
  if theirs['digest'] != ours['digest'] and not accept:
    raise InputError(
      f'{path} is of a run in the order of images that {theirs["drawn_by"]} '
      f'drew, but {ours["drawn_by"]} draws another here; install those '
      'versions, or go on in the new order with --config.accept_changes=True'
    )


def check_form(
  path: epath.Path, saved: Mapping[str, Any], ours: str, accept: bool
) -> None:
  """Compares what was done to the images of a run with those here.

  `data.dir` may change when a run resumes, but not to other pixels unseen.

  Args:
    path: of the checkpoint.
    saved: what was saved with it; `form` is missing in older ones.
    ours: of the images here, see `Dataset`.
    accept: go on with them.

  Raises:
    InputError: it is something else.
  """
  theirs = saved.get('form', ours)
  if theirs != ours and not accept:
    raise InputError(
      f'{path} is of a run on {theirs or "original images"}, but data.dir '
      f"holds {ours or 'original images'} here; give that run's data.dir, or "
      'go on with these images with --config.accept_changes=True'
    )


def _are_changes(value: Any) -> bool:
  """Whether `value` is what `differences` returns."""
  return isinstance(value, list) and all(
    isinstance(change, dict)
    and change.keys() == {'step', 'field', 'old', 'new'}
    and is_number(change['step'])
    for change in value
  )


def _shown(change: Mapping[str, Any]) -> str:
  old, new = (_short(change[side]) for side in ('old', 'new'))
  return f'{change["field"][:30]}={old} there, {new} here'


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 20 else f'{text[:17]}...'

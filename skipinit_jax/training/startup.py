"""What happens before the first step."""

import functools
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from skipinit_jax import published
from skipinit_jax.errors import InputError, unwritable
from skipinit_jax.files import DamagedFile, set_aside
from skipinit_jax.models.parameters import count_parameters
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import unstack_blocks
from skipinit_jax.training.changes import (
  CHANGES,
  CONFIG,
  changes_rate,
  check_changes,
  describe_changes,
  differences,
  read_config,
)
from skipinit_jax.training.checkpoints import Checkpoints, saved_steps
from skipinit_jax.training.config import build_method, loops, peak_rate
from skipinit_jax.training.devices import replicate, shard, tell
from skipinit_jax.training.evaluate import blank
from skipinit_jax.training.lines import dumps, write_json
from skipinit_jax.training.program import Program
from skipinit_jax.training.step import TrainState, create_state
from skipinit_jax.training.timetable import Timetable

RESULT = 'result.json'
# Device files of accelerators, and what to install for each.
ACCELERATORS = {
  '/dev/nvidia[0-9]*': ('GPU', "pip install 'jax[cuda13]' (or 'jax[cuda12]')"),
  '/dev/accel[0-9]*': ('TPU', "pip install 'jax[tpu]'"),
}
LARGE_BATCH = 2048
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'


def set_deterministic(config: ConfigDict) -> None:
  """Asks XLA for the same bits from run to run; before JAX finds its devices.

  CPUs and TPUs give them anyway. On GPUs some sums are otherwise taken in the
  order in which they happen to finish.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if config.deterministic and DETERMINISTIC not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC}'


def check_devices(config: ConfigDict) -> None:
  """Raises InputError where the devices are not what the recipe needs."""
  asked = config.deterministic and jax.default_backend() == 'gpu'
  if asked and DETERMINISTIC not in os.environ.get('XLA_FLAGS', ''):
    raise InputError(
      f'deterministic=True on a GPU needs XLA_FLAGS={DETERMINISTIC} before JAX '
      'finds its devices'
    )
  if config.allow_cpu or jax.default_backend() != 'cpu':
    return
  for files, (kind, install) in ACCELERATORS.items():
    if glob.glob(files):
      raise InputError(
        f'this machine has a {kind}, but JAX sees only the CPU: {install}, '
        'or train on the CPU with --config.allow_cpu=True'
      )


def open_workdir(
  workdir: epath.Path, config: ConfigDict, total: int
) -> list[dict[str, Any]]:
  """Makes the folder and writes config.json, or checks the one that is there.

  A damaged config.json is set aside. Changes that `accept_changes` lets pass
  are written by `record_changes` only, when the run's state is there.

  Args:
    workdir: of the run.
    config: of the run.
    total: its steps.

  Returns:
    The changes of the run's fields until now, see `changes.differences`.

  Raises:
    InputError: the folder holds a run of another config, is not usable, or is
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
      f'epochs={config.epochs:g} are {total} steps, but {steps[-1]} are made '
      f'in {workdir}'
    )
  if steps:
    check_changes(workdir, new, steps[-1], total)
  elif theirs is None and (workdir / RESULT).exists():
    raise InputError(
      f'{damage or f"{workdir} has no {CONFIG}"}; nothing tells of which '
      f'config {RESULT} is, and there is no checkpoint; choose another '
      '--workdir'
    )
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if theirs is None:
        _doubt(workdir, steps, damage)
      if not new:
        write_json(path, ours | ({CHANGES: changes} if changes else {}))
    except OSError as error:
      raise unwritable(workdir, error) from None
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('config.json is written')
    if not path.exists():
      raise InputError(
        f'process {jax.process_index()} does not see {path}, which process 0 '
        'has written: the workdir must be a folder that all hosts share'
      )
  return changes + new


def _doubt(
  workdir: epath.Path, steps: Sequence[int], damage: DamagedFile | None
) -> None:
  """Says what can't be known where no config.json tells whose a run is."""
  found = damage or f'{workdir} has no {CONFIG}'
  if damage:
    found = f'{damage}; moved to {set_aside(damage.path)}'
  if (workdir / RESULT).exists():
    found += f'; {RESULT} moved to {set_aside(workdir / RESULT)}'
  if steps:
    found += f'; taking step {steps[-1]:,} there for one of this config'
  if damage or steps:
    say(found)


def record_changes(
  workdir: epath.Path,
  config: ConfigDict,
  changes: Sequence[dict[str, Any]],
  step: int,
) -> None:
  """Writes what has changed from `step` on, the step that was restored."""
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


def plain(config: ConfigDict) -> dict[str, Any]:
  """The fields as they come back from JSON."""
  return json.loads(dumps(config.to_dict()))


def set_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder, unless JAX was given one already."""
  if folder and jax.config.jax_compilation_cache_dir is None:
    path = str(Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def restore_or_create(
  program: Program,
  config: ConfigDict,
  data: Any,
  checkpoints: Checkpoints,
  changes: Sequence[dict[str, Any]] = (),
) -> tuple[int, TrainState]:
  """The newest saved state and its step, or the one before the first step.

  Seed and learning rate are part of the state. The seed is the config's; so is
  the rate where it was changed since, whatever divergences had made of it.
  """
  create = functools.partial(initial_state, program, config, data)
  start = np.uint32(config.seed), np.float32(peak_rate(config))
  like = jax.eval_shape(create, *start)
  step, state = checkpoints.restore_latest(like)
  if state is not None:
    state = state.replace(seed=replicate(start[0]))
    if changes_rate(changes, step):
      state = state.replace(rate=replicate(start[1]))
    return step, state
  # The program runs once; optimizing it takes longer than running it.
  options = {}
  if jax.default_backend() == 'cpu':
    options = {'xla_backend_optimization_level': 0}
  return 0, replicate(jax.jit(create, compiler_options=options)(*start))


def initial_state(
  program: Program,
  config: ConfigDict,
  data: Any,
  seed: jax.typing.ArrayLike,
  rate: jax.typing.ArrayLike,
) -> TrainState:
  """The state before the first step; pure, for `jax.jit`."""
  return create_state(
    init_variables(program.model, data.image_shape, seed),
    program.tx,
    rate=rate,
    seed=seed,
    ema=config.ema_decay is not None,
  )


def init_variables(
  model: ResNet, image_shape: tuple[int, int, int], seed: jax.typing.ArrayLike
) -> dict[str, Any]:
  """The model's variables at the start, from `seed` alone.

  They are drawn for the scanned form, whose program is small whatever the
  depth, and unstacked if the model is not scanned: both forms start alike.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  images = jnp.zeros((1, *image_shape))
  scanned = model.clone(scan=True, axis_name=None)
  variables = scanned.init(key, images, train=False)
  return variables if model.scan else unstack_blocks(variables)


def may_go_back(state: TrainState, config: ConfigDict) -> bool:
  """Whether a diverged run is to go on from its last checkpoint."""
  limit = config.divergence_factor ** (config.divergence_limit - 0.5)
  lowest = limit * peak_rate(config)
  return config.on_divergence == 'back' and state.rate > lowest


def go_back(
  state: TrainState,
  program: Program,
  config: ConfigDict,
  data: Any,
  checkpoints: Checkpoints,
) -> tuple[int, TrainState]:
  """The last saved state, with a smaller learning rate than `state`."""
  rate = np.float32(state.rate * config.divergence_factor)
  diverged = int(state.step)
  step, state = restore_or_create(program, config, data, checkpoints)
  say(
    f'diverged after step {diverged:,}; back to step {step:,} with the '
    f'peak learning rate at {rate:.4g}'
  )
  return step, state.replace(rate=replicate(rate))


def warm_up(
  program: Program, state: TrainState, config: ConfigDict, data: Any
) -> None:
  """Compiles the evaluation while a signal to stop finds nothing to save."""
  batch = shard(blank(config, data))
  sums = program.eval_step(state.params, state.batch_stats, *batch, tell())
  jax.block_until_ready(sums)


def say(line: str) -> None:
  """Prints a line to standard error, above a progress line if there is one."""
  tqdm.tqdm.write(line, file=sys.stderr)


def describe(
  config: ConfigDict,
  model: ResNet,
  data: Any,
  state: TrainState,
  times: Timetable,
  workdir: epath.Path,
) -> str:
  """The lines that a run starts with."""
  devices = jax.devices()
  method = build_method(config)
  name = config.model.method
  if method.alpha is not None:
    name += f' (alpha at {method.alpha_value(model.num_blocks):.4g})'
  counts = count_parameters(state.params)
  decay = config.optimizer.decay if config.optimizer.l2 else ()
  start = int(state.step)
  lines = [
    f'workdir: {workdir}',
    f'devices: {len(devices)} x {devices[0].device_kind} '
    f'({devices[0].platform}), {model.dtype} computation',
    f'data: {data.name}, {data.train_size:,} images to train on, '
    f'{data.eval_size:,} to evaluate on, {data.num_classes} classes',
    f'model: {config.model.name} of depth {config.model.depth}, '
    f'{model.num_blocks} residual blocks, {name}',
    'parameters: '
    + ', '.join(
      f'{label} {arrays} arrays of {elements:,}'
      + (' (decays)' if label in decay else '')
      for label, (arrays, elements) in counts.items()
    ),
    f'training: {times.total:,} steps of {config.batch_size} images, peak rate '
    f'{peak_rate(config):.4g}' + (f', from step {start:,}' if start else ''),
  ]
  if devices[0].platform == 'cpu' and (fields := loops(config)):
    lines.append(
      f'note: {", ".join(fields)}: on a CPU a convolution inside a loop is 10 '
      'to 40 times slower (jax issue 12868)'
    )
  if method.normalize:
    lines.append(f'batch statistics over: {_group(config)}')
  elif config.batch_size >= LARGE_BATCH:
    lines.append(_large_batch_warning(config))
  return '\n'.join(lines)


def _group(config: ConfigDict) -> str:
  group = config.model.statistics_group
  share = config.batch_size // jax.device_count()
  images = {'device': share, 'all': config.batch_size}.get(group, group)
  return f'{images} images ({group})' if group.isalpha() else f'{group} images'


def _large_batch_warning(config: ConfigDict) -> str:
  losses = ', '.join(
    f'{row} {points[256][0]} -> {points[4096][0]}'
    for row, points in published.IMAGENET.items()
  )
  return (
    f'note: batches of {config.batch_size} without normalization. Top-1 % on '
    f'ImageNet from batch 256 to 4096 (De & Smith 2020, table 3): {losses}'
  )

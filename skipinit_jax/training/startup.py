"""What happens before the first step."""

import glob
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from skipinit_jax import published
from skipinit_jax.data import Resident
from skipinit_jax.errors import InputError
from skipinit_jax.models.parameters import count_parameters
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import unstack_blocks
from skipinit_jax.training.config import build_method, peak_rate
from skipinit_jax.training.metrics import dumps
from skipinit_jax.training.step import TrainState

CONFIG = 'config.json'
# Device files of accelerators, and what to install for each.
ACCELERATORS = {
  '/dev/nvidia[0-9]*': ('GPU', "pip install 'jax[cuda13]' (or 'jax[cuda12]')"),
  '/dev/accel[0-9]*': ('TPU', "pip install 'jax[tpu]'"),
}
LARGE_BATCH = 2048


def check_devices(config: ConfigDict) -> None:
  """Raises InputError where an accelerator would be left idle unasked."""
  if config.allow_cpu or jax.default_backend() != 'cpu':
    return
  for files, (kind, install) in ACCELERATORS.items():
    if glob.glob(files):
      raise InputError(
        f'this machine has a {kind}, but JAX sees only the CPU: {install}, '
        'or train on the CPU with --config.allow_cpu=True'
      )


def open_workdir(workdir: Path, config: ConfigDict) -> None:
  """Makes the folder and writes config.json, or checks the one that is there.

  Raises:
    InputError: the folder holds a run of another config, or is not usable.
  """
  path = workdir / CONFIG
  ours = json.loads(dumps(config.to_dict()))
  if path.exists():
    theirs = flatten(json.loads(path.read_text()))
    changed = [
      f'{name}={theirs.get(name)!r} there, {value!r} here'
      for name, value in flatten(ours).items()
      if theirs.get(name) != value
    ]
    if changed:
      raise InputError(
        f'{workdir} holds the run of another config ({"; ".join(changed)}); '
        'choose another --workdir'
      )
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(ours, indent=2) + '\n')
  except OSError as error:
    raise InputError(f'can not write to {workdir}: {error.strerror}') from None


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one, with dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def set_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder, unless JAX was given one already."""
  if folder and jax.config.jax_compilation_cache_dir is None:
    path = str(Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def init_variables(
  model: ResNet, image_shape: tuple[int, int, int], seed: int
) -> dict[str, Any]:
  """The model's variables at the start, from `seed` alone.

  They are drawn for the scanned form, whose program is small whatever the
  depth, and unstacked if the model is not scanned: both forms start alike.
  """
  images = jnp.zeros((1, *image_shape))

  def init(key: jax.Array) -> dict[str, Any]:
    return model.clone(scan=True, axis_name=None).init(key, images, train=False)

  # The program runs once; optimizing it takes longer than running it.
  options = {}
  if jax.default_backend() == 'cpu':
    options = {'xla_backend_optimization_level': 0}
  key = jax.random.fold_in(jax.random.key(seed), 0)
  variables = jax.jit(init, compiler_options=options)(key)
  return variables if model.scan else unstack_blocks(variables)


def describe(
  config: ConfigDict,
  model: ResNet,
  data: Resident,
  state: TrainState,
  total: int,
) -> str:
  """The lines that a run starts with."""
  devices = jax.local_devices()
  method = build_method(config)
  name = config.model.method
  if method.alpha is not None:
    name += f' (alpha at {method.alpha_value(model.num_blocks):.4g})'
  counts = count_parameters(state.params)
  decay = config.optimizer.decay if config.optimizer.l2 else ()
  start = int(state.step)
  lines = [
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
    f'training: {total:,} steps of {config.batch_size} images, peak rate '
    f'{peak_rate(config):.4g}' + (f', from step {start:,}' if start else ''),
  ]
  if method.normalize:
    lines.append(f'batch statistics over: {_group(config)}')
  elif config.batch_size >= LARGE_BATCH:
    lines.append(_large_batch_warning(config))
  return '\n'.join(lines)


def _group(config: ConfigDict) -> str:
  group = config.model.statistics_group
  share = config.batch_size // jax.local_device_count()
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

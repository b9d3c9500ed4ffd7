"""What an analysis looks at: a network at its start, or that of a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError
from skipinit_jax.training import train
from skipinit_jax.training.checkpoints import FOLDER, Checkpoints
from skipinit_jax.training.config import build_model, default_config, peak_rate
from skipinit_jax.training.program import make_program
from skipinit_jax.training.startup import CONFIG, init_variables, initial_state


class Network(NamedTuple):
  """A network with its variables and some images that it is evaluated on.

  Attributes:
    model, variables: as `model.apply` takes them.
    images: float32 (n, height, width, channels), normalized.
    labels: int32 (n,).
  """

  model: nn.Module
  variables: dict[str, Any]
  images: jax.Array
  labels: np.ndarray


def at_start(config: ConfigDict, images: int = 360) -> Network:
  """A recipe's network at initialization.

  Raises:
    InputError: a network that can't be, or its data is missing.
  """
  data = open_dataset(config.data)
  # Looked at on one device: there is no axis to average statistics over.
  model = build_model(config, data.num_classes).clone(axis_name=None)
  variables = init_variables(model, data.image_shape, config.seed)
  return Network(model, variables, *_some_images(data, images))


def of_run(workdir: Path, images: int = 360) -> Network:
  """The network of a run's newest checkpoint.

  Raises:
    InputError: the folder holds no run, or no checkpoint.
  """
  config = config_of(workdir)
  if not (workdir / FOLDER).is_dir():
    raise InputError(f'{workdir} holds no checkpoint')
  data = open_dataset(config.data)
  program = make_program(config, data)
  rate = np.float32(peak_rate(config))
  like = jax.eval_shape(
    lambda: initial_state(program, config, data, np.uint32(config.seed), rate)
  )
  with Checkpoints(workdir, config, print) as checkpoints:
    _, state = checkpoints.restore_latest(like)
  if state is None:
    raise InputError(f'{workdir} holds no checkpoint')
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  variables = jax.tree.map(jax.numpy.asarray, jax.device_get(variables))
  model = program.model.clone(axis_name=None)
  return Network(model, variables, *_some_images(data, images))


def config_of(workdir: Path) -> ConfigDict:
  """The config that a run was started with; InputError if there is none."""
  try:
    fields = json.loads((workdir / CONFIG).read_text())
  except (OSError, ValueError):
    raise InputError(f'{workdir} holds no run: {CONFIG} is missing') from None
  config = default_config()
  with config.unlocked():
    config.update(fields)
  return config


def trained(config: ConfigDict, workdir: Path, images: int = 360) -> Network:
  """A recipe's network after training, in a folder where that goes on."""
  train(config, workdir)
  return of_run(workdir, images)


def _some_images(data: Any, number: int) -> Iterator[Any]:
  """The first images to evaluate on, normalized, and their labels."""
  batch, labels, mask = next(iter(data.eval_batches(number)))
  seen = int(mask.sum())
  yield data.augmentation.normalize(batch[:seen])
  yield labels[:seen]

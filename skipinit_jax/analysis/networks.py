"""The networks that are analyzed: at initialization, trained, or of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.data.dataset import Dataset
from skipinit_jax.training import train
from skipinit_jax.training.network import build_model, init_variables
from skipinit_jax.training.recipes import set_fields
from skipinit_jax.training.saved import Saved, load_run


class Network(NamedTuple):
  """A network with its variables and some images that it is evaluated on.

  Attributes:
    model, variables: as `model.apply` takes them.
    images: float32 (n, height, width, channels), normalized.
    labels: int32 (n,).
  """

  model: nn.Module
  variables: Mapping[str, Any]
  images: jax.Array
  labels: np.ndarray


def at_start(config: ConfigDict, images: int = 360) -> Network:
  """A recipe's network at initialization.

  Raises:
    InputError: a network that can't be, or its data is missing.
  """
  data = open_dataset(config.data)
  # On one device there is no axis to average statistics over.
  model = build_model(config, data.num_classes).clone(axis_name=None)
  variables = init_variables(model, data.image_shape, config.seed)
  return Network(model, variables, *_eval_images(data, images))


def draws_at_start(
  config: ConfigDict, images: int, draws: int
) -> list[Network]:
  """`at_start` with the recipe's seed and the ones after it."""
  seeds = range(config.seed, config.seed + draws)
  copy = config.copy_and_resolve_references
  return [at_start(set_fields(copy(), {'seed': s}), images) for s in seeds]


def of_run(run: Saved, images: int = 360) -> Network:
  """The network of a checkpoint."""
  return Network(run.model, run.variables, *_eval_images(run.data, images))


def trained(config: ConfigDict, workdir: Path, images: int = 360) -> Network:
  """A recipe's network after training in a folder, where a run resumes."""
  train(config, workdir)
  return of_run(load_run(workdir), images)


def _eval_images(data: Dataset, number: int) -> tuple[jax.Array, np.ndarray]:
  """The first images to evaluate on, normalized, and their labels."""
  batch: Any = next(iter(data.eval_batches(number)))
  images, labels, mask = batch
  n = int(mask.sum())
  return data.augmentation.normalize(images[:n]), labels[:n]

"""The config and the network of a run, read from its workdir."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.data.dataset import Dataset
from skipinit_jax.errors import InputError, reason
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.pretrained import cards, load_pretrained
from skipinit_jax.training.changes import CONFIG, read_config
from skipinit_jax.training.checkpoints import FOLDER, saved_steps
from skipinit_jax.training.config import default_config
from skipinit_jax.training.program import make_program
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.resume import restore_saved


@dataclasses.dataclass(frozen=True)
class Saved:
  """A network as a run saved it.

  Attributes:
    config: of the run.
    data: the data set it was trained on.
    model: without an axis name: it runs on one device.
    step: steps made.
    variables: {'params': ..., 'batch_stats': ...}, float32 arrays.
    averages: moving averages of the variables, or None.
  """

  config: ConfigDict
  data: Dataset
  model: ResNet
  step: int
  variables: dict[str, Any]
  averages: dict[str, Any] | None


def config_of(workdir: os.PathLike | str) -> ConfigDict:
  """The config that a run was last started or resumed with.

  Raises:
    InputError: there is none, or this version can't use it.
    RunError: it is damaged.
  """
  fields, _ = read_config(workdir)
  if fields is None:
    raise InputError(f'{workdir} holds no run: {CONFIG} is missing')
  config = default_config()
  try:
    with config.unlocked():  # Data sets have fields of their own.
      config.update(fields)
  except (AttributeError, TypeError, ValueError) as error:
    raise InputError(
      f'{workdir}/{CONFIG} is no config of a run: {reason(error)}'
    ) from None
  return config


def find_checkpoint(
  checkpoint: os.PathLike | str,
) -> tuple[ConfigDict, epath.Path, int | None]:
  """The config, the folder, and the step of a checkpoint; None: the newest.

  Args:
    checkpoint: the folder of a run, or one of its `checkpoints/STEP`.

  Raises:
    InputError: the folder holds no run, or no such checkpoint.
  """
  if not os.fspath(checkpoint).strip():
    raise InputError(f'checkpoint={os.fspath(checkpoint)!r}: expected a run')
  try:
    workdir, step = epath.Path(os.path.expanduser(checkpoint)), None
  except KeyError as error:
    raise InputError(
      f'checkpoint={checkpoint}: unknown kind of address {error}'
    ) from None
  if workdir.parent.name == FOLDER and workdir.name.isdecimal():
    workdir, step = workdir.parent.parent, int(workdir.name)
  try:
    config, steps = config_of(workdir), saved_steps(workdir)
  except InputError as error:
    raise InputError(f'checkpoint={checkpoint}: {error}') from None
  if not steps or step not in (None, *steps):
    there = ', '.join(map(str, steps)) or 'none'
    raise InputError(
      f'checkpoint={checkpoint} holds no checkpoint; steps saved: {there}'
    )
  return config, workdir, step


def is_pretrained(checkpoint: os.PathLike | str | None) -> bool:
  """Whether it is the name of a network in the package, and of no folder."""
  if checkpoint is None or os.path.exists(checkpoint):
    return False
  return checkpoint in cards()


def load_run(checkpoint: os.PathLike | str) -> Saved:
  """Loads the network of a checkpoint, or one that comes with the package.

  Args:
    checkpoint: the folder of a run, for its newest checkpoint, or one of the
      run's folders `checkpoints/STEP`; or a name that `load_pretrained` knows,
      unless there is a folder of that name.

  Raises:
    InputError: the folder holds no run, or no such checkpoint; or the config in
      it is of another network, or the checkpoint of another run.
    RunError: the checkpoint is damaged, or can't be read at present.
  """
  if is_pretrained(checkpoint):
    return _pretrained(os.fspath(checkpoint))
  config, workdir, step = find_checkpoint(checkpoint)
  data = open_dataset(config.data)
  program = make_program(config, data)
  step, state = restore_saved(program, workdir, step)
  local = jax.tree.map(jnp.asarray, jax.device_get(state))
  return Saved(
    config,
    data,
    program.model.clone(axis_name=None),
    step,
    variables={'params': local.params, 'batch_stats': local.batch_stats},
    averages=local.ema,
  )


def _pretrained(name: str) -> Saved:
  """A network that comes with the package, as its run would be loaded."""
  network = load_pretrained(name)
  config = set_fields(
    load_recipe(network.card['recipe']), network.card['fields']
  )
  return Saved(
    config,
    open_dataset(config.data),
    network.model,
    network.card['run']['steps'],
    jax.tree.map(jnp.asarray, network.variables),
    averages=None,
  )

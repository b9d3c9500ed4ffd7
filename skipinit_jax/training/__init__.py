"""Training: `train(config, workdir)` and the fields of a recipe."""

from skipinit_jax.errors import not_installed

try:
  from skipinit_jax.training.config import default_config as default_config
  from skipinit_jax.training.loop import train as train
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    not_installed(str(error.name)), name=error.name
  ) from None

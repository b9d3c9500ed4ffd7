"""Training: `train(config, workdir)` and the fields of a recipe."""

try:
  from skipinit_jax.training.config import default_config as default_config
  from skipinit_jax.training.loop import train as train
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    f"{error.name} is not installed: pip install 'skipinit-jax[train]'",
    name=error.name,
  ) from None

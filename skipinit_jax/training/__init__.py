"""Training: `train(config, workdir)` and the fields of a recipe."""

from skipinit_jax.training.config import default_config as default_config
from skipinit_jax.training.loop import train as train

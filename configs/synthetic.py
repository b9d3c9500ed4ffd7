"""Random images of any shape, for smoke tests and benchmarks; learns nothing.

  python train.py --config=configs/synthetic.py --config.data.height=32

Machine and time: not measured. Result: chance.
"""

from ml_collections import ConfigDict

from skipinit_jax.training.config import default_config


def get_config() -> ConfigDict:
  config = default_config()
  config.batch_size = 16
  config.eval_batch_size = 32
  config.epochs = 1.0
  config.log_every_steps = 2
  config.allow_cpu = True

  config.model.depth = 16
  config.model.width = 1
  config.model.statistics_group = 'device'

  config.data.name = 'synthetic'
  config.data.height = 8
  config.data.width = 8
  config.data.channels = 3
  config.data.num_classes = 10
  config.data.train_size = 64
  config.data.eval_size = 40

  config.schedule.name = 'constant'
  return config

"""A Wide-ResNet on CIFAR-100, with the values of cifar10.py and a width of 4.

  python -m skipinit_jax.data prepare cifar100 --data-dir ~/tensorflow_datasets
  python train.py --config=configs/cifar100.py

Machine, time and result: not measured. De & Smith 2020 publish no accuracy on
CIFAR-100: what cifar10.py does not take from them is our choice.
"""

from ml_collections import ConfigDict

from skipinit_jax.training.config import default_config


def get_config() -> ConfigDict:
  config = default_config()
  config.batch_size = 128
  config.eval_batch_size = 1000
  config.epochs = 200.0

  config.model.depth = 16
  config.model.width = 4
  config.model.method = 'skipinit'
  config.model.statistics_group = '64'

  config.data.name = 'cifar100'
  config.data.dir = '~/tensorflow_datasets'
  config.data.shift = 4
  config.data.flip = True

  config.optimizer.learning_rate = 2.0**-2
  config.optimizer.l2 = 5e-4
  config.schedule.name = 'halving'
  config.schedule.hold_epochs = 100.0
  config.schedule.every_epochs = 10.0
  return config

"""A Wide-ResNet on CIFAR-10, as in De & Smith 2020, tables 1 and 2.

  python -m skipinit_jax.data prepare cifar10 --data-dir ~/tensorflow_datasets
  python train.py --config=configs/cifar10.py \
    --config.model.depth=100 --config.optimizer.learning_rate=0.25

Machine, time and result: not measured. Published accuracies and optimal rates,
by depth: DEPTH and ABLATIONS in skipinit_jax/published.py.

Not read in the paper itself, but as commonly cited: momentum 0.9, L2 5e-4, the
rate held for 100 epochs and then halved every 10, pad-and-crop and flip, ghost
batches of 64. Our choices: batch 128, L2 on kernels only.
"""

from ml_collections import ConfigDict

from skipinit_jax.training.config import default_config


def get_config() -> ConfigDict:
  config = default_config()
  config.batch_size = 128
  config.eval_batch_size = 1000
  config.epochs = 200.0

  config.model.depth = 16
  config.model.width = 2
  config.model.method = 'skipinit'
  config.model.statistics_group = '64'

  config.data.name = 'cifar10'
  config.data.dir = '~/tensorflow_datasets'
  config.data.shift = 4
  config.data.flip = True

  config.optimizer.learning_rate = 2.0**-2
  config.optimizer.l2 = 5e-4
  config.schedule.name = 'halving'
  config.schedule.hold_epochs = 100.0
  config.schedule.every_epochs = 10.0
  return config

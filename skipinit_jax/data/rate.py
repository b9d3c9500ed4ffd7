"""How many images a second this host makes, and how many chips would take."""

import contextlib
import dataclasses
import math
import os
import time

from ml_collections import ConfigDict
from tqdm import tqdm

from skipinit_jax.data import open_dataset
from skipinit_jax.data.fields import FIELDS, FILES
from skipinit_jax.data.stream import Stream
from skipinit_jax.errors import InputError

ROWS = 32  # Of a batch: an image costs as much in a larger one.
# Of what is made ahead in the first seconds, nothing counts.
WARM_UP, SECONDS = 4.0, 12.0


def open_files(config: ConfigDict, folder: str) -> Stream:
  """Opens the data set of a recipe in `folder`, however many images it has.

  Raises:
    InputError: the recipe's images are not in files; or see `open_stream`.
  """
  name = config.data.name
  if FIELDS.get(name) is not FILES:
    files = [each for each, fields in FIELDS.items() if fields is FILES]
    raise InputError(
      f'data.name={name!r} is kept on the device, so that training reads '
      f'nothing; expected a recipe of {", ".join(files)}'
    )
  # A part of the set serves as well.
  config.data.update({'dir': folder, 'train_size': 0, 'eval_size': 0})
  data = open_dataset(config.data)
  assert isinstance(data, Stream)
  return data


def measure(data: Stream, workers: int) -> float:
  """Images a second of what training reads, over `SECONDS`; shows progress.

  Args:
    data: its training images are read, decoded and cropped.
    workers: processes, as `data.workers`.
  """
  config = ConfigDict({**data.config, 'workers': workers})
  run = ConfigDict({'batch_size': ROWS, 'seed': 0})
  batches = dataclasses.replace(data, config=config).read(run, 0)
  what = f'{workers} workers' if workers else 'threads'
  with contextlib.closing(batches), tqdm(desc=what, unit='image') as progress:
    next(batches)  # The workers have started.
    began, images = time.perf_counter(), 0
    start = None  # When counting began.
    for _ in batches:
      progress.update(ROWS)
      now = time.perf_counter()
      if start is not None:
        images += ROWS
        if now - start >= SECONDS:
          return images / (now - start)
      elif now - began >= WARM_UP:
        start = now
  raise AssertionError('the batches of a Stream never end')


def usual_workers() -> list[int]:
  """1, 2, 4 and so on, up to the number of cores."""
  return [2**i for i in range((os.cpu_count() or 1).bit_length())]


def verdict(rate: float, bound: float, topology: str, hosts: int) -> str:
  """One sentence: which waits for which, and how many hosts it would take.

  Args:
    rate: images a second that this host makes.
    bound: that all chips can take, at most.
    topology: their name.
    hosts: that these chips have.
  """
  needed = math.ceil(bound / rate)
  have = f'{topology} has {hosts}'
  like = f'{needed:,} host{"s" * (needed > 1)} like this one'
  if needed > hosts:
    return (
      f'chips at that bound would wait for images: it takes the CPUs of {like} '
      f'to make as many, and {have}'
    )
  return (
    f'the images will wait for the chips: the CPUs of {like} make as many as '
    f'the bound, and {have}'
  )

"""How fast JPEGs become training batches, beside other ways.

  python benchmarks/input_pipeline.py --out=docs/input_pipeline

Images of ImageNet's size (500x375, about 110 KB; noise with the spectrum of
photographs) in the page cache, random-resized to 224x224 in batches of 64.
Every contender is a process that lives through the whole run; in each round all
make the same number of images, one contender after the other, while the rest
are idle. Images made ahead of time are discarded before the clock starts. CPU
time and memory are those of the contender and of its workers. Writes OUT.json
(every round) and prints a table.

tf.data takes part where TensorFlow is installed.
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

IMAGES, BATCH, SIZE = 512, 64, 224
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
DRAIN = 8  # Batches discarded before the clock starts.


def texture(
  rng: np.random.Generator, height: int = 375, width: int = 500
) -> np.ndarray:
  """Noise whose spectrum falls as 1/f, as a photograph's does."""
  rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  amplitude = (rows**2 + columns**2 + 1e-5) ** -0.5
  grain = rng.normal(0, 6, (height, width))
  channels = []
  for _ in range(3):
    phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
    noise = np.fft.irfft2(amplitude * phase, (height, width))
    channels.append(120 + 45 * noise / noise.std() + grain)
  return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def write_data(folder: Path) -> float:
  """Writes the data set in ArrayRecord; the mean size of a file in KB."""
  import simplejpeg
  from image_sets import write_tfds

  rng = np.random.default_rng(0)
  files = [
    simplejpeg.encode_jpeg(texture(rng), 87, colorsubsampling='420')
    for _ in range(IMAGES)
  ]
  train = [(f'{i}.JPEG', data, i % 10) for i, data in enumerate(files)]
  write_tfds(folder / 'textures' / '1.0.0', {'train': train, 'test': train}, 10)
  return statistics.mean(map(len, files)) / 1e3


# Contenders: each yields batches (the bare decode: numbers of images).


def ours(folder: Path, workers: int) -> Iterator[object]:
  from ml_collections import ConfigDict

  from skipinit_jax.data import open_dataset

  config = ConfigDict(
    {
      'name': 'tfds',
      'dir': str(folder / 'textures' / '1.0.0'),
      'train_split': 'train',
      'eval_split': 'test',
      'train_size': 0,
      'eval_size': 0,
      'flip': True,
      'shift': 0,
      'cutout': 0,
      'mixup': 0.0,
      'cutmix': 0.0,
      'validation': 0,
      'image_size': SIZE,
      'eval_resize': 256,
      'area': AREA,
      'aspect': ASPECT,
      'bad_share': 0.0,
      'workers': workers,
    }
  )
  run = ConfigDict({'batch_size': BATCH, 'seed': 0})
  data = open_dataset(config)
  data = dataclasses.replace(data, train=large(data.train))
  return data.inputs(lambda batch: batch, run, 0)


def tf_data(folder: Path, workers: int) -> Iterator[object]:
  import tensorflow as tf

  path = str(folder / 'textures.tfrecord')
  with tf.io.TFRecordWriter(path) as writer:
    for record in records_of(folder).source:
      writer.write(record)
  fields = {
    'image': tf.io.FixedLenFeature([], tf.string),
    'label': tf.io.FixedLenFeature([], tf.int64),
  }

  def load(serialized):
    example = tf.io.parse_single_example(serialized, fields)
    start, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(example['image']),
      tf.zeros([1, 0, 4]),
      area_range=AREA,
      aspect_ratio_range=ASPECT,
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([start[:2], size[:2]], 0)
    image = tf.io.decode_and_crop_jpeg(example['image'], window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), 'bilinear')
    image = tf.image.random_flip_left_right(image)
    return tf.cast(image, tf.uint8), example['label']

  dataset = tf.data.TFRecordDataset(path).repeat().shuffle(2 * BATCH)
  dataset = dataset.map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)
  return dataset.as_numpy_iterator()


def pillow(folder: Path, workers: int) -> Iterator[object]:
  """Like torchvision's transforms on Pillow images, in one thread."""
  import io

  from PIL import Image

  from skipinit_jax.data.crops import RandomCrop

  records, rng = records_of(folder), np.random.default_rng(0)
  for first in itertools.count(0, BATCH):
    rows = []
    for i in range(first, first + BATCH):
      image = Image.open(io.BytesIO(records[i % IMAGES].data)).convert('RGB')
      draws = rng.random(RandomCrop.DRAWS).tolist()
      box = RandomCrop(SIZE, AREA, ASPECT, draws).box(image.height, image.width)
      edges = box.left, box.top, box.left + box.width, box.top + box.height
      image = image.crop(edges).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
      if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      rows.append(np.asarray(image))
    yield np.stack(rows)


def decode(folder: Path, workers: int) -> Iterator[object]:
  """libjpeg-turbo alone: whole images, in one thread, not kept."""
  import simplejpeg

  records = records_of(folder)
  files = [records[i].data for i in range(IMAGES)]
  buffer = np.empty(375 * 500 * 3, np.uint8)
  for first in itertools.count(0, BATCH):
    for i in range(first, first + BATCH):
      simplejpeg.decode_jpeg(files[i % IMAGES], buffer=buffer)
    yield BATCH


def large(records):
  """As many records as ImageNet has, over and over the same.

  Grain's shuffle draws until a number is below the size: for a few hundred, ten
  times as long.
  """
  from skipinit_jax.data.records import Subset

  return Subset(records, np.arange(1_281_167, dtype=np.int32) % len(records))


def records_of(folder: Path):
  from skipinit_jax.data.sources import open_source

  return open_source('textures', folder).open('train')


CONTENDERS = {
  'ours, threads': (ours, 0),
  'ours, 1 worker': (ours, 1),
  'ours, 2 workers': (ours, 2),
  'tf.data, decode_and_crop_jpeg': (tf_data, 0),
  'Pillow, as torchvision uses it': (pillow, 0),
  'libjpeg-turbo, decode alone': (decode, 0),
}


def serve(name: str, folder: Path) -> None:
  """Reads a number of images per line; prints the figures of each round."""
  function, workers = CONTENDERS[name]
  batches = function(folder, workers)
  for line in sys.stdin:
    for _ in range(DRAIN):
      next(batches)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(int(line) // BATCH):
      next(batches)
    figures = {
      'wall': time.perf_counter() - wall,
      'cpu': cpu_seconds() - cpu,
      'memory': memory(),
    }
    _settle()
    print('figures', json.dumps(figures), flush=True)
  batches.close() if hasattr(batches, 'close') else None


def _settle() -> None:
  """Waits until everything that is made ahead of time has been made."""
  before = -1.0
  while cpu_seconds() - before > 0.02:
    before = cpu_seconds()
    time.sleep(0.4)


def _family() -> list[int]:
  """This process and its descendants, without Python's helpers."""
  parents = {}
  for entry in Path('/proc').iterdir():
    if entry.name.isdigit():
      try:
        fields = (entry / 'stat').read_text().rpartition(')')[2].split()
      except OSError:
        continue
      parents[int(entry.name)] = int(fields[1])
  family = [os.getpid()]
  for member in family:  # Grows as it goes.
    family += [pid for pid, parent in parents.items() if parent == member]
  return family


def cpu_seconds() -> float:
  """User and system time of this process and its children so far."""
  ticks = 0
  for pid in _family():
    try:
      stat = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
      continue
    ticks += sum(map(int, stat.rpartition(')')[2].split()[11:13]))
  return ticks / os.sysconf('SC_CLK_TCK')


def memory() -> dict[str, float]:
  """Gigabytes: resident in this process, in its children, and their share.

  What several processes map together is counted in each one's resident memory
  and divided among them in the share (PSS).
  """
  own, *children = _family()
  sizes = {'own': _rollup(own, 'Rss'), 'workers': 0.0, 'workers_share': 0.0}
  for pid in children:
    sizes['workers'] += _rollup(pid, 'Rss')
    sizes['workers_share'] += _rollup(pid, 'Pss')
  return sizes


def _rollup(pid: int, field: str) -> float:
  try:
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
  except OSError:
    return 0.0
  return sum(
    int(line.split()[1]) for line in lines if line.startswith(f'{field}:')
  ) / (1 << 20)


class Process:
  """A contender's process."""

  def __init__(self, name: str, folder: Path):
    self.process = subprocess.Popen(
      [sys.executable, __file__, '--serve', name, '--folder', str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE if 'tf.data' in name else None,
      text=True,
    )

  def round(self, images: int) -> dict:
    """The figures of one round."""
    self.process.stdin.write(f'{images}\n')
    self.process.stdin.flush()
    for line in self.process.stdout:
      if line.startswith('figures '):
        return json.loads(line.removeprefix('figures '))
    raise SystemExit(f'a contender died with status {self.process.wait()}')

  def stop(self) -> None:
    """Ends it."""
    self.process.stdin.close()
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()


def measure(rounds: int, images: int) -> dict:
  """Runs all contenders; every round's figures by contender."""
  names = [
    name
    for name in CONTENDERS
    if 'tf.data' not in name or importlib.util.find_spec('tensorflow')
  ]
  with tempfile.TemporaryDirectory() as folder:
    size = write_data(Path(folder))
    contenders = {name: Process(name, Path(folder)) for name in names}
    results = {name: [] for name in names}
    for i in range(-1, rounds):  # The first round warms up.
      for name in names:
        figures = contenders[name].round(images)
        print(f'round {i + 1}: {name}: {figures}', file=sys.stderr, flush=True)
        if i >= 0:
          results[name].append(figures)
    for contender in contenders.values():
      contender.stop()
  return {'kilobytes': size, 'images': images, 'rounds': results}


def versions() -> dict[str, str]:
  packages = (
    'grain',
    'tensorflow-datasets',
    'array_record',
    'simplejpeg',
    'nvidia-nvimgcodec-cu12',
    'opencv-python-headless',
    'pillow',
    'numpy',
    'jax',
    'tensorflow',
    'tensorflow-cpu',
  )
  found = {'python': platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def machine() -> str:
  lines = Path('/proc/cpuinfo').read_text().splitlines()
  models = [line.split(': ')[1] for line in lines if 'model name' in line]
  return f'{models[0] if models else platform.machine()}, {os.cpu_count()} CPUs'


def table(report: dict) -> str:
  """Medians over the rounds and, in brackets, the least and the most."""
  rounds, images = report['rounds'], report['images']
  base = 'tf.data, decode_and_crop_jpeg'

  def rates(name, field):
    return [images / figures[field] for figures in rounds[name]]

  def spread(values, digits=0):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f'{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'

  lines = [
    '| | images per CPU-second | against tf.data | images per second | '
    'memory of the process, GB | of its workers, GB (shared parts divided) |',
    '|---|---|---|---|---|---|',
  ]
  for name in rounds:
    ratio = '-'
    if base in rounds:  # Round by round, since the machine's speed drifts.
      pairs = zip(rates(name, 'cpu'), rates(base, 'cpu'), strict=True)
      ratio = spread([mine / theirs for mine, theirs in pairs], 2)
    last = rounds[name][-1]['memory']
    workers = f'{last["workers"]:.2f} ({last["workers_share"]:.2f})'
    lines.append(
      f'| {name} | {spread(rates(name, "cpu"))} | {ratio} | '
      f'{spread(rates(name, "wall"))} | {last["own"]:.2f} | '
      f'{workers if last["workers"] else "-"} |'
    )
  lines += [
    '',
    f'Medians of {len(rounds[name])} rounds of {images} images, in brackets '
    f'the least and the most. JPEGs of 500x375, {report["kilobytes"]:.0f} KB. '
    f'{report["machine"]}. '
    + ', '.join(f'{k} {v}' for k, v in report['versions'].items())
    + '.',
  ]
  return '\n'.join(lines) + '\n'


def main() -> None:
  if sys.argv[1:2] == ['--serve']:  # A contender, with nothing else imported.
    _, name, _, folder = sys.argv[1:]
    return serve(name, Path(folder))
  from skipinit_jax import cli

  count = cli.number(int, 1, 10**6)
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=cli.file, default=Path('input_pipeline'))
  parser.add_argument('--rounds', type=count, default=7)
  parser.add_argument('--images', type=count, default=1024)
  args = parser.parse_args()
  report = measure(args.rounds, args.images)
  report |= {'machine': machine(), 'versions': versions()}
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix('.json').write_text(json.dumps(report, indent=2) + '\n')
  print(table(report))


if __name__ == '__main__':
  main()

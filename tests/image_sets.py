"""Small image data sets on disk, made without TensorFlow."""

import io
import itertools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

# A class's colour; far apart, so that JPEG's loss can't confuse them.
COLOURS = np.array(
  [[230, 25, 25], [25, 230, 25], [25, 25, 230], [230, 230, 25], [25, 230, 230]]
)


def picture(
  rng: np.random.Generator, height: int, width: int, grain: int = 8
) -> np.ndarray:
  """A random image, smooth over `grain` pixels; uint8 (height, width, 3)."""
  coarse = (height // grain + 2, width // grain + 2, 3)
  coarse = rng.integers(0, 256, coarse, np.uint8)
  return np.array(Image.fromarray(coarse).resize((width, height)))


def encode(pixels: np.ndarray, kind: str = 'JPEG', mode=None, **options):
  """Encodes pixels as an image file."""
  file = io.BytesIO()
  image = Image.fromarray(pixels)
  (image.convert(mode) if mode else image).save(file, kind, **options)
  return file.getvalue()


def coloured(label: int, number: int) -> bytes:
  """A JPEG in its class's colour, darker to the right; sizes vary."""
  height, width = 40 + number % 17, 48 + number % 23
  pixels = np.broadcast_to(COLOURS[label], (height, width, 3)).astype(float)
  pixels = pixels * np.linspace(1, 0.5, width)[:, None]
  pixels[0, :8] = number % 256  # No two files are alike.
  return encode(pixels.astype(np.uint8), quality=95)


def labelled(count: int, prefix: str = '') -> list[tuple[str, bytes, int]]:
  """Records of coloured images of five classes."""
  labels = [i * 3 % 5 for i in range(count)]
  return [
    (f'{prefix}{i}.JPEG', coloured(label, i), label)
    for i, label in enumerate(labels)
  ]


def write_folders(
  folder: Path, splits: dict[str, list[tuple[str, bytes, int]]]
) -> Path:
  """A folder `split/class/image` of each record: class0, class1, ..."""
  for split, records in splits.items():
    for name, data, label in records:
      path = folder / split / f'class{label}' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return folder


def stream_config(**fields) -> ConfigDict:
  """A recipe's `data` for small crops of a data set on disk."""
  common = {
    'name': 'tfds',
    'dir': '',
    'train_split': 'train',
    'eval_split': '',
    'train_size': 0,
    'eval_size': 0,
    'validation': 0,
    'workers': 0,
    'image_size': 8,
    'eval_resize': 10,
    'area': (0.3, 1.0),
    'aspect': (0.75, 1.33),
    'flip': True,
    'bad_share': 0.5,
    'shift': 0,
    'cutout': 0,
    'mixup': 0.0,
    'cutmix': 0.0,
  }
  return ConfigDict(common | fields)


def write_tfds(
  folder: Path,
  splits: dict[str, list[tuple[str, bytes, int]]],
  num_classes: int,
  shards: int = 2,
) -> Path:
  """A prepared tfds set in ArrayRecord: (file name, bytes, label) by split."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=num_classes),
      'file_name': tfds.features.Text(),
    }
  )
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name=folder.parent.name,
    filetype_suffix='array_record',
  )
  infos = []
  for split, records in splits.items():
    names = template.replace(split=split)
    counts = []
    for shard in range(shards):
      part = records[shard::shards]
      counts.append(len(part))
      path = names.sharded_filepath(shard_index=shard, num_shards=shards)
      writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for name, data, label in part:
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature['image'].bytes_list.value.append(data)
        feature['label'].int64_list.value.append(label)
        feature['file_name'].bytes_list.value.append(name.encode())
        writer.write(example.SerializeToString())
      writer.close()
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=counts, num_bytes=0, filename_template=names
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=infos,
    version=folder.name,
    filename_template=template,
    check_data=False,
  )
  return folder


def train_batches(data, batch_size, seed=0, start=0, process=0, processes=1):
  """Yields batches of a Stream as dicts."""
  run = ConfigDict({'batch_size': batch_size, 'seed': seed})
  for image, label, broken in data.read(run, start, process, processes):
    yield {'image': image, 'label': label, 'broken': broken}


def eval_batches(data, *args):
  """Yields batches of a Stream as dicts."""
  for image, label, mask in data.eval_batches(*args):
    yield {'image': image, 'label': label, 'mask': mask}


def take(batches, count):
  """The first batches; closes the iterator."""
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def write_toy(folder: Path, train: int, evaluation: int) -> Path:
  """A prepared set `toy` of five classes with so many images."""
  splits = {
    'train': labelled(train, 'train_'),
    'test': labelled(evaluation, 'test_'),
  }
  return write_tfds(folder / 'toy' / '1.0.0', splits, 5)

"""Small image data sets on disk, made without TensorFlow."""

import io
from pathlib import Path

import numpy as np
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

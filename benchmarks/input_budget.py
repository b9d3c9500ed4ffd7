"""Where the CPU time of a training image goes, and what decoding costs.

  python -m benchmarks.input_budget --out=docs/input_budget

The parts of making a batch of the images of `benchmarks/input_pipeline.py`,
each by itself, in one thread, as CPU time per image; one after the other in
each round, so that a busy machine is equally slow to all. Then ways to decode
random crops of images of several sizes. Writes OUT.json (every round) and
prints two tables.

Decoding only the crop's region takes part where nvidia-nvimgcodec is installed:
nothing else in this project uses it.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from benchmarks import input_pipeline  # noqa: E402
from skipinit_jax.data.crops import RandomCrop, mirror, read  # noqa: E402
from skipinit_jax.data.decode import (  # noqa: E402
  decode,
  decode_rows,
  jpeg_size,
)

COUNT, BATCH = 128, input_pipeline.BATCH  # Images of a part in each round.
SIDE = input_pipeline.SIZE
SIZES = ((256, 341), (375, 500), (750, 1000))  # Height, width.
WHOLE, ROWS, REGION, COARSE = (
  'the whole image',
  'down to the last row of the crop',
  'the region of the crop, by nvImageCodec',
  'the whole image at an eighth: hardly more than its entropy code',
)

Part = Callable[[int], object]


def crops() -> list[RandomCrop]:
  """The random crops of `COUNT` images."""
  rng = np.random.default_rng(0)
  area, aspect = input_pipeline.AREA, input_pipeline.ASPECT
  return [
    RandomCrop(SIDE, area, aspect, rng.random(RandomCrop.DRAWS).tolist())
    for _ in range(COUNT)
  ]


def parts(folder: Path) -> dict[str, Part]:
  """What is done for an image: name -> function of its number."""
  from grain.multiprocessing import SharedMemoryArray

  from skipinit_jax.data.loader import RandomCrops
  from skipinit_jax.data.order import streamed
  from skipinit_jax.data.records import read_record

  records = input_pipeline.large(input_pipeline.records_of(folder))
  order = streamed(len(records), 0)
  files = [records[i].data for i in range(COUNT)]
  chosen = crops()
  shapes = [jpeg_size(data) for data in files]
  boxes = [crop.box(*shape) for crop, shape in zip(chosen, shapes, strict=True)]
  rows = [box.top + box.height for box in boxes]
  image = np.empty((SIDE, SIDE, 3), np.uint8)
  batch = np.ones((BATCH, SIDE, SIDE, 3), np.uint8)
  load = RandomCrops(
    records,
    10,
    SIDE,
    shared=False,
    area=input_pipeline.AREA,
    aspect=input_pipeline.ASPECT,
    flip=True,
  )
  batches = order.batch(BATCH, drop_remainder=True, batch_fn=list).map(load)

  def resize(i: int) -> None:
    import cv2

    box = boxes[i]
    part = np.empty((375, 500, 3), np.uint8)[: box.height, : box.width]
    cv2.resize(part, (SIDE, SIDE), image, interpolation=cv2.INTER_LINEAR)

  def share(i: int) -> None:
    if i % BATCH == 0:  # A batch, as Grain copies what workers made.
      shared = SharedMemoryArray(batch.shape, batch.dtype)
      np.copyto(shared, batch)
      shared.unlink_on_del()

  return {
    'which image, and the numbers of its crop (Grain)': lambda i: order[i],
    'the record: file, checksum, protocol buffer': lambda i: read_record(
      records, i, 10
    ),
    'the header and the box': lambda i: chosen[i].box(*jpeg_size(files[i])),
    'decoding, ' + WHOLE + ' (as before)': lambda i: decode(files[i]),
    'decoding, ' + ROWS: lambda i: decode_rows(files[i], shapes[i], rows[i]),
    'resizing': resize,
    'mirroring, of half': lambda i: i % 2 and mirror(image),
    'copying to shared memory (as before)': share,
    'all of it, in a batch': lambda i: i % BATCH or batches[i // BATCH],
  }


def ways(height: int, width: int) -> dict[str, Part]:
  """Ways to make crops of random images of this size."""
  import simplejpeg

  rng = np.random.default_rng(1)
  files = [
    simplejpeg.encode_jpeg(
      input_pipeline.texture(rng, height, width), 87, colorsubsampling='420'
    )
    for _ in range(COUNT)
  ]
  chosen = crops()
  boxes = [crop.box(height, width) for crop in chosen]
  out = np.empty((SIDE, SIDE, 3), np.uint8)
  found = {
    WHOLE: lambda i: decode(files[i]),
    ROWS: lambda i: decode_rows(
      files[i], (height, width), boxes[i].top + boxes[i].height
    ),
    COARSE: lambda i: decode(files[i], 8),
    'all of the crop, as in training': lambda i: read(files[i], chosen[i], out),
  }
  if importlib.util.find_spec('nvidia.nvimgcodec'):
    found[REGION] = region(files, boxes)
  return found


def region(files: list[bytes], boxes: list) -> Part:
  """Decodes only the crop's region, on the CPU."""
  from nvidia import nvimgcodec

  decoder = nvimgcodec.Decoder(
    device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
    max_num_cpu_threads=1,
    backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
  )
  params = nvimgcodec.DecodeParams(apply_exif_orientation=False)
  image = None  # Its memory is used again.

  def run(i: int) -> np.ndarray:
    nonlocal image
    top, left, height, width = boxes[i]
    part = nvimgcodec.Region(top, left, top + height, left + width)
    stream = nvimgcodec.CodeStream(files[i]).get_sub_code_stream(region=part)
    image = decoder.decode(stream, params=params, image=image)
    return np.asarray(image)

  whole = decode(files[0]).pixels
  top, left, height, width = boxes[0]
  part = whole[top : top + height, left : left + width]
  assert np.array_equal(run(0), part)
  return run


def measure(found: dict[str, Part], rounds: int) -> dict[str, list[float]]:
  """CPU seconds per image, of every part in every round."""
  results = {name: [] for name in found}
  for i in range(-1, rounds):  # The first round warms up.
    for name, part in found.items():
      began = time.process_time()
      for image in range(COUNT):
        part(image)
      if i >= 0:
        results[name].append((time.process_time() - began) / COUNT)
  return results


def table_of_parts(report: dict) -> str:
  """Medians and, in brackets, the least and the most."""
  lines = ['| part | CPU time per image, microseconds |', '| --- | --- |']
  lines += [
    f'| {name} | {_microseconds(seconds)} |'
    for name, seconds in report['parts'].items()
  ]
  return '\n'.join(lines) + '\n'


def table_of_ways(report: dict) -> str:
  """The same, and medians of ratios to decoding the whole image."""
  sizes = report['decoding']
  names = next(iter(sizes.values()))
  lines = [
    f'| decoded, microseconds | {" | ".join(sizes)} |',
    '| --- |' + ' --- |' * len(sizes),
  ]
  for name in names:
    cells = []
    for ways in sizes.values():
      pairs = zip(ways[name], ways[WHOLE], strict=True)
      share = statistics.median(mine / first for mine, first in pairs)
      cells.append(f'{_microseconds(ways[name])} = {share:.2f}')
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _microseconds(seconds: list[float]) -> str:
  low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
  return f'{1e6 * middle:.0f} ({1e6 * low:.0f} to {1e6 * high:.0f})'


def main() -> None:
  from skipinit_jax import cli

  count = cli.number(int, 1, 10**6)
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=cli.file, default=Path('input_budget'))
  parser.add_argument('--rounds', type=count, default=15)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    input_pipeline.write_data(Path(folder))
    report = {'parts': measure(parts(Path(folder)), args.rounds)}
  report['decoding'] = {
    f'{width}x{height}': measure(ways(height, width), args.rounds)
    for height, width in SIZES
  }
  report |= {
    'machine': input_pipeline.machine(),
    'versions': input_pipeline.versions(),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix('.json').write_text(json.dumps(report, indent=2) + '\n')
  print(table_of_parts(report))
  print(table_of_ways(report))


if __name__ == '__main__':
  main()

"""How a training step grows with the network's depth and with the batch.

  python -m benchmarks.growth run --out=docs/growth
  python -m benchmarks.growth draw --out=docs/growth

`run` compiles n-2 Wide-ResNets for a TPU that is not here (v5e:2x2, 128 images
of CIFAR's size a chip, `pip install libtpu`) and times networks on the digits
on what is here, all in one process and interleaved; it writes OUT.json. `draw`
makes OUT.png of that.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import tqdm

from benchmarks import peers
from benchmarks.throughput import describe, our_step
from skipinit_jax.ahead_of_time.chips import GIB, topology
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.training.config import default_config
from skipinit_jax.training.result import versions

TOPOLOGY = 'v5e:2x2'
# Form -> (method, scan, remat), depths.
COMPILED = {
  'batchnorm, scan': (('batchnorm', True, False), (16, 40, 100, 304, 1000)),
  'unrolled': (('skipinit', False, False), (16, 40, 100)),
  'scan': (('skipinit', True, False), (16, 40, 100, 304, 1000)),
  'scan, remat': (
    ('skipinit', True, True),
    (16, 40, 100, 304, 1000, 3004, 10_000),
  ),
}
METHODS = ('skipinit', 'batchnorm')
DEPTHS = (16, 40, 70, 100, 148, 208)  # At batch 32.
BATCHES = (1, 4, 16, 64, 256, 1024)  # At depth 16.


def compiled(form: str, depth: int) -> dict[str, Any]:
  """What the TPU compiler says of one point."""
  where = topology(TOPOLOGY)
  method, scan, remat = COMPILED[form][0]
  config = peers.recipe(method, 'cifar10', 128 * where.chips)
  config.model.depth = depth
  config.model.width = 2
  config.model.scan = scan
  config.model.remat = remat
  return measure(config, where, evaluation=False)


def digits(method: str, depth: int, batch_size: int) -> Any:
  """A step on the digits, to be timed."""
  config = default_config()
  config.model.method = method
  config.model.depth = depth
  config.model.biases = method == 'skipinit'
  config.model.statistics_group = 'all'
  config.batch_size = batch_size
  return our_step(config)


def time_all(rounds: int) -> list[dict[str, Any]]:
  """Images a second of every network on the digits, round by round."""
  points = [(m, d, 32) for m in METHODS for d in DEPTHS]
  points += [(m, 16, b) for m in METHODS for b in BATCHES]
  steps = {p: digits(*p) for p in tqdm.tqdm(points, desc='compiling')}
  rates: dict[tuple, list[float]] = {point: [] for point in points}
  for _ in tqdm.trange(rounds, desc='timing'):
    for point, step in steps.items():
      start, count = time.perf_counter(), 0
      while time.perf_counter() - start < 0.5 or count < 2:
        jax.block_until_ready(step())
        count += 1
      rates[point].append(point[2] * count / (time.perf_counter() - start))
  names = ('method', 'depth', 'batch_size')
  return [
    dict(zip(names, point, strict=True)) | {'images_per_second': values}
    for point, values in rates.items()
  ]


def run(rounds: int) -> dict[str, Any]:
  packages = versions() | {'libtpu': importlib.metadata.version('libtpu')}
  report = describe() | {'versions': packages, 'topology': TOPOLOGY}
  report['timed'] = time_all(rounds)
  points = [(form, d) for form, (_, depths) in COMPILED.items() for d in depths]
  report['compiled'] = [
    {'form': form, 'depth': depth, **compiled(form, depth)}
    for form, depth in tqdm.tqdm(points, desc='TPU compiler')
  ]
  return report


def draw(report: dict[str, Any], path: Path) -> None:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  plt.rcParams.update(
    {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False}
  )
  figure, (memory, depth, batch) = plt.subplots(
    1, 3, figsize=(10.5, 3.4), layout='constrained'
  )
  styles = {
    'batchnorm, scan': ('#E69F00', 's', '--', 'batch normalization, scanned'),
    'unrolled': ('#56B4E9', '^', '-.', 'SkipInit, unrolled'),
    'scan': ('#0072B2', 'o', '-', 'SkipInit, scanned'),
    'scan, remat': ('#009E73', 'D', ':', 'SkipInit, scanned, remat'),
  }
  for form, (color, marker, line, label) in styles.items():
    points = [p for p in report['compiled'] if p['form'] == form and p['fits']]
    memory.plot(
      [p['depth'] for p in points],
      [p['activation_bytes'] / GIB for p in points],
      color=color,
      marker=marker,
      linestyle=line,
      label=label,
    )
  capacity = report['compiled'][0]['hbm_capacity_bytes'] / GIB
  memory.axhline(capacity, color='0.6', linewidth=1, zorder=0)
  memory.text(16, capacity * 0.94, "the chip's memory", va='top', color='0.4')
  memory.set(
    xscale='log',
    yscale='log',
    xlabel='depth (layers)',
    ylabel='activations (GiB a chip)',
    title='n-2 Wide-ResNet, 128 images a v5e chip,\nby the TPU compiler',
  )
  memory.legend(frameon=False, fontsize=8, loc='lower right')
  names = {
    'skipinit': ('SkipInit', '#0072B2', 'o', '-'),
    'batchnorm': ('batch normalization', '#E69F00', 's', '--'),
  }
  for axes, axis, fixed in (
    (depth, 'depth', ('batch_size', 32)),
    (batch, 'batch_size', ('depth', 16)),
  ):
    for method, (label, color, marker, line) in names.items():
      points = [
        p
        for p in report['timed']
        if p['method'] == method and p[fixed[0]] == fixed[1]
      ]
      points.sort(key=lambda p: p[axis])
      rates = [p['images_per_second'] for p in points]
      middle = [statistics.median(r) for r in rates]
      low = [m - min(r) for m, r in zip(middle, rates, strict=True)]
      high = [max(r) - m for m, r in zip(middle, rates, strict=True)]
      axes.errorbar(
        [p[axis] for p in points],
        middle,
        yerr=[low, high],
        color=color,
        marker=marker,
        linestyle=line,
        label=label,
        capsize=2,
      )
    axes.set(xscale='log', yscale='log', ylabel='images a second')
    axes.legend(frameon=False, fontsize=8)
  where = f'on {report["device"]}'
  depth.set(xlabel='depth (layers)', title=f'digits, batch 32,\n{where}')
  batch.set(xlabel='batch (images)', title=f'digits, depth 16,\n{where}')
  figure.savefig(path, dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('action', choices=('run', 'draw'))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--out', type=Path, default=Path('growth'))
  args = parser.parse_args()
  file = args.out.with_suffix('.json')
  if args.action == 'run':
    file.write_text(json.dumps(run(args.rounds), indent=1) + '\n')
  draw(json.loads(file.read_text()), args.out.with_suffix('.png'))


if __name__ == '__main__':
  main()

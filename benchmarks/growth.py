"""How a training step grows with the network's depth and with the batch.

  python -m benchmarks.growth run --out=docs/growth
  python -m benchmarks.growth draw --out=docs/growth

`run` compiles n-2 Wide-ResNets for a TPU that is not here (v5e:2x2, 128 images
of CIFAR's size a chip, `pip install libtpu`) and times networks on the digits
on what is here, all in one process and interleaved; it writes OUT.json. `draw`
makes OUT.png of that.
"""

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
from skipinit_jax import cli
from skipinit_jax.ahead_of_time.chips import GIB, topology
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.styles import STYLES
from skipinit_jax.training.config import default_config
from skipinit_jax.training.result import versions

TOPOLOGY = 'v5e:2x2'
# Form -> (method, scan, remat), depths.
COMPILED = {
  'batchnorm, scan': (('batchnorm', True, False), (16, 100, 304, 1000)),
  'unrolled': (('skipinit', False, False), (16, 40, 100)),
  'scan': (('skipinit', True, False), (16, 100, 304, 1000)),
  'scan, remat': (
    ('skipinit', True, True),
    (16, 100, 304, 1000, 3010, 10_000),
  ),
}
METHODS = ('skipinit', 'batchnorm')
DEPTHS = (16, 40, 100, 160)  # At batch 32.
BATCHES = (1, 8, 64, 256, 1024)  # At depth 16.


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
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator

  figure = Figure(figsize=(10.5, 4.1), layout='constrained')
  memory, depth, batch = figure.subplots(1, 3)
  labels = {
    'batchnorm, scan': 'batch normalization, scanned',
    'unrolled': 'SkipInit, unrolled',
    'scan': 'SkipInit, scanned',
    'scan, remat': 'SkipInit, scanned, recomputed',
  }
  styles = {
    'batchnorm, scan': STYLES['batchnorm'],
    'unrolled': ('#56B4E9', '^', '-.'),
    'scan': STYLES['skipinit'],
    'scan, remat': ('#009E73', 'D', ':'),
  }
  for form, label in labels.items():
    points = [p for p in report['compiled'] if p['form'] == form and p['fits']]
    xs = [p['depth'] for p in points]
    ys = [p['activation_bytes'] / GIB for p in points]
    plot(memory, xs, ys, styles[form], label)
  capacity = report['compiled'][0]['hbm_capacity_bytes'] / GIB
  memory.axhline(capacity, color='0.6', linewidth=1, zorder=0)
  memory.text(16, 0.9 * capacity, "the chip's memory", va='top', color='0.4')
  memory.set(
    ylabel='activations (GiB a chip)',
    title='n-2 Wide-ResNets, 128 images on a\nv5e chip, by the TPU compiler',
  )
  for axes, axis, fixed in (
    (depth, 'depth', ('batch_size', 32)),
    (batch, 'batch_size', ('depth', 16)),
  ):
    for method in METHODS:
      points = [
        p
        for p in report['timed']
        if p['method'] == method and p[fixed[0]] == fixed[1]
      ]
      points.sort(key=lambda p: p[axis])
      rates = [p['images_per_second'] for p in points]
      ys = [statistics.median(r) for r in rates]
      bars = [
        [y - min(r) for y, r in zip(ys, rates, strict=True)],
        [max(r) - y for y, r in zip(ys, rates, strict=True)],
      ]
      label = {'skipinit': 'SkipInit', 'batchnorm': 'batch normalization'}
      xs = [p[axis] for p in points]
      plot(axes, xs, ys, STYLES[method], label[method], bars)
    axes.set(ylabel='images a second')
  depth.set_title('digits, batch 32, on 2 CPU cores')
  batch.set_title('digits, depth 16, on 2 CPU cores')
  for axes, name, ticks in (
    (memory, 'depth (layers)', (16, 100, 1000, 10_000)),
    (depth, 'depth (layers)', DEPTHS),
    (batch, 'batch (images)', BATCHES),
  ):
    axes.set(xscale='log', yscale='log', xlabel=name)
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:,g}')
    axes.yaxis.set_minor_formatter(lambda value, _: '')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(
      frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.2), fontsize=9
    )
  figure.savefig(path, dpi=120)


def plot(axes, xs, ys, style, label, bars=None) -> None:
  color, marker, dashes = style
  axes.errorbar(
    xs,
    ys,
    bars,
    color=color,
    marker=marker,
    linestyle=dashes,
    label=label,
    capsize=2,
  )


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('action', choices=('run', 'draw'))
  parser.add_argument('--rounds', type=cli.number(int, 1, 10**6), default=5)
  parser.add_argument('--out', type=cli.file, default=Path('growth'))
  args = parser.parse_args()
  file = args.out.with_suffix('.json')
  if args.action == 'run':
    file.write_text(json.dumps(run(args.rounds), indent=1) + '\n')
  try:
    report = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    cli.refuse(f'--out={args.out}: {file} holds no figures: {error}')
  draw(report, args.out.with_suffix('.png'))


if __name__ == '__main__':
  main()

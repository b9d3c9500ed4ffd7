"""How a training step grows with the network's depth and with the batch.

  python -m benchmarks.growth run --out=docs/growth
  python -m benchmarks.growth draw --out=docs/growth

`run` compiles n-2 Wide-ResNets for a TPU (v5e:2x2, 128 images of CIFAR's size
per chip; `pip install libtpu`, no TPU is needed), times networks on the digits
on this machine, interleaved in one process, and writes OUT.json. `draw` makes
OUT.png from it.
"""

import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from matplotlib.axes import Axes

from benchmarks import peers
from benchmarks.throughput import describe, our_step
from skipinit_jax import cli, plotting
from skipinit_jax.ahead_of_time.chips import GIB, topology
from skipinit_jax.ahead_of_time.measure import measure
from skipinit_jax.training.config import default_config
from skipinit_jax.training.result import versions
from skipinit_jax.variants import BLUE, GREEN, ORANGE, SKY

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
METHODS = {'skipinit': 'SkipInit', 'batchnorm': 'batch normalization'}
# Form -> label, color, marker and dashes.
FORMS = {
  'batchnorm, scan': ('batch normalization, scanned', ORANGE, 's', '--'),
  'unrolled': ('SkipInit, unrolled', SKY, '^', '-.'),
  'scan': ('SkipInit, scanned', BLUE, 'o', '-'),
  'scan, remat': ('SkipInit, scanned, recomputed', GREEN, 'D', ':'),
}
DEPTHS = (16, 40, 100, 160)  # At batch 32.
BATCHES = (1, 8, 64, 256, 1024)  # At depth 16.


def compiled(form: str, depth: int) -> dict[str, Any]:
  """The TPU compiler's figures for one point."""
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
  """Images per second of every network on the digits, round by round."""
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


@plotting.style()
def draw(report: dict[str, Any], path: Path) -> None:
  figure, (memory, depth, batch) = plotting.new_figure(
    1, 3, width=10.5, height=4.1
  )
  draw_memory(memory, report['compiled'])
  timed = report['timed']
  draw_rates(depth, [p for p in timed if p['batch_size'] == 32], 'depth')
  depth.set_title('digits, batch 32, on 2 CPU cores')
  draw_rates(batch, [p for p in timed if p['depth'] == 16], 'batch_size')
  batch.set_title('digits, depth 16, on 2 CPU cores')
  for axes, name, ticks in (
    (memory, 'depth (layers)', (16, 100, 1000, 10_000)),
    (depth, 'depth (layers)', DEPTHS),
    (batch, 'batch (images)', BATCHES),
  ):
    plotting.log_axis(axes, 'x')
    plotting.log_axis(axes, 'y')
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
    axes.set_xlabel(name)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2))
  figure.savefig(path, dpi=120)


def draw_memory(axes: Axes, points: list[dict[str, Any]]) -> None:
  """Plots a step's activations against the depth, by form."""
  for form, (label, color, marker, dashes) in FORMS.items():
    shown = [p for p in points if p['form'] == form and p['fits']]
    axes.plot(
      [p['depth'] for p in shown],
      [p['activation_bytes'] / GIB for p in shown],
      color=color,
      marker=marker,
      linestyle=dashes,
      label=label,
    )
  capacity = points[0]['hbm_capacity_bytes'] / GIB
  axes.axhline(capacity, color='0.6', linewidth=1, zorder=0)
  axes.text(16, 0.9 * capacity, "the chip's memory", va='top', color='0.4')
  axes.set_ylabel('activations (GiB a chip)')
  axes.set_title(
    'n-2 Wide-ResNets, 128 images on a\nv5e chip, by the TPU compiler'
  )


def draw_rates(axes: Axes, points: list[dict[str, Any]], along: str) -> None:
  """Plots images per second against a field, by method: median and range."""
  for method, label in METHODS.items():
    shown = [p for p in points if p['method'] == method]
    shown.sort(key=lambda p: p[along])
    rates = [p['images_per_second'] for p in shown]
    middle = np.array([statistics.median(r) for r in rates])
    axes.errorbar(
      [p[along] for p in shown],
      middle,
      [middle - [min(r) for r in rates], [max(r) for r in rates] - middle],
      capsize=2,
      label=label,
      **plotting.marked_style(method),
    )
  axes.set_ylabel('images a second')


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

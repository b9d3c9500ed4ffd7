"""What XLA's CPU programs are slow at, and what is done about it here.

  python -m benchmarks.cpu_parts --out=docs/cpu_parts.json

Times gradients of single operations at batch 8, and whole training steps of
SkipInit, in float32: as JAX derives them, and as this package writes them for
CPUs; each as it is, with the flag that the programs of this package set, and
with the C library's huge pages too. Every measurement is a process; in each
round all settings take their turn, in a random order. Writes the milliseconds
of every round and prints medians, in brackets the least and the most.
"""

import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from benchmarks import peers
from benchmarks.cpu_loops import UNROLLED, recipe
from benchmarks.input_pipeline import machine
from benchmarks.throughput import our_step, spread
from skipinit_jax import cli
from skipinit_jax.files import write_json
from skipinit_jax.models.convolution import convolve
from skipinit_jax.models.pooling import max_pool
from skipinit_jax.training.devices import CPU_FLAG, CPU_VALUE
from skipinit_jax.training.result import versions

FLAG = {'XLA_FLAGS': f'{CPU_FLAG}=-{CPU_VALUE}'}
HUGE = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
SETTINGS = {'as it is': {}, 'flag': FLAG, 'flag, huge pages': FLAG | HUGE}
# What is timed: a convolution's kernel, sizes (side, inputs, outputs), or a
# pool's; or a recipe of `cpu_loops`.
PARTS = {
  '1x1 kernel, gradient, 64 to 256 channels, 56x56': (1, 56, 64, 256),
  '1x1 kernel, gradient, 1024 to 256 channels, 14x14': (1, 14, 1024, 256),
  '3x3 kernel, gradient, 64 channels, 56x56': (3, 56, 64, 64),
  '3x3 kernel, gradient, 256 channels, 14x14': (3, 14, 256, 256),
  'max-pool, gradient, 64 channels, 112x112': (0, 112, 64, 64),
  'ResNet-50, step of 8 images': 'resnet50:8',
  'WRN-16-4, step of 32 images': 'wrn16-4:32',
}


def make(part: tuple[int, ...] | str, ours: bool) -> Callable[[], Any]:
  """A function without arguments that is timed."""
  if isinstance(part, str):
    return our_step(recipe(part, UNROLLED), '' if ours else 'jax')
  size, side, inputs, outputs = part
  x = jax.random.normal(jax.random.key(0), (8, side, side, inputs))
  if size:
    conv = convolve if ours else peers.convolve_by_jax
    arg = jnp.ones((size, size, inputs, outputs))

    def forward(kernel: jax.Array, x: jax.Array) -> jax.Array:
      return conv(x, kernel, (1, 1), 'SAME')
  else:
    arg, pool = x, max_pool if ours else peers.max_pool_by_jax

    def forward(arg: jax.Array, x: jax.Array) -> jax.Array:
      del x
      return pool(arg, symmetric=False)

  def gradient(arg: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.vjp(lambda arg: forward(arg, x), arg)[1](y)[0]

  y = jax.random.normal(jax.random.key(1), forward(arg, x).shape)
  return functools.partial(jax.jit(gradient), arg, x, y)


def milliseconds(call: Callable[[], Any], seconds: float) -> float:
  """The median of as many calls as fit in that time, at least five."""
  jax.block_until_ready(call())
  times: list[float] = []
  while len(times) < 5 or sum(times) < seconds:
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)


def serve(seconds: float) -> None:
  """Times all parts in this process, and prints them."""
  times = {
    name: [milliseconds(make(part, ours), seconds) for ours in (False, True)]
    for name, part in PARTS.items()
  }
  print('figures', json.dumps(times))


def measure(
  rounds: int, seconds: float
) -> dict[str, dict[str, list[list[float]]]]:
  """Part -> setting -> rounds of (JAX's, ours), in milliseconds."""
  found = {name: {s: [] for s in SETTINGS} for name in PARTS}
  order = random.Random(0)
  names = [*SETTINGS]
  turns = [s for _ in range(rounds) for s in order.sample(names, len(names))]
  with tempfile.TemporaryDirectory() as cache:
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for setting in tqdm.tqdm(turns):
      done = subprocess.run(
        [
          sys.executable,
          '-m',
          'benchmarks.cpu_parts',
          '--serve',
          f'--seconds={seconds}',
        ],
        env=environment | SETTINGS[setting],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      times = json.loads(done.stdout.rpartition('figures ')[2])
      for name, pair in times.items():
        found[name][setting].append(pair)
  return found


def table(parts: dict[str, dict[str, list[list[float]]]]) -> str:
  heads = [f'{who}, {s}' for s in SETTINGS for who in ("JAX's", 'ours')]
  lines = [
    '| | ' + ' | '.join(heads) + ' |',
    '|---' * (len(heads) + 1) + '|',
  ]
  for name, settings in parts.items():
    cells = [
      spread([pair[i] for pair in settings[s]], 1)
      for s in SETTINGS
      for i in (0, 1)
    ]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=cli.number(int, 1, 10**6), default=5)
  parser.add_argument(
    '--seconds', type=cli.number(float, 0, 10**6), default=1, help='of a timing'
  )
  parser.add_argument('--out', type=cli.file)
  parser.add_argument('--serve', action='store_true', help='used by itself')
  args = parser.parse_args()
  if args.serve:
    serve(args.seconds)
    return
  if args.out is None:
    cli.refuse('--out is missing: the file to write')
  parts = measure(args.rounds, args.seconds)
  command = ' '.join(['python', '-m', 'benchmarks.cpu_parts', *sys.argv[1:]])
  write_json(
    args.out,
    {
      'command': command,
      'machine': machine(),
      'versions': versions(),
      'settings': SETTINGS,
      'parts': parts,
    },
  )
  print(table(parts))


if __name__ == '__main__':
  main()

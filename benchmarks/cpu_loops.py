"""Loops on a CPU: a scan, micro-batches and several steps a call.

  python -m benchmarks.cpu_loops --out=docs/cpu_loops.json

The training step of SkipInit in float32, unrolled and in each kind of loop; on
the digits also a scan with JAX's own gradients of convolutions. In each round
all take their turn, in a random order. Writes the milliseconds of a step in
every round and the seconds to the end of the first call, and prints medians,
and ratios to the unrolled step by round, in brackets the least and the most.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from benchmarks import peers
from benchmarks.input_pipeline import machine
from benchmarks.throughput import DATA, our_step, spread
from skipinit_jax import cli
from skipinit_jax.files import write_json
from skipinit_jax.training.devices import set_cpu_flag
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.result import versions

CASES = ('digits-40:256', 'wrn16-4:32', 'resnet50:8')
UNROLLED = 'unrolled'
LOOPS = {
  UNROLLED: {},
  'scan over blocks': {'model.scan': True},
  '4 micro-batches': {'micro_batches': 4},
  '8 steps a call': {'steps_per_call': 8},
  "scan, JAX's gradients": {'model.scan': True},
}


def recipe(case: str, loop: str) -> ConfigDict:
  name, batch_size = case.split(':')
  if name.startswith('digits'):
    config = load_recipe('digits')
    config.model.depth = int(name.removeprefix('digits-'))
    config.batch_size = int(batch_size)
  else:
    config = peers.recipe('skipinit', DATA[name], int(batch_size))
  config.model.scan = False
  return set_fields(config, LOOPS[loop])


def loops(case: str) -> list[str]:
  """The others have no data on the device, or would take minutes a step."""
  rest = ('8 steps a call', "scan, JAX's gradients")
  return [x for x in LOOPS if case.startswith('digits') or x not in rest]


def make_step(case: str, loop: str) -> tuple[Callable[[], Any], float]:
  """A function that makes the steps of one call, and seconds to compile it."""
  start = time.perf_counter()
  step = our_step(recipe(case, loop), 'jax' if 'JAX' in loop else '')
  return step, time.perf_counter() - start


def measure(case: str, rounds: int, seconds: float) -> dict[str, Any]:
  """Milliseconds of a step, by loop and round, and seconds of compiling."""
  made = {loop: make_step(case, loop) for loop in tqdm.tqdm(loops(case), case)}
  times: dict[str, list[float]] = {loop: [] for loop in made}
  order = random.Random(0)
  for _ in tqdm.trange(rounds, desc=case):
    for loop, (step, _) in order.sample(list(made.items()), len(made)):
      calls, start = 0, time.perf_counter()
      while calls < 2 or time.perf_counter() - start < seconds:
        jax.block_until_ready(step())
        calls += 1
      steps = calls * recipe(case, loop).steps_per_call
      times[loop].append(1e3 * (time.perf_counter() - start) / steps)
  compiling = {loop: round(seconds, 2) for loop, (_, seconds) in made.items()}
  return {'milliseconds': times, 'compile_seconds': compiling}


def table(cases: dict[str, dict[str, Any]]) -> str:
  lines = [
    '| | | ms a step | against unrolled | first step, s |',
    '|---|---|---|---|---|',
  ]
  for case, found in cases.items():
    base = found['milliseconds'][UNROLLED]
    for loop, times in found['milliseconds'].items():
      ratios = [a / b for a, b in zip(times, base, strict=True)]
      lines.append(
        f'| {case if loop == UNROLLED else ""} | {loop} '
        f'| {statistics.median(times):,.1f} | {spread(ratios, 2)} '
        f'| {found["compile_seconds"][loop]:.1f} |'
      )
  return '\n'.join(lines) + '\n'


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', nargs='+', choices=CASES, default=CASES)
  parser.add_argument('--rounds', type=cli.number(int, 1, 10**6), default=7)
  parser.add_argument(
    '--seconds', type=cli.number(float, 0, 10**6), default=3, help='of a timing'
  )
  parser.add_argument('--out', type=cli.file, required=True)
  args = parser.parse_args()
  set_cpu_flag()
  cases = {c: measure(c, args.rounds, args.seconds) for c in args.cases}
  command = ' '.join(['python', '-m', 'benchmarks.cpu_loops', *sys.argv[1:]])
  write_json(
    args.out,
    {
      'command': command,
      'machine': machine(),
      'versions': versions(),
      'cases': cases,
    },
  )
  print(table(cases))


if __name__ == '__main__':
  main()

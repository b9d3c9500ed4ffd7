"""All that README and docs want to say about a GPU, measured on one.

  python -m benchmarks.on_gpu --out=docs/on_gpu.json

Takes at most --minutes (8) on one GPU, and writes one file, after each part, so
that nothing is lost:

- speed: ResNet-50 and a Wide-ResNet against Flax's example and PyTorch (where
  torch is installed): images per second, memory, the host's share;
- deterministic: whether two processes that compile for themselves end with the
  same bits, with and without `deterministic=True`, and what that costs;
- packed: a small network (the CIFAR-10 recipe) in several processes at a time;
- vmap: several of its runs in one program, by `vmap` over their states;
- more rounds of `speed`, until the time is up.

Without a GPU it measures toy sizes, which say nothing but that it works.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import throughput
from skipinit_jax import cli, markdown
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.training import devices, program
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.recipes import load_recipe

# Cases and contenders of the part `speed`; others are held to the first.
SPEED = {
  'resnet50:256': ['example', 'skipinit', 'torch', 'batchnorm', 'micro4'],
  'wrn16-4:128': ['batchnorm', 'skipinit', 'calls8'],
}
TOY_SPEED = {'wrn16-4:2': ['batchnorm', 'skipinit']}
TOGETHER = (1, 4)  # Processes on a GPU, and runs in a program.
STEPS = 50  # After which bits are compared.


def small(toy: bool) -> ConfigDict:
  """The recipe of all parts but `speed`."""
  config = load_recipe('cifar10')
  if toy:
    config.model.depth, config.model.width, config.batch_size = 10, 1, 8
  return config


def steps_per_second(step: Callable[[], Any], seconds: float) -> float:
  """How often a compiled step runs, without a pause between steps."""

  def run(steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
      out = step()
    jax.block_until_ready(out)
    return time.perf_counter() - start

  run(2)
  steps = max(2, round(10 * seconds / run(10)))
  return steps / run(steps)


def serve_packed(config: ConfigDict, seconds: float, _: int) -> dict[str, Any]:
  """Steps a second, from when all processes are ready."""
  step = throughput.our_step(config)
  print('ready', flush=True)
  sys.stdin.readline()
  return {'steps_per_second': steps_per_second(step, seconds)}


def serve_vmap(config: ConfigDict, seconds: float, runs: int) -> dict[str, Any]:
  """Steps a second of so many runs in one program."""

  def of_runs(step, split, *args, **pmap_args):
    by_run = jax.vmap(step, in_axes=(0, *[None] * (len(split) - 1)))
    return devices.map_over_devices(by_run, split, *args, **pmap_args)

  data = stand_in(config.data)
  with mock.patch.object(program, 'map_over_devices', of_runs):
    made = program.make_program(config, data)
    create = jax.jit(jax.vmap(made.initial_state, (0, None)))
    state = [devices.replicate(create(jnp.arange(runs), peak_rate(config)))]
    images = np.zeros((data.train_size, np.prod(data.image_shape)), np.uint8)
    batch = devices.replicate((images, np.zeros(len(images), np.int32)))

    def step():
      message = devices.message()
      state[0], metrics = made.train_step(state[0], batch, message, 1)
      return metrics

    jax.block_until_ready(step())  # Traces the step inside the patch.
  return {'steps_per_second': runs * steps_per_second(step, seconds)}


def serve_deterministic(
  config: ConfigDict, seconds: float, steps: int
) -> dict[str, Any]:
  """A digest of the parameters after some steps, and steps a second."""
  step, state = throughput.our_run(config)
  digest = hashlib.sha256()
  for _ in range(steps):
    step()
  for leaf in jax.tree.leaves(jax.device_get(state[0].params)):
    digest.update(np.asarray(leaf).tobytes())
  return {
    'digest': digest.hexdigest(),
    'steps_per_second': steps_per_second(step, seconds),
  }


SERVE = {
  'deterministic': serve_deterministic,
  'packed': serve_packed,
  'vmap': serve_vmap,
}


class Others:
  """Starts parts in processes of their own.

  Attributes:
    toy: at toy size.
    seconds: of a timing.
    cache: folder of compiled programs and of what processes complain of.
    ends: when the time is up, by `time.monotonic`.
  """

  def __init__(self, toy: bool, seconds: float, cache: str, ends: float):
    self.toy, self.seconds, self.cache = toy, seconds, Path(cache)
    self.ends = ends

  def start(
    self,
    part: str,
    number: int,
    *,
    flags: str = '',
    share: float = 0.9,
    cache: str = 'programs',
  ) -> subprocess.Popen[str]:
    """A process that serves a part, with so much of the GPU's memory."""
    env = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(self.cache / cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{share:.2f}',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip(),
    }
    command = [sys.executable, '-m', 'benchmarks.on_gpu', '--serve', part]
    command += [str(number), f'--seconds={self.seconds}']
    # Not a pipe: one that nobody reads would stop a process that warns a lot.
    with tempfile.NamedTemporaryFile(
      'w', dir=self.cache, prefix='stderr-', delete=False
    ) as stderr:
      process = subprocess.Popen(
        command + ['--toy'] * self.toy,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
      )
    process.complaints = Path(stderr.name)  # pyright: ignore
    left = max(self.ends - time.monotonic(), 1)
    timer = threading.Timer(left, process.kill)  # Ends all waiting for it.
    timer.daemon = True
    timer.start()
    return process

  def deterministic(self) -> dict[str, Any]:
    """Two processes with the flag and two without, in turns.

    Each compiles and chooses algorithms for itself, as on two days.
    """
    flags = {'as usual': '', 'deterministic': devices.DETERMINISTIC}
    if self.toy:
      flags = dict.fromkeys(flags, '')  # CPUs are so anyway.
    found: dict[str, list] = {name: [] for name in flags}
    for i in range(2):
      for name, flag in flags.items():
        own = f'{name}-{i}'
        process = self.start('deterministic', STEPS, flags=flag, cache=own)
        found[name].append(figures(process))
    return found

  def packed(self) -> dict[str, Any]:
    """Steps a second of all processes together, by their number."""
    found = {}
    for n in TOGETHER:
      processes = [self.start('packed', n, share=0.9 / n) for _ in range(n)]
      for process in processes:
        while process.stdout and process.stdout.readline() not in (
          'ready\n',
          '',
        ):
          pass
      for process in processes:
        with contextlib.suppress(BrokenPipeError):  # It has ended.
          assert process.stdin
          process.stdin.write('go\n')
          process.stdin.flush()
      answers = [figures(process) for process in processes]
      errors = [a for a in answers if 'error' in a]
      rates = [a.get('steps_per_second', 0) for a in answers]
      found[n] = errors[0] if errors else {'steps_per_second': sum(rates)}
    return found

  def vmap(self) -> dict[str, Any]:
    """Steps a second of all runs together, by their number."""
    return {n: figures(self.start('vmap', n)) for n in TOGETHER}


def figures(process: subprocess.Popen[str]) -> dict[str, Any]:
  """What a process printed, or the line that says why not as `error`."""
  out = process.communicate()[0]
  for line in out.splitlines():
    if line.startswith('figures '):
      return json.loads(line.removeprefix('figures '))
  if process.returncode == -signal.SIGKILL:
    return {'error': 'the time was up'}
  stderr = process.complaints.read_text()  # pyright: ignore
  return {'error': throughput.complaint(stderr)}


def tables(report: dict[str, Any]) -> str:
  """Markdown of all parts that were measured."""
  out = []
  for part, name in (('packed', 'processes'), ('vmap', 'runs in a program')):
    if found := report.get(part):
      rows = [[name, 'steps a second, in all', 'against one']]
      one = next(iter(found.values()))
      for number, answer in found.items():
        rows.append([str(number), *_rates([answer], [one])])
      out.append(markdown.table(rows))
  if found := report.get('deterministic'):
    rows = [['', 'same bits twice', 'steps a second', 'against as usual']]
    for name, answers in found.items():
      digests = {a.get('digest') for a in answers}
      same = 'yes' if len(digests) == 1 and None not in digests else 'no'
      rows.append([name, same, *_rates(answers, found['as usual'])])
    out.append(markdown.table(rows))
  if found := report.get('speed'):
    out.append(throughput.table(found))
  return '\n'.join(out)


def _rates(answers: list[dict], base: list[dict]) -> list[str]:
  """Median steps a second, and relative to others'."""
  for answer in (*answers, *base):
    if 'error' in answer:
      return [f'did not run: {answer["error"][:80]}', '-']
  ours, theirs = (
    statistics.median(a['steps_per_second'] for a in all_)
    for all_ in (answers, base)
  )
  return [f'{ours:,.1f}', f'{ours / theirs:.2f}']


def speed(
  cases: dict[str, list[str]],
  results: dict[str, dict[str, list]],
  measure: Callable[[str, str], dict[str, Any]],
  ends: float,
) -> None:
  """Adds a round over all contenders to `results`.

  The first compiles. That is not timed, but takes memory, so its peak is left
  out; at the end of the time it is cut short. Later ones are of those that did
  not fail, and count whole or not at all.
  """
  first = not results
  made = {}
  for case, names in cases.items():
    for name in names:
      before = results.get(case, {}).get(name, [{'error': ''}])
      if first and time.monotonic() > ends and made:
        return
      if not first and 'error' in before[0]:
        continue
      found = measure(name, case)
      made[case, name] = found
      print(f'speed: {case} {name}', flush=True)
      if first:
        if 'error' not in found:
          found['peak_bytes'] = None
        results.setdefault(case, {})[name] = [found]
      elif 'error' in found:
        return
  if not first:
    for (case, name), found in made.items():
      results[case][name].append(found)


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=cli.number(float, 0, 1e4), default=8)
  parser.add_argument(
    '--seconds', type=cli.number(float, 1e-3, 1e4), help='of a timing'
  )
  parser.add_argument('--out', type=cli.file, default=Path('on_gpu.json'))
  parser.add_argument('--toy', action='store_true', help='as without a GPU')
  parser.add_argument('--serve', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    part, number = args.serve
    answer = SERVE[part](small(args.toy), args.seconds, int(number))
    print('figures', json.dumps(answer), flush=True)
    return
  ends = time.monotonic() + 60 * args.minutes
  # PyTorch's part uses one GPU, so all do.
  os.environ.setdefault('CUDA_VISIBLE_DEVICES', '0')
  if args.toy:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  with cli.errors_in_one_line():
    where = throughput.describe()
  toy = where['platform'] != 'gpu'
  if toy:
    print('toy sizes: these figures say nothing about a GPU', flush=True)
  seconds = args.seconds or (0.5 if toy else 3)
  report = where | {'toy': toy, 'versions': throughput.packages()}
  cases = TOY_SPEED if toy else SPEED
  if importlib.util.find_spec('torch') is None:
    print('without PyTorch, which is not installed', flush=True)
    cases = {
      case: [name for name in names if name != 'torch']
      for case, names in cases.items()
    }

  def keep(part: str, found: Any) -> None:
    report[part] = found
    args.out.write_text(json.dumps(report, indent=1) + '\n')

  with tempfile.TemporaryDirectory() as cache:
    others = Others(toy, seconds, cache, ends)
    results: dict[str, dict[str, list]] = {}

    def measure(name: str, case: str) -> dict[str, Any]:
      left = max(ends - time.monotonic(), 1)
      return throughput.measure(name, case, seconds, cache, left)

    def another_round() -> float:
      start = time.monotonic()
      speed(cases, results, measure, ends)
      keep('speed', results)
      return time.monotonic() - start

    another_round()
    for part in SERVE:
      if time.monotonic() < ends:
        keep(part, getattr(others, part)())
        print(f'{part}: done', flush=True)
    took = another_round() if time.monotonic() < ends else 0.0
    while took and time.monotonic() + took < ends:
      took = another_round()
  print(tables(json.loads(args.out.read_text())))


if __name__ == '__main__':
  main()

"""Images per second and memory of the training step, network by network.

  python -m benchmarks.throughput --out=docs/throughput

Runs on the GPUs, the TPU, or the CPU (with small batches) of this machine.
Every measurement is a process, which has the whole device; in each round all
networks take their turn. A first round fills the compilation cache and is
discarded. Steps are the real, pmapped ones, on images on the device. The host's
share is the time that a call takes to return while the device is idle. Writes
OUT.json (every round) and prints a table (medians, the least and the most).
PyTorch takes part where torch is installed.

Peak memory is the device allocator's; on a CPU, the resident memory of the
whole process.
"""

import argparse
import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from ml_collections import ConfigDict

from benchmarks import peers
from benchmarks.input_pipeline import machine
from skipinit_jax import cli
from skipinit_jax.ahead_of_time.chips import compilers
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.errors import InputError
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.devices import (
  ACCELERATORS,
  map_over_devices,
  message,
  replicate,
  set_cpu_flag,
  shard,
)
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import make_program
from skipinit_jax.training.result import versions

DATA = {'resnet50': 'imagenet2012', 'wrn16-4': 'cifar10'}
CASES = {
  'cpu': ['resnet50:8', 'wrn16-4:32'],
  'gpu': [
    'resnet50:128',
    'resnet50:256',
    'resnet50:512',
    'wrn16-4:128',
    'wrn16-4:1024',
  ],
  'tpu': ['resnet50:128', 'resnet50:512', 'wrn16-4:1024'],
}
# What each case is compared with.
BASES = {'resnet50': 'example', 'wrn16-4': 'batchnorm'}


def networks(case: str, platform: str) -> list[str]:
  """The contenders of a case.

  On a CPU batches are too small to cut, and `cpu_loops` measures loops; several
  steps per call need data on the device.
  """
  names = [n for n in peers.NETWORKS if n != 'jax' and '_micro' not in n]
  if importlib.util.find_spec('torch') is None or platform == 'tpu':
    names.remove('torch')
  if case.startswith('resnet50'):
    names = [n for n in names if not n.startswith('calls')]
  else:
    names = [n for n in names if n not in ('example', 'torch')]
  if platform == 'cpu':
    names = [n for n in names if not n.startswith(('micro', 'calls'))]
  return names


def our_step(config: ConfigDict, network: str = '') -> Callable[[], Any]:
  """Makes a function that starts a step of a recipe and returns its metrics."""
  return our_run(config, network)[0]


def our_run(
  config: ConfigDict, network: str = ''
) -> tuple[Callable[[], Any], list[Any]]:
  """Makes a function that starts a step of a recipe and returns its metrics.

  Returns:
    The function, and the list that holds the state of the run.
  """
  check_config(config, jax.device_count())
  data = stand_in(config.data)
  with peers.as_network(network):
    program = make_program(config, data)
    create = jax.jit(program.initial_state)
    state = [replicate(create(0, peak_rate(config)))]
    n = data.train_size if data.resident else config.batch_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *data.image_shape), dtype=np.uint8)
    labels = np.zeros(n, np.int32)
    if data.resident:
      batch = replicate((images.reshape(n, -1), labels))
    else:
      batch = shard((images, labels))

    def step():
      count = config.steps_per_call
      state[0], metrics = program.train_step(state[0], batch, message(), count)
      return metrics

    jax.block_until_ready(step())  # Traces the step inside `as_network`.
  return step, state


def example_step(batch_size: int) -> Callable[[], Any]:
  """Makes a function that starts a step of Flax's example."""
  dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  model = peers.ExampleResNet50(dtype)
  tx = optax.sgd(0.1, 0.9, nesterov=True)
  create = functools.partial(peers.example_state, model, tx)
  state = [replicate(jax.jit(create)())]
  images = np.random.default_rng(0).normal(size=(batch_size, *peers.IMAGE))
  batch = shard((images.astype(dtype), np.zeros(batch_size, np.int32)))
  mapped = map_over_devices(
    functools.partial(peers.example_step, model=model, tx=tx),
    (False, True, True),
    donate_argnums=0,
  )

  def step():
    state[0], top1 = mapped(state[0], *batch)
    return top1

  return step


def time_here(network: str, case: str, seconds: float) -> dict[str, float]:
  """Images per second, peak memory and host time of one network, here."""
  model, batch_size = case.split(':')
  images, wait = int(batch_size), jax.block_until_ready
  if network == 'torch':
    from benchmarks import torch_resnet

    step = torch_resnet.make_step(images, peers.IMAGE[0], peers.CLASSES)
    wait = torch_resnet.wait
  elif network == 'example':
    step = example_step(images)
  else:
    set_cpu_flag()  # As our programs do.
    config = peers.recipe(network, DATA[model], images)
    step = our_step(config, network)
    images *= config.steps_per_call

  def run(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      out = step()
    wait(out)
    return time.perf_counter() - start

  run(2)
  calls = max(2, round(seconds / run(1)))
  elapsed = run(calls)
  start = time.perf_counter()
  out = step()  # Returns once the step is dispatched.
  host = time.perf_counter() - start
  wait(out)
  return {
    'images_per_second': images * calls / elapsed,
    'step_seconds': elapsed * int(batch_size) / (images * calls),
    'host_seconds': host * int(batch_size) / images,
    'peak_bytes': peak_bytes(network),
  }


def peak_bytes(network: str) -> int:
  if network == 'torch':
    from benchmarks import torch_resnet

    if torch_resnet.CUDA:
      return torch_resnet.peak_bytes()
  elif stats := jax.local_devices()[0].memory_stats():
    return stats['peak_bytes_in_use']
  status = Path('/proc/self/status').read_text()
  line = next(x for x in status.splitlines() if x.startswith('VmHWM'))
  return 1024 * int(line.split()[1])


def measure(
  network: str,
  case: str,
  seconds: float,
  cache: str,
  timeout: float | None = None,
) -> dict[str, Any]:
  """`time_here` in another process; `error` if it did not fit, or in time."""
  command = [
    sys.executable,
    '-m',
    'benchmarks.throughput',
    '--serve',
    network,
    case,
    '--seconds',
    str(seconds),
  ]
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'TORCHINDUCTOR_CACHE_DIR': f'{cache}/torch',
  }
  try:
    done = subprocess.run(
      command,
      env=env,
      capture_output=True,
      text=True,
      check=False,
      timeout=timeout,
    )
  except subprocess.TimeoutExpired:
    return {'error': 'the time was up'}
  for line in done.stdout.splitlines():
    if line.startswith('figures '):
      return json.loads(line.removeprefix('figures '))
  return {'error': complaint(done.stderr)}


def complaint(stderr: str) -> str:
  """The line of a process's standard error that says why it ended."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  lines = [x for x in lines if 'JAX has removed' not in x and x.strip('-')]
  memory = [x for x in lines if 'memory' in x or 'EXHAUSTED' in x]
  return ([*lines, 'no output'] if not lines else memory or lines)[-1][:300]


def run(
  cases: list[str], platform: str, rounds: int, seconds: float
) -> dict[str, Any]:
  """All cases; every round's figures by case and network."""
  work = [
    (i, case, network)
    for case in cases
    for i in range(-1, rounds)  # The first round compiles.
    for network in networks(case, platform)
  ]
  results: dict[str, dict[str, list]] = {case: {} for case in cases}
  with tempfile.TemporaryDirectory() as cache:
    for i, case, network in (bar := tqdm.tqdm(work, unit='run')):
      bar.set_postfix_str(f'{case} {network}, round {i + 1}')
      runs = results[case].setdefault(network, [])
      if runs and 'error' in runs[0]:
        continue
      figures = measure(network, case, seconds, cache)
      if i >= 0 or 'error' in figures:
        runs.append(figures)
  return results


def spread(values: list[float], digits: int = 0) -> str:
  low, middle, high = min(values), statistics.median(values), max(values)
  return f'{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})'


def table(results: dict[str, dict[str, list]]) -> str:
  """Markdown: medians over the rounds, in brackets the least and the most."""
  lines = [
    '| | network | images a second | against the first | peak memory, GB | '
    'host, ms a step |',
    '|---|---|---|---|---|---|',
  ]
  for case, contenders in results.items():
    model, batch_size = case.split(':')
    base = BASES[model]
    names = sorted(contenders, key=lambda name: name != base)
    for name in names:
      runs = contenders[name]
      where = f'{model}, batch {batch_size}' if name == base else ''
      if error := _error(runs):
        cells = f'did not run: {error[:80]} | - | - | -'
      else:
        rates = [r['images_per_second'] for r in runs]
        digits = 1 if max(rates) < 100 else 0
        ratio = '-'
        if not _error(contenders[base]):
          pairs = zip(runs, contenders[base], strict=True)
          ratio = spread(
            [a['images_per_second'] / b['images_per_second'] for a, b in pairs],
            2,
          )
        peaks = [r['peak_bytes'] for r in runs if r['peak_bytes']]
        memory = f'{statistics.median(peaks) / 1e9:.2f}' if peaks else '-'
        host = 1e3 * statistics.median(r['host_seconds'] for r in runs)
        cells = f'{spread(rates, digits)} | {ratio} | {memory} | {host:.1f}'
      lines.append(f'| {where} | {peers.NETWORKS[name]} | {cells} |')
  return '\n'.join(lines) + '\n'


def _error(runs: list[dict[str, Any]]) -> str:
  """What ended any of these runs; empty if nothing did."""
  return next((run['error'] for run in runs if 'error' in run), '')


def describe() -> dict[str, Any]:
  """The platform and its devices, from a process that then releases them.

  Raises:
    InputError: JAX does not start, or does not see the machine's accelerator.
  """
  code = (
    'import jax; d = jax.devices(); '
    'print(d[0].platform, len(d), "x", d[0].device_kind)'
  )
  command = [sys.executable, '-c', code]
  answer = subprocess.run(command, capture_output=True, text=True, check=False)
  if answer.returncode:
    raise InputError(f'JAX finds no device: {complaint(answer.stderr)}')
  platform, _, device = answer.stdout.strip().partition(' ')
  there = next((k for k in ACCELERATORS if glob.glob(k)), '')
  if platform == 'cpu' and there and os.environ.get('JAX_PLATFORMS') != 'cpu':
    kind, install = ACCELERATORS[there]
    raise InputError(
      f'this machine has a {kind}, but JAX sees only the CPU (is it in use?): '
      f'{install}, or measure the CPU with JAX_PLATFORMS=cpu'
    )
  return {
    'platform': platform,
    'device': machine() if platform == 'cpu' else device,
  }


def packages() -> dict[str, str]:
  """The versions of all that takes part."""
  found = versions() | compilers()
  if importlib.util.find_spec('torch'):
    found['torch'] = importlib.metadata.version('torch')
  return found


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', nargs='+', help='such as resnet50:128')
  parser.add_argument('--rounds', type=cli.number(int, 1, 10**6), default=5)
  parser.add_argument(
    '--seconds',
    type=cli.number(float, 1e-3, 10**6),
    default=5,
    help='of a timing',
  )
  parser.add_argument('--out', type=cli.file, default=Path('throughput'))
  parser.add_argument('--serve', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    print('figures', json.dumps(time_here(*args.serve, args.seconds)))
    return
  with cli.errors_in_one_line():
    report = describe() | {'versions': packages()}
  cases = args.cases or CASES[report['platform']]
  for case in cases:
    model, _, batch_size = case.partition(':')
    if model not in DATA or not batch_size.isdecimal():
      parser.error(
        f'--cases {case!r}: expected {" or ".join(DATA)}, :, a batch'
      )
  report['cases'] = run(cases, report['platform'], args.rounds, args.seconds)
  text = json.dumps(report, indent=1) + '\n'
  args.out.with_suffix('.json').write_text(text)
  print(table(report['cases']))


if __name__ == '__main__':
  main()

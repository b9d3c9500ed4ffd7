"""Small training runs, in this process and in others, for the tests."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from skipinit_jax.ahead_of_time import chips
from skipinit_jax.training.metrics import TIMINGS, read_metrics

ROOT = Path(__file__).resolve().parents[1]

# Every kind of state: batch statistics, averages, Dropout, momentum.
TINY = (
  '--config=synthetic',
  '--config.model.depth=10',
  '--config.model.method=batchnorm',
  '--config.model.dropout=0.2',
  '--config.ema_decay=0.9',
  '--config.ema_warmup=True',
  '--config.data.shift=1',
  '--config.epochs=6',
  '--config.checkpoint_every_steps=5',
  '--config.log_every_steps=3',
)


def xla_flags(devices):
  """Flags for fake devices, and for programs that run for a moment.

  Most of the time of tests goes into compiling, so LLVM does little; with
  TEST_OPTIMIZE=1 they run the machine code that users run.
  """
  flags = [f'--xla_force_host_platform_device_count={devices}']
  if os.environ.get('TEST_OPTIMIZE') != '1':
    flags += [
      '--xla_backend_optimization_level=0',
      '--xla_llvm_disable_expensive_passes=true',
      '--xla_cpu_use_fusion_emitters=false',
    ]
  return ' '.join(flags)


def start(workdir, *flags, devices=1, **environment):
  """Starts `train.py` on fake devices."""
  return subprocess.Popen(
    [sys.executable, str(ROOT / 'train.py'), f'--workdir={workdir}', *flags],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': xla_flags(devices), **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(workdir, *flags, heartbeat=15):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return [
    start(
      workdir,
      *flags,
      f'--coordinator=localhost:{port}',
      '--num-processes=2',
      f'--heartbeat-seconds={heartbeat}',
      f'--process-id={i}',
      devices=2,
    )
    for i in range(2)
  ]


def finish(process, timeout=300):
  """Waits; returns (exit status, standard output, standard error)."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  return process.returncode, out, err


def run(workdir, *flags, **kwargs):
  """Runs `train.py` to its end, which must be a good one."""
  status, out, err = finish(start(workdir, *flags, **kwargs))
  assert status == 0, err
  return out, err


def wait_for(condition, process, timeout=600):
  """Waits until `condition()` holds while `process` runs."""
  end = time.monotonic() + timeout
  while not condition():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < end, 'waited too long'
    time.sleep(0.01)


def metric_lines(workdir):
  """All lines of metrics but their timings."""
  return [
    {k: v for k, v in line.items() if k not in TIMINGS}
    for line in read_metrics(Path(workdir))
  ]


def last_state(workdir):
  """The arrays of the newest checkpoint, by name."""
  import orbax.checkpoint as ocp

  folder = Path(workdir) / 'checkpoints'
  step = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
  tree = ocp.StandardCheckpointer().restore(
    (folder / str(step) / 'state').absolute()
  )
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def listing(workdir):
  """Every path with its time, size and bytes."""
  return {
    str(p.relative_to(workdir)): (
      p.lstat().st_mtime_ns,
      p.lstat().st_size,
      p.read_bytes() if p.is_file() and not p.is_symlink() else None,
    )
    for p in workdir.rglob('*')
  }


def assert_same_run(workdir, other):
  """Bitwise the same state, metrics and result."""
  ours, theirs = last_state(workdir), last_state(other)
  assert ours.keys() == theirs.keys()
  for name, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)
  assert metric_lines(workdir) == metric_lines(other)
  results = [
    json.loads((Path(w) / 'result.json').read_text()) for w in (workdir, other)
  ]
  for result in results:
    del result['seconds']
  assert results[0] == results[1]


class Bucket(MemoryFileSystem):
  """A bucket in memory, where etils looks for Google's."""

  protocol = ('gs', 'gcs')

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix('gs://'))


def empty_bucket():
  """The address of a bucket with nothing in it."""
  fsspec.register_implementation('gcs', Bucket, clobber=True)
  Bucket.store.clear()
  return 'gs://bucket'


@functools.cache
def _of_the_page():
  page = (ROOT / 'docs' / 'how_it_works.md').read_text()
  (block,) = re.findall(
    r'^```python\n([^`]*^def map_over_devices.*?)^```', page, re.M | re.S
  )
  found = {}
  exec(compile(block, 'how_it_works.md', 'exec'), found)
  return found['map_over_devices']


def by_shard_map(*args, **kwargs):
  """`devices.map_over_devices` as the page on how it works would write it."""
  return _of_the_page()(*args, **kwargs)


def by_compiler(topology, code, *args):
  """What `code` prints as JSON, in a process of its own.

  Skips the test without the compiler for the topology: libtpu is among the
  development requirements, CUDA's (`jax[cuda13]`, 5 GB) is not.
  """
  gpu = chips.platform_of(topology) == 'gpu'
  if gpu and not {*chips.CUDA_PACKAGES} & {*chips.compilers()}:
    pytest.skip('needs jax[cuda13] or jax[cuda12]')
  if not gpu:
    pytest.importorskip('libtpu')
  done = subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)

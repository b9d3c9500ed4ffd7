"""Four CPU devices, and numerics that forgive nothing."""

import atexit
import importlib
import os
import random
import shutil
import subprocess
import tempfile
from collections import defaultdict

# Before JAX is imported, also for the programs that tests start.
os.environ['JAX_PLATFORMS'] = 'cpu'
# What one worker has compiled is read by the other.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'])
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest
from runs import xla_flags

from skipinit_jax.training.devices import set_cpu_flag

# TEST_DEVICES=1 runs everything on one device.
os.environ['XLA_FLAGS'] = xla_flags(os.environ.get('TEST_DEVICES', '4'))
set_cpu_flag()  # As the programs do, which tests compare with.
jax.devices()
os.environ['XLA_FLAGS'] = ''  # The TPU compiler knows fewer.
jax.config.update('jax_numpy_rank_promotion', 'raise')


def seed():
  """TEST_SEED, or the commit's hash: each commit draws other cases."""
  command = ['git', 'rev-parse', 'HEAD']
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return os.environ.get('TEST_SEED', '')
  return os.environ.get('TEST_SEED', done.stdout.strip())


def pytest_report_header():
  return f'TEST_SEED={seed()}'


@pytest.hookimpl(tryfirst=True)  # Before slow tests are left out.
def pytest_collection_modifyitems(items):
  """Of a test or a file marked `sampled(n)` all cases but n count as slow."""
  groups = defaultdict(list)
  for item in items:
    for node, mark in item.iter_markers_with_node('sampled'):
      groups[node.nodeid.partition('[')[0], mark.args[0]].append(item)
  # The cases of a test first, then the tests of a file.
  for name, number in sorted(groups, key=lambda group: '::' not in group[0]):
    cases = [
      case
      for case in groups[name, number]
      if not case.get_closest_marker('slow')
    ]
    rng = random.Random(f'{seed()} {name}')  # Whatever else is collected.
    for case in rng.sample(cases, max(0, len(cases) - number)):
      case.add_marker(pytest.mark.slow)


def pytest_configure(config):
  # A test that ends its worker is named and ends the session. By default the
  # worker is replaced, which then may wait for ever (pytest-xdist, issue 784).
  config.option.maxworkerrestart = '0'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """All tests of a file on one worker: what they share is made once."""
  config.option.loadscopereorder = False  # Many tests are not a long time.
  return importlib.import_module('xdist.scheduler').LoadFileScheduling(
    config, log
  )


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """Files share few programs, and a worker keeps gigabytes of them."""
  yield
  jax.clear_caches()

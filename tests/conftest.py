"""Four CPU devices, and numerics that forgive nothing."""

import atexit
import importlib
import os
import shutil
import tempfile

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

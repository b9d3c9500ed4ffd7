"""Four CPU devices, and numerics that forgive nothing."""

import atexit
import importlib
import os
import shutil
import tempfile

# Before JAX is imported, for all workers and the programs that tests start.
# TEST_DEVICES=1 runs everything on one device, TEST_OPTIMIZE=1 the machine code
# that users run: most of the time goes into compiling, so LLVM does little, and
# what one worker has compiled is read by the others.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  flags = [os.environ.get('XLA_FLAGS', '')]
  if os.environ.get('TEST_OPTIMIZE') != '1':
    flags += [
      '--xla_backend_optimization_level=0',
      '--xla_llvm_disable_expensive_passes=true',
    ]
  devices = os.environ.get('TEST_DEVICES', '4')
  flags += [f'--xla_force_host_platform_device_count={devices}']
  os.environ['XLA_FLAGS'] = ' '.join(flags)
os.environ['JAX_PLATFORMS'] = 'cpu'
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'])
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest

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

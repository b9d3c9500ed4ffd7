"""Four CPU devices, and numerics that forgive nothing."""

import importlib
import os

# Before JAX is imported. TEST_DEVICES=1 runs everything on one.
devices = os.environ.get('TEST_DEVICES', '4')
flags = os.environ.get('XLA_FLAGS', '')
os.environ['XLA_FLAGS'] = (
  f'{flags} --xla_force_host_platform_device_count={devices}'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """All tests of a file on one worker: what they share is made once."""
  config.option.loadscopereorder = False  # Many tests are not a long time.
  return importlib.import_module('xdist.scheduler').LoadFileScheduling(
    config, log
  )

"""What a step would cost elsewhere: figures, searches, bad input."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from runs import by_compiler

from configs import cifar10, digits
from skipinit_jax.ahead_of_time import __main__ as command_line
from skipinit_jax.ahead_of_time import chips, measure
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.errors import InputError
from skipinit_jax.models import WideResNet

ROOT = Path(__file__).resolve().parents[1]
CHIP = chips.Chip(flops=1e12, bandwidth=1e11, capacity=2**30)


def here(cores=1):
  """The test's CPU devices, as if they were a slice."""
  devices = tuple(jax.devices())
  if len(devices) % cores:
    pytest.skip('needs two devices')
  return chips.Slice('cpu:4', CHIP, len(devices) // cores, 1, devices)


def recipe(**fields):
  config = digits.get_config()
  config.model.depth = 10
  config.batch_size = 8 * jax.device_count()
  config.eval_batch_size = 8 * jax.device_count()
  config.update(fields)
  return config


@pytest.fixture(scope='module')
def measured():
  return measure.measure(recipe(), here())


def test_figures_are_all_there(measured):
  fields = """chips hosts batch_per_chip micro_batches trace_seconds
  compile_seconds flops bytes_accessed hbm_bytes activation_bytes
  parameter_bytes optimizer_bytes hbm_capacity_bytes fits compute_seconds
  memory_seconds images_per_second_bound collective_bytes"""
  assert set(fields.split()) <= set(measured)
  assert measured['fits']
  assert measured['batch_per_chip'] == 8


def test_bytes_of_the_state_are_those_of_the_state(measured):
  model = WideResNet(10, 1, biases=True)
  images = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images)
  params = 4 * sum(x.size for x in jax.tree.leaves(variables['params']))
  assert measured['parameter_bytes'] == params
  # Momentum alone: the count of steps is the state's own.
  assert measured['optimizer_bytes'] == params
  # Each device hands its whole gradient to the others.
  if jax.device_count() > 1:
    assert params <= measured['collective_bytes'] < params + 1000


def test_bound_is_the_slower_of_computing_and_memory(measured):
  assert measured['compute_seconds'] == measured['flops'] / CHIP.flops
  assert measured['memory_seconds'] == measured['hbm_bytes'] / CHIP.bandwidth
  slower = max(measured['compute_seconds'], measured['memory_seconds'])
  assert measured['images_per_second_bound'] == 8 / slower


def test_two_devices_a_chip_add_up():
  def step(x):
    return jax.lax.psum(x @ x, 'i')

  once, twice = here(), here(cores=2)
  mapped = jax.pmap(step, 'i', devices=once.devices)
  x = jax.ShapeDtypeStruct((len(once.devices), 64, 64), np.float32)
  a, b = (measure.cost(mapped, (x,), where) for where in (once, twice))
  assert a['flops'] == 2 * 64**3
  for field in (
    'flops',
    'hbm_bytes',
    'bytes_accessed',
    'collective_bytes',
    'activation_bytes',
    'compute_seconds',
    'memory_seconds',
  ):
    assert b[field] == 2 * a[field], field


def test_automatic_dtype_and_scan_are_those_of_the_chip():
  pytest.importorskip('libtpu')
  config = recipe()
  config.model.depth = 244
  data, where = stand_in(config.data), chips.topology('v5e:2x2')
  model = measure.make_program(config, data, where.devices).model
  assert (model.dtype, model.scan) == ('bfloat16', True)


@pytest.mark.slow
def test_a_batch_is_chosen_without_touching_the_whole_data_set():
  pytest.importorskip('libtpu')
  config = cifar10.get_config()
  config.model.depth, config.model.width = 10, 1
  config.batch_size = 4 * 32
  result = measure.measure(config, chips.topology('v5e:2x2'), evaluation=False)
  images = 50_000 * 32 * 32 * 3
  assert result['peak_bytes'] > images
  assert result['hbm_bytes'] < images / 5
  assert result['activation_bytes'] < images / 5


def test_batch_that_does_not_divide_is_an_error():
  if jax.device_count() == 1:
    pytest.skip('needs several devices')
  config = recipe()
  config.batch_size = 8 * jax.device_count() + 1
  with pytest.raises(InputError, match='does not divide over'):
    measure.measure(config, here())


OOM = (
  'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the '
  'total memory required for HLO temporaries (20.25G) exceeds available HBM '
  '(15.75G). HLO module: jit__fun.\nSee elsewhere.'
)


class Refused:
  """A step, lowered, that its compiler refuses."""

  def __init__(self, message):
    self.message = message

  def lower(self, *_):
    return self

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_step_that_does_not_fit_says_by_how_much():
  result = measure.cost(Refused(OOM), (), here())
  assert not result['fits']
  assert result['over_bytes'] == 4.5 * 2**30
  assert result['hbm_bytes'] is None
  line = measure.remedy(
    result | {'topology': 'v5e:2x2'}, recipe(micro_batches=2)
  )
  assert '4.50 GiB more' in line
  assert '--config.micro_batches=4' in line


def test_another_error_of_the_compiler_is_one_line():
  with pytest.raises(
    InputError, match=r'refuses this step: UNIMPLEMENTED: no$'
  ):
    measure.cost(Refused('UNIMPLEMENTED: no\nmore'), (), here())


def fake(limit):
  """`measure`, where so many images a device and micro-batch fit."""

  def measured(config, where, *, evaluation):
    assert not evaluation
    share = config.batch_size // len(where.devices)
    if share % config.micro_batches:
      raise InputError('does not divide')
    return {
      'fits': share // config.micro_batches <= limit,
      'share': share,
      'micro_batches': config.micro_batches,
      # Cheapest at two micro-batches.
      'images_per_second_bound': {1: 1, 2: 4, 4: 3, 8: 2}[config.micro_batches],
    }

  return measured


@pytest.mark.parametrize('limit', [1, 32, 33, 500])
@pytest.mark.parametrize('start', [1, 24, 64])
def test_find_batch_is_the_largest_power_of_two_that_fits(
  monkeypatch, limit, start
):
  monkeypatch.setattr(measure, 'measure', fake(limit))
  config = recipe(batch_size=start * jax.device_count())
  batch, tried = measure.find_batch(config, here())
  share = batch // jax.device_count()
  assert share <= limit < 2 * share
  assert share.bit_count() == 1
  assert len({t['share'] for t in tried}) == len(tried)


def test_find_batch_where_nothing_fits(monkeypatch):
  monkeypatch.setattr(measure, 'measure', fake(0))
  assert measure.find_batch(recipe(), here())[0] == 0


def test_find_micro_batches_marks_the_cheapest(monkeypatch):
  monkeypatch.setattr(measure, 'measure', fake(100))
  results = measure.find_micro_batches(recipe(), here())
  assert [r['micro_batches'] for r in results] == [1, 2, 4, 8]
  assert [r['cheapest'] for r in results] == [False, True, False, False]
  config = recipe(batch_size=4 * jax.device_count())  # 8 would be too many.
  results = measure.find_micro_batches(config, here())
  assert [r['micro_batches'] for r in results] == [1, 2, 4]


def test_batchnorm_over_a_device_refuses_micro_batches(monkeypatch):
  config = recipe()
  config.model.method = 'batchnorm'
  config.model.statistics_group = 'device'
  config.micro_batches = 2
  with pytest.raises(InputError, match='would change what'):
    measure.measure(config, here())


def test_unknown_chip_and_topology_name_those_that_exist():
  with pytest.raises(InputError, match=r"'v5x'; did you mean 'v5.'\? \(one of"):
    chips.topology('v5x:2x2')
  with pytest.raises(InputError, match=r"'v5e:3x3'.*v5e:2x2, v5e:2x4"):
    chips.topology('v5e:3x3')
  with pytest.raises(InputError, match="unknown topology 'v4'"):
    chips.topology('v4')


@pytest.mark.parametrize(
  ('name', 'line'),
  [
    ('h100s', "unknown chip 'h100s'; did you mean 'h100'"),
    ('xh100', "unknown chip 'xh100'; did you mean 'h100'"),
    ('h100x0', "'h100x0': expected h100x1 to h100x8, or a multiple of 8"),
    ('h100x12', "'h100x12': expected h100x1 to h100x8, or a multiple of 8"),
    ('h100x' + 5000 * '1', 'unknown chip'),
    ('h100:8', "'h100:8': expected h100x1 to h100x8"),
    ('v5ex4', "unknown topology 'v5ex4'.*v5e:2x2"),
  ],
)
def test_unknown_gpus_and_counts_say_what_there_is(name, line):
  with pytest.raises(InputError, match=line):
    chips.topology(name)


@pytest.mark.parametrize(
  ('versions', 'line'),
  [
    ({}, r'compiling for a GPU needs its compiler: pip install .jax\[cuda13\]'),
    ({'jax-cuda12-pjrt': '0.4.0'}, 'jax-cuda12-pjrt 0.4.0 does not go with'),
    ({'jax-cuda13-pjrt': '0.10.1'}, 'expected jax-cuda13-pjrt 0.10.2'),
  ],
)
def test_the_cuda_compiler_is_there_and_as_new_as_jaxlib(
  monkeypatch, versions, line
):
  def version(package):
    if package not in versions:
      raise importlib.metadata.PackageNotFoundError(package)
    return versions[package]

  versions = versions | {'jaxlib': '0.10.2'}
  monkeypatch.setattr(importlib.metadata, 'version', version)
  with pytest.raises(InputError, match=line):
    chips.topology('h100x8')


def test_gpus_are_described_as_the_compiler_asks(monkeypatch):
  """XLA's text for an H100 has these values, to four digits."""
  text = chips.GPUS['h100'].description()
  for field in (
    'threads_per_block_limit: 1024',
    'shared_memory_per_core: 233472',
    'shared_memory_per_block_optin: 232448',
    'core_count: 132',
    'fpus_per_core: 128',
    'l2_cache_size: 52428800',
    'clock_rate_ghz: 1.98',
    'memory_bandwidth: 3352000000000',
    'device_memory_size: 84940000000',
    'threads_per_core_limit: 2048',
    'cuda_compute_capability { major: 9 minor: 0 }',
    'device_description_str: "NVIDIA H100 80GB HBM3"',
  ):
    assert field in text
  asked = {}

  def describe(**options):
    asked.update(options)
    return mock.Mock(
      devices=[mock.Mock(process_index=i // 8) for i in range(16)]
    )

  monkeypatch.setattr(chips, '_check_cuda', lambda: None)
  monkeypatch.setattr(chips.topologies, 'get_topology_desc', describe)
  monkeypatch.setenv('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '')
  where = chips.topology('h100x16')
  assert (where.chips, where.hosts, where.cores) == (16, 2, 1)
  assert asked['topology'] == '1x2x8'
  assert asked['target_config'] == text


def test_a_step_that_jax_has_no_memory_for_says_how_to_have_more(measured):
  gpu = measured | {
    'topology': 'l4x1',
    'hbm_capacity_bytes': 24e9,
    'usable_bytes': 18e9,
    'over_bytes': 2**31,
  }
  line = measure.remedy(gpu, recipe())
  assert '2.00 GiB more than JAX takes of the memory' in line
  assert 'a GPU of l4x1 has (22.4 GiB)' in line
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75' in line
  assert '--config.micro_batches=2' in line


@pytest.mark.sampled(3)
@pytest.mark.parametrize('name', [*(f'{g}x2' for g in chips.GPUS), 'h100x16'])
def test_every_gpu_is_one_that_the_compiler_takes(name):
  code = """
import sys, jax
jax.config.update('jax_platforms', 'cpu')
from skipinit_jax.ahead_of_time import chips, measure
where = chips.topology(sys.argv[1])
step = jax.pmap(
  lambda x: jax.lax.psum(x @ x, 'i'), 'i', devices=where.devices)
x = jax.ShapeDtypeStruct((where.chips, 512, 512), 'float32')
cost = measure.cost(step, (x,), where)
import json; print(json.dumps([where.chips, where.hosts, cost]))
"""
  number, hosts, cost = by_compiler(name, code, name)
  assert (number, hosts) == ((16, 2) if name == 'h100x16' else (2, 1))
  assert cost['flops'] == 2 * 512**3
  assert cost['fits']
  assert cost['collective_bytes'] == 4 * 512**2
  assert cost['workspace_bytes'] is None


def test_missing_libtpu_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match='pip install libtpu'):
    chips.topology('v5e:2x2')


def test_libtpu_held_by_another_process_is_one_line(monkeypatch):
  def held(**_):
    raise jax.errors.JaxRuntimeError(
      'ABORTED: The TPU is already in use by another process probably owned by '
      'another user. Run "$ sudo lsof -w /dev/accel0".\nmore'
    )

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(chips.topologies, 'get_topology_desc', held)
  for name in chips.TPU_ENVIRONMENT:
    monkeypatch.setenv(name, '')
  with pytest.raises(InputError, match='another process holds libtpu') as info:
    chips.topology('v5e:2x2')
  assert '\n' not in str(info.value)


def test_table_marks_what_does_not_fit(measured):
  rows = command_line.table(
    [
      measured | {'cheapest': True},
      measured | {'fits': False, 'over_bytes': 1.5 * 2**30},
    ]
  ).splitlines()
  assert rows[1].endswith('<- cheapest')
  assert 'does not fit, by 1.50 GiB' in rows[2]


def run(*args, timeout=300):
  command = [sys.executable, '-m', 'skipinit_jax.ahead_of_time']
  return subprocess.run(
    [*command, *args],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def test_command_line_prints_and_writes_figures(tmp_path):
  pytest.importorskip('libtpu')
  file = tmp_path / 'figures.json'
  done = run(
    '--config=digits',
    '--config.model.depth=10',
    '--topology=v5e:2x2',
    f'--json={file}',
  )
  assert done.returncode == 0, done.stderr
  figures = json.loads(file.read_text())
  assert (figures['chips'], figures['hosts']) == (4, 1)
  assert figures['evaluation']['fits']
  for name in figures:
    assert name in done.stdout
  # Each of the eight images: a forward pass and twice as much backward.
  rows = digits.get_config().eval_batch_size // 4
  each = figures['evaluation']['flops'] / rows
  np.testing.assert_allclose(figures['flops'] / 8, 3 * each, rtol=0.05)


def test_command_line_says_that_a_step_does_not_fit(tmp_path):
  pytest.importorskip('libtpu')
  file = tmp_path / 'figures.json'
  done = run(
    '--config=synthetic',
    '--config.model.depth=10',
    '--config.data.height=64',
    '--config.data.width=64',
    '--config.data.train_size=3000000',  # 37 GB on devices of 16 GiB.
    f'--json={file}',
  )
  assert done.returncode == 1, done.stderr
  assert 'does not fit' in done.stderr
  assert done.stderr.count('\n') == 1
  figures = json.loads(file.read_text())
  assert not figures['fits']
  assert figures['over_bytes'] > 3e6 * 64 * 64 * 3 - 2**34


@pytest.mark.slow
def test_find_micro_batches_on_the_command_line(tmp_path):
  pytest.importorskip('libtpu')
  done = run(
    '--config=digits', '--config.model.depth=10', '--find-micro-batches'
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('cheapest') == 1
  assert len(done.stdout.splitlines()) == 5

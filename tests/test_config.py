"""Recipes that can't run are refused in one line with the remedy."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import METHODS, Method
from skipinit_jax.training import devices, processes
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.config import default_config
from skipinit_jax.training.describe import less_memory
from skipinit_jax.training.network import build_method, build_model
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.timetable import epochs_to_steps


def recipe(changes=None, /, **fields):
  """The defaults with a batch of 32, and changes by dotted name."""
  config = default_config()
  config.batch_size = 32
  config.update_from_flattened_dict({**(changes or {}), **fields})
  return config


def refused(function, *args):
  """The message of the InputError, which must be one line."""
  with pytest.raises(InputError) as error:
    function(*args)
  message = str(error.value)
  assert '\n' not in message
  return message


CPU_FLAG = f'{devices.CPU_FLAG}=-{devices.CPU_VALUE}'


def test_defaults_are_accepted():
  check_config(recipe(), 4)


COUNTS = (
  'batch_size',
  'eval_batch_size',
  'log_every_steps',
  'checkpoint_every_steps',
  'keep_checkpoints',
  'micro_batches',
  'steps_per_call',
  'profile_steps',
  'divergence_limit',
  'model.depth',
  'model.width',
  'optimizer.reference_batch',
)
LENGTHS = (
  'epochs',
  'eval_every_epochs',
  'stuck_at_start_seconds',
  'stuck_after_seconds',
  'schedule.every_epochs',
  'optimizer.learning_rate',
  'optimizer.clip_norm',
  'optimizer.adaptive_clip',
)
SHARES = ('label_smoothing', 'ema_decay', 'model.dropout', 'optimizer.momentum')
NOT_NEGATIVE = (
  'optimizer.l2',
  'schedule.warmup_epochs',
  'schedule.hold_epochs',
  'schedule.factor',
)
NOT_FINITE = (math.nan, math.inf, -math.inf)
OUTSIDE = {
  **dict.fromkeys(COUNTS, (0, -1)),
  **dict.fromkeys(LENGTHS, (0.0, -1.0, *NOT_FINITE)),
  **dict.fromkeys(SHARES, (-0.1, 1.0, *NOT_FINITE)),
  **dict.fromkeys(NOT_NEGATIVE, (-1.0, *NOT_FINITE)),
  'divergence_factor': (0.0, 1.0, math.nan),
  'data.bad_share': (0.0, 1.0, math.nan),
  'seed': (-1, 2**32),
}


@pytest.mark.parametrize('field', OUTSIDE)
def test_numbers_are_in_their_range(field):
  for value in OUTSIDE[field]:
    message = refused(check_config, recipe({field: value}), 4)
    assert message.startswith(f'{field}={value}: expected a finite number ')
  if field in SHARES + NOT_NEGATIVE:
    check_config(recipe({field: 0.0}), 4)
    assert 'that is 0 or from 1e-12' in message


def test_a_seed_has_32_bits():
  message = refused(check_config, recipe(seed=2**32), 4)
  assert message.endswith('a finite number from 0 to 4294967295')
  check_config(recipe(seed=2**32 - 1), 4)


BATCHNORM = {'model.method': 'batchnorm'}


# With a batch of 32 on 4 devices.
@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'ema_warmup': True}, 'expected ema_decay to be set too'),
    ({'batch_size': 30}, 'batch_size=30 does not divide over 4 devices; n'),
    ({'batch_size': 30}, 'nearest: 28 or 32'),
    ({'batch_size': 3}, 'nearest: 4'),
    ({'micro_batches': 3}, "micro_batches=3 does not divide a device's share"),
    ({'micro_batches': 3}, '8 images; nearest: 2'),
    ({'micro_batches': 7}, '8 images; nearest: 8'),
    ({'micro_batches': 100}, '8 images; nearest: 8'),
    ({'batch_size': 36, 'micro_batches': 2}, '9 images; nearest: 1'),
    ({'data.mixup': 0.5, 'batch_size': 12}, '3 images a device'),
    ({'data.cutmix': 0.5, 'batch_size': 24, 'micro_batches': 2}, '3 images a'),
    ({'schedule.warmup_epochs': 201.0}, 'schedule.warmup_epochs=201 is longer'),
    ({'schedule.hold_epochs': 200.5}, 'hold_epochs=200.5 is longer'),
    (
      {'schedule.name': 'step', 'schedule.boundaries': (30, 300)},
      'schedule.boundaries[1]=300 is longer than training, epochs=200',
    ),
    *(
      ({'schedule.name': 'step', 'schedule.boundaries': (b,)}, 'boundaries=(')
      for b in (0, -3, 'ten', math.nan)
    ),
    *(
      ({'model.statistics_group': g}, f'model.statistics_group={g!r}: expected')
      for g in ('everything', '0', '-4', '2.5', '')
    ),
    *(
      (
        {**BATCHNORM, 'micro_batches': 2, 'model.statistics_group': g},
        f'micro_batches=2 would change what {g!r} batch statistics',
      )
      for g in ('device', 'all')
    ),
    (
      {**BATCHNORM, 'micro_batches': 2, 'model.statistics_group': '8'},
      'does not divide the 4 images that a device takes at a time; nearest: 4',
    ),
    *(
      (
        {**BATCHNORM, 'model.statistics_group': group},
        f'={group} does not divide the 8 images that a device takes at a time; '
        f'nearest: {nearest} (or',
      )
      for group, nearest in (('3', 2), ('16', 8), ('5', 4))
    ),
  ],
)
def test_what_can_not_run_is_refused(changes, message):
  assert message in refused(check_config, recipe(changes), 4)


@pytest.mark.parametrize(
  'changes',
  [
    {'ema_warmup': True, 'ema_decay': 0.99},
    {'micro_batches': 2},
    {'micro_batches': 8},
    {'data.mixup': 0.5, 'batch_size': 24},
    {'data.cutmix': 0.5, 'batch_size': 24},
    {'batch_size': 24, 'micro_batches': 2},
    {'schedule.name': 'cosine', 'schedule.hold_epochs': 1000.0},
    {**BATCHNORM, 'micro_batches': 2, 'model.statistics_group': '4'},
    *({**BATCHNORM, 'model.statistics_group': group} for group in '248'),
    *(
      {
        'model.method': method,
        'model.statistics_group': group,
        'micro_batches': 2,
      }
      for method in METHODS.keys() - {'batchnorm'}
      for group in ('device', 'all')
    ),
  ],
)
def test_what_can_run_is_accepted(changes):
  check_config(recipe(changes), 4)


@pytest.mark.parametrize(
  ('field', 'value', 'nearest'),
  [
    ('model.name', 'wide_resne', 'wide_resnet'),
    ('model.method', 'skipinti', 'skipinit'),
    ('model.classifier_init', 'zeros', 'zero'),
    ('schedule.name', 'cosin', 'cosine'),
    ('dtype', 'float16', 'bfloat16'),
    ('on_divergence', 'stopp', 'stop'),
  ],
)
def test_unknown_name_comes_with_the_nearest_and_the_list(
  field, value, nearest
):
  message = refused(check_config, recipe({field: value}), 4)
  assert f'{value!r}; did you mean {nearest!r}' in message
  assert 'one of: ' in message


def test_unknown_data_set_comes_with_the_nearest():
  message = refused(open_dataset, ConfigDict({'name': 'digit'}))
  assert "unknown data set 'digit'; did you mean 'digits'?" in message
  assert 'cifar10' in message


# Networks.


RESNET = {'model.name': 'resnet'}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.depth': 17}, 'nearest: 16 or 22'),
    ({'model.depth': 4}, 'nearest: 10'),
    ({'model.depth': 99}, 'nearest: 94 or 100'),
    (
      {**RESNET, 'model.depth': 51},
      'model.depth=51 of a resnet: expected 18, ',
    ),
    ({**RESNET, 'model.depth': 51}, '18, 34, 50, 101, 152, 200'),
    ({**RESNET, 'model.depth': 50, 'model.width': 2}, 'model.width=2 is for'),
    *(
      ({'model.alpha': alpha}, f'alpha={alpha!r}')
      for alpha in ('half', 'nan', 'inf', '1e999', '')
    ),
    ({'model.alpha': 'half'}, "'1/sqrt(d)'"),
    *(
      ({'model.alpha': '0.5', 'model.method': method}, method)
      for method in ('none', 'batchnorm', 'divide_sqrt2')
    ),
    (
      {'model.method': 'skipinit', 'model.scalar_biases': True},
      'for fixup, not for skipinit',
    ),
    ({'model.method': 'fixup', 'model.alpha': '0'}, 'with zero_last=True'),
    ({'model.zero_last': True}, 'with zero_last=True'),
  ],
)
def test_networks_that_can_not_be_are_refused(changes, message):
  assert message in refused(build_model, recipe(changes), 10)


def test_parts_of_a_method_can_be_changed():
  base = {'model.method': 'fixup'}
  assert build_method(recipe(base)) == METHODS['fixup']
  for name in ('zero_last', 'rescale', 'scalar_biases'):
    config = recipe(base | {f'model.{name}': False})
    expected = dataclasses.replace(METHODS['fixup'], **{name: False})
    assert build_method(config) == build_model(config, 10).method == expected
  assert build_method(recipe(base | {'model.alpha': 'none'})).alpha is None
  config = recipe({'model.method': 'none', 'model.zero_last': True})
  assert build_method(config) == Method(zero_last=True)
  moving = base | {'model.alpha': '0', 'model.zero_last': False}
  assert build_model(recipe(moving), 10).method.alpha_value(3) == 0


@pytest.mark.parametrize(
  ('changes', 'platform', 'dtype', 'scan'),
  [
    ({'model.depth': 244}, 'cpu', 'float32', True),
    ({'model.depth': 244}, 'gpu', 'bfloat16', True),
    ({'model.depth': 244}, 'tpu', 'bfloat16', True),
    ({'model.depth': 238}, 'tpu', 'bfloat16', False),
    ({'model.depth': 244, 'model.scan': False}, 'tpu', 'bfloat16', False),
    ({'model.scan': True, 'dtype': 'bfloat16'}, 'cpu', 'bfloat16', True),
    ({'dtype': 'float32'}, 'gpu', 'float32', False),
  ],
)
def test_dtype_and_scan_are_those_of_the_platform_unless_given(
  changes, platform, dtype, scan
):
  model = build_model(recipe(changes), 10, platform)
  assert (model.dtype, model.scan) == (dtype, scan)


@pytest.mark.parametrize(
  ('group', 'number', 'axis'),
  [('all', None, 'batch'), ('device', None, None), ('8', 8, None)],
)
def test_statistics_over_all_devices_are_by_the_mapped_axis(
  group, number, axis
):
  model = build_model(recipe({'model.statistics_group': group}), 10)
  assert (model.statistics_group, model.axis_name) == (number, axis)


def test_padding_is_that_of_the_recipe():
  assert not build_model(recipe(), 10).symmetric_padding
  config = recipe({'model.symmetric_padding': True})
  assert build_model(config, 10).symmetric_padding


def test_remedies_leave_out_what_is_done_or_can_not_be():
  remat, batch = '--config.model.remat=True', 'a smaller --config.batch_size'
  assert less_memory(recipe(micro_batches=4)) == (
    f'first try --config.micro_batches=8, then {remat}, then {batch}'
  )
  theirs = recipe(BATCHNORM | {'model.statistics_group': 'device'})
  assert less_memory(theirs) == f'first try {remat}, then {batch}'
  theirs.model.remat = True
  assert less_memory(theirs) == f'first try {batch}'


# Rates and lengths.


def test_rate_is_scaled_with_the_batch_where_asked():
  changes = {'optimizer.learning_rate': 0.1, 'batch_size': 1024}
  assert peak_rate(recipe(changes)) == 0.1
  scaled = recipe(changes | {'optimizer.reference_batch': 256})
  assert peak_rate(scaled) == pytest.approx(0.4)


def test_epochs_are_rounded_to_steps():
  config = recipe(batch_size=32)
  assert epochs_to_steps(config, 20.0, 1437) == round(20 * 1437 / 32) == 898


# Devices and processes.


@pytest.mark.parametrize('kind', ['GPU', 'TPU'])
def test_accelerator_that_jax_does_not_see_stops_the_run(
  kind, tmp_path, monkeypatch
):
  (tmp_path / 'device0').touch()
  monkeypatch.setattr(
    devices,
    'ACCELERATORS',
    {str(tmp_path / 'device[0-9]*'): (kind, 'pip install it')},
  )
  message = refused(devices.check_devices, recipe())
  assert f'has a {kind}' in message
  assert 'pip install it' in message
  assert 'allow_cpu' in message
  devices.check_devices(recipe(allow_cpu=True))
  (tmp_path / 'device0').unlink()
  devices.check_devices(recipe())


def test_a_deterministic_gpu_needs_its_flag_early(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setenv('XLA_FLAGS', '')
  config = recipe(deterministic=True)
  assert devices.DETERMINISTIC in refused(devices.check_devices, config)
  devices.set_deterministic(recipe())
  assert devices.DETERMINISTIC in refused(devices.check_devices, config)
  devices.set_deterministic(config)
  devices.check_devices(config)


@pytest.mark.parametrize(
  ('flags', 'platforms', 'machine', 'names', 'expected'),
  [
    ('', 'cpu', 'x86_64', 2, CPU_FLAG),
    ('--xla_a=1', 'cpu', 'x86_64', 2, f'--xla_a=1 {CPU_FLAG}'),
    ('--xla_cpu_experimental_ynn_fusion_type=', 'cpu', 'x86_64', 2, None),
    ('a_file', 'cpu', 'x86_64', 2, None),
    ('', 'cpu', 'aarch64', 2, None),
    ('', 'cuda', 'x86_64', 2, None),
    # One of the two names is not in the library.
    ('', 'cpu', 'x86_64', 1, None),
  ],
)
def test_the_flag_of_cpus_is_set_where_xla_knows_it(
  monkeypatch, tmp_path, flags, platforms, machine, names, expected
):
  known = [devices.CPU_FLAG.removeprefix('--'), devices.CPU_VALUE.upper()]
  library = tmp_path / 'libjax_common.so'
  library.write_bytes(b' '.join(name.encode() for name in known[:names]))
  monkeypatch.setattr(devices.jaxlib, '__file__', str(tmp_path / '__init__.py'))
  monkeypatch.setattr(devices.platform, 'machine', lambda: machine)
  monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setenv('XLA_FLAGS', flags)
  devices.set_cpu_flag()
  assert os.environ['XLA_FLAGS'] == (flags if expected is None else expected)


def test_without_plugins_jax_looks_for_cpus_alone(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  for plugins in ([], ['libtpu'], ['jax_plugins']):
    monkeypatch.setattr(
      devices.importlib.util,
      'find_spec',
      lambda name, plugins=plugins: name if name in plugins else None,
    )
    assert devices.only_cpus() == (not plugins)


def test_this_xla_takes_the_flag_of_cpus():
  """An unknown flag or value would end the process."""
  code = 'import jax; print(jax.devices())'
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'XLA_FLAGS': CPU_FLAG, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode == 0) == all(
    devices._is_in_jaxlib(name)
    for name in (
      devices.CPU_FLAG.removeprefix('--'),
      devices.CPU_VALUE.upper(),
    )
  )


def test_one_process_joins_nobody():
  processes.initialize(False, None, None, None, 10)
  assert not processes.several()
  assert processes.from_first(7) == 7

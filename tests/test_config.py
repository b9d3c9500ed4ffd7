"""Recipes that can't run are refused in one line with the remedy."""

import dataclasses
import math

import jax
import pytest
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError
from skipinit_jax.models.methods import METHODS, Method
from skipinit_jax.training import devices, processes
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.config import default_config
from skipinit_jax.training.describe import less_memory, loops
from skipinit_jax.training.network import build_method, build_model
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.timetable import epochs_to_steps


def recipe(**changes):
  """The defaults with dotted fields changed, `.` written as `__`."""
  config = default_config()
  config.batch_size = 32
  with config.unlocked():
    for name, value in changes.items():
      *path, last = name.split('__')
      part = config
      for step in path:
        part = part[step]
      part[last] = value
  return config


def refused(function, *args):
  """The message of the InputError, which must be one line."""
  with pytest.raises(InputError) as error:
    function(*args)
  message = str(error.value)
  assert '\n' not in message
  return message


def test_defaults_are_accepted():
  check_config(recipe(), 4)


POSITIVE = (
  'batch_size',
  'eval_batch_size',
  'epochs',
  'log_every_steps',
  'eval_every_epochs',
  'checkpoint_every_steps',
  'keep_checkpoints',
  'micro_batches',
  'steps_per_call',
  'profile_steps',
  'divergence_limit',
  'stuck_at_start_seconds',
  'stuck_after_seconds',
  'model__depth',
  'model__width',
  'schedule__every_epochs',
  'optimizer__learning_rate',
  'optimizer__reference_batch',
  'optimizer__clip_norm',
  'optimizer__adaptive_clip',
)
SHARES = ('label_smoothing', 'ema_decay', 'model__dropout')
SHARES = (*SHARES, 'optimizer__momentum')
NOT_NEGATIVE = ('optimizer__l2', 'schedule__warmup_epochs')
NOT_NEGATIVE = (*NOT_NEGATIVE, 'schedule__hold_epochs', 'schedule__factor')


@pytest.mark.parametrize('field', POSITIVE)
@pytest.mark.parametrize('value', [0, -1])
def test_sizes_and_lengths_are_positive(field, value):
  config = recipe(**{field: value})
  message = refused(check_config, config, 4)
  assert f'{field.replace("__", ".")}={value}' in message
  assert 'expected a finite number from' in message


@pytest.mark.parametrize(
  'field',
  [
    'epochs',
    'eval_every_epochs',
    'stuck_after_seconds',
    'stuck_at_start_seconds',
    'schedule__every_epochs',
    'optimizer__learning_rate',
    'optimizer__clip_norm',
    'optimizer__adaptive_clip',
    *SHARES,
    *NOT_NEGATIVE,
  ],
)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(field, value):
  message = refused(check_config, recipe(**{field: value}), 4)
  assert f'{field.replace("__", ".")}={value}' in message
  assert 'finite' in message


@pytest.mark.parametrize('field', SHARES)
@pytest.mark.parametrize('value', [-0.1, 1.0])
def test_shares_are_from_0_to_less_than_1(field, value):
  message = refused(check_config, recipe(**{field: value}), 4)
  assert f'{field.replace("__", ".")}={value}' in message
  check_config(recipe(**{field: 0.0}), 4)


@pytest.mark.parametrize('field', ['divergence_factor', 'data__bad_share'])
@pytest.mark.parametrize('value', [0.0, 1.0, math.nan])
def test_true_shares_are_between_0_and_1(field, value):
  message = refused(check_config, recipe(**{field: value}), 4)
  assert field.replace('__', '.') in message


@pytest.mark.parametrize('field', NOT_NEGATIVE)
def test_not_negative(field):
  message = refused(check_config, recipe(**{field: -1}), 4)
  assert f'{field.replace("__", ".")}=-1' in message
  assert 'expected a finite number that is 0 or from' in message


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_a_seed_has_32_bits(seed):
  message = refused(check_config, recipe(seed=seed), 4)
  assert message == (
    f'seed={seed}: expected a finite number from 0 to 4294967295'
  )
  check_config(recipe(seed=2**32 - 1), 4)


def test_a_warm_up_of_averages_needs_averages():
  message = refused(check_config, recipe(ema_warmup=True), 4)
  assert message.startswith('ema_warmup=True')
  assert 'expected ema_decay to be set' in message
  check_config(recipe(ema_warmup=True, ema_decay=0.99), 4)


def test_padding_is_that_of_the_recipe():
  assert not build_model(recipe(), 10).symmetric_padding
  assert build_model(
    recipe(model__symmetric_padding=True), 10
  ).symmetric_padding


@pytest.mark.parametrize(
  ('field', 'value', 'nearest'),
  [
    ('model__name', 'wide_resne', 'wide_resnet'),
    ('model__method', 'skipinti', 'skipinit'),
    ('model__classifier_init', 'zeros', 'zero'),
    ('schedule__name', 'cosin', 'cosine'),
    ('dtype', 'float16', 'bfloat16'),
    ('on_divergence', 'stopp', 'stop'),
  ],
)
def test_unknown_name_comes_with_the_nearest_and_the_list(
  field, value, nearest
):
  message = refused(check_config, recipe(**{field: value}), 4)
  assert f'{value!r}; did you mean {nearest!r}' in message
  assert 'one of: ' in message


def test_unknown_data_set_comes_with_the_nearest():
  message = refused(open_dataset, ConfigDict({'name': 'digit'}))
  assert "unknown data set 'digit'; did you mean 'digits'?" in message
  assert 'cifar10' in message


@pytest.mark.parametrize(
  ('batch_size', 'devices', 'nearest'),
  [(30, 4, '28 or 32'), (3, 4, '4'), (33, 8, '32 or 40')],
)
def test_batch_divides_over_devices(batch_size, devices, nearest):
  message = refused(check_config, recipe(batch_size=batch_size), devices)
  assert f'batch_size={batch_size}' in message
  assert f'{devices} devices; nearest: {nearest}' in message


@pytest.mark.parametrize(
  ('share', 'parts', 'nearest'), [(8, 3, 2), (8, 7, 8), (8, 100, 8), (9, 2, 1)]
)
def test_micro_batches_divide_a_share(share, parts, nearest):
  config = recipe(batch_size=4 * share, micro_batches=parts)
  message = refused(check_config, config, 4)
  assert f'micro_batches={parts}' in message
  assert f'{share} images; nearest: {nearest}' in message
  config.micro_batches = nearest
  check_config(config, 4)


@pytest.mark.parametrize('field', ['data__mixup', 'data__cutmix'])
def test_mixing_wants_pairs_in_every_part(field):
  check_config(recipe(**{field: 0.5}, batch_size=24), 4)
  odd = recipe(**{field: 0.5}, batch_size=24, micro_batches=2)
  assert '3 images' in refused(check_config, odd, 4)
  check_config(recipe(batch_size=24, micro_batches=2), 4)


@pytest.mark.parametrize(
  ('depth', 'nearest'), [(17, '16 or 22'), (4, '10'), (99, '94 or 100')]
)
def test_depth_of_a_wide_resnet_is_6n_and_4(depth, nearest):
  message = refused(build_model, recipe(model__depth=depth), 10)
  assert f'depth={depth}' in message
  assert message.endswith(f'nearest: {nearest}')


def test_depth_of_a_resnet_is_in_the_table():
  config = recipe(model__name='resnet', model__depth=51)
  message = refused(build_model, config, 10)
  assert 'depth=51' in message
  assert '18, 34, 50, 101, 152, 200' in message


def test_width_is_for_wide_resnets():
  config = recipe(model__name='resnet', model__depth=50, model__width=2)
  assert 'model.width=2' in refused(build_model, config, 10)


@pytest.mark.parametrize('alpha', ['half', 'nan', 'inf', '1e999', ''])
def test_alpha_is_a_finite_number_or_the_root(alpha):
  message = refused(build_model, recipe(model__alpha=alpha), 10)
  assert f'alpha={alpha!r}' in message
  assert "'1/sqrt(d)'" in message


@pytest.mark.parametrize('method', ['none', 'batchnorm', 'divide_sqrt2'])
def test_alpha_is_for_methods_that_have_one(method):
  config = recipe(model__alpha='0.5', model__method=method)
  assert method in refused(build_model, config, 10)


def test_parts_of_a_method_can_be_changed():
  base = recipe(model__method='fixup')
  assert build_method(base) == METHODS['fixup']
  for name in ('zero_last', 'rescale', 'scalar_biases'):
    config = recipe(model__method='fixup', **{f'model__{name}': False})
    expected = dataclasses.replace(METHODS['fixup'], **{name: False})
    assert build_method(config) == build_model(config, 10).method == expected
  config = recipe(model__method='fixup', model__alpha='none')
  assert build_method(config).alpha is None
  config = recipe(model__method='none', model__zero_last=True)
  assert build_method(config) == Method(zero_last=True)


@pytest.mark.parametrize(
  'fields',
  [
    {'model__method': 'fixup', 'model__alpha': '0'},
    {'model__method': 'skipinit', 'model__zero_last': True},
  ],
)
def test_branches_that_could_never_move_are_refused(fields):
  message = refused(build_model, recipe(**fields), 10)
  assert 'with zero_last=True' in message
  changed = {**fields, 'model__alpha': '0', 'model__zero_last': False}
  assert build_model(recipe(**changed), 10).method.alpha_value(3) == 0


def test_scalar_biases_are_for_the_block_that_has_them():
  config = recipe(model__method='skipinit', model__scalar_biases=True)
  assert 'for fixup, not for skipinit' in refused(build_model, config, 10)


@pytest.mark.parametrize(
  ('changes', 'line'),
  [
    ({'schedule__warmup_epochs': 201.0}, 'schedule.warmup_epochs=201'),
    ({'schedule__hold_epochs': 200.5}, 'schedule.hold_epochs=200.5'),
    (
      {'schedule__name': 'step', 'schedule__boundaries': (30, 300)},
      'schedule.boundaries[1]=300',
    ),
  ],
)
def test_schedule_is_not_longer_than_training(changes, line):
  message = refused(check_config, recipe(**changes), 4)
  assert message == f'{line} is longer than training, epochs=200'


@pytest.mark.parametrize('boundary', [0, -3, 'ten', math.nan])
def test_boundaries_are_numbers_of_epochs(boundary):
  config = recipe(schedule__name='step', schedule__boundaries=(boundary,))
  assert 'schedule.boundaries' in refused(check_config, config, 4)


def test_fields_of_other_schedules_are_not_looked_at():
  config = recipe(schedule__name='cosine', schedule__hold_epochs=1000.0)
  check_config(config, 4)


@pytest.mark.parametrize('group', ['3', '16', '5'])
def test_statistics_group_divides_what_a_device_takes(group):
  changes = {'model__method': 'batchnorm', 'model__statistics_group': group}
  message = refused(check_config, recipe(**changes), 4)  # 8 images a device.
  nearest = min((1, 2, 4, 8), key=lambda d: abs(d - int(group)))
  assert f'model.statistics_group={group} ' in message
  assert (
    f'8 images that a device takes at a time; nearest: {nearest}' in message
  )
  changes['model__statistics_group'] = str(nearest)
  check_config(recipe(**changes), 4)


def test_statistics_group_divides_a_micro_batch():
  changes = {'model__method': 'batchnorm', 'micro_batches': 2}
  message = refused(
    check_config, recipe(**changes, model__statistics_group='8'), 4
  )
  assert 'the 4 images' in message
  check_config(recipe(**changes, model__statistics_group='4'), 4)


@pytest.mark.parametrize('group', ['device', 'all'])
def test_micro_batches_may_not_change_batch_statistics(group):
  changes = {'micro_batches': 2, 'model__statistics_group': group}
  batchnorm = recipe(model__method='batchnorm', **changes)
  message = refused(check_config, batchnorm, 4)
  assert f'micro_batches=2 would change what {group!r} batch' in message
  for method in METHODS.keys() - {'batchnorm'}:
    check_config(recipe(model__method=method, **changes), 4)


@pytest.mark.parametrize('group', ['everything', '0', '-4', '2.5', ''])
def test_statistics_group_is_a_number_or_a_name(group):
  config = recipe(model__statistics_group=group)
  message = refused(check_config, config, 4)
  assert f'model.statistics_group={group!r}' in message


def test_dtype_and_scan_are_those_of_the_platform_unless_given():
  deep, shallow = recipe(model__depth=244), recipe(model__depth=238)
  for platform, dtype in (
    ('cpu', 'float32'),
    ('gpu', 'bfloat16'),
    ('tpu', 'bfloat16'),
  ):
    model = build_model(deep, 10, platform)
    assert (model.dtype, model.scan) == (dtype, platform != 'cpu')
    assert not build_model(shallow, 10, platform).scan
  given = recipe(model__depth=244, model__scan=False, dtype='float32')
  model = build_model(given, 10, 'tpu')
  assert (model.dtype, model.scan) == ('float32', False)
  assert build_model(recipe(model__scan=True), 10, 'cpu').scan


def test_fields_that_loop_are_named():
  assert loops(default_config()) == []
  config = recipe(model__scan=True, micro_batches=2, steps_per_call=3)
  assert loops(config) == ['micro_batches', 'steps_per_call', 'model.scan']


def test_remedies_leave_out_what_is_done_or_can_not_be():
  remat, batch = '--config.model.remat=True', 'a smaller --config.batch_size'
  ours = recipe(micro_batches=4)
  assert less_memory(ours) == (
    f'first try --config.micro_batches=8, then {remat}, then {batch}'
  )
  theirs = recipe(model__method='batchnorm', model__statistics_group='device')
  assert less_memory(theirs) == f'first try {remat}, then {batch}'
  theirs.model.remat = True
  assert less_memory(theirs) == f'first try {batch}'


def test_averaging_over_all_devices_is_by_the_mapped_axis():
  for group, expected in (
    ('all', (None, 'batch')),
    ('device', (None, None)),
    ('8', (8, None)),
  ):
    model = build_model(recipe(model__statistics_group=group), 10)
    assert (model.statistics_group, model.axis_name) == expected


def test_rate_is_scaled_with_the_batch_where_asked():
  changes = {'optimizer__learning_rate': 0.1, 'batch_size': 1024}
  assert peak_rate(recipe(**changes)) == 0.1
  scaled = recipe(**changes, optimizer__reference_batch=256)
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
  ('given', 'missing'),
  [
    ({'coordinator': 'host:1'}, '--num-processes, --process-id'),
    ({'num_processes': 2}, '--coordinator, --process-id'),
    ({'coordinator': 'host:1', 'process_id': 0}, '--num-processes'),
  ],
)
@pytest.mark.parametrize('distributed', [False, True])
def test_processes_are_named_with_all_three_flags(given, missing, distributed):
  flags = dict.fromkeys(('coordinator', 'num_processes', 'process_id')) | given
  message = refused(
    lambda: processes.initialize(distributed, **flags, heartbeat_seconds=10)
  )
  assert message.startswith(f'{missing} must be given too')


def test_process_id_is_below_the_number():
  message = refused(processes.initialize, False, 'host:1', 2, 2, 10)
  assert '--process-id=2' in message
  assert '--num-processes=2' in message


def test_one_process_joins_nobody():
  processes.initialize(False, None, None, None, 10)
  assert not processes.several()
  assert processes.from_first(7) == 7

"""Files of a run in any state: said, set aside, never lost, no traceback."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import last_state, metric_lines

from skipinit_jax import files
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import write_json
from skipinit_jax.training import changes, train
from skipinit_jax.training.changes import plain
from skipinit_jax.training.lines import Lines
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.result import read_result, take_result
from skipinit_jax.training.saved import config_of
from skipinit_jax.training.workdir import open_workdir, record_changes

TOTAL = 12
FILES = ('config.json', 'result.json', 'metrics.jsonl')
EVAL = {'top1': 0.25, 'top5': 0.5, 'loss': 2.0}
RESULT = {
  'status': 'completed',
  'eval': EVAL,
  'best_eval': EVAL,
  'eval_size': 40,
  'chance': 0.1,
  'steps': TOTAL,
  'parameters': 99,
  'last_train': {'step': 12, 'loss': 1.0, 'top1': 0.5},
  'seconds': 1.0,
}
LINES = [
  *({'step': s, 'loss': 2.0, 'top1': 0.1} for s in (2, 4)),
  {'step': 4, 'eval': EVAL},
  {'step': 6, 'replaced': 1},
  {'step': 6, 'loss': None, 'top1': 0.1},
]


def recipe(**fields):
  """Three epochs of 4 steps on random images."""
  config = load_recipe('synthetic')
  config.epochs, config.model.depth, config.compilation_cache = 3.0, 10, ''
  config.checkpoint_every_steps, config.keep_checkpoints = 3, 10
  names = {name.replace('__', '.'): value for name, value in fields.items()}
  return set_fields(config, names)


@pytest.fixture
def workdir(tmp_path):
  """The files of a finished run, made by hand."""
  for step in (0, 3, 6):
    (tmp_path / 'checkpoints' / str(step)).mkdir(parents=True)
  write_json(tmp_path / 'config.json', plain(recipe()))
  write_json(tmp_path / 'result.json', RESULT)
  text = ''.join(json.dumps(line) + '\n' for line in LINES)
  (tmp_path / 'metrics.jsonl').write_text(text)
  return tmp_path


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
  monkeypatch.setattr(files, 'PAUSES', (0.0, 0.0))


def start_on(workdir, config=None, step=6):
  """What `train` does with the files before the first step."""
  since = open_workdir(workdir, config or recipe(), TOTAL)
  result = take_result(workdir)
  lines = Lines(workdir)
  _, said = lines.resume(step)
  lines.close()
  return since, result, said


def a_folder(path):
  path.unlink()
  path.mkdir()
  (path / 'file').write_text('mine')


def a_dangling_link(path):
  path.unlink()
  path.symlink_to(path.parent / 'nowhere' / 'file')


def a_pipe(path):
  path.unlink()
  os.mkfifo(path)


def cut(share):
  return lambda data: data[: int(len(data) * share)]


# What any of the three files may hold instead; bytes, or what changes a path.
ANY = {
  'empty': lambda data: b'',
  'zeros': lambda data: bytes(len(data)),
  **{f'cut at {share}': cut(share) for share in (0.02, 0.3, 0.5, 0.8, 0.97)},
  'ends in zeros': lambda data: data[:-40] + bytes(40),
  'not UTF-8': lambda data: data[:30] + b'\xff\xfe' + data[32:],
  'UTF-16': lambda data: data.decode().encode('utf-16'),
  'number': lambda data: b'3\n',
  'list': lambda data: b'[1, 2]\n',
  'text': lambda data: b'"text"\n',
  'null': lambda data: b'null\n',
  'true': lambda data: b'true\n',
  'NaN': lambda data: b'{"seed": NaN, "step": NaN}\n',
  'deep': lambda data: b'[' * 100_000 + b'\n',
  'long number': lambda data: b'{"step": ' + b'9' * 5000 + b'}\n',
  'no fields': lambda data: b'{}\n',
  'foreign': lambda data: b'{"name": "x"}\n',
  'folder': a_folder,
  'dangling link': a_dangling_link,
  'pipe': a_pipe,
}
OF_RESULT = {
  'without status': {'status': None},
  'unknown status': {'status': 'running'},
  'status of another type': {'status': ['completed']},
  'eval is a number': {'eval': 3},
  'eval without top1': {'eval': {'loss': 1.0}},
  'steps as text': {'steps': '12'},
  'no best': {'best_eval': None},
  'no training': {'last_train': []},
  'seconds as text': {'seconds': 'long'},
}


def damage(path, how):
  """Does it; returns the bytes that are there now, None if it is no file."""
  if how in (a_folder, a_dangling_link, a_pipe):
    how(path)
    return None
  path.write_bytes(how(path.read_bytes()))
  return path.read_bytes()


def assert_set_aside(path, data, said):
  assert len(said) == 1
  assert f'{path} is damaged: ' in said[0]
  aside = path.with_name(f'damaged-{path.name}')
  assert str(aside) in said[0]
  if data is None:
    assert not aside.is_file()
    assert os.path.lexists(aside)
  else:
    assert aside.read_bytes() == data


def assert_healed(workdir, capsys):
  """Started once more, nothing is said, and nothing moves."""
  names = {path.name for path in workdir.iterdir()}
  capsys.readouterr()
  _, _, said = start_on(workdir)
  assert not said
  assert not capsys.readouterr().err
  assert {path.name for path in workdir.iterdir()} == names


def lines_of(text):
  """Lines on standard error; but for the temporary folder each is short."""
  return text.strip().splitlines()


@pytest.mark.parametrize('state', ANY)
def test_a_damaged_config_is_set_aside_and_ours_written(state, workdir, capsys):
  (workdir / 'result.json').unlink()
  data = damage(workdir / 'config.json', ANY[state])
  assert start_on(workdir)[2] == []
  said = lines_of(capsys.readouterr().err)
  assert_set_aside(workdir / 'config.json', data, said)
  assert 'assuming that step 6 is of this config' in said[0]
  assert config_of(workdir).to_dict() == recipe().to_dict()
  assert read_metrics(workdir) == LINES
  assert_healed(workdir, capsys)


@pytest.mark.parametrize('state', [*ANY, *OF_RESULT])
def test_a_damaged_result_is_set_aside_and_made_again(state, workdir, capsys):
  path = workdir / 'result.json'
  if state in ANY:
    data = damage(path, ANY[state])
  else:
    write_json(path, RESULT | OF_RESULT[state])
    data = path.read_bytes()
  with pytest.raises(RunError, match='is damaged') as error:
    read_result(workdir)
  assert '\n' not in str(error.value)
  since, result, said = start_on(workdir)
  assert (since, result, said) == ([], None, [])  # So the run goes on.
  assert_set_aside(path, data, lines_of(capsys.readouterr().err))
  assert read_metrics(workdir) == LINES
  assert_healed(workdir, capsys)


BAD_LINES = {
  'a bad byte': b'{"step": 2, "loss": 2.\xff, "top1": 0.1}',
  'a number': b'3',
  'a list': b'[2]',
  'a text': b'"step"',
  'null': b'null',
  'zeros': b'\0\0\0\0',
  'cut': b'{"step": 4, "lo',
  'two in one': b'{"step": 2}{"step": 4}',
  'deep': b'[' * 100_000,
  'no step': b'{"loss": 2.0, "top1": 0.1}',
  'step as text': b'{"step": "4"}',
  'step as a fraction': b'{"step": 4.5}',
  'step true': b'{"step": true}',
  'step null': b'{"step": null}',
  'step below zero': b'{"step": -4}',
  'step not a number': b'{"step": NaN}',
  'evaluation a number': b'{"step": 4, "eval": 3}',
  'evaluation without top1': b'{"step": 4, "eval": {"loss": 1.0, "top5": 1}}',
  'loss as text': b'{"step": 4, "loss": "2", "top1": 0.1}',
  'loss alone': b'{"step": 4, "loss": 2.0}',
  'replaced as text': b'{"step": 4, "replaced": "1"}',
}


@pytest.mark.parametrize('place', [0, 2, 5])
@pytest.mark.parametrize('state', BAD_LINES)
def test_a_damaged_line_is_counted_and_the_others_stay(
  state, place, workdir, capsys
):
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines()
  lines.insert(place, BAD_LINES[state])
  data = b'\n'.join(lines) + b'\n'
  path.write_bytes(data)
  assert read_metrics(workdir) == LINES
  assert Lines(workdir).read_and_count()[1] == 1
  said = start_on(workdir)[2]
  assert_set_aside(path, data, said)
  assert '1 of 6 lines can not be read' in said[0]
  assert read_metrics(workdir) == LINES
  assert_healed(workdir, capsys)


@pytest.mark.parametrize('state', ANY)
def test_damaged_metrics_never_vanish(state, workdir, capsys):
  path = workdir / 'metrics.jsonl'
  data = damage(path, ANY[state])
  said = start_on(workdir)[2]
  if data == b'':
    assert not said  # Nothing was there to be lost.
  else:
    assert_set_aside(path, data, said)
  kept = read_metrics(workdir)
  assert kept == [line for line in LINES if line in kept]
  if data:
    written = [line for line in data.split(b'\n') if line.strip()]
    lost = len(written) - len(kept)
    assert f'{lost} of {len(written)} lines can not be read' in said[0]
  assert_healed(workdir, capsys)


def test_metrics_cut_anywhere_keep_their_whole_lines(workdir):
  path = workdir / 'metrics.jsonl'
  data = path.read_bytes()
  for end in range(1, len(data), 5):
    path.write_bytes(data[:end])
    whole = data[: end + 1].count(b'\n')
    lines = Lines(workdir)
    _, said = lines.resume(6)
    lines.close()
    assert read_metrics(workdir) == LINES[:whole]
    assert len(said) == (b'\n' not in data[end - 1 : end + 1])
    if said:  # Each copy has a name of its own.
      aside = Path(said[0].split('as it was: ')[1])
      assert aside.read_bytes() == data[:end]


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('state', ['CRLF', 'mark', 'link'])
def test_what_others_write_differently_is_read(name, state, workdir, capsys):
  path = workdir / name
  data = path.read_bytes()
  if state == 'CRLF':
    path.write_bytes(data.replace(b'\n', b'\r\n'))
  elif state == 'mark':
    path.write_bytes('\ufeff'.encode() + data)
  else:
    path.rename(workdir / 'elsewhere')
    path.symlink_to('elsewhere')
  since, result, said = start_on(workdir)
  assert (since, result, said) == ([], RESULT, [])
  assert not capsys.readouterr().err
  assert read_metrics(workdir) == LINES


def test_lines_twice_and_out_of_order_are_put_right(workdir, capsys):
  path = workdir / 'metrics.jsonl'
  # Two runs in one folder: the second wrote other values.
  other = {'step': 2, 'loss': 3.0, 'top1': 0.2}
  both = [*LINES, other, *LINES[1:]]
  data = ''.join(json.dumps(line) + '\n' for line in both).encode()
  path.write_bytes(data)
  said = start_on(workdir)[2]
  assert_set_aside(path, data, said)
  assert '5 lines are there twice' in said[0]
  assert 'out of order' in said[0]
  assert read_metrics(workdir) == [other, *LINES[1:]]
  assert_healed(workdir, capsys)


def test_lines_that_are_made_again_are_counted(workdir):
  assert start_on(workdir, step=3)[2] == [
    '4 lines of metrics after step 3 will be written again'
  ]
  assert read_metrics(workdir) == LINES[:1]


def test_nothing_is_kept_of_a_run_that_starts_again(workdir):
  (workdir / 'metrics.jsonl').write_text('{"step": 0, "alpha": {"b": 0.5}}\n')
  assert start_on(workdir, step=0)[2]
  assert read_metrics(workdir) == []  # It would be there twice.


def test_what_is_set_aside_is_never_overwritten(workdir):
  for number in range(3):
    (workdir / 'config.json').write_text(str(number))
    start_on(workdir)
    write_json(workdir / 'result.json', RESULT)
  for number, end in enumerate(('', '.2', '.3')):
    assert (workdir / f'damaged-config.json{end}').read_text() == str(number)


def test_a_result_without_a_config_is_not_returned(workdir, capsys):
  (workdir / 'config.json').unlink()
  assert start_on(workdir)[1] is None
  (said,) = lines_of(capsys.readouterr().err)
  assert 'has no config.json' in said
  assert json.loads((workdir / 'damaged-result.json').read_text()) == RESULT


def test_with_nothing_but_a_result_the_run_ends_in_one_line(workdir):
  (workdir / 'config.json').unlink()
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(InputError, match='may be of another config') as error:
    start_on(workdir)
  assert '\n' not in str(error.value)
  assert json.loads((workdir / 'result.json').read_text()) == RESULT
  assert not (workdir / 'config.json').exists()


@pytest.mark.parametrize(
  ('field', 'value'),
  [('seed', 'x'), ('seed', None), ('model', 3), ('batch_size', {'a': 1})],
)
def test_a_config_with_other_values_is_another_config(field, value, workdir):
  path = workdir / 'config.json'
  fields = json.loads(path.read_text())
  write_json(path, fields | {field: value})
  before = path.read_bytes()
  with pytest.raises(InputError, match='another config') as error:
    start_on(workdir)
  message = str(error.value).replace(str(workdir), '')
  assert field in message
  assert '\n' not in message
  assert len(message) <= 300
  assert path.read_bytes() == before


def test_a_config_of_which_all_is_different_is_one_short_line(workdir):
  fields = dict.fromkeys(flatten_dict(plain(recipe()), sep='.'), 'x' * 500)
  write_json(workdir / 'config.json', {'seed': 0} | fields)
  with pytest.raises(InputError, match=r'and \d+ more') as error:
    start_on(workdir)
  assert len(str(error.value).replace(str(workdir), '')) <= 300


@pytest.mark.parametrize('fields', [{'seed': 'x'}, {'model': 3}])
def test_a_config_that_is_none_of_a_run_is_one_line(fields, workdir):
  write_json(workdir / 'config.json', fields)
  with pytest.raises(InputError, match='is no config of a run') as error:
    config_of(workdir)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES, errno.ESTALE])
def test_trouble_of_the_system_is_no_damage(name, number, workdir, monkeypatch):
  path, real, failures = workdir / name, os.stat, []
  before = sorted(p.name for p in workdir.iterdir())

  def stat(file, *args, **kwargs):
    if os.fspath(file) == str(path) and len(failures) < most:
      failures.append(number)
      raise OSError(number, os.strerror(number), str(file))
    return real(file, *args, **kwargs)

  monkeypatch.setattr(files.os, 'stat', stat)
  most = 2
  assert start_on(workdir) == ([], RESULT, [])  # Tried again.
  assert len(failures) == 2
  most = 1000
  with pytest.raises(RunError) as error:
    start_on(workdir)
  assert str(error.value) == f'{path}: {os.strerror(number)} (tried 3 times)'
  assert sorted(p.name for p in workdir.iterdir()) == before


def test_a_link_in_a_circle_is_one_line(workdir):
  (workdir / 'config.json').unlink()
  (workdir / 'config.json').symlink_to('config.json')
  with pytest.raises(RunError, match=r'config\.json can not be read: Too many'):
    start_on(workdir)


def test_small_files_are_on_the_disk_before_and_after_they_get_their_name(
  tmp_path, monkeypatch
):
  events, sync, replace = [], os.fsync, os.replace

  def fsync(descriptor):
    events.append(Path(os.readlink(f'/proc/self/fd/{descriptor}')).name)
    sync(descriptor)

  def rename(old, new):
    events.append('renamed')
    replace(old, new)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(os, 'replace', rename)
  write_json(tmp_path / 'result.json', RESULT)
  assert events == ['result.json.tmp', 'renamed', tmp_path.name]
  events.clear()
  lines = Lines(tmp_path)
  lines.resume(0)
  lines.close()
  assert events == ['metrics.jsonl.tmp', 'renamed', tmp_path.name]
  assert not [*tmp_path.glob('*.tmp')]


# Changes of a run's fields.


CAN_NOT = {
  'model__depth': 16,
  'model__width': 2,
  'model__method': 'batchnorm',
  'model__alpha': '0.5',
  'model__biases': True,
  'model__classifier_init': 'zero',
  'model__activation': 'crelu',
  'data__name': 'digits',
  'data__validation': 8,
  'data__height': 16,
  'batch_size': 8,
  'ema_decay': 0.9,
  'optimizer__l2': 0.0,
  'optimizer__clip_norm': 1.0,
  'optimizer__adaptive_clip': 0.01,
  'optimizer__reduced_rate': False,
  'optimizer__name': 'lars',
}
CAN = {
  'seed': 3,
  'epochs': 2.75,
  'label_smoothing': 0.1,
  'micro_batches': 2,
  'model__dropout': 0.5,
  'model__scan': True,
  'data__flip': True,
  'optimizer__learning_rate': 0.5,
  'optimizer__momentum': 0.5,
  'optimizer__l2': 1e-3,
  'schedule__name': 'cosine',
}


def contents(workdir):
  paths = (p for p in workdir.rglob('*') if p.is_file() and p.name != 'lock')
  return {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize('field', CAN_NOT)
def test_what_can_not_take_effect_is_refused_by_name(field, workdir):
  config = recipe(accept_changes=True, **{field: CAN_NOT[field]})
  before = contents(workdir)
  with pytest.raises(InputError) as error:
    open_workdir(workdir, config, TOTAL)
  message = str(error.value).replace(str(workdir), '')
  assert field.replace('__', '.') in message
  assert f'{CAN_NOT[field]!r} here' in message
  assert len(message) <= 300
  assert contents(workdir) == before
  shutil.rmtree(workdir / 'checkpoints')  # With no step made all can change.
  open_workdir(workdir, config, TOTAL)


def test_a_field_that_came_after_a_run_was_as_before(workdir):
  path = workdir / 'config.json'
  fields = json.loads(path.read_text())
  del fields['optimizer']['name']
  write_json(path, fields)
  assert open_workdir(workdir, recipe(), TOTAL) == []
  with pytest.raises(
    InputError, match=r"optimizer.name='sgd' there, 'lars' here"
  ):
    open_workdir(workdir, recipe(optimizer__name='lars'), TOTAL)


@pytest.mark.parametrize('field', CAN)
def test_what_can_take_effect_is_recorded_with_its_step(field, workdir):
  name, value = field.replace('__', '.'), CAN[field]
  old = flatten_dict(plain(recipe()), sep='.')[name]
  config = recipe(accept_changes=True, **{field: value})
  before = contents(workdir)
  new = open_workdir(workdir, config, TOTAL)
  assert contents(workdir) == before  # Not before the state is there.
  record_changes(workdir, config, new, 6)
  record = {'step': 6, 'field': name, 'old': old, 'new': value}
  written = json.loads((workdir / 'config.json').read_text())
  assert written['changes'] == [record]
  assert not (workdir / 'result.json').exists()
  assert flatten_dict(config_of(workdir).to_dict(), sep='.')[name] == value
  # It stays, without the flag, over later starts and later changes.
  assert open_workdir(
    workdir, set_fields(config, {'accept_changes': False}), TOTAL
  ) == [record]
  written = json.loads((workdir / 'config.json').read_text())
  assert written['changes'] == [record]
  config = recipe(accept_changes=True, schedule__warmup_epochs=1.0)
  set_fields(config, {name: value})
  both = open_workdir(workdir, config, TOTAL)
  record_changes(workdir, config, both, 9)
  written = json.loads((workdir / 'config.json').read_text())
  assert [c['step'] for c in written['changes']] == [6, 9]


def test_a_change_counts_from_the_step_that_was_really_restored():
  change = {'field': 'optimizer.learning_rate', 'old': 1, 'new': 2}
  assert changes.changes_rate([change | {'step': 6}], 6)
  assert changes.changes_rate([change | {'step': 6}], 3)  # Fallen back.
  assert not changes.changes_rate([change | {'step': 6}], 9)
  other = change | {'field': 'seed', 'step': 6}
  assert not changes.changes_rate([other], 6)


def test_falling_back_before_a_change_moves_it(workdir):
  config = recipe(accept_changes=True, seed=3)
  new = open_workdir(workdir, config, TOTAL)
  record_changes(workdir, config, new, 6)
  old = open_workdir(workdir, config, TOTAL)
  record_changes(workdir, config, old, 3)
  written = json.loads((workdir / 'config.json').read_text())
  assert [c['step'] for c in written['changes']] == [3]


@pytest.mark.parametrize('step', ['6', None, True, 'far'])
def test_a_record_of_changes_that_is_damaged_is_set_aside(
  step, workdir, capsys
):
  path = workdir / 'config.json'
  fields = json.loads(path.read_text())
  write_json(path, fields | {'changes': [{'step': step}]})
  data = path.read_bytes()
  (workdir / 'result.json').unlink()
  start_on(workdir)
  assert_set_aside(path, data, lines_of(capsys.readouterr().err))


# Whole runs.


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A finished run of 12 steps, with checkpoints of 0, 3, 6, 9 and 12."""
  workdir = tmp_path_factory.mktemp('done') / 'run'
  return workdir, train(recipe(), workdir)


def copy(done, workdir, until=TOTAL):
  """The run as it was when `until` steps were saved."""
  shutil.copytree(done[0], workdir)
  if until < TOTAL:
    (workdir / 'result.json').unlink()
  for path in (workdir / 'checkpoints').iterdir():
    if int(path.name) > until:
      shutil.rmtree(path)
  return workdir


def same(result):
  # The checkout may be committed to meanwhile.
  varies = ('seconds', 'revision')
  return {k: v for k, v in result.items() if k not in varies}


def test_fewer_epochs_than_made_are_refused(done):
  workdir, _ = done
  before = contents(workdir)
  with pytest.raises(InputError) as error:
    train(recipe(epochs=1.0, accept_changes=True), workdir)
  line = f'epochs=1 are 4 steps, but {workdir} has already made 12'
  assert str(error.value) == line
  assert contents(workdir) == before


def test_a_change_of_a_run_that_is_over_is_refused(done):
  workdir, result = done
  before = contents(workdir)
  with pytest.raises(InputError, match='all 12 steps are made'):
    train(recipe(seed=3, accept_changes=True), workdir)
  assert contents(workdir) == before
  assert train(recipe(accept_changes=True), workdir) == result


def test_a_finished_run_gets_its_result_back(done, tmp_path, capsys):
  workdir = copy(done, tmp_path / 'run')
  for name in ('config.json', 'result.json'):
    (workdir / name).write_bytes(b'')
  path = workdir / 'metrics.jsonl'
  *lines, training, evaluation = path.read_text().splitlines()
  assert 'eval' in json.loads(evaluation)
  path.write_text('\n'.join([*lines, '3', training[:-9], evaluation]))
  assert same(train(recipe(), workdir)) == same(done[1])
  said = capsys.readouterr().err
  assert said.count('damaged: ') == 2
  assert 'result.json moved to' in said  # Of which config, nothing tells.
  assert '2 of' in said
  names = {path.name for path in workdir.iterdir()}
  assert {f'damaged-{n}.json' for n in ('config', 'result')} <= names
  assert 'damaged-metrics.jsonl' in names


def test_a_run_goes_on_whatever_its_files_hold(done, tmp_path, capsys):
  workdir = copy(done, tmp_path / 'run', until=6)
  (workdir / 'config.json').write_bytes(b'\0' * 100)
  path = workdir / 'metrics.jsonl'
  path.write_bytes(b'3\n\xff\n' + path.read_bytes() + b'{"step": 12, "l')
  result = train(recipe(), workdir)
  assert same(result) == same(done[1])
  assert metric_lines(workdir) == metric_lines(done[0])
  ours, theirs = last_state(workdir), last_state(done[0])
  for name, leaf in theirs.items():
    np.testing.assert_array_equal(ours[name], leaf)
  assert '3 of' in capsys.readouterr().err


def test_a_changed_rate_and_seed_take_effect(done, tmp_path):
  workdir = copy(done, tmp_path / 'run', until=6)
  half = last_state(workdir)
  config = recipe(optimizer__learning_rate=1e-12, seed=7)
  config.accept_changes = True
  train(config, workdir)
  end = last_state(workdir)
  for name, leaf in half.items():
    if name.startswith("['params']"):  # So small a rate moves next to nothing.
      np.testing.assert_allclose(end[name], leaf, rtol=0, atol=1e-8)
  assert (end["['seed']"], end["['step']"]) == (7, TOTAL)
  rates = {
    x['step']: x['learning_rate'] for x in read_metrics(workdir) if 'loss' in x
  }
  assert [s for s, r in rates.items() if r < 1e-10] == [8, 10, 12]
  written = json.loads((workdir / 'config.json').read_text())
  assert [(c['field'], c['step']) for c in written['changes']] == [
    ('optimizer.learning_rate', 6),
    ('seed', 6),
  ]


def test_errors_of_stores_keep_their_reason(monkeypatch, tmp_path):
  """Clients of object stores raise OSErrors with a message and no number."""

  def refuse(path):
    raise OSError('Forbidden: no access to the bucket')

  monkeypatch.setattr(files.epath.Path, 'read_bytes', refuse, raising=False)
  monkeypatch.setattr(type(files.epath.Path(tmp_path)), 'read_bytes', refuse)
  (tmp_path / 'config.json').touch()
  with pytest.raises(RunError, match=r'config\.json: Forbidden: no access'):
    files.read_bytes(tmp_path / 'config.json')

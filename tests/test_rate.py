"""What a host makes a second, beside what chips could take."""

import importlib.util
import math

import pytest
from image_sets import labelled, write_folders, write_toy

pytest.importorskip('grain')
pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')
pytest.importorskip('tensorflow_datasets')

from skipinit_jax.ahead_of_time import measure as of_chips
from skipinit_jax.data import rate
from skipinit_jax.data.__main__ import main
from skipinit_jax.training.recipes import load_recipe

RECIPE = """
from image_sets import stream_config
from skipinit_jax.training.config import default_config

def get_config():
  config = default_config()
  config.model.depth = 10
  config.batch_size = 8
  config.data = stream_config(train_size=1_281_167, workers=3)
  return config
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """Arguments that name a small set and a recipe for it."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'toy.py').write_text(RECIPE)
  folder = write_toy(tmp_path / 'data', 43, 7)
  return ['--data-dir', str(folder), '--config=toy.py']


@pytest.fixture
def soon(monkeypatch):
  monkeypatch.setattr(rate, 'WARM_UP', 0.1)
  monkeypatch.setattr(rate, 'SECONDS', 0.3)


class Clocked:
  """Stands for a Stream whose batches take their time on a clock of its own.

  Args:
    ahead: batches that are there at once, made ahead of time.
    seconds: that each later one takes.
  """

  def __init__(self, ahead, seconds):
    self.ahead, self.seconds, self.now, self.closed = ahead, seconds, 0.0, False

  def read(self, config, start_step):
    assert (config.batch_size, start_step) == (rate.ROWS, 0)
    try:
      self.now += 100  # Until the workers have started.
      for _ in range(self.ahead):
        yield 'batch'
      while True:
        self.now += self.seconds
        yield 'batch'
    finally:
      self.closed = True


@pytest.mark.parametrize('ahead', [1, 2, 100])
@pytest.mark.parametrize('seconds', [0.25, 0.5, 20.0])
def test_only_what_is_made_while_the_clock_runs_counts(
  ahead, seconds, monkeypatch
):
  made = Clocked(ahead, seconds)
  made.config = {}
  asked = []

  def replace(data, config):
    asked.append(config.workers)
    return data

  monkeypatch.setattr(rate.dataclasses, 'replace', replace)
  monkeypatch.setattr(rate.time, 'perf_counter', lambda: made.now)
  assert rate.measure(made, 3) == pytest.approx(rate.ROWS / seconds)
  assert asked == [3]
  assert made.closed
  assert made.now <= 100 + rate.WARM_UP + rate.SECONDS + 2 * seconds


def test_a_set_is_measured_for_each_number_of_workers(toy, soon, capsys):
  assert main(['rate', *toy, '--workers', '0', '1']) == 0
  out, err = capsys.readouterr()
  first, head, *rows = out.splitlines()
  assert first.startswith('data: tfds in ')
  assert first.endswith(', 43 images to train on, crops of 8 pixels')
  assert head.split() == ['workers', 'images/s']
  assert [row.split()[0] for row in rows] == ['0', '1']
  for row in rows:
    assert float(row.split()[1].replace(',', '')) > 0
  assert 'threads' in err
  assert '1 workers' in err


def test_the_fields_of_the_recipe_are_those_of_training(
  toy, soon, monkeypatch, capsys
):
  found = []
  monkeypatch.setattr(rate, 'measure', lambda *args: found.append(args) or 9.0)
  fields = ['--config.data.image_size=6', '--config.data.flip=False']
  assert main(['rate', *toy, '--workers', '2', *fields]) == 0
  ((data, workers),) = found
  assert workers == 2
  assert data.image_shape == (6, 6, 3)
  assert not data.config.flip
  assert data.config.area == (0.3, 1.0)
  assert 'crops of 6 pixels' in capsys.readouterr().out


def test_class_folders_are_measured_with_imagenets_recipe(
  tmp_path, monkeypatch, capsys
):
  write_folders(tmp_path, {'train': labelled(9), 'val': labelled(6)})
  monkeypatch.setattr(rate, 'measure', lambda data, workers: 9.0 * workers)
  command = ['rate', '--data-dir', str(tmp_path), '--workers', '1', '2']
  assert main([*command, '--config.data.name=folder']) == 0
  out = capsys.readouterr().out
  assert '9 images to train on, crops of 224 pixels' in out
  assert out.splitlines()[-1].split() == ['2', '18']


@pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='no compiler for TPUs'
)
def test_chips_are_compared_by_their_compiler(toy, monkeypatch, capsys):
  monkeypatch.setattr(rate, 'measure', lambda data, workers: 1000.0 * workers)
  args = [*toy, '--workers', '4', '1', '--topology', 'v5e:2x2']
  assert main(['rate', *args]) == 0
  _, chips, _, *rows, sentence = capsys.readouterr().out.splitlines()
  assert chips.startswith('chips: v5e:2x2 (4 chips) can take ')
  assert chips.endswith('a bound from their compiler, not a measurement')
  assert [row.split()[0] for row in rows] == ['4', '1']
  bound = int(chips.split('take ')[1].split()[0].replace(',', ''))
  # The network has the five classes of the set, which no stand-in knows.
  config = load_recipe('toy.py')
  config.data.name, config.data.train_size = 'imagenet2012', 43
  from skipinit_jax.ahead_of_time.chips import topology

  found = of_chips.measure(config, topology('v5e:2x2'), evaluation=False)
  more = 4 * found['images_per_second_bound']  # Of a thousand classes.
  assert 0.5 * bound < more < bound
  hosts = math.ceil(bound / 4000)  # Of the best number of workers.
  assert f'the CPUs of {hosts:,} hosts like this one' in sentence


def test_a_step_that_does_not_fit_ends_in_one_line(toy, monkeypatch, capsys):
  pytest.importorskip('libtpu')
  result = {'fits': False, 'over_bytes': 2.0**30, 'topology': 'v5e:2x2'}
  result |= {'hbm_capacity_bytes': 2.0**34}
  monkeypatch.setattr(of_chips, 'measure', lambda *args, **kwargs: result)
  with pytest.raises(SystemExit) as ended:
    main(['rate', *toy, '--topology=v5e:2x2'])
  assert ended.value.code == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('error: does not fit: 1.00 GiB more than a chip of v5')


@pytest.mark.parametrize(
  ('made', 'hosts', 'begins', 'needed'),
  [
    (1000.0, 1, 'chips at that bound would wait', '13 hosts like'),
    (1000.0, 12, 'chips at that bound would wait', '13 hosts like'),
    (1000.0, 13, 'the images will wait for the chips', '13 hosts like'),
    (12_001.0, 1, 'the images will wait for the chips', '1 host like'),
    (12_000.0, 2, 'the images will wait for the chips', '2 hosts like'),
  ],
)
def test_the_verdict_compares_all_hosts(made, hosts, begins, needed):
  said = rate.verdict(made, 12_000.5, 'v5e:8x8', hosts)
  assert said.startswith(begins)
  assert f'the CPUs of {needed} this one' in said
  assert said.endswith(f'v5e:8x8 has {hosts}')


@pytest.mark.parametrize(
  ('cores', 'tried'), [(1, [1]), (6, [1, 2, 4]), (8, [1, 2, 4, 8])]
)
def test_powers_of_two_up_to_the_cores_are_tried(cores, tried, monkeypatch):
  monkeypatch.setattr(rate.os, 'cpu_count', lambda: cores)
  assert rate.usual_workers() == tried

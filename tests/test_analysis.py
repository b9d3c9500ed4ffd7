"""The command line of the analyses."""

import json
import sys

import numpy as np
import pytest

from skipinit_jax.analysis import __main__ as cli
from skipinit_jax.analysis import along_training, networks
from skipinit_jax.analysis.capture import capture
from skipinit_jax.errors import InputError
from skipinit_jax.training import train
from skipinit_jax.training.checkpoints import saved_steps
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.saved import load_run

pytestmark = pytest.mark.sampled(4)

TINY = {
  'model.depth': 10,
  'epochs': 1.0,
  'eval_every_epochs': 1.0,
  'compilation_cache': '',
  'batch_size': 32,
}
FLAGS = [f'--config.{name}={value}' for name, value in TINY.items()]


def command(capsys, *args):
  """Exit status and standard error of a command."""
  status = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['analysis', *args])
    try:
      cli.main()
    except SystemExit as end:
      status = end.code
  return status, capsys.readouterr().err


def test_paths_of_every_method_and_of_a_run(tmp_path, capsys, monkeypatch):
  few = {name: cli.METHODS[name] for name in ('batchnorm', 'skipinit')}
  monkeypatch.setattr(cli, 'METHODS', few)
  monkeypatch.setattr(cli, 'DRAWS', 2)
  out = tmp_path / 'out'
  status, err = command(capsys, 'paths', f'--out={out}', *FLAGS)
  assert status == 0, err
  measured = json.loads((out / 'paths.json').read_text())
  assert measured.keys() == few.keys()
  assert len(measured['skipinit']['norm']) == 4  # Three blocks.
  # At alpha = 0 no gradient passes a branch.
  assert measured['skipinit']['effective_depth'] == 0
  assert measured['skipinit']['interval'] == 0
  norm = measured['batchnorm']
  assert norm['effective_depth'] == pytest.approx(
    np.mean(norm['effective_depths'])
  )
  assert min(norm['effective_depths']) > 0
  assert len({*norm['effective_depths']}) == 2
  assert (out / 'paths.svg').exists()
  assert (out / 'paths.png').exists()

  config = set_fields(load_recipe('digits'), TINY)
  train(config, tmp_path / 'run')
  status, err = command(
    capsys, 'paths', f'--checkpoint={tmp_path}/run', f'--out={tmp_path}/of_run'
  )
  assert status == 0, err
  measured = json.loads((tmp_path / 'of_run' / 'paths.json').read_text())
  assert measured['skipinit']['effective_depth'] > 0  # It has moved.


def test_the_network_of_a_run_is_the_one_it_evaluated(tmp_path):
  config = set_fields(
    load_recipe('digits'), TINY | {'model.method': 'batchnorm'}
  )
  result = train(config, tmp_path)
  network = networks.of_run(load_run(tmp_path))
  logits = network.model.apply(network.variables, network.images, train=False)
  top1 = np.mean(np.argmax(logits, -1) == network.labels)
  assert top1 == pytest.approx(result['eval']['top1'])


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
  """A run that watched its blocks and kept all of its checkpoints."""
  fields = {
    'model.alpha': '1/sqrt(d)',
    'watch_every_steps': 10,
    'checkpoint_every_steps': 20,
    'keep_checkpoints': 9,
    'schedule.name': 'constant',
  }
  workdir = tmp_path_factory.mktemp('watched') / 'run'
  train(set_fields(load_recipe('digits'), TINY | fields), workdir)
  return workdir


def test_along_training_are_the_sums_of_shares_and_the_eigenvalues(watched):
  measured = along_training.measure({'skipinit': watched}, images=16)
  found = measured['skipinit']
  lines = [x for x in read_metrics(watched) if 'branch_share' in x]
  # Steps 0, 10, 20, 30, 40 and 45, the last.
  assert found['epoch'].tolist() == [x['epoch'] for x in lines]
  assert len(lines) == 6
  start = networks.at_start(load_run(watched).config, 32)
  shares = capture(start.model, start.variables, start.images)['share']
  # Other images: near, not equal.
  assert found['effective_depth'][0] == pytest.approx(shares.sum(), rel=0.15)
  assert saved_steps(watched) == [0, 20, 40, 45]
  assert found['checkpoint_epoch'] * 1437 / 32 == pytest.approx([0, 20, 40, 45])
  rate = load_recipe('digits').optimizer.learning_rate
  assert found['limit'] == pytest.approx(4 * [2 * 1.9 / rate])
  assert len({*found['eigenvalue']}) == 4
  assert (found['eigenvalue'] > 0).all()


def test_eigenvalues_of_very_deep_networks_are_left_out(
  watched, tmp_path, monkeypatch
):
  monkeypatch.setattr(along_training, 'DEEPEST', TINY['model.depth'] - 1)
  measured = along_training.measure({'skipinit': watched})
  found = measured['skipinit']
  assert found['effective_depth'].size == 6
  assert found['eigenvalue'].size == found['limit'].size == 0
  assert along_training.draw(measured, tmp_path)
  assert (tmp_path / 'along_training.md').read_text().endswith('| - | - |\n')


def test_the_table_along_training_has_the_first_and_the_last():
  found = {
    'epoch': [0.0, 1.0, 2.0],
    'effective_depth': [0.0, 0.7, 1.25],
    'checkpoint_epoch': [0.0, 1.9],
    'eigenvalue': [12.5, None],  # As JSON has what is not finite.
  }
  lines = along_training.table({'skipinit': found}).splitlines()
  assert lines[2] == '| SkipInit 0 | 0 | 1.25 (2) | 12.5 | - (1.9) |'


@pytest.mark.sampled(1)
@pytest.mark.parametrize('kind', ['propagation', 'curvature', 'training'])
def test_kinds_look_at_a_run(kind, watched, tmp_path, capsys):
  status, err = command(
    capsys, kind, f'--checkpoint={watched}', f'--out={tmp_path}'
  )
  assert status == 0, err
  assert list(tmp_path.glob('*.svg'))
  assert json.loads((tmp_path / f'{kind}.json').read_text())


def test_a_step_of_a_run_can_be_named(watched, tmp_path, capsys):
  eigenvalues = []
  for step in (20, 45):
    folder = watched / 'checkpoints' / str(step)
    args = 'curvature', f'--checkpoint={folder}', f'--out={tmp_path}'
    assert command(capsys, *args)[0] == 0
    measured = json.loads((tmp_path / 'curvature.json').read_text())
    eigenvalues += measured['10']['skipinit']['value']
  assert eigenvalues[0] != eigenvalues[1]
  args = 'curvature', f'--checkpoint={folder.parent}/7', f'--out={tmp_path}'
  status, err = command(capsys, *args)
  assert status == 2
  assert 'holds no checkpoint; steps saved: 0, 20, 40, 45' in err


def test_a_run_that_did_not_watch_is_told_how_to(tmp_path):
  train(set_fields(load_recipe('digits'), TINY), tmp_path)
  with pytest.raises(InputError, match=r'--config\.watch_every_steps=N'):
    along_training.measure({'skipinit': tmp_path})

"""The networks that come with the package: files, cards, page."""

import dataclasses
import hashlib
import shutil

import jax
import numpy as np
import pytest

from benchmarks import pretrained as making
from examples import export as example
from skipinit_jax import load_pretrained, pretrained
from skipinit_jax.analysis import __main__ as analysis
from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.pretrained import cards, pack, unpack
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.saved import load_run

NAMES = list(cards())


def test_every_file_has_a_card_and_is_small():
  files = {path.stem: path for path in pretrained.FOLDER.glob('*.npz')}
  assert files.keys() == set(NAMES) == set(making.NAMES)
  for name, path in files.items():
    assert path.stat().st_size == cards()[name]['bytes'] <= making.LARGEST


@pytest.mark.parametrize('name', NAMES)
def test_network_is_that_of_its_recipe_and_reaches_what_its_card_says(name):
  network = load_pretrained(name)
  card = network.card
  config = set_fields(load_recipe(card['recipe']), card['fields'])
  data = open_dataset(config.data)
  recipe = build_model(config, data.num_classes).clone(
    axis_name=None, dtype=None, classifier_init=None
  )
  fields = [f.name for f in dataclasses.fields(recipe)]
  for field in set(fields) - {'parent', 'name', 'classifier_init'}:
    assert getattr(network.model, field) == getattr(recipe, field), field
  images = jax.ShapeDtypeStruct((1, *data.image_shape), np.float32)
  expected = jax.eval_shape(
    lambda x: recipe.init(jax.random.key(0), x, train=False), images
  )
  assert jax.tree.map(np.shape, network.variables) == jax.tree.map(
    np.shape, dict(expected)
  )
  leaves = jax.tree.leaves(network.variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype('float32')}

  logits = np.asarray(jax.jit(network)(data.eval_images))
  top1 = np.mean(logits.argmax(-1) == data.eval_labels)
  assert len(logits) == card['run']['images']
  assert top1 == pytest.approx(card['top1'], abs=1.01 / len(logits))
  # Kernels of 8 bits cost no more than a few images.
  assert abs(top1 - card['run']['top1']) <= 0.006
  assert top1 > 0.95


def test_kernels_are_off_by_half_a_scale_at_most_and_the_rest_is_exact():
  rng = np.random.default_rng(0)
  spread = np.float32([1e-3, 1.0, 50.0, 0.0])
  kernel = (rng.normal(size=(3, 3, 5, 4)) * spread).astype(np.float32)
  tree = {
    'params': {
      'conv': {'kernel': kernel, 'alpha': np.float32(0.123456789)},
      'bias': rng.normal(size=7).astype(np.float32),
    }
  }
  found = unpack(pack(tree))
  assert found['params']['conv']['alpha'] == tree['params']['conv']['alpha']
  np.testing.assert_array_equal(found['params']['bias'], tree['params']['bias'])
  off = np.abs(found['params']['conv']['kernel'] - kernel).max((0, 1, 2))
  half = np.abs(kernel).max((0, 1, 2)) / 254
  assert (off <= half * 1.001).all()
  assert (off >= half * 0.5)[:3].all()
  assert found['params']['conv']['kernel'].dtype == np.float32
  assert pack(tree) == pack(tree)  # So that a checksum stays.


def test_an_unknown_name_gets_the_nearest_one():
  with pytest.raises(InputError, match='digits-wrn16-skipinit'):
    load_pretrained('digits-wrn16-skipinitt')


@pytest.mark.parametrize('harm', ['byte', 'short', 'missing'])
def test_a_file_that_is_not_the_published_one_is_refused(
  harm, tmp_path, monkeypatch
):
  folder = tmp_path / 'trained'
  shutil.copytree(pretrained.FOLDER, folder)
  monkeypatch.setattr(pretrained, 'FOLDER', folder)
  name = NAMES[0]
  load_pretrained(name)
  path = folder / f'{name}.npz'
  data = bytearray(path.read_bytes())
  if harm == 'missing':
    path.unlink()
  else:
    data[len(data) // 2] ^= 1
    path.write_bytes(data if harm == 'byte' else data[:-1])
  with pytest.raises(RunError, match='install the package again') as error:
    load_pretrained(name)
  assert '\n' not in str(error.value)
  assert name in str(error.value)


@pytest.mark.parametrize(
  'images',
  [
    np.zeros((2, 8, 8, 1), np.float32),
    np.zeros((8, 8, 1), np.uint8),
    np.zeros((2, 8, 8, 3), np.uint8),
    np.zeros((2, 28, 28, 1), np.uint8),
  ],
)
def test_images_that_it_was_not_trained_on_are_refused(images):
  network = load_pretrained('digits-wrn16-skipinit')
  with pytest.raises(
    InputError, match=r'\(n, 8, 8, 1\) with pixels from 0 to 16'
  ):
    network(images)


def test_a_name_stands_for_a_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('digits-wrn16-skipinit', 'digits-wrn16-batchnorm'):
    network, run = load_pretrained(name), load_run(name)
    assert run.data.name == run.config.data.name == 'digits'
    assert run.step == network.card['run']['steps']
    images = run.data.eval_images[:5]
    normalized = run.data.augmentation.normalize(images)
    np.testing.assert_allclose(
      run.model.apply(run.variables, normalized, train=False),
      network(images),
      rtol=1e-4,
      atol=1e-4,
    )
  (tmp_path / name).mkdir()
  with pytest.raises(InputError, match='holds no run'):  # The user's folder.
    load_run(name)


def test_a_name_has_no_training_to_look_at(tmp_path, monkeypatch, capsys):
  measured = []
  monkeypatch.setattr(
    analysis, 'measure', lambda kind, *_: measured.append(kind) or {}
  )
  for kind in analysis.KINDS.values():
    monkeypatch.setattr(kind, 'draw', lambda *_: [])
  flags = ['--checkpoint=digits-wrn16-nf', f'--out={tmp_path}']
  monkeypatch.setattr('sys.argv', ['analysis', 'all', *flags])
  analysis.main()
  assert measured == [kind for kind in analysis.KINDS if kind != 'training']
  monkeypatch.setattr('sys.argv', ['analysis', 'training', *flags])
  with pytest.raises(SystemExit) as end:
    analysis.main()
  assert end.value.code == 2
  assert 'digits-wrn16-nf: only its end is known' in capsys.readouterr().err


def test_the_example_of_exports_ships_one(capsys):
  example.main()
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('folded away: params.stage1.block1.conv2.alpha')
  top1 = cards()['digits-wrn16-skipinit']['top1']
  assert float(lines[-1].split()[0]) == pytest.approx(100 * top1, abs=0.3)


def test_it_is_short_where_it_is_printed():
  assert len(repr(load_pretrained(NAMES[0]))) < 2000


@pytest.mark.parametrize('name', NAMES)
def test_the_scale_of_pixels_is_that_of_the_data(name):
  card = cards()[name]
  images = open_dataset(load_recipe(card['recipe']).data).eval_images
  assert card['pixels'] == [images.min(), images.max()]


def test_checksums_are_of_the_files():
  for name in NAMES:
    data = (pretrained.FOLDER / f'{name}.npz').read_bytes()
    assert hashlib.sha256(data).hexdigest() == cards()[name]['sha256']


def test_page_has_the_table_of_the_cards():
  page = making.PAGE.read_text()
  assert making.table() in page
  for name in NAMES:
    rates = cards()[name]['fields']['optimizer.learning_rate']
    assert rates == making.RATES[making.NAMES[name][1]]

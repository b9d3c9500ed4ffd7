"""CIFAR as tfds writes it: decoded once, resident, trained."""

import json

import numpy as np
import pytest
from image_sets import encode, write_tfds
from runs import metric_lines, run

from skipinit_jax import files
from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import default_config


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
  """A data folder with 64 and 30 images in CIFAR-10's format."""
  folder = tmp_path_factory.mktemp('tfds')
  rng = np.random.default_rng(0)
  splits, arrays = {}, {}
  for split, size in (('train', 64), ('test', 30)):
    images = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, size)
    splits[split] = [
      (f'{split}_{i}', encode(image, 'PNG'), int(label))
      for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    arrays[split] = images, labels
  write_tfds(folder / 'cifar10' / '3.0.2', splits, 10)
  return folder, arrays


def config_of(folder):
  config = default_config().data
  with config.unlocked():
    config.name, config.dir = 'cifar10', str(folder)
  return config


def ordered(images, labels):
  """In an order that does not depend on how the records were written."""
  order = sorted(range(len(images)), key=lambda i: images[i].tobytes())
  return images[order], np.asarray(labels)[order]


def test_images_come_out_as_they_went_in_and_are_kept(cifar):
  folder, arrays = cifar
  for _ in range(2):  # Decoded, and then from the file beside the records.
    data = open_dataset(config_of(folder))
    for split, got in (
      ('train', (data.images, data.labels)),
      ('test', (data.eval_images, data.eval_labels)),
    ):
      for ours, theirs in zip(
        ordered(*got), ordered(*arrays[split]), strict=True
      ):
        np.testing.assert_array_equal(ours, theirs)
  kept = sorted(p.name for p in (folder / 'cifar10/3.0.2').glob('decoded-*'))
  assert kept == ['decoded-test-30.npz', 'decoded-train-64.npz']


def flip(path):
  """One bit of a pixel."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def shrink(path):
  """One bit of a header: numpy reads fewer pixels, and no checksum."""
  content = path.read_bytes()
  assert content.count(b'32, 32, 3)') == 1
  path.write_bytes(content.replace(b'32, 32, 3)', b'32, 22, 3)'))


HARM = {
  'shrunk': shrink,
  'flipped': flip,
  'cut': lambda path: path.write_bytes(path.read_bytes()[:-1000]),
  'empty': lambda path: path.write_bytes(b''),
  'places': lambda path: path.write_bytes(path.read_bytes()[5000:]),
  'text': lambda path: path.write_text('x' * 10000),
  'another array': lambda path: np.savez(path, images=np.zeros(3)),
}


@pytest.mark.parametrize('harm', HARM)
def test_a_damaged_file_of_pixels_is_set_aside_and_made_again(
  cifar, harm, capsys
):
  folder, _ = cifar
  whole = open_dataset(config_of(folder))
  path = folder / 'cifar10/3.0.2/decoded-train-64.npz'
  HARM[harm](path)
  damaged = path.read_bytes()
  capsys.readouterr()
  for lines in (1, 0):  # Found once, and whole again after.
    data = open_dataset(config_of(folder))
    np.testing.assert_array_equal(data.images, whole.images)
    np.testing.assert_array_equal(data.labels, whole.labels)
    said = [
      line
      for line in capsys.readouterr().err.splitlines()
      if 'decoded-train-64.npz is damaged' in line
    ]
    assert len(said) == lines
  aside = path.with_name(f'damaged-{path.name}')
  assert aside.read_bytes() == damaged
  aside.unlink()


def test_a_disk_that_fails_is_no_damage(cifar, monkeypatch):
  folder, _ = cifar
  open_dataset(config_of(folder))
  monkeypatch.setattr(files, 'PAUSES', ())

  def fail(file):
    raise OSError(5, 'Input/output error')

  with monkeypatch.context() as patch:
    patch.setattr(np, 'load', fail)
    with pytest.raises(RunError, match=r'npz: Input/output error'):
      open_dataset(config_of(folder))
  here = {path.name for path in (folder / 'cifar10/3.0.2').iterdir()}
  assert 'decoded-train-64.npz' in here
  assert not [name for name in here if name.startswith('damaged-')]


def test_a_set_that_is_not_there_names_the_command(tmp_path):
  with pytest.raises(InputError, match=r'skipinit_jax\.data prepare cifar10'):
    open_dataset(config_of(tmp_path))


def test_its_recipe_trains(cifar, tmp_path):
  folder, _ = cifar
  run(
    tmp_path / 'run',
    '--config=cifar10',
    f'--config.data.dir={folder}',
    '--config.epochs=2',
    '--config.batch_size=16',
    '--config.allow_cpu=True',
    '--config.model.depth=10',
    '--config.model.width=1',
    '--config.schedule.hold_epochs=1',
    '--config.log_every_steps=4',
    '--config.data.cutout=8',
    '--config.data.cutmix=1.0',
    devices=4,
  )
  assert len(metric_lines(tmp_path / 'run')) == 4
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['status'] == 'completed'

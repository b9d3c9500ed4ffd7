"""Prepared sets with smaller images: what is re-encoded, and what stays."""

import io
import json
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from image_sets import encode, picture, stream_config, write_tfds
from PIL import Image, JpegImagePlugin

pytest.importorskip('tensorflow_datasets')
pytest.importorskip('array_record')
pytest.importorskip('simplejpeg')
pytest.importorskip('cv2')

from skipinit_jax.data import imagenet, open_dataset, prepare, shrink
from skipinit_jax.data.__main__ import main
from skipinit_jax.data.decode import DecodeError
from skipinit_jax.data.sources import open_source
from skipinit_jax.data.tfds import newest_version
from skipinit_jax.errors import InputError
from skipinit_jax.training import train
from skipinit_jax.training.changes import check_form
from skipinit_jax.training.config import default_config
from skipinit_jax.training.describe import describe

SIDE = 64
SIZES = {'train': 9, 'validation': 3}
FORM = 'shorter side at most 64 pixels, re-encoded as JPEG of quality 95'


def files():
  """Name -> (image file, its size once it is shrunk or None if it stays)."""
  rng = np.random.default_rng(0)

  def image(height, width, *args, **options):
    return encode(picture(rng, height, width, 24), *args, **options)

  broken = image(200, 300)
  return {
    'wide': (image(128, 200), (64, 100)),
    'tall': (image(301, 100, quality=80), (193, 64)),
    'by one': (image(65, 65), (64, 64)),
    'equal': (image(64, 640), None),
    'small': (image(20, 640), None),
    'small png': (image(64, 64, 'PNG'), None),
    'png': (image(96, 192, 'PNG'), (64, 128)),
    'gray': (image(128, 128, 'JPEG', 'L'), (64, 64)),
    'broken': (broken[: len(broken) // 2], None),
  }


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
  monkeypatch.setattr(imagenet, 'SIZES', SIZES)


def write(folder):
  found = files()
  train = [
    (name, data, 7 * i) for i, (name, (data, _)) in enumerate(found.items())
  ]
  validation = [(f'v {name}', data, 900 + i) for name, data, i in train[:3]]
  splits = {'train': train, 'validation': validation}
  return write_tfds(folder / 'imagenet2012' / '5.1.0', splits, 1000)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """The folders of the whole set and of the smaller one, and what was said."""
  data_dir = tmp_path_factory.mktemp('data')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(imagenet, 'SIZES', SIZES)
    whole = write(data_dir)
    said = prepare.prepare('imagenet2012', data_dir, shorter_side=SIDE)
  return whole, whole.parent / 'shorter_side_64' / '5.1.0', said


def records(folder):
  source = open_source('imagenet2012', folder)
  opened = {split: source.open(split) for split in source.splits}
  return {
    split: [each[i] for i in range(len(each))] for split, each in opened.items()
  }


def test_names_labels_and_places_stay(both):
  whole, smaller, _ = both
  before, after = records(whole), records(smaller)
  assert {split: len(each) for split, each in after.items()} == SIZES
  for split, each in before.items():
    assert [(r.name, r.label) for r in after[split]] == [
      (r.name, r.label) for r in each
    ]
  assert {p.name for p in smaller.iterdir()} == {
    p.name for p in whole.iterdir()
  }


def test_what_is_larger_is_re_encoded_and_the_rest_keeps_its_bytes(both):
  _, smaller, _ = both
  for record in records(smaller)['train']:
    data, size = files()[record.name.partition(' (')[0]]
    if size is None:
      assert record.data == data
      continue
    image = Image.open(io.BytesIO(record.data))
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    assert image.size == size[::-1]
    assert min(image.size) == SIDE
    # 95 by libjpeg's own tables, and a quarter of the chroma.
    wanted = Image.open(
      io.BytesIO(encode(np.zeros((8, 8, 3), np.uint8), quality=95))
    )
    assert image.quantization == wanted.quantization
    assert JpegImagePlugin.get_sampling(image) == 2


def test_pixels_are_means_of_what_they_cover(both):
  rng = np.random.default_rng(1)
  pixels = picture(rng, 192, 288, 24)
  data = shrink.reencode(encode(pixels, 'PNG'), SIDE)
  means = pixels.reshape(64, 3, 96, 3, 3).mean((1, 3))
  found = np.asarray(Image.open(io.BytesIO(data)), float)
  assert found.shape == means.shape
  assert np.abs(found - means).mean() < 4  # Colours are coarser than light.
  # A pixel of three by three would be further off, where grain is fine.
  noise = rng.integers(0, 256, (192, 288, 1), np.uint8).repeat(3, -1)
  means = noise.reshape(64, 3, 96, 3, 3).mean((1, 3))
  data = shrink.reencode(encode(noise, 'PNG'), SIDE)
  found = np.asarray(Image.open(io.BytesIO(data)), float)
  assert np.abs(found - means).mean() < 3
  assert np.abs(found - noise[1::3, 1::3]).mean() > 20


def test_what_cannot_be_decoded_is_an_error_of_one_image():
  with pytest.raises(DecodeError):
    shrink.reencode(b'not an image', SIDE)
  assert shrink.reencode(files()['small'][0], SIDE) is None


def test_the_set_says_what_it_is(both, capsys):
  whole, smaller, said = both
  assert said.startswith(
    f'made {smaller}: train 9, validation 3 images ({FORM}),'
  )
  assert said.endswith('re-encoded 8, not larger anyway 3, undecodable 1')
  info = json.loads((smaller / 'dataset_info.json').read_text())
  was = json.loads((whole / 'dataset_info.json').read_text())
  assert (info['configName'], info['configDescription']) == (
    'shorter_side_64',
    FORM,
  )
  kept = sum(len(r.data) for each in records(smaller).values() for r in each)
  stored = sum(int(split['numBytes']) for split in info['splits'])
  assert kept < stored < kept + 12 * 200  # Names and labels too.
  changed = {'configName', 'configDescription', 'splits'}
  same = info.keys() - changed
  assert {key: info[key] for key in same} == {key: was[key] for key in same}
  assert main(['check', 'imagenet2012', '--data-dir', str(smaller)]) == 1
  out = capsys.readouterr().out
  assert out.startswith(f'imagenet2012: {FORM}\n')
  assert 'broken: broken (train[' in out  # As it was.
  main(['check', 'imagenet2012', '--data-dir', str(whole)])
  assert FORM not in capsys.readouterr().out


def test_a_run_says_what_it_trains_on(both):
  for folder, form in zip(both[:2], ('', f' ({FORM})'), strict=True):
    config = default_config()
    config.data = stream_config(name='imagenet2012', dir=str(folder))
    data = open_dataset(config.data)
    program = types.SimpleNamespace(
      config=config,
      data=data,
      model=types.SimpleNamespace(dtype='float32', num_blocks=3),
    )
    state = types.SimpleNamespace(step=0, params={'kernel': jnp.ones(3)})
    times = types.SimpleNamespace(total=3)
    text = describe(program, state, times, Path('run'))
    assert f'data: imagenet2012{form}, 9 images to train on' in text


def test_a_run_does_not_go_on_with_other_pixels_unseen(both, tmp_path):
  config = default_config()
  config.update({'allow_cpu': True, 'batch_size': 4, 'epochs': 2.0})
  config.model.update({'depth': 10, 'width': 1})
  config.schedule.update({'name': 'cosine', 'warmup_epochs': 0.0})
  config.data = stream_config(
    name='imagenet2012', dir=str(both[0]), validation=4, bad_share=0.9
  )
  config.checkpoint_every_steps = 1
  run = tmp_path / 'run'
  train(config, run)
  (run / 'result.json').unlink()
  shutil.rmtree(run / 'checkpoints' / '2')  # As if it was stopped there.
  config.data.dir = str(both[1])
  with pytest.raises(InputError) as error:
    train(config, run)
  line = str(error.value)
  assert f'is of a run on original images, but data.dir holds {FORM}' in line
  assert '\n' not in line
  config.accept_changes = True
  assert train(config, run)['status'] == 'completed'


@pytest.mark.parametrize(('theirs', 'ours'), [('', 'a'), ('a', ''), ('a', 'b')])
def test_only_another_form_of_the_images_is_refused(theirs, ours):
  path = Path('run/checkpoints/10')
  with pytest.raises(InputError, match=f'run on {theirs or "original images"}'):
    check_form(path, {'form': theirs}, ours, False)
  check_form(path, {'form': theirs}, ours, True)
  check_form(path, {'form': theirs}, theirs, False)
  check_form(path, {}, ours, False)  # Made before it was saved.


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
  whole = write(tmp_path)
  expected = shrink.expected_size(open_source('imagenet2012', whole), SIDE)
  room = types.SimpleNamespace(free=expected)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: room)
  with pytest.raises(InputError) as error:
    prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  assert str(error.value) == (
    f'{tmp_path} has {expected / 1e9:.3g} GB free, but '
    f'{1.1 * expected / 1e9:.3g} GB are needed'
  )
  assert not (whole.parent / 'shorter_side_64').exists()
  room.free = 1.2 * expected
  prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  made = (whole.parent / 'shorter_side_64' / '5.1.0').iterdir()
  images = [path for path in made if '.array_record' in path.name]
  # Each of two files a split is filled up to 64 KB, which real ones are not.
  assert expected < sum(path.stat().st_size for path in images) * 1.1


def test_asked_again_it_is_there(both):
  whole, smaller, _ = both
  before = {p: p.stat().st_mtime_ns for p in smaller.iterdir()}
  said = prepare.prepare('imagenet2012', whole.parents[1], shorter_side=SIDE)
  assert said.startswith(f'already there: {smaller}: train 9, ')
  assert before == {p: p.stat().st_mtime_ns for p in smaller.iterdir()}


def test_two_sets_in_one_folder_are_told_apart(both):
  whole, smaller, _ = both
  with pytest.raises(InputError, match='several configurations') as error:
    open_source('imagenet2012', whole.parents[1])
  assert f'{whole}, {smaller}' in str(error.value)
  assert newest_version(whole.parent) == whole


def test_what_was_cut_off_is_made_anew(tmp_path, monkeypatch):
  whole = write(tmp_path)
  left = whole.parent / 'shorter_side_64' / '5.1.0.incomplete'
  left.mkdir(parents=True)
  (left / 'dataset_info.json').write_text('of a process that was killed')
  made, reencode = [], shrink.reencode

  def interrupted(data, side):
    made.append(side)
    if len(made) == sum(SIZES.values()) + 5:  # All are sampled before.
      raise KeyboardInterrupt
    return reencode(data, side)

  monkeypatch.setattr(shrink, 'reencode', interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  assert list(left.parent.iterdir()) == []
  monkeypatch.undo()
  monkeypatch.setattr(imagenet, 'SIZES', SIZES)
  prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  assert [path.name for path in left.parent.iterdir()] == ['5.1.0']


def test_a_damaged_record_and_a_wrong_size_are_named(tmp_path, monkeypatch):
  whole = write(tmp_path)
  monkeypatch.setitem(SIZES, 'validation', 4)
  with pytest.raises(InputError, match='validation: 3 images, not 4'):
    prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  monkeypatch.setitem(SIZES, 'validation', 3)
  path = min(whole.glob('*train.array_record*'))
  content = bytearray(path.read_bytes())
  content[5000] ^= 0x55
  path.write_bytes(content)
  with pytest.raises(
    InputError, match=r'record \d of .*train.array_rec'
  ) as error:
    prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)
  assert '\n' not in str(error.value)
  assert list((whole.parent / 'shorter_side_64').iterdir()) == []


def test_the_whole_set_is_prepared_first(tmp_path, monkeypatch):
  def whole(name, data_dir, manual_dir):
    assert (name, manual_dir) == ('imagenet2012', Path('archives'))
    return write(data_dir), True

  monkeypatch.setattr(prepare, '_prepare_whole', whole)
  said = prepare.prepare('imagenet2012', tmp_path, Path('archives'), SIDE)
  assert said.startswith(f'made {tmp_path / "imagenet2012/shorter_side_64"}')


def test_a_folder_in_the_way_is_named_before_anything_is_made(tmp_path):
  whole = write(tmp_path)
  (whole.parent / 'shorter_side_64' / '5.1.0').mkdir(parents=True)
  with pytest.raises(InputError, match='holds no prepared data set; remove it'):
    prepare.prepare('imagenet2012', tmp_path, shorter_side=SIDE)

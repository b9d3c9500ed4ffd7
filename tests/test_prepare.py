"""Preparing, converting and checking data sets, by the real command line."""

import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import (
  coloured,
  encode,
  labelled,
  write_folders,
  write_tfds,
  write_toy,
)

pytest.importorskip('tensorflow_datasets')
pytest.importorskip('array_record')
pytest.importorskip('simplejpeg')

from skipinit_jax.data import imagenet
from skipinit_jax.data.__main__ import main
from skipinit_jax.data.convert import _masked_crc32c, tfrecords
from skipinit_jax.data.decode import jpeg_size
from skipinit_jax.data.sources import open_source
from skipinit_jax.errors import InputError

needs_tensorflow = pytest.mark.skipif(
  not importlib.util.find_spec('tensorflow'), reason='TensorFlow prepares'
)
ROOT = Path(__file__).parents[1]
TRAIN = {'n01440764': 7, 'n01751748': 9, 'n15075141': 6}  # Others: one each.
SIZES = {'train': 1019, 'validation': 12}
# The challenge's labels of the first validation images.
TRUE_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109, 286]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
  monkeypatch.setattr(imagenet, 'SIZES', SIZES)


def tar(files: dict[str, bytes]) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return out.getvalue()


def synsets():
  return {synset: TRAIN.get(synset, 1) for synset in imagenet.synsets()}


def write_archives(folder, train=None, validation=range(12)):
  """Both archives of the challenge, with few and small images."""
  folder.mkdir(parents=True)
  train = synsets() if train is None else train
  inner = {
    f'{synset}.tar': tar(
      {f'{synset}_{i}.JPEG': coloured(i % 5, i) for i in range(count)}
    )
    for synset, count in train.items()
  }
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(tar(inner))
  # In the archive's own order, which is not that of the names.
  images = {
    f'ILSVRC2012_val_{i + 1:08d}.JPEG': coloured(i % 5, i)
    for i in reversed(validation)
  }
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(tar(images))
  return folder


COMMAND = f"""
import sys
from skipinit_jax.data import imagenet
from skipinit_jax.data.__main__ import main
imagenet.SIZES = {SIZES}
sys.exit(main(sys.argv[1:]))
"""


def command(*args):
  return subprocess.run(
    [sys.executable, '-c', COMMAND, *map(str, args)],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def refuse(*args):
  """Bad input: exit status 2."""
  with pytest.raises(SystemExit) as ended:
    main([*args])
  assert ended.value.code == 2


def error_line(done):
  """The one line of a command that failed on bad input."""
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert lines[-1].startswith('error: ')
  assert 'Traceback' not in done.stderr
  return lines[-1]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Prepared from archives by the project's own command: (folder, process)."""
  folder = tmp_path_factory.mktemp('imagenet')
  manual = write_archives(folder / 'manual')
  done = command(
    'prepare',
    'imagenet2012',
    '--manual-dir',
    manual,
    '--data-dir',
    folder / 'data',
  )
  assert done.returncode == 0, done.stderr
  return folder / 'data', done


@needs_tensorflow
def test_prepare_writes_every_image_with_its_label(made):
  folder, done = made
  assert 'train 1,019, validation 12 images' in done.stdout
  source = open_source('imagenet2012', folder)
  assert len(source.classes) == 1000
  validation = source.open('validation')
  labels = {}
  for i in range(12):
    name, data, label = validation[i]
    number = int(name.split('_')[2][:8])
    labels[number - 1] = label
    assert data == coloured((number - 1) % 5, number - 1)
  assert labels == dict(enumerate(TRUE_LABELS))
  train = source.open('train')
  names = set()
  for i in range(len(train)):
    name, data, label = train[i]
    synset, number = name.split('.')[0].split('_')
    assert synset == imagenet.synsets()[label]
    assert data == coloured(int(number) % 5, int(number))
    names.add((synset, int(number)))
  assert names == {(s, i) for s, n in synsets().items() for i in range(n)}


@needs_tensorflow
def test_what_was_prepared_passes_the_check(made, capsys, monkeypatch):
  arguments = ['check', 'imagenet2012', '--data-dir', str(made[0])]
  assert main(arguments) == 1  # Twelve images are not of all classes.
  out = capsys.readouterr().out
  assert 'train: 1,019 records, 0 broken' in out
  assert 'broken: validation: 988 classes have no image' in out
  assert '1 broken' in out
  monkeypatch.setitem(SIZES, 'train', 1_281_167)
  assert main(arguments) == 1
  assert 'train: 1,019 images, not 1,281,167' in capsys.readouterr().out


@needs_tensorflow
def test_preparing_again_says_that_it_is_there(made):
  done = command(
    'prepare',
    'imagenet2012',
    '--manual-dir',
    made[0].parent / 'manual',
    '--data-dir',
    made[0],
  )
  assert done.returncode == 0
  assert 'already there' in done.stdout


@needs_tensorflow
def test_a_smaller_set_is_made_of_the_whole_one(made, tmp_path):
  folder = shutil.copytree(made[0], tmp_path / 'data')
  arguments = ('--data-dir', folder, '--shorter-side', 44)
  done = command('prepare', 'imagenet2012', *arguments)
  assert done.returncode == 0, done.stderr
  assert 'train 1,019, validation 12 images (shorter side at' in done.stdout
  whole = open_source('imagenet2012', made[0])
  place = folder / 'imagenet2012' / 'shorter_side_44' / '5.1.0'
  smaller = open_source('imagenet2012', place)
  for split, count in SIZES.items():
    before, after = whole.open(split), smaller.open(split)
    assert len(before) == len(after) == count
    for i in range(count):
      assert (after[i].name, after[i].label) == (
        before[i].name,
        before[i].label,
      )
      assert min(jpeg_size(after[i].data)) <= 44


@needs_tensorflow
@pytest.mark.slow
def test_a_folder_that_holds_nothing_is_not_taken_for_prepared(tmp_path):
  half = tmp_path / 'cifar10' / '3.0.2'
  half.mkdir(parents=True)
  done = command('prepare', 'cifar10', '--data-dir', tmp_path)
  assert 'holds no prepared data set; remove it' in error_line(done)


@needs_tensorflow
def test_a_damaged_inner_archive_leaves_nothing_behind(tmp_path):
  manual = write_archives(tmp_path / 'manual')
  outer = {f'{synset}.tar': tar({}) for synset in imagenet.synsets()}
  outer['n01440764.tar'] = b'not an archive' * 100
  (manual / 'ILSVRC2012_img_train.tar').write_bytes(tar(outer))
  done = command(
    'prepare',
    'imagenet2012',
    '--manual-dir',
    manual,
    '--data-dir',
    tmp_path / 'data',
  )
  assert 'imagenet2012 could not be prepared' in error_line(done)
  assert not list((tmp_path / 'data').rglob('dataset_info.json'))
  assert not list((tmp_path / 'data').rglob('*array_record*'))


ARCHIVE_FAULTS = {
  'no train': 'no ILSVRC2012_img_train.tar in',
  'no validation': 'no ILSVRC2012_img_val.tar in',
  'cut': 'is cut off or damaged',
  'classes': r'999 members, 1 missing \(the first: n01440764.tar\)',
  'strange class': r'1 not expected \(the first: n99999999.tar\)',
  'validation': r'11 members.* 1 missing \(the first: \S+_00000004.JPEG\)',
  'name': r'1 not expected \(the first: cat.jpg\)',
}


@pytest.mark.parametrize('fault', ARCHIVE_FAULTS)
def test_archives_that_are_not_the_published_ones_are_refused(tmp_path, fault):
  numbers = set(range(12))
  classes = dict.fromkeys(imagenet.synsets(), 0)
  if fault == 'validation':  # tfds would mislabel all from the fourth on.
    numbers -= {3}
  if fault == 'strange class':
    classes['n99999999'] = 1
  if fault == 'classes':
    del classes['n01440764']
  folder = write_archives(tmp_path / 'a', classes, sorted(numbers))
  train, validation = (folder / name for name in imagenet.ARCHIVES)
  if fault == 'no train':
    train.unlink()
  elif fault == 'no validation':
    validation.unlink()
  elif fault == 'cut':
    content = validation.read_bytes()
    # In the last image: all names are there.
    end = content.rindex(b'\xff\xd9')
    validation.write_bytes(content[: end - 100])
  elif fault == 'name':
    images = {f'ILSVRC2012_val_{i + 1:08d}.JPEG': b'x' for i in range(11)}
    validation.write_bytes(tar(images | {'cat.jpg': b'x'}))
  with pytest.raises(InputError, match=ARCHIVE_FAULTS[fault]) as caught:
    imagenet.check_archives(folder)
  assert '\n' not in str(caught.value)


def test_archives_of_the_published_form_pass(tmp_path, monkeypatch):
  folder = write_archives(tmp_path / 'a', dict.fromkeys(imagenet.synsets(), 0))
  imagenet.check_archives(folder)
  monkeypatch.setitem(SIZES, 'validation', 50_000)
  message = r'to 00050000.JPEG; it holds 12 members, 49988 missing'
  with pytest.raises(InputError, match=message):
    imagenet.check_archives(folder)


def test_names_imply_the_published_labels():
  for number, label in enumerate(TRUE_LABELS):
    assert imagenet.label_of(f'ILSVRC2012_val_{number + 1:08d}.JPEG') == label
  assert imagenet.label_of('n01440764_10026.JPEG (train[3])') == 0
  assert imagenet.label_of('n15075141_9993.JPEG') == 999
  assert imagenet.label_of('ILSVRC2012_val_00050001.JPEG') is None
  assert imagenet.label_of('holiday.jpg') is None


@pytest.fixture
def flawed(tmp_path):
  """A set whose third record is cut off and whose fifth is a PNG."""
  train = labelled(10)
  name, data, label = train[2]
  train[2] = name, data[: len(data) // 2], label
  train[4] = train[4][0], encode(np.zeros((9, 9, 3), np.uint8), 'PNG'), 4
  splits = {'train': train, 'test': labelled(5)}
  write_tfds(tmp_path / 'toy' / '1.0.0', splits, 5, shards=1)
  return tmp_path


def test_check_names_what_is_broken(flawed, capsys):
  assert main(['check', 'toy', '--data-dir', str(flawed)]) == 1
  out = capsys.readouterr().out
  (line,) = [line for line in out.splitlines() if line.startswith('broken')]
  assert line.startswith('broken: 2.JPEG (train[2]): ')
  assert 'runcated' in line
  assert 'train: 10 records, 1 broken, 1 not decoded' in out
  assert 'by Pillow: 4.JPEG (train[4])' in out
  assert 'test: 5 records, 0 broken, 0 not' in out


def test_check_finds_wrong_labels_and_empty_classes(tmp_path, capsys):
  train = [(f'{i}.JPEG', coloured(i % 3, i), i % 3) for i in range(6)]
  train[3] = train[3][0], train[3][1], 7
  write_tfds(tmp_path / 'toy' / '1.0.0', {'train': train}, 5, shards=1)
  assert main(['check', 'toy', '--data-dir', str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert 'label 7 of 3.JPEG (train[3]) is outside the 5 classes' in out
  assert 'train: 2 classes have no image (the first: 3)' in out
  assert '2 broken' in out


def test_check_compares_imagenet_labels_with_names(tmp_path, capsys):
  images = [
    (f'ILSVRC2012_val_{i + 1:08d}.JPEG', coloured(i % 5, i), label)
    for i, label in enumerate(TRUE_LABELS)
  ]
  images[4] = images[4][0], images[4][1], TRUE_LABELS[5]
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  write_tfds(folder, {'validation': images}, 1000, shards=1)
  assert main(['check', 'imagenet2012', '--data-dir', str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert '00000005.JPEG (validation[4]): label 57, but by its name 516' in out
  assert '1 broken' in out


def test_check_uses_processes_and_finds_the_same(tmp_path):
  count = 2 * 256 + 5  # Three chunks.
  data = coloured(0, 0)
  train = [(f'{i}.JPEG', data, i % 5) for i in range(count)]
  for i in (3, 300, count - 1):
    train[i] = f'{i}.JPEG', data[:200], 0
  write_tfds(tmp_path / 'toy' / '1.0.0', {'train': train}, 5, shards=1)
  done = command('check', 'toy', '--data-dir', tmp_path, '--workers', 2)
  assert done.returncode == 1
  broken = [
    line.split()[1] for line in done.stdout.splitlines() if 'broken: ' in line
  ]
  assert sorted(broken) == sorted(f'{i}.JPEG' for i in (3, 300, count - 1))
  assert f'train: {count} records, 3 broken' in done.stdout


def test_check_reads_class_folders(tmp_path, capsys):
  write_folders(tmp_path, {'train': labelled(6), 'val': labelled(6)})
  arguments = ['check', 'folder', '--data-dir', str(tmp_path)]
  assert main(arguments) == 0
  (tmp_path / 'val' / 'class1' / '2.JPEG').write_bytes(b'')
  assert main(arguments) == 1
  assert 'broken: class1/2.JPEG: not an image' in capsys.readouterr().out


def test_crc32c_is_the_published_one():
  # RFC 3720, B.4, and the check value of CRC catalogues.
  masked = [
    (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    for crc in (0x8A9136AA, 0xE3069283)
  ]
  assert _masked_crc32c(bytes(32)) == masked[0]
  assert _masked_crc32c(b'123456789') == masked[1]


def to_tfrecord(folder):
  """Rewrites a prepared set as tfds would have written it as TFRecord."""
  from array_record.python import array_record_module

  for path in list(folder.glob('*.array_record*')):
    reader = array_record_module.ArrayRecordReader(str(path))
    target = path.with_name(path.name.replace('array_record', 'tfrecord'))
    with target.open('wb') as file:
      for record in reader.read_all():
        length = struct.pack('<Q', len(record))
        file.write(length + struct.pack('<I', _masked_crc32c(length)))
        file.write(record + bytes(4))
    reader.close()
    path.unlink()
  info = folder / 'dataset_info.json'
  fields = json.loads(info.read_text())
  fields['fileFormat'] = 'tfrecord'
  info.write_text(json.dumps(fields))


@pytest.fixture
def recorded(tmp_path):
  """A prepared set in TFRecord, and what it held before: (folder, records)."""
  folder = write_toy(tmp_path / 'old', 11, 5)
  before = all_records(tmp_path / 'old')
  to_tfrecord(folder)
  return folder, before


def all_records(folder):
  source = open_source('toy', folder)
  opened = {split: source.open(split) for split in source.splits}
  return {
    split: [records[i] for i in range(len(records))]
    for split, records in opened.items()
  }


def test_convert_keeps_every_record_in_its_place(recorded, tmp_path, capsys):
  folder, before = recorded
  with pytest.raises(InputError, match=r'tfrecord files.* convert'):
    open_source('toy', tmp_path / 'old')
  target = tmp_path / 'new' / 'toy' / '1.0.0'
  assert main(['convert', str(folder), str(target)]) == 0
  assert '16 records in 4 files' in capsys.readouterr().out
  assert all_records(tmp_path / 'new') == before
  assert [path.name for path in target.parent.iterdir()] == ['1.0.0']
  assert list(folder.glob('*tfrecord*'))  # The old set stays.
  refuse('convert', str(folder), str(target))
  assert 'exists; name a folder that does not' in capsys.readouterr().err


CONVERT_FAULTS = {
  'cut': (lambda data: data[:-100], 'cut off'),
  'head': (lambda data: data + b'12345', 'cut off'),
  'flipped': (lambda data: bytes([data[0] ^ 1]) + data[1:], 'byte 0'),
  'short': (lambda data: b'', 'has 0 records, not 6'),
}


@pytest.mark.parametrize('fault', CONVERT_FAULTS)
def test_damaged_tfrecords_leave_nothing_behind(
  recorded, tmp_path, capsys, fault
):
  folder, _ = recorded
  damage, message = CONVERT_FAULTS[fault]
  path = min(folder.glob('*train*'))
  path.write_bytes(damage(path.read_bytes()))
  target = tmp_path / 'new' / 'toy' / '1.0.0'
  refuse('convert', str(folder), str(target))
  error = capsys.readouterr().err.splitlines()[-1]
  assert message in error
  assert path.name in error
  assert list(target.parent.iterdir()) == []


@needs_tensorflow
def test_tensorflows_own_tfrecords_are_read(tmp_path):
  path = tmp_path / 'x.tfrecord'
  code = f"""
import tensorflow as tf
with tf.io.TFRecordWriter({str(path)!r}) as writer:
  for i in range(300):
    writer.write(bytes([i % 256]) * i)
"""
  subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
  assert list(tfrecords(path)) == [bytes([i % 256]) * i for i in range(300)]


MISUSES = {
  ('prepare', 'imagenet2013', '--data-dir', 'x'): 'invalid choice',
  ('prepare', 'cifar10'): '--data-dir',
  ('check', 'toy', '--data-dir', 'gs://b/x'): 'gs://b/x is a bucket',
  ('check', 'toy', '--data-dir', 'nowhere'): 'no toy in nowhere; run: ',
  ('convert', 'nowhere', 'x'): 'nowhere is no prepared data set',
  (): 'required: command',
}


@pytest.mark.parametrize('arguments', MISUSES)
def test_misuse_is_one_line_and_status_2(arguments, capsys):
  try:
    status = main(list(arguments))
  except SystemExit as exit:
    status = exit.code
  assert status == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert MISUSES[arguments] in line


@pytest.mark.skipif(
  bool(importlib.util.find_spec('tensorflow')), reason='TensorFlow is here'
)
def test_preparing_without_tensorflow_names_the_extra(capsys):
  refuse('prepare', 'cifar10', '--data-dir', 'x')
  error = capsys.readouterr().err
  assert error == (
    "error: tensorflow is not installed: pip install 'skipinit-jax[prepare]'\n"
  )

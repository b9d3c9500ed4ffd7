"""Data sets on disk: what is opened, read, refused and named."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from image_sets import (
  coloured,
  eval_batches,
  labelled,
  stream_config,
  take,
  train_batches,
  write_folders,
  write_tfds,
  write_toy,
)

pytest.importorskip('grain')
pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')
pytest.importorskip('tensorflow_datasets')

from skipinit_jax import files
from skipinit_jax.data import check, open_dataset, reading
from skipinit_jax.data.__main__ import main
from skipinit_jax.data.extras import require
from skipinit_jax.data.sources import open_source
from skipinit_jax.data.tfds import find_prepared
from skipinit_jax.errors import InputError, RunError

TRAIN, EVAL = 43, 26


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return write_toy(tmp_path_factory.mktemp('data'), TRAIN, EVAL)


@pytest.fixture
def no_pauses(monkeypatch):
  monkeypatch.setattr(files, 'PAUSES', (0.0, 0.0))


@pytest.fixture
def class_folders(tmp_path):
  splits = {'train': labelled(15, 'train_'), 'val': labelled(7, 'val_')}
  return write_folders(tmp_path, splits)


def damaged(tmp_path, damage):
  """A prepared set with one file replaced: by name of the record."""
  splits = {'train': labelled(12, 'train_'), 'test': labelled(4, 'test_')}
  name, data, label = splits['train'][6]
  splits['train'][6] = (name, damage(data), label)
  folder = write_tfds(tmp_path / 'toy' / '1.0.0', splits, 5, shards=1)
  return stream_config(dir=str(folder))


def test_a_truncated_file_is_named_with_its_record(tmp_path):
  data = open_dataset(damaged(tmp_path, lambda d: d[: len(d) // 2]))
  (batch,) = take(train_batches(data, 12), 1)
  (line,) = batch['broken']
  assert line.startswith('train_6.JPEG (train[6]): ')
  assert 'truncated' in line.lower()
  assert '\n' not in line


def test_a_damaged_chunk_of_the_file_names_its_record(tmp_path):
  from array_record.python import array_record_module

  setup = damaged(tmp_path, lambda data: data)
  (path,) = (tmp_path / 'toy' / '1.0.0').glob('*train.array_record*')
  content = bytearray(path.read_bytes())
  content[5000] ^= 0x55
  path.write_bytes(content)
  reader = array_record_module.ArrayRecordReader(str(path))
  unreadable = []
  for i in range(12):
    try:
      reader.read([i])
    except (RuntimeError, ValueError):
      unreadable.append(f'train[{i}]')
  assert len(unreadable) == 1
  (batch,) = take(train_batches(open_dataset(setup), 12), 1)
  (line,) = batch['broken']
  assert [line.partition(': ')[0]] == unreadable
  assert '\n' not in line


def test_class_folders_are_numbered_by_name(class_folders):
  data = open_dataset(stream_config(name='folder', dir=str(class_folders)))
  assert (data.num_classes, data.train_size, data.eval_size) == (5, 15, 7)
  source = open_source('folder', class_folders)
  assert list(source.classes) == [f'class{i}' for i in range(5)]
  train = source.open('train')
  for i in range(15):
    name, content, label = train[i]
    assert name.startswith(f'class{label}/train_')
    assert content == (class_folders / 'train' / name).read_bytes()
  assert len({train[i].name for i in range(15)}) == 15
  batches = take(train_batches(data, 5), 3)
  assert sorted(np.concatenate([b['label'] for b in batches])) == sorted(
    label for _, _, label in labelled(15)
  )


def no_files(folder):
  """Makes what is named like an image and is none: name -> the reason."""
  (folder / 'folder.jpg').mkdir()
  os.mkfifo(folder / 'pipe.jpg')
  os.symlink('nowhere.jpg', folder / 'link.jpg')
  os.symlink('circle.jpg', folder / 'circle.jpg')
  os.symlink('pipe.jpg', folder / 'to_pipe.jpg')
  os.symlink('/dev/zero', folder / 'to_device.jpg')
  with socket.socket(socket.AF_UNIX) as file:
    file.bind(str(folder / 'socket.jpg'))
  return {
    'folder.jpg': 'a folder, not a file',
    'pipe.jpg': 'a pipe, not a file',
    'link.jpg': 'a link that leads nowhere, not a file',
    'circle.jpg': 'a link that leads nowhere, not a file',
    'to_pipe.jpg': 'a pipe, not a file',
    'to_device.jpg': 'a device, not a file',
    'socket.jpg': 'a socket, not a file',
  }


def within(seconds, function):
  """What `function` returns, unless it hangs."""
  done = []
  thread = threading.Thread(target=lambda: done.append(function()), daemon=True)
  thread.start()
  thread.join(seconds)
  assert done, 'it hangs, or has raised an error'
  return done[0]


def test_what_is_no_file_is_named_and_counted_as_broken(
  class_folders, monkeypatch, capsys
):
  for split in ('train', 'val'):
    # A short name: that of a socket may have 108 characters.
    monkeypatch.chdir(class_folders / split / 'class0')
    reasons = no_files(Path())
  os.symlink('train_0.JPEG', class_folders / 'train' / 'class0' / 'whole.jpg')
  setup = stream_config(name='folder', dir=str(class_folders), bad_share=1.0)

  def first_epochs():
    data = open_dataset(setup)
    (train,) = take(train_batches(data, 23), 1)
    (evaluation,) = eval_batches(data, 14)
    return train, evaluation

  train, evaluation = within(120, first_epochs)
  wanted = [f'class0/{name}: {reason}' for name, reason in reasons.items()]
  assert sorted(train['broken']) == sorted(wanted)
  said = capsys.readouterr().err.splitlines()
  assert sorted(said) == sorted(
    f'could not be read, counted as wrong: {line}' for line in wanted
  )
  assert (evaluation['label'] == -1).sum() == len(wanted)

  arguments = ['check', 'folder', '--data-dir', str(class_folders)]
  assert within(120, lambda: main([*arguments, '--workers', '1'])) == 1
  lines = capsys.readouterr().out.splitlines()
  found = [line for line in lines if line.startswith('broken: ')]
  assert found == 2 * [f'broken: {line}' for line in sorted(wanted)]


def test_a_file_that_is_gone_since_it_was_listed_is_the_systems(
  class_folders, no_pauses, capsys
):
  data = open_dataset(stream_config(name='folder', dir=str(class_folders)))
  (class_folders / 'train' / 'class0' / 'train_5.JPEG').unlink()
  with pytest.raises(
    RunError, match=r'class0/train_5\.JPEG: No such file or directory'
  ):
    take(train_batches(data, 15), 1)


@pytest.mark.skipif(
  not Path('/proc/self/mem').is_file(), reason='reads it to get an EIO'
)
def test_an_error_in_mid_read_names_the_file(tmp_path):
  path = tmp_path / 'a.jpg'
  path.symlink_to('/proc/self/mem')
  with pytest.raises(OSError, match=r'Input/output error.*a\.jpg') as caught:
    reading.read_image(str(path), 'a')
  assert caught.value.errno == errno.EIO


@pytest.mark.skipif(
  not Path('/proc/self/fd').is_dir(), reason='finds descriptors in /proc'
)
def test_a_record_file_that_the_system_fails_to_read_is_opened_anew(tmp_path):
  """Its descriptor is put on a folder, so that pread(2) fails."""
  damaged(tmp_path, lambda data: data)
  train = open_source('toy', tmp_path).open('train')
  whole = [train[i] for i in range(len(train))]  # Opens the file.
  folder = os.open(tmp_path, os.O_RDONLY)
  for path in Path('/proc/self/fd').iterdir():
    if 'train.array_record' in os.path.realpath(path):
      os.dup2(folder, int(path.name))
  os.close(folder)
  with pytest.raises(OSError, match=r'pread\(\) failed: Is a directory'):
    train[3]
  assert [train[i] for i in range(len(train))] == whole


def test_names_that_are_not_ascii_are_read(class_folders):
  folder = class_folders / 'train' / 'class0'
  (folder / 'größe\u6f22.JPEG').write_bytes(coloured(0, 1))
  (folder / 'notes.txt').write_text('no image')
  train = open_source('folder', class_folders).open('train')
  assert len(train) == 16
  assert 'class0/größe\u6f22.JPEG' in {train[i].name for i in range(16)}


def bad_sets(tmp_path, prepared):
  """Name -> (changes to the recipe, what the error must say)."""
  here = str(prepared)
  return {
    'bucket': ({'dir': 'gs://bucket/data'}, 'is a bucket.*mount it'),
    'empty': ({'dir': ''}, 'data.dir=: expected the folder'),
    'absent': (
      {'dir': str(tmp_path), 'name': 'imagenet2012'},
      'no imagenet2012 in .* run: python -m skipinit_jax.data prepare '
      r'imagenet2012 --data-dir .* --manual-dir ARCHIVES \(needs: pip install',
    ),
    'split': (
      {'dir': here, 'train_split': 'trian'},
      "unknown split 'trian'; did you mean 'train'",
    ),
    'eval split': ({'dir': here, 'eval_split': 'val'}, "unknown split 'val'"),
    'size': (
      {'dir': here, 'train_size': 1_281_167},
      'train has 43 images, not 1281167',
    ),
    'held': ({'dir': here, 'validation': 43}, 'validation=43: expected fewer'),
    'area': ({'dir': here, 'area': (0.5, 0.2)}, 'data.area='),
    'area 0': ({'dir': here, 'area': (0.0, 1.0)}, 'data.area='),
    'aspect': ({'dir': here, 'aspect': (0.0, 1.0)}, 'data.aspect='),
    'resize': ({'dir': here, 'eval_resize': 7}, 'data.eval_resize=7'),
    'workers': ({'dir': here, 'workers': -1}, 'data.workers=-1'),
    'no folder': (
      {'dir': str(tmp_path / 'no'), 'name': 'folder'},
      'no folder .*no',
    ),
    'no classes': (
      {'dir': str(tmp_path), 'name': 'folder'},
      'wanted: train/CLASS',
    ),
  }


@pytest.mark.parametrize('name', bad_sets(Path(), Path()))
def test_what_cannot_be_used_is_one_line(tmp_path, prepared, name):
  changes, message = bad_sets(tmp_path, prepared)[name]
  with pytest.raises(InputError, match=message) as caught:
    open_dataset(stream_config(**changes))
  assert '\n' not in str(caught.value)


def test_splits_with_other_classes_are_refused(class_folders):
  (class_folders / 'val' / 'class9').mkdir()
  with pytest.raises(InputError, match=r'6 classes, not the 5.*class9'):
    open_dataset(stream_config(name='folder', dir=str(class_folders)))
  (class_folders / 'val' / 'class9').rmdir()
  (class_folders / 'train' / 'class9').mkdir()
  with pytest.raises(InputError, match=r'no images in .*class9'):
    open_dataset(stream_config(name='folder', dir=str(class_folders)))


def test_a_label_out_of_range_is_an_error_at_the_start(tmp_path):
  splits = {'train': labelled(12, 'train_'), 'test': labelled(4, 'test_')}
  name, data, _ = splits['train'][7]
  splits['train'][7] = (name, data, 5)
  folder = write_tfds(tmp_path / 'toy' / '1.0.0', splits, 5)
  with pytest.raises(InputError, match=r'label 5 of train_7.*the 5 classes'):
    open_dataset(stream_config(dir=str(folder)))


@pytest.mark.parametrize('harm', ['missing', 'cut', 'other'])
def test_files_that_are_not_whole_are_an_error_at_the_start(tmp_path, harm):
  setup = damaged(tmp_path, lambda data: data)
  folder = tmp_path / 'toy' / '1.0.0'
  (train,) = folder.glob('*train.array_record*')
  (test,) = folder.glob('*test.array_record*')
  if harm == 'missing':
    train.unlink()
  elif harm == 'cut':
    train.write_bytes(train.read_bytes()[:-70000])
  else:
    train.write_bytes(test.read_bytes())
  expected = {'missing': 'missing', 'cut': 'damaged', 'other': 'has 4 records'}
  with pytest.raises(InputError, match=expected[harm]) as caught:
    open_dataset(setup)
  assert '\n' not in str(caught.value)


def test_tfrecords_are_refused_with_the_command_that_converts(tmp_path):
  setup = damaged(tmp_path, lambda data: data)
  info = tmp_path / 'toy' / '1.0.0' / 'dataset_info.json'
  fields = json.loads(info.read_text())
  info.write_text(json.dumps(fields | {'fileFormat': 'tfrecord'}))
  with pytest.raises(
    InputError, match=r'skipinit_jax.data convert .*toy/1.0.0'
  ):
    open_dataset(setup)


def test_the_newest_version_is_taken(tmp_path):
  for version, count in (('9.0.0', 12), ('10.0.0', 14)):
    splits = {'train': labelled(count, 'train_'), 'test': labelled(4, 'test_')}
    write_tfds(tmp_path / 'toy' / version, splits, 5)
  assert len(open_source('toy', tmp_path).open('train')) == 14
  old = tmp_path / 'toy' / '9.0.0'
  assert len(open_source('toy', old).open('train')) == 12


def run(code, **environment):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), **environment},
  )


def test_reading_needs_no_tensorflow(prepared):
  done = run(f"""
    import sys

    class Hide:
      def __init__(self, finder):
        self.finder = finder

      def __getattr__(self, name):
        return getattr(self.finder, name)

      def find_spec(self, name, *args):
        hidden = name.split('.')[0] == 'tensorflow'
        return None if hidden else self.finder.find_spec(name, *args)

    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    from image_sets import eval_batches, stream_config, take, train_batches
    from skipinit_jax.data import open_dataset

    data = open_dataset(stream_config(dir={str(prepared)!r}))
    print(len(take(train_batches(data, 8), 6)))
    print(sum(batch['mask'].sum() for batch in eval_batches(data, 8)))
    print('tensorflow' in sys.modules)
    import tensorflow
  """)
  assert done.stdout.split() == ['6', str(EVAL), 'False'], done.stderr
  assert "No module named 'tensorflow'" in done.stderr  # It was hidden.


@pytest.mark.parametrize('module', ['grain', 'simplejpeg', 'cv2', 'PIL.Image'])
def test_a_missing_package_is_named_with_its_command(monkeypatch, module):
  require.cache_clear()
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(InputError, match=r'skipinit-jax\[train\]') as caught:
    open_dataset(stream_config())
  assert str(caught.value).startswith(f'{module} is not installed')


def test_the_package_imports_without_the_readers():
  done = run("""
    import sys
    for name in ('grain', 'tensorflow_datasets', 'cv2', 'simplejpeg', 'PIL'):
      sys.modules[name] = None
    import skipinit_jax.data
  """)
  assert done.returncode == 0, done.stderr


def test_versions_and_configurations_of_a_set_are_found(tmp_path):
  for place in ('plain/1.9.0', 'plain/1.10.0', 'one/a/1.0.0', 'two/a/1.0.0'):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / 'dataset_info.json').touch()
  assert find_prepared('plain', tmp_path) == tmp_path / 'plain/1.10.0'
  assert find_prepared('one', tmp_path) == tmp_path / 'one/a/1.0.0'
  (tmp_path / 'two/b/1.0.0').mkdir(parents=True)
  (tmp_path / 'two/b/1.0.0/dataset_info.json').touch()
  with pytest.raises(InputError, match=r'two has several configurations; .*b'):
    find_prepared('two', tmp_path)


def test_one_worker_checks_one_chunk_after_another():
  threads = []

  class Here:
    records, split = range(3 * 256), 'train'

    def __call__(self, indices):
      threads.append(threading.current_thread())
      return [], [], set(indices)

  _, _, seen = check.check_all(Here(), 1)
  assert seen == {*range(3 * 256)}
  assert threads == 3 * [threading.main_thread()]

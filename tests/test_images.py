"""Batches of images: order, shares, resume, workers, broken records."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from image_sets import COLOURS, coloured, write_tfds
from ml_collections import ConfigDict

pytest.importorskip('grain')
pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')
pytest.importorskip('tensorflow_datasets')

from skipinit_jax import files
from skipinit_jax.data import open_dataset, reading
from skipinit_jax.data.__main__ import main
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.extras import require
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Record, Subset, open_source
from skipinit_jax.data.stream import Stream
from skipinit_jax.errors import InputError, RunError

SIZE = 8
TRAIN, EVAL = 43, 26  # Neither divides by a batch.


def config(**changes) -> ConfigDict:
  fields = {
    'name': 'tfds',
    'dir': '',
    'train_split': 'train',
    'eval_split': '',
    'train_size': 0,
    'eval_size': 0,
    'validation': 0,
    'workers': 0,
    'image_size': SIZE,
    'eval_resize': 10,
    'area': (0.3, 1.0),
    'aspect': (0.75, 1.33),
    'flip': True,
    'bad_share': 0.5,
    'shift': 0,
    'cutout': 0,
    'mixup': 0.0,
    'cutmix': 0.0,
  }
  return ConfigDict(fields | changes)


def records(count, prefix):
  return [
    (f'{prefix}_{i}.JPEG', coloured(i * 3 % 5, i), i * 3 % 5)
    for i in range(count)
  ]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  splits = {'train': records(TRAIN, 'train'), 'test': records(EVAL, 'test')}
  return write_tfds(folder / 'toy' / '1.0.0', splits, 5)


@pytest.fixture
def toy(prepared):
  return open_dataset(config(dir=str(prepared)))


@pytest.fixture
def class_folders(tmp_path):
  for split, count in (('train', 15), ('val', 7)):
    for name, data, label in records(count, split):
      folder = tmp_path / split / f'class{label}'
      folder.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)
  return tmp_path


class Numbered:
  """Records in memory whose pixels say their index; some are broken."""

  def __init__(self, size, broken=(), classes=5):
    self.size, self.broken, self.classes = size, set(broken), classes

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    if index in self.broken:
      raise Unreadable(f'number{index}', 'on purpose')
    return Record(f'number{index}', _solid(index), index % self.classes)


@functools.cache
def _solid(value):
  from image_sets import encode

  return encode(np.full((12, 12, 3), value, np.uint8), 'BMP')


def augmentation(classes):
  return Augmentation(classes, np.zeros(3), np.ones(3))


def numbered(size=30, broken=(), evaluation=None, **fields) -> Stream:
  return Stream(
    name='numbered',
    train=Numbered(size, broken),
    evaluation=evaluation or Numbered(size, broken),
    augmentation=augmentation(5),
    image_size=2,
    eval_resize=2,
    **{'bad_share': 1.0} | fields,
  )


def take(batches, count):
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def numbers(batches):
  return np.concatenate([b['image'][:, 0, 0, 0] for b in batches]).tolist()


def assert_equal(these, those):
  assert len(these) == len(those) > 0
  for one, other in zip(these, those, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      if isinstance(one[key], np.ndarray):
        assert one[key].dtype == other[key].dtype
        assert one[key].tobytes() == other[key].tobytes()
      else:
        assert list(map(tuple, one[key])) == list(map(tuple, other[key]))


def joined(shares):
  """The global batches of which each process holds a part."""
  return [
    {
      key: np.concatenate([share[key] for share in parts])
      for key in parts[0]
      if isinstance(parts[0][key], np.ndarray)
    }
    for parts in zip(*shares, strict=True)
  ]


def test_a_batch_has_crops_in_the_colour_of_their_class(toy):
  for batch in take(toy.read_train(12, seed=1), 3):
    assert batch['image'].shape == (12, SIZE, SIZE, 3)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    centre = batch['image'][:, SIZE // 2, SIZE // 2].astype(float)
    bright = centre * (COLOURS.max() / centre.max(1, keepdims=True))
    nearest = np.abs(bright[:, None] - COLOURS).sum(-1).argmin(1)
    assert np.array_equal(nearest, batch['label'])
    assert batch['broken'] == []


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
  data = numbered(30)
  stream = numbers(take(data.read_train(4, seed=3), 15))
  first, second = stream[:30], stream[30:]
  assert sorted(first) == sorted(second) == list(range(30))
  assert first != second
  assert first != list(range(30))


def test_seeds_give_unrelated_orders():
  orders = [
    numbers(take(numbered(30).read_train(10, seed=s), 6)) for s in range(3)
  ]
  epochs = [tuple(order[i : i + 30]) for order in orders for i in (0, 30)]
  assert len(set(epochs)) == 6


@pytest.mark.parametrize('start', [1, 7, 12])
def test_resuming_is_a_slice_of_the_run_that_never_stopped(toy, start):
  whole = take(toy.read_train(8, seed=5), start + 3)
  resumed = take(toy.read_train(8, seed=5, start_step=start), 3)
  assert_equal(resumed, whole[start:])
  assert_equal(take(toy.read_train(8, seed=5), start + 3), whole)
  other = take(toy.read_train(8, seed=6), 1)
  assert other[0]['image'].tobytes() != whole[0]['image'].tobytes()


def test_four_processes_share_the_global_batch_of_one(toy):
  whole = take(toy.read_train(8, seed=5, start_step=2), 7)
  shares = [
    take(
      toy.read_train(8, seed=5, start_step=2, process_index=p, process_count=4),
      7,
    )
    for p in range(4)
  ]
  assert all(batch['image'].shape[0] == 2 for batch in shares[3])
  for batch, parts in zip(whole, joined(shares), strict=True):
    assert np.array_equal(batch['image'], parts['image'])
    assert np.array_equal(batch['label'], parts['label'])


def test_processes_are_disjoint_and_cover_an_epoch():
  data = numbered(32)
  seen = []
  for p in range(4):
    batches = data.read_train(8, seed=1, process_index=p, process_count=4)
    seen += numbers(take(batches, 4))
  assert sorted(seen) == list(range(32))


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(toy, workers):
  def batches(data):
    return take(data.read_train(8, seed=5, start_step=3), 8)

  working = dataclasses.replace(toy, workers=workers)
  assert_equal(batches(working), batches(toy))


def test_workers_change_nothing_in_evaluation(toy):
  working = dataclasses.replace(toy, workers=1)
  assert_equal(list(working.read_eval(8)), list(toy.read_eval(8)))


@pytest.mark.parametrize('processes', [1, 4])
@pytest.mark.parametrize('size', [1, 24, 26])
def test_evaluation_sees_every_image_once(processes, size):
  data = numbered(3, evaluation=Numbered(size))
  shares = [
    list(data.read_eval(8, process_index=p, process_count=processes))
    for p in range(processes)
  ]
  assert len({len(share) for share in shares}) == 1
  seen = []
  for batch in itertools.chain(*shares):
    assert len(batch['image']) == len(batch['mask']) == 8 // processes
    kept = batch['mask']
    seen += batch['image'][kept][:, 0, 0, 0].tolist()
    assert np.array_equal(
      batch['label'][kept], batch['image'][kept][:, 0, 0, 0] % 5
    )
  assert sorted(seen) == list(range(size))


def test_evaluation_crops_the_middle(toy):
  batch = next(iter(toy.read_eval(EVAL)))
  assert batch['label'].tolist() == [
    label for shard in (0, 1) for _, _, label in records(EVAL, '')[shard::2]
  ]
  # Darker to the right, and nothing mirrored.
  gray = batch['image'].astype(int).sum(-1)
  assert np.all(gray[:, :, 0] > gray[:, :, -1])


def test_flips_mirror_half_and_only_where_asked(prepared):
  def mirrored(flip):
    data = open_dataset(config(dir=str(prepared), flip=flip))
    batches = take(data.read_train(40, seed=2), 5)
    gray = np.concatenate([b['image'] for b in batches]).astype(int).sum(-1)
    return np.mean(gray[:, SIZE // 2, 0] < gray[:, SIZE // 2, -1])

  assert mirrored(False) == 0
  assert 0.35 < mirrored(True) < 0.65


def test_a_broken_record_is_replaced_by_the_next_whole_one_and_named():
  broken = (4, 5, 29)
  clean = take(numbered(30).read_train(10, seed=1), 6)
  found = take(numbered(30, broken).read_train(10, seed=1), 6)
  instead = {4: 6, 5: 6, 29: 0}
  for a, b in zip(clean, found, strict=True):
    wanted = [instead.get(n, n) for n in a['image'][:, 0, 0, 0]]
    assert b['image'][:, 0, 0, 0].tolist() == wanted
    assert b['label'].tolist() == [n % 5 for n in wanted]
    # A neighbour that is broken too is named when it is its turn.
    named = {f'number{n}' for n in a['image'][:, 0, 0, 0] if n in instead}
    assert sorted(name for name, _ in b['broken']) == sorted(named)
    assert {reason for _, reason in b['broken']} <= {'on purpose'}


def test_a_broken_image_is_counted_as_wrong_in_evaluation():
  batches = list(numbered(30, (0, 17)).read_eval(8))
  labels = np.concatenate([b['label'] for b in batches])
  mask = np.concatenate([b['mask'] for b in batches])
  assert mask.sum() == 30
  assert np.flatnonzero(labels < 0).tolist() == [0, 17]
  assert mask[[0, 17]].all()
  named = [name for b in batches for name, _ in b['broken']]
  assert named == ['number0', 'number17']


def test_too_many_broken_records_end_the_run_with_their_list():
  data = numbered(40, broken=(1, 2, 3), bad_share=0.05)
  with pytest.raises(InputError, match=r'3 of the 40 images.*number1: on'):
    take(data.read_train(8, seed=0), 40)
  many = numbered(600, broken=range(500), bad_share=0.8)
  with pytest.raises(InputError, match=r'481 of the 600') as caught:
    list(many.read_eval(1))
  assert len(str(caught.value)) <= 300
  with pytest.raises(InputError, match=r'3 of the 40 images.*evaluation'):
    list(data.read_eval(8))
  # Two are not more than a twentieth, however often they come.
  take(numbered(40, (1, 2), bad_share=0.05).read_train(8, seed=0), 40)


def test_nothing_but_broken_records_is_an_error_not_a_hang():
  data = numbered(10, broken=range(10))
  with pytest.raises(InputError, match=r'10 images in a row.*on purpose'):
    take(data.read_train(5, seed=0), 1)


def damaged(tmp_path, damage):
  """A prepared set with one file replaced: by name of the record."""
  splits = {'train': records(12, 'train'), 'test': records(4, 'test')}
  name, data, label = splits['train'][6]
  splits['train'][6] = (name, damage(data), label)
  folder = write_tfds(tmp_path / 'toy' / '1.0.0', splits, 5, shards=1)
  return config(dir=str(folder))


def test_a_truncated_file_is_named_with_its_record(tmp_path):
  data = open_dataset(damaged(tmp_path, lambda d: d[: len(d) // 2]))
  (batch,) = take(data.read_train(12, seed=0), 1)
  ((name, reason),) = batch['broken']
  assert name == 'train_6.JPEG (train[6])'
  assert 'truncated' in reason.lower()
  assert '\n' not in reason


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
  (batch,) = take(open_dataset(setup).read_train(12, seed=0), 1)
  ((name, reason),) = batch['broken']
  assert [name] == unreadable
  assert reason
  assert '\n' not in reason


def test_validation_images_are_held_out_of_training_and_its_neighbours():
  fields = ConfigDict({'name': 'numbered', 'validation': 8})
  rest, held = hold_out(fields, 30)
  assert (len(rest), len(held)) == (22, 8)
  assert sorted([*rest, *held]) == list(range(30))
  np.testing.assert_array_equal(hold_out(fields, 30)[1], held)
  # All but two of the rest are broken: what comes instead is never held out.
  broken = np.delete(rest, [10, 11])
  train = Subset(Numbered(30, broken), rest)
  data = dataclasses.replace(numbered(), train=train)
  shown = numbers(take(data.read_train(11, seed=0), 4))
  assert set(shown) == set(rest[10:12])


def test_a_recipe_can_hold_out_training_images(prepared):
  data = open_dataset(config(dir=str(prepared), validation=10))
  assert (data.train_size, data.eval_size) == (TRAIN - 10, 10)
  masks = [batch['mask'].sum() for batch in data.read_eval(4)]
  assert sum(masks) == 10


def test_class_folders_are_numbered_by_name(class_folders):
  data = open_dataset(config(name='folder', dir=str(class_folders)))
  assert (data.num_classes, data.train_size, data.eval_size) == (5, 15, 7)
  source = open_source('folder', class_folders)
  assert list(source.classes) == [f'class{i}' for i in range(5)]
  train = source.open('train')
  for i in range(15):
    name, content, label = train[i]
    assert name.startswith(f'class{label}/train_')
    assert content == (class_folders / 'train' / name).read_bytes()
  assert len({train[i].name for i in range(15)}) == 15
  batches = take(data.read_train(5, seed=0), 3)
  assert sorted(np.concatenate([b['label'] for b in batches])) == sorted(
    label for _, _, label in records(15, '')
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
  setup = config(name='folder', dir=str(class_folders), bad_share=1.0)

  def first_epochs():
    data = open_dataset(setup)
    (train,) = take(data.read_train(23, seed=0), 1)
    (evaluation,) = data.read_eval(14)
    return train, evaluation

  train, evaluation = within(120, first_epochs)
  wanted = {f'class0/{name}': reason for name, reason in reasons.items()}
  assert dict(train['broken']) == wanted
  assert len(train['broken']) == len(wanted)
  assert dict(evaluation['broken']) == wanted
  assert (evaluation['label'] == -1).sum() == len(wanted)

  arguments = ['check', 'folder', '--data-dir', str(class_folders)]
  assert within(120, lambda: main([*arguments, '--workers', '1'])) == 1
  lines = capsys.readouterr().out.splitlines()
  found = [line for line in lines if line.startswith('broken: ')]
  assert found == 2 * [
    f'broken: {name}: {reason}' for name, reason in sorted(wanted.items())
  ]


@pytest.fixture
def no_pauses(monkeypatch):
  monkeypatch.setattr(files, 'PAUSES', (0.0, 0.0))


class Failing(Numbered):
  """The disk fails so many times at each of these records."""

  def __init__(self, size, failures, number=errno.EIO):
    super().__init__(size)
    self.failures, self.number = dict(failures), number

  def __getitem__(self, index):
    if self.failures.get(index, 0) > 0:
      self.failures[index] -= 1
      raise OSError(self.number, os.strerror(self.number), f'n/{index}.jpg')
    return super().__getitem__(index)


SYSTEM = ('EIO', 'ESTALE', 'EMFILE', 'EACCES', 'ENOENT', 'ENOMEM')


@pytest.mark.parametrize('name', SYSTEM)
def test_a_read_that_fails_by_the_system_is_tried_again(
  no_pauses, capsys, name
):
  number = getattr(errno, name)
  data = dataclasses.replace(
    numbered(30), train=Failing(30, {3: 2, 11: 1}, number)
  )
  batches = take(data.read_train(10, seed=1), 3)
  assert_equal(batches, take(numbered(30).read_train(10, seed=1), 3))
  lines = capsys.readouterr().err.splitlines()
  wanted = f'{os.strerror(number)}; trying again in 0 s'
  assert sorted(lines) == [f'n/11.jpg: {wanted}', *2 * [f'n/3.jpg: {wanted}']]


@pytest.mark.parametrize('name', SYSTEM)
def test_a_read_that_keeps_failing_is_no_broken_image(no_pauses, name):
  number = getattr(errno, name)
  failing = Failing(30, {3: 99}, number)
  data = dataclasses.replace(numbered(30), train=failing, evaluation=failing)
  for batches in (data.read_train(10, seed=1), data.read_eval(10)):
    with pytest.raises(RunError) as caught:
      take(batches, 3)
    assert str(caught.value) == (
      f'n/3.jpg: {os.strerror(number)} (tried 3 times)'
    )


def test_a_file_that_is_gone_since_it_was_listed_is_the_systems(
  class_folders, no_pauses, capsys
):
  data = open_dataset(config(name='folder', dir=str(class_folders)))
  (class_folders / 'train' / 'class0' / 'train_5.JPEG').unlink()
  with pytest.raises(
    RunError, match=r'class0/train_5\.JPEG: No such file or directory'
  ):
    take(data.read_train(15, seed=0), 1)


@pytest.mark.skipif(
  not Path('/proc/self/mem').is_file(), reason='reads it to get an EIO'
)
def test_an_error_in_mid_read_names_the_file(tmp_path):
  path = tmp_path / 'a.jpg'
  path.symlink_to('/proc/self/mem')
  with pytest.raises(OSError, match=r'Input/output error.*a\.jpg') as caught:
    reading.read_image(str(path), 'a')
  assert caught.value.errno == errno.EIO


def test_the_waits_between_tries_grow(monkeypatch):
  slept = []
  monkeypatch.setattr(files.time, 'sleep', slept.append)
  with pytest.raises(RunError, match='tried 4 times'):
    files.retry(lambda: Failing(1, {0: 99})[0])
  assert slept == list(files.PAUSES)
  assert slept == sorted(set(slept))


class Dying(Numbered):
  """The process that reads number 7 dies, as for its memory."""

  def __getitem__(self, index):
    if index == 7:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(index)


class Faulty(Numbered):
  """Reading number 7 meets what nobody thought of."""

  def __getitem__(self, index):
    if index == 7:
      raise LookupError('one\ntwo')
    return super().__getitem__(index)


@pytest.mark.parametrize(
  ('records', 'line'),
  [
    (Dying, 'exit code -9'),
    (Faulty, 'images can not be read: LookupError: one'),
  ],
)
def test_what_ends_a_worker_arrives_as_one_line(records, line):
  data = dataclasses.replace(numbered(30, workers=1), train=records(30))
  with pytest.raises(RunError) as caught:
    take(data.read_train(10, seed=1), 3)
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) <= 300


def test_trouble_in_a_worker_process_keeps_its_kind():
  absent = Failing(30, {7: 99})
  data = dataclasses.replace(numbered(30, workers=1), train=absent)
  with pytest.raises(RunError, match=r'^n/7.jpg: Input/output error \(tried 4'):
    take(data.read_train(10, seed=1), 3)


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
    'share': ({'dir': here, 'bad_share': 1.5}, 'data.bad_share=1.5'),
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
    open_dataset(config(**changes))
  assert '\n' not in str(caught.value)


def test_splits_with_other_classes_are_refused(class_folders):
  (class_folders / 'val' / 'class9').mkdir()
  with pytest.raises(InputError, match=r'6 classes, not the 5.*class9'):
    open_dataset(config(name='folder', dir=str(class_folders)))
  (class_folders / 'val' / 'class9').rmdir()
  (class_folders / 'train' / 'class9').mkdir()
  with pytest.raises(InputError, match=r'no images in .*class9'):
    open_dataset(config(name='folder', dir=str(class_folders)))


def test_a_label_out_of_range_is_an_error_at_the_start(tmp_path):
  splits = {'train': records(12, 'train'), 'test': records(4, 'test')}
  name, data, _ = splits['train'][7]
  splits['train'][7] = (name, data, 5)
  folder = write_tfds(tmp_path / 'toy' / '1.0.0', splits, 5)
  with pytest.raises(InputError, match=r'label 5 of train_7.*the 5 classes'):
    open_dataset(config(dir=str(folder)))


def test_a_label_out_of_range_ends_training_where_the_start_missed_it():
  data = numbered(30)
  data = dataclasses.replace(data, augmentation=augmentation(4))
  with pytest.raises(InputError, match=r'label 4 of number.*the 4 classes'):
    take(data.read_train(10, seed=0), 3)


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
    splits = {'train': records(count, 'train'), 'test': records(4, 'test')}
    write_tfds(tmp_path / 'toy' / version, splits, 5)
  assert len(open_source('toy', tmp_path).open('train')) == 14
  old = tmp_path / 'toy' / '9.0.0'
  assert len(open_source('toy', old).open('train')) == 12


def test_a_batch_that_does_not_divide_over_processes_is_refused(toy):
  with pytest.raises(InputError, match=r'batch_size=10 .* 4 processes'):
    next(toy.read_train(10, seed=0, process_count=4))


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
    from test_images import config, take
    from skipinit_jax.data import open_dataset

    data = open_dataset(config(dir={str(prepared)!r}))
    print(len(take(data.read_train(8, seed=0), 6)))
    print(sum(batch['mask'].sum() for batch in data.read_eval(8)))
    print('tensorflow' in sys.modules)
    import tensorflow
  """)
  assert done.stdout.split() == ['6', str(EVAL), 'False'], done.stderr
  assert "No module named 'tensorflow'" in done.stderr  # It was hidden.


class Watching(Numbered):
  """Its reason tells what the process that reads it holds."""

  def __getitem__(self, index):
    from jax._src import xla_bridge

    raise Unreadable(
      str(os.getpid()),
      f'backends {xla_bridge.backends_are_initialized()}',
    )


def test_workers_start_no_backend_of_jax():
  data = numbered(2, evaluation=Watching(4), workers=1)
  (batch,) = data.read_eval(4)
  (found,) = set(map(tuple, batch['broken']))
  assert found[0] != str(os.getpid())
  assert found[1] == 'backends False'


@pytest.mark.parametrize('module', ['grain', 'simplejpeg', 'cv2', 'PIL.Image'])
def test_a_missing_package_is_named_with_its_command(monkeypatch, module):
  require.cache_clear()
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(InputError, match=r'skipinit-jax\[train\]') as caught:
    open_dataset(config())
  assert str(caught.value).startswith(f'{module} is not installed')


def test_the_package_imports_without_the_readers():
  done = run("""
    import sys
    for name in ('grain', 'tensorflow_datasets', 'cv2', 'simplejpeg', 'PIL'):
      sys.modules[name] = None
    import skipinit_jax.data
  """)
  assert done.returncode == 0, done.stderr

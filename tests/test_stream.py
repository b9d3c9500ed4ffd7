"""Streamed batches: order, shares, resume, workers, broken records."""

import dataclasses
import errno
import functools
import itertools
import os
import signal

import numpy as np
import pytest
from image_sets import (
  COLOURS,
  encode,
  eval_batches,
  labelled,
  stream_config,
  take,
  train_batches,
  write_toy,
)
from ml_collections import ConfigDict

pytest.importorskip('grain')
pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')
pytest.importorskip('tensorflow_datasets')

from skipinit_jax import files
from skipinit_jax.data import open_dataset, stream
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.loader import CentralCrops
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Record, Subset
from skipinit_jax.data.stream import Stream
from skipinit_jax.errors import InputError, RunError

SIZE = 8
TRAIN, EVAL = 43, 26  # Neither divides by a batch.


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return write_toy(tmp_path_factory.mktemp('data'), TRAIN, EVAL)


@pytest.fixture
def toy(prepared):
  return open_dataset(stream_config(dir=str(prepared)))


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
  return encode(np.full((12, 12, 3), value, np.uint8), 'BMP')


def numbered(
  size=30, broken=(), train=None, evaluation=None, classes=5, **fields
) -> Stream:
  fields = {'image_size': 2, 'eval_resize': 2, 'bad_share': 1.0} | fields
  return Stream(
    stream_config(name='numbered', **fields),
    train or Numbered(size, broken),
    evaluation or Numbered(size, broken),
    Augmentation(classes, np.zeros(3), np.ones(3)),
  )


def with_workers(data, workers):
  fields = ConfigDict({**data.config, 'workers': workers})
  return dataclasses.replace(data, config=fields)


@pytest.fixture
def said(capsys):
  """Names of the images that were counted as wrong."""
  stream._say_once.cache_clear()
  return lambda: [
    line.removeprefix('could not be read, counted as wrong: ')
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('could not be read')
  ]


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
  for batch in take(train_batches(toy, 12, seed=1), 3):
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
  shown = numbers(take(train_batches(data, 4, seed=3), 15))
  first, second = shown[:30], shown[30:]
  assert sorted(first) == sorted(second) == list(range(30))
  assert first != second
  assert first != list(range(30))


def test_seeds_give_unrelated_orders():
  orders = [
    numbers(take(train_batches(numbered(30), 10, seed=s), 6)) for s in range(3)
  ]
  epochs = [tuple(order[i : i + 30]) for order in orders for i in (0, 30)]
  assert len(set(epochs)) == 6


@pytest.mark.parametrize('start', [1, 7, 12])
def test_resuming_is_a_slice_of_the_run_that_never_stopped(toy, start):
  whole = take(train_batches(toy, 8, seed=5), start + 3)
  resumed = take(train_batches(toy, 8, seed=5, start=start), 3)
  assert_equal(resumed, whole[start:])
  assert_equal(take(train_batches(toy, 8, seed=5), start + 3), whole)
  other = take(train_batches(toy, 8, seed=6), 1)
  assert other[0]['image'].tobytes() != whole[0]['image'].tobytes()


def test_four_processes_share_the_global_batch_of_one(toy):
  whole = take(train_batches(toy, 8, seed=5, start=2), 7)
  shares = [
    take(
      train_batches(toy, 8, seed=5, start=2, process=p, processes=4),
      7,
    )
    for p in range(4)
  ]
  assert all(batch['image'].shape[0] == 2 for batch in shares[3])
  for batch, parts in zip(whole, joined(shares), strict=True):
    assert np.array_equal(batch['image'], parts['image'])
    assert np.array_equal(batch['label'], parts['label'])


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(toy, workers):
  def batches(data):
    return take(train_batches(data, 8, seed=5, start=3), 8)

  assert_equal(batches(with_workers(toy, workers)), batches(toy))


def test_workers_change_nothing_in_evaluation(toy):
  working = with_workers(toy, 1)
  assert_equal(list(eval_batches(working, 8)), list(eval_batches(toy, 8)))


@pytest.mark.parametrize('processes', [1, 4])
@pytest.mark.parametrize('size', [1, 24, 26])
def test_evaluation_sees_every_image_once(processes, size):
  data = numbered(3, evaluation=Numbered(size))
  shares = [list(eval_batches(data, 8, p, processes)) for p in range(processes)]
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
  batch = next(iter(eval_batches(toy, EVAL)))
  assert batch['label'].tolist() == [
    label for shard in (0, 1) for _, _, label in labelled(EVAL)[shard::2]
  ]
  # Darker to the right, and nothing mirrored.
  gray = batch['image'].astype(int).sum(-1)
  assert np.all(gray[:, :, 0] > gray[:, :, -1])


def test_flips_mirror_half_and_only_where_asked(prepared):
  def mirrored(flip):
    data = open_dataset(stream_config(dir=str(prepared), flip=flip))
    batches = take(train_batches(data, 40, seed=2), 5)
    gray = np.concatenate([b['image'] for b in batches]).astype(int).sum(-1)
    return np.mean(gray[:, SIZE // 2, 0] < gray[:, SIZE // 2, -1])

  assert mirrored(False) == 0
  assert 0.35 < mirrored(True) < 0.65


def test_a_broken_record_is_replaced_by_the_next_whole_one_and_named():
  broken = (4, 5, 29)
  clean = take(train_batches(numbered(30), 10, seed=1), 6)
  found = take(train_batches(numbered(30, broken), 10, seed=1), 6)
  instead = {4: 6, 5: 6, 29: 0}
  for a, b in zip(clean, found, strict=True):
    wanted = [instead.get(n, n) for n in a['image'][:, 0, 0, 0]]
    assert b['image'][:, 0, 0, 0].tolist() == wanted
    assert b['label'].tolist() == [n % 5 for n in wanted]
    # A neighbour that is broken too is named when it is its turn.
    named = [n for n in a['image'][:, 0, 0, 0] if n in instead]
    assert b['broken'] == [f'number{n}: on purpose' for n in named]


def test_a_broken_image_is_counted_as_wrong_in_evaluation(said):
  batches = list(eval_batches(numbered(30, (0, 17)), 8))
  labels = np.concatenate([b['label'] for b in batches])
  mask = np.concatenate([b['mask'] for b in batches])
  assert mask.sum() == 30
  assert np.flatnonzero(labels < 0).tolist() == [0, 17]
  assert mask[[0, 17]].all()
  assert said() == ['number0: on purpose', 'number17: on purpose']
  list(eval_batches(numbered(30, (0, 17)), 8))
  assert said() == []  # Once in a run.


def test_what_shows_no_image_is_black_in_evaluation(monkeypatch, said):
  # Memory that held something else.
  full = functools.partial(np.full, fill_value=77)
  monkeypatch.setattr(
    np, 'empty', lambda shape, dtype: full(shape, dtype=dtype)
  )
  batches = list(eval_batches(numbered(30, (3, 17)), 8))
  shown = np.concatenate([b['image'] for b in batches])
  assert len(shown) == 32
  wanted = [n if n not in (3, 17, 30, 31) else 0 for n in range(32)]
  assert [image.tolist() for image in shown] == [
    np.full((2, 2, 3), n).tolist() for n in wanted
  ]


def test_workers_write_where_the_program_reads():
  from grain.multiprocessing import SharedMemoryArray

  def image(shared):
    crops = CentralCrops(Numbered(4), 5, 2, shared=shared, resize=2)
    return crops([0, 1])['image']

  shared, alone = image(True), image(False)
  assert isinstance(shared, SharedMemoryArray)
  assert type(alone) is np.ndarray
  assert np.array_equal(shared, alone)
  shared.unlink_on_del()


def test_too_many_broken_records_end_the_run_with_their_list():
  data = numbered(40, broken=(1, 2, 3), bad_share=0.05)
  with pytest.raises(InputError, match=r'3 of the 40 images.*number1: on'):
    take(train_batches(data, 8), 40)
  many = numbered(600, broken=range(500), bad_share=0.8)
  with pytest.raises(InputError, match=r'481 of the 600') as caught:
    list(eval_batches(many, 1))
  assert len(str(caught.value)) <= 300
  with pytest.raises(InputError, match=r'3 of the 40 images.*evaluation'):
    list(eval_batches(data, 8))
  # Two are not more than a twentieth, however often they come.
  two = numbered(40, (1, 2), bad_share=0.05)
  take(train_batches(two, 8), 40)


def test_nothing_but_broken_records_is_an_error_not_a_hang():
  data = numbered(10, broken=range(10))
  with pytest.raises(InputError, match=r'10 images in a row.*on purpose'):
    take(train_batches(data, 5), 1)


def test_validation_images_are_held_out_of_training_and_its_neighbours():
  fields = ConfigDict({'name': 'numbered', 'validation': 8})
  rest, held = hold_out(fields, 30)
  assert (len(rest), len(held)) == (22, 8)
  assert sorted([*rest, *held]) == list(range(30))
  np.testing.assert_array_equal(hold_out(fields, 30)[1], held)
  # All but two of the rest are broken: what comes instead is never held out.
  broken = np.delete(rest, [10, 11])
  train = Subset(Numbered(30, broken), rest)
  data = numbered(train=train)
  shown = numbers(take(train_batches(data, 11), 4))
  assert set(shown) == set(rest[10:12])


def test_a_recipe_can_hold_out_training_images(prepared):
  data = open_dataset(stream_config(dir=str(prepared), validation=10))
  assert (data.train_size, data.eval_size) == (TRAIN - 10, 10)
  masks = [batch['mask'].sum() for batch in eval_batches(data, 4)]
  assert sum(masks) == 10


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
  data = numbered(train=Failing(30, {3: 2, 11: 1}, number))
  batches = take(train_batches(data, 10, seed=1), 3)
  assert_equal(batches, take(train_batches(numbered(30), 10, seed=1), 3))
  lines = capsys.readouterr().err.splitlines()
  wanted = f'{os.strerror(number)}; trying again in 0 s'
  assert sorted(lines) == [f'n/11.jpg: {wanted}', *2 * [f'n/3.jpg: {wanted}']]


@pytest.mark.parametrize('name', SYSTEM)
def test_a_read_that_keeps_failing_is_no_broken_image(no_pauses, name):
  number = getattr(errno, name)
  failing = Failing(30, {3: 99}, number)
  data = numbered(train=failing, evaluation=failing)
  for batches in (train_batches(data, 10, seed=1), eval_batches(data, 10)):
    with pytest.raises(RunError) as caught:
      take(batches, 3)
    assert str(caught.value) == (
      f'n/3.jpg: {os.strerror(number)} (tried 3 times)'
    )


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
  data = numbered(train=records(30), workers=1)
  with pytest.raises(RunError) as caught:
    take(train_batches(data, 10, seed=1), 3)
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) <= 300


def test_trouble_in_a_worker_process_keeps_its_kind():
  data = numbered(train=Failing(30, {7: 99}), workers=1)
  with pytest.raises(RunError, match=r'^n/7.jpg: Input/output error \(tried 4'):
    take(train_batches(data, 10, seed=1), 3)


def test_a_label_out_of_range_ends_training_where_the_start_missed_it():
  data = numbered(30, classes=4)
  with pytest.raises(InputError, match=r'label 4 of number.*the 4 classes'):
    take(train_batches(data, 10), 3)


class Watching(Numbered):
  """Its reason tells what the process that reads it holds."""

  def __getitem__(self, index):
    from jax._src import xla_bridge

    raise Unreadable(
      str(os.getpid()),
      f'backends {xla_bridge.backends_are_initialized()}',
    )


def test_workers_start_no_backend_of_jax(said):
  data = numbered(2, evaluation=Watching(4), workers=1)
  list(eval_batches(data, 4))
  (line,) = said()
  process, found = line.split(': ')
  assert process != str(os.getpid())
  assert found == 'backends False'

"""Runs whose images can't be read: what ends them, and what is kept."""

import os
import re

import jax.numpy as jnp
import pytest
from image_sets import coloured
from runs import (
  assert_same_run,
  finish,
  last_state,
  metric_lines,
  start_two,
  wait_for,
)

grain = pytest.importorskip('grain')
pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')

from skipinit_jax import files  # noqa: E402
from skipinit_jax.data.folders import FolderRecords  # noqa: E402
from skipinit_jax.data.stream import Stream  # noqa: E402
from skipinit_jax.errors import InputError, RunError  # noqa: E402
from skipinit_jax.training import train  # noqa: E402
from skipinit_jax.training.loop import evaluate_latest  # noqa: E402
from skipinit_jax.training.metrics import Reporter, read_metrics  # noqa: E402
from skipinit_jax.training.recipes import load_recipe, set_fields  # noqa: E402
from skipinit_jax.training.timetable import Timetable  # noqa: E402

TRAIN, EVAL, BATCH = 40, 12, 8  # Five steps an epoch.
pytestmark = pytest.mark.sampled(6)
FIELDS = {
  'allow_cpu': True,
  'batch_size': BATCH,
  'checkpoint_every_steps': 1000,
  'data.aspect': (1.0, 1.0),
  'data.bad_share': 0.05,
  'data.eval_resize': 10,
  'data.eval_size': 0,
  'data.image_size': 8,
  'data.name': 'folder',
  'data.train_size': 0,
  'data.workers': 0,
  'epochs': 3.0,
  'eval_batch_size': 4,
  'log_every_steps': 1,
  'model.depth': 10,
  'model.name': 'wide_resnet',
  'model.width': 1,
  'schedule.warmup_epochs': 0.0,
}


@pytest.fixture
def folder(tmp_path):
  for split, count in (('train', TRAIN), ('val', EVAL)):
    for number in range(count):
      path = image(tmp_path / 'images', split, number)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(coloured(0 if number < count / 2 else 1, number))
  return tmp_path / 'images'


def image(folder, split, number):
  """The file with this index in its split."""
  half = (TRAIN if split == 'train' else EVAL) / 2
  return folder / split / f'class{int(number >= half)}' / f'{number:02}.jpg'


def recipe(folder, **fields):
  config = load_recipe('imagenet')
  return set_fields(config, {**FIELDS, 'data.dir': str(folder), **fields})


@pytest.fixture
def fail(monkeypatch):
  """Makes one image fail from the n-th time on that a run reads it."""
  monkeypatch.setattr(files, 'PAUSES', (0.0,))
  read = FolderRecords.__getitem__
  failing = {}

  def getitem(self, index):
    key = self.folder.name, index
    if key in failing:
      failing[key] -= 1
      if failing[key] <= 0:
        raise OSError(5, 'Input/output error', f'{key[0]}/{index}')
    return read(self, index)

  monkeypatch.setattr(FolderRecords, '__getitem__', getitem)
  return failing


def order(epochs=3):
  """Indices of the training images as the steps of seed 0 show them."""
  positions = grain.MapDataset.range(TRAIN).seed(0).shuffle().repeat(epochs)
  return list(positions)


@pytest.fixture
def whole(folder, tmp_path):
  """A run that nothing disturbed."""
  train(recipe(folder), tmp_path / 'whole')
  return tmp_path / 'whole'


def test_a_disk_that_fails_ends_the_run_with_all_steps_saved(
  folder, whole, tmp_path, fail
):
  workdir = tmp_path / 'run'
  # Read once when the set is opened, once in each epoch: in the second.
  fail['train', 7] = 3
  batch = (TRAIN + order()[TRAIN:].index(7)) // BATCH
  with pytest.raises(RunError) as caught:
    train(recipe(folder), workdir)
  assert str(caught.value) == (
    f'train/7: Input/output error (tried 2 times); step {batch} is saved'
  )
  assert int(last_state(workdir)["['step']"]) == batch

  fail.clear()
  # Read once when the set is opened and in each evaluation: in the last.
  fail['val', 5] = 3
  with pytest.raises(RunError, match=r'^val/5.*; step 15 is saved$'):
    train(recipe(folder), workdir)
  assert int(last_state(workdir)["['step']"]) == 15

  fail.clear()
  fail['val', 5] = 2
  with pytest.raises(RunError, match=r'^val/5: Input/output error'):
    evaluate_latest(recipe(folder), workdir)

  fail.clear()
  train(recipe(folder), workdir)
  assert_same_run(workdir, whole)


def test_what_is_not_needed_may_fail(folder, tmp_path, fail):
  config = recipe(folder, epochs=1.0)
  first = order()[TRAIN]  # The first image of the epoch that is not made.
  fail['train', first] = 3
  assert train(config, tmp_path / 'run')['status'] == 'completed'


def test_broken_images_are_counted_through_a_resume(
  folder, tmp_path, fail, capsys, monkeypatch
):
  """Three of forty are more than a twentieth; a trouble comes in between."""
  shown = order()
  broken = [shown[2], shown[9], shown[36]]  # In steps 1, 2 and 5.
  for index in broken:
    path = image(folder, 'train', index)
    path.unlink()
    os.mkfifo(path)
  config = recipe(folder, eval_every_epochs=0.8)
  fail['train', shown[25]] = 2
  with pytest.raises(RunError, match='step 3 is saved'):
    train(config, tmp_path / 'run')
  fail.clear()

  link = folder / 'val' / 'class0' / 'x.jpg'
  os.symlink('nowhere', link)
  with pytest.raises(InputError, match=r'1 of the 13 .* step 4 is saved'):
    train(config, tmp_path / 'run')
  with monkeypatch.context() as patch:  # As if each process saw but a few.
    patch.setattr(Stream, '_check_share', lambda *args: None)
    with pytest.raises(InputError, match='1 of the 13 images to evaluate on'):
      train(config, tmp_path / 'run')
  link.unlink()

  with pytest.raises(InputError) as caught:
    train(config, tmp_path / 'run')
  assert str(caught.value).startswith(
    "3 of an epoch's 40 images could not be read, more than data.bad_share=0.05"
  )
  # What step 5 tells is read when step 6 has begun.
  assert str(caught.value).endswith('; step 6 is saved')
  assert len(str(caught.value)) <= 300
  err = capsys.readouterr().err
  assert (
    err.count(
      'could not be read, counted as wrong: class0/x.jpg: '
      'a link that leads nowhere, not a file'
    )
    == 1
  )
  named = re.findall(r'replaced: (\S+): a pipe', err)
  assert named[:3] == [
    str(image(folder, 'train', i).relative_to(folder / 'train')) for i in broken
  ]
  # More of them may be accepted without another workdir.
  config.data.bad_share = 0.1
  assert train(config, tmp_path / 'run')['status'] == 'completed'


METRICS = {
  'loss': 1.0,
  'top1': 0.5,
  'skipped': 0,
  'finite': True,
  'stop': 0,
}


def report(workdir, start, replaced, size=10.0, share=0.1):
  """Takes steps with so many replaced images; returns the reporter."""
  times = Timetable(100, 1, 100, 100, per_call=1, per_epoch=size)
  reporter = Reporter(workdir, start, times, 10, {}, share)
  for step, number in enumerate(replaced, start + 1):
    metrics = {**METRICS, 'replaced': number}
    reporter.train(step, 1, {k: jnp.asarray(v) for k, v in metrics.items()})
  reporter.flush()
  reporter.close()
  return reporter


def count_replaced(workdir):
  return sum(line.get('replaced', 0) for line in read_metrics(workdir))


@pytest.mark.parametrize('cut', range(5))
def test_the_share_is_of_an_epoch_wherever_a_run_was_cut(tmp_path, cut):
  """Ten steps of ten images: ten may be broken, in each epoch."""
  # From all processes together, as the step sums them up.
  replaced = [4, 0, 6, 0, 0, 0, 0, 0, 0, 0, 5, 5]
  report(tmp_path, 0, replaced[:cut])
  reporter = report(tmp_path, cut, replaced[cut:])
  assert count_replaced(tmp_path) == 20
  assert reporter.trouble is None
  assert not reporter.stop
  reporter = report(tmp_path, 12, [0, 1, 0])
  assert count_replaced(tmp_path) == 21
  assert reporter.stop
  assert str(reporter.trouble).startswith("11 of an epoch's 100 images")


def test_a_step_of_two_epochs_ends_no_run(tmp_path):
  """Epochs of 95 images: step 10 has 5 of each of the first two."""
  reporter = report(tmp_path, 0, [9, *8 * [0], 1, 9], size=9.5, share=0.1)
  assert reporter.trouble is None
  assert count_replaced(tmp_path) == 19


def test_an_image_lost_by_one_process_ends_all(folder, tmp_path):
  """A file vanishes; both stop after the same step, with the same line."""
  workdir = tmp_path / 'run'
  flags = [
    f'--config.{name}={value}'
    for name, value in FIELDS.items()
    if name not in ('data.aspect', 'epochs')
  ]
  flags += [f'--config.data.dir={folder}', '--config.epochs=100000']
  two = start_two(workdir, '--config=imagenet', *flags, heartbeat=60)
  wait_for(lambda: len(metric_lines(workdir)) > 2, two[0])
  image(folder, 'train', 7).unlink()
  ends = [finish(process) for process in two]
  for status, _, err in ends:
    assert status == 1, err
    assert 'Traceback' not in err
  lines = {err.splitlines()[-1] for *_, err in ends}
  assert len(lines) == 1
  (line,) = lines
  found = re.fullmatch(
    r'error: process [01]: \S+/class0/07.jpg: No such file or directory '
    r'\(tried 4 times\); step ([\d,]+) is saved',
    line,
  )
  assert found, line
  step = int(found[1].replace(',', ''))
  assert int(last_state(workdir)["['step']"]) == step

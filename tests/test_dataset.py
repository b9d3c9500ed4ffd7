"""The contract of a data set, fulfilled by all that is opened or stands in."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_sets import labelled, stream_config, write_folders
from ml_collections import ConfigDict

from configs import cifar10, digits, imagenet, synthetic
from skipinit_jax.data import DATASETS, Dataset, open_dataset
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.fields import FIELDS
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.errors import InputError

STANDS_IN = {
  f'stand-in of {recipe.__name__}': recipe
  for recipe in (digits, cifar10, imagenet, synthetic)
}


@pytest.fixture(
  params=['digits', 'synthetic', 'folder', *STANDS_IN], scope='module'
)
def data(request, tmp_path_factory):
  if request.param in STANDS_IN:
    return stand_in(STANDS_IN[request.param].get_config().data)
  if request.param != 'folder':
    recipe = {'digits': digits, 'synthetic': synthetic}[request.param]
    return open_dataset(recipe.get_config().data)
  for name in ('grain', 'cv2', 'simplejpeg'):
    pytest.importorskip(name)
  splits = {'train': labelled(10, 'train_'), 'val': labelled(7, 'val_')}
  folder = write_folders(tmp_path_factory.mktemp('images'), splits)
  return open_dataset(stream_config(name='folder', dir=str(folder)))


FIELD_TYPES = {
  'resident': bool,
  'name': str,
  'form': str,
  'num_classes': int,
  'image_shape': tuple,
  'train_size': int,
  'eval_size': int,
  'chance': float,
  'augmentation': Augmentation,
}
METHODS = ('inputs', 'choose', 'eval_batches')


def parameters(kind, method):
  if not hasattr(kind, method):
    return None
  found = inspect.signature(getattr(kind, method)).parameters.values()
  return [(p.name, p.default) for p in found]


def breaches(data):
  """Members of the contract that are missing or different."""
  return {
    name
    for name in METHODS
    if parameters(type(data), name) != parameters(Dataset, name)
  } | {
    name
    for name, wanted in FIELD_TYPES.items()
    if not isinstance(getattr(data, name, None), wanted)
  }


def test_the_contract_has_no_other_members():
  members = {n for n in dir(Dataset) if not n.startswith('_')}
  members |= Dataset.__annotations__.keys()
  assert members == {*FIELD_TYPES, *METHODS}


def test_every_data_set_fulfils_the_contract(data):
  assert not breaches(data)
  assert all(type(n) is int for n in data.image_shape)
  assert len(data.image_shape) == 3


def test_a_class_that_breaks_the_contract_is_found():
  class Other:
    name, resident = 'other', 'yes'

    def inputs(self, place, config, start_step):
      return iter(())

    def choose(self, inputs, key):
      return inputs

    def eval_batches(self, batch_size, process_index=0, process_count=2):
      return iter(())

  assert breaches(Other()) == {*FIELD_TYPES, *METHODS} - {'name', 'inputs'}


def test_shapes_and_dtypes_are_those_of_the_contract(data):
  if data.name == 'imagenet2012':
    pytest.skip('a stand-in has no images to read')
  run = ConfigDict({'batch_size': 4, 'seed': 0})
  inputs = data.inputs(lambda tree: tree, run, 3)
  ((images, labels), broken) = next(inputs)
  inputs.close()
  rows = data.train_size if data.resident else 4
  shape = (rows, *data.image_shape)
  if data.resident:
    shape = rows, np.prod(data.image_shape)
  assert (images.shape, labels.shape, broken) == (shape, (rows,), [])
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
  chosen = data.choose(
    (jnp.asarray(images), jnp.asarray(labels)),
    jax.random.key(0),
    jnp.int32(3),
    4,
    jnp.arange(4),
  )
  assert [x.shape for x in chosen] == [(4, *data.image_shape), (4,)]
  assert [x.dtype for x in chosen] == [np.uint8, np.int32]
  for images, labels, mask in itertools.islice(data.eval_batches(4), 2):
    assert images.shape == (4, *data.image_shape)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert labels.shape == mask.shape == (4,)
    assert mask.dtype == bool


@pytest.mark.parametrize('recipe', [digits, synthetic])
def test_a_stand_in_has_the_sizes_of_its_data_set(recipe):
  config = recipe.get_config().data
  config.validation = 7
  one, other = stand_in(config), open_dataset(config)
  for field in FIELD_TYPES.keys() - {'augmentation', 'chance'}:
    assert getattr(one, field) == getattr(other, field), field


def test_imagenet_is_streamed_and_its_stand_in_needs_no_file():
  config = imagenet.get_config().data
  data = stand_in(config)
  assert (data.image_shape, data.num_classes) == ((224, 224, 3), 1000)
  assert (data.train_size, data.eval_size) == (1_281_167, 50_000)
  assert not data.resident
  assert data.choose('batch', None, 0, 8, None) == 'batch'
  assert data.augmentation.flip == config.flip


def test_sizes_that_are_nowhere_are_an_error():
  config = imagenet.get_config().data
  config.name = 'folder'
  with pytest.raises(InputError, match="'folder': its sizes are not in the"):
    stand_in(config)


def test_each_data_set_has_its_fields():
  assert FIELDS.keys() == DATASETS.keys()

"""The order of training images is the one that earlier runs were made in.

The digests of the first 10,000 positions were computed once by this project's
own code, with Grain 0.2.18, JAX 0.10.2 and NumPy 2.4, and the orders behind
them again by the independent writings below. Where one of them fails after an
upgrade, runs that were made before can't be resumed exactly: `order_of` must
differ too, as `test_what_a_checkpoint_carries` holds.
"""

import hashlib
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import make_state, recipe, restore, save, write_config

from skipinit_jax.data import fields, order, shuffle
from skipinit_jax.data.loader import draw as draw_crop
from skipinit_jax.data.order import digest, order_of, streamed
from skipinit_jax.data.resident import batch_indices
from skipinit_jax.errors import InputError
from skipinit_jax.training import step
from skipinit_jax.training.checkpoints import Checkpoints

COUNT = 10_000
LAST = 2**32 - 1  # The largest seed.
# (size, seed) -> digests of the images in files and of their crops' numbers.
STREAMED = {
  (1_281_167, 0): ('b97883dca7091631', 'daee8be411a109fd'),
  (50_000, 1): ('a9faf5c7b5ab1d4e', 'e97894e3f9cd2f2d'),
  (65_537, 7): ('66439112dbcae45c', 'dfed5f14133b31b8'),
  (1437, LAST): ('6f5704f9e59a180c', '19e4f164f78aef76'),
}
# (size, seed) -> digest of the images on the device.
RESIDENT = {
  (50_000, 0): '8187f4c4fd435bdd',
  (1437, 1): '5c3e61aedc6e1f0c',
  (60_000, LAST): 'dabf5063f520e8cf',
}
# Size -> digest of the order in which validation images are held out.
HELD_OUT = {
  1_281_167: '46695434a711f808',
  50_000: '91741aebc4d8196a',
  1437: '0b1861a33e600b84',
}
# Of `order_of`: files, validation -> digest.
CARRIED = {
  (True, False): 'b31eed4ede774f3a',
  (True, True): '3a4902596e422682',
  (False, False): '86938aa9f2f0e712',
  (False, True): '29593955a5b1fbf2',
}


def positions_and_crops(size, seed):
  """The first images of a run that reads files, and their crops' numbers."""
  dataset = streamed(size, seed)
  found, numbers = zip(*(dataset[i] for i in range(COUNT)), strict=True)
  return np.array(found), np.array(numbers)


def bits(numbers):
  return digest(np.ascontiguousarray(numbers).ravel().view(np.int64))


def resident(size, seed):
  """The first images of a run whose data is on the device, by its own step."""
  batch = 100

  def choose(inputs, key, step, batch_size, examples):
    del inputs
    index = batch_indices(key, step, batch_size, size)[examples]
    return index, index

  def one(number):
    state = types.SimpleNamespace(seed=jnp.uint32(seed), step=number)
    return step.draw(state, None, choose, batch)[0][0]

  one = jax.vmap(one, axis_name=step.AXIS, axis_size=1, in_axes=None)
  steps = jnp.arange(COUNT // batch)
  return np.asarray(jax.jit(jax.vmap(one))(steps)).reshape(-1)


@pytest.mark.parametrize(('size', 'seed'), STREAMED)
def test_images_in_files_come_in_the_pinned_order(size, seed):
  pytest.importorskip('grain')
  images, numbers = positions_and_crops(size, seed)
  assert (digest(images), bits(numbers)) == STREAMED[size, seed]


@pytest.mark.parametrize(('size', 'seed'), RESIDENT)
def test_images_on_the_device_come_in_the_pinned_order(size, seed):
  assert digest(resident(size, seed)) == RESIDENT[size, seed]


@pytest.mark.parametrize('size', HELD_OUT)
def test_the_pinned_images_are_held_out(size):
  config = types.SimpleNamespace(name='x', validation=10)
  rest, held = fields.hold_out(config, size)
  assert digest([*held, *rest]) == HELD_OUT[size]


def test_a_digest_is_of_the_numbers_as_64_bits():
  raw = b'\1' + bytes(7) + b'\0\1' + bytes(6)
  assert hashlib.sha256(raw).hexdigest().startswith(digest([1, 256]))
  assert len(digest([1, 256])) == 16
  assert digest([1, 256]) != digest([256, 1])


# Independent writings: Grain's shuffle from the words of its source
# (index_shuffle.cc): the cipher Simon (Beaulieu et al. 2013), four rounds,
# applied until the result is in range, with keys of C++'s std::seed_seq.


def seed_seq(seed, count):
  """std::seed_seq{seed}.generate, [rand.util.seedseq] of the C++ standard."""
  wrap = 2**32
  out = [0x8B8B8B8B] * count
  t = (count - 1) // 2  # Of fewer than seven numbers.
  p = (count - t) // 2
  q = p + t

  def mixed(x):
    return x ^ x >> 27

  for k in range(max(2, count)):
    here, at_p, at_q = k % count, (k + p) % count, (k + q) % count
    r1 = 1664525 * mixed(out[here] ^ out[at_p] ^ out[k - 1]) % wrap
    r2 = (r1 + (1 if k == 0 else here + seed * (k == 1))) % wrap
    out[at_p] = (out[at_p] + r1) % wrap
    out[at_q] = (out[at_q] + r2) % wrap
    out[here] = r2
  for k in range(count):
    at_p, at_q = (k + p) % count, (k + q) % count
    r3 = 1566083941 * mixed((out[k] + out[at_p] + out[k - 1]) % wrap) % wrap
    r4 = (r3 - k) % wrap
    out[at_p] ^= r3
    out[at_q] ^= r4
    out[k] = r4
  return out


def simon(x, keys, word):
  mask = (1 << word) - 1

  def turned(x, by):
    return (x << by | x >> (word - by)) & mask

  def mixed(x):
    return turned(x, 1) & turned(x, 8) ^ turned(x, 2)

  left, right = x >> word, x & mask
  for first, second in zip(keys[::2], keys[1::2], strict=True):
    left = left ^ mixed(right) ^ (first & mask)
    right = right ^ mixed(left) ^ (second & mask)
  return left << word | right


def of_node(seed, depth):
  """The seed that Grain gives a transformation so far above `seed()`."""
  return int(np.random.SeedSequence([seed, depth]).generate_state(1)[0])


def cipher_order(size, seed):
  block = max(16, int(size - 2).bit_length())  # ceil(log2(size - 1)).
  word = (block + block % 2) // 2
  out = []
  for epoch in range(-(-COUNT // size)):
    keys = seed_seq((of_node(seed, 1) + epoch) % 2**32, 4)
    x = np.arange(min(size, COUNT))
    outside = np.ones(len(x), bool)
    while outside.any():
      x[outside] = simon(x[outside], keys, word)
      outside = x >= size
    out.append(x)
  return np.concatenate(out)[:COUNT]


@pytest.mark.parametrize(('size', 'seed'), STREAMED)
def test_the_pinned_order_of_files_is_that_of_its_cipher(size, seed):
  assert digest(cipher_order(size, seed)) == STREAMED[size, seed][0]


@pytest.mark.parametrize(('size', 'seed'), STREAMED)
def test_the_pinned_numbers_are_philoxs_at_their_position(size, seed):
  generated = [
    np.random.Generator(
      np.random.Philox(of_node(seed, 3), counter=[0, 0, 0, place])
    ).random(23)
    for place in range(COUNT)
  ]
  assert bits(generated) == STREAMED[size, seed][1]


def pairwise_order(size, seed):
  """Swap-or-not by really swapping what lies at the two places of a pair."""
  key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)[1]
  rounds = 4 * int(size - 1).bit_length()
  out = []
  for epoch in range(-(-COUNT // size)):
    at = jax.random.fold_in(key, epoch)
    sums = np.asarray(jax.random.randint(at, (rounds,), 0, size))
    masks = jax.random.bits(jax.random.fold_in(at, 1), (rounds,))
    places = np.arange(size)
    where = np.arange(size)  # Of each image's place.
    for total, mask in zip(sums, np.asarray(masks), strict=True):
      partners = (int(total) - places) % size
      one = places[places < partners]
      other = partners[places < partners]
      bit = lowbias32(other.astype(np.uint64) ^ np.uint64(mask)) >> 31
      one, other = one[bit == 1], other[bit == 1]
      holds = np.argsort(where)  # Which position is at each number.
      where[holds[one]], where[holds[other]] = other, one
    out.append(where)
  return np.concatenate(out)[:COUNT]


def lowbias32(x):
  """Of 32-bit numbers in uint64."""
  x = (x ^ x >> 16) * 0x7FEB352D % 2**32
  x = (x ^ x >> 15) * 0x846CA68B % 2**32
  return x ^ x >> 16


@pytest.mark.parametrize(('size', 'seed'), [(1437, 1), (50_000, 0)])
def test_the_pinned_order_on_the_device_swaps_pairs(size, seed):
  assert digest(pairwise_order(size, seed)) == RESIDENT[size, seed]


@pytest.mark.parametrize(('files', 'validation'), CARRIED)
def test_what_a_checkpoint_carries(files, validation):
  if files:
    pytest.importorskip('grain')
  config = types.SimpleNamespace(
    name='imagenet2012' if files else 'digits', validation=int(validation)
  )
  found = order_of(config)
  assert found['digest'] == CARRIED[files, validation]
  packages = [package.split()[0] for package in found['drawn_by'].split(', ')]
  drawn_by = ['grain', 'numpy'] if files else ['jax']
  if validation and not files:
    drawn_by.append('numpy')
  assert packages == drawn_by


@pytest.mark.parametrize(
  ('part', 'files', 'validation'),
  [
    ('seed', True, False),
    ('crop', True, False),
    ('rounds', False, False),
    ('name', False, False),
    ('held', True, True),
    ('held', False, True),
  ],
)
def test_what_draws_otherwise_is_told(part, files, validation, monkeypatch):
  """Each part of an order changes what a checkpoint carries."""
  if files:
    pytest.importorskip('grain')
  was = order._order.__wrapped__(files, validation)['digest']
  change = {
    'seed': (order, 'streamed', lambda size, seed: streamed(size, seed + 1)),
    'crop': (order, 'draw', lambda place, rng: draw_crop(place, skipped(rng))),
    'rounds': (shuffle, 'rounds', lambda key, size: 2 * [jnp.arange(size)]),
    'name': (shuffle, 'NAME', 'another'),
    'held': (order, 'held_out', lambda size: np.arange(size)),
  }[part]
  monkeypatch.setattr(*change)
  assert order._order.__wrapped__(files, validation)['digest'] != was


def skipped(rng):
  rng.random()
  return rng


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  save(workdir, [10])
  write_config(workdir, recipe())
  return workdir


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run')


def edit(run, change):
  """Changes what was saved beside the arrays."""
  path = run / 'checkpoints/10/check/metadata'
  check = json.loads(path.read_text())
  assert check['order'] == order_of(recipe().data)
  change(check)
  path.write_text(json.dumps(check))


def test_a_run_in_another_order_does_not_resume(run):
  other = {'digest': '0123456789abcdef', 'drawn_by': 'jax 9.8.7'}
  edit(run, lambda check: check.update(order=other))
  with pytest.raises(InputError) as error:
    restore(run)
  line = str(error.value)
  assert line.startswith(f'{run / "checkpoints/10"} is of a run in the order')
  assert 'that jax 9.8.7 drew' in line
  assert f'but jax {jax.__version__} draws another here' in line
  assert 'install those versions, or' in line
  assert '\n' not in line
  assert restore(run, config=recipe(accept_changes=True))[0] == 10


def test_only_what_draws_otherwise_is_another_order(run):
  edit(run, lambda check: check['order'].update(drawn_by='jax 9.8.7'))
  assert restore(run)[0] == 10


def test_checkpoints_of_before_resume(run):
  edit(run, lambda check: check.pop('order'))
  assert restore(run)[0] == 10


def test_the_trained_network_is_read_in_any_order(run):
  edit(run, lambda check: check['order'].update(digest='another'))
  like = jax.eval_shape(lambda: make_state(0))
  with Checkpoints(run, recipe(), print, read_only=True) as opened:
    assert opened.restore_latest(like)[0] == 10


def test_the_files_of_a_run_are_read_in_the_order_that_is_pinned():
  pytest.importorskip('grain')
  pytest.importorskip('cv2')
  pytest.importorskip('simplejpeg')
  from image_sets import take, train_batches
  from test_stream import numbered, numbers

  shown = numbers(take(train_batches(numbered(50), 10, seed=5), 12))
  dataset = streamed(50, 5)
  assert shown == [dataset[i][0] for i in range(120)]

"""Random and central crops: bounds, distributions, resize."""

import numpy as np
import pytest
from image_sets import encode, picture

pytest.importorskip('cv2')
pytest.importorskip('simplejpeg')

from skipinit_jax.data.crops import (
  CentralCrop,
  RandomCrop,
  mirror,
  read,
)
from skipinit_jax.data.decode import decode

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def random_crop(rng, size=8, area=AREA, aspect=ASPECT):
  return RandomCrop(size, area, aspect, rng.random(RandomCrop.DRAWS).tolist())


def crop_of(data, crop):
  out = np.empty((crop.size, crop.size, 3), np.uint8)
  read(data, crop, out)
  return out


SHAPES = [(375, 500), (500, 375), (40, 41), (3, 400), (400, 3), (1, 1), (2, 2)]


@pytest.mark.parametrize('shape', SHAPES)
def test_boxes_lie_in_the_image(shape):
  rng = np.random.default_rng(0)
  for _ in range(300):
    for crop in (random_crop(rng), CentralCrop(224, 256)):
      top, left, height, width = crop.box(*shape)
      assert height > 0
      assert width > 0
      assert 0 <= top <= shape[0] - height
      assert 0 <= left <= shape[1] - width


def test_area_and_aspect_are_even_in_their_ranges():
  # A square of a million pixels: every draw of a small area fits.
  rng = np.random.default_rng(1)
  area, aspect = (0.1, 0.5), (1 / 2, 2)
  boxes = [
    random_crop(rng, 8, area, aspect).box(1000, 1000) for _ in range(4000)
  ]
  tops, _, heights, widths = np.array(boxes).T
  areas, ratios = heights * widths / 1e6, np.log2(widths / heights)
  for value, low, high in ((areas, *area), (ratios, -1, 1)):
    shares = np.sort((value - low) / (high - low))
    assert shares.min() > -0.01
    assert shares.max() < 1.01
    # Kolmogorov-Smirnov: even to 1.63 / sqrt(n) in 99 of 100 samples.
    even = np.arange(1, len(shares) + 1) / len(shares)
    assert np.abs(shares - even).max() < 1.63 / np.sqrt(4000)
  places = np.sort((tops + 0.5) / (1001 - heights))
  even = np.arange(1, 4001) / 4000
  assert np.abs(places - even).max() < 1.63 / np.sqrt(4000)


def test_crops_reach_every_edge():
  rng = np.random.default_rng(2)
  crops = [random_crop(rng, area=(0.1, 0.3)) for _ in range(2000)]
  boxes = [crop.box(20, 30) for crop in crops]
  assert max(b.height for b in boxes) < 20  # None touches both edges.
  assert min(b.top for b in boxes) == min(b.left for b in boxes) == 0
  assert max(b.top + b.height for b in boxes) == 20
  assert max(b.left + b.width for b in boxes) == 30


def test_an_image_too_long_for_any_draw_gives_its_middle():
  crop = random_crop(np.random.default_rng(3), area=(0.9, 1.0))
  assert crop.box(30, 300) == (0, 130, 30, 40)
  assert crop.box(300, 30) == (130, 0, 40, 30)


def test_the_central_crop_is_what_a_whole_resize_would_keep():
  cv2 = pytest.importorskip('cv2')
  image = picture(np.random.default_rng(4), 300, 400, 40)
  data = encode(image, 'PNG')
  whole = cv2.resize(image, (341, 256), interpolation=cv2.INTER_LINEAR)
  wanted = whole[16:240, 58:282]
  found = crop_of(data, CentralCrop(224, 256))
  assert np.abs(found.astype(int) - wanted).mean() < 3


def test_resizing_is_bilinear_without_antialiasing():
  # Half-pixel centres, written out: shrunk by 1.5, two weights a side.
  image = np.random.default_rng(5).integers(0, 256, (12, 12, 3), np.uint8)
  crop = CentralCrop(8, 8)
  centres = (np.arange(8) + 0.5) * 1.5 - 0.5
  low = np.floor(centres).astype(int)
  share = centres - low
  x = image.astype(float)
  x = x[low] * (1 - share)[:, None, None] + x[low + 1] * share[:, None, None]
  y = x[:, low] * (1 - share)[:, None] + x[:, low + 1] * share[:, None]
  found = crop_of(encode(image, 'PNG'), crop)
  assert np.abs(found - y).max() <= 1


def test_a_crop_shows_its_own_part():
  # Each pixel tells its place; the crop's corners must tell the box's.
  rows, columns = np.meshgrid(np.arange(200), np.arange(240), indexing='ij')
  image = np.stack([rows, columns, rows * 0], -1).astype(np.uint8)
  data = encode(image, 'PNG')
  rng = np.random.default_rng(6)
  for _ in range(20):
    crop = random_crop(rng, 16)
    top, left, height, width = crop.box(200, 240)
    found = crop_of(data, crop).astype(float)
    half = height / 32, width / 32
    assert abs(found[0, 0, 0] - (top + half[0] - 0.5)) <= 1
    assert abs(found[0, 0, 1] - (left + half[1] - 0.5)) <= 1
    assert abs(found[-1, -1, 0] - (top + height - half[0] - 0.5)) <= 1
    assert abs(found[-1, -1, 1] - (left + width - half[1] - 0.5)) <= 1


def test_large_photographs_are_averaged_not_sampled():
  # The mean of 64 black or white pixels deviates by an eighth of 127, that of
  # the four that bilinear sampling sees by a half.
  image = np.random.default_rng(9).integers(0, 2, (512, 512, 1), np.uint8)
  image = np.repeat(image * 255, 3, -1)
  data = encode(image, quality=98, subsampling=0)
  assert crop_of(data, CentralCrop(64, 64)).std() < 127 / 4
  assert crop_of(encode(image, 'PNG'), CentralCrop(64, 64)).std() > 127 / 4


def test_a_shrunk_photograph_shows_the_same_part():
  image = picture(np.random.default_rng(7), 401, 603, 60)
  rng = np.random.default_rng(8)
  for _ in range(10):
    crop = random_crop(rng, 32, area=(0.5, 1.0))
    shrunk = crop_of(encode(image, quality=98, subsampling=0), crop)
    whole = crop_of(encode(image, 'PNG'), crop)
    assert np.abs(shrunk.astype(int) - whole).mean() < 12


def test_a_photograph_that_the_fallback_does_not_shrink_shows_the_same_part():
  image = picture(np.random.default_rng(7), 401, 603, 60)
  data = encode(image, quality=98, subsampling=0)
  flawed = data[:-2] + bytes(40) + data[-2:]
  assert decode(flawed).fallback
  crop = CentralCrop(64, 64)  # Down to the last row, where the flaw is seen.
  difference = crop_of(flawed, crop).astype(int) - crop_of(data, crop)
  assert 0 < np.abs(difference).mean() < 6


def test_mirroring_reverses_the_columns_in_place():
  image = picture(np.random.default_rng(9), 16, 16)
  wanted = image[:, ::-1].copy()
  mirror(image)
  assert np.array_equal(image, wanted)

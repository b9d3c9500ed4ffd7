"""Decoding: formats, colours, and what is refused."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_sets import COLOURS, encode, picture
from PIL import Image

simplejpeg = pytest.importorskip('simplejpeg')

from skipinit_jax.data import decode as module  # noqa: E402
from skipinit_jax.data.decode import (  # noqa: E402
  DecodeError,
  decode,
  decode_rows,
  jpeg_size,
)


@pytest.fixture
def pixels():
  """Five flat bands of colour, 16 rows each."""
  return np.repeat(np.repeat(COLOURS.astype(np.uint8), 16, 0)[:, None], 64, 1)


def close(image, wanted, by=6):
  return image.shape == wanted.shape and np.all(
    np.abs(image.astype(int) - wanted.astype(int)) <= by
  )


def same_bands(image, pixels, by=6):
  """Equal but for the rows where one band's chroma runs into the next's."""
  assert image.shape == pixels.shape
  middle = np.arange(len(pixels)) % 16 // 4 % 3 > 0
  return close(image[middle], pixels[middle], by)


def cmyk(pixels, ink=0):
  """As CMYK: the complement, with a part of it in the black ink."""
  key = np.full_like(pixels[..., :1], ink)
  planes = np.concatenate([255 - pixels, key], -1)
  image = Image.new('CMYK', pixels.shape[1::-1])
  image.frombytes(planes.tobytes())
  return image


def ycck(pixels):
  """A CMYK JPEG whose colours are stored as YCbCr, as Photoshop does."""
  ycc = np.array(Image.fromarray(255 - pixels).convert('YCbCr'))
  # Pillow stores the complement of what it is given.
  data = save(cmyk(ycc), 'JPEG', quality=95, subsampling=0)
  adobe = data.index(b'Adobe')
  assert data[adobe + 11] == 0  # The marker's transform: none.
  return data[: adobe + 11] + b'\x02' + data[adobe + 12 :]


def save(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize(
  ('kind', 'strict'),
  [
    ('jpeg', True),
    ('progressive', True),
    ('rgb jpeg', True),
    ('png', False),
    ('palette', False),
    ('transparent', False),
    ('gif', False),
    ('webp', False),
    ('bmp', False),
    ('cmyk', True),
    ('ycck', True),
  ],
)
def test_every_format_has_the_right_colours(pixels, kind, strict):
  rgb = Image.fromarray(pixels)
  data = {
    'jpeg': lambda: save(rgb, 'JPEG', quality=95),
    'progressive': lambda: save(rgb, 'JPEG', quality=95, progressive=True),
    'rgb jpeg': lambda: save(rgb, 'JPEG', quality=95, keep_rgb=True),
    'png': lambda: save(rgb, 'PNG'),
    'palette': lambda: save(rgb.convert('P'), 'PNG'),
    'transparent': lambda: save(rgb.convert('P'), 'PNG', transparency=b'\x80'),
    'gif': lambda: save(rgb, 'GIF'),
    'webp': lambda: save(rgb, 'WEBP', lossless=True),
    'bmp': lambda: save(rgb, 'BMP'),
    'cmyk': lambda: save(cmyk(pixels), 'JPEG', quality=95),
    'ycck': lambda: ycck(pixels),
  }[kind]()
  decoded = decode(data)
  by = 40 if kind in ('palette', 'transparent') else 6  # Web palette.
  assert same_bands(decoded.pixels, pixels, by)
  assert decoded.pixels.dtype == np.uint8
  if strict is not None:  # Who takes CMYK depends on simplejpeg's version.
    assert (decoded.fallback is None) == strict


def test_black_ink_darkens(pixels):
  image = decode(save(cmyk(pixels, ink=128), 'JPEG', quality=95)).pixels
  assert same_bands(image, (pixels * (127 / 255)).astype(np.uint8))


def test_gray_comes_out_in_three_equal_channels():
  gray = picture(np.random.default_rng(0), 40, 56)[..., 0]
  wanted = np.repeat(gray[..., None], 3, -1)
  assert close(decode(encode(gray, 'JPEG', quality=95)).pixels, wanted, 12)
  assert close(decode(encode(gray, 'PNG')).pixels, wanted, 0)


def test_sixteen_bits_of_gray_are_scaled_not_clipped():
  gray = np.linspace(0, 65535, 32 * 24).astype(np.uint16).reshape(32, 24)
  image = decode(encode(gray, 'PNG')).pixels
  assert np.array_equal(image, np.repeat((gray >> 8)[..., None], 3, -1))
  assert image.dtype == np.uint8


def test_exif_rotation_is_not_applied(pixels):
  exif = Image.Exif()
  exif[0x0112] = 6  # A quarter turn.
  data = save(Image.fromarray(pixels), 'JPEG', quality=95, exif=exif)
  assert b'Exif' in data
  assert same_bands(decode(data).pixels, pixels)


def test_a_flaw_outside_the_picture_is_decoded_by_the_fallback(pixels):
  data = encode(pixels, quality=95)
  start = data.index(b'\xff\xda')
  flawed = data[:start] + b'\x00\x00\x00' + data[start:]
  decoded = decode(flawed)
  assert 'extraneous' in decoded.fallback
  assert same_bands(decoded.pixels, pixels)


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (lambda data: b'', 'not an image'),
    (lambda data: b'<html>404</html>' * 20, 'not an image'),
    (lambda data: data[: len(data) // 2], 'truncated'),
    (lambda data: data[:40], '(?i)truncated|header|known format'),
  ],
)
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_what_is_not_whole_is_refused_with_a_reason(damage, reason, kind):
  data = encode(picture(np.random.default_rng(1), 90, 120), kind)
  with pytest.raises(DecodeError, match=reason) as caught:
    decode(damage(data))
  assert str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('shrink', [2, 4, 8])
def test_shrunk_pixels_are_means_of_the_whole_ones(shrink):
  smooth = picture(np.random.default_rng(2), 96, 160)
  data = encode(smooth, quality=98, subsampling=0)
  whole = decode(data).pixels.astype(float)
  cells = whole.reshape(96 // shrink, shrink, 160 // shrink, shrink, 3)
  assert close(decode(data, shrink).pixels, cells.mean((1, 3)), 10)


def test_any_size_shrinks_without_the_fallback():
  for size in range(1, 66):
    data = encode(np.full((size, 2 * size, 3), 99, np.uint8))
    for shrink in (2, 4, 8):
      pixels, fallback = decode(data, shrink)
      assert fallback is None
      assert pixels.shape == (-(-size // shrink), -(-2 * size // shrink), 3)


def test_size_is_read_from_the_header_alone():
  data = encode(picture(np.random.default_rng(3), 33, 57))
  assert jpeg_size(data) == (33, 57)
  assert jpeg_size(data[: len(data) - 10]) == (33, 57)
  assert jpeg_size(encode(np.zeros((4, 4, 3), np.uint8), 'PNG')) is None


def test_neither_a_smaller_nor_a_larger_image_is_mixed_with_the_last():
  def check():  # In a thread of its own, whose buffer is new.
    for size, level in ((50, 90), (300, 250), (20, 10)):
      image = np.full((size, size + 1, 3), level, np.uint8)
      decoded = decode(encode(image))
      assert decoded.fallback is None
      assert close(decoded.pixels, image)
    return True

  with ThreadPoolExecutor(1) as pool:
    assert pool.submit(check).result()


def jpeg(kind, rng, height, width, quality=90):
  """A JPEG with details of any size."""
  pixels = picture(rng, height, width, int(rng.integers(1, 9)))
  if kind == 'gray':
    return encode(pixels, quality=quality, mode='L')
  if kind.isdigit():
    return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=kind)
  options = {
    'restarts by row': {'restart_marker_rows': 1},
    'restarts within rows': {'restart_marker_blocks': 3},
    'optimized': {'optimize': True},
    'rgb': {'keep_rgb': True},
    'comment': {'comment': b'\xff\xc0\x00\x11\x08\x00\x10\x00\x10\x03'},
    'progressive': {'progressive': True},
  }[kind]
  return encode(pixels, quality=quality, **options)


def taken(pixels):
  """A copy; the buffer that the next call may return is blank."""
  copied = pixels.copy()
  pixels[...] = 77
  return copied


KINDS = ['444', '422', '420', '440', '411', 'gray', 'optimized', 'rgb']
KINDS += ['restarts by row', 'restarts within rows', 'comment', 'progressive']


@pytest.mark.parametrize('kind', KINDS)
def test_the_upper_rows_are_those_of_the_whole_image(kind, monkeypatch):
  # What the strict decoder does not take is decoded again, by `decode`.
  again = []
  monkeypatch.setattr(module, 'decode', lambda *args: again.append(args))
  rng = np.random.default_rng(KINDS.index(kind))
  fewer = 0
  for _ in range(60):
    height, width = map(int, rng.integers(1, 130, 2))
    data = jpeg(kind, rng, height, width, int(rng.integers(40, 100)))
    for shrink in (1, 2, 4, 8):
      rows = int(rng.integers(1, height + 1))
      whole = decode(data, shrink)
      assert whole.fallback is None
      whole = taken(whole.pixels)
      upper, by = decode_rows(data, (height, width), rows, shrink)
      assert by == shrink
      # Rounded to whole pixels, a box may have a row more.
      needed = min(len(whole), -(-rows // shrink) + 1)
      assert np.array_equal(upper[:needed], whole[:needed])
      fewer += len(upper) < len(whole)
  assert not again
  assert fewer == 0 if kind == 'progressive' else fewer > 80


@pytest.mark.parametrize('ink', [0, 128])
def test_rows_of_cmyk_are_those_of_the_whole_image(pixels, ink):
  data = save(cmyk(pixels, ink), 'JPEG', quality=95)
  whole = taken(decode(data).pixels)
  upper, _ = decode_rows(data, pixels.shape[:2], 20)
  assert np.array_equal(upper[:20], whole[:20])


def test_rows_are_fewer_bytes_to_decode():
  # The decoder stops: what follows is no picture at all, and costs nothing.
  data = jpeg('420', np.random.default_rng(0), 400, 300)
  start = data.index(b'\xff\xda') + 14
  half = (start + len(data)) // 2
  noise = data[:half] + b'\x55' * (len(data) - half - 2) + data[-2:]
  whole = taken(decode(data).pixels)
  upper, _ = decode_rows(noise, (400, 300), 100)
  assert len(upper) < 110
  assert np.array_equal(upper[:100], whole[:100])


def flip(data, place, rng):
  data[place] ^= 1 << int(rng.integers(8))


def cut(data, place, rng):
  del data[place:]


def blank_end(data, place, rng):
  data[place:] = bytes(len(data) - place)


def blank(data, place, rng):
  data[place : place + 30] = bytes(30)


def insert(data, place, rng):
  data[place:place] = rng.bytes(5)


def delete(data, place, rng):
  del data[place : place + 5]


def mark(data, place, rng):
  data[place : place + 2] = 0xFF, int(rng.integers(1, 255))


def outcome(function):
  try:
    return taken(function())
  except DecodeError as error:
    return str(error)


@pytest.mark.parametrize(
  'damage', [flip, cut, blank_end, blank, insert, delete, mark]
)
@pytest.mark.parametrize('kind', ['420', 'restarts by row', 'progressive'])
def test_rows_of_a_damaged_image_are_what_the_whole_would_be(damage, kind):
  rng = np.random.default_rng(KINDS.index(kind))
  refused = different = 0
  for _ in range(80):
    height, width = map(int, rng.integers(40, 150, 2))
    good = jpeg(kind, rng, height, width)
    data = bytearray(good)
    start = good.index(b'\xff\xda') + 14
    damage(data, int(rng.integers(start, len(good) - 32)), rng)
    data, size = bytes(data), (height, width)
    rows = int(rng.integers(1, height + 1))
    found = outcome(lambda: decode_rows(data, size, rows)[0])  # noqa: B023
    whole = outcome(lambda: decode(data).pixels)  # noqa: B023
    if isinstance(whole, str):
      refused += 1
      assert found == whole
    else:
      assert np.array_equal(found[:rows], whole[:rows])
      different += not np.array_equal(decode(good).pixels, whole)
  assert refused + different > 20

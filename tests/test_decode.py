"""Decoding: formats, colours, and what is refused."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_sets import COLOURS, encode, picture
from PIL import Image

simplejpeg = pytest.importorskip('simplejpeg')

from skipinit_jax.data.decode import DecodeError, decode, jpeg_size  # noqa: E402


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

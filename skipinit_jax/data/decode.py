"""From the bytes of an image file to RGB pixels, or a reason why not."""

import io
import re
import threading
from typing import NamedTuple

import numpy as np

from skipinit_jax.data.extras import require

# Scalings that libjpeg-turbo decodes faster than a whole image.
SHRINKS = (8, 4, 2)

# Rows below a crop whose chroma enters its last rows, at any scale, and one.
CONTEXT = 3
# What libjpeg-turbo says of a JPEG whose header tells fewer rows than follow:
# after them come bytes, up to the end or a restart marker. It tells only the
# first flaw, so that the rows that it decoded have none.
_ROWS_LEFT = re.compile(
  r'Corrupt JPEG data: \d+ extraneous bytes before marker 0x(d[0-79])'
)
_END = b'\xff\xd9'

_scratch = threading.local()


class DecodeError(ValueError):
  """An image that can't be decoded; the message is the reason."""


class Decoded(NamedTuple):
  """Pixels, and which decoder made them.

  Attributes:
    pixels: uint8 (height, width, 3), RGB; may be a buffer that the next call of
      `decode` in this thread overwrites.
    fallback: why the strict JPEG decoder refused, or None where it did not.
  """

  pixels: np.ndarray
  fallback: str | None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width in a JPEG's header, or None if it has none."""
  simplejpeg = require('simplejpeg')
  try:
    return simplejpeg.decode_jpeg_header(data)[:2]
  except ValueError:
    return None


def decode(data: bytes, shrink: int = 1) -> Decoded:
  """Decodes an image of any common format to 8-bit RGB.

  EXIF rotation is not applied, as usual for ImageNet. Decoding is no integrity
  check: most flipped bits in a JPEG's scan go unnoticed.

  Args:
    data: the file.
    shrink: 1, 2, 4 or 8; a JPEG's sides are divided by it and rounded up, its
      pixels averaged. The fallback ignores it.

  Raises:
    DecodeError: no decoder takes it, or it is cut off.
  """
  simplejpeg = require('simplejpeg')
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return Decoded(_decode_strictly(data, height, width, shrink), None)
  except ValueError as error:
    reason = str(error)
  try:
    return Decoded(_decode_with_pillow(data), reason)
  except Exception as error:
    # Pillow's plug-ins raise errors of many types for a broken file.
    raise DecodeError(_reason(error, reason)) from None


def decode_rows(
  data: bytes, size: tuple[int, int], rows: int, shrink: int = 1
) -> tuple[np.ndarray, int]:
  """Decodes the upper rows of a JPEG, equal to those of `decode`.

  Flaws further down go unnoticed, but for an end that is missing.

  Args:
    data: the file.
    size: its height and width, as `jpeg_size` gives them.
    rows: of the whole image, that are needed; more may come.
    shrink: see `decode`.

  Returns:
    Pixels as `Decoded` has them, and by what they are shrunk: 1 if by nothing.

  Raises:
    DecodeError: see `decode`.
  """
  height, width = size
  fewer = rows + CONTEXT * shrink
  try:
    if fewer < height and (place := _place_of_height(data)):
      pixels = _decode_upper(data, place, fewer, width, shrink)
    else:
      pixels = _decode_strictly(data, height, width, shrink)
    return pixels, shrink
  except ValueError:
    pixels, fallback = decode(data, shrink)
    return pixels, shrink if fallback is None else 1


def _decode_strictly(
  data: bytes, height: int, width: int, shrink: int
) -> np.ndarray:
  """Decodes a JPEG; ValueError for any flaw that libjpeg-turbo sees."""
  least = {}
  if shrink > 1:
    height, width = -(-height // shrink), -(-width // shrink)
    least = {'min_height': height, 'min_width': width, 'min_factor': shrink}
  # A new array for every image would cost page faults.
  buffer = _buffer(height * width * 3)
  return require('simplejpeg').decode_jpeg(data, buffer=buffer, **least)


def _decode_upper(
  data: bytes, place: int, height: int, width: int, shrink: int
) -> np.ndarray:
  """Decodes a JPEG as if it had `height` rows; `place`: of its own height.

  libjpeg-turbo leaves the bytes of the other rows alone, but for looking for
  the end.
  """
  view = memoryview(data)
  data = b''.join((view[:place], height.to_bytes(2, 'big'), view[place + 2 :]))
  try:
    return _decode_strictly(data, height, width, shrink)
  except ValueError as error:
    left = _ROWS_LEFT.fullmatch(str(error))
    # After a restart marker the decoder's next words, on the end, are lost.
    if not left or not (left[1] == 'd9' or data.endswith(_END)):
      raise
  # All rows are there: the decoder complains at the end.
  height, width = -(-height // shrink), -(-width // shrink)
  return _buffer(0)[: height * width * 3].reshape(height, width, 3)


def _place_of_height(data: bytes) -> int | None:
  """Where a JPEG's header has its height, if its rows can be cut off.

  None for a progressive one, whose every scan has all rows; and for CMYK, which
  simplejpeg turns to RGB only after the decoder's last word.
  """
  place = 2
  while data[place : place + 1] == b'\xff' and place + 10 <= len(data):
    kind = data[place + 1]
    if kind in (0xC0, 0xC1):  # Baseline; or with more Huffman tables.
      bits, components = data[place + 4], data[place + 9]
      return place + 5 if bits == 8 and components in (1, 3) else None
    if not (kind == 0xC4 or kind == 0xDB or kind >= 0xE0):
      return None
    place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
  return None


def _buffer(size: int) -> np.ndarray:
  """This thread's scratch memory, at least `size` bytes."""
  buffer = getattr(_scratch, 'buffer', None)
  if buffer is None or len(buffer) < size:
    buffer = _scratch.buffer = np.empty(size, np.uint8)
  return buffer


def _decode_with_pillow(data: bytes) -> np.ndarray:
  """Decodes PNG, GIF, CMYK, and JPEGs with flaws outside of the picture."""
  Image = require('PIL.Image')
  with Image.open(io.BytesIO(data)) as image:
    if image.mode.startswith('I'):  # Pillow clips 16 bits instead of scaling.
      gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
      return np.repeat(gray[..., None].astype(np.uint8), 3, axis=2)
    if image.mode == 'P' and 'transparency' in image.info:
      image = image.convert('RGBA')
    return np.array(image.convert('RGB'))


def _reason(error: Exception, strict: str) -> str:
  if type(error).__name__ == 'UnidentifiedImageError':
    return 'not an image of a known format'
  return f'{error or type(error).__name__} ({strict})'

"""From the bytes of an image file to RGB pixels, or a reason why not."""

import io
import threading
from typing import NamedTuple

import numpy as np

from skipinit_jax.data.extras import require

# Scalings that libjpeg-turbo decodes faster than a whole image.
SHRINKS = (8, 4, 2)

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
    least = {}
    if shrink > 1:
      height, width = -(-height // shrink), -(-width // shrink)
      least = {'min_height': height, 'min_width': width, 'min_factor': shrink}
    # A new array for every image would cost page faults.
    buffer = _buffer(height * width * 3)
    return Decoded(simplejpeg.decode_jpeg(data, buffer=buffer, **least), None)
  except ValueError as error:
    reason = str(error)
  try:
    return Decoded(_decode_with_pillow(data), reason)
  except Exception as error:
    # Pillow's plug-ins raise errors of many types for a broken file.
    raise DecodeError(_reason(error, reason)) from None


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

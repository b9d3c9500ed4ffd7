"""Random and central crops of images, resized to a fixed size."""

import dataclasses
import functools
import math
from types import ModuleType
from typing import NamedTuple

import numpy as np

from skipinit_jax.data.decode import SHRINKS, decode, decode_rows, jpeg_size
from skipinit_jax.data.extras import require

TRIES = 10  # Random boxes that are tried before the central one is taken.


class Box(NamedTuple):
  """A part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class RandomCrop:
  """The random-resized crop of Szegedy et al. 2015 (Inception).

  Attributes:
    size: of the output.
    area: least and largest share of the image's area.
    aspect: least and largest width / height, drawn evenly in the logarithm.
    draws: `RandomCrop.DRAWS` uniform numbers in [0, 1). There is no other
      randomness: another image can be cropped with the same draws.
  """

  DRAWS = 2 * TRIES + 2

  size: int
  area: tuple[float, float]
  aspect: tuple[float, float]
  draws: list[float]

  def box(self, height: int, width: int) -> Box:
    """The first box that fits, else the central one of the nearest aspect."""
    low, high = (math.log(value) for value in self.aspect)
    down, right, *shapes = self.draws
    for share, ratio in zip(shapes[::2], shapes[1::2], strict=True):
      area = height * width * _between(*self.area, share)
      aspect = math.exp(_between(low, high, ratio))
      box_width = round(math.sqrt(area * aspect))
      box_height = round(math.sqrt(area / aspect))
      if 0 < box_width <= width and 0 < box_height <= height:
        top = int(down * (height - box_height + 1))
        left = int(right * (width - box_width + 1))
        return Box(top, left, box_height, box_width)
    aspect = min(max(width / height, self.aspect[0]), self.aspect[1])
    box_height = max(1, min(height, round(width / aspect)))
    box_width = max(1, min(width, round(height * aspect)))
    return _central(height, width, box_height, box_width)


@dataclasses.dataclass(frozen=True)
class CentralCrop:
  """The middle `size` x `size` of an image whose shorter side is `resize`.

  The box is cut out first and resized afterwards: cheaper, and the same picture
  except that the box is rounded to whole pixels.
  """

  size: int
  resize: int

  def box(self, height: int, width: int) -> Box:
    """The central square of side `size / resize` of the shorter side."""
    side = max(1, round(min(height, width) * self.size / self.resize))
    return _central(height, width, side, side)


def read(data: bytes, crop: RandomCrop | CentralCrop, out: np.ndarray) -> None:
  """Decodes an image and writes its crop to `out`, uint8 (size, size, 3).

  Raises:
    DecodeError: see `decode`.
  """
  if shape := jpeg_size(data):
    box = crop.box(*shape)
    rows, shrink = box.top + box.height, _shrink(box, crop.size)
    pixels, shrink = decode_rows(data, shape, rows, shrink)
    if shrink > 1:
      box = _scaled(box, *(-(-side // shrink) / side for side in shape))
  else:
    pixels = decode(data).pixels
    box = crop.box(*pixels.shape[:2])
  top, left, height, width = box
  # Bilinear without antialiasing, as in most pipelines (tf.data's agrees to one
  # level of 255), and in evaluation too, so that its images are as sharp as
  # those of training. Where an image would shrink to less than half, the
  # decoder averages its pixels.
  part = pixels[top : top + height, left : left + width]
  cv2 = _cv2()
  size = crop.size, crop.size
  cv2.resize(part, size, out, interpolation=cv2.INTER_LINEAR)


def mirror(image: np.ndarray) -> None:
  """Mirrors an image left to right, in place."""
  _cv2().flip(image, 1, image)


@functools.cache
def _cv2() -> ModuleType:
  cv2 = require('cv2')
  cv2.setNumThreads(0)  # Its threads would compete with the loader's.
  return cv2


def _shrink(box: Box, size: int) -> int:
  """The largest shrinking that leaves the box no smaller than the output."""
  side = min(box.height, box.width)
  return next((shrink for shrink in SHRINKS if side >= shrink * size), 1)


def _scaled(box: Box, down: float, right: float) -> Box:
  """The same box after the image was scaled by these factors."""
  top, left = round(box.top * down), round(box.left * right)
  bottom = round((box.top + box.height) * down)
  return Box(
    top, left, bottom - top, round((box.left + box.width) * right) - left
  )


def _between(low: float, high: float, share: float) -> float:
  return low + (high - low) * share


def _central(height: int, width: int, box_height: int, box_width: int) -> Box:
  top, left = (height - box_height) // 2, (width - box_width) // 2
  return Box(top, left, box_height, box_width)

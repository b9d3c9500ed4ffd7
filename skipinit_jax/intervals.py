"""95 % intervals by Student's t: for the mean of a few values, and a slope."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def half_interval(values: Sequence[float]) -> float:
  """Half of the 95 % interval for a mean, by Student's t; inf for one value.

  >>> round(half_interval([1.0, 2.0, 3.0]), 3)  # 4.303 / sqrt(3)
  2.484
  """
  if len(values) < 2:
    return math.inf
  error = statistics.stdev(values) / math.sqrt(len(values))
  return float(stats.t.ppf(0.975, len(values) - 1)) * error


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
  """The slope of y by least squares, and half of its 95 % interval.

  None with fewer than three points or two values of x.

  >>> slope([0, 1, 2, 3], [0, -1, -2, -3])
  (-1.0, 0.0)
  """
  if len(x) < 3 or len(set(x)) < 2:
    return None
  fit: Any = stats.linregress(x, y)
  error = 0.0 if math.isnan(fit.stderr) else fit.stderr  # All y are equal.
  return float(fit.slope), float(stats.t.ppf(0.975, len(x) - 2) * error)

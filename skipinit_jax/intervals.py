"""Intervals for the mean of a few values."""

import math
import statistics
from collections.abc import Sequence

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

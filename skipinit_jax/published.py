"""Figures that the papers publish, with their sources.

Each table is keyed by `variants.VARIANTS`, then by depth or batch size.
"""

from typing import NamedTuple


class Accuracy(NamedTuple):
  """A published accuracy.

  Attributes:
    value: top-1, percent; None where the paper says that it does not train.
    error: its standard error as published, None if there is none.
    rate: optimal learning rate, the exponent of 2.
    rates: range of rates within error of the optimum, exponents.
    top5: percent, where it is published.
  """

  value: float | None
  error: float | None = None
  rate: int | None = None
  rates: tuple[int, int] | None = None
  top5: float | None = None


FAILS = Accuracy(None)

DE_SMITH = 'De & Smith 2020 (arXiv 2002.10444)'
FIXUP = 'Zhang, Dauphin, Ma 2019 (arXiv 1901.09321)'

# De & Smith 2020, table 1: n-2 Wide-ResNet on CIFAR-10, 200 epochs, test
# accuracy by depth.
DEPTH_SOURCE = f'{DE_SMITH}, table 1'
DEPTH = {
  'batchnorm': {
    16: Accuracy(93.5, 0.1, -1, (-1, -1)),
    100: Accuracy(94.7, 0.1, -1, (-2, 0)),
    1000: Accuracy(94.6, 0.1, -2, (-3, 0)),
  },
  'skipinit_sqrt': {
    16: Accuracy(93.0, 0.1, -2, (-2, -1)),
    100: Accuracy(94.2, 0.1, -1, (-2, -1)),
    1000: Accuracy(94.2, 0.0, -1, (-2, -1)),
  },
  'skipinit': {
    16: Accuracy(93.3, 0.1, -2, (-2, -2)),
    100: Accuracy(94.2, 0.1, -2, (-2, -2)),
    1000: Accuracy(94.3, 0.2, -2, (-3, -1)),
  },
}

# Table 2: variants, in the same setting.
ABLATIONS_SOURCE = f'{DE_SMITH}, table 2'
ABLATIONS = {
  'skipinit_1': {
    16: Accuracy(93.0, 0.1, -2, (-2, -1)),
    100: FAILS,
    1000: FAILS,
  },
  'divide_sqrt2': {
    16: Accuracy(92.4, 0.1, -2, (-2, -1)),
    100: Accuracy(88.9, 0.4, -5, (-5, -5)),
    1000: FAILS,
  },
  'skipinit_no_l2': {
    16: Accuracy(89.8, 0.2, -3, (-3, -3)),
    100: Accuracy(91.7, 0.2, -2, (-2, -2)),
    1000: Accuracy(92.1, 0.1, -2, (-2, -2)),
  },
}

# Fixup, figure 3: CIFAR-10 after the first epoch, by depth; read off the figure
# by eye, to about 1.
FIRST_EPOCH_SOURCE = f'{FIXUP}, figure 3, read off by eye'
FIRST_EPOCH = {
  'batchnorm': {
    10: Accuracy(49, 1),
    100: Accuracy(50, 1),
    1000: Accuracy(47, 1),
    10_000: Accuracy(35, 1),
  },
  'fixup': {
    10: Accuracy(49, 1),
    100: Accuracy(50, 1),
    1000: Accuracy(48, 1),
    10_000: Accuracy(40, 1),
  },
}


def _by_batch(*figures: tuple[float, float]) -> dict[int, Accuracy]:
  """Top-1 and top-5 at batches of 256, 1024 and 4096 images."""
  return {
    batch: Accuracy(top1, top5=top5)
    for batch, (top1, top5) in zip((256, 1024, 4096), figures, strict=True)
  }


# De & Smith 2020, table 3: ResNet50-V2 on ImageNet, by batch size.
IMAGENET_SOURCE = f'{DE_SMITH}, table 3'
IMAGENET = {
  'imagenet:batchnorm': _by_batch((75.0, 92.2), (74.9, 92.1), (74.9, 91.9)),
  'imagenet:fixup': _by_batch((74.8, 91.8), (74.6, 91.7), (73.0, 90.6)),
  'imagenet:skipinit': _by_batch((74.9, 91.9), (74.6, 91.8), (70.8, 89.2)),
  'imagenet:fixup_dropout': _by_batch((75.8, 92.5), (75.6, 92.5), (74.8, 91.8)),
  'imagenet:regularized_skipinit': _by_batch(
    (75.6, 92.4), (75.5, 92.5), (72.7, 90.7)
  ),
}

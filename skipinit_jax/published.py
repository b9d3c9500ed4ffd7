"""Figures that the papers publish, with their sources. Data only.

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

# De & Smith 2020, table 3: ResNet50-V2 on ImageNet, by batch size.
IMAGENET_SOURCE = f'{DE_SMITH}, table 3'
IMAGENET = {
  'imagenet:batchnorm': {
    256: Accuracy(75.0, top5=92.2),
    1024: Accuracy(74.9, top5=92.1),
    4096: Accuracy(74.9, top5=91.9),
  },
  'imagenet:fixup': {
    256: Accuracy(74.8, top5=91.8),
    1024: Accuracy(74.6, top5=91.7),
    4096: Accuracy(73.0, top5=90.6),
  },
  'imagenet:skipinit': {
    256: Accuracy(74.9, top5=91.9),
    1024: Accuracy(74.6, top5=91.8),
    4096: Accuracy(70.8, top5=89.2),
  },
  'imagenet:fixup_dropout': {
    256: Accuracy(75.8, top5=92.5),
    1024: Accuracy(75.6, top5=92.5),
    4096: Accuracy(74.8, top5=91.8),
  },
  'imagenet:regularized_skipinit': {
    256: Accuracy(75.6, top5=92.4),
    1024: Accuracy(75.5, top5=92.5),
    4096: Accuracy(72.7, top5=90.7),
  },
}

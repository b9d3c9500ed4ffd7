"""Figures that the papers publish, with their sources. Data only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """A published accuracy.

  Attributes:
    value: percent; None where the paper says that it does not train.
    error: its standard error as published, None if there is none.
    rate: optimal learning rate, the exponent of 2.
    rates: range of rates within error of the optimum, exponents.
  """

  value: float | None
  error: float | None = None
  rate: int | None = None
  rates: tuple[int, int] | None = None


FAILS = Accuracy(None)

DE_SMITH = 'De & Smith 2020 (arXiv 2002.10444)'
FIXUP = 'Zhang, Dauphin, Ma 2019 (arXiv 1901.09321)'

# De & Smith 2020, table 1: n-2 Wide-ResNet on CIFAR-10, 200 epochs, test
# accuracy by depth. The names are those of `experiments.studies.VARIANTS`.
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

# De & Smith 2020, table 3: ResNet50-V2 on ImageNet, top-1 and top-5 in percent
# by batch size.
IMAGENET_SOURCE = f'{DE_SMITH}, table 3'
IMAGENET = {
  'Batch normalization': {
    256: (75.0, 92.2),
    1024: (74.9, 92.1),
    4096: (74.9, 91.9),
  },
  'Fixup': {256: (74.8, 91.8), 1024: (74.6, 91.7), 4096: (73.0, 90.6)},
  'SkipInit + Biases': {
    256: (74.9, 91.9),
    1024: (74.6, 91.8),
    4096: (70.8, 89.2),
  },
  'Fixup + Dropout': {
    256: (75.8, 92.5),
    1024: (75.6, 92.5),
    4096: (74.8, 91.8),
  },
  'Regularized SkipInit': {
    256: (75.6, 92.4),
    1024: (75.5, 92.5),
    4096: (72.7, 90.7),
  },
}

"""The ways of training that are compared, one row each, and how each is drawn.

Colors are those of Okabe and Ito, which readers with any color vision tell
apart, on white and on dark gray; markers and dashes say the same again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Fields = Mapping[str, Any]

BLUE = '#0072B2'
SKY = '#56B4E9'
GREEN = '#009E73'
ORANGE = '#E69F00'
RED = '#D55E00'
PINK = '#CC79A7'
OLIVE = '#999933'
PURPLE = '#AA4499'


class Variant(NamedTuple):
  """A way of training, and how figures and tables show it.

  Attributes:
    fields: of a recipe, by dotted name: a value, or a function of the fields
      set before it.
    label: its name in figures and tables.
    color, marker, dashes: as matplotlib takes them.
  """

  fields: Fields
  label: str
  color: str
  marker: str
  dashes: str


# Neither has bias vectors in its convolutions: Fixup's biases are scalars.
_FIXUP = {'model.method': 'fixup', 'model.biases': False}
_WITHOUT_PARTS = _FIXUP | {
  'model.zero_last': False,
  'model.rescale': False,
  'model.scalar_biases': False,
  'model.alpha': 'none',
}
_SKIPINIT = {'model.method': 'skipinit'}
_BATCHNORM = {'model.method': 'batchnorm', 'model.biases': False}
# The rows of the ImageNet table say all that tells them apart.
_DROPOUT = {'model.dropout': 0.25}
_PLAIN_BATCHNORM = _BATCHNORM | {'model.dropout': 0.0}
_PLAIN_FIXUP = _FIXUP | {
  'model.dropout': 0.0,
  # One rate for all parameters, as in DeepMind's code; its authors have two.
  'optimizer.reduced_rate': False,
}
_BIASED_SKIPINIT = _SKIPINIT | {'model.biases': True, 'model.dropout': 0.0}

# Brock et al. 2021: 0.01 at 4096 images, more for smaller batches.
CLIPPED: Fields = {
  'optimizer.adaptive_clip': lambda f: 0.01 * 4096 / f['batch_size']
}

VARIANTS: dict[str, Variant] = {
  'batchnorm': Variant(_BATCHNORM, 'BatchNorm', ORANGE, 's', '--'),
  'batchnorm_whole': Variant(
    _BATCHNORM | {'model.statistics_group': 'all'},
    'BatchNorm, whole batch',
    OLIVE,
    '>',
    '--',
  ),
  'fixup': Variant(_FIXUP, 'Fixup', GREEN, 'D', '-.'),
  'skipinit_sqrt': Variant(
    _SKIPINIT | {'model.alpha': '1/sqrt(d)'}, 'SkipInit 1/√d', SKY, '^', '-'
  ),
  'skipinit': Variant(_SKIPINIT, 'SkipInit 0', BLUE, 'o', '-'),
  'skipinit_1': Variant(
    _SKIPINIT | {'model.alpha': '1'}, 'SkipInit 1', PINK, 'v', '--'
  ),
  'none': Variant({'model.method': 'none'}, 'Neither', RED, 'X', ':'),
  'divide_sqrt2': Variant(
    {'model.method': 'divide_sqrt2'}, 'Divided by √2', OLIVE, '<', ':'
  ),
  'nf': Variant({'model.method': 'nf'}, 'NF', PURPLE, '*', '-'),
  'skipinit_no_l2': Variant(
    _SKIPINIT | {'optimizer.l2': 0.0}, 'SkipInit 0, no L2', PURPLE, 'P', '-.'
  ),
  # Fixup's parts.
  'fixup_zero_last': Variant(
    _WITHOUT_PARTS | {'model.zero_last': True},
    'Zero last kernel alone',
    BLUE,
    'o',
    '--',
  ),
  'fixup_rescale': Variant(
    _WITHOUT_PARTS | {'model.rescale': True}, 'Rescaling alone', SKY, '^', '--'
  ),
  'fixup_multiplier': Variant(
    _WITHOUT_PARTS | {'model.alpha': '1'}, 'Multiplier alone', PINK, 'v', '--'
  ),
  'fixup_biases': Variant(
    _WITHOUT_PARTS | {'model.scalar_biases': True},
    'Scalar biases alone',
    ORANGE,
    's',
    '--',
  ),
  'fixup_no_part': Variant(
    _WITHOUT_PARTS, "Without Fixup's rules", RED, 'X', ':'
  ),
  # ImageNet: the rows of De & Smith 2020, table 3, and two of ours.
  'imagenet:batchnorm': Variant(
    _PLAIN_BATCHNORM, 'Batch normalization', ORANGE, 's', '--'
  ),
  'imagenet:fixup': Variant(_PLAIN_FIXUP, 'Fixup', GREEN, '>', ':'),
  'imagenet:skipinit': Variant(
    _BIASED_SKIPINIT, 'SkipInit + Biases', SKY, '^', ':'
  ),
  'imagenet:fixup_dropout': Variant(
    _PLAIN_FIXUP | _DROPOUT, 'Fixup + Dropout', GREEN, 'D', '-.'
  ),
  'imagenet:regularized_skipinit': Variant(
    _BIASED_SKIPINIT | _DROPOUT, 'Regularized SkipInit', BLUE, 'P', '--'
  ),
  'imagenet:batchnorm_dropout': Variant(
    _PLAIN_BATCHNORM | _DROPOUT,
    'Batch normalization + Dropout',
    OLIVE,
    '<',
    '--',
  ),
  'clipped': Variant(
    _BIASED_SKIPINIT | _DROPOUT | CLIPPED,
    'Regularized SkipInit + adaptive clipping (ours)',
    PINK,
    'v',
    '-',
  ),
}

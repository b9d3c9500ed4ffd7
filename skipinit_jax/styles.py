"""How each method is drawn: the same in every figure of the project.

Colours are those of Okabe and Ito, which readers with any colour vision tell
apart, on white and on dark gray; markers and dashes say the same again.
"""

from typing import NamedTuple


class Style(NamedTuple):
  """Of a line: its colour, marker and dashes, as matplotlib takes them."""

  color: str
  marker: str
  dashes: str


STYLES = {
  'skipinit': Style('#0072B2', 'o', '-'),
  'skipinit_sqrt': Style('#56B4E9', '^', '-'),
  'skipinit_1': Style('#CC79A7', 'v', '--'),
  'skipinit_no_l2': Style('#AA4499', 'P', '-.'),
  'batchnorm': Style('#E69F00', 's', '--'),
  'fixup': Style('#009E73', 'D', '-.'),
  'divide_sqrt2': Style('#999933', '<', ':'),
  'none': Style('#D55E00', 'X', ':'),
  # Fixup's parts.
  'fixup_zero_last': Style('#0072B2', 'o', '--'),
  'fixup_rescale': Style('#56B4E9', '^', '--'),
  'fixup_multiplier': Style('#CC79A7', 'v', '--'),
  'fixup_biases': Style('#E69F00', 's', '--'),
  'fixup_no_part': Style('#D55E00', 'X', ':'),
  # The rows of the ImageNet table.
  'imagenet:batchnorm': Style('#E69F00', 's', '--'),
  'imagenet:batchnorm_dropout': Style('#999933', '<', '--'),
  'imagenet:fixup': Style('#009E73', 'D', ':'),
  'imagenet:fixup_dropout': Style('#009E73', 'D', '-.'),
  'imagenet:skipinit': Style('#56B4E9', '^', ':'),
  'imagenet:regularized_skipinit': Style('#0072B2', 'o', '-'),
  'clipped': Style('#CC79A7', 'v', '-'),
}

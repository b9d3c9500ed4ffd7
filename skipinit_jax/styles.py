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

LABELS = {
  'batchnorm': 'BatchNorm',
  'fixup': 'Fixup',
  'skipinit_sqrt': 'SkipInit 1/√d',
  'skipinit': 'SkipInit 0',
  'skipinit_1': 'SkipInit 1',
  'none': 'Neither',
  'divide_sqrt2': 'Divided by √2',
  'skipinit_no_l2': 'SkipInit 0, no L2',
  'fixup_zero_last': 'Zero last kernel alone',
  'fixup_rescale': 'Rescaling alone',
  'fixup_multiplier': 'Multiplier alone',
  'fixup_biases': 'Scalar biases alone',
  'fixup_no_part': "None of Fixup's",
  'imagenet:batchnorm': 'Batch normalization',
  'imagenet:batchnorm_dropout': 'Batch normalization + Dropout',
  'imagenet:fixup': 'Fixup',
  'imagenet:fixup_dropout': 'Fixup + Dropout',
  'imagenet:skipinit': 'SkipInit + Biases',
  'imagenet:regularized_skipinit': 'Regularized SkipInit',
  'clipped': 'Regularized SkipInit + adaptive clipping (ours)',
}
INK = '#010203'  # Text and axes; in SVG, the colour of the page's text.
# Of matplotlib, for all figures.
RC = {
  **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor'), INK),
  **dict.fromkeys(('xtick.color', 'ytick.color'), INK),
  'axes.spines.top': False,
  'axes.spines.right': False,
  'font.size': 10,
  'lines.linewidth': 1.8,
  'lines.markersize': 6,
  'legend.frameon': False,
  'legend.fontsize': 9.5,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'skipinit-jax',
  'text.parse_math': False,  # A $ in a label is a dollar.
}
# An SVG file of its own has no page to take a colour from.
ALONE = (
  '<style>:root{color:#1b1b1b}text{fill:currentColor}'
  '@media (prefers-color-scheme: dark){:root{color:#e8e8e8}}</style>'
)

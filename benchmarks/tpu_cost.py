"""The cost of a ResNet-50 training step on a TPU chip, network by network.

  python -m benchmarks.tpu_cost --out=docs/tpu_cost

Compiles one step per network for v5e:2x2 with the TPU compiler (`pip install
libtpu`; no chip is needed, a minute or two each), 128 images of 224x224 a chip,
bfloat16, float32 parameters, SGD with Nesterov momentum. Writes OUT.json and
prints a table: the cost of each relative to the network of Flax's ImageNet
example, in the compiler's bytes accessed, bytes to and from HBM (see
`skipinit_jax.ahead_of_time.counts`) and activations.
"""

from pathlib import Path
from typing import Any

import jax

from benchmarks import costs
from skipinit_jax import cli
from skipinit_jax.ahead_of_time.chips import platform_of, topology
from skipinit_jax.errors import InputError

BATCH = 128
ROWS = [
  'example',
  'batchnorm',
  'activation',
  'skipinit',
  'micro2',
  'micro4',
  'micro8',
]


def table(report: dict[str, Any]) -> str:
  """Markdown of what was written."""
  return costs.table(report, costs.FIELDS, 'images/s a chip, at most')


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--rows', nargs='+', default=ROWS, choices=ROWS)
  parser.add_argument('--out', type=cli.file, default=Path('tpu_cost'))
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with cli.errors_in_one_line():
    if platform_of(args.topology) == 'gpu':
      raise InputError(
        f'--topology {args.topology!r} is for benchmarks.gpu_cost; expected a '
        'TPU slice, such as v5e:2x2'
      )
    where = topology(args.topology)
  report = costs.compile_networks(args.rows, where, BATCH, args.out)
  print(table(report))


if __name__ == '__main__':
  main()

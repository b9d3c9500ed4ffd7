"""Ships a network: export it, and run what was exported.

  python -m examples.export [RUN]

The 16-layer SkipInit network of digits that comes with the package, or the run
of the recipe `digits` that is named. `export` folds its scalars into the
kernels and writes one file that holds the whole classifier, from uint8 pixels
to logits, for CPUs, GPUs and TPUs. The last part then needs `jax` (and
`flatbuffers`) alone: no Flax, no model code, no weights beside the file. It
takes a few seconds.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax.export
import numpy as np

from skipinit_jax.cli import errors_in_one_line
from skipinit_jax.data import open_dataset
from skipinit_jax.export import export
from skipinit_jax.training.recipes import load_recipe


def main(run: str = 'digits-wrn16-skipinit') -> None:
  """Exports to a temporary folder, and classifies the test images."""
  test = open_dataset(load_recipe('digits').data)
  with tempfile.TemporaryDirectory() as folder:
    described = export(run, folder)
    print('folded away:', ', '.join(described['folded']['leaves']))
    print('differences:', described['largest_relative_errors'])
    classify(Path(folder), test.eval_images, test.eval_labels)


def classify(exported: Path, images: np.ndarray, labels: np.ndarray) -> None:
  """Classifies images with the two exported files, as a deployment would.

  Args:
    exported: the folder of an export.
    images: uint8 (n, height, width, channels), for any n.
    labels: integers (n,), to measure the accuracy.
  """
  program = jax.export.deserialize(
    bytearray((exported / 'model.stablehlo').read_bytes())
  )
  described = json.loads((exported / 'model.json').read_text())
  assert list(images.shape[1:]) == described['input']['shape'][1:]

  logits = np.asarray(program.call(images[:1]))  # One image.
  for row in images[0, :, :, 0]:
    print(''.join(2 * ' .:*#'[pixel // 4] for pixel in row))
  print(f'is a {labels[0]}, classified as a {logits[0].argmax()}')

  logits = np.asarray(program.call(images))  # All of them.
  right = np.mean(logits.argmax(-1) == labels)
  print(f'{100 * right:.1f} % of {len(images)} images are classified correctly')


if __name__ == '__main__':
  with errors_in_one_line():
    main(*sys.argv[1:])

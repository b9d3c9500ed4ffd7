"""Trains the networks that come with the package, and writes their cards.

  python -m benchmarks.pretrained runs/pretrained

Each is trained in a folder of its own, which resumes, then packed, and the page
docs/pretrained.md gets its table. The extra `mnist` is needed. Rates are those
that the study of depth chose on the digits at this depth; for nf, which it has
not, that of SkipInit.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from skipinit_jax import cli, markdown, pretrained
from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError
from skipinit_jax.export import export
from skipinit_jax.files import write_json
from skipinit_jax.training import train
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.variants import VARIANTS
from skipinit_jax.weights import load_weights

PAGE = Path(__file__).parents[1] / 'docs' / 'pretrained.md'
HEAD = '## Model card\n\n'  # The table follows.
LARGEST = 300_000  # Bytes of a file.
DEPTH = 16
RATES = {'skipinit': 2.0**-4, 'batchnorm': 2.0**-3, 'nf': 2.0**-4}
DATA = ('digits', 'mnist5k')
NAMES = {
  f'{data}-wrn{DEPTH}-{method}': (data, method)
  for data in DATA
  for method in RATES
}


def make(name: str, folder: Path) -> dict[str, Any]:
  """Trains a network, writes its file, and returns its card."""
  recipe, method = NAMES[name]
  fields = {
    **VARIANTS[method].fields,
    'model.depth': DEPTH,
    'model.scan': False,
    'optimizer.learning_rate': RATES[method],
  }
  config = set_fields(load_recipe(recipe), fields)
  result = train(config, folder / name)
  images = open_dataset(config.data).eval_images
  with tempfile.TemporaryDirectory() as temporary:
    described = export(folder / name, temporary, ['cpu'], folded=False)
    packed = pretrained.pack(
      load_weights(Path(temporary) / 'weights.safetensors')
    )
  if len(packed) > LARGEST:
    raise InputError(f'{name}: {len(packed)} bytes, more than {LARGEST}')
  pretrained.FOLDER.mkdir(exist_ok=True)
  (pretrained.FOLDER / f'{name}.npz').write_bytes(packed)
  return {
    'sha256': hashlib.sha256(packed).hexdigest(),
    'bytes': len(packed),
    'recipe': recipe,
    'fields': fields,
    'network': described['network'],
    'input': described['input'],
    'pixels': [int(images.min()), int(images.max())],
    'normalization': {
      key: described['normalization'][key] for key in ('mean', 'std')
    },
    'parameters': result['parameters'],
    'run': {
      'top1': result['eval']['top1'],
      'images': result['eval_size'],
      'steps': result['steps'],
    },
    'versions': described['versions'],
  }


def accuracy(name: str) -> float:
  """Top-1 of a network as the package loads it, on its test images."""
  network = pretrained.load_pretrained(name)
  data = open_dataset(load_recipe(network.card['recipe']).data)
  logits = np.asarray(network(data.eval_images))
  return float(np.mean(logits.argmax(-1) == data.eval_labels))


def table() -> str:
  """Of the page, from the cards."""
  rows = [
    [
      f'`{name}`',
      f'{card["parameters"]:,}',
      f'{card["bytes"] / 1000:.0f} KB',
      f'{100 * card["top1"]:.2f} %',
      f'{100 * card["run"]["top1"]:.2f} %',
      f'{card["run"]["images"]:,}',
    ]
    for name, card in pretrained.cards().items()
  ]
  head = ['name', 'parameters', 'file', 'top-1', 'of the run', 'test images']
  return markdown.table([head, *rows])


def main(folder: Path) -> None:
  """Makes all files, and the table from them."""
  path = pretrained.FOLDER / pretrained.CARDS
  made = {name: make(name, folder) for name in NAMES}
  write_json(path, made)
  pretrained.cards.cache_clear()
  write_json(path, {n: c | {'top1': accuracy(n)} for n, c in made.items()})
  pretrained.cards.cache_clear()
  text, after = PAGE.read_text().split(HEAD)
  _, rest = after.split('\n\n', 1)
  PAGE.write_text(f'{text}{HEAD}{table()}\n{rest}')


if __name__ == '__main__':
  cli.interrupt_as_usual()
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=cli.folder, help='of the runs')
  args = parser.parse_args()
  with cli.errors_in_one_line():
    main(args.folder)

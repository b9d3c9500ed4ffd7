"""A trained network as files that run without this package.

python -m skipinit_jax.export --checkpoint=RUN --out=DIR --platforms=cpu,cuda

writes to DIR, from the newest checkpoint or from RUN/checkpoints/STEP; or, with
the name of a trained network for RUN, from that:

  model.stablehlo      uint8 images in, float32 logits out, weights inside
  weights.safetensors  the weights alone
  model.json           a description of both

The program normalizes the images itself and takes any batch size. To run it:

  exported = jax.export.deserialize(bytearray(open(file, 'rb').read()))
  logits = exported.call(images)
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.export
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from flax.traverse_util import flatten_dict

from skipinit_jax import cli
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.errors import InputError, RunError, unknown
from skipinit_jax.files import dumps, write_json
from skipinit_jax.models.fold import fold
from skipinit_jax.models.methods import resolve_method
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stages import stack_blocks, unstack_blocks
from skipinit_jax.pretrained import network_of
from skipinit_jax.training.saved import Saved, load_run
from skipinit_jax.version import __version__
from skipinit_jax.weights import SEPARATOR, load_weights, save_weights

PROGRAM, WEIGHTS = 'model.stablehlo', 'weights.safetensors'
DESCRIPTION = 'model.json'
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
DEFAULT_PLATFORMS = ('cpu', 'cuda', 'tpu')
# The fields of `ResNet` that its function depends on; others are for training.
FIELDS = (
  'stage_sizes',
  'bottleneck',
  'num_classes',
  'biases',
  'features',
  'stem_features',
  'small_images',
  'activation',
  'skip',
  'scan',
  'symmetric_padding',
  'stem_bias',
)
# Batches of random images for the comparison of files with the run, and the
# largest difference of a logit as a share of the largest: other devices than
# CPUs multiply float32 in TF32 or bfloat16.
BATCHES = (1, 3)
TOLERANCE, TOLERANCE_ELSEWHERE = 1e-3, 5e-2

# A model and its variables, {'params': ..., 'batch_stats': ...}.
Network = tuple[ResNet, dict[str, Any]]


def export(
  checkpoint: os.PathLike | str,
  out: os.PathLike | str,
  platforms: Sequence[str] = DEFAULT_PLATFORMS,
  folded: bool = True,
) -> dict[str, Any]:
  """Writes a run's network to a folder, and checks what was written.

  Averages of the parameters are exported if the run kept them. Everything is
  float32, whatever the run's dtype. The program and the weights are read again
  and compared with the run's network on random images at two batch sizes;
  `model.json` is written last.

  Args:
    checkpoint: the folder of a run, or one of its `checkpoints/STEP`; or a name
      that `load_pretrained` knows.
    out: the folder to write to.
    platforms: of PLATFORMS, for the program; this machine's must be one, to
      check the program.
    folded: without scalars, see `models.fold`.

  Returns:
    The content of model.json.

  Raises:
    InputError: no such checkpoint, an unknown platform, a network that can't be
      folded, or a folder that can't be written.
    RunError: the checkpoint is damaged, or a file computes other logits.
  """
  platforms = _checked(platforms)
  out, saved = Path(out), load_run(checkpoint)
  variables = saved.averages or saved.variables
  before = after = saved.model.clone(dtype='float32'), variables
  if folded:
    model, params = fold(before[0], variables['params'])
    after = model, variables | {'params': params}
  pixels, shape = saved.data.augmentation, saved.data.image_shape
  described = json.loads(dumps(_describe(saved, before, after, platforms)))
  program = _lower(logits_of(*after, pixels), shape, platforms)
  try:
    out.mkdir(parents=True, exist_ok=True)
    (out / DESCRIPTION).unlink(missing_ok=True)
    (out / PROGRAM).write_bytes(program.serialize())
  except OSError as error:
    raise InputError(f'can not write to {out}: {error.strerror}') from None
  # Scanned or not, under the names of the unrolled network.
  save_weights(out / WEIGHTS, unstack_blocks(after[1]))
  original = logits_of(*before, pixels)
  described['largest_relative_errors'] = _compare(original, out, described)
  write_json(out / DESCRIPTION, described)
  return described


def logits_of(
  model: ResNet, variables: Mapping[str, Any], pixels: Augmentation
) -> Callable[[jax.Array], Any]:
  """From uint8 images (batch, height, width, channels) to float32 logits."""
  return lambda images: model.apply(
    variables, pixels.normalize(images), train=False
  )


def _lower(
  call: Callable[[jax.Array], jax.Array],
  image_shape: tuple[int, int, int],
  platforms: Sequence[str],
) -> jax.export.Exported:
  """The program of `call` for these platforms and any batch size."""
  shape = jax.export.symbolic_shape(f'b, {", ".join(map(str, image_shape))}')
  return jax.export.export(jax.jit(call), platforms=platforms)(
    jax.ShapeDtypeStruct(shape, np.uint8)
  )


def load(out: os.PathLike | str) -> Network:
  """The network that an export describes, and its weights.

  Args:
    out: the folder of an export.

  Returns:
    The model and {'params': ..., 'batch_stats': ...}, for
    `model.apply(variables, images, train=False)` with normalized images.

  Raises:
    InputError: no export, or weights that are not of this network.
  """
  try:
    described = json.loads((Path(out) / DESCRIPTION).read_text())
  except (OSError, ValueError):
    raise InputError(f'{out} holds no export: no {DESCRIPTION}') from None
  return _load(Path(out), described)


def _load(out: Path, described: Mapping[str, Any]) -> Network:
  """The network of a description, with the weights of an export."""
  model = network_of(described['network']).clone(dtype='float32')
  shape = (1, *described['input']['shape'][1:])
  like = jax.eval_shape(
    lambda: model.clone(scan=False).init(
      jax.random.key(0), jnp.zeros(shape), train=False
    )
  )
  variables = load_weights(out / WEIGHTS, like)
  return model, stack_blocks(variables) if model.scan else variables


def _checked(platforms: Sequence[str]) -> list[str]:
  """Each platform once; InputError for one that is not known."""
  for platform in platforms:
    if platform == 'gpu':
      raise InputError("platform 'gpu': expected 'cuda' or 'rocm'")
    if platform not in PLATFORMS:
      raise InputError(unknown('platform', platform, PLATFORMS))
  here = jax.export.default_export_platform()
  if here not in platforms:
    raise InputError(
      f'platforms={",".join(platforms)}: without {here}, which this machine '
      'has, the program could not be checked; expected '
      f'{",".join([here, *platforms])}'
    )
  return list(dict.fromkeys(platforms))


def _describe(
  saved: Saved, before: Network, after: Network, platforms: Sequence[str]
) -> dict[str, Any]:
  """The content of model.json without the errors."""
  methods = [resolve_method(m.method, m.alpha) for m, _ in (before, after)]
  names = [
    flatten_dict(unstack_blocks(v), sep=SEPARATOR).keys()
    for _, v in (before, after)
  ]
  model, config, data = after[0], saved.config.model, saved.data
  return {
    'architecture': config.name,
    'depth': config.depth,
    'width': config.width,
    'method': config.method,
    'classes': data.num_classes,
    'data': data.name,
    'step': saved.step,
    'parameters': 'moving averages' if saved.averages else 'of the last step',
    'input': {'shape': ['b', *data.image_shape], 'dtype': 'uint8'},
    'output': {'shape': ['b', data.num_classes], 'dtype': 'float32'},
    # The program contains it, the weights do not: (images - mean) / std.
    'normalization': {
      'inside_the_program': True,
      'mean': np.asarray(data.augmentation.mean, np.float64).tolist(),
      'std': np.asarray(data.augmentation.std, np.float64).tolist(),
    },
    'folded': {
      'leaves': sorted(names[0] - names[1]),
      'gain': methods[0].gain / methods[1].gain,
    },
    # Fields of `skipinit_jax.ResNet`, as `load` makes it.
    'network': {name: getattr(model, name) for name in FIELDS}
    | {'method': dataclasses.asdict(methods[1])},
    'platforms': list(platforms),
    'checked_on': jax.export.default_export_platform(),
    'versions': {
      'skipinit_jax': __version__,
      'jax': jax.__version__,
      'jaxlib': jaxlib.version.__version__,
      'flax': flax.__version__,
    },
  }


def _compare(
  original: Callable[[jax.Array], jax.Array],
  out: Path,
  described: Mapping[str, Any],
) -> dict[str, float]:
  """The largest relative error of each file, read again.

  Raises:
    RunError: one is too large.
  """
  program = jax.export.deserialize(bytearray((out / PROGRAM).read_bytes()))
  mean, std = (
    np.asarray(described['normalization'][name]) for name in ('mean', 'std')
  )
  pixels = Augmentation(described['classes'], mean, std)
  weights = logits_of(*_load(out, described), pixels)
  errors = {PROGRAM: 0.0, WEIGHTS: 0.0}
  rng = np.random.default_rng(0)
  for size in BATCHES:
    shape = (size, *described['input']['shape'][1:])
    images = rng.integers(0, 256, shape, np.uint8)
    expected = np.asarray(jax.jit(original)(images))
    for name, call in ((PROGRAM, program.call), (WEIGHTS, jax.jit(weights))):
      error = _relative_error(np.asarray(call(images)), expected)
      errors[name] = max(errors[name], error)
  on_cpu = described['checked_on'] == 'cpu'
  limit = TOLERANCE if on_cpu else TOLERANCE_ELSEWHERE
  for name, error in errors.items():
    if not error <= limit:
      raise RunError(
        f'{out / name} computes other logits than the run: the largest '
        f'relative error is {error:.1e}, expected at most {limit:g}'
      )
  return errors


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
  """The largest difference, as a share of the largest value expected."""
  assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
  largest = np.abs(expected).max()
  return float(np.abs(found - expected).max() / (largest or 1))


def main() -> None:
  """Exports a run; ends with one line if the input is bad."""
  cli.interrupt_as_usual()
  parser = cli.Parser(
    prog='python -m skipinit_jax.export',
    description='Writes a trained network as StableHLO and as safetensors.',
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    help='a run, RUN/checkpoints/STEP, or the name of a trained network',
  )
  parser.add_argument(
    '--out', type=cli.folder, required=True, help='the folder to write to'
  )
  parser.add_argument(
    '--platforms',
    default=','.join(DEFAULT_PLATFORMS),
    help=f'of {", ".join(PLATFORMS)} (default: %(default)s)',
  )
  parser.add_argument(
    '--unfolded', action='store_true', help='keep the scalars as they are'
  )
  args = parser.parse_args()
  with cli.errors_in_one_line():
    described = export(
      args.checkpoint, args.out, args.platforms.split(','), not args.unfolded
    )
  print(_summary(described, args.out))


def _summary(described: Mapping[str, Any], out: Path) -> str:
  """The last lines that the command prints."""
  folded, platforms = described['folded'], ', '.join(described['platforms'])
  gain = '' if folded['gain'] == 1 else f' and the gain {folded["gain"]:.4g}'
  errors = '\n'.join(
    f'{out / name}: read again, largest relative error {error:.1e}'
    for name, error in described['largest_relative_errors'].items()
  )
  return (
    f'step {described["step"]:,}, parameters: {described["parameters"]}; '
    f'folded {len(folded["leaves"])} scalars{gain}\n{errors}\n'
    f'done: {out / DESCRIPTION}, for {platforms}'
  )


if __name__ == '__main__':
  main()

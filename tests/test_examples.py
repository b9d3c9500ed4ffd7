"""Every example runs; and the arithmetic of the private one."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import xla_flags

from examples import private
from skipinit_jax.models import ResNet

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in ROOT.glob('examples/*.py'))
# The others take longer; tests of NNX, of the transformer and of private steps
# run parts of theirs.
QUICK = ('export', 'linen', 'minimal')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in EXAMPLES
  ],
)
def test_examples_end_well(name):
  """As a reader starts them, in a short form where they have one."""
  text = (ROOT / 'examples' / f'{name}.py').read_text()
  short = ['--small'] if '--small' in text else []
  done = subprocess.run(
    [sys.executable, '-m', f'examples.{name}', *short],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': xla_flags(1)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()


@pytest.mark.parametrize('name', EXAMPLES)
def test_examples_import_what_exists(name):
  assert importlib.import_module(f'examples.{name}').__doc__


@pytest.mark.parametrize(
  'short', [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_notebook_shows_the_effect(short, tmp_path):
  """Its code runs; and at 100 layers only the network with neither fails."""
  notebook = json.loads((ROOT / 'examples' / 'effect.ipynb').read_text())
  cells = [c for c in notebook['cells'] if c['cell_type'] == 'code']
  code = '\n'.join(''.join(cell['source']) for cell in cells)
  if short:
    assert 'DEPTH, EPOCHS, BATCH = 100, 4' in code
    code = code.replace('EPOCHS, BATCH = 100, 4', 'EPOCHS, BATCH = 10, 1')
  script = tmp_path / 'effect.py'
  script.write_text(code)
  done = subprocess.run(
    [sys.executable, script],
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'MPLBACKEND': 'Agg',
      'XLA_FLAGS': xla_flags(1) if short else '',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  saved = [
    ''.join(output['text'])
    for cell in cells
    for output in cell['outputs']
    if output['output_type'] == 'stream'
  ]
  for text, trains in ((done.stdout, not short), (''.join(saved), True)):
    found = dict(re.findall(r'^(.*): loss .*accuracy ([\d.]+)%$', text, re.M))
    assert len(found) == 4
    for label, accuracy in found.items():
      if trains:
        assert (float(accuracy) > 90) == (not label.startswith('neither'))


# Per-example gradients.


SIZES = {
  'num_classes': 3,
  'features': 4,
  'stem_features': 4,
  'small_images': True,
}


def randomized(tree, seed=0):
  """Values that leave no gradient at zero."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 8
    value = rng.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5
    return jnp.asarray(value if leaf.ndim > 1 else 0.5 + value, leaf.dtype)

  return jax.tree.map(draw, tree)


def apart(a, b):
  """Largest difference over the largest element."""
  difference = jnp.abs(a - b).max()
  return float(difference / jnp.abs(b).max())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
  ('method', 'its_own'),
  [('skipinit', True), ('fixup', True), ('batchnorm', False)],
)
def test_an_examples_gradient_is_its_own_without_batch_statistics(
  method, its_own
):
  """What an image adds to the batch's gradient, with and without the others.

  The gradient of its loss alone, the others still in the batch, is the one that
  privacy would have to bound; `vmap` shows the network one image at a time.
  """
  model = ResNet((1, 1), method=method, **SIZES)
  images = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
  labels = jnp.asarray([0, 2, 1, 0])
  init = jax.eval_shape(
    lambda x: model.init(jax.random.key(1), x, train=False), images
  )
  variables = randomized(init)
  params = variables['params']

  def losses(params, images, labels):
    logits, _ = model.apply(
      {**variables, 'params': params},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  @jax.jit
  def each(params):
    def one(image, label):
      alone = lambda p: losses(p, image[None], label[None]).sum()  # noqa: E731
      return jax.grad(alone)(params)

    return jax.vmap(one)(images, labels)

  # d loss_i / d params within the batch, for all i.
  within = jax.jit(jax.jacrev(losses))(params, images, labels)
  gaps = jax.tree.leaves(jax.tree.map(apart, each(params), within))
  if its_own:
    assert max(gaps) < 1e-4
  else:
    assert min(gaps) > 0.1

  # A single image by itself, without vmap.
  single = jax.jit(jax.grad(lambda p: losses(p, images[:1], labels[:1]).sum()))
  gaps = jax.tree.map(lambda a, b: apart(a[0], b), each(params), single(params))
  assert max(jax.tree.leaves(gaps)) < 1e-4


def rows(seed=0, n=6):
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.standard_normal((n, 8, 8, 1)), jnp.float32)
  return images, jnp.asarray(rng.integers(0, 10, n))


def test_the_sum_is_of_clipped_gradients_of_the_rows_that_were_drawn():
  images, labels = rows(n=2 * private.MICRO_BATCH)
  drawn = np.arange(len(images)) % 3 != 0
  init = jax.eval_shape(
    lambda x: private.model.init(jax.random.key(0), x, train=False), images
  )
  params = randomized(init['params'])
  got, _ = jax.jit(private.sum_of_clipped)(params, images, labels, drawn)

  @jax.jit
  def gradient(image, label):
    return jax.grad(private.loss)(params, image[None], label[None], 1.0)

  expected, clipped = jax.tree.map(jnp.zeros_like, params), 0
  for image, label in zip(images[drawn], labels[drawn], strict=True):
    grad = gradient(image, label)
    squares = [np.square(np.float64(g)).sum() for g in jax.tree.leaves(grad)]
    norm = np.sqrt(np.sum(squares))
    clipped += norm > private.CLIP
    factor = min(1, private.CLIP / norm)
    expected = jax.tree.map(
      lambda total, g, f=factor: total + f * g, expected, grad
    )
  assert clipped > 0
  gaps = jax.tree.map(apart, got, expected)
  assert max(jax.tree.leaves(gaps)) < 1e-4


def test_the_noise_is_that_of_all_rows_given_to_optax():
  """One row, the clipped sum, makes the update of all rows at once."""
  capacity, key = private.CAPACITY, jax.random.key(1)
  rng = np.random.default_rng(2)
  each = {'a': rng.standard_normal((capacity, 50)), 'b': np.zeros(capacity)}
  each = {k: jnp.asarray(v, jnp.float32) for k, v in each.items()}
  params = jax.tree.map(lambda x: x[0], each)
  plain = optax.chain(
    optax.contrib.differentially_private_aggregate(
      private.CLIP, private.NOISE, key=key
    ),
    optax.scale(capacity / private.BATCH),
    optax.sgd(0.125, momentum=0.9),
  )
  norms = jnp.sqrt(jnp.square(each['a']).sum(1))
  assert float(norms.min()) > private.CLIP
  row = {
    'a': (each['a'] * (private.CLIP / norms)[:, None]).sum(0)[None],
    'b': jnp.zeros(1),
  }
  expected, _ = plain.update(each, plain.init(params), params)
  got, _ = private.tx.update(row, private.tx.init(params), params)
  for name in each:
    assert apart(got[name], expected[name]) < 1e-4
  # The noise is not lost in the sum, and no signal hides it.
  assert float(jnp.abs(got['b'])) > 0

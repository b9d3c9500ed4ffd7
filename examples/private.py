"""Differentially private training (Abadi et al. 2016) on the digits.

Each image's gradient is computed alone, clipped, and added to the others with
noise, a micro-batch at a time. Under batch normalization it would depend on the
rest of the batch, and clipping it would not bound what one image contributes.
Batches are Poisson samples: by dp-accounting 0.6 (privacy loss distributions,
one image added or removed) 100 steps have epsilon 5.7 at delta 1e-4, the choice
of the rate not counted. `python -m examples.private` takes half a minute on one
CPU core.
"""

import sys

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from skipinit_jax import ResNet

CLIP, NOISE = 1.0, 1.5  # Gradient norm; standard deviation of the noise / CLIP.
BATCH, CAPACITY, MICRO_BATCH = 256, 384, 32  # BATCH on average.
sizes = {'features': 8, 'stem_features': 8, 'small_images': True}
model = ResNet((1, 1, 1), num_classes=10, alpha='1/sqrt(d)', **sizes)


def loss(params, image, label, drawn):
  """The loss of one image; 0 for a row that only pads the batch."""
  logits = model.apply({'params': params}, image, train=True)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  return (drawn * losses).sum()


sum_of_clipped = optax.microbatching.micro_grad(
  loss,
  batch_argnums=(1, 2, 3),
  microbatch_size=MICRO_BATCH,
  transform_fn=lambda grad: optax.projections.projection_l2_ball(grad, CLIP),
)
tx = optax.chain(
  # The sum goes in as one row, no longer than CAPACITY * CLIP: it isn't clipped
  # again, and its noise is NOISE * CLIP. A real run's key must be secret.
  optax.contrib.differentially_private_aggregate(
    CAPACITY * CLIP, NOISE / CAPACITY, key=jax.random.key(1)
  ),
  optax.scale(1 / BATCH),
  optax.sgd(0.125, momentum=0.9),
)


@jax.jit
def train_step(params, opt_state, images, labels, drawn):
  """One private step on CAPACITY rows; `drawn` marks those that count."""
  total, _ = sum_of_clipped(params, images, labels, drawn)
  row = jax.tree.map(lambda grad: grad[None], total)
  updates, opt_state = tx.update(row, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def main(steps):
  """Trains, and prints the accuracy on the last 360 digits."""
  images, labels = load_digits(return_X_y=True)
  images, n = np.float32(images.reshape(-1, 8, 8, 1) / 8 - 1), 1437
  init = jax.jit(model.init, static_argnames='train')
  params = init(jax.random.key(0), images[:1], train=False)['params']
  opt_state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(steps):
    rows = np.flatnonzero(rng.random(n) < BATCH / n)
    assert rows.size <= CAPACITY, f'{rows.size} images drawn'
    drawn, rows = np.arange(CAPACITY) < rows.size, np.resize(rows, CAPACITY)
    batch = images[rows], labels[rows], drawn
    params, opt_state = train_step(params, opt_state, *batch)
  apply = jax.jit(model.apply, static_argnames='train')
  logits = apply({'params': params}, images[n:], train=False)
  print(f'clip {CLIP}, noise {NOISE}, sampling {BATCH}/{n}, {steps} steps')
  print(f'test accuracy {np.mean(logits.argmax(-1) == labels[n:]):.3f}')


if __name__ == '__main__':
  main(steps=3 if '--small' in sys.argv else 100)

"""Training on one image at a time, where batch normalization has no batch.

Every step trains on one digit. `python -m examples.batch_of_one` takes half a
minute on one CPU core.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from skipinit_jax import WideResNet

model = WideResNet(depth=16, width=1, num_classes=10, biases=True)


def make_step(tx, images, labels):
  """The training step on the image of index `i`; all are on the device."""

  def step(params, opt_state, i):
    def loss(params):
      logits = model.apply({'params': params}, images[i][None], train=True)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits[0], labels[i]
      )

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return jax.jit(step, donate_argnums=(0, 1))


def main(steps):
  """Trains, and prints the accuracy on the last 360 digits."""
  images, labels = load_digits(return_X_y=True)
  images = jnp.float32(images.reshape(-1, 8, 8, 1) / 8 - 1)
  n, rng = len(images) - 360, np.random.default_rng(0)

  # 2^-8 is equally good on held-out training images.
  tx = optax.sgd(optax.cosine_decay_schedule(2**-9, steps), momentum=0.9)
  init = jax.jit(model.init, static_argnames='train')
  params = init(jax.random.key(0), images[:1], train=False)['params']
  opt_state = tx.init(params)
  step = make_step(tx, images[:n], jnp.asarray(labels[:n]))
  epochs = -(-steps // n)
  order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
  for i in order[:steps]:
    params, opt_state = step(params, opt_state, i)
  apply = jax.jit(model.apply, static_argnames='train')
  logits = apply({'params': params}, images[n:], train=False)
  accuracy = np.mean(logits.argmax(-1) == labels[n:])
  print(f'test accuracy {accuracy:.3f} after {steps} steps at batch 1')


if __name__ == '__main__':
  main(steps=50 if '--small' in sys.argv else 4 * 1437)

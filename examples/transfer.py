"""A trained body under a new head, for classes it was not trained on.

A network learns the digits 0 to 4. Its body goes into a network for 5 to 9, of
which the head alone, or everything, is then trained on 25 images; beside it the
same network from scratch. `python -m examples.transfer` takes half a minute on
one CPU core.
"""

import sys

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from skipinit_jax import WideResNet
from skipinit_jax.models import load_body

model = WideResNet(depth=16, width=1, num_classes=5)


def train(params, tx, images, labels, steps, batch_size=25):
  """Returns the parameters after `steps` steps."""

  @jax.jit
  def train_step(params, opt_state, images, labels):
    def loss(params):
      logits = model.apply({'params': params}, images, train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(steps):
    rows = rng.choice(len(images), batch_size, replace=False)
    batch = images[rows], labels[rows]
    params, opt_state = train_step(params, opt_state, *batch)
  return params


def head_or_body(params):
  """Labels for `optax.partition`, one for each part of the network."""
  return {k: 'head' if k == 'classifier' else 'body' for k in params}


def main(steps):
  """Prints the accuracy on digits 5 to 9, with and without the body."""
  images, labels = load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) / 8 - 1)
  low, high = labels < 5, labels >= 5
  init = jax.jit(model.init, static_argnames='train')
  apply = jax.jit(model.apply, static_argnames='train')
  fresh = init(jax.random.key(0), images[:1], train=False)['params']
  sgd = optax.sgd(0.03, momentum=0.9)
  trained = train(fresh, sgd, images[low], labels[low], 10 * steps)

  fresh = init(jax.random.key(1), images[:1], train=False)['params']
  loaded = load_body(trained, fresh)
  parts = {'head': sgd, 'body': optax.set_to_zero()}
  head_only = optax.partition(parts, head_or_body)
  images, labels = images[high], labels[high] - 5
  for name, params, tx in (
    ('loaded, its head trained', loaded, head_only),
    ('loaded, all of it trained', loaded, sgd),
    ('from scratch', fresh, sgd),
  ):
    params = train(params, tx, images[:25], labels[:25], steps)
    logits = apply({'params': params}, images[25:], train=False)
    accuracy = np.mean(logits.argmax(-1) == labels[25:])
    print(f'{name}: test accuracy {accuracy:.3f}')


if __name__ == '__main__':
  main(steps=3 if '--small' in sys.argv else 30)

"""SkipInit in Flax Linen: a custom block and a whole network.

Both are ordinary modules without mutable state, so one training loop serves
both. `python -m examples.linen` takes half a minute on one CPU core.
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from skipinit_jax import SkipInitDense, WideResNet, decay_mask


class Block(nn.Module):
  """x + alpha * MLP(x), the identity at the start."""

  @nn.compact
  def __call__(self, x):
    """x: (batch, features)."""
    y = nn.relu(nn.Dense(2 * x.shape[-1])(x))
    return x + SkipInitDense(x.shape[-1])(y)


class Perceptron(nn.Module):
  """An MLP of 40 layers in 20 blocks."""

  @nn.compact
  def __call__(self, images, train):
    """Returns logits (batch, 10); `train` is ignored."""
    x = nn.Dense(64)(images.reshape(images.shape[0], -1))
    for _ in range(20):
      x = Block()(x)
    return nn.Dense(10)(x)


def accuracy(model, images, labels, epochs, tests=360, batch_size=32):
  """Trains on all but the last digits; returns the accuracy on those."""
  n = len(images) - tests
  decay = optax.add_decayed_weights(5e-4, decay_mask)
  rate = optax.cosine_decay_schedule(0.03, epochs * (n // batch_size))
  tx = optax.chain(decay, optax.sgd(rate, momentum=0.9))
  init = jax.jit(model.init, static_argnames='train')
  params = init(jax.random.key(0), images[:1], train=False)['params']
  opt_state, rng = tx.init(params), np.random.default_rng(0)

  @jax.jit
  def train_step(params, opt_state, images, labels):
    def loss(params):
      logits = model.apply({'params': params}, images, train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for _ in range(epochs):
    order = rng.permutation(n)[: n - n % batch_size]
    for rows in order.reshape(-1, batch_size):
      batch = images[rows], labels[rows]
      params, opt_state = train_step(params, opt_state, *batch)
  apply = jax.jit(model.apply, static_argnames='train')
  logits = apply({'params': params}, images[n:], train=False)
  return np.mean(logits.argmax(-1) == labels[n:])


if __name__ == '__main__':
  images, labels = load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) / 8 - 1)
  epochs = 1 if '--small' in sys.argv else 10
  for model in (Perceptron(), WideResNet(depth=16, width=1, num_classes=10)):
    share = accuracy(model, images, labels, epochs)
    print(f'{type(model).__name__}: test accuracy {share:.3f}')

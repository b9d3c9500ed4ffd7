"""SkipInit in Flax NNX: a custom block and a whole network.

The block ends in a native `SkipInitLinear`; the Wide-ResNet is a Linen module
behind Flax's bridge. `python -m examples.nnx` takes half a minute on one CPU
core.
"""

import sys

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from skipinit_jax import WideResNet
from skipinit_jax.models.nnx import SkipInitLinear


class Block(nnx.Module):
  """x + alpha * MLP(x), the identity at the start."""

  def __init__(self, width, rngs):
    self.dense1 = nnx.Linear(width, 2 * width, rngs=rngs)
    self.dense2 = SkipInitLinear(2 * width, width, rngs=rngs)

  def __call__(self, x):
    """x: (batch, width)."""
    return x + self.dense2(nnx.relu(self.dense1(x)))


class Perceptron(nnx.Module):
  """An MLP of 40 layers in 20 blocks."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(64, 64, rngs=rngs)
    self.blocks = nnx.List([Block(64, rngs) for _ in range(20)])
    self.classifier = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, images, train):
    """Returns logits (batch, 10); `train` is ignored."""
    x = self.stem(images.reshape(images.shape[0], -1))
    for block in self.blocks:
      x = block(x)
    return self.classifier(x)


@nnx.jit
def train_step(model, optimizer, images, labels):
  """Changes the model and the optimizer in place."""

  def loss(model):
    logits = model(images, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()

  optimizer.update(model, nnx.grad(loss)(model))


def accuracy(model, images, labels, epochs, tests=360, batch_size=32):
  """Trains on all but the last digits; returns the accuracy on those."""
  n, rng = len(images) - tests, np.random.default_rng(0)
  rate = optax.cosine_decay_schedule(0.03, epochs * (n // batch_size))
  optimizer = nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)
  for _ in range(epochs):
    order = rng.permutation(n)[: n - n % batch_size]
    for rows in order.reshape(-1, batch_size):
      train_step(model, optimizer, images[rows], labels[rows])
  logits = nnx.jit(lambda model: model(images[n:], train=False))(model)
  return np.mean(logits.argmax(-1) == labels[n:])


if __name__ == '__main__':
  images, labels = load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) / 8 - 1)
  resnet = nnx.bridge.ToNNX(WideResNet(16, 1), rngs=nnx.Rngs(0))
  resnet.lazy_init(images[:1], train=False)
  epochs = 1 if '--small' in sys.argv else 10
  models = {'Perceptron': Perceptron(nnx.Rngs(0)), 'Wide-ResNet': resnet}
  for name, model in models.items():
    share = accuracy(model, images, labels, epochs)
    print(f'{name}: test accuracy {share:.3f}')

"""Small inputs, random parameters and flat views of trees, for all tests."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from skipinit_jax.models import DenseResNet, ResNet


def normal(shape, seed=0, dtype='float32'):
  """Standard normal values."""
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, dtype)


def shapes_of(model, shape):
  """The shapes of a network's variables, for float32 inputs of this shape."""
  init = functools.partial(model.init, train=False)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(init, jax.random.key(0), x)


def randomize(model, shape, seed=0):
  """Non-zero values for every variable, of a size that keeps activations."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    value = rng.standard_normal(leaf.shape)
    if name == 'kernel':
      value *= (2 / np.prod(leaf.shape[:-1])) ** 0.5
    elif name in ('scale', 'var', 'alpha'):
      value = 0.7 + 0.2 * np.abs(value)
    else:
      value *= 0.3
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, shape))


def flatten(tree):
  """'a/b/c' -> leaf."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in flat
  }


def small_resnet(stage_sizes, method, **fields):
  """A network for 5 classes; each stage but the first begins by projecting."""
  return ResNet(
    stage_sizes,
    num_classes=5,
    features=4,
    stem_features=4,
    method=method,
    small_images=True,
    classifier_init=nn.initializers.he_normal(),
    **fields,
  )


def batch(shape, seed=0):
  """Images of this shape, with labels from 0 to 4."""
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return images, jnp.asarray(rng.integers(0, 5, shape[0]))


def curved_loss(method):
  """A loss, its parameters, and the whole of its Hessian."""
  model = DenseResNet(2, 4, 3, method)
  x, labels = np.random.default_rng(0).standard_normal((2, 12, 3))
  x = jnp.asarray(x, jnp.float32)
  params = model.init(jax.random.key(1), x, train=False)['params']

  def loss(params):
    out, _ = model.apply(
      {'params': params}, x, train=True, mutable=['batch_stats']
    )
    return -(jax.nn.log_softmax(out) * jax.nn.softmax(labels)).sum(-1).mean()

  flat, unravel = ravel_pytree(params)
  hessian = jax.hessian(lambda flat: loss(unravel(flat)))(flat)
  return loss, params, np.asarray(hessian, np.float64)

"""A typed training step that needs nothing but jax, flax and optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from skipinit_jax import WideResNet, decay_mask

Params = Any
Batch = tuple[jax.Array, jax.Array]
model = WideResNet(depth=10, width=1, num_classes=10)
tx = optax.chain(
  optax.add_decayed_weights(5e-4, decay_mask), optax.sgd(0.1, momentum=0.9)
)


def loss(params: Params, batch: Batch) -> jax.Array:
  """The mean over a batch of images and labels."""
  logits = model.apply({'params': params}, batch[0], train=True)
  assert isinstance(logits, jax.Array)  # Flax may return a tuple.
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
  return losses.mean()


@jax.jit
def train_step(
  params: Params, state: optax.OptState, batch: Batch
) -> tuple[Params, optax.OptState, jax.Array]:
  """New parameters, the new state of the optimizer, and the loss."""
  value, grads = jax.value_and_grad(loss)(params, batch)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state, value


images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
params = jax.jit(model.init, static_argnames='train')(
  jax.random.key(1), images, train=False
)['params']
state, losses = tx.init(params), list[jax.Array]()
for _ in range(5):
  params, state, value = train_step(params, state, (images, jnp.arange(8)))
  losses.append(value)
print('losses:', ', '.join(f'{value:.3f}' for value in losses))

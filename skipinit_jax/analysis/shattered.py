"""Shattered gradients (Balduzzi et al. 2017, section 2 and figure 2).

In a deep feed-forward network the gradient with respect to the input varies
from one input to the next like white noise; skip paths keep it correlated.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes

from skipinit_jax import plotting
from skipinit_jax.errors import InputError, unknown
from skipinit_jax.models.activations import crelu
from skipinit_jax.models.dense import DenseResNet
from skipinit_jax.models.looks_linear import mirrored
from skipinit_jax.models.methods import Method
from skipinit_jax.models.normalization import BatchNorm

DEPTHS = (2, 4, 10, 24, 50)  # Of the paper.
LAGS = 15


class LooksLinear(nn.Module):
  """A feed-forward network of concatenated ReLUs, linear at the start.

  Mirrored kernels of variance 1 / fan-in, which keeps the second moment.

  Attributes:
    depth: layers of activations.
    width: features of each, before their ReLUs are concatenated.
  """

  depth: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps x: (batch, inputs) to (batch, 1)."""
    del train
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    first = functools.partial(nn.Dense, use_bias=False, kernel_init=init)
    dense = functools.partial(first, kernel_init=mirrored(init))
    layers = nn.scan(
      lambda layer, x, _: (layer(crelu(x)), None),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.depth - 1,
    )
    x, _ = layers(dense(self.width), first(self.width)(x), None)
    return dense(1)(crelu(x))


def _dense(method: str | Method, **fields) -> Callable[[int, int], nn.Module]:
  """Blocks of one layer, after a stem that makes the first layer."""
  return lambda depth, width: DenseResNet(
    depth - 1,
    width,
    num_classes=1,
    method=method,
    branch_layers=1,
    scan=True,
    **fields,
  )


# Called with the depth in layers of activations, and the width.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
  'feedforward_bn': _dense('batchnorm', skip=False),
  'batchnorm_1': _dense(Method(normalize=True, alpha=1.0)),
  'batchnorm_0.1': _dense(Method(normalize=True, alpha=0.1)),
  'feedforward': _dense('none', skip=False),
  'residual': _dense('none'),
  'skipinit': _dense('skipinit'),
  'skipinit_sqrt': _dense('skipinit', alpha='1/sqrt(d)'),
  'looks_linear': LooksLinear,
}
TITLES = {
  'feedforward_bn': 'feed-forward, BatchNorm',
  'batchnorm_1': 'skips, BatchNorm, β = 1',
  'batchnorm_0.1': 'skips, BatchNorm, β = 0.1',
  'feedforward': 'feed-forward alone',
  'residual': 'skips alone',
  'skipinit': 'SkipInit 0',
  'skipinit_sqrt': 'SkipInit 1/√d',
  'looks_linear': 'looks-linear, no skips',
}
# Figure 2 of the paper at lag 15, read off by eye, for DEPTHS. Whether its
# plain networks were normalized is not known; these become white noise as they.
PUBLISHED = {
  'feedforward_bn': (0.93, 0.2, 0.0, 0.0, 0.0),
  'batchnorm_1': (0.93, 0.35, 0.0, 0.0, 0.0),
  'batchnorm_0.1': (0.93, 0.5, 0.4, 0.3, 0.23),
}


def input_gradients(
  model: nn.Module, keys: jax.Array, points: int = 256
) -> jax.Array:
  """Gradients of random networks over a grid of scalar inputs in [-2, 2].

  The input of the network is (x, 1): the 1 gives the first layer biases as
  random as its weights; without them a network of ReLUs bends only at 0. (The
  paper does not describe its biases.) Batch statistics are those of the grid,
  held constant: the gradient is that of an output with respect to its input.

  Args:
    model: maps (points, 2) to (points, 1), called as model(x, train=True).
    keys: (runs,) PRNG keys, one for each network.
    points: of the grid.

  Returns:
    float32 (runs, points).
  """
  grid = jnp.linspace(-2.0, 2.0, points)

  def hold(call, args, kwargs, context):
    out = call(*args, **kwargs)
    module, name = context.module, context.method_name
    held = isinstance(module, BatchNorm) and name == '_statistics'
    return jax.lax.stop_gradient(out) if held else out

  def run(key):
    def f(x):
      x = jnp.stack([x, jnp.ones_like(x)], axis=-1)
      with nn.intercept_methods(hold):
        y, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
      return y[:, 0]

    variables = model.init(key, jnp.ones((1, 2)), train=False)
    # Each output depends on one input alone, so one tangent gives all.
    return jax.jvp(f, (grid,), (jnp.ones_like(grid),))[1]

  return jax.jit(jax.vmap(run))(keys)


def autocorrelation(series: np.ndarray, lags: int = LAGS) -> np.ndarray:
  """Autocorrelation along the last axis, about zero.

  r_k = mean_i v_i v_{i+k} / mean_i v_i^2. Gradients of random networks have
  mean zero over the draw of the weights, so no mean is subtracted: a constant
  series has an autocorrelation of 1. The paper does not give its estimator;
  brown noise then agrees with its figure, 0.85 at lag 15, and has 0.67 about
  the mean.

  Args:
    series: (..., n), at least lags + 1 of them.
    lags: the largest lag.

  Returns:
    float64 (..., lags + 1), of lags 0 ... lags; NaN for a series of zeros.

  Raises:
    InputError: a series too short.

  >>> autocorrelation(np.array([3.0, 3.0, 3.0]), lags=2)
  array([1., 1., 1.])
  """
  series = np.asarray(series, np.float64)
  n = series.shape[-1]
  if not 0 <= lags < n:
    raise InputError(f'lags={lags}: expected 0 to {n - 1}, for {n} points')
  products = np.stack(
    [
      (series[..., : n - k] * series[..., k:]).mean(-1) for k in range(lags + 1)
    ],
    axis=-1,
  )
  with np.errstate(invalid='ignore'):
    return products / products[..., :1]


def noise(runs: int, points: int, seed: int) -> dict[str, np.ndarray]:
  """White noise, and its running sums, brown noise; float64 (runs, points)."""
  white = np.random.default_rng(seed).standard_normal((runs, points))
  return {'white': white, 'brown': white.cumsum(-1)}


def measure(
  networks: Sequence[str] = tuple(NETWORKS),
  *,
  depths: Sequence[int] = (2, 10, 50),
  runs: int = 20,
  width: int = 200,
  points: int = 256,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Autocorrelation of the gradients of random networks.

  Takes less than a minute on two idle CPU cores, and with `DEPTHS` about two.

  Args:
    networks: of `NETWORKS`.
    depths: layers of activations, each at least 2.
    runs: random networks of each kind, at once.
    width: of all layers.
    points: of the grid of inputs.
    seed: of the networks and the noise.

  Returns:
    depths, int (depths,); of each network, float64 (depths, runs, 16), lags 0
    to 15; and of white and brown noise, float64 (runs, 16).

  Raises:
    InputError: an unknown network, or a depth below 2.
  """
  for name in networks:
    if name not in NETWORKS:
      raise InputError(unknown('network', name, NETWORKS))
  if min(depths) < 2:
    raise InputError(f'depth={min(depths)}: expected 2 layers or more')
  keys = jax.random.split(jax.random.key(seed), runs)
  measured = {'depths': np.array(depths)}
  for name in networks:
    models = [NETWORKS[name](depth, width) for depth in depths]
    gradients = [np.asarray(input_gradients(m, keys, points)) for m in models]
    measured[name] = np.stack([autocorrelation(g) for g in gradients])
  for name, series in noise(runs, points, seed).items():
    measured[name] = autocorrelation(series)
  return measured


@plotting.style()
def draw(measured: Mapping[str, np.ndarray], out: Path) -> list[Path]:
  """Draws the arrays of `measure` as the paper's figure 2, a panel a network.

  Diamonds are the paper's figure at lag 15, read off by eye.
  """
  networks = [name for name in NETWORKS if name in measured]
  rows = -(-len(networks) // 2)
  places = np.linspace(0.05, 0.8, len(measured['depths']))
  colors = list(matplotlib.colormaps['viridis'](places))
  figure, panels = plotting.new_figure(
    rows, 2, width=5.4, height=1.5 * rows + 0.6, sharey=True
  )
  for axes in panels[len(networks) :]:
    axes.remove()
  for axes, network in zip(panels, networks, strict=False):
    _draw_panel(axes, measured, network, colors)
  for axes in panels[: len(networks)][-2:]:
    axes.set_xlabel('lag (steps of the grid)')
  for axes in panels[::2]:
    axes.set_ylabel('autocorrelation')
  plotting.legend(figure, *panels[0].get_legend_handles_labels(), columns=3)
  return plotting.save(figure, out, 'shattered')


def _draw_panel(
  axes: Axes, measured: Mapping[str, np.ndarray], network: str, colors: list
) -> None:
  lags = np.arange(measured['white'].shape[-1])
  for name, dashes in (('brown', '--'), ('white', ':')):
    axes.plot(
      lags,
      measured[name].mean(0),
      dashes,
      color='gray',
      linewidth=1.2,
      label=f'{name} noise',
    )
  depths = measured['depths'].tolist()
  for depth, color, values in zip(
    depths, colors, measured[network], strict=True
  ):
    axes.plot(lags, values.mean(0), color=color, label=f'depth {depth}')
  published = dict(zip(DEPTHS, PUBLISHED.get(network, ()), strict=False))
  label = 'published (by eye)'
  for depth, color in zip(depths, colors, strict=True):
    if depth in published:
      value = published[depth]
      style = {'color': color, 'markerfacecolor': 'none', 'markersize': 6}
      axes.plot(lags[-1], value, 'D', label=label, clip_on=False, **style)
      label = None  # Once in the legend.
  axes.set_title(TITLES[network], loc='left')
  axes.set_ylim(-0.12, 1.05)
  axes.set_xticks(lags[::5])

"""The convolution that all layers use, in forms that are fast on CPUs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

LAYOUTS = ('NHWC', 'HWIO', 'NHWC')
# Arguments of jax.lax.conv_general_dilated.
Options = tuple[tuple[str, Any], ...]


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  symmetric: bool = False,
  **options: Any,
) -> jax.Array:
  """Computes `jax.lax.conv_general_dilated`, in a form that is fast on CPUs.

  The convolutions that JAX derives for a gradient have unusual layouts. For
  CPUs XLA brings them into the usual one, but not inside loops: there they are
  up to 40 times slower (https://github.com/jax-ml/jax/issues/12868). On CPUs
  these gradients have the usual layout to begin with, and 1x1 kernels and 2x2
  images are products of matrices. On other platforms the program is JAX's own.

  Args:
    x: (batch, height, width, inputs).
    kernel: (height, width, inputs, outputs), of the dtype of `x`.
    strides, padding, **options: as `nn.Conv` passes them.
    symmetric: pad both sides by half the kernel's size, whatever `padding` is.
  """
  if symmetric:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  if not isinstance(padding, str):
    padding = tuple((low, high) for low, high in padding)
  options = {'dimension_numbers': LAYOUTS} | options
  options |= {'window_strides': tuple(strides), 'padding': padding}
  if not _is_usual(x, kernel, options):
    return jax.lax.conv_general_dilated(x, kernel, **options)
  if (*x.shape[1:3], *kernel.shape[:2], *strides) == (2, 2, 3, 3, 1, 1):
    return _by_platform(convolve_2x2, options)(x, kernel)
  return _convolution(x, kernel, tuple(options.items()))


def _is_usual(x: jax.Array, kernel: jax.Array, options: dict[str, Any]) -> bool:
  """Whether a convolution has the layouts of 2-D images, and no groups."""
  names = 'feature_group_count', 'batch_group_count'
  layouts = options['dimension_numbers']
  if (x.ndim, kernel.ndim, *(options.get(n, 1) for n in names)) != (4, 4, 1, 1):
    return False
  numbers = functools.partial(
    jax.lax.conv_dimension_numbers, x.shape, kernel.shape
  )
  return numbers(layouts) == numbers(LAYOUTS)


def _by_platform(
  cpu: Callable[..., jax.Array], options: dict[str, Any]
) -> Callable[..., jax.Array]:
  """`cpu` on CPUs, elsewhere JAX's convolution with `options`."""

  def default(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, **options)

  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)

  return convolve


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolution(
  x: jax.Array, kernel: jax.Array, options: Options
) -> jax.Array:
  arguments = dict(options)
  if _is_product(kernel, arguments):
    product = functools.partial(_product, **arguments)
    return _by_platform(product, arguments)(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, **arguments)


@functools.partial(_convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(
  options: Options, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _convolution(x, kernel, options)
  of_x, of_kernel = _of_x, _of_kernel
  if _is_product(kernel, dict(options)):
    of_x = of_kernel = _of_product
  # A sum with zeros would be kept for the backward pass.
  if isinstance(dx, SymbolicZero):
    return y, of_kernel(x, dkernel, options)
  if isinstance(dkernel, SymbolicZero):
    return y, of_x(dx, kernel, options)
  return y, of_x(dx, kernel, options) + of_kernel(x, dkernel, options)


def _is_product(kernel: jax.Array, options: dict[str, Any]) -> bool:
  """Whether a convolution is a product of pixels and a matrix."""
  no_padding = options['padding'] in ('SAME', 'VALID', ((0, 0), (0, 0)))
  dilation = options.get('lhs_dilation') in (None, (1, 1))
  return kernel.shape[:2] == (1, 1) and no_padding and dilation


def _form(cpu: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A form of a convolution for CPUs that is fast when transposed."""

  @functools.partial(jax.jit, static_argnums=2)  # Traced once for each shape.
  def form(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    convolve = _by_platform(
      functools.partial(cpu, **dict(options)), dict(options)
    )
    # What `cpu` transposes or slices is not kept for the backward pass.
    return jax.checkpoint(convolve, prevent_cse=False)(x, kernel)

  return form


@_form
def _of_x(dx: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
  options['dimension_numbers'] = ('NHWC', 'HWOI', 'NHWC')
  return jax.lax.conv_general_dilated(dx, kernel.swapaxes(2, 3), **options)


@_form
def _of_kernel(x: jax.Array, dkernel: jax.Array, **options: Any) -> jax.Array:
  options['dimension_numbers'] = ('CHWN', 'IHWO', 'HWNC')
  x, dkernel = x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3)
  y = jax.lax.conv_general_dilated(x, dkernel, **options)
  return y.transpose(2, 0, 1, 3)


def _product(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
  """A 1x1 convolution.

  XLA's CPU convolution takes up to 5 times as long for the kernel's gradient.
  """
  rows, columns = options['window_strides']
  x = x[:, ::rows, ::columns]
  pixels = x.reshape(-1, x.shape[-1])
  names = 'precision', 'preferred_element_type'
  y = jnp.matmul(pixels, kernel[0, 0], **{n: options.get(n) for n in names})
  return y.reshape(*x.shape[:-1], -1)


_of_product = _form(_product)  # Of either argument.


def convolve_2x2(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 3x3 'SAME' convolution of 2x2 images as one matrix product.

  Output pixel (p, q) reads input pixel (i, j) through tap (i - p + 1,
  j - q + 1). XLA's CPU convolution takes 5 to 10 times as long at this size.
  """
  taps = [kernel[1 - p : 3 - p, 1 - q : 3 - q] for p in (0, 1) for q in (0, 1)]
  matrix = jnp.concatenate([t.reshape(-1, t.shape[-1]) for t in taps], axis=-1)
  return (x.reshape(x.shape[0], -1) @ matrix).reshape(*x.shape[:3], -1)

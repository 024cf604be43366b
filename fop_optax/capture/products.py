"""A product whose backward pass also forms the Kronecker statistics of its weight.

For `y = x W` with rows `x_r` and cotangents `dy_r` (gradients of the mean loss), the backward rule
returns, as the cotangent of a probe of zeros beside dx and dW,

    A = sum_r [x_r; 1] [x_r; 1]'     G = sum_r dy_r dy_r'

formed from `x` and `dy` where they are at hand. AD adds cotangents: a weight that is used twice, or
constant over a scan, gets the sum, and one that a scan goes over gets a stack.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax.capture.values import Product
from fop_optax.layers import Factors

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Moments:
  """Which statistics a product is to form: of which axes, with a bias, as diagonals."""

  product: Product
  bias: bool
  diagonal: tuple[bool, bool]

  def __call__(self, x: jax.Array, dy: jax.Array, like: Factors) -> Factors:
    """The sums over rows, in the shapes and dtypes of `like`."""
    p = self.product
    a = second_moment(x, p.x_rows, p.x_stack, p.x_in, self.diagonal[0], like.A.dtype)
    g = second_moment(dy, p.y_rows, p.y_stack, p.y_out, self.diagonal[1], like.G.dtype)
    if self.bias:
      a = _with_ones(a, x, p)
    return Factors(a.reshape(like.A.shape), g.reshape(like.G.shape))


def second_moment(
  v: jax.Array,
  rows: tuple[int, ...],
  stack: tuple[int, ...],
  features: tuple[int, ...],
  diagonal: bool,
  dtype: Any,
) -> jax.Array:
  """`sum_r v_r v_r'` over the axes `rows`: `[stack, d, d]`, or its diagonal `[stack, d]`."""
  n_stack, n = math.prod(v.shape[i] for i in stack), math.prod(v.shape[i] for i in features)
  if v.dtype not in (jnp.bfloat16, jnp.float16):  # those are multiplied as they are, summed in dtype
    v = v.astype(dtype)
  if diagonal:
    moved = v.astype(dtype).transpose(*rows, *stack, *features)
    return jnp.sum(moved * moved, axis=range(len(rows))).reshape(n_stack, n)
  product = lax.dot_general(
    v,
    v,
    ((rows, rows), (stack, stack)),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )
  # the features come out in the order of v's axes: bring the small result into the weight's order
  rank = [sorted(features).index(axis) for axis in features]
  s, f = len(stack), len(features)
  product = product.transpose(*range(s), *(s + i for i in rank), *(s + f + i for i in rank))
  return product.reshape(n_stack, n, n)


def _with_ones(a: jax.Array, x: jax.Array, p: Product) -> jax.Array:
  """`A` for inputs with a one appended, from blocks `[[A, m], [m', n]]`: no column is added to x."""
  n = math.prod(x.shape[axis] for axis in p.x_rows)
  corner = jnp.full((a.shape[0], 1), n, a.dtype)
  if a.ndim == 2:
    return jnp.concatenate([a, corner], axis=1)
  moved = x.transpose(*p.x_rows, *p.x_stack, *p.x_in)
  m = jnp.sum(moved, axis=range(len(p.x_rows)), dtype=a.dtype).reshape(a.shape[:2])
  below = jnp.concatenate([m, corner], axis=1)[:, None, :]
  return jnp.concatenate([jnp.concatenate([a, m[:, :, None]], axis=2), below], axis=1)


def product_with_moments(
  multiply: Bilinear,
  moments: Moments,
  x: jax.Array,
  w: jax.Array,
  probe: Factors,
  refresh: jax.Array | None,
) -> jax.Array:
  """`multiply(x, w)`, whose cotangent with respect to `probe` is the statistics.

  Args:
    multiply: the product as the loss has it.
    moments: what to form.
    x: the operand that depends on the batch.
    w: the weight.
    probe: zeros of the factors' shapes.
    refresh: a traced bool, or None for always.
  """
  like = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype), probe)

  @jax.custom_vjp
  def product(x, w, probe, refresh):
    del probe, refresh
    return multiply(x, w)

  def forward(x, w, probe, refresh):
    del probe
    return multiply(x, w), (x, w, refresh)

  def backward(residuals, dy):
    x, w, refresh = residuals
    (dx,) = jax.linear_transpose(lambda x: multiply(x, w), x)(dy)
    (dw,) = jax.linear_transpose(lambda w: multiply(x, w), w)(dy)
    if refresh is None:
      return dx, dw, moments(x, dy, like), None
    skip = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), like)
    # products only inside the branch: gradients of convolutions would be slow there on CPU
    return dx, dw, lax.cond(refresh, lambda: moments(x, dy, like), lambda: skip), None

  product.defvjp(forward, backward)
  return product(x, w, probe, refresh)

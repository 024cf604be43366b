"""A product whose backward pass also forms the Kronecker statistics of its weight.

For `y = x W` with rows `x_r` and cotangents `dy_r` (gradients of the mean loss), the backward rule
returns, as the cotangent of a probe of zeros beside dx and dW,

    A = a sum_r [x_r; 1] [x_r; 1]'     G = g sum_r dy_r dy_r'

with the numbers `a` and `g` that normalise them, formed from `x` and `dy` where they are at hand.
AD adds cotangents: a weight that is used twice, or constant over a scan, gets the sum, and one that
a scan goes over gets a stack.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax.capture.examples.values import Piece
from fop_optax.capture.values import Product
from fop_optax.layers import Factors

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Moments:
  """Which statistics a product is to form: with a bias or not, as diagonals or not, times what.

  Of the examples of a chunk every `every`-th counts, `every` times, where `rows` says at which axis
  of x and at which of y they lie.
  """

  product: Product
  bias: bool
  diagonal: tuple[bool, bool]
  scale: tuple[float, float]
  rows: tuple[Piece, Piece] | None
  every: int

  def __call__(self, x: jax.Array, dy: jax.Array, like: Factors) -> Factors:
    """The sums over rows, scaled, in the shapes and dtypes of `like`."""
    x, dy, count = self._thin(x, dy)
    a = self.product.input_moment(x, self.bias, self.diagonal[0], like.A.dtype)
    g = self.product.output_moment(x, dy, self.diagonal[1], like.G.dtype)
    scale_a, scale_g = (count * scale for scale in self.scale)
    return Factors(scale_a * a.reshape(like.A.shape), scale_g * g.reshape(like.G.shape))

  def _thin(self, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """`x` and `dy` of some of the examples, and how often each is to count."""
    if self.every == 1 or self.rows is None:
      return x, dy, 1
    return self._some(x, self.rows[0]), self._some(dy, self.rows[1]), self.every

  def _some(self, array: jax.Array, piece: Piece) -> jax.Array:
    """Every `every`-th example along an axis of examples, or of examples times something."""
    # a reshape leaves a sharded axis sharded, which a stride would not
    axis = piece.axis
    before, after, size = array.shape[:axis], array.shape[axis + 1 :], array.shape[axis]
    split = (piece.outer, piece.size // self.every, self.every, piece.inner)
    part = jax.lax.index_in_dim(array.reshape(*before, *split, *after), 0, axis + 2, keepdims=False)
    return part.reshape(*before, size // self.every, *after)


def product_with_moments(
  multiply: Bilinear,
  moments: Sequence[Moments],
  x: jax.Array,
  w: jax.Array,
  probes: Sequence[Factors],
  refresh: jax.Array | None,
) -> jax.Array:
  """`multiply(x, w)`, whose cotangent with respect to `probes` is the statistics.

  Args:
    multiply: the product as the loss has it.
    moments: what to form, for each part of the weight.
    x: the operand that depends on the batch.
    w: the weight.
    probes: zeros of the factors' shapes.
    refresh: a traced bool, or None for always.
  """
  like = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype), list(probes))

  def form(x, dy):
    return [each(x, dy, shapes) for each, shapes in zip(moments, like, strict=True)]

  @jax.custom_vjp
  def product(x, w, probes, refresh):
    del probes, refresh
    return multiply(x, w)

  def forward(x, w, probes, refresh):
    del probes
    return multiply(x, w), (x, w, refresh)

  def backward(residuals, dy):
    x, w, refresh = residuals
    dx = None  # of an index
    if jnp.issubdtype(x.dtype, jnp.inexact):
      (dx,) = jax.linear_transpose(lambda x: multiply(x, w), x)(dy)
    (dw,) = jax.linear_transpose(lambda w: multiply(x, w), w)(dy)
    if refresh is None:
      return dx, dw, form(x, dy), None
    skip = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), like)
    # products only inside the branch: gradients of convolutions would be slow there on CPU
    return dx, dw, lax.cond(refresh, lambda: form(x, dy), lambda: skip), None

  product.defvjp(forward, backward)
  return product(x, w, list(probes), refresh)

"""How products and sums with a bias are written: tables of spellings, each the same function."""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

WIDTHS = (4, 6)
CLASSES = 3
EXAMPLES = 6  # of a group

# How a matrix [inputs, outputs] is kept: (keep it, read it back in one of several ways).
STORED = {
  "plain": (lambda w: w, [lambda w, i, o: w, lambda w, i, o: w.astype(jnp.float64)]),
  "transposed": (
    lambda w: w.T,
    [
      lambda w, i, o: w.T,
      lambda w, i, o: jnp.einsum("oi->io", w),
      lambda w, i, o: lax.transpose(w, (1, 0)),
    ],
  ),
  "leading": (
    lambda w: w[None],
    [lambda w, i, o: w[0], lambda w, i, o: w.squeeze(0), lambda w, i, o: w.reshape(i, o)],
  ),
  "middle": (lambda w: w[:, None], [lambda w, i, o: w[:, 0], lambda w, i, o: jnp.squeeze(w, 1)]),
  "flat": (lambda w: w.reshape(-1), [lambda w, i, o: w.reshape(i, o)]),
  "rows": (lambda w: w.reshape(2, -1, w.shape[1]), [lambda w, i, o: w.reshape(i, o)]),
  "columns": (
    lambda w: w.reshape(w.shape[0], 2, -1).transpose(1, 0, 2),
    [lambda w, i, o: jnp.moveaxis(w, 0, 1).reshape(i, o)],
  ),
  "reversed": (lambda w: w[::-1], [lambda w, i, o: w[::-1], lambda w, i, o: jnp.flip(w, 0)]),
  "padded": (
    lambda w: np.concatenate([w, w[:1] + 1]),
    [lambda w, i, o: w[:i], lambda w, i, o: jnp.split(w, [i])[0]],
  ),
  "strided": (lambda w: np.stack([w, w + 1], 1).reshape(-1, w.shape[1]), [lambda w, i, o: w[::2]]),
}


def _rowwise(transform):
  """Applies `f(row, w)` to each row of `x` through `transform`, which maps over leading axes."""
  return lambda f, x, w: transform(lambda r: f(r, w))(x.reshape(-1, x.shape[-1])).reshape(
    *x.shape[:-1], -1
  )


_vmapped = _rowwise(jax.vmap)
_mapped = _rowwise(lambda f: functools.partial(lax.map, f))


def halves(axis, w):
  """Splits an axis into two of sizes 2 and the rest."""
  return w.reshape(*w.shape[:axis], 2, -1, *w.shape[axis + 1 :])


# The product x[..., i] @ w[i, o].
PRODUCTS = {
  "matmul": lambda x, w: x @ w,
  "einsum": lambda x, w: jnp.einsum("...i,io->...o", x, w),
  "einsum of transposed": lambda x, w: jnp.einsum("oi,...i->...o", w.T, x),
  "weight left": lambda x, w: jnp.moveaxis(jnp.tensordot(w, x, ((0,), (x.ndim - 1,))), 0, -1),
  "tensordot": lambda x, w: jnp.tensordot(x, w, 1),
  "dot": lambda x, w: jnp.dot(x, w),
  "dot_general": lambda x, w: lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))),
  "columns first": lambda x, w: jnp.swapaxes(jnp.matmul(w.T, jnp.swapaxes(x, -1, -2)), -1, -2),
  "heads in": lambda x, w: jnp.einsum("...hi,hio->...o", halves(x.ndim - 1, x), halves(0, w)),
  "heads in swapped": lambda x, w: jnp.einsum(
    "...hi,iho->...o", halves(x.ndim - 1, x), halves(0, w).swapaxes(0, 1)
  ),
  "heads out": lambda x, w: jnp.einsum("...i,iho->...ho", x, halves(1, w)).reshape(
    *x.shape[:-1], -1
  ),
  "heads out swapped": lambda x, w: jnp.einsum(
    "...i,hio->...ho", x, halves(1, w).swapaxes(0, 1)
  ).reshape(*x.shape[:-1], -1),
  "heads both": lambda x, w: jnp.einsum(
    "...hi,hikl->...kl", halves(x.ndim - 1, x), halves(2, halves(0, w))
  ).reshape(*x.shape[:-1], -1),
  "vmap of rows": lambda x, w: _vmapped(lambda r, w: r @ w, x, w),
  "vmap, weight left": lambda x, w: _vmapped(lambda r, w: w.T @ r, x, w),
  "vmap of columns": lambda x, w: jax.vmap(lambda c: x @ c, in_axes=1, out_axes=-1)(w),
  "map": lambda x, w: _mapped(lambda r, w: r @ w, x, w),
  "size-1 axes": lambda x, w: (x[..., None, :] @ w[(None,) * (x.ndim - 1)])[..., 0, :],
  "named": lambda x, w: checkpoint_name(x @ w, "product"),
  "barrier": lambda x, w: x @ lax.optimization_barrier(w),
}

# y[..., o] + b[o].
SUMS = {
  "right": lambda y, b: y + b,
  "left": lambda y, b: b + y,
  "[None]": lambda y, b: y + b[None],
  "broadcast_to": lambda y, b: y + jnp.broadcast_to(b, y.shape),
  "reshape": lambda y, b: y + b.reshape((1,) * (y.ndim - 1) + (-1,)),
  "broadcast_in_dim": lambda y, b: lax.broadcast_in_dim(b, y.shape, (y.ndim - 1,)) + y,
  "expand_dims": lambda y, b: jnp.add(y, jnp.broadcast_to(jnp.expand_dims(b, 0), y.shape)),
  "moved": lambda y, b: jnp.moveaxis(
    jnp.moveaxis(y, -1, 0) + b.reshape((-1,) + (1,) * (y.ndim - 1)), 0, -1
  ),
  "heads": lambda y, b: (halves(y.ndim - 1, y) + b.reshape(2, -1)).reshape(y.shape),
  "flat rows": lambda y, b: (y.reshape(-1, y.shape[-1]) + b).reshape(y.shape),
  "vmap": lambda y, b: jax.vmap(jnp.add, (0, None))(y.reshape(-1, y.shape[-1]), b).reshape(y.shape),
  "vmap of features": lambda y, b: jax.vmap(jnp.add, (-1, 0), -1)(y, b),
}

# What is wrapped around a product and the sum with its bias.
WRAPS = {
  "none": lambda f: f,
  "jit": jax.jit,
  "jit in jit": lambda f: jax.jit(jax.jit(f)),
  "checkpoint": jax.checkpoint,
  "dots saved": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
  "checkpointed jit": lambda f: jax.checkpoint(jax.jit(f)),
}

ACTIVATIONS = {
  "tanh": jnp.tanh,
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "softplus": jax.nn.softplus,
}


@jax.custom_jvp
def bent(x):
  return jnp.tanh(x)


bent.defjvp(lambda x, t: (jnp.tanh(x[0]), 3.0 * t[0] / jnp.cosh(x[0])))  # not the true derivative
ACTIVATIONS["custom_jvp"] = bent


@dataclasses.dataclass(frozen=True)
class Spelling:
  """How a product and the sum with its bias are written."""

  product: str = "matmul"
  sum: str = "right"
  around_product: str = "none"
  around_sum: str = "none"
  around_both: str = "none"

  def __call__(self, x, w, b=None):
    product, add = WRAPS[self.around_product](PRODUCTS[self.product]), SUMS[self.sum]
    if b is None:
      return WRAPS[self.around_both](product)(x, w)
    add = WRAPS[self.around_sum](add)
    return WRAPS[self.around_both](lambda x, w, b: add(product(x, w), b))(x, w, b)

  @property
  def bias(self) -> str:
    """The role of a bias: one that is added to what a scan has put out may be left alone."""
    return "either" if self.product == "map" else "layer"


def normal(rng, *shape):
  return rng.normal(size=shape) / math.sqrt(shape[-2] if len(shape) > 1 else 4)


def read(stored, w, inputs, reading=0):
  """The matrix kept in `w`."""
  outputs = {"transposed": w.shape[0], "columns": 2 * w.shape[-1]}.get(stored, w.shape[-1])
  if stored == "flat":
    outputs = w.size // inputs
  readings = STORED[stored][1]
  return readings[reading % len(readings)](w, inputs, outputs)

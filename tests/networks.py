"""Random networks as small specifications, each with two interpreters.

A specification is a tree of frozen dataclasses, so that a failing one can be printed and pasted.
`canonical` writes the network plainly, with a tap at each product that has to become a layer;
`spelled` writes the same function in the way that the specification says. `roles` says of each
parameter what has to become of it: `"layer"`, `"fallback"`, `"either"`, or `"sum"`, a bias that is
added to the sum of several products of its block and joins one of them.
"""

import dataclasses
import functools
import math
from typing import Any

from hypothesis import strategies as st
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

import fop_optax

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


def _halves(axis, w):
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
  "heads in": lambda x, w: jnp.einsum("...hi,hio->...o", _halves(x.ndim - 1, x), _halves(0, w)),
  "heads in swapped": lambda x, w: jnp.einsum(
    "...hi,iho->...o", _halves(x.ndim - 1, x), _halves(0, w).swapaxes(0, 1)
  ),
  "heads out": lambda x, w: jnp.einsum("...i,iho->...ho", x, _halves(1, w)).reshape(
    *x.shape[:-1], -1
  ),
  "heads out swapped": lambda x, w: jnp.einsum(
    "...i,hio->...ho", x, _halves(1, w).swapaxes(0, 1)
  ).reshape(*x.shape[:-1], -1),
  "heads both": lambda x, w: jnp.einsum(
    "...hi,hikl->...kl", _halves(x.ndim - 1, x), _halves(2, _halves(0, w))
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
  "heads": lambda y, b: (_halves(y.ndim - 1, y) + b.reshape(2, -1)).reshape(y.shape),
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
def _bent(x):
  return jnp.tanh(x)


_bent.defjvp(lambda x, t: (jnp.tanh(x[0]), 3.0 * t[0] / jnp.cosh(x[0])))  # not the true derivative
ACTIVATIONS["custom_jvp"] = _bent


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


def _normal(rng, *shape):
  return rng.normal(size=shape) / math.sqrt(shape[-2] if len(shape) > 1 else 4)


def _read(stored, w, inputs, reading=0):
  """The matrix kept in `w`."""
  outputs = {"transposed": w.shape[0], "columns": 2 * w.shape[-1]}.get(stored, w.shape[-1])
  if stored == "flat":
    outputs = w.size // inputs
  readings = STORED[stored][1]
  return readings[reading % len(readings)](w, inputs, outputs)


# Blocks. Each has: init(rng, width, tokens) -> (parameters, width of the output), roles(),
# canonical(p, h, tap), spelled(p, h); and maybe penalty(p), a term of the loss.


class Block:
  def penalty(self, p):
    return 0.0


# A bias that is none, and what it does instead: y, b -> y.
BIAS_TRAPS = {
  "minus": lambda y, b: y - b,
  "scaled": lambda y, b: y + 2.0 * b,
  "after activation": lambda y, b: jnp.tanh(y) + b,
  "read twice": lambda y, b: y + b + jnp.sin(b),
  "sum read twice": lambda y, b: (y + b) * y,
  "scalar": lambda y, b: y + b,
  "one": lambda y, b: y + b,
  "maximum": lambda y, b: jnp.maximum(y, b),
  "half": lambda y, b: y + jnp.concatenate([b, b]),
}

PENALTIES = {
  "l2": lambda w: 0.05 * jnp.sum(w**2),
  "frobenius": lambda w: 0.05 * jnp.sqrt(jnp.sum(w * w) + 1.0),
  "spectral": lambda w: 0.1 * jnp.sum((w @ jnp.ones(w.shape[-1])) ** 2),
  "scan": lambda w: 0.1 * lax.scan(lambda c, r: (c + jnp.sum(r**2), None), 0.0, w)[0],
  "gram": lambda w: 0.1 * jnp.sum(jnp.tensordot(w, w, ((0,), (0,))) ** 2),
}


@dataclasses.dataclass(frozen=True)
class Dense(Block):
  """`act(x @ w + b)`; `bias` is "none", "bias", "positions" (a table), or one of `BIAS_TRAPS`."""

  outputs: int
  bias: str = "bias"
  stored: str = "plain"
  reading: int = 0
  spelling: Spelling = Spelling()
  residual: str = "none"  # "before", "after": adds the input before or after the bias
  penalty_on_w: str = "none"
  penalty_on_b: str = "none"
  single: bool = False  # parameters in float32
  activation: str = "tanh"

  def init(self, rng, width, tokens):
    p = {"w": STORED[self.stored][0](_normal(rng, width, self.outputs))}
    shape = {"positions": (tokens, self.outputs), "scalar": (), "one": (1,)}
    shape["half"] = (self.outputs // 2,)
    if self.bias != "none":
      p["b"] = _normal(rng, *shape.get(self.bias, (self.outputs,)))
    if self.single:
      p = {name: np.float32(value) for name, value in p.items()}
    return p, self.outputs

  def roles(self):
    weight = "layer" if self.penalty_on_w == "none" else "fallback"
    joins = self.bias == "bias" and self.penalty_on_b == "none" and weight == "layer"
    bias = {} if self.bias == "none" else {"b": self.spelling.bias if joins else "fallback"}
    return {"w": weight} | ({"b": "layer"} if self.bias == "positions" else bias)

  def _finish(self, y, h, b, join):
    """What comes after the product: the residual, and a bias that is not added by `join`."""
    if self.residual == "before" and y.shape == h.shape:
      y = y + h
    if self.bias in BIAS_TRAPS:
      y = BIAS_TRAPS[self.bias](y, b)
    elif join:
      y = join(y, b)
    if self.residual == "after" and y.shape == h.shape:
      y = h + y
    return ACTIVATIONS[self.activation](y)

  def canonical(self, p, h, tap):
    w, b = _read(self.stored, p["w"], h.shape[-1]), p.get("b")
    if self.bias == "positions":
      rows = lambda y: jnp.broadcast_to(jnp.eye(len(b)), (*y.shape[:-1], len(b)))
      return self._finish(tap("w", h, w), h, b, lambda y, b: y + tap("b", rows(y), b))
    joins = self.roles().get("b") in ("layer", "either")
    y = tap("w", h, w, b if joins else None)
    return self._finish(y, h, b, None if joins or b is None else jnp.add)

  def spelled(self, p, h):
    w, b = _read(self.stored, p["w"], h.shape[-1], self.reading), p.get("b")
    if self.bias != "bias" or self.residual == "before":
      join = None if b is None else SUMS[self.spelling.sum]
      return self._finish(self.spelling(h, w), h, b, jnp.add if self.bias == "positions" else join)
    return self._finish(self.spelling(h, w, b), h, b, None)

  def penalty(self, p):
    on = ((self.penalty_on_w, p["w"]), (self.penalty_on_b, p.get("b")))
    return sum(PENALTIES[kind](a) for kind, a in on if kind != "none")


# How a weight is used several times: loop of `step(h, w, b)`, with the same arguments each time.
REPEATS = {
  "loop": lambda step, h, w, b, n: functools.reduce(lambda h, _: step(h, w, b), range(n), h),
  "scan": lambda step, h, w, b, n: lax.scan(lambda h, _: (step(h, w, b), None), h, None, n)[0],
  "carried": lambda step, h, w, b, n: lax.scan(
    lambda c, _: ((step(*c), *c[1:]), None), (h, w, b), None, n
  )[0][0],
  "fori": lambda step, h, w, b, n: lax.fori_loop(0, n, lambda _, h: step(h, w, b), h),
  "one jit": lambda step, h, w, b, n: functools.reduce(
    lambda h, f: f(h, w, b), [jax.jit(step)] * n, h
  ),
  "checkpoint": lambda step, h, w, b, n: lax.scan(
    jax.checkpoint(lambda h, _: (step(h, w, b), None)), h, None, n
  )[0],
  "nested": lambda step, h, w, b, n: lax.scan(
    lambda h, _: (lax.scan(lambda h, _: (step(h, w, b), None), h, None, 1)[0], None), h, None, n
  )[0],
}


@dataclasses.dataclass(frozen=True)
class Shared(Block):
  """One square weight used `times` times; `bias` "some" leaves it out in the last use."""

  times: int
  bias: str = "same"  # "none", "some"
  repeat: str = "loop"
  stored: str = "plain"
  spelling: Spelling = Spelling()
  last: Spelling | None = None  # another spelling of the last use

  def init(self, rng, width, tokens):
    p = {"w": STORED[self.stored][0](_normal(rng, width, width))}
    return p | ({} if self.bias == "none" else {"b": _normal(rng, width)}), width

  def roles(self):
    both = {self.spelling.bias, (self.last or self.spelling).bias}
    role = {"same": "either" if "either" in both else "layer", "some": "fallback"}
    bias = {} if self.bias == "none" else {"b": role[self.bias]}
    products = {self.spelling.product, (self.last or self.spelling).product}
    if len(products) > 1 and any("swapped" in product for product in products):
      return dict.fromkeys(["w", *bias], "either")  # features in two orders
    return {"w": "layer"} | bias

  def canonical(self, p, h, tap):
    w = _read(self.stored, p["w"], h.shape[-1])
    joined = p.get("b") if self.bias == "same" else None
    for use in range(self.times):
      y = tap("w", h, w, joined)
      h = jnp.tanh(y + p["b"] if self.bias == "some" and use < self.times - 1 else y)
    return h

  def spelled(self, p, h):
    w, b = _read(self.stored, p["w"], h.shape[-1], 1), p.get("b")
    step = lambda spelling: lambda h, w, b: jnp.tanh(spelling(h, w, b))
    apart = self.last is not None or self.bias == "some"
    h = REPEATS[self.repeat](step(self.spelling), h, w, b, self.times - apart)
    last = None if self.bias == "some" else b
    return step(self.last or self.spelling)(h, w, last) if apart else h


def _scan(step, h, ws, **kwargs):
  return lax.scan(lambda h, w: (step(h, *w), None), h, ws, **kwargs)[0]


def _pairs(ws, n):
  return jax.tree.map(lambda w: w.reshape(2, n // 2, *w.shape[1:]), ws)


def _places(ws, n):
  return [[w[i] for w in ws] for i in range(n)]


def _loop(step, h, each):
  return functools.reduce(lambda h, w: step(h, *w), each, h)


def _nested(step, h, ws, wrap=lambda f: f):
  return _scan(wrap(lambda h, *ws: _scan(step, h, ws)), h, ws)


# How a stack of layers is gone through: `step(h, w, b)` with slices of the stacked `ws = (w, b)`.
# Beside each the order in which the layers come, as a function of their number.
STACKS = {
  "index": (lambda step, h, ws, n: _loop(step, h, _places(ws, n)), range),
  "negative index": (
    lambda step, h, ws, n: _loop(step, h, [[w[i - n] for w in ws] for i in range(n)]),
    range,
  ),
  "iterate": (lambda step, h, ws, n: _loop(step, h, zip(*ws, strict=True)), range),
  "split": (
    lambda step, h, ws, n: _loop(
      step, h, zip(*[[a[0] for a in jnp.split(w, n)] for w in ws], strict=True)
    ),
    range,
  ),
  "scan": (lambda step, h, ws, n: _scan(step, h, ws), range),
  "checkpoint": (lambda step, h, ws, n: _scan(jax.checkpoint(step), h, ws), range),
  "scan in jit": (lambda step, h, ws, n: jax.jit(functools.partial(_scan, step))(h, ws), range),
  "scan in checkpoint": (
    lambda step, h, ws, n: jax.checkpoint(functools.partial(_scan, step))(h, ws),
    range,
  ),
  "unrolled": (lambda step, h, ws, n: _scan(step, h, ws, unroll=2), range),
  "reverse": (
    lambda step, h, ws, n: _scan(step, h, ws, reverse=True),
    lambda n: reversed(range(n)),
  ),
  "flipped": (
    lambda step, h, ws, n: _scan(step, h, jax.tree.map(lambda w: w[::-1], ws)),
    lambda n: reversed(range(n)),
  ),
  "nested": (lambda step, h, ws, n: _nested(step, h, _pairs(ws, n)), range),
  "nested checkpoints": (
    lambda step, h, ws, n: _nested(jax.checkpoint(step), h, _pairs(ws, n), jax.checkpoint),
    range,
  ),
  "two scans": (
    lambda step, h, ws, n: _scan(
      step, _scan(step, h, [w[: n // 2] for w in ws]), [w[n // 2 :] for w in ws]
    ),
    range,
  ),
  "scan of pairs": (
    lambda step, h, ws, n: _scan(lambda h, *ws: _loop(step, h, _places(ws, 2)), h, _pairs_of(ws)),
    range,
  ),
  "each twice": (
    lambda step, h, ws, n: _scan(lambda h, *w: _loop(step, h, [w, w]), h, ws),
    lambda n: np.repeat(range(n), 2),
  ),
  "each twice, scanned": (
    lambda step, h, ws, n: _scan(
      lambda h, *w: lax.scan(lambda h, _: (step(h, *w), None), h, None, 2)[0], h, ws
    ),
    lambda n: np.repeat(range(n), 2),
  ),
  "all twice": (
    lambda step, h, ws, n: lax.scan(lambda h, _: (_scan(step, h, ws), None), h, None, 2)[0],
    lambda n: np.tile(range(n), 2),
  ),
  "all twice, apart": (
    lambda step, h, ws, n: _scan(step, _scan(step, h, ws), ws),
    lambda n: np.tile(range(n), 2),
  ),
  "forth and back": (
    lambda step, h, ws, n: _scan(step, _scan(step, h, ws), ws, reverse=True),
    lambda n: [*range(n), *reversed(range(n))],
  ),
}


def _pairs_of(ws):
  return jax.tree.map(lambda w: w.reshape(-1, 2, *w.shape[1:]), ws)


# How the stacked matrices [stack, i, o] are kept, and how they are read.
STACKED = {
  "plain": (lambda w: w, lambda w: w),
  "transposed": (lambda w: w.swapaxes(1, 2), lambda w: w.swapaxes(1, 2)),
  "middle": (lambda w: w.swapaxes(0, 1), lambda w: jnp.moveaxis(w, 1, 0)),
  "last": (lambda w: np.moveaxis(w, 0, 2), lambda w: jnp.moveaxis(w, 2, 0)),
  "size-1 axis": (lambda w: w[:, None], lambda w: w[:, 0]),
  "longer": (lambda w: np.concatenate([w, w[:1] + 1]), lambda w: w[:-1]),
}


@dataclasses.dataclass(frozen=True)
class Stack(Block):
  """Square layers with stacked weights; `bias` is "none", "stacked" or "shared" by all of them."""

  layers: int
  bias: str = "stacked"
  form: str = "scan"
  stored: str = "plain"
  spelling: Spelling = Spelling()

  def init(self, rng, width, tokens):
    p = {"w": STACKED[self.stored][0](_normal(rng, self.layers, width, width))}
    shape = {"stacked": (self.layers, width), "shared": (width,)}
    return p | ({"b": _normal(rng, *shape[self.bias])} if self.bias in shape else {}), width

  def roles(self):
    role = {"stacked": self.spelling.bias, "shared": "fallback"}
    return {"w": "layer"} | ({} if self.bias == "none" else {"b": role[self.bias]})

  def canonical(self, p, h, tap):
    ws = STACKED[self.stored][1](p["w"])
    for i in STACKS[self.form][1](self.layers):
      if self.bias == "stacked":
        h = jnp.tanh(tap("w", h, ws[i], p["b"][i], i))
      else:
        h = jnp.tanh(tap("w", h, ws[i], None, i) + p.get("b", 0.0))
    return h

  def spelled(self, p, h):
    ws = (STACKED[self.stored][1](p["w"]),) + ((p["b"],) if self.bias == "stacked" else ())
    shared = p.get("b") if self.bias == "shared" else None
    step = lambda h, w, b=shared: jnp.tanh(self.spelling(h, w, b))
    return STACKS[self.form][0](step, h, ws, self.layers)


@dataclasses.dataclass(frozen=True)
class Recurrent(Block):
  """`s = tanh(x_t @ w + s @ u + b)` over tokens; `bias` says to which product b is added."""

  outputs: int
  bias: str = "sum"  # "none", "input", "state"
  form: str = "scan"  # "loop", "precomputed" input products, "joint" matrix for input and state
  checkpoint: bool = False
  reverse: bool = False
  spelling: Spelling = Spelling()

  def init(self, rng, width, tokens):
    p = {"w": _normal(rng, width, self.outputs), "u": _normal(rng, self.outputs, self.outputs)}
    if self.form == "joint":
      p = {"w": np.concatenate([p["w"], p["u"]])}
    return p | ({} if self.bias == "none" else {"b": _normal(rng, self.outputs)}), self.outputs

  def roles(self):
    weights = {"w": "layer"} if self.form == "joint" else {"w": "layer", "u": "layer"}
    role = "sum" if self.bias == "sum" and self.form != "joint" else self.spelling.bias
    if self.form == "loop":  # its first use is of zeros, under vmap or map without a row an example
      weights["u"] = "either"
    if self.spelling.bias == "either" or (self.form == "loop" and self.bias != "input"):
      role = "either"
    return weights | ({} if self.bias == "none" else {"b": role})

  def _cell(self, p, x, s, first, second, ready=False):
    """One step; `first` multiplies the input (unless it is `ready`) and `second` the state."""
    b = p.get("b")
    if self.form == "joint":
      return jnp.tanh(first(jnp.concatenate([x, s], -1), p["w"], b))
    y = x if ready else first(x, p["w"], b if self.bias == "input" else None)
    y = y + second(s, p["u"], b if self.bias == "state" else None)
    return jnp.tanh(y + b if self.bias == "sum" else y)

  def _over_tokens(self, scan, h):
    """Tokens to the front, `scan(state, inputs)`, and back."""
    xs = jnp.moveaxis(h, -2, 0)
    ys = scan(jnp.zeros((*xs.shape[1:-1], self.outputs), h.dtype), xs)
    return jnp.moveaxis(ys, 0, -2)

  def canonical(self, p, h, tap):
    first, second = functools.partial(tap, "w"), functools.partial(tap, "u")

    def scan(s, xs):
      states = []
      for x in xs[::-1] if self.reverse else xs:
        states.append(s := self._cell(p, x, s, first, second))
      return jnp.stack(states[::-1] if self.reverse else states)

    return self._over_tokens(scan, h)

  def spelled(self, p, h):
    ready = self.form == "precomputed"
    if ready:
      h = self.spelling(h, p["w"], p["b"] if self.bias == "input" else None)
    multiply = Spelling() if ready else self.spelling

    def step(s, x):
      s = self._cell(p, x, s, multiply, multiply, ready)
      return s, s

    def scan(s, xs):
      body = jax.checkpoint(step) if self.checkpoint else step
      if self.form != "loop":
        return lax.scan(body, s, xs, reverse=self.reverse)[1]
      states = []
      for x in xs[::-1] if self.reverse else xs:
        s, _ = body(s, x)
        states.append(s)
      return jnp.stack(states[::-1] if self.reverse else states)

    return self._over_tokens(scan, h)


# How q, k and v of all heads are kept, from [3, d, heads, size]; and how they are taken apart.
QKV = {
  "first axis": (lambda w: w, lambda w, d: [w[0], w[1], w[2]]),
  "iterate": (lambda w: w, lambda w, d: list(w)),
  "second axis": (lambda w: w.swapaxes(0, 1), lambda w, d: [w[:, i] for i in range(3)]),
  "split": (
    lambda w: w.swapaxes(0, 1).reshape(w.shape[1], -1),
    lambda w, d: [part.reshape(-1, 2, d // 2) for part in jnp.split(w, 3, 1)],
  ),
  "slices": (
    lambda w: w.swapaxes(0, 1).reshape(w.shape[1], -1),
    lambda w, d: [w[:, d * i : d * (i + 1)].reshape(-1, 2, d // 2) for i in range(3)],
  ),
}


@dataclasses.dataclass(frozen=True)
class Attention(Block):
  """Two heads over tokens; kernels `[d, heads, size]` and `[heads, size, d]`.

  `qkv` is one of `QKV`, "apart" (three parameters), or "fused" (one product, split after it).
  """

  qkv: str = "apart"
  bias: bool = True
  around: str = "none"

  def init(self, rng, width, tokens):
    w, b = _normal(rng, 3, width, 2, width // 2) / 2, _normal(rng, 3, 1, 2, width // 2)
    if self.qkv == "apart":
      p = {"q": w[0], "k": w[1], "v": w[2]}
      biases = {"bq": b[0, 0], "bk": b[1, 0], "bv": b[2, 0]}
    elif self.qkv == "fused":
      p, biases = {"w": w.swapaxes(0, 1)}, {"bw": b[:, 0]}
    else:
      p, biases = {"w": QKV[self.qkv][0](w)}, {"bw": QKV[self.qkv][0](b)}
    p, biases = p | {"o": _normal(rng, 2, width // 2, width)}, biases | {"bo": _normal(rng, width)}
    return p | (biases if self.bias else {}), width

  def roles(self):
    names = ["q", "k", "v", "o"] if self.qkv == "apart" else ["w", "o"]
    return dict.fromkeys(names + (["b" + name for name in names] if self.bias else []), "layer")

  def _parts(self, p, d):
    """Weights and biases of q, k and v."""
    take = QKV[self.qkv][1] if self.qkv != "apart" else None
    ws = take(p["w"], d) if take else [p["q"], p["k"], p["v"]]
    if not self.bias:
      return ws, [None] * 3
    bs = [b[0] for b in take(p["bw"], d)] if take else [p["bq"], p["bk"], p["bv"]]
    return ws, bs

  def _mix(self, q, k, v):
    scores = jnp.einsum("...thk,...shk->...hts", q, k)
    return jnp.einsum("...hts,...shk->...thk", jax.nn.softmax(scores), v)

  def canonical(self, p, h, tap):
    d = h.shape[-1]
    heads = lambda y: y.reshape(*h.shape[:-1], 2, d // 2)
    if self.qkv == "fused":
      b = p["bw"].reshape(-1) if self.bias else None
      q, k, v = map(heads, jnp.split(tap("w", h, p["w"].reshape(d, -1), b), 3, -1))
    else:
      q, k, v = (
        heads(tap(name, h, w.reshape(d, d), None if b is None else b.reshape(d)))
        for name, w, b in zip("qkv", *self._parts(p, d), strict=True)
      )
    mixed = self._mix(q, k, v).reshape(h.shape)
    return h + tap("o", mixed, p["o"].reshape(d, d), p.get("bo"))

  def _attend(self, p, h):
    if self.qkv == "fused":
      q, k, v = jnp.moveaxis(jnp.einsum("...td,dchk->...tchk", h, p["w"]) + p.get("bw", 0.0), -3, 0)
    else:
      q, k, v = (
        jnp.einsum("...td,dhk->...thk", h, w) + (0.0 if b is None else b)
        for w, b in zip(*self._parts(p, h.shape[-1]), strict=True)
      )
    return h + (jnp.einsum("...thk,hkd->...td", self._mix(q, k, v), p["o"]) + p.get("bo", 0.0))

  def spelled(self, p, h):
    return WRAPS[self.around](self._attend)(p, h)


# Products of experts: x[e, ..., i], w[e, i, o] -> [e, ..., o]; biases b[e, o] are added after it.
EXPERTS = {
  "einsum": lambda x, w: jnp.einsum("e...i,eio->e...o", x, w),
  "experts last": lambda x, w: jnp.moveaxis(
    jnp.einsum("...ei,eio->...eo", jnp.moveaxis(x, 0, -2), w), -2, 0
  ),
  "transposed": lambda x, w: jnp.einsum("e...i,oei->e...o", x, w.transpose(2, 0, 1)),
  "vmap": lambda x, w: jax.vmap(lambda x, w: x @ w)(x, w),
  "vmap of jit": lambda x, w: jax.vmap(jax.jit(lambda x, w: jnp.dot(x, w)))(x, w),
  "dot_general": lambda x, w: lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((0,), (0,)))),
  "weight left": lambda x, w: jnp.moveaxis(
    lax.dot_general(w, x, (((1,), (x.ndim - 1,)), ((0,), (0,)))), 1, -1
  ),
  "map": lambda x, w: lax.map(lambda pair: pair[0] @ pair[1], (x, w)),
  "loop": lambda x, w: jnp.stack([x[e] @ w[e] for e in range(2)]),
  "concatenate": lambda x, w: jnp.concatenate([(x[e] @ w[e])[None] for e in range(2)]),
}


@dataclasses.dataclass(frozen=True)
class Experts(Block):
  """The mean of two experts; `bias` is added outside the product, or "none", or "inside" a map.

  With `joint` all experts see the same input: that is one matrix `[i, experts * o]`.
  """

  outputs: int
  bias: str = "none"  # "outside", "vmap", "map"
  joint: str = "no"  # "einsum", "vmap"
  form: str = "einsum"

  def init(self, rng, width, tokens):
    p = {"w": _normal(rng, 2, width, self.outputs)}
    return p | ({} if self.bias == "none" else {"b": _normal(rng, 2, self.outputs)}), self.outputs

  def roles(self):
    return {"w": "layer"} | ({} if self.bias == "none" else {"b": "layer"})

  @property
  def _table(self):
    """Whether the bias is added after the outputs were stacked: a table with a row an expert."""
    stacked = self.form in ("loop", "concatenate", "map") and self.joint == "no"
    return self.bias == "outside" and stacked

  def _inputs(self, h):
    return jnp.stack([h, jnp.tanh(2.0 * h)])

  def _output(self, y):
    return jnp.mean(jnp.tanh(y), 0)

  def canonical(self, p, h, tap):
    w, b = p["w"], p.get("b")
    if self.joint != "no":
      flat = None if b is None else b.reshape(-1)
      y = tap("w", h, jnp.concatenate([w[0], w[1]], 1), flat)
      return self._output(jnp.stack(jnp.split(y, 2, -1)))
    joins = b is not None and not self._table
    xs = self._inputs(h)
    y = [tap("w", xs[e], w[e], b[e] if joins else None, e) for e in range(2)]
    y = jnp.stack(y)
    if self._table:
      rows = _between(jnp.eye(2), y)
      y += tap("b", jnp.broadcast_to(rows, (*y.shape[:-1], 2)), b)
    return self._output(y)

  def spelled(self, p, h):
    w, b = p["w"], p.get("b")
    if self.joint == "einsum":
      y = jnp.moveaxis(jnp.einsum("...d,edk->...ek", h, w) + (0.0 if b is None else b), -2, 0)
    elif self.joint == "vmap":
      y = jax.vmap(lambda w, b: h @ w + b)(w, jnp.zeros((2, 1)) if b is None else b)
    elif self.bias == "vmap":
      y = jax.vmap(lambda x, w, b: x @ w + b)(self._inputs(h), w, b)
    elif self.bias == "map":
      y = lax.map(lambda a: a[0] @ a[1] + a[2], (self._inputs(h), w, b))
    else:
      y = EXPERTS[self.form](self._inputs(h), w)
      y = y if b is None else y + _between(b, y)
    return self._output(y)


def _between(b, y):
  """Biases [e, o] with axes of size 1 between, for y[e, ..., o]."""
  return b.reshape(b.shape[0], *(1,) * (y.ndim - 2), b.shape[1])


@dataclasses.dataclass(frozen=True)
class LowRank(Block):
  """`h @ w + (h @ a) @ b + c`; "merged": `h @ (w + a @ b)`, "product": `h @ w + h @ (a @ b)`."""

  outputs: int
  form: str = "apart"  # "product", "merged", "scaled"
  bias: bool = True

  def init(self, rng, width, tokens):
    p = {"w": _normal(rng, width, self.outputs), "a": _normal(rng, width, 2)}
    p |= {"b": _normal(rng, 2, self.outputs)}
    return p | ({"c": _normal(rng, self.outputs)} if self.bias else {}), self.outputs

  def roles(self):
    adapter = "layer" if self.form in ("apart", "scaled") else "fallback"
    w = "fallback" if self.form == "merged" else "layer"
    c = {"apart": "sum", "scaled": "layer", "product": "layer", "merged": "fallback"}[self.form]
    return {"w": w, "a": adapter, "b": adapter} | ({"c": c} if self.bias else {})

  def _forward(self, p, h, tap):
    c, scale = p.get("c"), 3.0 if self.form == "scaled" else 1.0
    joins = c is not None and self.form in ("scaled", "product")
    y = tap("w", h, p["w"], c if joins else None)
    y = y + scale * tap("b", tap("a", h, p["a"]), p["b"])
    return jnp.tanh(y if joins or c is None else y + c)

  def canonical(self, p, h, tap):
    return self._forward(p, h, tap)

  def spelled(self, p, h):
    c = p.get("c", 0.0)
    if self.form == "merged":
      return jnp.tanh(h @ (p["w"] + p["a"] @ p["b"]) + c)
    if self.form == "product":
      return jnp.tanh(c + h @ p["w"] + h @ (p["a"] @ p["b"]))
    scaled = lambda y: 3.0 * y if self.form == "scaled" else y
    return jnp.tanh(h @ p["w"] + scaled(h @ p["a"] @ p["b"]) + c)


@jax.custom_vjp
def _tripled(x, w):
  return x @ w


def _tripled_backward(saved, dy):
  return jnp.einsum("...o,io->...i", dy, saved[1]), 3.0 * jnp.einsum("...i,...o->io", saved[0], dy)


_tripled.defvjp(lambda x, w: (x @ w, (x, w)), _tripled_backward)


def _mask(w):
  return jnp.arange(w.size).reshape(w.shape) % 3 > 0


# Uses of a weight that make no layer, or none yet: h[..., d], w[d, d] -> [..., d].
ODD = {
  "standardised": lambda h, w: h @ ((w - w.mean(0)) / jnp.sqrt(w.var(0) + 0.1)),
  "scaled": lambda h, w: h @ (0.5 * w),
  "negated": lambda h, w: h @ -w,
  "normalised": lambda h, w: h @ (w / jnp.linalg.norm(w)),
  "masked": lambda h, w: h @ (w * _mask(w)),
  "where": lambda h, w: h @ jnp.where(_mask(w), w, 0.0),
  "triangle": lambda h, w: h @ jnp.tril(w),
  "tanh": lambda h, w: h @ jnp.tanh(w),
  "symmetric": lambda h, w: h @ (w + w.T),
  "squared": lambda h, w: h @ (w @ w),
  "residual weight": lambda h, w: h @ (jnp.eye(w.shape[0]) + w),
  "joined and moved": lambda h, w: h @ jnp.roll(jnp.concatenate([w[1:], w[:1]]), 1, 0),
  "repeated": lambda h, w: jnp.einsum(
    "e...i,eio->...o", jnp.stack([h, h * h]), jnp.tile(w, (2, 1, 1))
  ),
  "repeated in scan": lambda h, w: lax.scan(
    lambda h, w: (jnp.tanh(h @ w), None), h, jnp.broadcast_to(w, (2, *w.shape))
  )[0],
  "overlapping": lambda h, w: jnp.concatenate([h @ w[:, :-1], h @ w[:, 1:2]], -1),
  "whole and part": lambda h, w: h @ w + h[..., :1] @ w[:1],
  "gathered": lambda h, w: h @ w[jnp.arange(w.shape[0])[::-1]],
  "traced slice": lambda h, w: h @ lax.dynamic_slice(w, (jnp.argmin(w[0]) * 0, 0), w.shape),
  "cond": lambda h, w: lax.cond(w.sum() > 0, lambda w: h @ w, lambda w: h @ w.T, w),
  "custom_vjp": _tripled,
  "custom_jvp of w": lambda h, w: h @ _bent(w),
  "view in custom_vjp": lambda h, w: _tripled(h, w.T),
  "carried": lambda h, w: lax.scan(
    lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.5 * c[1]), None), (h, w), None, 2
  )[0][0],
  "out of scan": lambda h, w: h @ lax.scan(lambda c, r: (c, jnp.sin(r)), 0.0, w)[1],
  "entries": lambda h, w: h * w[:, 0],
  "frozen": lambda h, w: h @ lax.stop_gradient(w),
  "checkpointed penalty": lambda h, w: h @ w * jax.checkpoint(lambda w: jnp.mean(w * w))(w),
  "quadratic": lambda h, w: h * jnp.sum(jnp.ones(w.shape[0]) @ w),
  "read by product": lambda h, w: h @ w + jnp.ones(w.shape[0]) @ w,
}


@dataclasses.dataclass(frozen=True)
class Odd(Block):
  """A weight used as no layer can be, maybe `besides` a product; nor is the bias after it one."""

  use: str
  bias: bool = False
  besides: bool = False

  def init(self, rng, width, tokens):
    p = {"w": _normal(rng, width, width)}
    return p | ({"b": _normal(rng, width)} if self.bias else {}), width

  def roles(self):
    return {"w": "fallback"} | ({"b": "fallback"} if self.bias else {})

  def spelled(self, p, h):
    y = ODD[self.use](h, p["w"])
    if self.besides and self.use != "frozen":  # no gradient comes through that: a layer
      y = y + h @ p["w"]
    return jnp.tanh(y + p.get("b", 0.0))

  def canonical(self, p, h, tap):
    return self.spelled(p, h)


@dataclasses.dataclass(frozen=True)
class Norm(Block):
  """LayerNorm with scale and shift, which are no layers; `after` a product of a layer."""

  after: bool = False

  def init(self, rng, width, tokens):
    p = {"scale": 1 + _normal(rng, width), "shift": _normal(rng, width)}
    return p | ({"w": _normal(rng, width, width)} if self.after else {}), width

  def roles(self):
    return {"scale": "fallback", "shift": "fallback"} | ({"w": "layer"} if self.after else {})

  def canonical(self, p, h, tap):
    h = tap("w", h, p["w"]) if self.after else h
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
    return h * p["scale"] + p["shift"]

  def spelled(self, p, h):
    return self.canonical(p, h, lambda name, x, w: x @ w)


@dataclasses.dataclass(frozen=True)
class Embed(Block):
  """Adds rows of a table: "gather", "take", or products with "onehot" vectors."""

  look_up: str = "gather"

  def init(self, rng, width, tokens):
    return {"w": _normal(rng, 2, width)}, width

  def roles(self):
    return {"w": "layer"}

  def _ids(self, h):
    return (h[..., 0] > 0).astype(int)

  def canonical(self, p, h, tap):
    return h + tap("w", jax.nn.one_hot(self._ids(h), 2, dtype=h.dtype), p["w"])

  def spelled(self, p, h):
    ids = self._ids(h)
    if self.look_up == "onehot":
      return h + jnp.einsum("...i,io->...o", jax.nn.one_hot(ids, 2, dtype=h.dtype), p["w"])
    return h + (p["w"][ids] if self.look_up == "gather" else jnp.take(p["w"], ids, axis=0))


@dataclasses.dataclass(frozen=True)
class Joined(Block):
  """A product with several parameters joined along its inputs or its outputs."""

  axis: int = 0
  late: bool = False  # transposed after they were joined

  def init(self, rng, width, tokens):
    w = _normal(rng, width, width)
    first, second = np.split(w, [width // 2], self.axis)
    return {"first": first, "second": second}, width

  def roles(self):
    return {"first": "layer", "second": "layer"}

  def canonical(self, p, h, tap):
    if self.axis == 1:
      return jnp.tanh(
        jnp.concatenate([tap("first", h, p["first"]), tap("second", h, p["second"])], -1)
      )
    left, right = jnp.split(h, [p["first"].shape[0]], -1)
    return jnp.tanh(tap("first", left, p["first"]) + tap("second", right, p["second"]))

  def spelled(self, p, h):
    if self.late:
      w = jnp.concatenate([p["first"].T, p["second"].T], 1 - self.axis).T
    else:
      w = jnp.concatenate([p["first"], p["second"]], self.axis)
    return jnp.tanh(h @ w)


@dataclasses.dataclass(frozen=True)
class Convolve(Block):
  """A convolution over tokens: kernels of 1 to 3, strides, dilation, groups, two layouts."""

  kernel: int = 3
  stride: int = 1
  dilation: int = 1
  groups: int = 1
  padding: tuple[int, int] = (1, 1)
  first: bool = False  # channels before tokens
  bias: bool = True

  def init(self, rng, width, tokens):
    p = {"w": _normal(rng, self.kernel, width // self.groups, width)}
    return p | ({"b": _normal(rng, width)} if self.bias else {}), width

  def roles(self):
    return {"w": "layer"} | ({"b": "layer"} if self.bias else {})

  def canonical(self, p, h, tap):
    x = h.reshape(-1, *h.shape[-2:])
    x = jnp.pad(x, [(0, 0), self.padding, (0, 0)])
    size = (x.shape[1] - (self.kernel - 1) * self.dilation - 1) // self.stride + 1
    reach = (size - 1) * self.stride + 1
    taken = [x[:, k * self.dilation :][:, : reach : self.stride] for k in range(self.kernel)]
    pieces = jnp.stack(taken, 2)  # [n, place, kernel, feature]
    i, o = p["w"].shape[1], p["w"].shape[2] // self.groups
    out = []
    for g in range(self.groups):
      rows = pieces[..., g * i : (g + 1) * i].reshape(*pieces.shape[:2], -1)
      w = p["w"][..., g * o : (g + 1) * o].reshape(-1, o)
      out.append(tap("w", rows, w, p["b"][g * o : (g + 1) * o] if self.bias else None, g))
    y = jnp.tanh(jnp.concatenate(out, -1)).mean(1, keepdims=True)
    return h + y.reshape(*h.shape[:-2], 1, -1)

  def spelled(self, p, h):
    x = h.reshape(-1, *h.shape[-2:])
    numbers = ("NHC", "HIO", "NHC")
    if self.first:
      x, numbers = x.swapaxes(1, 2), ("NCH", "HIO", "NCH")
    y = lax.conv_general_dilated(
      x,
      p["w"],
      (self.stride,),
      [self.padding],
      rhs_dilation=(self.dilation,),
      dimension_numbers=numbers,
      feature_group_count=self.groups,
    )
    if self.bias:
      y = y + (p["b"][:, None] if self.first else p["b"])
    y = jnp.tanh(y.swapaxes(1, 2) if self.first else y).mean(1, keepdims=True)
    return h + y.reshape(*h.shape[:-2], 1, -1)


# What goes around a group of blocks, acting on h[..., tokens, width].
AROUND = {
  "jit": lambda f: jax.jit(f),
  "checkpoint": lambda f: jax.checkpoint(f),
  "checkpoint in jit": lambda f: jax.jit(jax.checkpoint(f)),
  "twice the batch": lambda f: lambda p, h: f(p, jnp.stack([h, h]))[0],
  "vmap": lambda f: lambda p, h: jax.vmap(lambda h: f(p, h[None])[0])(h),
  "vmap in, last axis out": lambda f: (
    lambda p, h: jnp.moveaxis(jax.vmap(lambda h: f(p, h[None])[0], out_axes=-1)(h), -1, 0)
  ),
  "map": lambda f: lambda p, h: lax.map(lambda h: f(p, h[None])[0], h),
  "scan of checkpoints": lambda f: (
    lambda p, h: lax.scan(jax.checkpoint(lambda c, h: (c, f(p, h[None])[0])), 0.0, h)[1]
  ),
  "scan of one": lambda f: lambda p, h: lax.scan(lambda c, _: (c, f(p, h)), 0.0, None, 1)[1][0],
}


@dataclasses.dataclass(frozen=True)
class Blocks(Block):
  """Blocks in a row, on two branches ("sum", "gate"), or around a shortcut ("residual")."""

  blocks: tuple[Any, ...]
  how: str = "row"
  around: str = "none"

  def init(self, rng, width, tokens):
    p, row, widths = {}, self.how in ("row", "residual"), [width]
    for i, block in enumerate(self.blocks):
      p[f"b{i}"], out = block.init(rng, widths[-1] if row else width, tokens)
      widths.append(out)
    return p, widths[-1] if row else widths[1]

  def roles(self):
    return {f"b{i}": block.roles() for i, block in enumerate(self.blocks)}

  def _join(self, h, branches):
    if self.how in ("row", "residual"):
      out = functools.reduce(lambda h, f: f(h), branches, h)
      return out + h if self.how == "residual" and out.shape == h.shape else out
    a, b = (f(h) for f in branches)
    if a.shape != b.shape:
      return a + b.sum(-1, keepdims=True)
    return a + b if self.how == "sum" else a * jax.nn.sigmoid(b)

  def canonical(self, p, h, tap):
    def branch(i, block):
      inner = lambda name, *args: tap(f"b{i}/{name}", *args)
      return lambda h: block.canonical(p[f"b{i}"], h, inner)

    return self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])

  def spelled(self, p, h):
    def run(p, h):
      branch = lambda i, block: lambda h: block.spelled(p[f"b{i}"], h)
      return self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])

    return run(p, h) if self.around == "none" else AROUND[self.around](run)(p, h)

  def penalty(self, p):
    return sum(block.penalty(p[f"b{i}"]) for i, block in enumerate(self.blocks))


def _cross_entropy(z, y):
  return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]


def _pooled(z, y):
  """One prediction and one label an example."""
  return z.reshape(len(z), -1, CLASSES).mean(1), y.reshape(len(y), -1)[:, 0]


def _one_by_one(loss):
  return lambda z, y: jnp.mean(loss(lambda zy: fop_optax.softmax_cross_entropy(*zy))((z, y)))


# Mean losses of z[N, ..., C] and labels y[N, ...]: (plainly, as spelled, whether R is T).
LOSSES = {
  "marked": (lambda z, y: _cross_entropy(z, y).mean(), fop_optax.softmax_cross_entropy, True),
  "mean": (lambda z, y: _cross_entropy(z, y).mean(), None, True),
  "summed over tokens": (
    lambda z, y: _cross_entropy(z, y).reshape(len(z), -1).sum(1).mean(),
    None,
    False,
  ),
  "squared": (
    lambda z, y: 0.5 * ((z - jax.nn.one_hot(y, CLASSES)) ** 2).sum(-1).mean(),
    lambda z, y: fop_optax.squared_error(z, jax.nn.one_hot(y, CLASSES, dtype=z.dtype)),
    True,
  ),
  "vmap": (lambda z, y: _cross_entropy(z, y).mean(), _one_by_one(jax.vmap), True),
  "map": (
    lambda z, y: _cross_entropy(z, y).mean(),
    _one_by_one(lambda f: functools.partial(lax.map, f)),
    True,
  ),
  "pooled": (
    lambda z, y: _cross_entropy(*_pooled(z, y)).mean(),
    lambda z, y: fop_optax.softmax_cross_entropy(*_pooled(z, y)),
    False,
  ),
}


@dataclasses.dataclass(frozen=True)
class Network:
  """A network, its loss, and how it is captured."""

  body: Blocks
  tokens: int = 0  # of an example; 0: no token axis
  loss: str = "marked"
  groups: int = 2
  micro_batches: int = 1
  refresh: str = "true"  # "both", each compiled, or "traced"
  aux: bool = False
  unused: bool = False  # a parameter that only metrics in aux read
  seed: int = 0

  @property
  def terms(self) -> int:
    """R, the number of terms the mean loss has for an example."""
    return max(self.tokens, 1) if LOSSES[self.loss][2] else 1

  def data(self):
    """Parameters, inputs and labels."""
    rng = np.random.default_rng(self.seed)
    params, _ = self.body.init(rng, WIDTHS[0], self.tokens)
    if self.unused:
      params = {"temperature": _normal(rng, CLASSES)} | params
    examples = EXAMPLES * self.groups
    shape = (examples, self.tokens) if self.tokens else (examples,)
    x, y = rng.normal(size=(*shape, WIDTHS[0])), rng.integers(CLASSES, size=shape)
    return jax.tree.map(jnp.asarray, (params, x, y))

  def roles(self):
    return self.body.roles() | ({"temperature": "fallback"} if self.unused else {})

  def canonical(self, params, x, y, tap):
    """The mean loss, with taps."""
    z = self.body.canonical(params, x, tap)
    return LOSSES[self.loss][0](z, y) + self.body.penalty(params)

  def spelled(self, params, x, y):
    """The mean loss, and with `aux` a pair."""
    z = self.body.spelled(params, x)
    plain, marked, _ = LOSSES[self.loss]
    loss = (marked or plain)(z, y) + self.body.penalty(params)
    if not self.aux:
      return loss
    norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    metric = jnp.mean(z @ params["temperature"]) if self.unused else 0.0
    return loss, {"loss": loss, "doubled": 2 * x, "norm": norm, "metric": metric}


# What a network is drawn from: for each kind of block how often it comes, and values of its fields.

_WRAP = ["none"] * 5 + list(WRAPS)
SPELLING = {"product": PRODUCTS, "sum": SUMS} | dict.fromkeys(
  ["around_product", "around_sum", "around_both"], _WRAP
)


def _spelling(rng):
  return _draw(rng, Spelling, SPELLING)


def _second_spelling(rng):
  return rng.choice([None, _spelling(rng)])


DENSE = {
  "outputs": WIDTHS,
  "bias": ["none", "bias", "bias"],
  "stored": STORED,
  "reading": range(3),
  "spelling": _spelling,
  "residual": ["none", "before", "after"],
  "activation": ACTIVATIONS,
  "single": [False, False, False, True],
}
BLOCKS = [
  (6, Dense, DENSE),
  (1.5, Dense, DENSE | {"bias": BIAS_TRAPS}),
  (1, Dense, DENSE | {"penalty_on_w": PENALTIES}),
  (0.3, Dense, DENSE | {"bias": ["bias"], "penalty_on_b": ["l2"]}),
  (
    3,
    Shared,
    {
      "times": [2, 3],
      "bias": ["none", "same", "same", "some"],
      "repeat": REPEATS,
      "stored": STORED,
      "spelling": _spelling,
      "last": _second_spelling,
    },
  ),
  (
    4,
    Stack,
    {
      "layers": [2, 4],
      "bias": ["none", "stacked", "stacked", "shared"],
      "form": STACKS,
      "stored": STACKED,
      "spelling": _spelling,
    },
  ),
  (
    2,
    Experts,
    {
      "outputs": WIDTHS,
      "bias": ["none", "outside", "vmap", "map"],
      "joint": ["no", "no", "no", "einsum", "vmap"],
      "form": EXPERTS,
    },
  ),
  (
    1,
    LowRank,
    {
      "outputs": WIDTHS,
      "form": ["apart", "scaled", "product", "merged"],
      "bias": [True, False],
    },
  ),
  (4, Odd, {"use": ODD, "bias": [True, False], "besides": [True, False]}),
  (1, Norm, {"after": [True, False]}),
  (1, Embed, {"look_up": ["gather", "take", "onehot"]}),
  (1, Joined, {"axis": [0, 1], "late": [True, False]}),
]
TOKEN_BLOCKS = [
  (
    3,
    Convolve,
    {
      "kernel": [1, 2, 3],
      "stride": [1, 2],
      "dilation": [1, 1, 2],
      "groups": [1, 1, 2],
      "padding": [(2, 2), (1, 2), (2, 1)],
      "first": [True, False],
      "bias": [True, False],
    },
  ),
  (0.5, Dense, DENSE | {"bias": ["positions"]}),
  (
    3,
    Recurrent,
    {
      "outputs": WIDTHS,
      "bias": ["none", "sum", "input", "state"],
      "form": ["scan", "loop", "precomputed", "joint"],
      "checkpoint": [True, False],
      "reverse": [True, False],
      "spelling": _spelling,
    },
  ),
  (3, Attention, {"qkv": [*QKV, "apart", "fused"], "bias": [True, False], "around": _WRAP}),
]
HEAD = {
  "outputs": [CLASSES],
  "bias": ["bias", "none"],
  "stored": ["plain", "transposed", "flat", "leading"],
  "activation": ["softplus"],
}
NETWORK = {
  "loss": LOSSES,
  "groups": [1, 2, 2, 2, 3],
  "micro_batches": [1, 1, 2],
  "refresh": ["true", "both", "traced"],
  "seed": range(100),
}


def _draw(rng, kind, options, **fields):
  """`kind` with each field drawn from a list, or by a function of `rng`."""
  for name, values in options.items():
    fields[name] = values(rng) if callable(values) else rng.choice(list(values))
  return kind(**fields)


def _block(rng, tokens):
  table = BLOCKS + (TOKEN_BLOCKS if tokens else [])
  ((_, kind, options),) = rng.choices(table, [weight for weight, *_ in table])
  return _draw(rng, kind, options)


def _tree(rng, tokens):
  """A block, or two of them joined."""
  if rng.random() < 2 / 3:
    return _block(rng, tokens)
  blocks = (_block(rng, tokens), _block(rng, tokens))
  return Blocks(blocks, rng.choice(["row", "residual", "sum", "gate"]), _around(rng))


def _around(rng):
  return rng.choice(["none", rng.choice(list(AROUND))])


def draw_network(rng) -> Network:
  """A random network, from a `random.Random`."""
  tokens, aux = rng.choice([0, 4]), rng.choice([True, False])
  body = [_tree(rng, tokens) for _ in range(rng.choice([1, 2]))]
  return _draw(
    rng,
    Network,
    NETWORK,
    body=Blocks((*body, _draw(rng, Dense, HEAD)), around=_around(rng)),
    tokens=tokens,
    aux=aux,
    unused=aux and rng.choice([True, False]),
  )


# Drawn evenly: left to itself, hypothesis repeats and varies a few of the many options.
networks = st.randoms(use_true_random=True).map(draw_network)

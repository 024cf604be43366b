"""Blocks whose weights are used several times or stacked: loops, scans, experts."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from networks.blocks import Block
from networks.spelling import STORED, Spelling, normal, read

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
    p = {"w": STORED[self.stored][0](normal(rng, width, width))}
    return p | ({} if self.bias == "none" else {"b": normal(rng, width)}), width

  def roles(self):
    both = {self.spelling.bias, (self.last or self.spelling).bias}
    role = {"same": "either" if "either" in both else "layer", "some": self.spelling.bias}
    bias = {} if self.bias == "none" else {"b": role[self.bias]}
    products = {self.spelling.product, (self.last or self.spelling).product}
    if len(products) > 1 and any("swapped" in product for product in products):
      return dict.fromkeys(["w", *bias], "either")  # features in two orders
    return {"w": "layer"} | bias

  def canonical(self, p, h, tap):
    w = read(self.stored, p["w"], h.shape[-1])
    for use in range(self.times):
      without = self.bias == "some" and use == self.times - 1
      h = jnp.tanh(tap("w", h, w, None if without else p.get("b")))
    return h

  def spelled(self, p, h):
    w, b = read(self.stored, p["w"], h.shape[-1], 1), p.get("b")
    step = lambda spelling: lambda h, w, b: jnp.tanh(spelling(h, w, b))
    apart = self.last is not None or self.bias == "some"
    h = REPEATS[self.repeat](step(self.spelling), h, w, b, self.times - apart)
    last = None if self.bias == "some" else b
    return step(self.last or self.spelling)(h, w, last) if apart else h


def scan(step, h, ws, **kwargs):
  return lax.scan(lambda h, w: (step(h, *w), None), h, ws, **kwargs)[0]


def pairs(ws, n):
  return jax.tree.map(lambda w: w.reshape(2, n // 2, *w.shape[1:]), ws)


def places(ws, n):
  return [[w[i] for w in ws] for i in range(n)]


def loop(step, h, each):
  return functools.reduce(lambda h, w: step(h, *w), each, h)


def _nested(step, h, ws, wrap=lambda f: f):
  return scan(wrap(lambda h, *ws: scan(step, h, ws)), h, ws)


# How a stack of layers is gone through: `step(h, w, b)` with slices of the stacked `ws = (w, b)`.
# Beside each the order in which the layers come, as a function of their number.
STACKS = {
  "index": (lambda step, h, ws, n: loop(step, h, places(ws, n)), range),
  "negative index": (
    lambda step, h, ws, n: loop(step, h, [[w[i - n] for w in ws] for i in range(n)]),
    range,
  ),
  "iterate": (lambda step, h, ws, n: loop(step, h, zip(*ws, strict=True)), range),
  "split": (
    lambda step, h, ws, n: loop(
      step, h, zip(*[[a[0] for a in jnp.split(w, n)] for w in ws], strict=True)
    ),
    range,
  ),
  "scan": (lambda step, h, ws, n: scan(step, h, ws), range),
  "checkpoint": (lambda step, h, ws, n: scan(jax.checkpoint(step), h, ws), range),
  "scan in jit": (lambda step, h, ws, n: jax.jit(functools.partial(scan, step))(h, ws), range),
  "scan in checkpoint": (
    lambda step, h, ws, n: jax.checkpoint(functools.partial(scan, step))(h, ws),
    range,
  ),
  "unrolled": (lambda step, h, ws, n: scan(step, h, ws, unroll=2), range),
  "reverse": (
    lambda step, h, ws, n: scan(step, h, ws, reverse=True),
    lambda n: reversed(range(n)),
  ),
  "flipped": (
    lambda step, h, ws, n: scan(step, h, jax.tree.map(lambda w: w[::-1], ws)),
    lambda n: reversed(range(n)),
  ),
  "nested": (lambda step, h, ws, n: _nested(step, h, pairs(ws, n)), range),
  "nested checkpoints": (
    lambda step, h, ws, n: _nested(jax.checkpoint(step), h, pairs(ws, n), jax.checkpoint),
    range,
  ),
  "two scans": (
    lambda step, h, ws, n: scan(
      step, scan(step, h, [w[: n // 2] for w in ws]), [w[n // 2 :] for w in ws]
    ),
    range,
  ),
  "scan of pairs": (
    lambda step, h, ws, n: scan(lambda h, *ws: loop(step, h, places(ws, 2)), h, _pairs_of(ws)),
    range,
  ),
  "each twice": (
    lambda step, h, ws, n: scan(lambda h, *w: loop(step, h, [w, w]), h, ws),
    lambda n: np.repeat(range(n), 2),
  ),
  "each twice, scanned": (
    lambda step, h, ws, n: scan(
      lambda h, *w: lax.scan(lambda h, _: (step(h, *w), None), h, None, 2)[0], h, ws
    ),
    lambda n: np.repeat(range(n), 2),
  ),
  "all twice": (
    lambda step, h, ws, n: lax.scan(lambda h, _: (scan(step, h, ws), None), h, None, 2)[0],
    lambda n: np.tile(range(n), 2),
  ),
  "all twice, apart": (
    lambda step, h, ws, n: scan(step, scan(step, h, ws), ws),
    lambda n: np.tile(range(n), 2),
  ),
  "forth and back": (
    lambda step, h, ws, n: scan(step, scan(step, h, ws), ws, reverse=True),
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
    p = {"w": STACKED[self.stored][0](normal(rng, self.layers, width, width))}
    shape = {"stacked": (self.layers, width), "shared": (width,)}
    return p | ({"b": normal(rng, *shape[self.bias])} if self.bias in shape else {}), width

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
    p = {"w": normal(rng, 2, width, self.outputs)}
    return p | ({} if self.bias == "none" else {"b": normal(rng, 2, self.outputs)}), self.outputs

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
      rows = between(jnp.eye(2), y)
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
      y = y if b is None else y + between(b, y)
    return self._output(y)


def between(b, y):
  """Biases [e, o] with axes of size 1 between, for y[e, ..., o]."""
  return b.reshape(b.shape[0], *(1,) * (y.ndim - 2), b.shape[1])

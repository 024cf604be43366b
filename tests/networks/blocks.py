"""Blocks with weights of their own. Each has: init(rng, width, tokens) -> (parameters, width of the
output), roles(), canonical(p, h, tap), spelled(p, h); and maybe penalty(p), a term of the loss."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from networks.spelling import (
  ACTIVATIONS,
  EXAMPLES,
  STORED,
  SUMS,
  Spelling,
  bent,
  normal,
  read,
)


class Block:
  def penalty(self, p, tap):
    return 0.0


def untapped(name, x, w, b=None, *, coordinate=1.0, **role):
  """In place of a tap."""
  return x @ w if b is None else x @ w + coordinate * b


# A bias times a number: y, b -> y, and the number.
BIAS_NUMBERS = {
  "minus": (lambda y, b: y - b, -1.0),
  "scaled": (lambda y, b: y + 2.0 * b, 2.0),
  "over a number, left": (lambda y, b: -(b / 4) + y, -0.25),
}

# A bias that is none, and what it does instead: y, b -> y.
BIAS_TRAPS = {
  "after activation": lambda y, b: jnp.tanh(y) + b,
  "read twice": lambda y, b: y + b + jnp.sin(b),
  "sum read twice": lambda y, b: (y + b) * y,
  "scalar": lambda y, b: y + b,
  "one": lambda y, b: y + b,
  "maximum": lambda y, b: jnp.maximum(y, b),
  "half": lambda y, b: y + jnp.concatenate([b, b]),
}

# Of `STORED`, those with an axis of the matrix last, and entries in its order: a product with a
# constant reads the same matrix. Of the others it reads another one, and is no more than a penalty.
WHOLE_COLUMNS = ("plain", "transposed", "leading", "middle", "rows")

# Terms of the loss without the batch, of w[i, o] as it is kept.
PENALTIES = {
  "l2": lambda w: 0.05 * jnp.sum(w**2),
  "frobenius": lambda w: 0.05 * jnp.sqrt(jnp.sum(w * w) + 1.0),
  "scan": lambda w: 0.1 * lax.scan(lambda c, r: (c + jnp.sum(r**2), None), 0.0, w)[0],
  "gram": lambda w: 0.1 * jnp.sum(jnp.tensordot(w, w, ((0,), (0,))) ** 2),
  "cond": lambda w: lax.cond(w.sum() > 0, lambda w: 0.1 * jnp.sum(w**4), jnp.max, w),
}


@dataclasses.dataclass(frozen=True)
class Dense(Block):
  """`act(x @ w + b)`; `bias` is "none", "bias", "positions" (a table), or one of `BIAS_NUMBERS` or
  `BIAS_TRAPS`; `penalty_on_w` one of `PENALTIES` or "spectral", a product with a fixed row."""

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
    p = {"w": STORED[self.stored][0](normal(rng, width, self.outputs))}
    shape = {"positions": (tokens, self.outputs), "scalar": (), "one": (1,)}
    shape["half"] = (self.outputs // 2,)
    if self.bias != "none":
      p["b"] = normal(rng, *shape.get(self.bias, (self.outputs,)))
    if self.single:
      p = {name: np.float32(value) for name, value in p.items()}
    return p, self.outputs

  def roles(self):
    joins = self.bias == "bias" or self.bias in BIAS_NUMBERS
    bias = {} if self.bias == "none" else {"b": self.spelling.bias if joins else "fallback"}
    return {"w": "layer"} | ({"b": "layer"} if self.bias == "positions" else bias)

  def _finish(self, y, h, b, join):
    """What comes after the product: the residual, and a bias that is not added by `join`."""
    if self.residual == "before" and y.shape == h.shape:
      y = y + h
    if self.bias in BIAS_NUMBERS and join:
      y = BIAS_NUMBERS[self.bias][0](y, b)
    elif self.bias in BIAS_TRAPS:
      y = BIAS_TRAPS[self.bias](y, b)
    elif join:
      y = join(y, b)
    if self.residual == "after" and y.shape == h.shape:
      y = h + y
    return ACTIVATIONS[self.activation](y)

  def canonical(self, p, h, tap):
    w, b = read(self.stored, p["w"], h.shape[-1]), p.get("b")
    if self.bias == "positions":
      rows = lambda y: jnp.broadcast_to(jnp.eye(len(b)), (*y.shape[:-1], len(b)))
      return self._finish(tap("w", h, w), h, b, lambda y, b: y + tap("b", rows(y), b))
    joins = self.bias == "bias" or self.bias in BIAS_NUMBERS
    number = BIAS_NUMBERS[self.bias][1] if self.bias in BIAS_NUMBERS else 1.0
    y = tap("w", h, w, b if joins else None, coordinate=number)
    return self._finish(y, h, b, None if joins or b is None else jnp.add)

  def spelled(self, p, h):
    w, b = read(self.stored, p["w"], h.shape[-1], self.reading), p.get("b")
    if self.bias != "bias" or self.residual == "before":
      join = None if b is None else SUMS[self.spelling.sum]
      return self._finish(self.spelling(h, w), h, b, jnp.add if self.bias == "positions" else join)
    return self._finish(self.spelling(h, w, b), h, b, None)

  def penalty(self, p, tap):
    on = ((self.penalty_on_w, p["w"]), (self.penalty_on_b, p.get("b")))
    total = sum(PENALTIES[kind](a) for kind, a in on if kind in PENALTIES)
    if self.penalty_on_w != "spectral":
      return total
    w = p["w"]
    if tap is untapped or self.stored not in WHOLE_COLUMNS:
      return total + 0.1 * jnp.sum((w @ jnp.ones(w.shape[-1], w.dtype)) ** 2)
    w, turned = read(self.stored, w, w.size // w.shape[-1]), self.stored != "transposed"
    w = w.T if turned else w
    y = tap("w", jnp.ones((1, len(w)), w.dtype), w, fixed=True, turned=turned)
    return total + 0.1 * jnp.sum(y**2)


# Numbers beside a weight and a bias: `k (x (c w)) + s b` as a product of w or y with a number, and
# (c, k, s).
NUMBERS = {
  "weight doubled": (lambda x, w, b: x @ (2 * w) + b, (2.0, 1.0, 1.0)),
  "equalised": (lambda x, w, b: x @ (w / jnp.sqrt(x.shape[-1])) + 0.1 * b, (None, 1.0, 0.1)),
  "product halved": (lambda x, w, b: 0.5 * (x @ w) + b, (1.0, 0.5, 1.0)),
  "whole output": (lambda x, w, b: (x @ w + b) / 4, (1.0, 0.25, 0.25)),
  "negated": (lambda x, w, b: b - x @ w, (1.0, -1.0, 1.0)),
  "array of one number": (
    lambda x, w, b: x @ (w * jnp.full(w.shape, 3.0, w.dtype)) - b * 2,
    (3.0, 1.0, -2.0),
  ),
  "in a map": (
    lambda x, w, b: lax.map(lambda row: row @ (w * 4) + b, x.reshape(-1, x.shape[-1])).reshape(
      *x.shape[:-1], -1
    ),
    (4.0, 1.0, 1.0),
  ),
  "after a reshape": (
    lambda x, w, b: (
      -((x @ w.reshape(1, *w.shape)[0] + 3 * b).reshape(-1, w.shape[1])).reshape(*x.shape[:-1], -1)
    ),
    (1.0, -1.0, -3.0),
  ),
}


@dataclasses.dataclass(frozen=True)
class Numbered(Block):
  """A product and a sum with a bias in which one of `NUMBERS` stands."""

  outputs: int
  number: str

  def init(self, rng, width, tokens):
    return {"w": normal(rng, width, self.outputs), "b": normal(rng, self.outputs)}, self.outputs

  def roles(self):
    return {"w": "layer", "b": "layer"}

  def spelled(self, p, h):
    return jnp.tanh(NUMBERS[self.number][0](h, p["w"], p["b"]))

  def canonical(self, p, h, tap):
    c, k, s = NUMBERS[self.number][1]
    c = c or h.shape[-1] ** -0.5
    return jnp.tanh(k * tap("w", c * h, p["w"], p["b"], coordinate=s / k))


# Derivatives of a function of one example, or of all, along v: f, h, v -> (f(h), D f(h) v).
FORWARD = {
  "jvp": lambda f, h, v: jax.jvp(f, (h,), (jnp.broadcast_to(v, h.shape),)),
  "jvp each": lambda f, h, v: jax.vmap(lambda h: jax.jvp(f, (h,), (jnp.broadcast_to(v, h.shape),)))(
    h
  ),
  "linearize": lambda f, h, v: (lambda y, g: (y, g(jnp.ones_like(h) * v)))(*jax.linearize(f, h)),
  "checkpoint": lambda f, h, v: jax.vmap(
    lambda h: jax.jvp(jax.checkpoint(f), (h,), (jnp.broadcast_to(v, h.shape),))
  )(h),
  "jit": lambda f, h, v: jax.vmap(
    jax.jit(lambda h: jax.jvp(f, (h,), (jnp.broadcast_to(v, h.shape),)))
  )(h),
}
# Gradients of a sum of its outputs times v: f, h, v -> (f(h), v' D f(h)).
REVERSE = {
  "vjp": lambda f, h, v: (lambda y, g: (y, g(jnp.broadcast_to(v, y.shape))[0]))(*jax.vjp(f, h)),
  "grad each": lambda f, h, v: jax.vmap(lambda h: (f(h), jax.grad(lambda h: jnp.sum(f(h) * v))(h)))(
    h
  ),
}


@dataclasses.dataclass(frozen=True)
class Derivative(Block):
  """A dense layer plus its derivative along a constant, in one of `FORWARD` or `REVERSE`."""

  form: str
  linear: bool = False  # without an activation: constants in reverse, too
  bias: bool = True
  spelling: Spelling = Spelling()

  def init(self, rng, width, tokens):
    p = {"w": normal(rng, width, width)}
    return p | ({"b": normal(rng, width)} if self.bias else {}), width

  def roles(self):
    spelling = self.spelling
    around = (spelling.around_product, spelling.around_sum, spelling.around_both)
    checkpoints = any("checkpoint" in wrap or "saved" in wrap for wrap in around)
    # what a checkpoint is differentiated to, a pass of its own, or constants row by row: left alone
    left = spelling.product == "map" or (checkpoints and "jvp" not in self.form)
    return dict.fromkeys(("w", "b") if self.bias else ("w",), "either" if left else "layer")

  def _direction(self, h):
    return jnp.cos(jnp.arange(h.shape[-1], dtype=h.dtype) + 1)

  def spelled(self, p, h):
    act = (lambda y: y) if self.linear else jnp.tanh
    f = lambda h: act(self.spelling(h[None], p["w"], p.get("b")))[0]
    y, along = (FORWARD | REVERSE)[self.form](f, h, self._direction(h))
    return jnp.tanh(y + along)

  def canonical(self, p, h, tap):
    mapped = self.spelling.product == "map"  # then the bias is in no layer
    joined, added = (None, p.get("b", 0.0)) if mapped else (p.get("b"), 0.0)
    forward = lambda: tap("w", h, p["w"], joined) + added
    y = forward()
    y, slope = (y, 1.0) if self.linear else (jnp.tanh(y), 1 - jnp.tanh(y) ** 2)
    v = jnp.broadcast_to(self._direction(h), h.shape)
    if self.form in FORWARD:
      if self.form not in ("jvp", "linearize") and h.shape[0] != EXAMPLES:
        v = v[0]  # what a `vmap` over something else does not repeat
      return jnp.tanh(y + slope * tap("w", v, p["w"]))
    if self.form == "grad each" and not self.linear:  # the gradient has a forward pass of its own
      slope = 1 - jnp.tanh(forward()) ** 2
    return jnp.tanh(y + tap("w", v * slope, p["w"].T, turned=True))


@dataclasses.dataclass(frozen=True)
class LowRank(Block):
  """`h @ w + (h @ a) @ b + c`; "merged": `h @ (w + a @ b)`, "product": `h @ w + h @ (a @ b)`."""

  outputs: int
  form: str = "apart"  # "product", "merged", "scaled"
  bias: bool = True

  def init(self, rng, width, tokens):
    p = {"w": normal(rng, width, self.outputs), "a": normal(rng, width, 2)}
    p |= {"b": normal(rng, 2, self.outputs)}
    return p | ({"c": normal(rng, self.outputs)} if self.bias else {}), self.outputs

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


def _repeated(row, h, w, tap):
  """A constant row in every example, times `w`."""
  axis = h.shape.index(EXAMPLES)
  shape = [EXAMPLES if i == axis else 1 for i in range(h.ndim - 1)]
  return tap(jnp.broadcast_to(row, (*shape, len(row))), w)


def _gated(y, z):
  return y * jnp.tanh(z)


# Uses of a weight that are less plain than a product with it, and those products in them:
# h[..., d], w[d, d] -> [..., d].
VIEWS = {
  "scaled": (lambda h, w: h @ (0.5 * w), lambda h, w, tap: tap(0.5 * h, w)),
  "negated": (lambda h, w: h @ -w, lambda h, w, tap: tap(-h, w)),
  "over a number": (lambda h, w: h @ (w / -4), lambda h, w, tap: tap(-0.25 * h, w)),
  "residual weight": (
    lambda h, w: h @ (jnp.eye(w.shape[0]) + w),
    lambda h, w, tap: h + tap(h, w),
  ),
  "joined and moved": (
    lambda h, w: h @ jnp.roll(jnp.concatenate([w[1:], w[:1]]), 1, 0),
    lambda h, w, tap: tap(h, w),
  ),
  "gathered": (
    lambda h, w: h @ w[jnp.arange(w.shape[0])[::-1]],
    lambda h, w, tap: tap(h[..., ::-1], w),
  ),
  "repeated": (
    lambda h, w: jnp.einsum("e...i,eio->...o", jnp.stack([h, h * h]), jnp.tile(w, (2, 1, 1))),
    lambda h, w, tap: tap(h + h * h, w),
  ),
  "rows repeated": (
    lambda h, w: jnp.concatenate([h, h * h], -1) @ jnp.repeat(w, 2, 0),
    lambda h, w, tap: tap(jnp.concatenate([h, h * h], -1).reshape(*h.shape, 2).sum(-1), w),
  ),
  "columns repeated": (
    lambda h, w: _gated(*jnp.moveaxis((h @ jnp.repeat(w, 2, 1)).reshape(*h.shape, 2), -1, 0)),
    lambda h, w, tap: _gated(*[tap(h, w)] * 2),
  ),
  "padded": (
    lambda h, w: jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(1, 0)]) @ jnp.pad(w, ((1, 0), (0, 0))),
    lambda h, w, tap: tap(h, w),
  ),
  "repeated in scan": (
    lambda h, w: lax.scan(
      lambda h, w: (jnp.tanh(h @ w), None), h, jnp.broadcast_to(w, (2, *w.shape))
    )[0],
    lambda h, w, tap: jnp.tanh(tap(jnp.tanh(tap(h, w)), w)),
  ),
  "quadratic": (
    lambda h, w: h * jnp.sum(jnp.ones(w.shape[0]) @ w),
    lambda h, w, tap: h * _repeated(jnp.ones(len(w)), h, w, tap).sum(-1, keepdims=True),
  ),
  "read by product": (
    lambda h, w: h @ w + jnp.ones(w.shape[0]) @ w,
    lambda h, w, tap: tap(h, w) + _repeated(jnp.ones(len(w)), h, w, tap),
  ),
}

NOT_LAST = ("columns repeated", "repeated in scan", "quadratic")  # the product is not the output

# Uses of a weight that make no layer, or none yet: h[..., d], w[d, d] -> [..., d].
ODD = {
  "standardised": lambda h, w: h @ ((w - w.mean(0)) / jnp.sqrt(w.var(0) + 0.1)),
  "normalised": lambda h, w: h @ (w / jnp.linalg.norm(w)),
  "masked": lambda h, w: h @ (w * _mask(w)),
  "where": lambda h, w: h @ jnp.where(_mask(w), w, 0.0),
  "triangle": lambda h, w: h @ jnp.tril(w),
  "tanh": lambda h, w: h @ jnp.tanh(w),
  "symmetric": lambda h, w: h @ (w + w.T),
  "squared": lambda h, w: h @ (w @ w),
  "overlapping": lambda h, w: jnp.concatenate([h @ w[:, :-1], h @ w[:, 1:2]], -1),
  "whole and part": lambda h, w: h @ w + h[..., :1] @ w[:1],
  "traced slice": lambda h, w: h @ lax.dynamic_slice(w, (jnp.argmin(w[0]) * 0, 0), w.shape),
  "cond": lambda h, w: lax.cond(w.sum() > 0, lambda w: h @ w, lambda w: h @ w.T, w),
  "custom_vjp": _tripled,
  "custom_jvp of w": lambda h, w: h @ bent(w),
  "view in custom_vjp": lambda h, w: _tripled(h, w.T),
  "carried": lambda h, w: lax.scan(
    lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.5 * c[1]), None), (h, w), None, 2
  )[0][0],
  "out of scan": lambda h, w: h @ lax.scan(lambda c, r: (c, jnp.sin(r)), 0.0, w)[1],
  "entries": lambda h, w: h * w[:, 0],
  "frozen": lambda h, w: h @ lax.stop_gradient(w),
  "checkpointed penalty": lambda h, w: h @ w * jax.checkpoint(lambda w: jnp.mean(w * w))(w),
}


@dataclasses.dataclass(frozen=True)
class Used(Block):
  """A square weight used in one of several ways, maybe `besides` a product, and a bias after it."""

  use: str
  bias: bool = False
  besides: bool = False

  def init(self, rng, width, tokens):
    p = {"w": normal(rng, width, width)}
    return p | ({"b": normal(rng, width)} if self.bias else {}), width


@dataclasses.dataclass(frozen=True)
class Odd(Used):
  """A weight used as no layer can be, maybe `besides` a product; nor is the bias after it one."""

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
class Viewed(Used):
  """A weight used as one of `VIEWS`, maybe `besides` a product, with a bias after their sum."""

  def roles(self):
    weight = "fallback" if self.use == "gathered" and self.besides else "layer"
    joins = self.besides or self.use not in NOT_LAST
    bias = weight if joins else "fallback"
    return {"w": weight} | ({"b": bias} if self.bias else {})

  def spelled(self, p, h):
    y = VIEWS[self.use][0](h, p["w"])
    return jnp.tanh((y + h @ p["w"] if self.besides else y) + p.get("b", 0.0))

  def canonical(self, p, h, tap):
    left = [p["b"]] if self.roles().get("b") == "layer" else []
    first = lambda h, w: tap("w", h, w, left.pop() if left else None)  # is whose the bias is

    plain = lambda h, w: tap("w", h, w)
    y = VIEWS[self.use][1](h, p["w"], plain if self.use in NOT_LAST else first)
    y = y + first(h, p["w"]) if self.besides else y
    return jnp.tanh(y + (p["b"] if self.roles().get("b") == "fallback" else 0.0))


@dataclasses.dataclass(frozen=True)
class Norm(Block):
  """LayerNorm with scale and shift, which are no layers; `after` a product of a layer."""

  after: bool = False

  def init(self, rng, width, tokens):
    p = {"scale": 1 + normal(rng, width), "shift": normal(rng, width)}
    return p | ({"w": normal(rng, width, width)} if self.after else {}), width

  def roles(self):
    return {"scale": "fallback", "shift": "fallback"} | ({"w": "layer"} if self.after else {})

  def canonical(self, p, h, tap):
    h = tap("w", h, p["w"]) if self.after else h
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
    return h * p["scale"] + p["shift"]

  def spelled(self, p, h):
    return self.canonical(p, h, lambda name, x, w: x @ w)


def _vmapped_rows(one):
  """A lookup of all tokens from one of a single token."""

  def all_rows(w, ids):
    every = lambda i: one(w, i)
    for _ in range(ids.ndim):
      every = jax.vmap(every)
    return every(ids)

  return all_rows


# Rows of w[2, d] at ids[...].
LOOKUPS = {
  "gather": lambda w, ids: w[ids],
  "take": lambda w, ids: jnp.take(w, ids, axis=0),
  "onehot": lambda w, ids: jnp.einsum("...i,io->...o", jax.nn.one_hot(ids, 2, dtype=w.dtype), w),
  "scalar": _vmapped_rows(lambda w, i: w[i]),
  "map": lambda w, ids: lax.map(lambda i: w[i], ids),
  "map of scalars": lambda w, ids: lax.map(lambda i: w[i], ids.reshape(-1)).reshape(*ids.shape, -1),
  "dynamic slice": _vmapped_rows(lambda w, i: lax.dynamic_slice(w, (i, 0), (1, w.shape[1]))[0]),
  "dynamic slice in map": lambda w, ids: lax.map(
    lambda i: lax.dynamic_slice_in_dim(w, i, 1)[0], ids.reshape(-1)
  ).reshape(*ids.shape, -1),
  "dynamic index": _vmapped_rows(lambda w, i: lax.dynamic_index_in_dim(w, i, keepdims=False)),
  "at get": lambda w, ids: w.at[ids].get(mode="clip"),
  "at get fill": lambda w, ids: w.at[ids].get(mode="fill", fill_value=0),
  "columns": lambda w, ids: jnp.moveaxis(w.T[:, ids], 0, -1),
  "reshaped": lambda w, ids: w.reshape(2, 2, -1)[ids].reshape(*ids.shape, -1),
  "doubled": lambda w, ids: (2 * w)[ids],
  "jit": lambda w, ids: jax.jit(lambda w, ids: w[ids])(w, ids),
}


@dataclasses.dataclass(frozen=True)
class Embed(Block):
  """Adds rows of a table, looked up in one of `LOOKUPS`."""

  look_up: str = "gather"

  def init(self, rng, width, tokens):
    return {"w": normal(rng, 2, width)}, width

  def roles(self):
    return {"w": "layer"}

  def _ids(self, h):
    return (h[..., 0] > 0).astype(int)

  def canonical(self, p, h, tap):
    number = 2.0 if self.look_up == "doubled" else 1.0
    return h + tap("w", number * jax.nn.one_hot(self._ids(h), 2, dtype=h.dtype), p["w"])

  def spelled(self, p, h):
    return h + LOOKUPS[self.look_up](p["w"], self._ids(h))


@dataclasses.dataclass(frozen=True)
class Joined(Block):
  """A product with several parameters joined along its inputs or its outputs, and a bias of all."""

  axis: int = 0
  late: bool = False  # transposed after they were joined
  bias: bool = False

  def init(self, rng, width, tokens):
    w = normal(rng, width, width)
    first, second = np.split(w, [width // 2], self.axis)
    bias = {"b": normal(rng, width)} if self.bias else {}
    return {"first": first, "second": second} | bias, width

  def roles(self):
    role = "layer" if self.axis == 1 else "sum"
    return {"first": "layer", "second": "layer"} | ({"b": role} if self.bias else {})

  def canonical(self, p, h, tap):
    b = p.get("b", 0.0)
    if self.axis == 1:
      cut = p["first"].shape[1]
      bs = (b[:cut], b[cut:]) if self.bias else (None, None)
      return jnp.tanh(
        jnp.concatenate(
          [tap(name, h, p[name], b) for name, b in zip(("first", "second"), bs, strict=True)], -1
        )
      )
    left, right = jnp.split(h, [p["first"].shape[0]], -1)
    return jnp.tanh(tap("first", left, p["first"]) + tap("second", right, p["second"]) + b)

  def spelled(self, p, h):
    if self.late:
      w = jnp.concatenate([p["first"].T, p["second"].T], 1 - self.axis).T
    else:
      w = jnp.concatenate([p["first"], p["second"]], self.axis)
    return jnp.tanh(h @ w + p.get("b", 0.0))

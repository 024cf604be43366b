"""A body of blocks in a row, on branches or inside a transform, and its loss."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import fop_optax
from networks.blocks import Block, untapped
from networks.spelling import CLASSES, EXAMPLES, WIDTHS, normal

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

# And around blocks that know no other token.
AROUND_TOKENS = {
  "time first": lambda f: lambda p, h: jnp.swapaxes(f(p, jnp.swapaxes(h, 0, -2)), 0, -2),
  "map over time": lambda f: (
    lambda p, h: jnp.moveaxis(lax.map(lambda h: f(p, h), jnp.moveaxis(h, -2, 0)), 0, -2)
  ),
  "scan over time": lambda f: (
    lambda p, h: jnp.moveaxis(
      lax.scan(lambda c, h: (c, f(p, h)), 0.0, jnp.moveaxis(h, -2, 0))[1], 0, -2
    )
  ),
  "vmap over time": lambda f: lambda p, h: jax.vmap(lambda h: f(p, h), -2, -2)(h),
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
      inner = lambda name, *args, **role: tap(f"b{i}/{name}", *args, **role)
      return lambda h: block.canonical(p[f"b{i}"], h, inner)

    run = lambda h: self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])
    # rows that no gradient comes to are rows, too, beside constant ones
    return run(jnp.stack([h, h]))[0] if self.around == "twice the batch" else run(h)

  def spelled(self, p, h):
    def run(p, h):
      branch = lambda i, block: lambda h: block.spelled(p[f"b{i}"], h)
      return self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])

    return run(p, h) if self.around == "none" else (AROUND | AROUND_TOKENS)[self.around](run)(p, h)

  def penalty(self, p, tap):
    def one(i, block):
      inner = lambda name, *args, **role: tap(f"b{i}/{name}", *args, **role)
      return block.penalty(p[f"b{i}"], untapped if tap is untapped else inner)

    return sum(one(i, block) for i, block in enumerate(self.blocks))


def _cross_entropy(z, y):
  return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]


def _pooled(z, y):
  """One prediction and one label an example."""
  return z.reshape(len(z), -1, CLASSES).mean(1), y.reshape(len(y), -1)[:, 0]


def _over(transform):
  """Marked terms of examples, tokens in each of them a mark or all in one."""
  return lambda z, y: transform(lambda zy: fop_optax.softmax_cross_entropy(*zy))((z, y))


def _each_term(z, y):
  over = fop_optax.softmax_cross_entropy
  for _ in range(y.ndim):
    over = jax.vmap(over)
  return over(z, y)


class Loss(NamedTuple):
  """A mean loss of z[N, ..., C], labels y[N, ...] and weights s[N, ...], plainly and as spelled.

  `by_token`: whether R is T. `terms`: for each mark the parameters, weights and kind of its terms.
  """

  plain: Callable[..., Any]
  spelled: Callable[..., Any] | None = None
  by_token: bool = True
  terms: Callable[..., Any] | None = None


def _mean_of(z, kind="softmax"):
  return z, jnp.full(z.shape[:-1], 1 / (z.size // z.shape[-1])), kind


def _by_example(s):
  """Weights of examples, the same for all tokens of one, as a mean over tokens counts them."""
  own = s.reshape(len(s), -1)[:, :1]
  return jnp.broadcast_to(own, (len(s), s.size // len(s))).reshape(s.shape) / s.size


def _hot(z, y):
  return jax.nn.one_hot(y, CLASSES, dtype=z.dtype)


_one_mark = lambda z, s: [_mean_of(z)]
LOSSES = {
  "marked": Loss(
    lambda z, y, s: _cross_entropy(z, y).mean(),
    lambda z, y, s: fop_optax.softmax_cross_entropy(z, y),
    terms=_one_mark,
  ),
  "mean": Loss(lambda z, y, s: _cross_entropy(z, y).mean()),
  "summed over tokens": Loss(
    lambda z, y, s: _cross_entropy(z, y).reshape(len(z), -1).sum(1).mean(), by_token=False
  ),
  "squared": Loss(
    lambda z, y, s: 0.5 * ((z - _hot(z, y)) ** 2).sum(-1).mean(),
    lambda z, y, s: fop_optax.squared_error(z, _hot(z, y)),
    terms=lambda z, s: [_mean_of(z, "normal")],
  ),
  "vmap": Loss(
    lambda z, y, s: _cross_entropy(z, y).mean(),
    lambda z, y, s: jnp.mean(_over(jax.vmap)(z, y)),
    terms=_one_mark,
  ),
  "map": Loss(
    lambda z, y, s: _cross_entropy(z, y).mean(),
    lambda z, y, s: jnp.mean(_over(lambda f: functools.partial(lax.map, f))(z, y)),
    terms=_one_mark,
  ),
  "pooled": Loss(
    lambda z, y, s: _cross_entropy(*_pooled(z, y)).mean(),
    lambda z, y, s: fop_optax.softmax_cross_entropy(*_pooled(z, y)),
    by_token=False,
    terms=lambda z, s: [_mean_of(_pooled(z, s)[0])],
  ),
  "weights of terms": Loss(
    lambda z, y, s: jnp.mean(s * _cross_entropy(z, y)),
    lambda z, y, s: jnp.mean(s * _each_term(z, y)),
    terms=lambda z, s: [(z, s / s.size, "softmax")],
  ),
  "weights of examples": Loss(
    lambda z, y, s: jnp.sum(_by_example(s) * _cross_entropy(z, y)),
    lambda z, y, s: jnp.mean(s.reshape(len(s), -1)[:, 0] * _over(jax.vmap)(z, y)),
    terms=lambda z, s: [(z, _by_example(s), "softmax")],
  ),
  "members": Loss(
    lambda z, y, s: jnp.mean(s * (_cross_entropy(z, y) + 3 * _cross_entropy(z**2, y))),
    lambda z, y, s: jnp.mean(
      s
      * jnp.dot(
        jax.vmap(_each_term, (-1, None), -1)(jnp.stack([z, z**2], -1), y), jnp.array([1.0, 3.0])
      )
    ),
    terms=lambda z, s: [(z, s / s.size, "softmax"), (z**2, 3 * s / s.size, "softmax")],
  ),
  "two marks": Loss(
    lambda z, y, s: (
      _cross_entropy(z, y).mean()
      + ((jnp.tanh(_pooled(z, y)[0]) - _hot(z, _pooled(z, y)[1])) ** 2).sum(-1).mean()
    ),
    lambda z, y, s: (
      fop_optax.softmax_cross_entropy(z, y)
      + 2 * fop_optax.squared_error(jnp.tanh(_pooled(z, y)[0]), _hot(z, _pooled(z, y)[1]))
    ),
    terms=lambda z, s: [
      _mean_of(z),
      (jnp.tanh(_pooled(z, s)[0]), jnp.full(len(z), 2 / len(z)), "normal"),
    ],
  ),
}
EMPIRICAL = [name for name in LOSSES if name not in ("members", "two marks")]  # R is one number
EXACT = [name for name in LOSSES if LOSSES[name].terms]


def _weights(x):
  """A number a term, of the inputs."""
  return jax.nn.sigmoid(x[..., 0])


def _weak(array):
  """The same numbers in a weak type, as Python's are."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  return jnp.stack([jnp.asarray(number) for number in array.ravel().tolist()]).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Network:
  """A network, its loss, and how it is captured."""

  body: Blocks
  tokens: int = 0  # of an example; 0: no token axis
  loss: str = "marked"
  groups: int = 2
  micro_batches: int = 1
  refresh: str = "true"  # "both", each compiled, or "traced"
  fisher: str = "empirical"  # "exact"
  fixed: int = 0  # constant points at which the body is another term of the loss
  weak: bool = False  # parameters and inputs of weak types
  aux: bool = False
  unused: bool = False  # a parameter that only metrics in aux read
  seed: int = 0

  @property
  def terms(self) -> int:
    """R, the number of terms the mean loss has for an example."""
    return max(self.tokens, 1) if LOSSES[self.loss].by_token else 1

  def data(self):
    """Parameters, inputs and labels."""
    rng = np.random.default_rng(self.seed)
    params, _ = self.body.init(rng, WIDTHS[0], self.tokens)
    if self.unused:
      params = {"temperature": normal(rng, CLASSES)} | params
    examples = EXAMPLES * self.groups
    shape = (examples, self.tokens) if self.tokens else (examples,)
    x, y = rng.normal(size=(*shape, WIDTHS[0])), rng.integers(CLASSES, size=shape)
    data = jax.tree.map(jnp.asarray, (params, x, y))
    single = any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    return jax.tree.map(_weak, data) if self.weak and not single else data

  def points(self):
    """The constant points."""
    shape = (self.fixed, *([self.tokens] if self.tokens else []), WIDTHS[0])
    return np.random.default_rng(self.seed + 1).normal(size=shape)

  def roles(self):
    return self.body.roles() | ({"temperature": "fallback"} if self.unused else {})

  def canonical(self, params, x, y, tap):
    """The mean loss, with taps."""
    z = self.body.canonical(params, x, tap)
    loss = LOSSES[self.loss].plain(z, y, _weights(x)) + self.body.penalty(params, tap)
    if not self.fixed:
      return loss
    at = self.body.canonical(params, jnp.asarray(self.points()), functools.partial(tap, fixed=True))
    return loss + 0.3 * jnp.mean(at**2)

  def marked(self, params, x, tap):
    """Parameters, weights and kinds of the terms of its marks."""
    return LOSSES[self.loss].terms(self.body.canonical(params, x, tap), _weights(x))

  def spelled(self, params, x, y):
    """The mean loss, and with `aux` a pair."""
    z = self.body.spelled(params, x)
    of_terms = LOSSES[self.loss].spelled or LOSSES[self.loss].plain
    loss = of_terms(z, y, _weights(x)) + self.body.penalty(params, untapped)
    if self.fixed:
      at = self.body.spelled(params, jnp.asarray(self.points()))
      loss = loss + 0.3 * jnp.mean(at**2)
    if not self.aux:
      return loss
    norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    metric = jnp.mean(z @ params["temperature"]) if self.unused else 0.0
    return loss, {"loss": loss, "doubled": 2 * x, "norm": norm, "metric": metric}

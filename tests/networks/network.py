"""A body of blocks in a row, on branches or inside a transform, and its loss."""

import dataclasses
import functools
from typing import Any

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

    return self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])

  def spelled(self, p, h):
    def run(p, h):
      branch = lambda i, block: lambda h: block.spelled(p[f"b{i}"], h)
      return self._join(h, [branch(i, block) for i, block in enumerate(self.blocks)])

    return run(p, h) if self.around == "none" else AROUND[self.around](run)(p, h)

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
      params = {"temperature": normal(rng, CLASSES)} | params
    examples = EXAMPLES * self.groups
    shape = (examples, self.tokens) if self.tokens else (examples,)
    x, y = rng.normal(size=(*shape, WIDTHS[0])), rng.integers(CLASSES, size=shape)
    return jax.tree.map(jnp.asarray, (params, x, y))

  def roles(self):
    return self.body.roles() | ({"temperature": "fallback"} if self.unused else {})

  def canonical(self, params, x, y, tap):
    """The mean loss, with taps."""
    z = self.body.canonical(params, x, tap)
    return LOSSES[self.loss][0](z, y) + self.body.penalty(params, tap)

  def spelled(self, params, x, y):
    """The mean loss, and with `aux` a pair."""
    z = self.body.spelled(params, x)
    plain, marked, _ = LOSSES[self.loss]
    loss = (marked or plain)(z, y) + self.body.penalty(params, untapped)
    if not self.aux:
      return loss
    norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    metric = jnp.mean(z @ params["temperature"]) if self.unused else 0.0
    return loss, {"loss": loss, "doubled": 2 * x, "norm": norm, "metric": metric}

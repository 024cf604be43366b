"""Blocks that mix tokens: recurrences, attention, convolutions."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from networks.blocks import Block
from networks.spelling import WRAPS, Spelling, normal


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
    p = {"w": normal(rng, width, self.outputs), "u": normal(rng, self.outputs, self.outputs)}
    if self.form == "joint":
      p = {"w": np.concatenate([p["w"], p["u"]])}
    return p | ({} if self.bias == "none" else {"b": normal(rng, self.outputs)}), self.outputs

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
    w, b = normal(rng, 3, width, 2, width // 2) / 2, normal(rng, 3, 1, 2, width // 2)
    if self.qkv == "apart":
      p = {"q": w[0], "k": w[1], "v": w[2]}
      biases = {"bq": b[0, 0], "bk": b[1, 0], "bv": b[2, 0]}
    elif self.qkv == "fused":
      p, biases = {"w": w.swapaxes(0, 1)}, {"bw": b[:, 0]}
    else:
      p, biases = {"w": QKV[self.qkv][0](w)}, {"bw": QKV[self.qkv][0](b)}
    p, biases = p | {"o": normal(rng, 2, width // 2, width)}, biases | {"bo": normal(rng, width)}
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
    p = {"w": normal(rng, self.kernel, width // self.groups, width)}
    return p | ({"b": normal(rng, width)} if self.bias else {}), width

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

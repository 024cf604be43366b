"""Convolutions, lookups, tied and joined weights: factors against what they are by definition."""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import explicit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_capture import draw, relative

import fop_optax
from fop_optax import moments

pytestmark = pytest.mark.usefixtures("x64")

N, C = 6, 3


def cross_entropy(h, y):
  h = jnp.tanh(h).reshape(len(y), -1)
  return fop_optax.softmax_cross_entropy(h @ jnp.cos(jnp.arange(h.shape[1] * C)).reshape(-1, C), y)


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution in some layout; `spec` as of `jax.lax`."""

  spec: tuple[str, str, str]
  kernel: tuple[int, ...]  # spatial
  image: tuple[int, ...]
  features: tuple[int, int]
  strides: tuple[int, ...]
  padding: Any
  lhs_dilation: tuple[int, ...] | None = None
  rhs_dilation: tuple[int, ...] | None = None
  groups: int = 1

  def shapes(self):
    i, o = self.features
    sizes = dict(zip("HWD", zip(self.image, self.kernel, strict=True), strict=False))
    lhs = {"N": N, "C": i} | {name: pair[0] for name, pair in sizes.items()}
    rhs = {"I": i // self.groups, "O": o} | {name: pair[1] for name, pair in sizes.items()}
    bias = [o if name == "C" else 1 for name in self.spec[2]]
    return [lhs[n] for n in self.spec[0]], [rhs[n] for n in self.spec[1]], bias

  def apply(self, x, w):
    return jax.lax.conv_general_dilated(
      x, w, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, self.spec, self.groups
    )


def slow_convolution(conv, x, w, b, tap):
  """The same, one output position after the other: `[N, *positions, features]`."""
  names = [name for name in "HWD" if name in conv.spec[0]]
  x = jnp.transpose(x, [conv.spec[0].index(name) for name in ("N", *names, "C")])
  lhs = conv.lhs_dilation or (1,) * len(names)
  rhs = conv.rhs_dilation or (1,) * len(names)
  for axis, step in enumerate(lhs, start=1):  # zeros between the pixels
    shape = [1 + (s - 1) * step if a == axis else s for a, s in enumerate(x.shape)]
    index = tuple(slice(None, None, step if a == axis else 1) for a in range(x.ndim))
    x = jnp.zeros(shape).at[index].set(x)
  edges = conv.padding
  x = jnp.pad(x, [(0, 0), *[(max(a, 0), max(b, 0)) for a, b in edges], (0, 0)])
  crop = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(edges, x.shape[1:], strict=False)]
  x = x[(slice(None), *crop)]
  spans = [(k - 1) * d + 1 for k, d in zip(conv.kernel, rhs, strict=True)]
  sizes = zip(x.shape[1:-1], spans, conv.strides, strict=True)
  outputs = [(n - span) // stride + 1 for n, span, stride in sizes]
  # the weight [I, *kernel in the order of its own axes] as a matrix for each feature group
  own = [name for name in conv.spec[1] if name != "O"]
  w = jnp.moveaxis(w, conv.spec[1].index("O"), -1)
  i, o = conv.features[0] // conv.groups, conv.features[1] // conv.groups
  out = []
  for g in range(conv.groups):
    rows = []
    for place in itertools.product(*map(range, outputs)):
      start = [p * s for p, s in zip(place, conv.strides, strict=True)]
      window = tuple(slice(s, s + span, d) for s, span, d in zip(start, spans, rhs, strict=True))
      patch = x[(slice(None), *window, slice(g * i, (g + 1) * i))]
      axes = [(*names, "I").index(name) + 1 for name in own]
      rows.append(jnp.transpose(patch, (0, *axes)).reshape(N, -1))
    matrix = w[..., g * o : (g + 1) * o].reshape(-1, o)
    out.append(tap("w", jnp.stack(rows, 1), matrix, b[g * o : (g + 1) * o], g))
  y = jnp.concatenate(out, -1).reshape(N, *outputs, -1)
  return jnp.transpose(y, [("N", *names, "C").index(name) for name in conv.spec[2]])


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVOLUTIONS = {
  "1-D": Conv(("NHC", "HIO", "NHC"), (3,), (7,), (2, 3), (2,), [(1, 1)]),
  "2-D, strides": Conv(NHWC, (3, 2), (5, 6), (2, 3), (2, 1), [(1, 1), (0, 1)]),
  "2-D, channels first": Conv(NCHW, (2, 3), (5, 6), (3, 2), (1, 2), [(0, 2), (1, 0)]),
  "2-D, mixed layout": Conv(("HNWC", "IWOH", "CWHN"), (2, 3), (5, 4), (2, 4), (1, 1), [(0, 0)] * 2),
  "dilated": Conv(NHWC, (2, 2), (6, 5), (2, 3), (1, 1), [(1, 1)] * 2, None, (2, 3)),
  "grouped": Conv(NHWC, (2, 2), (4, 4), (4, 6), (1, 1), [(0, 1)] * 2, groups=2),
  "depthwise": Conv(NCHW, (3, 3), (4, 4), (3, 6), (2, 2), [(1, 1)] * 2, groups=3),
  "transposed": Conv(NHWC, (3, 3), (3, 4), (2, 3), (1, 1), [(2, 1), (-1, 2)], (2, 2), (1, 1)),
  "3-D": Conv(("NHWDC", "HWDIO", "NHWDC"), (2, 1, 2), (3, 3, 4), (2, 2), (1, 1, 2), [(0, 0)] * 3),
}  # fmt: skip


@pytest.mark.parametrize(
  "name, chunk_bytes",
  [(name, None) for name in CONVOLUTIONS] + [("2-D, strides", 1), ("depthwise", 1)],
)
def test_convolution(name, chunk_bytes, monkeypatch):
  conv = CONVOLUTIONS[name]
  if chunk_bytes:  # one example at a time
    monkeypatch.setitem(moments.CHUNK_BYTES, "cpu", chunk_bytes)
  x_shape, w_shape, b_shape = conv.shapes()
  params = {"w": jnp.asarray(draw(*w_shape)), "b": jnp.asarray(draw(*b_shape))}
  x, y = jnp.asarray(draw(*x_shape)), jnp.arange(N) % C
  examples_first = lambda h: jnp.moveaxis(h, conv.spec[2].index("N"), 0)
  batch_axis = conv.spec[0].index("N")
  x = jnp.moveaxis(x, batch_axis, 0)

  def loss(p, x, y):
    h = conv.apply(jnp.moveaxis(x, 0, batch_axis), p["w"]) + p["b"]
    return cross_entropy(examples_first(h), y)

  def tapped(p, x, y, tap):
    h = slow_convolution(conv, jnp.moveaxis(x, 0, batch_axis), p["w"], p["b"].reshape(-1), tap)
    return cross_entropy(examples_first(h), y)

  captured = fop_optax.capture(loss, params, x, y, strict=True)
  check(captured, params, x, y, explicit.evaluate(tapped, params, x, y))
  assert captured.layers[0].kind == "conv"


def check(captured, params, x, y, expected):
  """Gradients and the factors of one layer, `w`."""
  value, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  relative(value, expected.loss)
  jax.tree.map(relative, grads, expected.grads[0])
  (factors,) = stats.factors
  assert len(factors.A) == len(expected.matrices)
  for place in range(len(factors.A)):
    A, G = expected.matrices["w", place].factors
    relative(factors.A[place], A)
    relative(factors.G[place], G)


def test_a_convolution_of_one_pixel_is_the_dense_layer():
  conv = Conv(NHWC, (1, 1), (4, 3), (2, 3), (1, 1), [(0, 0)] * 2)
  params, x = {"w": jnp.asarray(draw(1, 1, 2, 3)), "b": jnp.zeros(3)}, jnp.asarray(draw(N, 4, 3, 2))
  y = jnp.arange(N) % C
  losses = {
    "conv": lambda p, x, y: cross_entropy(conv.apply(x, p["w"]) + p["b"], y),
    "dense": lambda p, x, y: cross_entropy(x @ p["w"][0, 0] + p["b"], y),
  }
  found = {
    kind: fop_optax.capture(loss, params, x, y).value_and_grad(params, x, y)[2].factors
    for kind, loss in losses.items()
  }
  jax.tree.map(relative, found["conv"], found["dense"])


def test_convolution_of_each_example_and_inside_wrappers():
  conv = Conv(NHWC, (2, 2), (4, 3), (2, 3), (1, 1), [(0, 0)] * 2)
  params, x = {"w": jnp.asarray(draw(2, 2, 2, 3)), "b": jnp.zeros(3)}, jnp.asarray(draw(N, 4, 3, 2))
  y = jnp.arange(N) % C
  forms = [
    lambda p, x: conv.apply(x, p["w"]) + p["b"],
    lambda p, x: jax.vmap(lambda x: conv.apply(x[None], p["w"])[0] + p["b"])(x),
    jax.checkpoint(jax.jit(lambda p, x: conv.apply(x, p["w"]) + p["b"])),
  ]
  losses = [lambda p, x, y, f=f: cross_entropy(f(p, x), y) for f in forms]
  first, *others = [
    fop_optax.capture(f, params, x, y, strict=True).value_and_grad(params, x, y) for f in losses
  ]
  for other in others:
    jax.tree.map(relative, other, first)


def test_kernels_mapped_over_on_inputs_of_their_own_are_a_stack():
  conv = Conv(NHWC, (2, 2), (4, 3), (2, 3), (1, 1), [(0, 0)] * 2)
  w, x = jnp.asarray(draw(2, 2, 2, 2, 3)), jnp.asarray(draw(N, 2, 4, 3, 2))
  y = jnp.arange(N) % C
  mapped = lambda w, x, y: cross_entropy(jax.vmap(conv.apply, (1, 0), 1)(x, w), y)
  apart = lambda w, x, y: cross_entropy(
    jnp.stack([conv.apply(x[:, i], k) for i, k in enumerate(list(w))], 1), y
  )
  (ours,), theirs = (
    fop_optax.capture(loss, w, x, y, strict=True).value_and_grad(w, x, y)[2].factors
    for loss in (mapped, apart)
  )
  for stack, parts in zip(ours, zip(*theirs, strict=True), strict=True):
    relative(stack, np.concatenate(parts))


LOOKUPS: dict[str, Callable[..., Any]] = {
  "index": lambda w, x: w[x],
  "take": lambda w, x: jnp.take(w, x, axis=0),
  "clip": lambda w, x: jnp.take(w, x, axis=0, mode="clip"),
  "other axis": lambda w, x: jnp.moveaxis(jnp.take(w.T, x, axis=1), 0, -1),
  "per example": lambda w, x: jax.vmap(lambda x: w[x])(x),
}
one_hot_product = lambda w, x: jax.nn.one_hot(x, len(w), dtype=w.dtype) @ w


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_is_the_product_with_one_hot_rows(name):
  V, D, T = 7, 4, 3
  params = {"w": jnp.asarray(draw(V, D)), "head": jnp.asarray(draw(D, C))}
  x = jnp.asarray(np.random.default_rng(0).integers(V, size=(N, T)))
  y = jnp.arange(N) % C

  def loss(look_up, p, x, y):
    return fop_optax.softmax_cross_entropy(jnp.tanh(look_up(p["w"], x)).mean(1) @ p["head"], y)

  found = []
  for look_up in (LOOKUPS[name], one_hot_product):
    captured = fop_optax.capture(lambda *args, f=look_up: loss(f, *args), params, x, y, strict=True)
    found.append((captured, jax.jit(captured.value_and_grad)(params, x, y)))
  (ours, (value, grads, stats)), (_, (dense_value, dense_grads, dense)) = found
  relative(value, dense_value)
  jax.tree.map(relative, grads, dense_grads)
  relative(stats.factors[1].G, dense.factors[1].G)
  A = dense.factors[1].A
  relative(stats.factors[1].A, np.diagonal(A, axis1=1, axis2=2))
  assert ours.layers[1].kind == "lookup"


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_ids_out_of_range_count_as_the_lookup_treats_them(mode):
  V, D = 5, 4
  params = {"w": jnp.asarray(draw(V, D)), "head": jnp.asarray(draw(D, C))}
  x, y = jnp.array([0, 9, 2, V, 2, 4]), jnp.arange(N) % C

  def loss(p, x, y):
    h = jnp.take(p["w"], x, axis=0, mode=mode, fill_value=0.5)
    return fop_optax.softmax_cross_entropy(jnp.tanh(h) @ p["head"], y)

  captured = fop_optax.capture(loss, params, x, y)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(relative, grads, jax.grad(loss)(params, x, y))
  A, G = stats.factors[1]
  counts = {"fill": [1, 0, 2, 0, 1], "clip": [1, 0, 2, 0, 3]}[mode]
  relative(A[0], np.array(counts) / N)
  each = jax.vmap(jax.grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(params, x, y)
  dy = each["w"].sum(1)
  relative(G[0], dy.T @ dy / N)


TABLES: dict[str, Callable[..., Any]] = {  # w[P, T, D], x[N, P, T, D]
  "sum": lambda w, x: x + w,
  "leading axis": lambda w, x: w[None] + x,
  "per example": lambda w, x: jax.vmap(lambda x: x + w)(x),
  "one by one": lambda w, x: jax.lax.map(lambda x: x + w, x),
  "by parts": lambda w, x: jnp.stack([x[:, 0] + w[0], x[:, 1] + w[1]], 1),
  "constant over a scan": lambda w, x: jax.lax.scan(lambda c, x: (c, x + w), 0, x[:, None])[1][
    :, 0
  ],
  "elsewhere": lambda w, x: jax.device_put(jnp.asarray(w)) + x,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_a_lookup_of_all_its_rows(name):
  P, T, D = 2, 3, 4
  params = {"w": jnp.asarray(draw(P, T, D)), "head": jnp.asarray(draw(D, C))}
  x, y = jnp.asarray(draw(N, P, T, D)), jnp.arange(N) % C

  def loss(add, p, x, y):
    h = jnp.tanh(add(p["w"], jnp.tanh(x)))
    return fop_optax.softmax_cross_entropy(h.mean((1, 2)) @ p["head"], y)

  def look_up(w, x):
    ids = jnp.broadcast_to(jnp.arange(P * T), (len(x), P * T))
    return x + w.reshape(-1, D)[ids].reshape(x.shape)

  found = []
  for add in (TABLES[name], look_up):
    captured = fop_optax.capture(lambda *args, f=add: loss(f, *args), params, x, y, strict=True)
    found.append((captured, jax.jit(captured.value_and_grad)(params, x, y)))
  (ours, (value, grads, stats)), (_, (expected, their_grads, theirs)) = found
  relative(value, expected)
  jax.tree.map(relative, grads, their_grads)
  assert {layer.kind for layer in ours.layers[1:]} == {"table"}
  if name == "by parts":
    assert [layer.path for layer in ours.layers[1:]] == ["['w'] part 0", "['w'] part 1"]
    assert all(np.allclose(factors.A, 1 / T) for factors in stats.factors[1:])
    relative(sum(factors.G for factors in stats.factors[1:]), theirs.factors[1].G)
  else:
    jax.tree.map(relative, stats.factors[1], theirs.factors[1])


def test_tables_that_a_scan_goes_over_are_a_stack():
  T, D = 3, 4
  params = {"w": jnp.asarray(draw(2, T, D)), "head": jnp.asarray(draw(D, C))}
  x, y = jnp.asarray(draw(N, T, D)), jnp.arange(N) % C

  def loss(
    p, x, y, tables=lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h + w), None), x, w)[0]
  ):
    return fop_optax.softmax_cross_entropy(tables(p["w"], x).mean(1) @ p["head"], y)

  one_by_one = lambda w, x: jnp.tanh(jnp.tanh(x + w[0]) + w[1])
  scanned = fop_optax.capture(loss, params, x, y, strict=True)
  unrolled = fop_optax.capture(lambda *args: loss(*args, one_by_one), params, x, y, strict=True)
  assert scanned.layers[1].stack == 2
  (_, ours), (_, *theirs) = (
    jax.jit(captured.value_and_grad)(params, x, y)[2].factors for captured in (scanned, unrolled)
  )
  jax.tree.map(lambda a, *b: relative(a, np.concatenate(b)), ours, *theirs)


def test_a_tied_weight_is_the_balanced_sum_of_its_uses():
  V, D = 7, 4
  params = {"w": jnp.asarray(draw(V, D)), "inner": jnp.asarray(draw(D, D))}
  x = jnp.asarray(np.random.default_rng(0).integers(V, size=(N, 3)))

  def apart(p, x, scale=1.0):
    h = jnp.tanh(p["w"][x] @ p["inner"])
    return scale * fop_optax.softmax_cross_entropy(h @ p["out"].T, x)

  def tied(p, x, scale=1.0):
    return apart(p | {"out": p["w"]}, x, scale)

  captured = fop_optax.capture(tied, params, x, strict=True)
  assert captured.layers[1].kind == "lookup + dense"
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x)
  both = params | {"out": params["w"]}
  _, each, expected = fop_optax.capture(apart, both, x).value_and_grad(both, x)
  relative(grads["w"], each["w"] + each["out"])
  _, (A_out, G_out), (A_in, G_in) = expected.factors  # inner, out, w
  sides = [(A_in[0], np.diag(G_in[0])), (np.diag(G_out[0]), np.diag(A_out[0]))]
  ratios = [np.sqrt(g.mean() / a.mean()) for a, g in sides]
  relative(stats.factors[1].A[0], A_in[0] * ratios[0] + np.diag(G_out[0]) * ratios[1])
  relative(stats.factors[1].G[0], G_in[0] / ratios[0] + A_out[0] / ratios[1])

  scaled = fop_optax.capture(lambda p, x: tied(p, x, 10.0), params, x)
  for ours, theirs in zip(
    jax.jit(scaled.value_and_grad)(params, x)[2].factors, stats.factors, strict=True
  ):  # with the loss ten times as large, the block a hundred times
    relative(np.trace(ours.G[0]) * ours.A[0], 100 * np.trace(theirs.G[0]) * theirs.A[0])


def test_experts_of_limited_capacity_have_rows_that_are_no_multiple_of_the_examples():
  E, D = 4, 3
  params = {"router": jnp.asarray(draw(D, E)), "w": jnp.asarray(draw(E, D, C))}
  x, y = jnp.asarray(draw(8, D)), jnp.arange(8) % C

  def loss(p, x, y):
    scores = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(jnp.argmax(scores, 1), E)
    place = (jnp.cumsum(chosen, 0) - 1) * chosen
    # [example, expert, slot]
    slots = chosen[..., None] * jax.nn.one_hot(place.astype(int), len(x) // 2)
    out = jnp.einsum("esd,edc->esc", jnp.einsum("nes,nd->esd", slots, x), p["w"])
    logits = jnp.einsum("nes,esc->nc", slots, out) * jnp.max(scores, 1, keepdims=True)
    return fop_optax.softmax_cross_entropy(logits, y)

  captured = fop_optax.capture(loss, params, x, y, strict=True)
  assert [layer.stack for layer in captured.layers] == [1, E]
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(relative, grads, jax.grad(loss)(params, x, y))
  chosen = np.asarray(jnp.argmax(x @ params["router"], 1))
  for expert in range(E):
    rows = np.stack(
      [row for row, e in zip(x, chosen, strict=True) if e == expert][:4] or [0 * x[0]]
    )
    relative(stats.factors[1].A[expert], rows.T @ rows / 4)


def test_joined_weights_are_parts_of_the_joined_layer():
  shapes = {"a": (4, 3), "b": (4, 2), "c": (3, 3), "d": (2, 3)}
  params = {k: jnp.asarray(draw(*s)) for k, s in shapes.items()}
  x, y = jnp.asarray(draw(N, 4)), jnp.arange(N) % C

  def joined(p):
    return {"ab": jnp.concatenate([p["a"], p["b"]], 1), "cd": jnp.concatenate([p["c"], p["d"]])}

  whole = lambda p, x, y: fop_optax.softmax_cross_entropy(jnp.tanh(x @ p["ab"]) @ p["cd"], y)
  loss = lambda p, x, y: whole(joined(p), x, y)
  captured = fop_optax.capture(loss, params, x, y, strict=True)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  _, joined_grads, (_, (ab, cd), *_) = fop_optax.capture(
    whole, joined(params), x, y
  ).value_and_grad(joined(params), x, y)
  jax.tree.map(relative, joined(grads), joined_grads)
  a, b, c, d = stats.factors
  for part, (A, G) in ((a, (ab.A, ab.G[:, :3, :3])), (b, (ab.A, ab.G[:, 3:, 3:]))):
    jax.tree.map(relative, tuple(part), (A, G))
  for part, (A, G) in ((c, (cd.A[:, :3, :3], cd.G)), (d, (cd.A[:, 3:, 3:], cd.G))):
    jax.tree.map(relative, tuple(part), (A, G))


def some_network(params, x, y):
  """A lookup, a product over tokens, one over examples and tokens in one axis, a convolution."""
  h = jnp.tanh(params["table"][x] @ params["tokens"])  # [N, T, 6]
  h = jnp.tanh(h.reshape(-1, 6) @ params["merged"] + params["bias"]).reshape(*x.shape, 6)
  numbers = ("NWC", "WIO", "NWC")
  h = jnp.tanh(jax.lax.conv_general_dilated(h, params["kernel"], (1,), "SAME", None, None, numbers))
  return fop_optax.softmax_cross_entropy(h.mean(1) @ params["head"], y)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_of_a_fraction_are_those_of_these_examples(groups):
  shapes = {"table": (9, 5), "tokens": (5, 6), "merged": (6, 6), "bias": (6,)}
  shapes |= {"kernel": (3, 6, 4), "head": (4, 3)}
  rng = np.random.default_rng(0)
  params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
  x, y = jnp.asarray(rng.integers(0, 9, (24, 7))), jnp.asarray(rng.integers(0, 3, 24))

  def run(x, y, fraction):
    captured = fop_optax.capture(
      some_network, params, x, y, groups=groups, curvature_fraction=fraction
    )
    assert not captured.fallbacks
    return jax.jit(captured.value_and_grad)(params, x, y)

  kept = np.arange(24).reshape(-1, 3, groups)[:, 0].ravel()  # every third of each group
  _, grads, stats = run(x, y, 1 / 3)
  jax.tree.map(relative, stats.factors, run(x[kept], y[kept], 1.0)[2].factors)
  _, whole_grads, whole_stats = run(x, y, 1.0)
  jax.tree.map(relative, (grads, stats.contrasts), (whole_grads, whole_stats.contrasts))

"""Every kind of layer: gradients against `jax.grad`, factors against explicit inputs and dy.

A kind is a loss as a user would write it and the same function written out with taps.
"""

from collections.abc import Callable
import dataclasses
import pickle
from typing import Any
import warnings

import explicit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, H, K, C, E, L = 8, 3, 4, 2, 3, 3, 2, 3


def draw(*shape, seed=0):
  return np.random.default_rng(seed + sum(shape)).normal(size=shape) / np.sqrt(shape[0])


def head(p, h, y):
  return fop_optax.softmax_cross_entropy(h @ p["head"], y)


def tapped_head(p, h, y, tap):
  return fop_optax.softmax_cross_entropy(tap("head", h, p["head"]), y)


@dataclasses.dataclass(frozen=True)
class Kind:
  """A spelling, its canonical form, the parameters, and how many terms an example has."""

  spelled: Callable[..., Any]
  canonical: Callable[..., Any]
  params: dict[str, tuple[int, ...]]
  terms: int = 1
  tokens: bool = False  # x is [N, T, D] instead of [N, D]

  def loss(self, p, x, y):
    return head(p, self.spelled(p, x), y)

  def tapped(self, p, x, y, tap):
    return tapped_head(p, self.canonical(p, x, tap), y, tap)

  def batch(self):
    shape = (N, T, D) if self.tokens else (N, D)
    y = np.arange(N * self.terms) % C
    return jnp.asarray(draw(*shape)), jnp.asarray(y.reshape((N, T) if self.terms > 1 else (N,)))


def plain(p, x, tap):
  return jnp.tanh(tap("w", x, p["w"], p.get("b")))


def transposed(p, x, tap):
  return jnp.tanh(tap("w", x, p["w"].T, p.get("b")))


def heads(p, x, tap):
  b = p["b"].reshape(-1) if "b" in p else None
  return jnp.tanh(tap("w", x, p["w"].reshape(D, -1), b))


def experts(p, x, tap):
  out = [tap("w", x, p["w"][e], p["b"][e] if "b" in p else None, e) for e in range(E)]
  return jnp.tanh(sum(out))


def layers(p, x, tap):
  for i in range(L):
    x = jnp.tanh(tap("w", x, p["w"][i], p["b"][i], i)) + x
  return x


def layers_backwards(p, x, tap):
  for i in range(L):  # the stack is in the order that the scan goes over, before `reverse`
    x = jnp.tanh(tap("w", x, p["w"][i], p["b"][i], L - 1 - i)) + x
  return x


def scanned(p, x, body=lambda f: f, **options):
  step = lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1]) + h, None)
  return jax.lax.scan(body(step), x, (p["w"], p["b"]), **options)[0]


def nested(p, x):
  grouped = jax.tree.map(lambda a: a.reshape(E, L, *a.shape[1:]), {"w": p["w"], "b": p["b"]})
  return jax.lax.scan(lambda h, layer: (scanned(layer, h), None), x, grouped)[0]


def nested_canonical(p, x, tap):
  for i in range(E * L):
    x = jnp.tanh(tap("w", x, p["w"][i], p["b"][i], i)) + x
  return x


def recurrent(p, x):
  def cell(h, x):
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None

  return jax.lax.scan(cell, jnp.zeros((len(x), D)), jnp.moveaxis(x, 1, 0))[0]


def recurrent_unrolled(p, x):
  h = jnp.zeros((len(x), D))
  for t in range(T):
    h = jnp.tanh(h @ p["u"] + x[:, t] @ p["w"] + p["b"])
  return h


def recurrent_canonical(p, x, tap):
  h = jnp.zeros((len(x), D))
  for t in range(T):  # the bias joins the layer whose parameter comes first
    h = jnp.tanh(tap("u", h, p["u"], p["b"]) + tap("w", x[:, t], p["w"]))
  return h


def shared(p, x):
  for _ in range(3):
    x = jnp.tanh(x @ p["w"] + p["b"])
  return x


def shared_in_two_spellings(p, x):
  x = jnp.tanh(x @ p["w"] + p["b"])
  h = jnp.einsum("ni,iho->nho", x, p["w"].reshape(D, 2, 2)) + p["b"].reshape(2, 2)
  return jnp.tanh(jnp.tanh(h.reshape(x.shape)) @ p["w"] + p["b"])


def shared_canonical(p, x, tap):
  for _ in range(3):
    x = jnp.tanh(tap("w", x, p["w"], p["b"]))
  return x


def parts_canonical(p, x, tap):
  return sum(jnp.tanh(tap("w", x, p["w"][:, i * D : (i + 1) * D], None, i)) for i in range(3))


def split_parts(p, x):
  return sum(jnp.tanh(x @ w) for w in jnp.split(p["w"], 3, axis=1))


def sliced_parts(p, x):
  return sum(jnp.tanh(x @ p["w"][:, i : i + D]) for i in range(0, 3 * D, D))


def qkv_with_bias(p, x):
  parts = zip(jnp.split(p["w"], 3, axis=1), jnp.split(p["b"], 3), strict=True)
  return sum(jnp.tanh(x @ w + b) for w, b in parts)


def qkv_with_bias_canonical(p, x, tap):
  each = [slice(i * D, (i + 1) * D) for i in range(3)]
  return sum(jnp.tanh(tap("w", x, p["w"][:, s], p["b"][s], i)) for i, s in enumerate(each))


def stacked_list(p, x):
  for w, b in zip(list(p["w"]), list(p["b"]), strict=True):
    x = jnp.tanh(x @ w + b) + x
  return x


def adapter(p, x):
  return jnp.tanh(x @ p["w"] + 0.5 * (x @ p["down"] @ p["up"]) + p["b"])


def adapter_canonical(p, x, tap):
  low = tap("up", tap("down", x, p["down"]), p["up"])
  return jnp.tanh(tap("w", x, p["w"], p["b"]) + 0.5 * low)


def activation_with_a_rule(p, x):
  @jax.custom_vjp
  def square(x):
    return x**2

  square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
  return square(jax.nn.relu(x @ p["w"]) + x @ p["w"])


def activation_with_a_rule_canonical(p, x, tap):
  return (jax.nn.relu(tap("w", x, p["w"])) + tap("w", x, p["w"])) ** 2


def per_example(p, x):
  linear = jax.jit(lambda w, b, x: w @ x + b)
  return jax.vmap(lambda x: jnp.tanh(linear(p["w"], p["b"], x)))(x)


def mapped_tokens(p, x):  # the sequence axis is mapped over: a constant weight, T times
  return jnp.mean(jax.lax.map(lambda x: jnp.tanh(x @ p["w"] + p["b"]), jnp.moveaxis(x, 1, 0)), 0)


def pooled(p, x, tap):
  return jnp.mean(plain(p, x, tap), 1)


W, B = {"w": (D, D)}, {"w": (D, D), "b": (D,)}
HEADS = {"w": (D, H, K), "b": (H, K), "head": (H * K, C)}
STACK = {"w": (L, D, D), "b": (L, D)}
EXPERTS = {"w": (E, D, D), "b": (E, D)}
flat = lambda h: h.reshape(*h.shape[:-2], -1)

KINDS = {
  "plain": Kind(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), plain, B),
  "no bias": Kind(lambda p, x: jnp.tanh(x @ p["w"]), plain, W),
  "transposed": Kind(lambda p, x: jnp.tanh(x @ p["w"].T + p["b"]), transposed, B),
  "on the left": Kind(lambda p, x: jnp.tanh((p["w"] @ x.T + p["b"][:, None]).T), transposed, B),
  "a vector": Kind(
    lambda p, x: jnp.tanh((x @ p["w"])[:, None] + p["b"]),
    lambda p, x, tap: jnp.tanh(tap("w", x, p["w"][:, None], p["b"])),
    {"w": (D,), "b": (1,), "head": (1, C)},
  ),
  "per example": Kind(per_example, transposed, B),
  "bias written out": Kind(
    lambda p, x: jnp.tanh(jnp.broadcast_to(p["b"], (len(x), D)) + jnp.tensordot(x, p["w"], 1)),
    plain,
    B,
  ),
  "bias outside a jit": Kind(
    lambda p, x: jnp.tanh(jax.jit(jnp.dot)(x, p["w"]).astype("float64") + p["b"].reshape(1, D)),
    plain,
    B,
  ),
  "bias through reshapes": Kind(
    lambda p, x: jnp.tanh(
      ((x @ p["w"]).reshape(len(x), 2, 2).swapaxes(1, 2) + p["b"].reshape(2, 2).T).swapaxes(1, 2)
    ).reshape(len(x), D),
    plain,
    B,
  ),
  "residual before the bias": Kind(
    lambda p, x: jnp.tanh((x + x @ p["w"]) + p["b"]),
    lambda p, x, tap: jnp.tanh(tap("w", x, p["w"], p["b"]) + x),
    B,
  ),
  "heads": Kind(
    lambda p, x: flat(jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["w"]) + p["b"])), heads, HEADS
  ),
  "heads, other order": Kind(
    lambda p, x: flat(jnp.tanh(jnp.einsum("dhk,nd->hnk", p["w"], x).swapaxes(0, 1) + p["b"])),
    heads,
    HEADS,
  ),
  "heads joined": Kind(
    lambda p, x: jnp.tanh(jnp.einsum("nkh,hkd->nd", x.reshape(N // 2, 2, 2), p["w"])),
    lambda p, x, tap: jnp.tanh(
      tap("w", x.reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1, D), p["w"].reshape(D, D))
    ),
    {"w": (2, 2, D)},
  ),
  "experts": Kind(
    lambda p, x: jnp.tanh(jnp.sum(jnp.einsum("nd,edk->enk", x, p["w"]) + p["b"][:, None], 0)),
    lambda p, x, tap: jnp.tanh(
      tap("w", x, p["w"].swapaxes(0, 1).reshape(D, -1), p["b"].reshape(-1)).reshape(-1, E, D).sum(1)
    ),
    EXPERTS,
  ),
  "experts, batched": Kind(
    lambda p, x: jnp.tanh(
      jnp.sum(jnp.einsum("end,edk->enk", jnp.stack([x] * E), p["w"]) + p["b"][:, None], 0)
    ),
    experts,
    EXPERTS,
  ),
  "experts, vmapped": Kind(
    lambda p, x: jnp.tanh(
      jnp.sum(jax.vmap(lambda x, w, b: x @ w + b)(jnp.stack([x] * E), p["w"], p["b"]), 0)
    ),
    experts,
    EXPERTS,
  ),
  "unrolled": Kind(stacked_list, layers, STACK),
  "scanned": Kind(scanned, layers, STACK),
  "scanned, unroll": Kind(lambda p, x: scanned(p, x, unroll=2), layers, STACK),
  "scanned backwards": Kind(
    lambda p, x: scanned({k: v[::-1] for k, v in p.items()}, x, reverse=True),
    layers_backwards,
    STACK,
  ),
  "scan of checkpoint": Kind(lambda p, x: scanned(p, x, jax.checkpoint), layers, STACK),
  "checkpoint of scan": Kind(jax.checkpoint(scanned), layers, STACK),
  "nested scans": Kind(nested, nested_canonical, {"w": (E * L, D, D), "b": (E * L, D)}),
  "recurrent": Kind(recurrent, recurrent_canonical, B | {"u": (D, D)}, tokens=True),
  "recurrent, unrolled": Kind(
    recurrent_unrolled, recurrent_canonical, B | {"u": (D, D)}, tokens=True
  ),
  "shared": Kind(shared, shared_canonical, B),
  "shared in two spellings": Kind(shared_in_two_spellings, shared_canonical, B),
  "split": Kind(split_parts, parts_canonical, {"w": (D, 3 * D)}),
  "slices": Kind(sliced_parts, parts_canonical, {"w": (D, 3 * D)}),
  "split with bias": Kind(qkv_with_bias, qkv_with_bias_canonical, {"w": (D, 3 * D), "b": (3 * D,)}),
  "part of a weight": Kind(
    lambda p, x: jnp.tanh(x[:, ::-2] @ p["w"][::2, :D]),
    lambda p, x, tap: jnp.tanh(tap("w", x[:, ::-2], p["w"][::2, :D])),
    {"w": (D, 2 * D)},
  ),
  "adapter": Kind(adapter, adapter_canonical, B | {"down": (D, 2), "up": (2, D)}),
  "rules around": Kind(activation_with_a_rule, activation_with_a_rule_canonical, W),
  "sequence": Kind(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] + p["b"]), 1), pooled, B, tokens=True),
  "sequence, mapped": Kind(mapped_tokens, pooled, B, tokens=True),
  "token mean": Kind(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), plain, B, terms=T, tokens=True),
}  # fmt: skip


def relative(actual, desired, tolerance=1e-10):
  desired = np.asarray(desired)
  np.testing.assert_allclose(
    actual, desired, rtol=0, atol=tolerance * (np.abs(desired).max() + 1e-30)
  )


@pytest.mark.parametrize("name", KINDS)
def test_gradients_and_factors(name):
  kind = KINDS[name]
  shapes = {"head": (D, C)} | kind.params
  params = {key: jnp.asarray(draw(*shape, seed=i)) for i, (key, shape) in enumerate(shapes.items())}
  x, y = kind.batch()
  captured = fop_optax.capture(kind.loss, params, x, y, groups=2, strict=True)
  expected = explicit.evaluate(kind.tapped, params, x, y, groups=2, terms=kind.terms)
  value_and_grad = jax.jit(captured.value_and_grad, static_argnames="refresh")
  for refresh in (True, False):
    loss, grads, stats = value_and_grad(params, x, y, refresh=refresh)
    relative(loss, expected.loss)
    for key in params:
      first, second = (group[key] for group in expected.grads)
      relative(grads[key], (first + second) / 2)
      relative(stats.contrasts[0][key], first - second, 1e-8)

  _, _, stats = value_and_grad(params, x, y, refresh=True)
  found = {}
  for layer, factors in zip(captured.layers, stats.factors, strict=True):
    path = captured.layers.paths[layer.weight]
    found.setdefault(path, []).extend(zip(*factors, strict=True))
  matrices = {(f"['{key}']", place): matrix for (key, place), matrix in expected.matrices.items()}
  assert {(path, i) for path in found for i in range(len(found[path]))} == set(matrices)
  for (path, place), matrix in matrices.items():
    for actual, desired in zip(found[path][place], matrix.factors, strict=True):
      relative(actual, desired)


def mlp(p, x, y):
  return head(p, jnp.tanh(x @ p["w"] + p["b"]), y)


def mlp_inputs():
  params = {k: jnp.asarray(draw(*s)) for k, s in {**B, "head": (D, C)}.items()}
  return params, jnp.asarray(draw(N, D)), jnp.arange(N) % C


def test_max_dim_keeps_diagonals():
  params, x, y = mlp_inputs()
  full = fop_optax.capture(mlp, params, x, y).value_and_grad(params, x, y)[2].factors
  assert fop_optax.capture(mlp, params, x, y, max_dim=D).layers[1].diagonal == (False, False)
  captured = fop_optax.capture(mlp, params, x, y, max_dim=D - 1)  # the bias does not count
  (_, (A, G)) = jax.jit(captured.value_and_grad)(params, x, y)[2].factors
  assert captured.layers[1].diagonal == (True, True)
  assert "5d x 4d" in str(captured)
  relative(A, np.diagonal(full[1].A, axis1=1, axis2=2))
  relative(G, np.diagonal(full[1].G, axis1=1, axis2=2))


@pytest.mark.parametrize(
  ("groups", "micro_batches"),
  [(1, 1), (2, 2), (2, 4), (4, 1), pytest.param(8, 1, marks=pytest.mark.slow)],
)
def test_any_groups_and_micro_batches_give_the_same_mean(groups, micro_batches):
  params, x, y = mlp_inputs()
  capture = lambda **options: fop_optax.capture(mlp, params, x, y, **options)
  value_and_grad = jax.jit(capture(groups=groups, micro_batches=micro_batches).value_and_grad)
  loss, grads, stats = value_and_grad(params, x, y, refresh=jnp.array(True))
  whole_loss, whole_grads, whole_stats = capture().value_and_grad(params, x, y)
  relative(loss, whole_loss)
  jax.tree.map(relative, grads, whole_grads)
  jax.tree.map(relative, stats.factors, whole_stats.factors)
  assert len(stats.contrasts) == groups - 1
  by_group = np.stack(
    [jax.grad(mlp)(params, x[i::groups], y[i::groups])["w"] for i in range(groups)]
  )
  if groups > 1:  # contrasts: sqrt(2) times an orthonormal basis of what sums to zero
    c = np.stack([contrast["w"] for contrast in stats.contrasts])
    spread = by_group - by_group.mean(0)
    relative(np.tensordot(c, c, (0, 0)), 2 * np.tensordot(spread, spread, (0, 0)))


@pytest.mark.parametrize("terms", [1, 16])
def test_kronecker_is_the_dense_fisher_where_every_input_meets_every_output_gradient(terms):
  inputs, targets = draw(4, D), draw(5, K)
  pairs = [(a, t) for a in inputs for t in targets]
  x = jnp.asarray(np.stack([np.stack([a] * terms) for a, _ in pairs]))
  t = jnp.asarray(np.stack([np.stack([t] * terms) for _, t in pairs]))
  params = {"w": jnp.zeros((D, K))}  # so that dy = -t / n does not depend on x
  loss = lambda p, x, t: fop_optax.squared_error(x @ p["w"], t)
  captured = fop_optax.capture(loss, params, x, t)
  (A, G) = jax.jit(captured.value_and_grad)(params, x, t)[2].factors[0]
  of_term = jax.grad(lambda p, x, t: 0.5 * jnp.sum((x @ p["w"] - t) ** 2))
  g = jax.vmap(of_term, (None, 0, 0))(params, x.reshape(-1, D), t.reshape(-1, K))["w"]
  g = g.reshape(len(g), -1)
  relative(np.kron(A[0], G[0]), g.T @ g / len(g))


def test_terms_are_known_from_the_mark_or_the_mean_or_given():
  params, x = {"w": jnp.asarray(draw(D, C))}, jnp.asarray(draw(N, T, D))
  y = jnp.arange(N * T).reshape(N, T) % C
  marked = lambda p, x, y: fop_optax.softmax_cross_entropy(x @ p["w"], y)
  unmarked = lambda p, x, y: (
    -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ p["w"]), y[..., None], -1))
  )
  chunked = lambda p, x, y: jnp.mean(
    jax.lax.map(lambda xy: marked(p, *xy), (x.swapaxes(0, 1), y.swapaxes(0, 1)))
  )
  G = lambda loss, **options: (
    fop_optax.capture(loss, params, x, y, **options).value_and_grad(params, x, y)[2].factors[0].G
  )
  relative(G(marked), G(unmarked))  # read off its mean
  relative(G(marked), T * G(unmarked, terms_per_example=1))
  relative(G(marked), G(chunked))
  relative(G(unmarked, terms_per_example=1), G(marked, terms_per_example=1))


def test_bfloat16_activations_and_weights_have_float32_factors():
  with jax.enable_x64(False):
    params = {k: jnp.asarray(draw(*s), "float32") for k, s in {**B, "head": (D, C)}.items()}
    x, y = jnp.asarray(draw(N, D), "float32"), jnp.arange(N) % C
    half = lambda p: jax.tree.map(lambda a: a.astype("bfloat16"), p)
    mixed = lambda p, x, y: mlp(half(p), x.astype("bfloat16"), y).astype("float32")
    kinds = {
      "activations": (mixed, params),
      "weights": (mixed, half(params)),
      "none": (mlp, params),
    }
    found = {}
    for name, (loss, p) in kinds.items():
      captured = fop_optax.capture(loss, p, x, y, strict=True)
      _, grads, stats = jax.jit(captured.value_and_grad)(p, x, y)
      assert {leaf.dtype for leaf in jax.tree.leaves(stats.factors)} == {jnp.dtype("float32")}
      assert jax.tree.map(lambda a: a.dtype, grads) == jax.tree.map(lambda a: a.dtype, p)
      found[name] = stats.factors
    for name in ("activations", "weights"):
      jax.tree.map(lambda a, b: relative(a, b, 0.03), found[name], found["none"])


def test_layers_are_static_data():
  params, x, y = mlp_inputs()
  captured = fop_optax.capture(mlp, params, x, y)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x, y))
  again = fop_optax.capture(mlp, *shapes).layers
  assert captured.layers == again == pickle.loads(pickle.dumps(again))
  assert hash(captured.layers) == hash(again)
  assert not callable(captured.layers)
  # another batch size: the same layers
  other = jax.jit(captured.value_and_grad)(params, x[:4], y[:4])
  assert other[2].factors[0].A.shape == captured.layers[0].factor_shapes[0]


def test_table():
  params, x, y = mlp_inputs()
  loss = lambda p, x, y: mlp(p, x * p["scale"], y)
  text = str(fop_optax.capture(loss, params | {"scale": jnp.ones(D)}, x, y))
  assert "['w']      4x4    dense          5 x 4    1" in text
  assert "['b']      4      bias of ['w']" in text
  assert "fallback: it is multiplied entry by entry (`mul`) at " in text
  assert "32 of 36 parameters (88.9%) are in layers." in text
  loss = lambda p, x, y: mlp(p, x, y) + jnp.sum(p["big"] ** 2)
  params |= {"big": jnp.ones(100), "small": jnp.ones(3)}
  with pytest.warns(UserWarning, match=r"76% of the parameters are in no layer.*\n.*'big'.* \(100"):
    captured = fop_optax.capture(loss, params, x, y)
  assert "Warning: many are left to the fallback optimizer" in str(captured)
  with warnings.catch_warnings():  # what no gradient reaches is not left to it
    warnings.simplefilter("error")
    text = str(fop_optax.capture(mlp, params, x, y))
  assert "Warning: 103 parameters are reached by no gradient: the loss stops it, or takes" in text
  both = {name: params[name] for name in ("w", "b", "head")} | {
    "scale": jnp.ones(D),
    "shift": jnp.ones(D),
  }
  scaled = lambda p, x, y: mlp(p, x * (p["scale"] * p["shift"]), y)
  with pytest.warns(UserWarning, match="% of the parameters"):
    text = str(fop_optax.capture(scaled, both, x, y))
  assert text.count("entry by entry (`mul`) at ") == 1  # a reason that two have stands there once
  assert "['shift']  4      fallback: as ['scale']" in text
  with pytest.raises(ValueError, match="it should not close over the parameters"):
    fop_optax.capture(lambda p, x, y: mlp(params, x, y), params, x, y)

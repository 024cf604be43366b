"""Seventeen ways in which models use a weight: each weight is in a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_capture import draw, relative

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, H, V, E, L, C = 4, 3, 4, 2, 6, 2, 3, 3


def convolve(x, w, groups=1):
  spatial = "HW"[: w.ndim - 2]
  spec = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
  return jax.lax.conv_general_dilated(x, w, (1,) * len(spatial), "SAME", None, None, spec, groups)


def dense(p, x):
  return jnp.tanh(x @ p["w"] + p["b"])


def layer_norm(p, x):
  h = x @ p["w"]
  h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
  return jnp.tanh(h * p["scale"] + p["shift"])


def half_precision(p, x):
  half = lambda a: a.astype(jnp.bfloat16)
  return jnp.tanh(half(x) @ half(p["w"]) + half(p["b"])).astype(jnp.float64)


def tied(p, x):
  h = jnp.tanh(p["w"][x] @ p["u"])
  return (h @ p["w"].T).mean(1)


def experts(p, x):
  gate = jax.nn.softmax(x @ p["gate"])
  return jnp.einsum("ne,nek->nk", gate, jnp.tanh(jnp.einsum("nd,edk->nek", x, p["w"])))


def attention(p, x):
  q, k, v = (jnp.einsum("ntd,dhk->nthk", x, p[name]) for name in "qkv")
  scores = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k))
  return jnp.einsum("nhts,nshk,hkd->ntd", scores, v, p["o"]).mean(1)


def stacked(p, x):
  return jax.lax.scan(lambda h, layer: (dense({"w": layer[0], "b": layer[1]}, h), None), x,
                      (p["w"], p["b"]))[0]  # fmt: skip


TOKENS, IDS, IMAGE = (T, D), "ids", (5, 5, D)
HEADS = dict.fromkeys("qkv", (D, H, 2))
FORMS = {
  "dense": (dense, {"w": (D, D), "b": (D,)}, (D,)),
  "dense under checkpoint": (jax.checkpoint(dense), {"w": (D, D), "b": (D,)}, (D,)),
  "conv 2-D": (
    lambda p, x: jnp.tanh(convolve(x, p["w"]) + p["b"]).mean((1, 2)),
    {"w": (3, 3, D, D), "b": (D,)}, IMAGE,
  ),
  "layer norm": (layer_norm, {"w": (D, D), "scale": (D,), "shift": (D,)}, (D,)),
  "dense on tokens": (lambda p, x: dense(p, x).mean(1), {"w": (D, D), "b": (D,)}, TOKENS),
  "transposed": (lambda p, x: jnp.tanh(x @ p["w"].T), {"w": (D, D)}, (D,)),
  "vmap": (lambda p, x: jnp.tanh(jax.vmap(lambda x: p["w"] @ x + p["b"])(x)),
           {"w": (D, D), "b": (D,)}, (D,)),
  "bfloat16": (half_precision, {"w": (D, D), "b": (D,)}, (D,)),
  "embedding": (lambda p, x: jnp.tanh(p["w"][x]).mean(1), {"w": (V, D)}, IDS),
  "tied embedding": (tied, {"w": (V, D), "u": (D, D)}, IDS),
  "experts": (experts, {"w": (E, D, D), "gate": (D, E)}, (D,)),
  "conv 1-D": (lambda p, x: jnp.tanh(convolve(x, p["w"])).mean(1), {"w": (3, D, D)}, TOKENS),
  "depthwise": (
    lambda p, x: jnp.tanh(convolve(x, p["w"], D)).mean((1, 2)), {"w": (3, 3, 1, D)}, IMAGE,
  ),
  "used twice": (lambda p, x: dense(p, dense(p, x)), {"w": (D, D), "b": (D,)}, (D,)),
  "attention": (attention, {**HEADS, "o": (H, 2, D)}, TOKENS),
  "scan over layers": (stacked, {"w": (L, D, D), "b": (L, D)}, (D,)),
  "no marked loss": (dense, {"w": (D, D), "b": (D,)}, (D,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_seventeen_forms_are_layers(name):
  forward, shapes, example = FORMS[name]
  params = {key: jnp.asarray(draw(*shape)) for key, shape in shapes.items()}
  params["head"] = jnp.asarray(draw(V if name == "tied embedding" else D, C))
  x = jnp.arange(N * T).reshape(N, T) % V if example == IDS else jnp.asarray(draw(N, *example))
  y = jnp.arange(N) % C

  def loss(p, x, y):
    logits = forward(p, x) @ p["head"]
    if name == "no marked loss":
      return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])
    return fop_optax.softmax_cross_entropy(logits, y)

  captured = fop_optax.capture(loss, params, x, y, groups=2)
  in_layers = {captured.layers.paths[leaf] for leaf in captured.layers.covered}
  vectors = {"scale", "shift"}  # of a norm: no product, and left to the fallback
  assert in_layers == {f"['{key}']" for key in params if key not in vectors}
  assert all(captured.fallbacks[f"['{key}']"] for key in vectors & set(params))
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  mean = lambda p: (loss(p, x[::2], y[::2]) + loss(p, x[1::2], y[1::2])) / 2
  jax.tree.map(relative, grads, jax.jit(jax.grad(mean))(params))
  assert all(np.all(np.isfinite(factor)) for factor in jax.tree.leaves(stats.factors))
  assert all(np.any(factor) for factor in jax.tree.leaves(stats.factors))


def test_there_are_seventeen():
  assert len(FORMS) == 17

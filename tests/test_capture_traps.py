"""Losses that look as if they had a layer where there is none: never silently wrong."""

import re

import jax
from jax.experimental import pallas
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, C = 8, 3, 4, 3


def draw(*shape, seed=0):
  return np.random.default_rng(seed + sum(shape)).normal(size=shape) / np.sqrt(shape[0])


def cross_entropy(logits, y):
  return fop_optax.softmax_cross_entropy(logits, y)


def grouped_gradient(loss, params, x, y, groups):
  """Gradient of the mean over groups of the loss, by `jax.grad`."""
  mean = lambda p: sum(loss(p, x[i::groups], y[i::groups]) for i in range(groups)) / groups
  return jax.grad(mean)(params)


def spectral_norm(p, x, y):
  v = jnp.ones(D)
  for _ in range(2):
    v = p["w"] @ v / jnp.linalg.norm(p["w"] @ v)
  return cross_entropy(x @ (p["w"] / jnp.linalg.norm(v)) @ p["head"], y)


def standardised(p, x, y):
  w = (p["w"] - p["w"].mean(0)) / p["w"].std(0)
  return cross_entropy(x @ w @ p["head"], y)


def table_read_twice(p, x, y):
  h = jnp.tanh(jnp.stack([x] * T, 1) @ p["ok"] + p["w"])
  return cross_entropy((h.mean(1) * jnp.sum(p["w"] ** 2)) @ p["head"], y)


def masked(p, x, y):
  return cross_entropy(x @ jnp.where(jnp.tri(D) > 0, p["w"], 0.0) @ p["head"], y)


def bias_by_example(p, x, y):  # one entry an output feature, but only of the first product's rows
  h = jnp.tanh(x @ p["ok"] + jnp.sum(p["w"][:1], 0))
  return cross_entropy(h @ p["head"], y)


def scalar_bias(p, x, y):
  return cross_entropy(jnp.tanh(x @ p["ok"] + p["w"]) @ p["head"], y)


def product_read_twice(p, x, y):  # the gradient at the product is not the one at the sum
  z = x @ p["ok"]
  return cross_entropy((jnp.tanh(z + p["w"]) + z) @ p["head"], y)


def bias_read_twice(p, x, y):
  return cross_entropy(jnp.tanh(x @ p["ok"] + p["w"]) @ p["head"] + jnp.sum(p["w"]) * x[:, :C], y)


def bias_of_two(p, x, y):
  return cross_entropy((jnp.tanh(x @ p["ok"] + p["w"]) @ p["ok2"] + p["w"]) @ p["head"], y)


def overlapping(p, x, y):
  return cross_entropy((x @ p["w"][:, :3] @ p["a"] + x @ p["w"][:, 1:] @ p["a"]) @ p["head"], y)


def two_orders(p, x, y):
  h = jnp.tanh(x @ p["w"])
  return cross_entropy(h @ p["w"].reshape(2, -1, D).swapaxes(0, 1).reshape(D, D) @ p["head"], y)


@jax.custom_vjp
def tripled(x, w):
  return x @ w


tripled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, 3.0 * r[0].T @ dy))


def custom_vjp(p, x, y):  # its gradient is what its author says, not the product's
  return cross_entropy(tripled(x, p["w"]) @ p["head"], y)


@jax.custom_jvp
def doubled(x, w):
  return x @ w


doubled.defjvp(
  lambda primals, tangents: (
    doubled(*primals),
    tangents[0] @ primals[1] + 2.0 * primals[0] @ tangents[1],
  )
)


def custom_jvp(p, x, y):
  return cross_entropy(doubled(x, p["w"]) @ p["head"], y)


def traced_index(p, x, y):
  h = jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"][i]), x)
  return cross_entropy(h @ p["head"], y)


def branch(p, x, y):
  h = jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: -(x @ p["w"]), x)
  return cross_entropy(h @ p["head"], y)


def joined(p, x, y):
  return cross_entropy(x @ jnp.concatenate([p["w"], p["w"].T], 1)[:, :D] @ p["head"], y)


def merged_adapter(p, x, y):
  return cross_entropy(x @ (p["ok"] + p["w"] @ p["a"]) @ p["head"], y)


def pooled(p, x, y):  # depends on the batch, but has no row an example
  return cross_entropy(x @ p["ok"] @ p["head"] + (jnp.mean(x, 0) @ p["w"])[:C], y)


def gram(p, x, y):  # [D, D] rows, whatever the batch
  return cross_entropy(x @ (x.T @ x @ p["w"]) @ p["head"], y)


def stopped(p, x, y):
  return cross_entropy(x @ jax.lax.stop_gradient(p["w"]) @ p["head"], y)


def looked_up(p, x, y):  # one entry an example, no row
  return cross_entropy(x @ p["ok"] @ p["head"] + p["w"][y, y][:, None] * x[:, :C], y)


def carried(p, x, y):
  step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.9), None)
  (h, _), _ = jax.lax.scan(step, (x, p["w"]), None, length=2)
  return cross_entropy(h @ p["head"], y)


def multiplied_weights(p, x, y):
  return cross_entropy(x @ (p["w"] @ p["a"]) @ p["head"], y)


W = draw(D, D)
TRAPS = [
  (spectral_norm, {"w": W}, {"w": "`div`"}),
  (standardised, {"w": W}, {"w": "`reduce_sum`|`sub`"}),
  (table_read_twice, {"w": draw(T, D), "ok": W}, {"w": "`integer_pow`|`square`|`mul`"}),
  (masked, {"w": W}, {"w": "masked"}),
  (bias_by_example, {"w": W, "ok": W}, {"w": "`reduce_sum`"}),
  (scalar_bias, {"w": draw(1), "ok": W}, {"w": "one entry for each output feature"}),
  (scalar_bias, {"w": np.float64(0.5), "ok": W}, {"w": "not the output of one layer"}),
  (product_read_twice, {"w": draw(D), "ok": W}, {"w": "not the output of one layer"}),
  (bias_read_twice, {"w": draw(D), "ok": W}, {"w": "`reduce_sum`"}),
  (bias_of_two, {"w": draw(D), "ok": W, "ok2": W}, {"w": "bias of two layers"}),
  (overlapping, {"w": W, "a": draw(3, D)}, {"w": "overlapping parts"}),
  (two_orders, {"w": W}, {"w": "two orders of its entries"}),
  (custom_vjp, {"w": W}, {"w": "custom_vjp"}),
  (custom_jvp, {"w": W}, {"w": "custom_jvp"}),
  (traced_index, {"w": draw(2, D, D)}, {"w": "traced index"}),
  (branch, {"w": W}, {"w": "inside a branch"}),
  (joined, {"w": W}, {"w": "joined with other arrays"}),
  (merged_adapter, {"w": draw(D, 2), "a": draw(2, D), "ok": W},
   {"w": "another parameter", "a": "another parameter", "ok": "not the output of one layer"}),
  (pooled, {"w": W, "ok": W}, {"w": "do not grow with the batch"}),
  (gram, {"w": W}, {"w": "do not grow with the batch"}),
  (stopped, {"w": W}, {"w": "no gradient of the loss reaches it"}),
  (looked_up, {"w": draw(C, D), "ok": W}, {"w": "looked up one by one"}),
  (carried, {"w": W}, {"w": "carried through a `scan`"}),
  (multiplied_weights, {"w": W, "a": W}, {"w": "another parameter", "a": "another parameter"}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The loss of a batch is not the mean")  # some, in earnest
@pytest.mark.parametrize(
  "loss, params, refused", TRAPS, ids=lambda value: getattr(value, "__name__", None)
)
def test_trap(loss, params, refused):
  params = jax.tree.map(jnp.asarray, params | {"head": draw(D, C)})
  x, y = jnp.asarray(draw(N, D)), jnp.arange(N) % C
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  for name, why in refused.items():
    reason = captured.fallbacks[f"['{name}']"]
    assert re.search(why, reason), reason
  in_layers = {captured.layers.paths[leaf] for leaf in captured.layers.covered}
  assert in_layers == {f"['{name}']" for name in params if name not in refused}
  expected = grouped_gradient(loss, params, x, y, groups=2)
  _, grads, _ = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)


def test_strict_quotes_the_equation_and_its_source_line():
  params = {"w": W, "head": draw(D, C)}
  with pytest.raises(
    ValueError, match=r"(?s)in no layer.*\['w'\]: .*`reduce_sum`.*test_capture_traps\.py:\d+"
  ):
    fop_optax.capture(standardised, params, draw(N, D), jnp.arange(N) % C, strict=True)


def test_a_line_is_the_callers_where_the_loss_is_the_librarys():
  summed = lambda params, x, y: len(x) * fop_optax.softmax_cross_entropy(x @ params["w"], y)
  with pytest.warns(UserWarning, match=r"summed at .*test_capture_traps\.py:\d+"):
    fop_optax.capture(summed, {"w": draw(D, C)}, draw(N, D), jnp.arange(N) % C)


def test_source_lines_hold_no_colours_in_a_notebook(monkeypatch):
  monkeypatch.setattr("jax._src.pretty_printer.CAN_USE_COLOR", True)
  captured = fop_optax.capture(
    standardised, {"w": W, "head": draw(D, C)}, draw(N, D), jnp.arange(N) % C
  )
  assert "test_capture_traps.py" in str(captured) and "\x1b" not in str(captured)


def test_metrics_beside_the_loss_refuse_nothing():
  def loss(p, x, y):
    logits = x @ p["w"] + p["b"]
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)))
    accuracy = jnp.mean(jnp.argmax(logits, 1) == y)
    target = jax.lax.stop_gradient(jnp.tanh(x @ p["w"]).sum(1))
    return cross_entropy(logits, y) + 0.1 * jnp.mean(target), (norm, accuracy)

  params, x, y = {"w": draw(D, C), "b": draw(C)}, draw(N, D), jnp.arange(N) % C
  captured = fop_optax.capture(loss, params, x, y, has_aux=True)
  assert not captured.fallbacks
  assert captured.layers[0].uses == 1


def test_a_branch_that_the_program_fixes_is_no_branch():
  learns = lambda flag, p: jax.lax.cond(flag, lambda p: p, jax.lax.stop_gradient, p)

  def loss(p, x, y):
    p = {"w": jax.jit(learns, static_argnums=0)(True, p["w"]), "v": learns(False, p["v"])}
    h = jax.lax.cond(True, lambda x, w: jnp.tanh(x @ w), lambda x, w: x, x, p["w"])
    return cross_entropy(h + x @ p["v"], y)

  def plain(p, x, y):
    return cross_entropy(jnp.tanh(x @ p["w"]) + x @ jax.lax.stop_gradient(p["v"]), y)

  params, x, y = {"w": W, "v": W + 1}, draw(N, D), jnp.arange(N) % D
  captured, expected = (fop_optax.capture(f, params, x, y) for f in (loss, plain))
  assert captured.fallbacks == expected.fallbacks == {"['v']": "no gradient of the loss reaches it"}
  both = lambda p: [jax.jit(c.value_and_grad)(p, x, y) for c in (captured, expected)]
  ours, theirs = jax.jit(both)(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def sharded_body(p, x, y):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  dot = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  return cross_entropy(dot(x, p["w"]) @ p["head"], y)


@jax.custom_vjp
def kernel_product(x, w):
  def kernel(x, w, out):
    out[...] = x[...] @ w[...]

  shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
  return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


kernel_product.defvjp(
  lambda x, w: (kernel_product(x, w), (x, w)), lambda r, dy: (dy @ r[1].T, r[0].T @ dy)
)


def kernel_body(p, x, y):
  return cross_entropy(kernel_product(x, p["w"]) @ p["head"], y)


@pytest.mark.parametrize(
  "loss, reason", [(sharded_body, "`shard_map`"), (kernel_body, "`custom_vjp`")]
)
def test_bodies_of_shard_map_and_pallas_are_not_looked_into(loss, reason):
  params = {"w": jnp.asarray(W), "head": jnp.asarray(draw(D, C))}
  x, y = jnp.asarray(draw(N, D)), jnp.arange(N) % C
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  assert re.search(reason, captured.fallbacks["['w']"])
  expected = grouped_gradient(loss, params, x, y, groups=2)
  _, grads, _ = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)

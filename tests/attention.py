"""A small network with a weight of every form: what optimizers make of captured layers."""

import jax
import jax.numpy as jnp
import numpy as np

import fop_optax


def loss(params, x):
  """A lookup, heads, a fused weight in parts, a norm scale, a scan, and a weight outputs first."""
  tokens = (10 * x[:, 0]).astype(int) % 7
  h = x + params["table"][tokens]
  q = jnp.einsum("bi,ihd->bhd", h, params["query"])
  k, v = (h @ params["fused"][:, own] + params["b"][own] for own in (slice(0, 4), slice(4, 8)))
  h = jnp.einsum("bhd,hdo->bo", jnp.tanh(q), params["out"]) + k * v
  step = lambda h, w: (jnp.tanh(h @ w["w"] + w["b"]), None)
  h, _ = jax.lax.scan(step, h * params["gain"], params["scanned"])
  return jnp.mean((h @ params["last"].T) ** 2)


SHAPES = {
  "table": (7, 4),
  "query": (4, 2, 3),
  "fused": (4, 8),
  "b": (8,),
  "out": (2, 3, 4),
  "gain": (4,),
  "scanned": {"w": (3, 4, 4), "b": (3, 4)},
  "last": (2, 4),
}
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
  lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
  SHAPES,
  is_leaf=lambda shape: isinstance(shape, tuple),
)
X = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
LAYERS = fop_optax.capture(loss, PARAMS, X).layers

"""Dimension numbers from layers: the matrices of the layers' views, and optax's Muon on them."""

import math

from attention import LAYERS, PARAMS
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import fop_optax
from fop_optax import views
from fop_optax.tensors import tensors

RNG = np.random.default_rng(2)
Numbers = optax.contrib.MuonDimensionNumbers
NUMBERS = {
  "table": None,
  "query": Numbers((0,), (1, 2)),
  "fused": None,
  "b": None,
  "out": Numbers((0, 1), (2,)),
  "gain": None,
  "scanned": {"w": Numbers((1,), (2,)), "b": None},
  "last": Numbers((1,), (0,)),
}


def convolutions(params, x):
  """Kernels of several layouts, one of them depthwise; experts; scanned heads, outputs first."""
  conv = lambda x, w, spec, groups=1: lax.conv_general_dilated(
    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC"), feature_group_count=groups
  )
  h = jnp.tanh(conv(x, params["hwio"], "HWIO"))
  h = jnp.tanh(conv(h, params["oihw"], "OIHW"))
  h = jnp.mean(conv(h, params["depthwise"], "HWIO", groups=4), axis=(1, 2))
  h = jnp.sum(jnp.einsum("ebi,eio->ebo", jnp.stack([h, h**2]), params["experts"]), axis=0)
  step = lambda h, w: (jnp.tanh(jnp.einsum("bi,hdi->bhd", h, w).reshape(h.shape)), None)
  h, _ = lax.scan(step, h, params["heads"])
  return jnp.mean((h @ params["column"]) ** 2)


CONVOLUTIONS = {
  "hwio": (3, 2, 2, 4),
  "oihw": (4, 4, 3, 2),
  "depthwise": (3, 3, 1, 4),
  "experts": (2, 4, 6),
  "heads": (2, 2, 3, 6),
  "column": (6, 1),
}


def test_of_layers():
  numbers = fop_optax.dimension_numbers(LAYERS)
  assert numbers(PARAMS) == NUMBERS
  assert numbers.reasons == {
    "['b']": "bias of ['fused'] part 0, ['fused'] part 1",
    "['fused']": "2 matrices: ['fused'] part 0, ['fused'] part 1",
    "['gain']": "in no layer: see `captured.fallbacks`",
    "['scanned']['b']": "bias of ['scanned']['w']",
    "['table']": "its rows are treated one by one: a lookup table, or more than `max_dim`",
  }
  with pytest.raises(ValueError, match=r"params has 1 leaves, but these layers were captured"):
    numbers({"w": jnp.ones(2)})
  with pytest.raises(TypeError, match=r"has a dict for layers: pass `captured.layers`"):
    fop_optax.dimension_numbers(PARAMS)


def test_the_same_matrices_as_the_views():
  params = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in CONVOLUTIONS.items()
  }
  layers = fop_optax.capture(convolutions, params, jnp.ones((4, 5, 5, 2))).layers
  numbers = fop_optax.dimension_numbers(layers)
  assert numbers.reasons == {}
  assert numbers(params)["heads"] == Numbers((3,), (1, 2))
  assert numbers(params)["depthwise"] == Numbers((0, 1), (2,))
  leaves = jax.tree.leaves(params)
  own = {tensor.weight: tensor.gather(leaves) for tensor in tensors(params, numbers)}
  for layer in layers:
    np.testing.assert_array_equal(own[layer.weight], layer.gather(leaves), layer.path)


@pytest.mark.slow
def test_with_optax_muon():
  """On the same direction it is `orthogonalize` with the layers, but for parts of a weight."""
  numbers = fop_optax.dimension_numbers(LAYERS)
  muon = optax.contrib.muon(
    1.0, beta=0.0, nesterov=False, ns_steps=2, muon_weight_dimension_numbers=numbers
  )
  direction = jax.tree.map(jnp.cos, PARAMS)
  theirs, _ = jax.jit(muon.update)(direction, muon.init(PARAMS), PARAMS)
  tx = fop_optax.orthogonalize(ns_steps=2, layers=LAYERS, join_biases=False)
  ours, _ = tx.update(direction, optax.EmptyState())
  for name, own in NUMBERS.items():
    if isinstance(own, Numbers):
      np.testing.assert_allclose(ours[name], -theirs[name], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ours["scanned"]["w"], -theirs["scanned"]["w"], rtol=1e-4, atol=1e-5)


def test_grouped_axes_against_the_index_map():
  """Views that permute and group axes, also by reshapes that cut them and join them again."""
  for _ in range(50):
    shape = tuple(map(int, RNG.choice([1, 2, 3, 4, 6], size=RNG.integers(1, 5))))
    order = tuple(map(int, RNG.permutation(len(shape))))
    a, b = sorted(map(int, RNG.integers(0, len(shape) + 1, size=2)))
    groups = (order[:a], order[a:b], order[b:])
    dims = tuple(math.prod(shape[axis] for axis in axes) for axes in groups)
    cut = tuple(part for n in shape for part in ((2, n // 2) if n % 2 == 0 else (n,)))
    view = (("reshape", cut), ("reshape", shape), ("transpose", order), ("reshape", dims))
    want = [tuple(axis for axis in axes if shape[axis] > 1) for axes in groups]
    assert views.grouped_axes(view, shape) == want


@pytest.mark.parametrize(
  "view",
  [
    (("slice", (0, 0), (2, 6), (1, 1)), ("reshape", (1, 2, 6))),
    (("rev", (0,)), ("reshape", (1, 4, 6))),
    (("reshape", (3, 8)), ("reshape", (1, 3, 8))),  # no axis of 8 is a group of 4 and 6
    (("reshape", (4, 2, 3)), ("transpose", (1, 0, 2)), ("reshape", (1, 8, 3))),  # half an axis
  ],
)
def test_views_that_do_more(view):
  assert views.grouped_axes(view, (4, 6)) is None


def test_a_vector_is_no_matrix():
  loss = lambda params, x: jnp.mean((x @ params["v"]) ** 2)
  captured = fop_optax.capture(loss, {"v": jnp.ones(3)}, jnp.ones((4, 3)))
  numbers = fop_optax.dimension_numbers(captured.layers)
  assert numbers({"v": jnp.ones(3)}) == {"v": None}
  assert numbers.reasons["['v']"].startswith("a vector: it has no axis of one entry")

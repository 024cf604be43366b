"""Parameters as tensors: by their axes, by dimension numbers, by the layers that capture found."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax
from fop_optax import views
from fop_optax.tensors import tensors

METHODS = {
  "soap": fop_optax.scale_by_soap(inverse_update_period=1),
  "shampoo": fop_optax.scale_by_shampoo(eps=1e-4, inverse_update_period=1),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


@hypothesis.given(
  shape=st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple), size=st.integers(1, 5)
)
def test_pieces_hold_every_entry_once(shape, size):
  whole = tensors({"w": np.zeros(shape)})
  pieces = whole.map(lambda tensor: tensor.cut(size))
  seen = np.concatenate([views.index_map(piece.view, shape).ravel() for piece in pieces])
  assert sorted(seen.tolist()) == list(range(int(np.prod(shape))))
  assert all(d <= size for piece in pieces for d in piece.dims)


def loss(params, tokens, image):
  """A lookup, parts of one weight, a scanned stack, a convolution and a head with a bias."""
  x = params["table"][tokens]  # [N, T, 4]
  q, k, v = (x @ w for w in jnp.split(params["qkv"], 3, axis=1))
  x = jnp.tanh(q * k + v)
  x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["blocks"])[0]
  patches = jax.lax.conv_general_dilated(
    image, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  x = jnp.mean(x, axis=1) + jnp.mean(patches, axis=(1, 2))
  return jnp.mean((x @ params["head"].T + params["bias"]) ** 2)


SHAPES = {"bias": (2,), "blocks": (3, 4, 4), "conv": (3, 3, 2, 4), "head": (2, 4), "qkv": (4, 12),
          "table": (7, 4)}  # fmt: skip


def captured_params():
  params = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
  batch = jnp.arange(24).reshape(8, 3) % 7, normal(9, 8, 5, 5, 2)
  return params, fop_optax.capture(loss, params, *batch, strict=True).layers


def test_layers_say_what_is_a_matrix():
  params, layers = captured_params()
  found = tensors(params, layers=layers)
  rows = [(sorted(params)[t.weight], t.stack, t.dims, t.diagonal) for t in found]
  assert sorted(rows) == sorted(
    [
      ("bias", 1, (2,), (False,)),
      ("blocks", 3, (4, 4), (False, False)),
      ("conv", 1, (18, 4), (False, False)),
      ("head", 1, (4, 2), (False, False)),  # as it stands in the product
      *[("qkv", 1, (4, 4), (False, False))] * 3,
      ("table", 1, (7, 4), (True, False)),
    ]
  )
  leaves = jax.tree.leaves(params)
  shares = [t.spread(t.gather(leaves), found.shapes) for t in found]
  for index, leaf in enumerate(leaves):
    back = sum(own[index] for own in shares if index in own)
    np.testing.assert_array_equal(back, leaf)


def apart(tree):
  """The same parameters with each matrix as a leaf of its own."""
  q, k, v = jnp.split(tree["qkv"], 3, axis=-1)
  return {
    "bias": tree["bias"],
    "blocks": list(tree["blocks"]),
    "conv": tree["conv"].reshape(18, 4),
    "head": tree["head"].T,
    "qkv": [q, k, v],
  }


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_treated_as_matrices_apart(method):
  make = {"soap": fop_optax.scale_by_soap, "shampoo": fop_optax.scale_by_shampoo}[method]
  params, layers = captured_params()
  kwargs = {"inverse_update_period": 1} | ({"eps": 1e-3} if method == "shampoo" else {})
  tx, other = make(layers=layers, **kwargs), make(**kwargs)
  state, other_state = tx.init(params), other.init(apart(params))
  for step in range(3):
    grads = {name: normal(10 * step + i, *s) for i, (name, s) in enumerate(SHAPES.items())}
    got, state = jax.jit(tx.update)(grads, state)
    want, other_state = jax.jit(other.update)(apart(grads), other_state)
    got = apart(got)
    tolerance = 1e-3 if method == "shampoo" else 2e-4
    jax.tree.map(
      lambda a, b, tol=tolerance: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), got, want
    )


def test_equal_shapes_go_through_one_operation():
  """However many leaves of a shape there are, the program has as many factorisations as for one."""

  def factorisations(leaves):
    tx = fop_optax.scale_by_soap()
    params = {str(i): jnp.zeros((4, 4)) for i in range(leaves)}
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    return sum(text.count(name) for name in ("lapack_sgeqrf", "lapack_ssyevd", "lapack_sorgqr"))

  assert factorisations(1) == factorisations(5) > 0


@pytest.mark.parametrize("make", [fop_optax.soap, fop_optax.shampoo])
def test_what_does_not_fit(make):
  params, layers = captured_params()
  numbers = fop_optax.DimensionNumbers(0, 1)
  with pytest.raises(ValueError, match="`layers` and `dimension_numbers` both say .* one of them"):
    make(0.1, layers=layers, dimension_numbers=numbers)
  with pytest.raises(TypeError, match="`layers` is a dict, not a `Layers`"):
    make(0.1, layers=params)
  with pytest.raises(ValueError, match="has 1 leaves, but these layers were captured from params"):
    make(0.1, layers=layers).init({"w": jnp.zeros(3)})
  tx = make(0.1, weight_decay=0.0)
  w = jnp.ones((3, 2))
  with pytest.raises(ValueError, match=r"gradient is int32 at \['w'\], where it should be real"):
    tx.update({"w": jnp.ones((3, 2), int)}, tx.init({"w": w}))
  with pytest.raises(ValueError, match="complex64 at .*`optax.contrib.split_real_and_imaginary`"):
    tx.update({"w": w + 1j}, tx.init({"w": w}))
  with pytest.raises(ValueError, match=r"state is of another model .* \[\(1, 3, 2\)\], but this"):
    tx.update({"w": w.T}, tx.init({"w": w}))
  with pytest.raises(ValueError, match=r"`dimension_numbers` has \(0, 0\) for \['w'\]"):
    make(0.1, dimension_numbers=fop_optax.DimensionNumbers(0, 0)).init({"w": w})


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_odd(method):
  """Zero, of rank one, of one row, of one entry, huge, tiny: finite; not finite: no step."""
  tx = METHODS[method]
  kinds = {
    "zero": jnp.zeros((4, 3)),
    "rank one": jnp.outer(normal(0, 4), normal(1, 3)),
    "row": normal(2, 1, 5),
    "entry": normal(3, 1, 1),
    "scalar": normal(4),
    "huge": 1e18 * normal(5, 4, 3),
    "tiny": 1e-25 * normal(6, 4, 3),
    "empty": jnp.zeros((0, 3)),
  }
  state = tx.init(kinds)
  update = jax.jit(tx.update)
  for _ in range(4):
    updates, state = update(kinds, state)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
  report = fop_optax.diagnostics(state)
  assert report["count"] == 4
  assert set(report["stacks"]) == {"4 x 3", "1 x 5", "1 x 1", "1"}
  assert report["stacks"]["4 x 3"]["failed_inverses"].tolist() == [0] * 4
  assert all(x > 0 for x in report["stacks"]["4 x 3"]["inverses"].tolist())
  for bad in (jnp.nan, jnp.inf, 1e25):  # of the last the square overflows
    updates, after = update(kinds | {"row": bad * normal(2, 1, 5)}, state)
    assert all(bool(jnp.all(u == 0)) for u in jax.tree.leaves(updates))
    steps = state.steps._replace(nonfinite_gradients=state.steps.nonfinite_gradients + 1)
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(steps=steps))
  assert tx.init({}) is not None
  assert optax.tree.map_params(tx, lambda x: x, state) is not None

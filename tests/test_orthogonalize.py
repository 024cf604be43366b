"""Polar factors as a last step: NumPy's decomposition, optax's Muon, laws, and captured layers."""

import functools

from attention import LAYERS, PARAMS, X, loss
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import problems
import pytest

import fop_optax

EXACT = {"ns_coeffs": None, "scale": None}
CONVERGED = {"ns_coeffs": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 14, "scale": None}
RNG = np.random.default_rng(0)
MATRICES = {
  "wide": RNG.normal(size=(3, 5)),
  "tall": RNG.normal(size=(5, 3)),
  "square": RNG.normal(size=(4, 4)),
  "row": RNG.normal(size=(1, 4)),
  "column": RNG.normal(size=(4, 1)),
  "entry": RNG.normal(size=(1, 1)),
  "rank one": np.outer(RNG.normal(size=5), RNG.normal(size=3)),
  "zero": np.zeros((4, 4)),
}
make = functools.cache(fop_optax.orthogonalize)  # an update compiles once for each tree


def last_step(updates, **kwargs):
  """What `orthogonalize` makes of a tree."""
  return make(**kwargs).update(updates, optax.EmptyState())[0]


def polar(matrix):
  """The polar factor of a matrix, by NumPy."""
  U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
  real = s > 1e-5 * s[0]  # the rest is rounding: logits' gradients sum to zero
  return U[:, real] @ Vt[real]


def close(got, want, tol=1e-10):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), got, want)


@pytest.mark.parametrize(
  ("way", "names"), [(EXACT, MATRICES), (CONVERGED, ("wide", "tall", "row"))], ids=["exact", "ns"]
)
def test_polar_factor(way, names):
  with jax.enable_x64(True):
    got = last_step({name: jnp.asarray(MATRICES[name]) for name in names}, **way)
  close(got, {name: polar(MATRICES[name]) for name in names})


def test_as_optax_muon():
  """Without momentum, on matrices and on kernels with dimension numbers; both scales."""
  shapes = {"wide": (4, 6), "tall": (6, 4), "kernel": (4, 2, 3), "scanned": (2, 4, 6), "b": (3,)}
  numbers = dict.fromkeys(shapes) | {
    "wide": optax.contrib.MuonDimensionNumbers(),
    "tall": optax.contrib.MuonDimensionNumbers(1, 0),
    "kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
    "scanned": optax.contrib.MuonDimensionNumbers(1, 2),
  }
  with jax.enable_x64(True):  # in float32 the iteration multiplies rounding by a few hundred
    updates = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in shapes.items()}
    for scale, rms in (("muon", None), ("rms", 1.0)):
      muon = optax.contrib.muon(
        1.0,
        beta=0.0,
        nesterov=False,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=rms,
        ns_steps=3,
      )
      want, _ = jax.jit(muon.update)(updates, muon.init(updates), updates)
      tx = fop_optax.orthogonalize(ns_steps=3, scale=scale, dimension_numbers=numbers)
      got, _ = tx.update(updates, optax.EmptyState())
      close({**got, "b": 0}, {**jax.tree.map(jnp.negative, want), "b": 0}, 1e-6)


def test_coefficients_of_each_step():
  updates = {"w": jnp.asarray(MATRICES["wide"], jnp.float32)}
  triples = ((4.0848, -6.8946, 2.927), (3.9505, -6.3029, 2.6377))
  want = optax.contrib._muon.orthogonalize_via_newton_schulz(updates["w"], jnp.asarray(triples))
  close(last_step(updates, ns_coeffs=triples, scale=None)["w"], want, 1e-5)


def test_the_length_of_a_direction_makes_no_difference():
  updates = {k: jnp.asarray(m, jnp.float32) for k, m in MATRICES.items()} | {"b": jnp.arange(3.0)}
  for size in (1e-30, 1e30):
    scaled = jax.tree.map(lambda u, size=size: size * u, updates)
    close(last_step(scaled), last_step(updates), 1e-4)


def test_one_by_one_equals_batched():
  """Equal shapes and transposed ones go side by side."""
  stack = jnp.asarray(RNG.normal(size=(3, 4, 3)), jnp.float32)
  updates = {"a": stack[0], "b": stack[1], "turned": stack[2].T}
  got = last_step(updates, ns_steps=2)
  for name, own in updates.items():
    close(got[name], last_step({"w": own}, ns_steps=2)["w"], 1e-5)


def test_the_program_does_not_grow_with_leaves_of_equal_shape():
  def products(number):
    updates = {f"w{i}": jnp.ones((4, 6) if i % 2 else (6, 4)) for i in range(number)}
    step = jax.jit(lambda updates: last_step(updates, ns_steps=1))
    return step.lower(updates).compile().as_text().count(" dot(")

  assert products(2) == products(7) == 3


def test_scales_and_others():
  updates = {"w": jnp.asarray(RNG.normal(size=(3, 12)), jnp.float32), "b": jnp.array([3.0, -4.0])}
  exact = last_step(updates, **EXACT)
  close(exact["b"], updates["b"] / np.sqrt(12.5), 1e-6)
  close(last_step(updates, ns_coeffs=None)["w"], 2 * exact["w"], 1e-6)
  rms = last_step(updates, ns_coeffs=None, scale="rms")
  for leaf in jax.tree.leaves(rms):
    np.testing.assert_allclose(jnp.mean(leaf**2), 1, rtol=1e-5)
  kept = last_step(updates, others="keep")
  assert jnp.all(kept["b"] == updates["b"])
  assert not jnp.allclose(kept["w"], updates["w"])


def test_only_leaves_of_two_axes_are_matrices_by_themselves():
  kernel = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
  scalar, empty = jnp.array(-7.0), jnp.zeros((0, 3))
  got = last_step({"kernel": kernel, "scalar": scalar, "empty": empty})
  close(got["kernel"], kernel / jnp.sqrt(jnp.mean(kernel**2)), 1e-6)
  assert got["scalar"] == -1
  assert got["empty"].shape == (0, 3)


def test_not_finite_and_low_precision():
  bad = {"a": jnp.ones((2, 3)).at[0, 0].set(jnp.nan), "b": jnp.ones((2, 3))}
  got = last_step(bad, ns_steps=2)
  assert jnp.all(jnp.isnan(got["a"]))
  assert jnp.all(jnp.isfinite(got["b"]))
  updates = {"w": jnp.asarray(MATRICES["square"], jnp.bfloat16)}
  wide = jax.tree.map(lambda u: u.astype(jnp.float32), updates)
  narrow = last_step(updates, ns_steps=2)["w"]
  assert narrow.dtype == jnp.bfloat16
  close(narrow.astype(jnp.float32), last_step(wide, ns_steps=2)["w"], 1e-2)
  quick = last_step(wide, ns_steps=2, ns_dtype=jnp.bfloat16)["w"]
  assert quick.dtype == jnp.float32
  close(quick, last_step(wide, ns_steps=2)["w"], 5e-2)


DIRECTION = jax.tree.map(jnp.cos, PARAMS)


def test_matrices_of_layers():
  """Each as capture found it, biases as the last row; against NumPy, leaf by leaf."""
  d = jax.tree.map(np.asarray, DIRECTION)
  got = last_step(DIRECTION, layers=LAYERS, **EXACT)
  close(got["query"].reshape(4, 6), polar(d["query"].reshape(4, 6)), 1e-5)
  close(got["out"].reshape(6, 4), polar(d["out"].reshape(6, 4)), 1e-5)
  close(got["last"], polar(d["last"]), 1e-5)
  for part in (slice(0, 4), slice(4, 8)):
    want = polar(np.concatenate([d["fused"][:, part], d["b"][None, part]]))
    close(jnp.concatenate([got["fused"][:, part], got["b"][None, part]]), want, 1e-5)
  for i in range(3):
    want = polar(np.concatenate([d["scanned"]["w"][i], d["scanned"]["b"][i][None]]))
    scanned = got["scanned"]
    close(jnp.concatenate([scanned["w"][i], scanned["b"][i][None]]), want, 1e-5)
  close(got["gain"], d["gain"] / np.sqrt(np.mean(d["gain"] ** 2)), 1e-5)


def test_a_table_keeps_the_ratios_of_its_rows():
  """Its largest row has a root mean square of one; it is no matrix, and no row is blown up."""
  got, own = last_step(DIRECTION, layers=LAYERS, **EXACT)["table"], DIRECTION["table"]
  close(got / own, jnp.full(own.shape, got[0, 0] / own[0, 0]), 1e-5)
  np.testing.assert_allclose(jnp.max(jnp.mean(got**2, axis=1)), 1, rtol=1e-5)
  kept = last_step(DIRECTION, layers=LAYERS, others="keep", **EXACT)
  assert jnp.all(kept["table"] == own)


def test_wider_than_max_dim_is_no_matrix():
  wide = fop_optax.capture(loss, PARAMS, X, max_dim=3).layers
  got = last_step(DIRECTION, layers=wide, **EXACT)["last"]
  np.testing.assert_allclose(jnp.max(jnp.mean(got**2, axis=0)), 1, rtol=1e-5)


def test_biases_apart():
  d = jax.tree.map(np.asarray, DIRECTION["scanned"])
  got = last_step(DIRECTION, layers=LAYERS, join_biases=False, **EXACT)["scanned"]
  close(got["w"], np.stack([polar(w) for w in d["w"]]), 1e-5)
  close(got["b"], d["b"] / np.sqrt(np.mean(d["b"] ** 2)), 1e-5)


def test_matrices_here_and_the_rest_elsewhere():
  """Biases that another optimizer has are not joined; a subtree may be masked as one."""
  apart = last_step(DIRECTION, layers=LAYERS, join_biases=False, **EXACT)
  here = {"table", "query", "fused", "out", "last"}
  labels = {name: "matrices" if name in here else "rest" for name in PARAMS}
  tx = make(layers=LAYERS, **EXACT)
  tx = optax.partition({"matrices": tx, "rest": optax.set_to_zero()}, labels)
  got, _ = tx.update(DIRECTION, tx.init(PARAMS))
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  close(got, {name: (apart if name in here else zeros)[name] for name in PARAMS}, 1e-5)


def test_after_kfac():
  """Statistics go through the chain, which is due as before; a step that is skipped is zero.

  With the input factor alone it is Newton-Muon's `(A + l I)^-1 V`, but for a number.
  """
  sizes = ((5, 5), (5, 5))
  params = problems.make_params(sizes=sizes)
  layers = problems.layers_of(params, groups=1)
  _, grads, stats = problems.value_and_grad(params, problems.make_batch(sizes=sizes), groups=1)
  kfac = fop_optax.scale_by_kfac(layers, relative_damping=0.04, curvature_update_period=2)
  tx = optax.chain(kfac, make(layers=layers, **EXACT))
  state, step = tx.init(params), jax.jit(tx.update)
  damped = lambda F: F + 0.2 * np.trace(F) / len(F) * np.eye(len(F))
  joined = lambda tree, i: np.concatenate([tree[f"fc{i}"]["w"], tree[f"fc{i}"]["b"][None]])
  for own in (stats, stats.inputs_only()):
    got, after = step(grads, state, params, stats=own)
    assert fop_optax.refresh_due(state)
    assert not fop_optax.refresh_due(after)
    for i, (A, G) in enumerate(stats.factors):
      left = np.linalg.solve(damped(A[0]), joined(grads, i))
      want = polar(np.linalg.solve(damped(G[0]), left.T).T if own is stats else left)
      close(joined(got, i), want, 1e-3)
  bad = jax.tree.map(lambda g: g * jnp.nan, grads)
  skipped, _ = step(bad, state, params, stats=stats)
  assert all(jnp.all(u == 0) for u in jax.tree.leaves(skipped))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"ns_steps": 0}, r"`ns_steps=0` should be a Python integer, at least 1\."),
    ({"ns_steps": jnp.asarray(5)}, r"`ns_steps=5` should be .* static_args=\"ns_steps\""),
    ({"ns_coeffs": (1.0, 2.0)}, r"`ns_coeffs=\(1.0, 2.0\)` should be three numbers, three numbers"),
    ({"ns_coeffs": (((1.0, 2.0, 3.0),),)}, r"`ns_coeffs=\(\(.*\)` should be three numbers"),
    ({"ns_coeffs": "polar"}, r"`ns_coeffs='polar'` should be three numbers, .* or None"),
    ({"scale": "spectral"}, r"`scale='spectral'` should be one of 'muon', 'rms'\."),
    ({"others": "adam"}, r"`others='adam'` should be one of 'rms', 'keep'\."),
    (
      {"layers": LAYERS, "dimension_numbers": fop_optax.DimensionNumbers()},
      r"`layers` and `dimension_numbers` both say how parameters are matrices",
    ),
  ],
)
def test_hyperparameters_out_of_range(kwargs, message):
  with pytest.raises(ValueError, match=message):
    fop_optax.orthogonalize(**kwargs)


def test_directions_that_do_not_fit():
  with pytest.raises(TypeError, match=r"`layers` is a list, not a `Layers`"):
    fop_optax.orthogonalize(layers=[])
  with pytest.raises(
    ValueError, match=r"The gradient is int32 at \['w'\], where it should be real"
  ):
    last_step({"w": jnp.ones((2, 2), int)})
  with pytest.raises(ValueError, match=r"has 1 leaves, but these layers were captured from params"):
    last_step({"w": jnp.ones((2, 2))}, layers=LAYERS)
  with pytest.raises(ValueError, match=r"`dimension_numbers` has \(0, 2\) for \['w'\]"):
    last_step({"w": jnp.ones((2, 2))}, dimension_numbers=fop_optax.DimensionNumbers(0, 2))

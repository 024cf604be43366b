"""`capture(block_size=...)`: factors in blocks on their diagonals, against the dense matrix."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from reference import damped_inverse

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

P = PartitionSpec
D, H, C, N, SIZE = 7, 10, 3, 64, 4
PARTS = {7: [4, 3], 10: [4, 3, 3], 12: [4, 4, 4], 3: [3]}  # of a side without the bias


def loss(p, x, y):
  """Of all kinds of biases: one, none, three of slices of the outputs, those of a scan."""
  x = jnp.tanh(x @ p["up"] + p["b"])
  x = jnp.tanh(x @ p["qkv"] + jnp.concatenate([p["q"], p["k"], p["v"]]))
  x, _ = jax.lax.scan(lambda x, own: (jnp.tanh(x @ own[0] + own[1]), None), x, p["scan"])
  return fop_optax.softmax_cross_entropy(x @ p["head"], y)


def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))
  params = {
    "up": draw(D, H),
    "b": draw(H),
    "qkv": draw(H, 12),
    "q": draw(5),  # across the edges of ranges
    "k": draw(2),
    "v": draw(5),
    "scan": (draw(2, 12, 12), draw(2, 12)),
    "head": draw(12, C),
  }
  return params, draw(N, D), jnp.asarray(rng.integers(0, C, N))


def matrices(p):
  """Of each layer `[blocks, rows, outputs]`."""
  row = jnp.concatenate([p["q"], p["k"], p["v"]])
  beside = lambda w, b: jnp.concatenate([w, b[..., None, :]], axis=-2)
  return {
    "['up']": beside(p["up"], p["b"])[None],
    "['qkv']": beside(p["qkv"], row)[None],
    "['scan'][0]": beside(*p["scan"]),
    "['head']": p["head"][None],
  }


def numbered(sides):
  """Of each entry of a side the range that it is in, the bias in the last."""
  return np.repeat(np.arange(len(sides)), sides)


@pytest.mark.parametrize("scaling", ["exact", "factored"])
@pytest.mark.parametrize("name", ["kfac", "fop"])
def test_against_the_dense_matrix(name, scaling):
  """The Fisher matrix with zeros between ranges of rows, and between ranges of columns."""
  params, x, y = inputs()
  groups = 1 + (name == "fop")
  whole = fop_optax.capture(loss, params, x, y, groups=groups)
  split = fop_optax.capture(loss, params, x, y, groups=groups, block_size=SIZE)
  make = getattr(fop_optax, name)
  options = {"damping": 0.01, "scaling": scaling, "momentum": 0.0, "norm_constraint": None}
  tx = make(1.0, split.layers, **options)
  _, grads, stats = split.value_and_grad(params, x, y)
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  _, _, dense = whole.value_and_grad(params, x, y)
  factors = {layer.path: own for layer, own in zip(whole.layers, dense.factors, strict=True)}
  given = [matrices(tree) for tree in (grads, updates, *stats.contrasts)]
  for path, gradients in given[0].items():
    layer = next(own for own in whole.layers if own.path == path)
    rows = numbered(PARTS[layer.inputs])
    rows, columns = (
      np.append(rows, rows[-1:] if layer.biases else []),
      numbered(PARTS[layer.outputs]),
    )
    for b, V in enumerate(gradients):
      A, G = (np.asarray(side[b]) for side in factors[path])
      contrasts = [np.asarray(tree[path][b]) for tree in given[2:]]
      own = np.asarray(given[1][path][b])
      for i in set(rows.tolist()):
        for j in set(columns.tolist()):
          tile = np.ix_(rows == i, columns == j)
          sides = A[np.ix_(rows == i, rows == i)], G[np.ix_(columns == j, columns == j)]
          want = direction(sides, np.asarray(V)[tile], [c[tile] for c in contrasts], scaling)
          np.testing.assert_allclose(-own[tile], want, rtol=1e-6, atol=1e-9)


def direction(sides, V, contrasts, scaling):
  """K-FAC's direction of one tile, or FOP's."""
  F, inverse, g = np.kron(*sides), damped_inverse(*sides, 0.01, scaling), V.reshape(-1)
  combined, eta = g, 1.0
  for c in (c.reshape(-1) for c in contrasts):
    perp = c - (c @ F @ g) / (g @ F @ g) * g
    combined = g + (g @ inverse @ perp) / (perp @ inverse @ perp) * perp
    eta = (g @ inverse @ combined) / (combined @ inverse @ combined)
  return (eta * inverse @ combined).reshape(V.shape)


def test_layers_and_their_statistics():
  """Nothing is split that is short enough; the blocks are those of the whole factors."""
  params, x, y = inputs()
  whole = fop_optax.capture(loss, params, x, y, max_dim=11)
  same = fop_optax.capture(loss, params, x, y, max_dim=11, block_size=12)
  assert same.layers == whole.layers
  split = fop_optax.capture(loss, params, x, y, max_dim=11, block_size=5)
  up = [own for own in split.layers if own.path.startswith("['up']")]
  assert [own.path for own in up] == [
    f"['up'][{r}, {c}]" for r in ("0:4", "4:7") for c in ("0:5", "5:10")
  ]
  assert [own.dims for own in up] == [(4, 5), (4, 5), (4, 5), (4, 5)]
  scanned = [own for own in split.layers if own.path.startswith("['scan']")]
  assert len(scanned) == 1 and scanned[0].diagonal == (True, True)  # a diagonal is not split
  assert len(split.rows) == len(split.layers)
  stats = split.value_and_grad(params, x, y)[2]
  dense = whole.value_and_grad(params, x, y)[2]
  assert [f.A.shape for f in stats.factors] == [own.factor_shapes[0] for own in split.layers]
  A = dense.factors[[own.path for own in whole.layers].index("['up']")].A
  index = split.layers.entries.index(up[3])
  np.testing.assert_allclose(stats.factors[index].A, A[:, 4:, 4:], rtol=1e-12)
  assert "['up'][4:7, 5:10]" in str(split)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "fsdp"])
def test_each_block_has_an_owner(spec):
  """Also where the rows of a weight are sharded, which are cut."""
  params, x, y = inputs()
  split = fop_optax.capture(loss, params, x, y, block_size=SIZE)
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
  specs = {name: spec if name in ("qkv", "head") else P() for name in params} | {"scan": (P(), P())}

  def step(sharding, params, x, y):
    tx = fop_optax.kfac(0.1, split.layers, damping=0.1, sharding=sharding)
    _, grads, stats = split.value_and_grad(params, x, y)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  expected = jax.jit(functools.partial(step, None))(params, x, y)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(lambda x, own: jax.device_put(x, NamedSharding(mesh, own)), params, specs)
    sharding = fop_optax.Sharding(mesh, params=specs)
    ours = jax.jit(functools.partial(step, sharding))(placed, x, y)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
  jax.tree.map(close, ours, expected)


def test_errors():
  params, x, y = inputs()
  for size in (0, 2.0):
    with pytest.raises(ValueError, match=r"`capture\(block_size=...\)` takes a whole number"):
      fop_optax.capture(loss, params, x, y, block_size=size)
  split = fop_optax.capture(loss, params, x, y, block_size=SIZE)
  tx = fop_optax.kfac(0.1, split.layers, scaling="eigenvalue")
  with pytest.raises(ValueError, match=r"second moments of whole matrices.*block_size.*has split"):
    jax.eval_shape(
      lambda p, s: split.value_and_grad(p, x, y, basis=fop_optax.bases(s)), params, tx.init(params)
    )

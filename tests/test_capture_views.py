"""What a view of a weight may be: repeated, permuted, padded, shifted and sharded weights."""

import functools
import math

from explicit import evaluate
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import fop_optax
from fop_optax import views
from fop_optax.capture import entries

pytestmark = pytest.mark.usefixtures("x64")

N, D, C = 6, 4, 3
PERM, ROWS = np.array([2, 0, 3, 1]), np.array([0, -2, 1, -1])
halves = lambda x: x[..., : D // 2] + x[..., D // 2 :]
pairs = lambda x: x[..., ::2] + x[..., 1::2]
fixed = jax.lax.stop_gradient


def scan(x, w, use):
  return jax.lax.scan(lambda h, w: (jnp.tanh(use(h, w)), None), x, w)[0]


def heads(x):
  return jnp.stack([x[:, :2], x[:, 2:], x[:, 1:3], x[:, ::2]], 1)


def by_kv_head(x, w, tap):  # two of four query heads share a head: their rows are the same matrix's
  own = heads(x)
  y = [tap("shared heads", own[:, 2 * i : 2 * i + 2], w[i], stack=i) for i in range(2)]
  return jnp.concatenate(y, 1).sum(2)


# shape of the weight; the product as a user spells it, x [N, D] to y [N, D]; the plain one, with a
# tap of rows and a matrix whose entries are all distinct
FORMS = {
  "repeated columns": (
    (D, 2), lambda x, w: x @ jnp.repeat(w, 2, 1), lambda x, w, tap: jnp.repeat(tap(x, w), 2, 1),
  ),
  "repeated rows": (
    (2, D), lambda x, w: x @ jnp.repeat(w, 2, 0), lambda x, w, tap: tap(pairs(x), w),
  ),
  "rows by index": ((2, D), lambda x, w: x @ w[ROWS], lambda x, w, tap: tap(pairs(x), w)),
  "tiles": (
    (2, 2), lambda x, w: x @ jnp.tile(w, (2, 2)),
    lambda x, w, tap: jnp.tile(tap(halves(x), w), (1, 2)),
  ),
  "joined with its negative": (
    (D, 2), lambda x, w: x @ jnp.concatenate([w, -w], 1),
    lambda x, w, tap: jnp.concatenate([tap(x, w), tap(-x, w)], 1),
  ),
  "rolled": (
    (D, D), lambda x, w: x @ jnp.roll(w, 1, 0), lambda x, w, tap: tap(jnp.roll(x, -1, 1), w),
  ),
  "flipped": ((D, D), lambda x, w: x @ jnp.flip(w, 1), lambda x, w, tap: tap(x, w)[:, ::-1]),
  "permuted columns": ((D, D), lambda x, w: x @ w[:, PERM], lambda x, w, tap: tap(x, w)[:, PERM]),
  "rows by arithmetic": (
    (D + 2, D), lambda x, w: x @ jnp.take(w, 2 + jnp.arange(D)[::-1], axis=0),
    lambda x, w, tap: tap(x[:, ::-1], w[2:]),
  ),
  "padded": (
    (D - 1, D - 1), lambda x, w: x @ jnp.pad(w, ((1, 0), (0, 1))),
    lambda x, w, tap: jnp.pad(tap(x[:, 1:], w), ((0, 0), (0, 1))),
  ),
  "one matrix an example": (
    (D, D), lambda x, w: jnp.einsum("nd,nde->ne", x, jnp.broadcast_to(w, (len(x), D, D))),
    lambda x, w, tap: tap(x, w),
  ),
  "repeated by example": (
    (D, D), lambda x, w: jnp.einsum("nd,nde->ne", x, jnp.repeat(w[None], len(x), 0)),
    lambda x, w, tap: tap(x, w),
  ),
  "repeated under vmap": (
    (D, 2), lambda x, w: jax.vmap(lambda x: jnp.repeat(w, 2, 1).T @ x)(x),
    lambda x, w, tap: jnp.repeat(tap(x, w), 2, 1),
  ),
  "shared heads": (
    (2, 2, 3), lambda x, w: jnp.einsum("nhd,hdk->nhk", heads(x), jnp.repeat(w, 2, 0)).sum(2),
    by_kv_head,
  ),
  "heads of outputs": (
    (2, D, 2),
    lambda x, w: jnp.einsum("nd,hdk->nhk", x, jnp.repeat(w, 2, 0)).sum(2),
    lambda x, w, tap: jnp.repeat(
      tap(x, w.transpose(1, 0, 2).reshape(D, 4)).reshape(-1, 2, 2), 2, 1
    ).sum(2),
  ),
  "the same each step": (
    (D, D), lambda x, w: scan(x, jnp.broadcast_to(w, (2, D, D)), lambda h, w: h @ w),
    lambda x, w, tap: jnp.tanh(tap(jnp.tanh(tap(x, w)), w)),
  ),
  "repeated within a scan": (
    (2, 2, D), lambda x, w: scan(x, w, lambda h, w: h @ jnp.repeat(w, 2, 0)[:, PERM]),
    lambda x, w, tap: jnp.tanh(
      tap(pairs(jnp.tanh(tap(pairs(x), w[0])[:, PERM])), w[1], stack=1)[:, PERM]
    ),
  ),
  "rounded straight through": (
    (D, D), lambda x, w: x @ (w + fixed(jnp.round(w) - w)),
    lambda x, w, tap: tap(x, w) + x @ fixed(jnp.round(w) - w),
  ),
  "less a constant": (
    (D, D), lambda x, w: x @ (w - jnp.eye(D)), lambda x, w, tap: tap(x, w) - x,
  ),
}  # fmt: skip


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape))


def problem(forms):
  """Parameters, a batch, the loss as spelled by users and the loss in plain products."""
  params = {name: draw(*FORMS[name][0], seed=i) for i, name in enumerate(forms)}
  params["head"] = draw(D, C)

  def spelled(p, x, y):
    h = sum(jnp.tanh(FORMS[name][1](x, p[name])) for name in forms)
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  def plain(p, x, y, tap=lambda name, x, w, stack=0: x @ w):
    def named(name):
      return tap if name == "shared heads" else lambda x, w, **key: tap(name, x, w, **key)

    h = sum(jnp.tanh(FORMS[name][2](x, p[name], named(name))) for name in forms)
    return fop_optax.softmax_cross_entropy(tap("head", h, p["head"]), y)

  return params, draw(N, D), jnp.arange(N) % C, spelled, plain


@pytest.mark.parametrize(
  "forms, max_dim",
  [
    pytest.param(list(FORMS), 8192, marks=pytest.mark.slow, id="whole"),
    pytest.param(["repeated columns", "repeated rows", "padded"], 1, id="diagonal"),
  ],
)
def test_statistics_are_those_of_the_distinct_entries(forms, max_dim):
  params, x, y, spelled, plain = problem(forms)
  captured = fop_optax.capture(spelled, params, x, y, groups=1, max_dim=max_dim)
  assert not captured.fallbacks
  expected = evaluate(plain, params, x, y, groups=1, transform=jax.jit)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
  jax.tree.map(close, grads, expected.grads[0])
  for layer, factors in zip(captured.layers, stats.factors, strict=True):
    name = captured.layers.paths[layer.weight][2:-2]
    of_layer = [expected.matrices[name, i] for i in range(layer.stack)]
    order = _order(layer, params[name], of_layer)
    for i, matrix in enumerate(of_layer):
      for ours, theirs, own in zip(factors, matrix.factors, order, strict=True):
        theirs = theirs[np.ix_(own, own)]
        close(ours[i], theirs if max_dim > 1 else np.diag(theirs))


def _order(layer, weight, of_layer):
  """Which row and column of the plain matrix each of the layer's is."""
  matrix, plain = np.asarray(layer.gather({layer.weight: weight}))[0], of_layer[0].w
  at = lambda entry: [int(i[0]) for i in np.where(plain == entry)]
  assert matrix.shape == plain.shape
  order = [at(e)[0] for e in matrix[:, 0]], [at(e)[1] for e in matrix[0]]
  np.testing.assert_array_equal(matrix, plain[np.ix_(*order)])
  return order


@pytest.mark.slow
def test_a_step_is_that_of_plain_products():
  params, x, y, spelled, plain = problem(["permuted columns", "heads of outputs"])
  updates = []
  for loss in (spelled, plain):
    captured = fop_optax.capture(loss, params, x, y, groups=1)
    tx = fop_optax.kfac(0.1, captured.layers, damping=0.1)

    def step(params, captured=captured, tx=tx):
      _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
      return tx.update(grads, tx.init(params), params, stats=stats)[0]

    updates.append(jax.jit(step)(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *updates)


KINDS_OF_MESH = pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def gathered(p, x, y):
  """FSDP: every weight is gathered for its product."""
  mesh = jax.sharding.get_abstract_mesh()
  whole = jax.reshard if AxisType.Explicit in mesh.axis_types else jax.lax.with_sharding_constraint
  p = p if mesh.empty else jax.tree.map(lambda leaf: whole(leaf, P()), p)
  return fop_optax.softmax_cross_entropy(
    jnp.tanh(x @ p["w"] + p["b"]) @ jnp.repeat(p["head"], 2, 1), y
  )


def tensor_parallel(p, x, y):
  h = jnp.tanh(x @ p["w"] + p["b"])
  explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
  logits = jnp.einsum("nd,do->no", h, p["head"], out_sharding=P("data") if explicit else None)
  return fop_optax.softmax_cross_entropy(logits, y)


def sharded_problem():
  return {"w": draw(D, 8), "b": draw(8), "head": draw(8, 4)}, draw(8, D), jnp.arange(8) % 4


@functools.cache
def on_one_device(loss):
  captured = fop_optax.capture(loss, *sharded_problem(), groups=1)
  return jax.jit(captured.value_and_grad)(*sharded_problem())


@KINDS_OF_MESH
@pytest.mark.parametrize(
  "loss, specs",
  [
    (gathered, {"w": P("data"), "b": P("data"), "head": P("data")}),
    (tensor_parallel, {"w": P(None, "model"), "b": P("model"), "head": P("model")}),
  ],
)
def test_a_sharded_weight_is_the_same_layer(kind, loss, specs):
  params, x, y = sharded_problem()
  expected = on_one_device(loss)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
  put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    params = {name: put(leaf, specs[name]) for name, leaf in params.items()}
    x, y = put(x, P("data")), put(y, P("data"))
    captured = fop_optax.capture(loss, params, x, y, groups=1)
    assert not captured.fallbacks
    ours = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, expected)
  if kind == AxisType.Explicit:  # else the compiler chooses
    jax.tree.map(lambda a, b: assert_same_sharding(a, b), ours[1], params)


def assert_same_sharding(array, like):
  assert array.sharding.is_equivalent_to(like.sharding, array.ndim)


REASONS = {
  "masked": ((D, D), lambda p, x: x @ jnp.where(jnp.tri(D) > 0, p["w"], 0), "masked or chosen"),
  "a signed weight": ((D, D), lambda p, x: x @ jnp.sign(p["w"]), "no gradient of the loss"),
  "a rounded weight": ((D, D), lambda p, x: x @ jnp.round(p["w"]), "no gradient of the loss"),
  "padded with ones": (
    (D, 3), lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 1)), constant_values=1.0), "`pad`",
  ),
  "nothing but zeros": (
    (D, 3), lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (D, 0)))[:, :D], "nothing of it but zeros",
  ),
  "some more often": (
    (7,), lambda p, x: x @ p["w"][np.add.outer(range(D), range(D))], "more often",
  ),
  "of one row": (
    (D * D,), lambda p, x: x @ p["w"][np.array([0, *range(15)])].reshape(D, D),
    "not in whole rows and columns",
  ),
  "across a scan": (
    (2, D, D), lambda p, x: scan(x, jnp.repeat(p["w"], 2, 0), lambda h, w: h @ w),
    "across the steps of a `scan`",
  ),
  "padded rows looked up": (
    (3, D), lambda p, x: jnp.pad(p["w"], ((1, 0), (0, 0)))[jnp.argmax(x, 1)], "padded with zeros",
  ),
  "repeated shift": (
    (2,), lambda p, x: x @ p["v"] + jnp.repeat(p["w"], 2), "before they are added",
  ),
  "shift of repeated outputs": (
    (D,), lambda p, x: x @ jnp.repeat(p["v"][:, :2], 2, 1) + p["w"], "output features are repeated",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_weight_in_no_layer_has_a_true_reason(name):
  shape, forward, reason = REASONS[name]
  params = {"w": draw(*shape), "v": draw(D, D), "head": draw(D, C)}

  def loss(p, x, y):
    return fop_optax.softmax_cross_entropy(forward(p, x) @ p["head"], y)

  captured = fop_optax.capture(loss, params, draw(N, D), jnp.arange(N) % C)
  assert reason in captured.fallbacks["['w']"]
  assert "['head']" not in captured.fallbacks


def test_what_no_gradient_goes_through_refuses_nothing():
  def loss(p, x, y):
    scale = jnp.round(jnp.max(jnp.abs(p["w"])) * 8) / 8  # as of a quantisation
    steps = jnp.floor(p["w"].sum()) + jnp.where(p["w"] > 0, 1.0, 0.0).sum()
    return fop_optax.softmax_cross_entropy(x @ p["w"] * scale + steps, y)

  params, x, y = {"w": draw(D, C)}, draw(N, D), jnp.arange(N) % C
  captured = fop_optax.capture(loss, params, x, y, groups=1)
  assert not captured.fallbacks
  _, grads, _ = jax.jit(captured.value_and_grad)(params, x, y)
  expected = jax.jit(jax.grad(loss))(params, x, y)
  np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-12)


def test_a_large_tied_weight_takes_no_map_of_its_entries(monkeypatch):
  sizes, index_map = [0], views.index_map

  def counted(view, shape):
    sizes.append(math.prod(shape))
    return index_map(view, shape)

  monkeypatch.setattr(views, "index_map", counted)

  def loss(p, ids, y):
    h = p["wte"][ids] + p["wpe"][jnp.arange(ids.shape[1])]
    h = jnp.tanh(h @ p["qkv"][:, :768] + h @ p["qkv"][:, 768:1536]) + h @ p["qkv"][:, 1536:]
    return fop_optax.softmax_cross_entropy(h @ p["wte"].T, y)

  shapes = {"wte": (50257, 768), "wpe": (1024, 768), "qkv": (768, 3 * 768)}
  params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
  ids = jax.ShapeDtypeStruct((2, 16), "int32")
  captured = fop_optax.capture(loss, params, ids, ids, groups=1)
  assert not captured.fallbacks
  assert [layer.kind for layer in captured.layers] == ["dense"] * 3 + ["table", "lookup + dense"]
  assert max(sizes) < 1e6


@st.composite
def drawn_views(draw):
  """A shape and the steps of a view to three axes, from all steps that there are."""
  shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
  view, sizes = [], shape
  for name in draw(
    st.lists(st.sampled_from(["transpose", "rev", "slice", "take", "split", "join"]), max_size=5)
  ):
    axis = draw(st.integers(0, len(sizes) - 1))
    if name == "transpose":
      step = (name, tuple(draw(st.permutations(range(len(sizes))))))
    elif name == "rev":
      step = (name, (axis,))
    elif name == "slice":
      start = draw(st.integers(0, sizes[axis] - 1))
      step = views.take(sizes, axis, range(start, sizes[axis], draw(st.integers(1, 2))))
    elif name == "take":
      indices = st.lists(st.integers(-1, sizes[axis] - 1), min_size=1, max_size=4)
      step = (name, axis, tuple(draw(indices)))
    elif name == "split":
      half = sizes[axis] // 2
      pieces = (half, 2) if sizes[axis] % 2 == 0 else (1, sizes[axis])
      step = ("reshape", (*sizes[:axis], *pieces, *sizes[axis + 1 :]))
    else:
      step = ("reshape", (*sizes[:axis], math.prod(sizes[axis:])))
    view.append(step)
    sizes = views.shape_of((step,), sizes)
  sizes = (*sizes[:1], *sizes[1:2], math.prod(sizes[2:])) if len(sizes) > 1 else (1, 1, *sizes)
  return shape, (*view, ("reshape", sizes))


@given(drawn_views(), st.randoms(use_true_random=False))
def test_vectors_say_what_an_index_map_does(drawn, random):
  shape, view = drawn
  index = views.index_map(view, shape)
  assert views.shape_of(view, shape) == index.shape
  assert np.array_equal(views.index_map(views.simplify(view, shape), shape), index)
  try:
    base, fold, times = entries.distinct(view, shape)
  except ValueError:
    return
  own = views.index_map(base, shape)
  assert len(np.unique(own)) == own.size
  assert own.min() >= 0
  maps = [range(n) for n in index.shape]
  if fold:
    kinds = (fold.stack, fold.inputs, fold.outputs)
    maps = [own or whole for own, whole in zip(kinds, maps, strict=True)]
  assert times * own.shape[0] == sum(i >= 0 for i in maps[0])
  for place in np.ndindex(index.shape):
    at = tuple(one[i] for one, i in zip(maps, place, strict=True))
    assert index[place] == (-1 if min(at) < 0 else own[at])

  first = entries.Entries(base, shape)
  order = list(range(own.shape[1]))
  random.shuffle(order)
  for steps in (
    (("take", 1, tuple(order)),),
    (("transpose", (0, 2, 1)),),
    (("slice", (0, 0, 0), (own.shape[0], 1, own.shape[2]), (1, 1, 1)),),
    (("slice", (0, own.shape[1] - 1, 0), own.shape, (1, 1, 1)),),
  ):
    second = entries.Entries((*base, *steps), shape)
    other = views.index_map(second.view, shape)
    assert first.equal(second) == np.array_equal(own, other)
    assert first.equal(second, flipped=True) == np.array_equal(own, other.swapaxes(1, 2))
    assert first.disjoint(second) == (not np.isin(own, other).any())
    assert first.same_set(second) == np.array_equal(np.unique(own), np.unique(other))

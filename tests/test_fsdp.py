"""Parameters sharded over a mesh (FSDP, tensor parallel) and owners of their curvature."""

import collections
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from experiments.benchmarks.hlo import collectives
import fop_optax
from fop_optax.curvature.layouts import plan_layout
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.passage import Passage
from fop_optax.curvature.stacks import plan_stacks, stack_matrices
from fop_optax.layers import Bias, Layer, Layers
from fop_optax.sharding import Exchange, Sharding

pytestmark = pytest.mark.usefixtures("x64")

P, AUTO, EXPLICIT = PartitionSpec, AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
N, D, H, C = 64, 24, 40, 5


@functools.cache
def inputs():
  """Parameters, none of whose sides with a bias the devices divide, and batches."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2])
  params = {
    "up": draw(D, H),
    "up_bias": np.zeros(H),
    "down": draw(H, D),
    "down_bias": np.zeros(D),
    "gain": np.ones(D),  # in no layer
    "head": draw(D, C),
    "head_bias": np.zeros(C),
  }
  return params, draw(4, N, D), rng.integers(0, C, (4, N)).astype("int32")


MESHES = {
  "data": ((8,), ("data",)),
  "fsdp": ((8,), ("data",)),
  "tp": ((4, 2), ("data", "model")),
  "fsdp+tp": ((4, 2), ("data", "model")),
}
REPLICATED = {name: P() for name in inputs()[0]}
SPECS = {
  "data": REPLICATED,
  "fsdp": REPLICATED
  | {
    "up": P("data"),
    "up_bias": P("data"),
    "down": P(None, "data"),
    "down_bias": P("data"),
    "head": P("data"),
  },
  "tp": REPLICATED | {"up": P(None, "model"), "up_bias": P("model"), "down": P("model")},
  "fsdp+tp": REPLICATED
  | {
    "up": P("data", "model"),
    "up_bias": P("model"),
    "down": P("model", "data"),
    "down_bias": P("data"),
    "head": P("data"),
  },
}


def loss_of(layout="data", kind=AUTO):
  """As one writes it: under explicit axes a parameter is brought to where it is used."""

  def used(name, w):
    if kind is AUTO:
      return w
    spec = SPECS["tp"][name] if "tp" in layout else ()
    return jax.reshard(w, P(*spec, *[None] * (w.ndim - len(spec))))

  def loss(p, x, y):
    p = {name: used(name, w) for name, w in p.items()}
    where = P("data", None) if "tp" in layout and kind is EXPLICIT else None
    h = jnp.tanh(x @ p["up"] + p["up_bias"])
    h = jnp.einsum("nh,hd->nd", h, p["down"], out_sharding=where) + p["down_bias"]
    h = x + jnp.tanh(h * p["gain"])
    return fop_optax.softmax_cross_entropy(h @ p["head"] + p["head_bias"], y)

  return loss


def mesh_of(layout, kind):
  shape, names = MESHES[layout]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def put(mesh, tree, specs):
  def place(x, spec):
    rest = [None] * (x.ndim - len(spec)) if EXPLICIT in mesh.axis_types else []
    return jax.device_put(x, NamedSharding(mesh, P(*spec, *rest)))

  return jax.tree.map(place, tree, specs)


class Setup:
  """One optimizer on one mesh, its captured loss, parameters and step."""

  scale = 1.0  # of the parameters

  def __init__(self, name, layout=None, kind=AUTO, owners=True):
    params, x, y = inputs()
    self.mesh = mesh_of(layout, kind) if layout else None
    self.params = params = jax.tree.map(lambda w: self.scale * w, params)
    if self.mesh:
      self.params = put(self.mesh, params, SPECS[layout])
      x, y = ([put(self.mesh, each, P("data")) for each in own] for own in (x, y))
    self.batches = list(zip(x, y, strict=True))
    self.captured = fop_optax.capture(
      loss_of(layout or "data", kind), self.params, x[0], y[0], groups=1 + (name == "fop")
    )
    self.sharding = None
    if layout and owners:
      self.sharding = Sharding(self.mesh, self.mesh.axis_names, self.params)
    self.tx = self.optimizer(name)

  def optimizer(self, name):
    return getattr(fop_optax, name)(
      0.1, self.captured.layers, damping=0.1, curvature_update_period=2, sharding=self.sharding
    )

  def gradient(self, params, state, x, y):
    return self.captured.value_and_grad(params, x, y, refresh=fop_optax.refresh_due(state))

  def step(self, params, state, x, y):
    _, grads, stats = self.gradient(params, state, x, y)
    updates, state = self.tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  def train(self, pinned=False):
    """Parameters and state at the start and after each of four steps, and the step."""
    out = [(self.params, self.tx.init(self.params))]
    there = jax.tree.map(lambda x: x.sharding, out[0]) if pinned else None
    step = jax.jit(self.step, out_shardings=there)
    for batch in self.batches:
      out.append(step(*out[-1], *batch))
    return out, step

  def moved(self, function):
    """How often what moves between devices."""
    args = self.params, self.tx.init(self.params), *self.batches[0]
    found = collectives(jax.jit(function).lower(*args).compile())
    return collections.Counter(name for name, *_ in found)


@functools.cache
def on_one_device(name):
  return Setup(name).train()[0]


def same(ours, expected, tolerance=1e-9):
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
  jax.tree.map(close, ours, expected)


def slow_but(*quick):
  rows = [
    (name, layout, kind)
    for name in ("kfac", "fop")
    for layout in ("fsdp", "tp", "fsdp+tp")
    for kind in (AUTO, EXPLICIT)
  ]
  return [row if row in quick else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(("name", "layout", "kind"), slow_but(("kfac", "fsdp+tp", EXPLICIT)))
def test_eight_devices_are_one(name, layout, kind):
  """Over refreshes and ordinary steps; every array stays where it is, and one compilation."""
  with jax.set_mesh(mesh_of(layout, kind)):
    setup = Setup(name, layout, kind)
    ours, step = setup.train()
    for (params, state), (expected, plain) in zip(ours, on_one_device(name), strict=True):
      same(params, expected)
      same(fop_optax.to_blocks(state), plain, 1e-7)
    where = lambda tree: [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]
    assert where(ours[0]) == where(ours[1]) == where(ours[2])
    assert step._cache_size() == 1
    shardings = fop_optax.state_shardings(setup.tx, setup.params)
    assert [x.sharding for x in jax.tree.leaves(ours[1][1])] == jax.tree.leaves(shardings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "fop"])
@pytest.mark.parametrize("layout", ["fsdp", "tp", "fsdp+tp"])
@KINDS
def test_without_owners(name, layout, kind):
  """Then every device has the whole gradient, and updates come back sharded.

  Under automatic axes XLA is free to place state and parameters elsewhere, but for `out_shardings`.
  """
  with jax.set_mesh(mesh_of(layout, kind)):
    ours, step = Setup(name, layout, kind, owners=False).train(pinned=kind is AUTO)
    same(ours[-1][0], on_one_device(name)[-1][0])
  where = lambda tree: [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1


class EigenvalueSetup(Setup):
  """EKFAC, whose statistics are taken in the bases of the state."""

  def optimizer(self, name):
    own = {"scaling": "eigenvalue", "curvature_update_period": 2, "sharding": self.sharding}
    return getattr(fop_optax, name)(0.1, self.captured.layers, damping=0.1, **own)

  def gradient(self, params, state, x, y):
    flags = {"refresh": fop_optax.refresh_due(state), "basis": fop_optax.bases(state)}
    return self.captured.value_and_grad(params, x, y, **flags)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("layout", ["fsdp", "tp", "fsdp+tp"])
def test_in_the_bases_of_owners(layout, kind):
  expected = EigenvalueSetup("fop").train()[0]
  with jax.set_mesh(mesh_of(layout, kind)):
    ours, step = EigenvalueSetup("fop", layout, kind).train()
    for own, one in zip(ours, expected, strict=True):
      same(own[0], one[0])
  where = lambda tree: [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1


class BoundedSetup(Setup):
  """With the defaults, and weights so small that they bound the first steps."""

  scale = 0.03

  def optimizer(self, name):
    return getattr(fop_optax, name)(0.1, self.captured.layers, sharding=self.sharding)


@pytest.mark.parametrize(("name", "layout", "kind"), slow_but(("kfac", "fsdp+tp", EXPLICIT)))
def test_bounded_by_weights_in_pieces(name, layout, kind):
  expected = BoundedSetup(name).train()[0]
  moved = lambda step: sum(float(jnp.sum((step[0][w] - expected[0][0][w]) ** 2)) for w in step[0])
  assert moved(expected[1]) <= sum(np.sum(w**2) for w in expected[0][0].values())
  with jax.set_mesh(mesh_of(layout, kind)):
    setup = BoundedSetup(name, layout, kind)
    ours, step = setup.train()
    for own, one in zip(ours, expected, strict=True):
      same(own[0], one[0], 1e-8)
    counted = setup.moved(setup.step) - setup.moved(setup.gradient)
  assert step._cache_size() == 1
  if kind is EXPLICIT:  # one more than without
    assert counted <= collections.Counter(COUNTS[layout]) + collections.Counter(["all-reduce"])


# Beyond the gradient and its statistics: to the owners and back, and sums of one number, which tell
# whether gradient and updates are finite, and whether momentum points uphill (of both one for each
# set of axes that leaves are sharded on).
# Under automatic axes XLA is free to shard activations by features, and does.
COUNTS = {
  "fsdp": {"all-to-all": 2, "all-reduce": 3},
  "tp": {"all-to-all": 2, "all-reduce": 4},  # one adds up the directions of four devices
  "fsdp+tp": {"all-to-all": 2, "all-reduce": 7},
}


@pytest.mark.parametrize(
  ("name", "layout", "kind"),
  [
    ("kfac", "fsdp", EXPLICIT),
    *(
      pytest.param(*row, marks=pytest.mark.slow)
      for row in (
        ("fop", "fsdp", EXPLICIT),
        ("fop", "fsdp", AUTO),
        *((name, layout, EXPLICIT) for name in ("kfac", "fop") for layout in ("tp", "fsdp+tp")),
      )
    ),
  ],
)
def test_operations_between_devices(name, layout, kind):
  with jax.set_mesh(mesh_of(layout, kind)):
    setup = Setup(name, layout, kind)
    step, gradient = setup.moved(setup.step), setup.moved(setup.gradient)
  assert step - gradient <= collections.Counter(COUNTS[layout])
  assert not (step - gradient)["all-gather"]


@pytest.mark.parametrize(
  ("layout", "name"),
  [("tp", "kfac"), *(pytest.param(x, "fop", marks=pytest.mark.slow) for x in ("tp", "fsdp+tp"))],
)
def test_statistics_of_sharded_features(layout, name):
  """Under explicit axes rows go to where features were sharded: no gather, and one more sum."""
  with jax.set_mesh(mesh_of(layout, EXPLICIT)):
    setup = Setup(name, layout, EXPLICIT)
    grad = jax.grad(loss_of(layout, EXPLICIT))
    plain = setup.moved(lambda params, state, x, y: grad(params, x, y))
    more = setup.moved(setup.gradient) - plain
  groups = 1 + (name == "fop")
  assert more == {"all-to-all": 2 * groups, "all-reduce": 1}


# owners' axes, and how the weights and the biases of four layers of two shapes are sharded
PASSAGES = {
  "all": (("data", "model"), [(P("data", "model"), P("model"))] * 4),
  "replicated": (("data",), [(P("data", "model"), P("data")), *[(P(), P())] * 3]),
  "others": (("model",), [(P(None, "data"), P("data"))] * 4),
  "mixed": (
    ("model", "data"),
    [
      (P("model"), P()),
      (P(None, ("data", "model")), P("data")),
      (P(None, "model"), P("model")),
      (P(("model", "data")), P()),
    ],
  ),
  "blocks": (("data", "model"), [(P(), P()), (P("data"), P("data")), *[(P(), P())] * 2]),
}
SHAPES = [(1, 8, 16), (4, 8, 16), (1, 8, 16), (1, 16, 8)]


def layers_of():
  """Layers of parameters `[*blocks, inputs, outputs]` and `[*blocks, outputs]`."""
  entries, shapes = [], []
  for i, (blocks, *sides) in enumerate(SHAPES):
    lead = (blocks,) if blocks > 1 else ()
    views = [(("reshape", (1, *own)),) if not lead else () for own in (sides, sides[1:])]
    shapes += [(*lead, *sides), (*lead, sides[1])]
    bias = Bias(2 * i + 1, views[1])
    entries.append(Layer(f"w{i}", "dense", 2 * i, views[0], blocks, *sides, (bias,)))
  return Layers(tuple(entries), tuple(shapes), tuple(map(str, range(8))), 1)


@pytest.mark.parametrize("case", PASSAGES)
def test_there_and_back(case):
  axes, specs = PASSAGES[case]
  lead = [() if i != 1 or case == "blocks" else (None,) for i in range(4) for _ in range(2)]
  flat = [P(*own, *spec) for own, spec in zip(lead, sum(map(list, specs), []), strict=True)]
  there_and_back(layers_of(), ("data", "model"), axes, flat, AUTO)


@KINDS
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["rows", "columns"])
def test_parts_of_one_parameter(spec, kind):
  """q and k of one matrix: its rows stay where they are, its columns are cut, and so gathered."""
  part = lambda at: (("slice", (0, at), (16, at + 24), (1, 1)), ("reshape", (1, 16, 24)))
  layers = tuple(Layer(f"w[:, {at}:]", "dense", 0, part(at), 1, 16, 24) for at in (0, 24))
  there_and_back(Layers(layers, ((16, 48),), ("w",), 1), ("data",), ("data",), [spec], kind)


def there_and_back(layers, names, axes, specs, kind):
  """Owners get whole matrices and contrasts; what they send back is where it came from."""
  shape = (4, 2) if len(names) > 1 else (8,)
  mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
  rng = np.random.default_rng(0)
  leaves = [rng.normal(size=shape) for shape in layers.shapes]
  sharding, stacks = Sharding(mesh, axes, specs), plan_stacks(layers)
  layout = plan_layout(sharding, layers, stacks, leaves)
  plan = plan_owners(stacks, sharding.devices)

  def passed(places, pieces):
    exchange = Exchange(sharding, places, plan.slots)
    passage, number = Passage(layout, exchange), exchange.share().block.astype(float)
    mine = passage.to_owners(pieces, [jnp.dtype(float)] * len(stacks))
    return mine, *passage.from_owners([V[:, 0] for V in mine], number, jnp.ones(()))

  @jax.jit
  def run(leaves):
    both = map(layout.split, (leaves, jax.tree.map(jnp.exp, leaves)))
    pieces = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *both)
    mine, back, numbers, total = jax.shard_map(
      passed,
      mesh=mesh,
      in_specs=(P(), layout.specs_of(1)),
      out_specs=(sharding.spec, layout.specs_of(0), P(), P()),
      check_vma=False,
    )(tuple(map(jnp.asarray, plan.places)), pieces)
    return mine, layout.join(back, leaves), numbers, total

  with jax.set_mesh(mesh):
    placed = put(mesh, leaves, specs)
    mine, back, numbers, total = jax.device_get(out := run(placed))
  for stack, places, slots in zip(stacks, plan.places, mine, strict=True):
    trees = leaves, [np.asarray(jnp.exp(x)) for x in leaves]
    both = [stack_matrices(stack, layers, tree, float) for tree in trees]
    np.testing.assert_array_equal(slots[np.array(places)], np.stack(both, axis=1))
    assert not np.delete(slots, places, axis=0).any()
  for ours, expected in zip(back, leaves, strict=True):
    np.testing.assert_array_equal(ours, expected)
  assert all(map(equivalent, out[1], placed))
  np.testing.assert_array_equal(numbers, np.arange(len(numbers)))
  assert total == sharding.devices


def equivalent(x, other):
  return x.sharding.is_equivalent_to(other.sharding, x.ndim)


def blocks_loss(kind, p, x, y):
  """Tokens and places are looked up, three blocks are gone over by a scan."""
  whole = lambda w: w if kind is not EXPLICIT else jax.reshard(w, P(*[None] * w.ndim))
  table, place, head = map(whole, (p["table"], p["place"], p["head"]))
  where = P("data", None, None) if kind is EXPLICIT else None

  def block(h, own):
    own = jax.tree.map(whole, own)
    inside = jnp.tanh(h @ own["up"] + own["bias"]) @ own["down"]
    h = h + inside * own["gain"]
    return (jax.lax.with_sharding_constraint(h, P("data")) if kind is AUTO else h), None

  h = table.at[x].get(out_sharding=where) if where else table[x]
  h, _ = jax.lax.scan(block, h + place, p["blocks"])
  return fop_optax.softmax_cross_entropy(h @ head, y)


def blocks_problem(blocks, dtype=float):
  rng = np.random.default_rng(0)
  draw = lambda *shape: (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(dtype)
  params = {
    "table": draw(10, D),
    "place": draw(2, D),
    "blocks": {
      "up": draw(blocks, D, H),
      "bias": np.zeros((blocks, H), dtype),
      "down": draw(blocks, H, D),
      "gain": np.ones((blocks, D), dtype),  # in no layer
    },
    "head": draw(D, 10),
  }
  specs = {
    "table": P(None, "data"),
    "place": P(),
    "blocks": {
      "up": P(None, "data"),
      "bias": P(None, "data"),
      "down": P(None, None, "data"),
      "gain": P(),
    },
    "head": P("data"),
  }
  tokens = rng.integers(0, 10, (N, 3)).astype("int32")
  return params, specs, (tokens[:, :2], tokens[:, 1:])


def blocks_step(kind, params, batch, sharding=None):
  loss = functools.partial(blocks_loss, kind)
  captured = fop_optax.capture(loss, params, *batch, groups=2)
  assert len(captured.layers) == 5 and len(captured.fallbacks) == 1
  tx = fop_optax.fop(0.1, captured.layers, damping=0.1, sharding=sharding)

  def step(params, state, x, y):
    _, grads, stats = captured.value_and_grad(params, x, y, refresh=fop_optax.refresh_due(state))
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return tx.init(params), step


@pytest.mark.slow
@KINDS
def test_scanned_blocks_and_lookups(kind):
  """Under automatic axes too every array stays where it is, those in no layer too."""
  params, specs, batch = blocks_problem(3)
  state, step = blocks_step(None, params, batch)
  expected, step = (params, state), jax.jit(step)
  for _ in range(3):
    expected = step(*expected, *batch)
  mesh = mesh_of("fsdp", kind)
  with jax.set_mesh(mesh):
    placed, batch = put(mesh, params, specs), [put(mesh, x, P("data")) for x in batch]
    state, step = blocks_step(kind, placed, batch, Sharding(mesh, "data", specs))
    ours, step = (placed, state), jax.jit(step)
    for _ in range(3):
      ours = step(*ours, *batch)
    same(ours[0], expected[0])
    assert all(jax.tree.leaves(jax.tree.map(equivalent, ours, (placed, state))))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_bytes_of_stacked_layers():
  """To the owners and back go shares of a stack, not all of it as by a gather."""
  params, specs, batch = blocks_problem(16, "float32")
  mesh = mesh_of("fsdp", EXPLICIT)
  with jax.set_mesh(mesh):
    placed, batch = put(mesh, params, specs), [put(mesh, x, P("data")) for x in batch]
    state, step = blocks_step(EXPLICIT, placed, batch, Sharding(mesh, "data", specs))
    found = collectives(jax.jit(step).lower(placed, state, *batch).compile())
  moved = [size for name, _, size in found if name == "all-to-all"]
  model = 4 * sum(x.size for x in jax.tree.leaves(params))
  # a gradient and a contrast, then directions; each device has a slot for what occurs once
  assert len(moved) == 2 and sum(moved) < 3 * model / 6


@pytest.mark.parametrize("refresh", [True, "traced"])
def test_a_lookup_by_out_sharding(refresh):
  """JAX looks up inside `jax.sharding.auto_axes`, where types have another mesh."""
  rng, mesh = np.random.default_rng(0), mesh_of("fsdp", EXPLICIT)
  params, tokens = (
    {"table": rng.normal(size=(10, D)), "head": rng.normal(size=(D, C))},
    np.arange(N),
  )

  def loss(where, p, x, y):
    table = p["table"] if where is None else jax.reshard(p["table"], P(None, None))
    h = table.at[x].get(out_sharding=where)
    return fop_optax.softmax_cross_entropy(jnp.tanh(h) @ p["head"], y)

  def both(where, params, x, y):
    captured = fop_optax.capture(functools.partial(loss, where), params, x, y, groups=2)
    assert [layer.kind for layer in captured.layers] == ["dense", "lookup"]
    flag = True if refresh is True else jnp.array(True)
    return jax.jit(functools.partial(captured.value_and_grad, refresh=flag))(params, x, y)

  batch = tokens % 10, tokens % C
  expected = both(None, params, *batch)
  specs = {"table": P(None, "data"), "head": P()}
  with jax.set_mesh(mesh):
    ours = both(
      P("data", None), put(mesh, params, specs), *(put(mesh, x, P("data")) for x in batch)
    )
  same(ours, expected)


@pytest.mark.slow
@KINDS
def test_a_frozen_layer_and_two_dtypes(kind):
  """One stack has no blocks, another has pieces of two dtypes; inverses of the whole matrix."""
  params, x, y = inputs()
  params = params | {"up": params["up"].astype("float32")}
  labels = {name: "frozen" if "head" in name else "fop" for name in params}

  def step(layout, sharding, params, x, y):
    captured = fop_optax.capture(loss_of(layout, kind), params, x, y, groups=2)
    fop = fop_optax.fop(0.1, captured.layers, sharding=sharding, scaling="exact", stagger=True)
    tx = optax.partition({"fop": fop, "frozen": optax.set_to_zero()}, labels)
    _, grads, stats = captured.value_and_grad(params, x, y)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  mesh = mesh_of("fsdp+tp", kind)
  with jax.set_mesh(mesh):
    placed = put(mesh, params, SPECS["fsdp+tp"])
    sharding = Sharding(mesh, ("model", "data"), SPECS["fsdp+tp"])
    own = jax.jit(functools.partial(step, "fsdp+tp", sharding))
    updates = own(placed, *(put(mesh, each[0], P("data")) for each in (x, y)))
    plain = jax.jit(functools.partial(step, "fsdp+tp", None))
    expected = plain(placed, *(put(mesh, each[0], P("data")) for each in (x, y)))
  same(updates, expected, 1e-5)
  assert updates["up"].dtype == "float32"
  assert all(equivalent(updates[name], placed[name]) for name in params if "head" not in name)


@pytest.mark.slow
def test_a_checkpoint_of_another_layout():
  """Written once in the order of blocks from FSDP, gone on with over fewer devices and another."""
  expected = on_one_device("kfac")[-1][0]
  with jax.set_mesh(mesh_of("fsdp", AUTO)):
    setup = Setup("kfac", "fsdp")
    step = jax.jit(setup.step)
    now = setup.params, setup.tx.init(setup.params)
    for batch in setup.batches[:2]:
      now = step(*now, *batch)
    params, state = jax.device_get((now[0], fop_optax.to_blocks(now[1])))
  with jax.set_mesh(mesh_of("fsdp+tp", EXPLICIT)):
    setup = Setup("kfac", "fsdp+tp", EXPLICIT)
    shardings = fop_optax.state_shardings(setup.tx, setup.params)
    state = jax.device_put(fop_optax.to_owners(state, setup.sharding), shardings)
    now, step = (put(setup.mesh, params, SPECS["fsdp+tp"]), state), jax.jit(setup.step)
    for batch in setup.batches[2:]:
      now = step(*now, *batch)
    same(now[0], expected)
    assert step._cache_size() == 1


def test_errors():
  mesh = mesh_of("fsdp", AUTO)
  with pytest.raises(TypeError, match=r"params=.*has a float where.*pass `jax.tree.map\(lambda x"):
    Sharding(mesh, params={"w": 0.0})
  with pytest.raises(ValueError, match=r"shards a parameter along \['model'\], and the mesh has"):
    Sharding(mesh, params=[P("model")])
  own = Sharding(mesh, params=[P("data", None), None])
  assert own == Sharding(mesh, params=own.params) and hash(own)
  params, x, y = inputs()
  captured = fop_optax.capture(loss_of(), params, x[0], y[0])
  for specs, message in (
    ([P("data")], r"of 1 parameters, but these layers.*from params with 7"),
    ({name: P(None, None, "data") for name in params}, r"3 axes of \['down'\], which has shape"),
  ):
    tx = fop_optax.kfac(0.1, captured.layers, sharding=Sharding(mesh, params=specs))
    _, grads, stats = jax.eval_shape(captured.value_and_grad, params, x[0], y[0])
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(tx.update, grads, tx.init(params), params, stats=stats)

"""Curvature owned over a mesh of eight devices: the numbers of one, an eighth of the work."""

import collections
import functools
import itertools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest
from test_contract import factorised

from experiments.benchmarks.hlo import collectives
import fop_optax
from fop_optax.curvature.eigenvalue_inverse import EigenvalueInverse
from fop_optax.curvature.exact_inverse import ExactInverse
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.stacks import Stack, plan_stacks
from fop_optax.curvature.state import CurvatureState
from fop_optax.sharding import Sharding

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, C, TALL = 64, 2, 6, 3, 20


def loss(p, x, y):
  """A tall layer, nine scanned, one wide, three of one shape and a head: 15 blocks."""
  block = lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None)
  x, _ = jax.lax.scan(block, jnp.tanh(x @ p["tall"]), (p["stack"], p["shift"]))
  x = jnp.tanh(x @ p["wide"])
  for w in p["w"]:
    x = x * p["scale"] + jnp.tanh(x @ w)
  return fop_optax.softmax_cross_entropy(x.mean(1) @ p["head"], y)


@functools.cache
def inputs():
  """Parameters and four batches."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2])
  params = {
    "tall": draw(TALL, D),  # whose inputs have a diagonal factor
    "stack": draw(9, D, D),
    "shift": draw(9, D),
    "wide": draw(D, 2 * D),
    "w": [draw(2 * D, 2 * D) for _ in range(3)],
    "scale": np.ones(2 * D),  # in no layer
    "head": draw(2 * D, C),
  }
  return params, draw(4, N, T, TALL), rng.integers(0, C, (4, N)).astype("int32")


@functools.cache
def captured_of(name):
  params, x, y = inputs()
  groups = 2 if name == "fop" else 1
  return fop_optax.capture(loss, params, x[0], y[0], groups=groups, max_dim=16)


def make(name, sharding=None, **options):
  options = {"damping": 0.1, "curvature_update_period": 2} | options
  return getattr(fop_optax, name)(0.1, captured_of(name).layers, sharding=sharding, **options)


def step_of(name, tx, refresh=None):
  """A step, statistics when they are due (None) or always or never."""

  def step(params, state, x, y):
    due = fop_optax.refresh_due(state) if refresh is None else refresh
    value_and_grad, basis = captured_of(name).value_and_grad, bases_of(state)
    value, grads, stats = value_and_grad(params, x, y, refresh=due, basis=basis)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, value

  return step


def bases_of(state):
  """Those of EKFAC."""
  squares = any(
    isinstance(s.inverse, EigenvalueInverse) for own in states(state) for s in own.stacks
  )
  return fop_optax.bases(state) if squares else None


def mesh_of(kind=AxisType.Auto, n=8):
  return jax.make_mesh((n,), ("data",), axis_types=(kind,), devices=jax.devices()[:n])


def put(mesh, tree, *axes):
  def place(x):
    rest = [None] * (x.ndim - len(axes)) if AxisType.Explicit in mesh.axis_types else []
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes, *rest)))

  return jax.tree.map(place, tree)


def batch(mesh, i):
  _, x, y = inputs()
  return (x[i], y[i]) if mesh is None else put(mesh, (x[i], y[i]), "data")


def train(name, tx, mesh=None, refresh=(None,) * 4, start=None):
  """Parameters and state after steps on one batch after another, and the compiled step."""
  params = inputs()[0]
  params = jax.tree.map(jnp.asarray, params) if mesh is None else put(mesh, params)
  params, state = start or (params, tx.init(params))
  steps = {own: jax.jit(step_of(name, tx, own)) for own in set(refresh)}
  for i, own in enumerate(refresh):
    params, state, _ = steps[own](params, state, *batch(mesh, i % 4))
  return params, state, steps


def same(ours, expected, tolerance=1e-9):
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
  jax.tree.map(close, ours, expected)


def same_state(ours, expected):
  """But for the signs of eigenvectors."""
  is_inverse = lambda x: isinstance(x, ExactInverse | EigenvalueInverse)
  positive = lambda x: jax.tree.map(jnp.abs, x) if is_inverse(x) else x
  both = (jax.tree.map(positive, tree, is_leaf=is_inverse) for tree in (ours, expected))
  same(*both, 1e-7)


def on_eight(name, kind, refresh, **options):
  """Four steps on a mesh are those on one device, parameters and all of the state."""
  expected = train(name, make(name, **options), refresh=refresh)
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    tx = make(name, Sharding(mesh), **options)
    params, state, steps = train(name, tx, mesh, refresh)
    same(params, expected[0])
    same_state(fop_optax.to_blocks(state), expected[1])
    assert all(step._cache_size() == 1 for step in steps.values())
  return state


TYPES = (AxisType.Auto, AxisType.Explicit)
KINDS = pytest.mark.parametrize("kind", TYPES, ids=["auto", "explicit"])
REFRESHES = pytest.mark.parametrize(
  "refresh", [(None,) * 4, (True, False, True, False)], ids=["traced", "static"]
)


def test_eight_devices_are_one():
  state = on_eight("fop", AxisType.Auto, (None,) * 4)
  blocks = fop_optax.to_blocks(state)
  for devices in (4, 1, 8):
    owned = fop_optax.to_owners(blocks, Sharding(mesh_of(n=devices)))
    same(fop_optax.to_blocks(owned), blocks, 0)
  same(owned, state, 0)


def programs(function, *args):
  """How many programs are compiled for a call, and what it returns."""
  found = []
  note = lambda event, *_, **__: found.append(event)
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    out = function(*args)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  return found.count("/jax/core/compile/backend_compile_duration"), out


@pytest.mark.parametrize("kind", [TYPES[0], pytest.param(TYPES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("scaling", ["eigenvalue", pytest.param("exact", marks=pytest.mark.slow)])
def test_there_and_back_by_one_program(scaling, kind):
  """Each way, and exactly: of what is on a mesh or on the host, in all its dtypes."""
  mesh = mesh_of(kind)
  make_one = functools.partial(make, "kfac", scaling=scaling, factor_dtype=jnp.bfloat16)
  state = make_one(Sharding(mesh)).init(put(mesh, inputs()[0]))
  count, blocks = programs(fop_optax.to_blocks, state)
  assert count == 1
  assert shapes(blocks) == shapes(make_one().init(inputs()[0]))
  count, owned = programs(fop_optax.to_owners, blocks, Sharding(mesh))
  assert count == 1
  for back in (owned, fop_optax.to_owners(jax.device_get(blocks), Sharding(mesh))):
    assert shapes(back) == shapes(state)
    same_places(back, jax.tree.map(lambda x: x.sharding, state))
    same(back, state, 0)
  assert all(
    isinstance(x, np.ndarray) for x in jax.tree.leaves(fop_optax.to_blocks(jax.device_get(state)))
  )


@pytest.mark.slow
@KINDS
@REFRESHES
@pytest.mark.parametrize("scaling", ["factored", "exact", "eigenvalue"])
@pytest.mark.parametrize("name", ["kfac", "fop"])
def test_eight_devices_are_one_in_all_ways(name, scaling, refresh, kind):
  on_eight(name, kind, refresh, scaling=scaling)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(
  "options",
  [
    {"stagger": True, "inverse_update_period": 3},
    {"inverse_update_period": 3, "scaling": "exact"},
    {"stagger": True, "inverse_update_period": 3, "scaling": "eigenvalue"},
    {"projection_metric": "damped", "beta": optax.linear_schedule(0.1, 0.2, 4)},
    {"factor_dtype": jnp.bfloat16},
  ],
)
def test_with_options(options, kind):
  on_eight("fop", kind, (None,) * 4, **options)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("axes", [("data", "model"), ("model",)])
def test_more_axes(axes, kind):
  """Owners along some axes of a mesh or all; along the others they are the same."""
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  expected = train("fop", make("fop"))
  with jax.set_mesh(mesh):
    tx = make("fop", Sharding(mesh, axes))
    params, state, _ = train("fop", tx, mesh)
    same(params, expected[0])
    same_state(fop_optax.to_blocks(state), expected[1])


@pytest.mark.slow
@KINDS
def test_injected_hyperparameters(kind):
  def injected(name, sharding=None):
    layers = captured_of(name).layers
    return optax.inject_hyperparams(getattr(fop_optax, name))(
      0.1, layers, damping=0.1, decay=0.9, curvature_update_period=2, sharding=sharding
    )

  expected = train("kfac", injected("kfac"))
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, state, _ = train("kfac", injected("kfac", Sharding(mesh)), mesh)
  same(params, expected[0])


@pytest.mark.parametrize(
  ("name", "kind", "refresh"),
  [
    ("fop", AxisType.Auto, None),
    *(
      pytest.param(name, kind, refresh, marks=pytest.mark.slow)
      for name in ("kfac", "fop")
      for kind in TYPES
      for refresh in (None, True, False)
    ),
  ],
)
def test_one_operation_between_devices_and_no_more(name, kind, refresh):
  """Beyond the gradient and its statistics; none in the refresh."""
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, tx = put(mesh, inputs()[0]), make(name, Sharding(mesh))
    args = params, tx.init(params), *batch(mesh, 0)

    def gradient(params, state, x, y):
      due = fop_optax.refresh_due(state) if refresh is None else refresh
      return captured_of(name).value_and_grad(params, x, y, refresh=due)

    ours, plain = (
      collections.Counter(own[0] for own in collectives(jax.jit(f).lower(*args).compile()))
      for f in (step_of(name, tx, refresh), gradient)
    )
  assert set(plain) == {"all-reduce"}
  assert set(ours) <= {"all-reduce", "all-gather"}
  assert ours.total() <= plain.total() + 1


@pytest.mark.parametrize("kind", [TYPES[0], pytest.param(TYPES[1], marks=pytest.mark.slow)])
def test_bases_are_gathered_where_statistics_are_taken(kind):
  """In the branch of a refresh that is traced: elsewhere it is one operation more, as for K-FAC."""
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, tx = put(mesh, inputs()[0]), make("kfac", Sharding(mesh), scaling="eigenvalue")
    args = params, tx.init(params), *batch(mesh, 0)
    lower = lambda refresh: jax.jit(step_of("kfac", tx, refresh)).lower(*args).compile()
    traced, never = (
      collections.Counter(own[1] for own in collectives(lower(x))) for x in (None, False)
    )
  assert traced["entry"] == never["entry"] == 2  # gradient, directions
  assert len(never) == 2 and len(traced) == 3  # a loop over layers has its own


def test_the_cheaper_of_two_ways():
  """Many shapes and few blocks of each, and empty slots would be gathered: a sum, of the model."""
  params = {f"w{i}": np.ones((2 + i, 3 + i)) for i in range(4)}

  def loss(p, x, y):
    for w in p.values():
      x = jnp.tanh(x @ w)
    return fop_optax.squared_error(x, y)

  rng, mesh = np.random.default_rng(0), mesh_of()
  x, y = rng.normal(size=(16, 2)), rng.normal(size=(16, 6))
  captured = fop_optax.capture(loss, params, x, y)
  txs = [fop_optax.kfac(0.1, captured.layers, sharding=own) for own in (None, Sharding(mesh))]

  def step(tx, params, x, y):
    _, grads, stats = captured.value_and_grad(params, x, y)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  args = put(mesh, params), *put(mesh, (x, y), "data")
  owned = jax.jit(functools.partial(step, txs[1]))
  assert {own[0] for own in collectives(owned.lower(*args).compile())} == {"all-reduce"}
  same(owned(*args), jax.jit(functools.partial(step, txs[0]))(params, x, y))


def test_state_and_work_of_a_device():
  """Arrays of its slots alone, and the sides of the blocks that it owns."""
  layers = captured_of("kfac").layers
  stacks, mesh = plan_stacks(layers), mesh_of()
  owners = plan_owners(stacks, 8)
  state = make("kfac", Sharding(mesh)).init(put(mesh, inputs()[0]))
  (curvature,) = states(state)
  for stack, slots, own in zip(stacks, owners.slots, curvature.stacks, strict=True):
    one = [shape[1:] for shape in stack.factor_shapes]
    shards = [x.sharding.shard_shape(x.shape) for x in (*own.factors, *own.inverse)]
    assert shards == [(slots, *shape) for shape in one * 2]
  assert sum(owners.slots) < sum(stack.blocks for stack in stacks) / 2
  assert max(owners.loads) < sum(owners.loads) / 4  # the largest block is 0.23 of all


def states(state):
  is_curvature = lambda x: isinstance(x, CurvatureState)
  return [x for x in jax.tree.leaves(state, is_leaf=is_curvature) if is_curvature(x)]


stacks_of = st.lists(
  st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans()),
  min_size=1,
  max_size=4,
).map(lambda rows: tuple(Stack((0,), n, (a, g), (diagonal, False)) for n, a, g, diagonal in rows))


@hypothesis.given(stacks_of, st.integers(1, 9))
def test_every_block_has_one_owner(stacks, devices):
  owners = plan_owners(stacks, devices)
  loads = [0] * devices
  for stack, slots, places in zip(stacks, owners.slots, owners.places, strict=True):
    assert len(places) == len(set(places)) == stack.blocks
    assert all(0 <= place < devices * slots for place in places)
    counts = np.bincount([place // slots for place in places], minlength=devices)
    assert max(counts) == slots
    loads += counts * cube(stack)
  assert list(loads) == list(owners.loads)


def test_shares_of_known_networks():
  """Of the bytes, the refresh and the products of a step that one device would have, on eight."""

  def shares(*rows):
    counts = collections.Counter(dims for n, *dims in rows for dims in [tuple(dims)] * n)
    stacks = [Stack((0,), n, dims, (False, False)) for dims, n in counts.items()]
    owners = plan_owners(tuple(stacks), 8)
    entries, products = (lambda a, g: a**2 + g**2), (lambda a, g: a * g * (a + g))
    share = lambda size: (
      sum(slots * size(*own.dims) for slots, own in zip(owners.slots, stacks, strict=True))
      / sum(own.blocks * size(*own.dims) for own in stacks)
    )
    return share(entries), max(owners.loads) / sum(owners.loads), share(products)

  gpt2 = shares((12, 769, 2304), (12, 769, 768), (12, 769, 3072), (12, 3073, 768))
  assert max(gpt2) <= 1 / 6
  stages = [(256, 64, 3), (512, 128, 4), (1024, 256, 6), (2048, 512, 3)]
  inner = [(n, 9 * w, w) for _, w, n in stages] + [(n, w, out) for out, w, n in stages]
  first = [(n - 1, out, w) for out, w, n in stages] + [(1, 147, 64), (1, 2049, 1000), (1, 64, 64)]
  down = [(1, a, w) for a, w in ((256, 128), (512, 256), (1024, 512))]
  short = [(1, 64, 256), *((1, w // 2, w) for w in (512, 1024, 2048))]
  state, refresh, step = shares(*inner, *first, *down, *short)
  # one whole factor of side 4,608 is 0.2 of the refresh; what is of its own shape has a slot on
  # every device
  assert refresh <= 0.22 and state <= 0.4 and step <= 0.47


def cube(stack):
  return sum(d if own else d**3 for d, own in zip(stack.dims, stack.diagonal, strict=True))


@hypothesis.given(stacks_of, st.integers(2, 3))
def test_the_largest_load_is_near_the_least_possible(stacks, devices):
  blocks = sorted((cube(stack) for stack in stacks for _ in range(stack.blocks)), reverse=True)[:7]
  hypothesis.assume(len(blocks) == sum(stack.blocks for stack in stacks))
  best = min(
    max(sum(t for t, own in zip(blocks, deal, strict=True) if own == i) for i in range(devices))
    for deal in itertools.product(range(devices), repeat=len(blocks))
  )
  assert max(plan_owners(stacks, devices).loads) <= (4 / 3) * best


@KINDS
def test_shardings_of_a_state(kind):
  """As `init` places it, eagerly and traced, and as steps leave it; also within wrappers."""
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, kfac = put(mesh, inputs()[0]), make("kfac", Sharding(mesh))
    chain = optax.chain(optax.clip(1.0), optax.masked(kfac, True))
    for tx in (kfac, chain, optax.MultiSteps(kfac, 2)):
      shardings = fop_optax.state_shardings(tx, jax.eval_shape(lambda: params))
      owned = sum("data" in own.spec for own in jax.tree.leaves(shardings))
      assert owned == 4 * len(plan_stacks(captured_of("kfac").layers))
      for state in (jax.device_put(tx.init(params), shardings), jax.jit(tx.init)(params)):
        (own,), (wanted,) = states(state), states(shardings)
        assert jax.tree.all(jax.tree.map(equivalent, own.stacks, wanted.stacks))
    shardings = fop_optax.state_shardings(kfac, params)
    same_places(kfac.init(params), shardings)
    step = jax.jit(step_of("kfac", kfac), out_shardings=(None, shardings, None))
    same_places(step(params, kfac.init(params), *batch(mesh, 0))[1], shardings)


def equivalent(x, sharding):
  return x.sharding.is_equivalent_to(sharding, x.ndim)


def same_places(tree, shardings):
  assert [x.sharding for x in jax.tree.leaves(tree)] == jax.tree.leaves(shardings)


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["factored", "exact", "eigenvalue"])
def test_a_checkpoint_knows_no_mesh(scaling):
  """A state goes from 8 devices to 4, to one and to 8 again, as if it had stayed on one."""
  expected = train("fop", make("fop", scaling=scaling), refresh=(True,) * 4)
  plain = jax.eval_shape(make("fop", scaling=scaling).init, inputs()[0])
  params, state = inputs()[0], None
  for i, devices in enumerate((8, 4, 1, 8)):
    mesh = mesh_of(n=devices)
    tx = make("fop", Sharding(mesh), scaling=scaling)
    params = put(mesh, params)
    if state is None:
      state = tx.init(params)
    else:
      state = fop_optax.to_owners(state, Sharding(mesh))
      same_places(state, fop_optax.state_shardings(tx, params))
    params, state, _ = jax.jit(step_of("fop", tx, True))(params, state, *batch(mesh, i))
    params, state = jax.device_get((params, fop_optax.to_blocks(state)))
    assert shapes(state) == shapes(plain)
  same(params, expected[0])
  same_state(state, expected[1])


def test_a_batch_that_is_not_finite_changes_nothing():
  mesh = mesh_of()
  tx = make("kfac", Sharding(mesh))
  params, x = put(mesh, inputs()[0]), batch(mesh, 0)
  step = jax.jit(step_of("kfac", tx))
  params, state, _ = step(params, tx.init(params), *x)
  after, skipped, _ = step(params, state, jnp.nan * x[0], x[1])
  same(after, params, 0)
  (before,), (now,) = states(state), states(skipped)
  assert now.steps.nonfinite_losses == 1 and now.steps.count == 1
  same((now.stacks, now.blocks), (before.stacks, before.blocks), 0)
  params, state, _ = step(params, skipped, *batch(mesh, 1))
  same(params, train("kfac", make("kfac"), refresh=(None,) * 2)[0])


@pytest.mark.slow
def test_diagnostics():
  layers, mesh = captured_of("fop").layers, mesh_of()
  expected = train("fop", make("fop"), refresh=(None,))[1]
  state = train("fop", make("fop", Sharding(mesh)), mesh, refresh=(None,))[1]
  read = lambda state: fop_optax.diagnostics(state, layers, condition=True, spectra=True)
  same(read(state), read(expected), 1e-6)
  same(jax.jit(read)(state), read(expected), 1e-6)
  assert not fop_optax.refresh_due(state)


@pytest.mark.slow
def test_donated_state():
  """No two arrays that `init` makes share a buffer; compiled once."""
  mesh = mesh_of()
  params, tx = put(mesh, inputs()[0]), make("kfac", Sharding(mesh))
  state = tx.init(params)
  pointers = [
    shard.data.unsafe_buffer_pointer()
    for made in (state, jax.jit(tx.init)(params))
    for leaf in jax.tree.leaves(made)
    for shard in leaf.addressable_shards
  ]
  assert len(set(pointers)) == len(pointers)
  step = jax.jit(step_of("kfac", tx), donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, params)
  for i in range(2):
    params, state, _ = step(params, state, *batch(mesh, i))
  assert step._cache_size() == 1
  same(params, train("kfac", make("kfac"), refresh=(None,) * 2)[0])


def test_factorisations_are_of_one_matrix():
  """As `test_contract` has it without owners."""
  tx = make("fop", Sharding(mesh_of()), scaling="exact")
  args = jax.eval_shape(lambda p: (p, tx.init(p)), inputs()[0])
  step = jax.make_jaxpr(step_of("fop", tx))(*args, *batch(None, 0))
  found = list(factorised(step.jaxpr))
  assert found and all(operand.ndim == 2 for operand in found)


def test_errors():
  mesh = mesh_of()
  with pytest.raises(TypeError, match=r"takes a `jax.sharding.Mesh`, not a str.*write"):
    Sharding("data")
  for axes in (("model",), (), ("data", "data")):
    with pytest.raises(ValueError, match=r"should name axes of the mesh, each once.*'data'"):
      Sharding(mesh, axes)
  assert Sharding(mesh, "data") == Sharding(mesh)
  assert {Sharding(mesh): 1}[Sharding(mesh)] == 1
  with pytest.raises(TypeError, match=r"`sharding` is a Mesh: pass `fop_optax.Sharding\(mesh\)`"):
    make("kfac", mesh)
  params = inputs()[0]
  with pytest.raises(ValueError, match=r"found no `sharding` in `tx`.*kfac\(..., sharding="):
    fop_optax.state_shardings(make("kfac"), params)
  state, owned = make("kfac").init(params), make("kfac", Sharding(mesh)).init(params)
  with pytest.raises(ValueError, match=r"`to_blocks` found a state whose blocks have no owners"):
    fop_optax.to_blocks(state)
  with pytest.raises(ValueError, match=r"`to_blocks` found no curvature state"):
    fop_optax.to_blocks(params)
  with pytest.raises(ValueError, match=r"`to_owners` found a state whose blocks have owners"):
    fop_optax.to_owners(owned, Sharding(mesh))
  with pytest.raises(TypeError, match=r"takes a `fop_optax.Sharding\(mesh\)`, not a Mesh"):
    fop_optax.to_owners(state, mesh)
  step = step_of("kfac", make("kfac", Sharding(mesh)))
  for wrong in (state, make("kfac", Sharding(mesh_of(n=4))).init(params)):
    with pytest.raises(ValueError, match=r"this optimizer has 8 owners.*`fop_optax.to_owners"):
      jax.eval_shape(step, params, wrong, *batch(None, 0))


def test_inside_shard_map_is_refused():
  mesh = mesh_of()
  tx = make("kfac", Sharding(mesh))
  spec = PartitionSpec()
  with pytest.raises(ValueError, match=r"inside a `jax.shard_map` over 'data'.*under `jax.jit`"):
    jax.eval_shape(jax.shard_map(tx.init, mesh=mesh, in_specs=spec, out_specs=spec), inputs()[0])


@pytest.mark.slow
def test_orbax(tmp_path):
  """On the same devices as it is; for others in the order of blocks."""
  ocp = pytest.importorskip("orbax.checkpoint")
  mesh, other = mesh_of(), mesh_of(n=4)
  tx, plain = make("kfac", Sharding(mesh)), make("kfac")
  params = put(mesh, inputs()[0])
  step = jax.jit(step_of("kfac", tx, True))
  params, state, _ = step(params, tx.init(params), *batch(mesh, 0))
  blocks = fop_optax.to_blocks(state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "owned", state)
    checkpointer.save(tmp_path / "blocks", blocks)
    checkpointer.wait_until_finished()
    like = jax.tree.map(
      lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
      jax.eval_shape(tx.init, params),
      fop_optax.state_shardings(tx, params),
    )
    restored = checkpointer.restore(tmp_path / "owned", like)
    same(restored, state, 0)
    same_places(restored, fop_optax.state_shardings(tx, params))
    like = jax.eval_shape(plain.init, inputs()[0])
    whole = NamedSharding(other, PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
    restored = checkpointer.restore(tmp_path / "blocks", like)
  owned = fop_optax.to_owners(restored, Sharding(other))
  after = jax.jit(step_of("kfac", make("kfac", Sharding(other)), True))
  params = jax.device_get(params)
  expected = jax.jit(step_of("kfac", plain, True))(params, jax.device_get(blocks), *batch(None, 1))
  same(after(put(other, params), owned, *batch(other, 1))[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["factored", "eigenvalue"])
def test_a_frozen_layer_and_two_dtypes(scaling):
  """A stack that is masked has one block of one entry; each dtype is collected by itself."""
  params, x, y = inputs()
  params = params | {"wide": params["wide"].astype("float32")}
  captured = fop_optax.capture(loss, params, x[0], y[0], groups=2, max_dim=16)
  labels = {name: "frozen" if name == "head" else "fop" for name in params}

  def step(sharding, params, x, y):
    fop = fop_optax.fop(0.1, captured.layers, scaling=scaling, sharding=sharding)
    tx = optax.partition({"fop": fop, "frozen": optax.set_to_zero()}, labels)
    basis = bases_of(tx.init(params))
    _, grads, stats = captured.value_and_grad(params, x, y, basis=basis)
    return tx.update(grads, tx.init(params), params, stats=stats)

  mesh = mesh_of()
  own = jax.jit(functools.partial(step, Sharding(mesh)))
  updates, state = own(put(mesh, params), *batch(mesh, 0))
  expected, plain = jax.jit(functools.partial(step, None))(params, *batch(None, 0))
  same(updates, expected, 1e-6)
  blocks = fop_optax.to_blocks(state)
  assert shapes(blocks) == shapes(plain)
  if scaling == "factored":  # single precision leaves eigenvectors of close eigenvalues open
    same(blocks, plain, 1e-4)

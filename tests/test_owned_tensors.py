"""SOAP and Shampoo with owners over a mesh of eight devices: the numbers of one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import optax
import pytest
from selection import slow_but
from test_contract import factorised
import test_owned
from test_owned import KINDS, TYPES, captured_of, mesh_of, put, same, same_places

from experiments.benchmarks import hlo
from experiments.benchmarks.hlo import collectives
import fop_optax
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.sharding import Sharding

pytestmark = pytest.mark.usefixtures("x64")

# Statistics of one gradient have full rank, or but one less, so that bases are not up to LAPACK.
SHAPES = {"a": (4, 4), "b": (4, 4), "c": (3, 4), "d": (2, 3, 4), "e": (4,), "f": (10, 4, 4)}
NUMBERS = {"f": fop_optax.DimensionNumbers(1, 2)}  # ten matrices: 12 of one shape, 15 blocks
STEPS = 6


@functools.cache
def inputs():
  """Parameters, and gradients and contrasts of each step."""
  rng = np.random.default_rng(0)
  draw = lambda *first: {name: rng.normal(size=first + own) for name, own in SHAPES.items()}
  return draw(), draw(STEPS), draw(STEPS)


def make(name, sharding=None, **options):
  options = {"inverse_update_period": 2, "dimension_numbers": NUMBERS} | options
  eps = {"eps": 1e-3} if name == "shampoo" else {}
  return getattr(fop_optax, name)(0.1, sharding=sharding, **eps | options)


def step_of(tx):
  """A step on given gradients, in part along the parameters."""

  def step(params, state, grads, contrast):
    grads = jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
    stats = fop_optax.Stats(jnp.asarray(False), (), (contrast,))
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


def batch(mesh, i):
  _, *trees = inputs()
  trees = jax.tree.map(lambda x: x[i], trees)
  return trees if mesh is None else put(mesh, trees)


def types(tree):
  return [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]


def train(tx, mesh=None, steps=STEPS, donate=()):
  """Parameters and state after steps of one program."""
  params = inputs()[0]
  params = jax.tree.map(jnp.asarray, params) if mesh is None else put(mesh, params)
  state = tx.init(params)
  before, step = types(state), jax.jit(step_of(tx), donate_argnums=donate)
  for i in range(steps):
    params, state = step(params, state, *batch(mesh, i))
    assert types(state) == before
  assert step._cache_size() == 1
  return params, state


def on_eight(name, kind, **options):
  expected = train(make(name, **options))
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, state = train(make(name, Sharding(mesh), **options), mesh)
    same(params, expected[0])
    same(fop_optax.to_blocks(state), expected[1], 1e-7)
  return state, expected[1]


VARIANTS = {
  "soap": {},
  "soap-stagger": {"stagger": True, "inverse_update_period": 3},
  "soap-one_sided": {"one_sided": True, "skip_first": False},
  "soap-factorized": {"factorized": True, "normalize_grads": True},
  "soap-kl": {"kl": True, "correct_bias": False, "precondition_1d": True},
  "soap-identity": {"start": "identity", "stagger": True, "skip_first": False},
  "soap-contrast": {"contrast": True},
  "soap-schedule": {"inverse_update_period": fop_optax.WarmupPeriod(2, 3), "max_precond_dim": 3},
  "shampoo": {},
  "shampoo-stagger": {"stagger": True, "inverse_update_period": 3, "start_step": 2},
  "shampoo-newton": {"root": "newton", "grafting": "rmsprop"},
  "shampoo-blocks": {"block_size": 3, "weight_decay": 0.1},
  "shampoo-merged": {"merge_to": 2, "grafting": None, "dimension_numbers": None},
  "shampoo-kl": {"kl": True, "exponents": {2: 0.5}},
  "shampoo-contrast": {"contrast": True, "grafting": "sgd"},
  "shampoo-corrected": {"eigenvalue_correction": True, "grafting": "adagrad"},
}


@KINDS
@pytest.mark.parametrize("variant", slow_but(VARIANTS, "soap"))
def test_eight_devices_are_one(variant, kind):
  on_eight(variant.partition("-")[0], kind, **VARIANTS[variant])


@pytest.mark.slow
def test_in_the_fisher_basis():
  """Of batches sharded over the mesh."""
  soap = functools.partial(fop_optax.soap, 0.1, fisher=True, layers=captured_of("kfac").layers)
  refresh, mesh = (True, False, True, True), mesh_of()
  expected = test_owned.train("kfac", soap(), refresh=refresh)
  with jax.set_mesh(mesh):
    params, state, _ = test_owned.train("kfac", soap(sharding=Sharding(mesh)), mesh, refresh)
  same(params, expected[0], 1e-7)


PLAIN = pytest.mark.parametrize("name", ["soap", "shampoo"])
ONE = pytest.mark.parametrize("name", slow_but(["soap", "shampoo"], "shampoo"))


@PLAIN
@pytest.mark.parametrize("kind", slow_but(TYPES, "AxisType.Auto"))
def test_one_operation_between_devices_and_no_more(name, kind):
  """On replicated gradients: also in programs that refresh."""
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, tx = put(mesh, inputs()[0]), make(name, Sharding(mesh))
    args = params, tx.init(params), *batch(mesh, 0)
    found = collectives(jax.jit(step_of(tx)).lower(*args).compile())
  assert [own[1] for own in found] == ["entry"]
  assert {own[0] for own in found} <= {"all-gather", "all-reduce"}


@PLAIN
def test_work_of_a_device(name):
  """Of products and factorisations in the compiled step, an eighth where all slots are full."""
  params, mesh = {"w": np.ones((16, 8, 8))}, mesh_of()
  numbers = {"dimension_numbers": {"w": fop_optax.DimensionNumbers(1, 2)}}
  flops = []
  for own, sharding in ((None, None), (mesh, Sharding(mesh))):
    tx = make(name, sharding, **numbers)
    on = params if own is None else put(own, params)
    flops.append(hlo.flops(jax.jit(tx.update).lower(on, tx.init(on), on).compile()))
  assert flops[1] == flops[0] / 8 > 0


@ONE
def test_injected_hyperparameters(name):
  """Arrays, over which a function over explicit mesh axes cannot close."""
  make = lambda sharding: optax.inject_hyperparams(getattr(fop_optax, name))(
    optax.constant_schedule(0.1),
    b2=0.9,
    eps=1e-3,
    inverse_update_period=2,
    sharding=sharding,
    **({"graft_b2": 0.9} if name == "shampoo" else {"shampoo_beta": 0.9}),
  )
  expected, mesh = train(make(None), steps=3), mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    same(train(make(Sharding(mesh)), mesh, steps=3)[0], expected[0])


@pytest.mark.slow
@KINDS
@PLAIN
@pytest.mark.parametrize("axes", [("data", "model"), ("model",)])
def test_more_axes(axes, kind, name):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  expected = train(make(name))
  with jax.set_mesh(mesh):
    params, state = train(make(name, Sharding(mesh, axes)), mesh)
    same(params, expected[0])
    same(fop_optax.to_blocks(state), expected[1], 1e-7)


@PLAIN
@pytest.mark.parametrize("kind", slow_but(TYPES, "AxisType.Auto"))
def test_state_of_a_device(name, kind):
  """Of every array of a stack its slots alone, as `state_shardings` says and steps leave it."""
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params, tx = put(mesh, inputs()[0]), make(name, Sharding(mesh))
    for state in (tx.init(params), jax.jit(tx.init)(params), train(tx, mesh, 1)[1]):
      is_stack = lambda x: isinstance(x, OwnedStack)
      stacks = list(filter(is_stack, jax.tree.leaves(state, is_leaf=is_stack)))
      for own in stacks:
        slots = -(-len(own.place) // 8)  # few enough of each shape to be dealt evenly
        assert all(x.sharding.shard_shape(x.shape)[0] == slots for x in jax.tree.leaves(own.slots))
      assert [len(own.place) for own in stacks] == [12, 1, 1, 1]
    shardings = fop_optax.state_shardings(tx, jax.eval_shape(lambda: params))
    same_places(tx.init(params), shardings)
    step = jax.jit(step_of(tx), out_shardings=(None, shardings))
    same_places(step(params, tx.init(params), *batch(mesh, 0))[1], shardings)


@ONE
def test_a_checkpoint_knows_no_mesh(name):
  """A state goes from 8 devices to 4, to one and to 8 again, as if it had stayed on one."""
  expected = train(make(name), steps=4)
  params, state = inputs()[0], None
  for i, devices in enumerate((8, 4, 1, 8)):
    mesh = mesh_of(n=devices)
    tx, params = make(name, Sharding(mesh)), put(mesh, params)
    if state is None:
      state = tx.init(params)
    else:
      state = fop_optax.to_owners(state, Sharding(mesh))
      same_places(state, fop_optax.state_shardings(tx, params))
    params, state = jax.jit(step_of(tx))(params, state, *batch(mesh, i))
    params, state = jax.device_get((params, fop_optax.to_blocks(state)))
  same(params, expected[0])
  same(state, expected[1], 1e-7)
  assert jax.tree.structure(state) == jax.tree.structure(expected[1])


@PLAIN
def test_steps_that_are_not_finite_change_nothing(name):
  """The counters tell, as on one device, and diagnostics of what each block did."""
  mesh = mesh_of()
  found = []
  for own, sharding in ((None, None), (mesh, Sharding(mesh))):
    tx = make(name, sharding)
    params, state = train(tx, own, 3)
    step = jax.jit(step_of(tx))
    grads, contrast = batch(own, 3)
    bad = grads | {"a": jnp.asarray(grads["a"]).at[0, 0].set(jnp.nan)}
    after, skipped = step(params, state, bad, contrast)
    same(after, params, 0)
    found.append((step(after, skipped, grads, contrast), fop_optax.diagnostics(skipped)))
  (one, told), (eight, told_eight) = found
  same(eight[0], one[0])
  same(told_eight, told, 0)
  assert told["nonfinite_gradients"] == 1 and told["count"] == 3


@pytest.mark.slow
@PLAIN
def test_donated_state(name):
  """No two arrays that `init` makes share a buffer."""
  mesh = mesh_of()
  tx, params = make(name, Sharding(mesh)), put(mesh, inputs()[0])
  pointers = [
    shard.data.unsafe_buffer_pointer()
    for made in (tx.init(params), jax.jit(tx.init)(params))
    for leaf in jax.tree.leaves(made)
    for shard in leaf.addressable_shards
  ]
  assert len(set(pointers)) == len(pointers)
  same(train(tx, mesh, donate=(0, 1))[0], train(make(name))[0])


@PLAIN
def test_factorisations_are_of_one_matrix(name):
  tx, params = make(name, Sharding(mesh_of())), inputs()[0]
  state = jax.eval_shape(tx.init, params)
  found = list(factorised(jax.make_jaxpr(step_of(tx))(params, state, *batch(None, 0)).jaxpr))
  assert found and all(operand.ndim == 2 for operand in found)


@PLAIN
def test_errors(name):
  mesh, params = mesh_of(), inputs()[0]
  with pytest.raises(TypeError, match=r"`sharding` is a Mesh: pass `fop_optax.Sharding\(mesh\)`"):
    make(name, mesh)
  state, tx = make(name).init(params), make(name, Sharding(mesh))
  with pytest.raises(ValueError, match=r"`to_blocks` found a state whose blocks have no owners"):
    fop_optax.to_blocks(state)
  with pytest.raises(ValueError, match=r"`to_owners` found a state whose blocks have owners"):
    fop_optax.to_owners(tx.init(params), Sharding(mesh))
  for wrong in (state, make(name, Sharding(mesh_of(n=4))).init(params)):
    with pytest.raises(ValueError, match=r"this optimizer has 8 owners.*`fop_optax.to_owners"):
      jax.eval_shape(step_of(tx), params, wrong, *batch(None, 0))
  with pytest.raises(ValueError, match=r"dealt to owners, and this optimizer has no `sharding`"):
    jax.eval_shape(step_of(make(name)), params, tx.init(params), *batch(None, 0))
  tx = make(name, Sharding(mesh, params=[PartitionSpec("data")]))
  with pytest.raises(ValueError, match=r"of 1 parameters, but the gradient.*with 6.*each leaf"):
    jax.eval_shape(step_of(tx), params, jax.eval_shape(tx.init, params), *batch(None, 0))
  spec = PartitionSpec()
  tx = make(name, Sharding(mesh))
  with pytest.raises(ValueError, match=r"inside a `jax.shard_map` over 'data'.*under `jax.jit`"):
    jax.eval_shape(jax.shard_map(tx.init, mesh=mesh, in_specs=spec, out_specs=spec), params)

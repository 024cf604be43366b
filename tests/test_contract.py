"""What every optimizer keeps to, one row of `registry.ROWS` each."""

from collections import OrderedDict
import functools
from typing import Any

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint
import problems
import pytest
from registry import ROWS
from selection import slow_but

import fop_optax

QUICK = ("sgd", "kfac", "fop")  # the others are slow


@pytest.fixture(params=slow_but(ROWS, *QUICK, name=lambda row: row.name))
def row(request):
  return request.param


PARAMS = problems.make_params()
LAYERS = problems.layers_of(PARAMS)
frozen_layer = lambda tree: {name: name != "fc1" for name in tree}


@functools.cache
def data(row_name, seed=0, dtype=jnp.float32):
  """Gradient (or gradients) and statistics of one batch."""
  (row,) = (row for row in ROWS if row.name == row_name)
  params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
  batch = problems.make_batch(seed=seed, dtype=dtype)
  _, grads, stats = problems.value_and_grad(params, batch)
  if row.squares:
    stats = stats._replace(second_moments=problems.second_moments(params, batch))
  return (problems.per_example_grads(params, batch) if row.per_example else grads), stats


def due(row, state):
  return True if row.always or not row.curvature else fop_optax.refresh_due(state)


def make_step(row, tx):
  """A training step on given gradients: some of them of a new batch, some along the parameters."""

  def step(params, state, batch):
    grads, stats = batch
    grads = jax.tree.map(lambda g, p: g + (0.01 * p).astype(g.dtype), grads, params)
    stats = stats._replace(refresh=jnp.asarray(due(row, state)))
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def plain(row_name):
  """The optimizer of a row and its compiled step, shared by all tests."""
  (row,) = (row for row in ROWS if row.name == row_name)
  tx = row.tx(LAYERS)
  return tx, jax.jit(make_step(row, tx))


def run(row, step, params, state, steps=3):
  for seed in range(steps):
    params, state = step(params, state, data(row.name, seed))
  return params, state


def run_plain(row, steps=3):
  tx, step = plain(row.name)
  return run(row, step, PARAMS, tx.init(PARAMS), steps)


def assert_equal(tree, other, tol=0.0):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), tree, other)


def types(tree):
  return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jnp.asarray(x).weak_type), tree)


def test_structure_is_final_from_init(row):
  tx, step = plain(row.name)
  state = tx.init(PARAMS)
  _, after = step(PARAMS, state, data(row.name))
  assert types(state) == types(after)
  abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: PARAMS))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
  shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape(abstract) == shape(state) == shape(tx.init(shapes))


FACTORISATIONS = {"cholesky", "eigh", "qr", "svd", "triangular_solve"}
# Products alone, or no bases.
UNFACTORISED = {"sgd", "neumann", "soap then polar", "soap on spheres"}


def factorised(jaxpr):
  """The operands of all factorisations in a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in FACTORISATIONS:
      yield equation.invars[0].aval
    for inner in core.jaxprs_in_params(equation.params):
      yield from factorised(inner)


def test_factorisations_are_of_one_matrix(row):
  """Not of a batch: on the CPU two batches at a time may wait for each other for ever."""
  tx = row.tx(LAYERS)
  state = jax.eval_shape(tx.init, PARAMS)
  found = list(factorised(jax.make_jaxpr(make_step(row, tx))(PARAMS, state, data(row.name)).jaxpr))
  assert all(operand.ndim == 2 for operand in found), found
  assert found or row.name in UNFACTORISED


def test_compiles_once_also_with_donated_state(row):
  """From the first step on, on a state as `init` made it: no two of its arrays share a buffer."""
  tx = row.tx(LAYERS)
  step = jax.jit(make_step(row, tx), donate_argnums=(0, 1))
  params, _ = run(row, step, jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
  assert step._cache_size() == 1
  # another compilation of the same sums, of which XLA fuses some differently
  assert_equal(params, run_plain(row)[0], 1e-6)
  for state in (jax.jit(tx.init)(PARAMS), row.inject(LAYERS).init(PARAMS)):
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_compiles_once_on_a_mesh(row, kind):
  """With parameters on a mesh a state has its final types and shardings from `init` on."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  place = lambda x: NamedSharding(
    mesh, PartitionSpec(*[None] * (x.ndim if kind is AxisType.Explicit else 0))
  )
  put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)
  tx = row.tx(LAYERS)
  step = jax.jit(make_step(row, tx))
  params = put(PARAMS)
  state = tx.init(params)
  where = lambda tree: [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]
  for seed in range(2):
    params, after = step(params, state, put(data(row.name, seed)))
    if row.ours:
      assert where(after) == where(state)
    state = after
  assert step._cache_size() == 1


def test_unknown_extra_arguments_are_ignored(row):
  tx, _ = plain(row.name)
  grads, stats = data(row.name)
  args = grads, tx.init(PARAMS), PARAMS
  got = tx.update(*args, stats=stats, loss=1.0, something_else=None)
  assert_equal(got, tx.update(*args, stats=stats))


def test_chain_with_clipping(row):
  tx, _ = plain(row.name)
  chained = optax.chain(optax.clip_by_global_norm(0.1), tx)
  grads, stats = data(row.name)
  norm = optax.tree.norm(grads)
  clipped = jax.tree.map(lambda g: 0.1 * g / norm, grads)
  want, _ = tx.update(clipped, tx.init(PARAMS), PARAMS, stats=stats)
  got, state = chained.update(grads, chained.init(PARAMS), PARAMS, stats=stats)
  assert_equal(got, want, 1e-5)
  if row.curvature and not row.always:
    assert fop_optax.refresh_due(state) == row.often


@pytest.mark.parametrize("wrap", ["masked", "masked leaf by leaf", "partition"])
def test_a_frozen_layer(row, wrap):
  tx, _ = plain(row.name)
  label = lambda tree: {k: "train" if on else "frozen" for k, on in frozen_layer(tree).items()}
  by_leaf = jax.tree.map(lambda _: True, PARAMS) | {"fc1": {"b": False, "w": False}}
  other = {
    "masked": optax.masked(tx, frozen_layer),
    "masked leaf by leaf": optax.masked(tx, by_leaf),
    "partition": optax.partition({"train": tx, "frozen": optax.set_to_zero()}, label),
  }[wrap]
  grads, stats = data(row.name)
  state = other.init(PARAMS)
  got, after = other.update(grads, state, PARAMS, stats=stats)
  assert types(state) == types(after)
  zeros = jax.tree.map(jnp.zeros_like, grads["fc1"])
  assert_equal(got["fc1"], zeros if wrap == "partition" else grads["fc1"])
  if row.blockwise:
    want, _ = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    assert_equal({**got, "fc1": 0}, {**want, "fc1": 0}, 1e-5)
  if row.curvature and not row.always:
    names = fop_optax.diagnostics(after, LAYERS)["layers"]
    assert list(names) == ["['fc0']['w']", "['fc2']['w']"]


def test_an_integer_leaf_is_kept_out_by_a_mask(row):
  integer = {"steps": jnp.asarray(3)}
  params = PARAMS | integer
  tx = optax.masked(
    row.tx(problems.layers_of(params)), lambda tree: {name: name != "steps" for name in tree}
  )
  grads, stats = data(row.name)
  stats = stats._replace(contrasts=tuple(c | integer for c in stats.contrasts))
  got, _ = tx.update(grads | {"steps": jnp.asarray(0)}, tx.init(params), params, stats=stats)
  assert optax.apply_updates(params, got)["steps"] == 3


def test_injected_hyperparameters_equal_constants(row):
  tx = row.inject(LAYERS)
  params, state = run(row, jax.jit(make_step(row, tx)), PARAMS, tx.init(PARAMS))
  assert set(row.injected) <= set(state.hyperparams)
  assert_equal(params, run_plain(row)[0], 1e-5)


def test_apply_if_finite(row):
  if row.per_example:
    pytest.skip("the updates it gives instead are like its input, [B, *param]")
  tx = optax.apply_if_finite(plain(row.name)[0], 3)
  step = jax.jit(make_step(row, tx))
  params, state = run(row, step, PARAMS, tx.init(PARAMS))
  assert_equal(params, run_plain(row)[0], 1e-6)
  grads, stats = data(row.name)
  bad = jax.tree.map(lambda g: g * jnp.nan, grads)
  after, state = step(params, state, (bad, stats))
  assert state.total_notfinite == 1
  assert_equal(after, params)


def test_map_params(row):
  for wrap in (lambda tx: tx, lambda tx: optax.masked(tx, frozen_layer)):
    tx = wrap(plain(row.name)[0])
    state = tx.init(PARAMS)
    assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)


def test_dtypes_are_kept(row):
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
  params["gain"] = PARAMS["gain"]  # of two kinds, so that injected hyperparameters are float32
  grads, stats = data(row.name, dtype=jnp.bfloat16)
  grads["gain"] = grads["gain"].astype(jnp.float32)
  reference, step = plain(row.name)
  wide, _ = step(PARAMS, reference.init(PARAMS), data(row.name))
  for tx in (row.tx(LAYERS), row.inject(LAYERS)) if row.ours else (row.tx(LAYERS),):
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params, stats=stats)
    assert types(updates) == types(params)
    assert types(after) == types(state)
    new = optax.apply_updates(params, updates)
    assert_equal(jax.tree.map(lambda x: x.astype(jnp.float32), new), wide, 0.1)


def test_scan(row):
  tx, _ = plain(row.name)
  step = make_step(row, tx)
  batches = jax.tree.map(lambda *x: jnp.stack(x), *(data(row.name, seed) for seed in range(3)))
  (params, _), _ = jax.lax.scan(
    lambda carry, batch: (step(*carry, batch), None), (PARAMS, tx.init(PARAMS)), batches
  )
  assert_equal(params, run_plain(row)[0], 1e-5)


def test_vmap_over_seeds(row):
  tx, step = plain(row.name)
  seeds = [problems.make_params(seed) for seed in range(3)]
  params = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
  params, _ = run(
    row, jax.jit(jax.vmap(make_step(row, tx), (0, 0, None))), params, jax.vmap(tx.init)(params)
  )
  single, _ = run(row, step, seeds[1], tx.init(seeds[1]))
  assert_equal(jax.tree.map(lambda x: x[1], params), single, 1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_state_survives_a_checkpoint(row, frozen, tmp_path):
  tx, step = plain(row.name)
  if frozen:
    tx = optax.masked(tx, frozen_layer)
    step = jax.jit(make_step(row, tx))
  params, state = step(PARAMS, tx.init(PARAMS), data(row.name))
  leaves, treedef = jax.tree.flatten(state)
  assert_equal(jax.tree.unflatten(treedef, leaves), state)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert_equal(step(params, restored, data(row.name, 1)), step(params, state, data(row.name, 1)))


def test_a_state_of_another_model_is_refused(row):
  if not row.curvature:
    pytest.skip("no state of its own")
  sizes = ((5, 6), (6, 5), (5, 6))
  other = problems.make_params(sizes=sizes)
  state = row.tx(problems.layers_of(other)).init(other)
  grads, stats = data(row.name)
  with pytest.raises(ValueError, match=r"state is of another model .*`tx.init\(params\)`"):
    plain(row.name)[0].update(grads, state, PARAMS, stats=stats)


def other_gradients(grads):
  """Gradients of another loss, and what the message says of each."""
  fc1, gain = grads["fc1"], grads["gain"]
  swap = lambda **changes: {**grads, **changes}
  yield (
    swap(gain=None),
    r"lacks \['gain'\] of params\. Pass the gradient at these params, as `jax\.",
  )
  yield swap(fc1={"w": fc1["w"]}), r"lacks \['fc1'\]\['b'\] of params"
  yield swap(more=gain), r"has \['more'\], which params do not have"
  yield (
    swap(fc1=[fc1["b"], fc1["w"]]),
    r"lacks \['fc1'\]\['b'\], .* and has \['fc1'\]\[0\], .* which",
  )
  yield OrderedDict(sorted(grads.items())), "is in other containers than params"
  shape = r"\['fc1'\]\['b'\], where params (have \(4,\)|are float32\[4\])"
  yield swap(fc1={**fc1, "b": fc1["w"]}), f"(has shape|is) .* at {shape}"
  for dtype in (int, complex):
    yield (
      swap(gain=gain.astype(dtype)),
      rf"is {dtype.__name__}.* at \['gain'\], where (params are|it)",
    )


def test_a_gradient_of_another_loss_is_refused(row):
  if not row.ours:
    pytest.skip("not of this library")
  tx, _ = plain(row.name)
  grads, stats = data(row.name)
  for other, message in other_gradients(grads):
    with pytest.raises(ValueError, match=f"The gradient {message}"):
      tx.update(other, tx.init(PARAMS), PARAMS, stats=stats)


def test_a_state_of_another_optimizer_is_refused(row):
  if not row.ours:
    pytest.skip("not of this library")
  tx, _ = plain(row.name)
  grads, stats = data(row.name)
  message = (
    r"state has no `Scale.*`opt_state = tx.init\(params\)` and `tx.update\(grads, opt_state,"
  )
  links = row.name.endswith(("polar", "spheres"))  # of a chain, each has its own
  for other in (optax.adam(0.1).init(PARAMS), PARAMS):
    state = (other, *tx.init(PARAMS)[1:]) if links else other
    with pytest.raises(ValueError, match=message):
      tx.update(grads, state, PARAMS, stats=stats)


class Model(nnx.Module):
  """BatchNorm and Dropout, which hold state that is no parameter."""

  def __init__(self, rngs):
    self.first = nnx.Linear(5, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(6, 4, rngs=rngs)


def test_nnx_optimizer(row):
  model = Model(nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  paths = [jax.tree_util.keystr(path) for path, _ in flat]
  shapes = tuple(leaf.shape for _, leaf in flat)
  entries = []
  for name in ("first", "last"):
    weight, bias = (
      next(i for i, path in enumerate(paths) if name in path and part in path)
      for part in ("kernel", "bias")
    )
    rows, outputs = shapes[weight]
    shape, bias_shape = (1, rows, outputs), (1, outputs)
    entries.append(
      fop_optax.Layer(
        paths[weight],
        "dense",
        weight,
        (("reshape", shape),),
        1,
        rows,
        outputs,
        (fop_optax.layers.Bias(bias, (("reshape", bias_shape),)),),
      )
    )
  layers = fop_optax.Layers(tuple(entries), shapes, tuple(paths), 2)
  mask = {} if "mask" not in row.kwargs else {"mask": None}
  row = type(row)(**{**vars(row), "kwargs": {**row.kwargs, **mask}})
  optimizer = nnx.Optimizer(model, row.tx(layers), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, refresh):
    examples = (4,) if row.per_example else ()
    grads = jax.tree.map(lambda p: jnp.ones(examples + p.shape), nnx.state(model, nnx.Param))
    factors = tuple(
      fop_optax.layers.Factors(*(jnp.eye(s[1])[None] for s in layer.factor_shapes))
      for layer in layers
    )
    contrast = jax.tree.map(lambda g: 0.1 * jnp.cos(jnp.arange(g.size)).reshape(g.shape), grads)
    squares = tuple(jnp.ones((layer.stack, *layer.dims)) for layer in layers)
    stats = fop_optax.Stats(refresh, factors, (contrast,), second_moments=squares)
    optimizer.update(model, grads, stats=stats)
    return due(row, optimizer.opt_state)

  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  again: Any = due(row, optimizer.opt_state)
  assert again
  again = step(model, optimizer, jnp.asarray(True))
  assert again == (not row.curvature or row.often or row.always)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model, nnx.Param))
  assert all(moves == row.moves_at_once for moves in jax.tree.leaves(moved))
  if row.curvature and not row.always:
    assert fop_optax.diagnostics(optimizer.opt_state, layers)["count"] == 1
    assert fop_optax.refresh_due(nnx.state(optimizer)) == row.often

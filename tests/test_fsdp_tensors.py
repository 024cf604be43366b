"""SOAP and Shampoo on parameters sharded over a mesh, with owners and without: as on one device."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_fsdp
from test_fsdp import AUTO, EXPLICIT, KINDS, P, put, same
from test_owned_tensors import step_of

from experiments.benchmarks.hlo import collectives
import fop_optax
from fop_optax.sharding import Sharding

pytestmark = pytest.mark.usefixtures("x64")

# Statistics of one gradient have full rank, so that bases are not up to LAPACK.
SHAPES = {"a": (8, 8), "b": (8, 8), "c": (7, 8), "d": (2, 4, 8), "e": (8,), "f": (3, 8, 8), "g": ()}
NUMBERS = {"f": fop_optax.DimensionNumbers(1, 2)}  # three matrices: 5 of one shape, 9 blocks
MESHES = {
  "data": ((8,), ("data",)),
  "fsdp": ((8,), ("data",)),
  "tp": ((4, 2), ("data", "model")),
  "fsdp+tp": ((4, 2), ("data", "model")),
}
REPLICATED = dict.fromkeys(SHAPES, P())
SPECS = {
  "data": REPLICATED,
  "fsdp": {
    "a": P("data"),
    "b": P(None, "data"),
    "c": P(None, "data"),
    "d": P(None, None, "data"),
    "e": P("data"),
    "f": P(None, "data"),
    "g": P(),
  },
  "tp": REPLICATED | {"a": P(None, "model"), "b": P("model"), "f": P(None, None, "model")},
  "fsdp+tp": {
    "a": P("data", "model"),
    "b": P("model", "data"),
    "c": P(None, ("data", "model")),
    "d": P("model", None, "data"),
    "e": P("data"),
    "f": P(None, "data", "model"),
    "g": P(),
  },
}
STEPS = 4
# The gradient goes to the owners and the direction comes back; sums of a few numbers tell whether
# both are finite, of updates one for each set of axes they are sharded on.
COUNTS = {
  "data": {"all-reduce": 1},  # fewer bytes than a gather, which moves empty slots too
  "fsdp": {"all-to-all": 2, "all-reduce": 1},
  "tp": {"all-to-all": 2, "all-reduce": 2},  # one adds up the directions of four devices
  "fsdp+tp": {"all-to-all": 2, "all-reduce": 4},
}


@functools.cache
def inputs():
  """Parameters, and gradients and contrasts of each step."""
  rng = np.random.default_rng(0)
  draw = lambda *first: {name: rng.normal(size=first + own) for name, own in SHAPES.items()}
  return draw(), draw(STEPS), draw(STEPS)


def mesh_of(layout, kind):
  shape, names = MESHES[layout]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def make(name, sharding=None, **options):
  options = {"inverse_update_period": 2, "dimension_numbers": NUMBERS} | options
  eps = {"eps": 1e-3} if name == "shampoo" else {}
  return getattr(fop_optax, name)(0.1, sharding=sharding, **eps | options)


def batches(mesh=None, specs=None):
  """Gradient and contrast of each step."""
  _, *trees = inputs()
  each = [jax.tree.map(lambda x, i=i: x[i], trees) for i in range(STEPS)]
  return each if mesh is None else [[put(mesh, tree, specs) for tree in own] for own in each]


def train(tx, params, batches, pinned=False):
  """Parameters and state at the start and after each step, and the step."""
  out = [(params, tx.init(params))]
  there = jax.tree.map(lambda x: x.sharding, out[0]) if pinned else None
  step = jax.jit(step_of(tx), out_shardings=there)
  for own in batches:
    out.append(step(*out[-1], *own))
  return out, step


@functools.cache
def on_one_device(name, options):
  params = jax.tree.map(jnp.asarray, inputs()[0])
  return train(make(name, **dict(options)), params, batches())[0]


def on_a_mesh(name, layout, kind, owners=True, **options):
  """The optimizer, parameters and states of each step, and the step, whose numbers are checked."""
  mesh, specs = mesh_of(layout, kind), SPECS[layout]
  with jax.set_mesh(mesh):
    params = put(mesh, inputs()[0], specs)
    sharding = Sharding(mesh, mesh.axis_names, params) if owners else None
    tx = make(name, sharding, **options)
    ours, step = train(tx, params, batches(mesh, specs), pinned=not owners and kind is AUTO)
    expected = on_one_device(name, tuple(options.items()))
    for (own, state), (params, plain) in zip(ours, expected, strict=True):
      same(own, params)
      same(fop_optax.to_blocks(state) if owners else state, plain, 1e-7)
  return tx, ours, step


where = lambda tree: [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]
QUICK = {("soap", "fsdp+tp", EXPLICIT), ("shampoo", "fsdp", AUTO)}
ROWS = [
  pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
  for name in ("soap", "shampoo")
  for layout in MESHES
  for kind in (AUTO, EXPLICIT)
  for row in [(name, layout, kind)]
]


@pytest.mark.parametrize(("name", "layout", "kind"), ROWS)
def test_eight_devices_are_one(name, layout, kind):
  """Over refreshes and ordinary steps; every array stays where it is, and one compilation."""
  tx, ours, step = on_a_mesh(name, layout, kind)
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1
  with jax.set_mesh(mesh_of(layout, kind)):
    shardings = fop_optax.state_shardings(tx, ours[0][0])
    args = *ours[0], *batches(mesh_of(layout, kind), SPECS[layout])[0]
    found = collectives(step.lower(*args).compile())
  assert [x.sharding for x in jax.tree.leaves(ours[1][1])] == jax.tree.leaves(shardings)
  assert collections.Counter(own for own, *_ in found) == COUNTS[layout]


VARIANTS = {
  "soap-contrast": {"contrast": True, "stagger": True},
  "soap-dims": {"merge_dims": True, "max_precond_dim": 8, "dimension_numbers": None},
  "soap-one_sided": {"one_sided": True, "skip_first": False, "weight_decay": 0.1},
  "shampoo-contrast": {"contrast": True, "grafting": "sgd"},
  "shampoo-blocks": {"block_size": 4},  # parts of a leaf are cut
}


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_options(variant, kind):
  on_a_mesh(variant.partition("-")[0], "fsdp+tp", kind, **VARIANTS[variant])


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_without_owners(name, layout, kind):
  """Then every device has the whole gradient, and updates come back sharded.

  Under automatic axes XLA is free to place state and parameters elsewhere, but for `out_shardings`.
  """
  _, ours, step = on_a_mesh(name, layout, kind, owners=False)
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1


TENSOR_BY_TENSOR = {
  "neumann": lambda: fop_optax.neumann(0.1, steps_per_epoch=1, num_sgd_steps=1),
  "muon-hyperball": lambda: optax.chain(
    optax.trace(0.9),
    fop_optax.orthogonalize(dimension_numbers=NUMBERS),
    fop_optax.hyperball(0.1, dimension_numbers=NUMBERS),
  ),
}


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("layout", ["fsdp", "fsdp+tp"])
@pytest.mark.parametrize("name", TENSOR_BY_TENSOR)
def test_what_has_no_owners(name, layout, kind):
  """Neumann is entry by entry; the others gather what they take for matrices, one by one."""
  tx, mesh, specs = TENSOR_BY_TENSOR[name](), mesh_of(layout, kind), SPECS[layout]
  expected, _ = train(tx, jax.tree.map(jnp.asarray, inputs()[0]), batches())
  with jax.set_mesh(mesh):
    ours, step = train(tx, put(mesh, inputs()[0], specs), batches(mesh, specs), kind is AUTO)
    same(ours, expected)
  like_params = [x.sharding for x in jax.tree.leaves(ours[0][0])] * 2
  if name == "neumann":  # momentum and average
    assert [x.sharding for x in jax.tree.leaves(ours[0][1])][-len(like_params) :] == like_params
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1


class FisherSetup(test_fsdp.Setup):
  """SOAP in the eigenbasis of the Fisher matrix, with contrasts; a head that is frozen."""

  def optimizer(self, name):
    fisher = {"eps": 1e-3, "fisher": True, "contrast": True, "layers": self.captured.layers}
    soap = fop_optax.soap(0.1, inverse_update_period=2, sharding=self.sharding, **fisher)
    labels = {name: "frozen" if "head" in name else "soap" for name in self.params}
    return optax.partition({"soap": soap, "frozen": optax.set_to_zero()}, labels)

  def gradient(self, params, state, x, y):
    return self.captured.value_and_grad(params, x, y)


@pytest.mark.slow
@KINDS
def test_in_the_fisher_basis(kind):
  """Weight and bias are one matrix; what is masked has a sharding and no place."""
  expected = FisherSetup("fop").train()[0][-1]
  with jax.set_mesh(test_fsdp.mesh_of("fsdp+tp", kind)):
    setup = FisherSetup("fop", "fsdp+tp", kind)
    ours, step = setup.train()
    same(ours[-1][0], expected[0])
  assert where(ours[0]) == where(ours[1]) == where(ours[2])
  assert step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "shampoo"])
@pytest.mark.parametrize("bad", [np.nan, 1e200])
def test_a_gradient_that_is_not_finite(name, bad):
  """On one device, or so large that its square is not: the step is skipped and counted."""
  mesh, specs = mesh_of("fsdp+tp", EXPLICIT), SPECS["fsdp+tp"]
  with jax.set_mesh(mesh):
    params = put(mesh, inputs()[0], specs)
    tx = make(name, Sharding(mesh, mesh.axis_names))
    (grads, contrast), *_ = batches()
    grads = grads | {"d": np.where(np.arange(8) == 5, bad, grads["d"])}
    placed = [put(mesh, tree, specs) for tree in (grads, contrast)]
    after, state = jax.jit(step_of(tx))(params, tx.init(params), *placed)
    same(after, params, 0)
    assert fop_optax.diagnostics(state)["nonfinite_gradients"] == 1

"""Networks over graphs, most of them equivariant, in Haiku and Flax Linen."""

from collections.abc import Callable
import json
from typing import Any

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

JRAPH = Collection(
  "jraph examples",
  repository="google-deepmind/jraph",
  commit="51f5990104f7374492f8f3ea1cbc47feb411c69c",
)
E3NN = Collection(
  "e3nn-jax examples",
  repository="e3nn/e3nn-jax",
  commit="04e761c8e9a42c339cc712fb8b9af85ddd618eab",
)
E3X = Collection(
  "E3x examples",
  repository="google-research/e3x",
  commit="5405abf5e3168c03a286d450f8422a7262a6b988",
)
PAINN = Collection(
  "painn-jax",
  repository="gerkone/painn-jax",
  commit="c3baec4e31c7e66acd4035c4253432a6b4f07aa9",
)
EGNN = Collection(
  "egnn-jax",
  repository="gerkone/egnn-jax",
  commit="155a0d44e1bb889a135aca613d336360c50c0d9f",
)
NEQUIP = Collection(
  "nequip-jax",
  repository="mariogeiger/nequip-jax",
  commit="0e7a3115378f5cb8b391194a2ecc483d3f702976",
)
ATOMS = 5  # of a molecule, all pairs are edges


def _molecules() -> tuple[jax.Array, jax.Array]:
  """Positions and atomic numbers."""
  return problem.images(ATOMS, 3), problem.labels(9, ATOMS)


def _edges(examples: int) -> tuple[jax.Array, jax.Array]:
  """Senders and receivers of all molecules."""
  senders, receivers = jnp.where(~jnp.eye(ATOMS, dtype=bool), size=ATOMS * (ATOMS - 1))
  offsets = ATOMS * jnp.arange(examples)[:, None]
  return (senders + offsets).reshape(-1), (receivers + offsets).reshape(-1)


def _graph(nodes: Any, edges: Any, examples: int) -> Any:
  import jraph

  senders, receivers = _edges(examples)
  return jraph.GraphsTuple(
    nodes=nodes, edges=edges, senders=senders, receivers=receivers, globals=None,
    n_node=jnp.full(examples, ATOMS), n_edge=jnp.full(examples, ATOMS * (ATOMS - 1)),
  )  # fmt: skip


def _haiku(network: Callable, *data: jax.Array) -> tuple[Any, Callable]:
  """Parameters and application of a function of `data` that calls Haiku modules."""
  import haiku as hk

  transformed = hk.without_apply_rng(hk.transform(network))
  return jax.jit(transformed.init)(problem.KEY, *data), transformed.apply


@JRAPH.model("relation network (Higgs detection)", "Haiku")
def relations() -> Problem:

  models = JRAPH.load("jraph/examples/higgs_detection.py")

  def network(momenta):
    graph = _graph(momenta.reshape(-1, 4), None, len(momenta))
    return models.network_definition(graph)

  photons = problem.images(ATOMS, 4)
  params, apply = _haiku(network, photons)

  def loss_fn(params, photons, labels):
    return problem.cross_entropy(apply(params, photons), labels)

  return Problem(loss_fn, params, (photons, problem.labels(2) % 2))


@JRAPH.model("interaction network (2-SAT)", "Haiku")
def satisfiability() -> Problem:
  models = JRAPH.load("jraph/examples/sat.py")

  def network(nodes, edges):
    graph = _graph(nodes.reshape(-1, 2), edges.reshape(-1, 2), len(nodes))
    return models.network_definition(graph, 2).reshape(nodes.shape)

  nodes, edges = problem.images(ATOMS, 2), problem.images(ATOMS * (ATOMS - 1), 2)
  params, apply = _haiku(network, nodes, edges)

  def loss_fn(params, nodes, edges, labels):
    return problem.cross_entropy(apply(params, nodes, edges), labels)

  return Problem(loss_fn, params, (nodes, edges, problem.labels(2, ATOMS) % 2))


@E3NN.model("tetris", "Linen")
def tetris() -> Problem:
  models = E3NN.load("examples/tetris_point.py")
  network = models.Model()
  positions = problem.images(ATOMS, 3)
  graph = lambda positions: _graph(positions.reshape(-1, 3), None, len(positions))
  params = jax.jit(network.init)(problem.KEY, graph(positions))

  def loss_fn(params, positions, labels):
    return problem.cross_entropy(network.apply(params, graph(positions)), labels)

  return Problem(loss_fn, params, (positions, problem.labels(8)))


@E3X.model("energies and forces (MD17)", "Linen")
def forces() -> Problem:
  """The notebook trains on one molecule; its zero initial weights are kept."""
  import e3x

  defined: dict[str, Any] = {}
  notebook = E3X.path / "docs/source/examples/md17_ethanol.ipynb"
  for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
    code = "".join(cell["source"])
    if cell["cell_type"] == "code" and ("import e3x" in code or "nn.Module" in code):
      exec(code, defined)
  network = defined["MessagePassingModel"](num_iterations=2, num_basis_functions=8)
  numbers = jnp.arange(1, ATOMS + 1)
  pairs = e3x.ops.sparse_pairwise_indices(ATOMS)
  params = jax.jit(network.init)(problem.KEY, numbers, problem.images(ATOMS, 3)[0], *pairs)

  def loss_fn(params, positions, energies, forces):
    examples = len(positions)
    receivers, senders = _edges(examples)
    energy, force = network.apply(
      params, jnp.tile(numbers, examples), positions.reshape(-1, 3), receivers, senders,
      jnp.repeat(jnp.arange(examples), ATOMS), examples,
    )  # fmt: skip
    difference = problem.squared_error(force, forces.reshape(-1, 3))
    return 0.5 * problem.squared_error(energy, energies) + 0.5 * difference

  positions = problem.images(ATOMS, 3)
  return Problem(loss_fn, params, (positions, problem.images(), jnp.sin(positions)))


@PAINN.model("PaiNN (QM9)", "Haiku")
def painn() -> Problem:
  import painn_jax

  def network(positions, numbers):
    senders, receivers = _edges(len(positions))
    flat = positions.reshape(-1, 3)
    nodes = painn_jax.NodeFeatures(s=numbers.reshape(-1), v=None)
    model = painn_jax.PaiNN(
      hidden_size=32, n_layers=2, max_z=20, node_type="discrete", task="graph", pool="sum",
      radial_basis_fn=painn_jax.gaussian_rbf, cutoff_fn=painn_jax.cosine_cutoff, out_channels=1,
    )  # fmt: skip
    return model(_graph(nodes, flat[senders] - flat[receivers], len(positions)))[0]

  return problem.haiku(network, _molecules(), problem.squared_error, problem.images())


@PAINN.model("PaiNN (n bodies)", "Haiku")
def bodies() -> Problem:
  import painn_jax

  def network(positions, velocities):
    senders, receivers = _edges(len(positions))
    flat, moving = positions.reshape(-1, 3), velocities.reshape(-1, 3)
    speed = jnp.sqrt(jnp.sum(moving**2, 1))
    model = painn_jax.PaiNN(
      hidden_size=32, n_layers=2, node_type="continuous", task="node", pool="sum", radius=1000.0,
      radial_basis_fn=painn_jax.gaussian_rbf, cutoff_fn=painn_jax.cosine_cutoff, out_channels=1,
    )  # fmt: skip
    nodes = painn_jax.NodeFeatures(s=speed, v=moving[..., None])
    graph = _graph(nodes, flat[senders] - flat[receivers], len(positions))
    return positions + model(graph)[1].reshape(positions.shape)

  positions = problem.images(ATOMS, 3)
  inputs = [positions, jnp.cos(positions)]
  return problem.haiku(network, inputs, problem.squared_error, jnp.sin(positions))


@EGNN.model("EGNN (n bodies)", "Haiku")
def egnn() -> Problem:
  from egnn_jax import variants

  def network(positions, velocities, charges):
    senders, receivers = _edges(len(positions))
    flat, moving = positions.reshape(-1, 3), velocities.reshape(-1, 3)
    speed = jnp.sqrt(jnp.sum(moving**2, 1, keepdims=True))
    product = charges.reshape(-1)[senders] * charges.reshape(-1)[receivers]
    distance = jnp.sum((flat[senders] - flat[receivers]) ** 2, 1, keepdims=True)
    attributes = jnp.concatenate([product[:, None], distance], 1)
    model = variants.EGNN_vel(hidden_size=32, output_size=32, num_layers=2, residual=True)
    return model(_graph(speed, None, len(positions)), flat, moving, attributes).reshape(
      positions.shape
    )

  data = problem.images(ATOMS, 3), 0.1 * problem.images(ATOMS, 3), problem.labels(3, ATOMS) - 1.5
  params, apply = _haiku(network, *data)

  def loss_fn(params, targets, *data):
    return problem.squared_error(apply(params, *data), targets)

  return Problem(loss_fn, params, (data[0] + data[1], *data))


@EGNN.model("EGNN, attention", "Haiku")
def attention() -> Problem:
  import egnn_jax

  def network(positions, numbers):
    hot = jax.nn.one_hot(numbers.reshape(-1), 9)
    model = egnn_jax.EGNN(hidden_size=32, output_size=1, num_layers=2, attention=True)
    energies, _ = model(_graph(hot, None, len(positions)), positions.reshape(-1, 3))
    return jnp.sum(energies.reshape(len(positions), ATOMS), 1)

  return problem.haiku(network, _molecules(), problem.squared_error, problem.images())


def _potential(layer: Callable, **options: Any) -> Callable:
  """Energies of molecules by two NequIP layers and a linear readout, as in its tests."""
  import e3nn_jax as e3nn
  import haiku as hk
  from nequip_jax import filter_layers

  def energy(positions, numbers):
    senders, receivers = _edges(len(positions))
    flat, species = positions.reshape(-1, 3), numbers.reshape(-1)
    vectors = e3nn.IrrepsArray("1o", flat[receivers] - flat[senders])
    features = e3nn.IrrepsArray("16x0e", hk.Embed(9, 16)(species))
    for irreps in filter_layers(["16x0e + 8x1o", "16x0e"], max_ell=2):
      one = layer(
        avg_num_neighbors=4.0, num_species=9, output_irreps=irreps, mlp_n_hidden=16, **options
      )
      features = one(vectors, features, species, senders, receivers)
    energies = e3nn.haiku.Linear("0e")(features).array.reshape(len(positions), ATOMS)
    return jnp.sum(energies, 1)

  return energy


@NEQUIP.model("NequIP, energies and forces", "Haiku")
def nequip() -> Problem:
  from nequip_jax import NEQUIPLayerHaiku

  data = _molecules()
  params, apply = _haiku(_potential(NEQUIPLayerHaiku, max_ell=2), *data)

  def loss_fn(params, positions, numbers, energies, forces):
    total = lambda positions: (jnp.sum(e := apply(params, positions, numbers)), e)
    gradient, energy = jax.grad(total, has_aux=True)(positions)
    return problem.squared_error(energy, energies) + problem.squared_error(-gradient, forces)

  return Problem(loss_fn, params, (*data, problem.images(), problem.images(ATOMS, 3)))


@NEQUIP.model("NequIP by eSCN, energies", "Haiku")
def escn() -> Problem:
  from nequip_jax import NEQUIPESCNLayerHaiku

  energy = _potential(NEQUIPESCNLayerHaiku)
  return problem.haiku(energy, _molecules(), problem.squared_error, problem.images())

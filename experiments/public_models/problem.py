"""What a collection file brings: models with their ordinary losses, and where they come from."""

from collections.abc import Callable, Sequence
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
BATCH = 8
KEY = jax.random.key(0)


class Problem(NamedTuple):
  """A loss and what it is called with: the arguments of `fop_optax.capture`."""

  loss_fn: Callable[..., Any]
  params: PyTree
  args: tuple[Any, ...]
  options: dict[str, Any] = {}  # further arguments of `capture`


class Model(NamedTuple):
  """A model of a collection; `build` imports it and makes the problem."""

  collection: "Collection"
  name: str
  framework: str
  build: Callable[[], Problem]


@dataclasses.dataclass(eq=False)
class Collection:
  """A public collection: a package, or a repository at a commit.

  Attributes:
    title: what it is called in the table.
    package: the distribution on PyPI, if it is one.
    repository: `owner/name` on GitHub, if it is not.
    commit: of the repository, that the models were tried at.
    root: folder of the repository that goes on the import path.
    models: those registered by `model`.
    path: of the root, once it is found.
  """

  title: str
  package: str = ""
  repository: str = ""
  commit: str = ""
  root: str = "."
  models: list[Model] = dataclasses.field(default_factory=list)
  path: pathlib.Path = pathlib.Path()

  def model(self, name: str, framework: str) -> Callable[..., Callable[[], Problem]]:
    """Decorates the function that builds a model."""

    def register(build):
      self.models.append(Model(self, name, framework, build))
      return build

    return register

  @property
  def folder(self) -> str:
    return self.repository.rpartition("/")[2]

  def find(self, sources: pathlib.Path) -> str:
    """Puts the collection on the import path and says its version, or nothing if it is missing."""
    if self.package:
      try:
        return importlib.metadata.version(self.package)
      except importlib.metadata.PackageNotFoundError:
        return ""
    folder = sources / self.folder
    if not folder.is_dir():
      return ""
    self.path = folder / self.root
    sys.path.append(str(self.path))
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"

  def load(self, file: str) -> Any:
    """A module by its file below the root: examples call each of theirs `models`."""
    name = "public_models_" + file.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, self.path / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def namespace(package: str) -> None:
  """Makes a package importable without its `__init__`, where that needs more than its models do."""
  if package not in sys.modules:
    module = types.ModuleType(package)
    module.__path__ = [str(pathlib.Path(root, *package.split("."))) for root in sys.path]
    sys.modules[package] = module


def images(*shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(1), (BATCH, *shape))


def labels(classes: int, *shape: int) -> jax.Array:
  return jax.random.randint(jax.random.key(2), (BATCH, *shape), 1, classes)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The mean over examples and, for sequences, over tokens."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  return cross_entropy(logits[:, :-1], tokens[:, 1:])


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  return jnp.mean((outputs - targets) ** 2)


def linen(
  model: Any, inputs: Sequence[Any], objective: Callable, *targets: Any, **call: Any
) -> Problem:
  """A Flax Linen module; its state (batch statistics) leaves the loss as aux."""
  streams = ("dropout", "lstm", "gating")
  rngs = dict.fromkeys(("params", *streams), KEY)
  variables = dict(jax.jit(lambda rngs, *x: model.init(rngs, *x, **call))(rngs, *inputs))
  params = variables.pop("params")

  def loss_fn(params, inputs, targets, key):
    every = {"params": params, **variables}
    rngs = dict.fromkeys(streams, key)
    outputs, state = model.apply(every, *inputs, rngs=rngs, mutable=list(variables), **call)
    return objective(outputs, *targets), state

  return Problem(loss_fn, params, (tuple(inputs), targets, KEY), {"has_aux": True})


def nnx(
  model: Any,
  inputs: Sequence[Any],
  objective: Callable,
  *targets: Any,
  forward: Callable = lambda model, *inputs: model(*inputs),
) -> Problem:
  """A Flax NNX module, called by `forward`; its batch statistics leave the loss as aux."""
  from flax import nnx as flax_nnx

  graph, params, rest = flax_nnx.split(model, flax_nnx.Param, ...)

  def loss_fn(params, inputs, targets):
    model = flax_nnx.merge(graph, params, rest, copy=True)
    loss = objective(forward(model, *inputs), *targets)
    return loss, flax_nnx.to_pure_dict(flax_nnx.state(model, flax_nnx.BatchStat))

  return Problem(loss_fn, params, (tuple(inputs), targets), {"has_aux": True})


def haiku(function: Callable, inputs: Sequence[Any], objective: Callable, *targets: Any) -> Problem:
  """A function that calls Haiku modules; its state leaves the loss as aux."""
  import haiku as hk

  transformed = hk.transform_with_state(function)
  params, state = jax.jit(transformed.init)(KEY, *inputs)

  def loss_fn(params, inputs, targets, key):
    outputs, new_state = transformed.apply(params, state, key, *inputs)
    return objective(outputs, *targets), new_state

  return Problem(loss_fn, params, (tuple(inputs), targets, KEY), {"has_aux": True})


def equinox(
  model: Any,
  inputs: Sequence[Any],
  objective: Callable,
  *targets: Any,
  forward: Callable = lambda model, *inputs, key: model(*inputs),
) -> Problem:
  """An Equinox module of one example, called by `forward` and mapped over the batch."""
  import equinox as eqx

  params, static = eqx.partition(model, eqx.is_inexact_array)

  def loss_fn(params, inputs, targets, key):
    model = eqx.combine(params, static)
    keys = jax.random.split(key, len(inputs[0]))
    outputs = jax.vmap(lambda inputs, key: forward(model, *inputs, key=key))(inputs, keys)
    return objective(outputs, *targets)

  return Problem(loss_fn, params, (tuple(inputs), targets, KEY))


def graphs(init: Callable, apply: Callable, objective: Callable) -> Problem:
  """A network over graphs of 6 nodes and 10 edges each, batched as `jraph.batch` does."""
  import jraph

  keys = jax.random.split(KEY, 4)
  nodes, edges = images(6, 9), jax.random.normal(keys[0], (BATCH, 10, 3))
  ends = jax.random.randint(keys[1], (BATCH, 2, 10), 0, 6)

  def batched(nodes, edges, ends):
    n = len(nodes)
    senders, receivers = (ends + 6 * jnp.arange(n)[:, None, None]).swapaxes(0, 1).reshape(2, -1)
    return jraph.GraphsTuple(
      nodes=nodes.reshape(-1, 9), edges=edges.reshape(-1, 3), senders=senders, receivers=receivers,
      n_node=jnp.full(n, 6), n_edge=jnp.full(n, 10), globals=jnp.ones((n, 1)),
    )  # fmt: skip

  def loss_fn(params, nodes, edges, ends, key):
    return objective(apply(params, batched(nodes, edges, ends), key))

  params = init(batched(nodes, edges, ends))
  return Problem(loss_fn, params, (nodes, edges, ends, keys[2]))

"""Measures one model: what is in layers, gradients against `jax.grad`, a step of each optimizer."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.public_models.problem import Problem
import fop_optax

GROUPS = 2


class Measurement(NamedTuple):
  """What was found; matrices are arrays with at least two axes."""

  parameters: int  # elements of all arrays
  elements: int  # of matrices
  in_layers: int  # of matrices in layers
  layers: int
  refused: dict[str, str]  # path and shape of a matrix in no layer -> reason
  gradient_error: float = math.nan  # NaN where no step is taken
  kfac_finite: bool = False
  fop_finite: bool = False


def measure(problem: Problem, steps: bool = True) -> Measurement:
  """Captures the problem's loss and takes a step with each optimizer, if `steps`."""
  try:
    captured = fop_optax.capture(
      problem.loss_fn, problem.params, *problem.args, groups=GROUPS, **problem.options
    )
  except ValueError as error:
    return _none(problem.params, error)
  layers = captured.layers
  sizes = [math.prod(shape) for shape in layers.shapes]
  matrices = [leaf for leaf, shape in enumerate(layers.shapes) if len(shape) >= 2]
  refused = {
    f"{layers.paths[leaf]} {list(layers.shapes[leaf])}": captured.fallbacks[layers.paths[leaf]]
    for leaf in matrices
    if leaf not in layers.covered
  }
  found = Measurement(
    parameters=sum(sizes),
    elements=sum(sizes[leaf] for leaf in matrices),
    in_layers=sum(sizes[leaf] for leaf in matrices if leaf in layers.covered),
    layers=len(layers),
    refused=refused,
  )
  if not steps:
    return found
  _, grads, stats = jax.jit(captured.value_and_grad)(problem.params, *problem.args)
  expected = _gradient(problem)
  _check_unreached(captured, expected)
  return found._replace(
    gradient_error=_distance(grads, expected),
    kfac_finite=_finite_step(fop_optax.kfac(1e-3, layers), problem.params, grads, stats),
    fop_finite=_finite_step(fop_optax.fop(1e-3, layers), problem.params, grads, stats),
  )


def _none(params: Any, error: ValueError) -> Measurement:
  """What `capture` says of a loss without any layer."""
  if "found no layer" not in str(error):
    raise error
  leaves = jax.tree.leaves(params)
  reasons = [line.strip().split(": ", 1) for line in str(error).splitlines()[1:]]
  refused = [
    (f"{path} {list(leaf.shape)}", why)
    for leaf, (path, why) in zip(leaves, reasons, strict=True)
    if leaf.ndim >= 2
  ]
  return Measurement(
    parameters=sum(leaf.size for leaf in leaves),
    elements=sum(leaf.size for leaf in leaves if leaf.ndim >= 2),
    in_layers=0,
    layers=0,
    refused=dict(refused),
  )


def _check_unreached(captured: Any, gradient: Any) -> None:
  """Checks that a parameter has no gradient where `captured` says so.

  Raises:
    RuntimeError: if one has.
  """
  for path, leaf in zip(captured.layers.paths, jax.tree.leaves(gradient), strict=True):
    if captured.fallbacks.get(path, "").startswith("no gradient") and jnp.any(leaf != 0):
      raise RuntimeError(f"{path} is said to have no gradient, but has one")


def _gradient(problem: Problem) -> Any:
  """The gradient of the mean over groups of the loss, by `jax.grad`."""

  def loss(params):
    losses = [problem.loss_fn(params, *_group(problem.args, i)) for i in range(GROUPS)]
    return sum(loss[0] if problem.options.get("has_aux") else loss for loss in losses) / GROUPS

  return jax.jit(jax.grad(loss))(problem.params)


def _group(args: Sequence[Any], number: int) -> tuple[Any, ...]:
  """The arguments of a group of examples: every second one, and a key of its own."""

  def one(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.fold_in(leaf, number)
    return leaf[number::GROUPS]

  return tuple(jax.tree.map(one, arg) for arg in args)


def _distance(ours: Any, theirs: Any) -> float:
  """The norm of the difference, relative to that of `theirs`, over all parameters."""
  norm = lambda leaves: jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves))
  ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
  return float(norm([a - b for a, b in zip(ours, theirs, strict=True)]) / norm(theirs))


def _finite_step(tx: Any, params: Any, grads: Any, stats: Any) -> bool:
  """Whether the first update is finite everywhere, and nonzero."""

  @jax.jit
  def step(params, grads, stats):
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  leaves = jax.tree.leaves(step(params, grads, stats))
  finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
  return finite and any(bool(jnp.any(leaf != 0)) for leaf in leaves)

"""The backward pass of one chunk: loss and gradient, with or without statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fop_optax.capture.batch import Result
from fop_optax.capture.evaluate import Evaluation, moments_of, probes_for
from fop_optax.capture.resolve import Resolved
from fop_optax.capture.trace import Signature, Traced
from fop_optax.capture.values import Path, Use
from fop_optax.layers import Factors

Backward = Callable[[list[Any]], Result]


def plain(
  signature: Signature, params: Sequence[Any], args: Sequence[Any], zeros: tuple[Factors, ...]
) -> Backward:
  """The gradient of the loss as it is; the factors are zeros."""

  def backward(chunk: list[Any]) -> Result:
    value_and_grad = jax.value_and_grad(signature.call, has_aux=True)
    (loss, aux), grads = value_and_grad(list(params), args, chunk)
    return Result(loss, aux, grads, zeros)

  return backward


def with_statistics(
  traced: Traced,
  uses: dict[Path, Use],
  resolved: Resolved,
  params: Sequence[Any],
  zeros: tuple[Factors, ...],
  scale: float,
  refresh: jax.Array | None,
) -> Backward:
  """The gradient and the normalised Kronecker factors.

  Args:
    traced: the loss.
    uses: its accepted uses.
    resolved: their layers.
    params: leaves of the parameters.
    zeros: of the factors' shapes.
    scale: N R, examples of the chunk times terms an example.
    refresh: a traced bool, or None for always.
  """
  accepted = {path: uses[path] for path in resolved.layer_of}
  evaluation = Evaluation(accepted, moments_of(resolved, accepted), refresh)

  def backward(chunk: list[Any]) -> Result:
    def loss(params, probes):
      arguments = [*params, *chunk]
      probes = probes_for(resolved, probes)
      loss, *aux = evaluation.run(traced.jaxpr, traced.consts, arguments, probes)
      return loss, jax.tree.unflatten(traced.treedef, aux)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (grads, sums) = value_and_grad(list(params), zeros)
    # A = sum x x' / (N T) over the N T rows of the layer; G = N R sum dy dy'
    factors = tuple(
      Factors(A / rows, G * scale) for (A, G), rows in zip(sums, resolved.rows, strict=True)
    )
    return Result(value, aux, grads, factors)

  return backward

"""The backward pass of one chunk: loss and gradient, with or without statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.capture.batch import Result
from fop_optax.capture.evaluate import Evaluation, moments_of
from fop_optax.capture.resolve import Place, Resolved
from fop_optax.capture.trace import Signature, Traced
from fop_optax.capture.values import Key, Use
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
  uses: dict[Key, Use],
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
    zeros: of the layers' factors.
    scale: N R, examples of the chunk times terms an example.
    refresh: a traced bool, or None for always.
  """
  accepted = {key: uses[key] for key in resolved.places}
  evaluation = Evaluation(accepted, moments_of(resolved, accepted), refresh)
  probes = {
    place: zeros[place.layer] if not place.flipped else Factors(*zeros[place.layer][::-1])
    for place in resolved.rows
  }

  def backward(chunk: list[Any]) -> Result:
    def loss(params, probes):
      by_use = {key: probes[place] for key, place in resolved.places.items()}
      loss, *aux = evaluation.run(traced.jaxpr, traced.consts, [*params, *chunk], by_use)
      return loss, jax.tree.unflatten(traced.treedef, aux)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (grads, sums) = value_and_grad(list(params), probes)
    # A = sum x x' / (N T) over the N T rows of the layer; G = N R sum dy dy'
    factors = tuple(
      Factors(A / rows, G * scale)
      for (A, G), rows in ((sums[place], resolved.rows[place]) for place in resolved.rows)
    )
    return Result(value, aux, grads, factors)

  return backward


def by_layer(resolved: Resolved, factors: Sequence[Factors]) -> tuple[Factors, ...]:
  """The factors of each layer, those of a tied weight put together."""
  found = dict(zip(resolved.rows, factors, strict=True))
  out = []
  for index in range(len(resolved.layers)):
    straight, flipped = Place(index, False), Place(index, True)
    if flipped in found:
      out.append(tied(found[straight], Factors(*found[flipped][::-1])))
    else:
      out.append(found[straight])
  return tuple(out)


def tied(first: Factors, second: Factors) -> Factors:
  """The sum of two uses' factors, each pair brought to equal mean trace first.

  The factors of inputs are free of the loss's scale, those of gradients go with its square: a plain
  sum across them would not.
  """
  return jax.tree.map(jnp.add, _balanced(first), _balanced(second))


def _balanced(factors: Factors) -> Factors:
  mean_A, mean_G = (
    jnp.mean(f if f.ndim == 2 else jnp.diagonal(f, axis1=1, axis2=2), axis=1) for f in factors
  )
  ratio = jnp.sqrt(mean_G / mean_A)
  ratio = jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1)
  along = lambda f, r: r.reshape(-1, *[1] * (f.ndim - 1))
  return Factors(factors.A * along(factors.A, ratio), factors.G / along(factors.G, ratio))

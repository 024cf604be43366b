"""The backward pass of one chunk: loss and gradient, with or without statistics."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.capture import fisher
from fop_optax.capture.batch import Result
from fop_optax.capture.evaluate import MARK, Evaluation, moments_of
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.resolve import Place, Resolved
from fop_optax.capture.trace import Signature, Traced
from fop_optax.capture.values import Key, Use
from fop_optax.layers import Factors

Backward = Callable[[list[Any], jax.Array | None], Result]  # chunk, key


def plain(
  signature: Signature, params: Sequence[Any], args: Sequence[Any], zeros: tuple[Factors, ...]
) -> Backward:
  """The gradient of the loss as it is; the factors are zeros."""

  def backward(chunk: list[Any], key: jax.Array | None) -> Result:
    del key
    value_and_grad = jax.value_and_grad(signature.call, has_aux=True)
    (loss, aux), grads = value_and_grad(list(params), args, chunk)
    return Result(loss, aux, grads, zeros)

  return backward


@dataclasses.dataclass(frozen=True, eq=False)
class WithStatistics:
  """The gradient and the normalised Kronecker factors, one pair a `Place`.

  Attributes:
    traced: the loss.
    uses: its accepted uses.
    resolved: their layers.
    params: leaves of the parameters.
    zeros: of the layers' factors.
    rows: where the examples lie in x and y of the uses.
    examples: N, of the chunk.
    terms: R, terms of the loss an example.
    every: statistics are of every that many-th example.
    refresh: a traced bool, or None for always.
    fisher: which labels the statistics are of.
    branch: whether a second backward pass may stand in a branch.
  """

  traced: Traced
  uses: Mapping[Key, Use]
  resolved: Resolved
  params: Sequence[Any]
  zeros: tuple[Factors, ...]
  rows: Mapping[Key, tuple[Piece, Piece]]
  examples: int
  terms: int
  every: int
  refresh: jax.Array | None
  fisher: str
  branch: bool

  def __call__(self, chunk: list[Any], key: jax.Array | None) -> Result:
    zeros = self.zeros
    probes = {
      place: Factors(*zeros[place.layer][::-1]) if place.flipped else zeros[place.layer]
      for place in self.resolved.rows
    }
    if self.fisher == "empirical":
      loss = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)
      (value, (aux, _)), (grads, factors) = loss(list(self.params), probes, {}, chunk)
    else:
      value, aux, grads, factors = self._two_passes(probes, chunk, key)
    return Result(value, aux, grads, tuple(factors[place] for place in probes))

  def _loss(self, params, probes, weights, chunk):
    """`(loss, (aux, operands of the marks))`; `weights` are zeros added to the marks' values."""
    traced, resolved = self.traced, self.resolved
    accepted = {key: self.uses[key] for key in resolved.places}
    marks = frozenset(weights)
    moments = moments_of(resolved, accepted, self.rows, self.examples, self.terms, self.every)
    evaluation = Evaluation(accepted, moments, self.refresh, marks)
    by_key = {key: probes[place] for key, place in resolved.places.items()}
    by_key |= {Key(path, MARK): weight for path, weight in weights.items()}
    outputs, marked = evaluation.run(traced.jaxpr, traced.consts, [*params, *chunk], by_key)
    return outputs[0], (jax.tree.unflatten(traced.treedef, outputs[1:]), marked)

  def _two_passes(self, probes, chunk, key):
    """One forward pass; a backward pass for the gradient, one from drawn labels for statistics."""
    marks = self.traced.found.marks

    def forward(params, probes, weights):
      value, (aux, marked) = self._loss(params, probes, weights, chunk)
      return (value, [marked[mark.path] for mark in marks]), aux

    weights = {mark.path: jnp.zeros(mark.scans) for mark in marks}
    (value, outputs), pullback, aux = jax.vjp(
      forward, list(self.params), probes, weights, has_aux=True
    )
    nothing = [jnp.zeros_like(output) for output in outputs]
    grads, _, weights = pullback((jnp.ones_like(value), nothing))
    weights = [weights[mark.path] for mark in marks]

    def second_pass():
      from_marks = lambda starts: pullback((jnp.zeros_like(value), starts))[1]
      return fisher.statistics(self.fisher, marks, outputs, weights, from_marks, key)

    if self.refresh is None or not self.branch:
      return value, aux, grads, second_pass()
    return value, aux, grads, jax.lax.cond(self.refresh, second_pass, lambda: probes)


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

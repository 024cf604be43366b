"""The backward pass of one chunk: loss and gradient, with or without statistics."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import counted, fisher, second_moments, sharing
from fop_optax.capture.batch import Result
from fop_optax.capture.counted import Weights
from fop_optax.capture.evaluate import MARK, Evaluation, Probe, moments_of
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.resolve import Place, Resolved
from fop_optax.capture.second_moments import Rotation, Statistics
from fop_optax.capture.trace import Signature, Traced
from fop_optax.capture.values import Key, Use
from fop_optax.layers import Factors

Backward = Callable[[list[Any], jax.Array | None], Result]  # chunk, key


def plain(
  signature: Signature,
  params: Sequence[Any],
  args: Sequence[Any],
  zeros: tuple[Statistics, ...],
  loss_scale: Any,
) -> Backward:
  """The gradient of the loss as it is; the statistics are zeros."""

  def backward(chunk: list[Any], key: jax.Array | None) -> Result:
    del key
    loss = lambda params: signature.call(params, args, chunk)
    value, pullback, aux = jax.vjp(loss, list(params), has_aux=True)
    (grads,) = pullback(_start(value, loss_scale))
    return Result(value, aux, [_unscaled(grad, loss_scale) for grad in grads], zeros)

  return backward


@dataclasses.dataclass(frozen=True, eq=False)
class WithStatistics:
  """The gradient and the normalised statistics, one of each a `Place`.

  Attributes:
    traced: the loss.
    uses: its accepted uses.
    resolved: their layers.
    params: leaves of the parameters.
    zeros: of the layers' statistics.
    rotations: bases of the layers whose second moments are formed, by number.
    rows: where the examples lie in x and y of the uses.
    examples: N, of the chunk.
    chunks: number of chunks of the batch.
    terms: R, terms of the loss an example; None unless `fisher` is empirical.
    weights: of these terms, if they have some.
    every: statistics are of every that many-th example.
    reduced: places where the rows of each example are added up first.
    refresh: a traced bool, or None for always.
    fisher: which labels the statistics are of.
    loss_scale: S, from which the backward pass starts, or None for 1.
    branch: whether a second backward pass may stand in a branch.
  """

  traced: Traced
  uses: Mapping[Key, Use]
  resolved: Resolved
  params: Sequence[Any]
  zeros: tuple[Statistics, ...]
  rotations: Mapping[int, Rotation]
  rows: Mapping[Key, tuple[Piece, Piece]]
  examples: int
  chunks: int
  terms: int | None
  weights: Weights | None
  every: int
  reduced: frozenset[Place]
  refresh: jax.Array | None
  fisher: str
  loss_scale: Any
  branch: bool

  def __call__(self, chunk: list[Any], key: jax.Array | None) -> Result:
    zeros, probes = self._zeros()
    empirical = self.fisher == "empirical"
    marks = [] if empirical else self.traced.found.marks

    def forward(params, probes, weights):
      value, (aux, seen) = self._loss(params, probes, weights, chunk)
      own = self.weights
      share = counted.share(seen[own.path], own.axes, value.dtype) if own else None
      return (value, [seen[mark.path] for mark in marks]), (aux, share)

    weights = {mark.path: mark.probe() for mark in marks}
    weights = _compat.vary(weights, _compat.varying((self.params, chunk)))
    (value, outputs), pullback, (aux, share) = jax.vjp(
      forward, list(self.params), probes, weights, has_aux=True
    )
    nothing = list(map(jnp.zeros_like, outputs))
    grads, found, weights = pullback((_start(value, self.loss_scale), nothing))

    def second_pass():
      from_marks = lambda starts: self._formed(pullback((jnp.zeros_like(value), starts))[1])
      of_terms = [weights[mark.path] for mark in marks]
      return fisher.statistics(
        self.fisher, marks, outputs, of_terms, from_marks, self.examples, key
      )

    of_loss = lambda: self._formed(found)
    form, apart = (of_loss, bool(self.reduced)) if empirical else (second_pass, self.branch)
    if self.refresh is None or not apart:
      statistics = form()
    else:
      statistics = jax.lax.cond(self.refresh, form, lambda: zeros)
    return Result(
      value,
      aux,
      [_unscaled(grad, self.loss_scale) for grad in grads],
      tuple(self._unscaled(statistics[place], share) for place in zeros),
    )

  def _unscaled(self, statistics: Statistics, share: jax.Array | None) -> Statistics:
    # G and S are of gradients squared, or of the square roots of weights
    power = 2 if self.fisher == "empirical" else 1
    (A, G), S = statistics

    def unscaled(x):
      x = _unscaled(x, self.loss_scale, power)
      return x if share is None else share.astype(x.dtype) * x

    return Statistics(Factors(A, unscaled(G)), None if S is None else unscaled(S))

  def _zeros(self) -> tuple[dict[Place, Statistics], dict[Place, Statistics]]:
    """Zeros of the statistics of each place, and its probe."""

    def own(place):
      factors, S = self.zeros[place.layer]
      turned = Factors(*factors[::-1]) if place.flipped else factors
      return Statistics(turned, S if place.layer in self.rotations else None)

    def probe(place):
      layer, examples = self.resolved.layers[place.layer], self.examples // self.every
      return Statistics(sharing.probe(layer, place, examples, zeros[place].factors))

    zeros = {place: own(place) for place in self.resolved.rows}
    return zeros, {p: probe(p) if p in self.reduced else zeros[p] for p in zeros}

  def _formed(self, found: Mapping[Place, Statistics]) -> dict[Place, Statistics]:
    """The statistics of what came back from the probes: of sums of rows their second moments."""
    out = dict(found)
    for place in self.reduced:
      layer, rows = self.resolved.layers[place.layer], self.resolved.rows[place].batch
      diagonal = layer.diagonal[::-1] if place.flipped else layer.diagonal
      # A = sum_n a_n a_n' / N of a_n = sums / T, with rows = N T
      scale = (
        self.every * self.examples / rows**2,
        self.every * (self.examples * self.terms if self.terms else 1),
      )
      sums, S = found[place].factors, None
      if place.layer in self.rotations:
        S = second_moments.of_sums(sums, self.rotations[place.layer])
        S *= self.examples // self.every * scale[0] * scale[1]
      out[place] = Statistics(sharing.factors(sums, diagonal, scale), S)
    return out

  def _loss(self, params, probes, weights, chunk):
    """`(loss, (aux, what was seen on the way))`; `weights` are zeros added to the marked terms."""
    traced, resolved = self.traced, self.resolved
    accepted = {key: self.uses[key] for key in resolved.places}
    marks = frozenset(weights)
    moments = moments_of(
      resolved,
      accepted,
      self.rows,
      self.examples,
      self.terms,
      self.chunks,
      self.every,
      self.reduced,
    )
    found, own = traced.found.meetings, self.weights
    evaluation = Evaluation(
      accepted, moments, self.refresh, found, marks, own.path if own else None
    )
    probe = lambda place: Probe(probes[place], self.rotations.get(place.layer))
    by_key = {key: probe(place) for key, place in resolved.places.items()}
    by_key |= {Key(path, MARK): weight for path, weight in weights.items()}
    outputs, seen = evaluation.run(traced.jaxpr, traced.consts, [*params, *chunk], by_key)
    return outputs[0], (jax.tree.unflatten(traced.treedef, outputs[1:]), seen)


def _start(loss: jax.Array, scale: Any) -> jax.Array:
  """The cotangent of the loss that a backward pass starts from."""
  return jnp.ones_like(loss) if scale is None else jnp.asarray(scale, loss.dtype)


def _unscaled(array: jax.Array, scale: Any, power: int = 1) -> jax.Array:
  """`array / scale^power`, divided in float32 or better; what is not finite stays so."""
  if scale is None:
    return array
  wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
  for _ in range(power):  # the power itself may be infinite
    wide = wide / jnp.asarray(scale, wide.dtype)
  return wide.astype(array.dtype)


def by_layer(
  resolved: Resolved, rotations: Sequence[Rotation] | None, statistics: Sequence[Statistics]
) -> tuple[Statistics, ...]:
  """The statistics of each layer, those of a tied weight put together.

  Layers whose second moments are not measured have those of their factors.
  """
  found = dict(zip(resolved.rows, statistics, strict=True))
  out = []
  for index in range(len(resolved.layers)):
    straight, flipped = Place(index, False), Place(index, True)
    factors, S = found[straight]
    if flipped in found:
      factors = tied(factors, Factors(*found[flipped].factors[::-1]))
    if rotations and S is None:
      S = second_moments.of_factors(factors, rotations[index])
    out.append(Statistics(factors, S))
  return tuple(out)


def tied(first: Factors, second: Factors) -> Factors:
  """The sum of two uses' factors, each pair brought to equal mean trace first.

  The factors of inputs are free of the loss's scale, those of gradients go with its square: a plain
  sum across them would not. A use without a gradient adds nothing, as in the limit: both of its
  balanced factors have the mean trace `sqrt(mean A mean G)`.
  """
  return jax.tree.map(jnp.add, _balanced(first), _balanced(second))


def _balanced(factors: Factors) -> Factors:
  mean_A, mean_G = (
    jnp.mean(f if f.ndim == 2 else jnp.diagonal(f, axis1=1, axis2=2), axis=1) for f in factors
  )
  nothing = (mean_A == 0) | (mean_G == 0)  # one of the factors is zero, and so is their product
  root_A, root_G = (jnp.sqrt(jnp.where(nothing, 1, mean)) for mean in (mean_A, mean_G))
  scale_A, scale_G = (jnp.where(nothing, 0, r) for r in (root_G / root_A, root_A / root_G))
  along = lambda f, r: r.reshape(-1, *[1] * (f.ndim - 1))
  return Factors(factors.A * along(factors.A, scale_A), factors.G * along(factors.G, scale_G))

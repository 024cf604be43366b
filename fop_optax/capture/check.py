"""What `capture` assumes of a loss, evaluated on one batch: `Captured.check`."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat
from fop_optax.capture import batch as batches
from fop_optax.capture import flow
from fop_optax.capture.arguments import is_typed_key
from fop_optax.capture.auxiliary import Role
from fop_optax.capture.outcomes import (
  Outcome,
  attempt,
  distance,
  first_line,
  floating,
  listed,
  norm,
  shown,
  take,
  wide,
)
from fop_optax.capture.trace import Signature
from fop_optax.layers import Factors, Layers

PyTree = Any

WORDS = {True: "holds", False: "does not hold", None: "not tried"}


class Finding(NamedTuple):
  """An assumption of `capture`: whether it holds, and a sentence with the numbers."""

  name: str
  holds: bool | None  # None where it could not be tried
  text: str

  def __str__(self) -> str:
    return f"{WORDS[self.holds]}: {self.text}"


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
  """The loss and the batch that are looked at.

  Attributes:
    signature: the loss.
    params: leaves of the parameters.
    chunks: the batch as it is cut into pieces.
    layers: the captured layers.
    aux_roles: how aux of the pieces is put together.
    captured: what `Captured.value_and_grad` gives of the batch.
    factors: the statistics that it gives.
  """

  signature: Signature
  params: list[Any]
  chunks: batches.Chunks
  layers: Layers
  aux_roles: tuple[Role, ...]
  captured: Outcome
  factors: tuple[Factors, ...]

  def findings(self) -> tuple[Finding, ...]:
    """One for each assumption; batches are compared only where that means something."""
    finite, repeatable = self._finite(), self._repeatable()
    defect = ""
    if not finite.holds:
      defect = "the loss or its gradient is not finite"
    elif not repeatable.holds:
      defect = "the loss is not the same twice"
    noise = "another batch draws other random numbers from the key" if self._random() else ""
    looks = (
      ("mean", "the loss is a mean over the examples", self._mean, defect or noise),
      ("order", "the order of the examples matters", self._order, defect or noise),
      ("pieces", "pieces have the loss of the whole batch", self._pieces, defect or noise),
      ("gradient", "the captured gradient is that of `jax.grad`", self._gradient, defect),
      ("aux", "aux of the pieces is that of the whole batch", self._aux, defect or noise),
    )
    compared = [
      Finding(name, None, f"It cannot be told whether {what}: {why}.") if why else look()
      for name, what, look, why in looks
      if name != "aux" or self.signature.has_aux
    ]
    return (finite, repeatable, *compared, self._reached(), self._statistics())

  # Evaluations: one compiled program for all batches of one size. Compared is on the host.

  def _loss(self, params: Sequence[Any], batch: Sequence[Any]) -> Any:
    return self.signature.call(params, self.chunks.leaves, batch)

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(self._loss, has_aux=True))

  def _outcome(self, batch: Sequence[Any]) -> Outcome:
    """Of a batch, given as its traced leaves."""
    (loss, aux), grads = self._compiled(self.params, list(batch))
    return Outcome(loss, grads, aux)

  @functools.cached_property
  def _batch(self) -> list[Any]:
    return self.signature.args.dynamic(self.chunks.leaves)

  @functools.cached_property
  def _roles(self) -> list[str]:
    return [role for role in self.signature.args.roles if role != "static"]

  @functools.cached_property
  def _size(self) -> int:
    return self.signature.args.size(self.chunks.leaves)

  def _taken(self, index: np.ndarray) -> list[Any]:
    """The batch of the examples `index`."""
    pairs = zip(self._batch, self._roles, strict=True)
    return [take(leaf, index) if role == "batch" else leaf for leaf, role in pairs]

  @functools.cached_property
  def _whole(self) -> Outcome:
    return self._outcome(self._batch)

  @functools.cached_property
  def _permuted(self) -> Outcome:
    return self._outcome(self._taken(np.random.default_rng(0).permutation(self._size)))

  @functools.cached_property
  def _doubled(self) -> Outcome | Exception:
    return attempt(lambda: self._outcome(self._taken(np.tile(np.arange(self._size), 2))))

  @functools.cached_property
  def _is_sum(self) -> bool:
    """Whether the batch taken twice has twice the loss."""
    double = self._doubled
    if isinstance(double, Exception):
      return False
    half = Outcome(wide(double.loss) / 2, [wide(grad) / 2 for grad in double.grads])
    return self._equal(half, self._whole)

  @functools.cached_property
  def _cut(self) -> batches.Chunks | None:
    """The batch in its pieces, or, where it is captured whole, in as few equal ones as can be."""
    if self.chunks.count > 1:
      return self.chunks
    for count in range(2, self._size + 1):
      cut = dataclasses.replace(self.chunks, groups=count, every=1)
      if not isinstance(attempt(lambda cut=cut: cut.size), Exception):
        return cut
    return None

  def _mean_of(self, chunks: batches.Chunks) -> Outcome:
    """The mean of the losses of the pieces, and its gradient."""
    each = [
      self._outcome(chunks.chunk(group, micro))
      for micro in range(chunks.micro_batches)
      for group in range(chunks.groups)
    ]
    mean = lambda *arrays: sum(map(wide, arrays)) / len(arrays)
    return Outcome(mean(*(one.loss for one in each)), list(map(mean, *(one.grads for one in each))))

  @functools.cached_property
  def _dtype(self) -> Any:
    """The coarsest floating type that the loss or its gradient is computed in."""
    jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(self._loss)(self.params, self._batch))
    live, _ = flow.relevant(jaxpr, [True] + [False] * (len(jaxpr.outvars) - 1))
    dtypes = floating(jaxpr.invars[: len(self.params)], [jaxpr.eqns[index] for index in live])
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)

  @functools.cached_property
  def _tolerance(self) -> float:
    return math.sqrt(jnp.finfo(self._dtype).eps)

  def _equal(self, ours: Outcome, theirs: Outcome) -> bool:
    apart = max(distance([ours.loss], [theirs.loss]), distance(ours.grads, theirs.grads))
    return apart < self._tolerance

  def _compare(
    self, name: str, outcomes: tuple[Outcome, Outcome], good: str, bad: str, advice: str
  ) -> Finding:
    """Says that two outcomes are the same (`good`), or not and what then (`bad`, `advice`)."""
    ours, theirs = outcomes
    holds = self._equal(ours, theirs)
    apart = distance(ours.grads, theirs.grads)
    numbers = f"({float(ours.loss):.6g} and {float(theirs.loss):.6g}, gradients {apart:.1g} apart)"
    if holds:
      return Finding(name, True, f"{good} {numbers}.")
    rounding = f"Computed in {self._dtype}, {self._tolerance:.1g} apart would count as the same."
    return Finding(name, False, f"{bad} {numbers}. {advice} {rounding}")

  # The findings.

  def _finite(self) -> Finding:
    loss = float(self._whole.loss)
    wrong = self._named([np.isfinite(wide(grad)).all() for grad in self._whole.grads])
    if math.isfinite(loss) and not wrong:
      return Finding("finite", True, f"The loss, {loss:.6g}, and its gradient are finite.")
    text = f"The loss is {loss:.6g}"
    text += f", and the gradient of {wrong} is not finite" if wrong else ""
    why = self._not_finite() or "parameters and arguments are, so that it comes of the loss itself"
    return Finding("finite", False, f"{text}: {why}.")

  def _not_finite(self) -> str:
    """Which parameters and arguments have entries that are not finite."""
    paths = [f"params{path}" for path in self.layers.paths] + list(self.signature.args.paths)
    found = []
    for path, leaf in zip(paths, [*self.params, *self.chunks.leaves], strict=True):
      if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
        count = np.sum(~np.isfinite(wide(leaf)))
        found += [f"{count} of {leaf.size} entries of {path} are not"] if count else []
    return listed(found)

  def _repeatable(self) -> Finding:
    """Traces the loss anew, so that NumPy's random numbers differ as well."""
    again, _ = jax.jit(lambda params, batch: self._loss(params, batch))(self.params, self._batch)
    loss = self._whole.loss
    numbers = f"({float(loss):.6g} and {float(again):.6g})"
    if not distance([loss], [again]) >= self._tolerance:  # NaN is the same twice
      rounding = "" if float(loss) == float(again) else f", to the rounding of {self._dtype}"
      text = f"Evaluated again the loss is the same{rounding} {numbers}."
      return Finding("repeatable", True, text)
    text = (
      f"Evaluated again the loss is another {numbers}: it draws random numbers that no argument"
      " determines (NumPy's, or a callback's). Pass it a key of `jax.random` as an argument."
    )
    return Finding("repeatable", False, text)

  def _random(self) -> bool:
    """Whether the loss depends on a key among its arguments."""
    if "key" not in self._roles:
      return False
    pairs = zip(self._batch, self._roles, strict=True)
    other = [batches.fold_in(leaf, 1) if role == "key" else leaf for leaf, role in pairs]
    return float(self._outcome(other).loss) != float(self._whole.loss)

  def _mean(self) -> Finding:
    double = self._doubled
    if isinstance(double, Exception):
      text = f"The loss cannot be evaluated on the batch taken twice, {2 * self._size} examples"
      return Finding("mean", None, f"{text}: {first_line(double)}.")
    good = "The batch taken twice has the same loss: it is a mean over the examples"
    bad = "The batch taken twice has another loss: it is no mean over the examples"
    advice = (
      "A part of it is a sum, or divided by a number written into it, or examples interact (pairs,"
      " contrasts, a recurrence along the batch)."
    )
    if self._is_sum:
      bad = "The batch taken twice has twice the loss"
      advice = (
        "It is a sum over the examples, or divided by a number written into it: take `jnp.mean`"
        " over the examples."
      )
    return self._compare("mean", (self._whole, double), good, bad, advice)

  def _order(self) -> Finding:
    return self._compare(
      "order",
      (self._whole, self._permuted),
      "The examples in another order have the same loss",
      "The examples in another order have another loss",
      "The leading axis is not that of examples (time first?), or the loss has an array in the"
      " order of the batch (closed over, or an argument that is not in `batch_argnums`).",
    )

  def _pieces(self) -> Finding:
    cut = self._cut
    if cut is None:
      return Finding("pieces", None, f"The batch of {self._size} cannot be cut into equal pieces.")
    pieces = attempt(lambda: self._mean_of(cut))
    if isinstance(pieces, Exception):
      text = f"The loss cannot be evaluated on pieces of {cut.size} examples"
      return Finding("pieces", None, f"{text}: {first_line(pieces)}.")
    advice = (
      "That is as it should be with BatchNorm, which normalises within a piece, and with masks of"
      " unequal counts. Else examples interact across the batch (pairs, contrasts)."
    )
    if self._is_sum:
      advice = "That is because the loss is a sum."
    elif not self._equal(self._whole, self._permuted):
      advice = "That is because the order of the examples matters."
    if self.chunks.count == 1:
      advice += " Captured in one piece, as here, loss and gradient are those of the whole batch."
    mean = f"The mean of the losses of {cut.count} pieces"
    good, bad = (f"{mean} is {no}the loss of the whole batch" for no in ("", "not "))
    return self._compare("pieces", (self._whole, pieces), good, bad, advice)

  def _gradient(self) -> Finding:
    single = self.chunks.count == 1
    what = "the loss" if single else f"the mean of the losses of {self.chunks.count} pieces"
    return self._compare(
      "gradient",
      (self.captured, self._whole if single else self._mean_of(self.chunks)),
      f"Captured loss and gradient are those of `jax.grad` of {what}",
      f"Captured loss and gradient are not those of `jax.grad` of {what}",
      "If no other finding explains it, that is an error of fop_optax: please report it.",
    )

  def _aux(self) -> Finding:
    """Of all leaves but those that each piece has alike, or new as keys."""
    ours = jax.tree_util.tree_flatten_with_path(self.captured.aux)[0]
    theirs = jax.tree.leaves(self._whole.aux)
    roles = self.aux_roles or (("mean",),) * len(theirs)
    wrong = [
      f"aux{jax.tree_util.keystr(path)} ({shown(one)} of the pieces, {shown(other)} of the whole)"
      for (path, one), other, role in zip(ours, theirs, roles, strict=True)
      if role[0] != "same" and not self._same(one, other)
    ]
    if not wrong:
      return Finding("aux", True, "Aux put together from the pieces is that of the whole batch.")
    return Finding(
      "aux",
      False,
      f"Aux put together from the pieces is not that of the whole batch: {listed(wrong)}. Floats"
      " are averaged over the pieces: return means, not sums, or one value an example. With"
      " BatchNorm it is as it should be.",
    )

  def _same(self, one: Any, other: Any) -> bool:
    if not jnp.issubdtype(one.dtype, jnp.inexact):
      return is_typed_key(one) or np.array_equal(one, other)
    one, other = wide(one), wide(other)
    scale = max(norm([other]), self._tolerance)
    return np.allclose(one, other, self._tolerance, scale * self._tolerance, True)

  def _reached(self) -> Finding:
    missed = self._named([np.any(wide(grad)) for grad in self.captured.grads])
    if not missed:
      return Finding("reached", True, "Every parameter has a gradient.")
    text = f"The gradient of {missed} is zero: unused, frozen, or behind a layer that is zero now."
    return Finding("reached", False, text)

  def _statistics(self) -> Finding:
    wrong = []
    for layer, factors in zip(self.layers, self.factors, strict=True):
      for name, factor in factors._asdict().items():
        finite = np.isfinite(wide(factor)).all()
        if not finite or not np.any(wide(factor)):
          wrong.append(f"{name} of {layer.path} is {'zero' if finite else 'not finite'}")
    if wrong:
      return Finding("statistics", False, f"Of the statistics {listed(wrong)}.")
    text = f"The statistics of all layers ({len(self.layers)}) are finite, and none is zero."
    return Finding("statistics", True, text)

  def _named(self, good: Sequence[Any]) -> str:
    """The paths of the parameters that are not good."""
    return listed([path for path, one in zip(self.layers.paths, good, strict=True) if not one])

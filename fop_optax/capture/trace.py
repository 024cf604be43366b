"""Traces a loss on one chunk of the batch and finds its layers."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import batch as batches
from fop_optax.capture.values import Key, Use
from fop_optax.capture.walk import Found, walk

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Traced:
  """The jaxpr of a loss on one chunk, with what the walk found in it."""

  jaxpr: Any
  consts: tuple[Any, ...]
  treedef: Any  # of aux
  found: Found


@dataclasses.dataclass(frozen=True)
class Signature:
  """A loss and the structure of its inputs.

  Attributes:
    loss_fn: `loss_fn(params, *args)`.
    has_aux: whether it returns `(loss, aux)`.
    params: tree structure of the parameters.
    args: roles of the arguments.
  """

  loss_fn: Callable[..., Any]
  has_aux: bool
  params: Any
  args: batches.Arguments

  def call(self, params: Sequence[Any], args: Sequence[Any], chunk: Sequence[Any]) -> Any:
    """`(loss, aux)` of one chunk, from leaves; `args` gives those that are not traced.

    Raises:
      ValueError: if the loss is no floating scalar, or there is no aux where it should be.
    """
    tree = jax.tree.unflatten(self.params, params)
    out = self.loss_fn(tree, *self.args.rebuild(chunk, args))
    if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
      raise ValueError(
        "With has_aux=True the loss must return a pair `(loss, aux)`, but it returned"
        f" {type(out).__name__}."
      )
    loss, aux = out if self.has_aux else (out, ())
    if isinstance(loss, (tuple, list, dict)):
      raise ValueError(
        f"The loss must return a scalar, but it returned a {type(loss).__name__}. Pass has_aux=True"
        " if it returns `(loss, aux)`."
      )
    loss = jnp.asarray(loss)
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise ValueError(
        f"The loss must return a floating scalar, but it returned {loss.dtype}{list(loss.shape)}."
        " Take the mean over the batch."
      )
    return loss, aux

  def trace(self, params: Sequence[Any], args: Sequence[Any], chunk: Sequence[Any]) -> Traced:
    """Traces the loss on one chunk (arrays or shapes) and walks its jaxpr."""
    treedef = None

    def flat(params, chunk):
      nonlocal treedef
      loss, aux = self.call(params, args, chunk)
      leaves, treedef = jax.tree.flatten(aux)
      return [loss, *leaves]

    jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(flat)(list(params), list(chunk)))
    shapes = [tuple(leaf.shape) for leaf in params]
    return Traced(jaxpr, consts, treedef, walk(jaxpr, shapes, self.args.batch))


def trace_twice(
  signature: Signature, params: Sequence[Any], args: Sequence[Any], size: int
) -> tuple[Traced, Traced | None]:
  """Traces on shapes of `size` and of twice as many examples; None where that cannot be traced."""
  shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in params]
  traced = signature.trace(shapes, args, signature.args.resized(args, size))
  try:
    twice = signature.trace(shapes, args, signature.args.resized(args, 2 * size))
  except Exception:
    twice = None
  return traced, twice


def growing(traced: Traced, twice: Traced | None, size: int) -> dict[Key, Use]:
  """The uses whose rows come from the examples: twice as many of them give twice the rows.

  An operand that does not depend on the batch counts if its own rows grow (the zeros at which a
  recurrence starts), not if a scan over examples repeats it. Where the loss can be traced for one
  size only, a multiple of it and a dependence on the batch have to do.
  """
  uses = traced.found.uses
  if twice is None:
    return {key: use for key, use in uses.items() if use.batch and use.rows % size == 0}
  bigger = twice.found.uses

  def grows(key, use):
    rows = "rows" if use.batch else "own_rows"
    return key in bigger and getattr(bigger[key], rows) == 2 * getattr(use, rows)

  return {key: use for key, use in uses.items() if grows(key, use)}


def terms_of(found: Found, size: int, given: int | None, read: int) -> int:
  """R, the number of terms that the mean loss has for an example; `read` off its final mean.

  Raises:
    ValueError: if the marked losses do not say it.
  """
  marked = [mark.terms * math.prod(mark.scans) for mark in found.marks]
  if given is not None or not marked:
    return given or read
  if any(terms % size for terms in marked):
    raise ValueError(
      f"A loss marked by fop_optax averages over {marked} terms for {size} examples, which is no"
      " whole number an example. `squared_error` takes [batch, outputs], with one number an example"
      " [batch, 1]; else pass `terms_per_example` to `capture`."
    )
  each = {terms // size for terms in marked}
  if len(marked) > 1 and each != {1}:
    raise ValueError(
      f"{len(marked)} marked losses stand in the loss, over {sorted(each)} terms an example:"
      " whether they add up or are averaged cannot be seen. Pass `terms_per_example` to `capture`."
    )
  return each.pop()

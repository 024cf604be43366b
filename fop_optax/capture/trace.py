"""Traces a loss on one chunk of the batch and finds its layers."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import branches, flow
from fop_optax.capture.arguments import Arguments, is_raw_key, type_of
from fop_optax.capture.growth import Growth, compare
from fop_optax.capture.values import Key, Use
from fop_optax.capture.walk import Found, walk

PyTree = Any


class Program(NamedTuple):
  """The jaxpr of a loss on one chunk."""

  jaxpr: Any
  consts: tuple[Any, ...]
  treedef: Any  # of aux


class Traced(NamedTuple):
  """The jaxpr of a loss on one chunk, with what the walk found in it."""

  jaxpr: Any
  consts: tuple[Any, ...]
  treedef: Any  # of aux
  found: Found
  growth: Growth | None  # what grows with the batch; None: that is not known


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
  args: Arguments

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
        f" {'one array' if isinstance(out, jax.Array) else f'a {type(out).__name__}'}."
      )
    loss, aux = out if self.has_aux else (out, ())
    if isinstance(loss, (tuple, list, dict)):
      raise ValueError(
        f"The loss must return a scalar, but it returned a {type(loss).__name__}. Pass has_aux=True"
        " if it returns `(loss, aux)`."
      )
    loss = jnp.asarray(loss)
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
      remedy = "Take the mean over the batch" if loss.shape else "Convert it, or take its real part"
      raise ValueError(
        f"The loss must return a floating scalar, but it returned {loss.dtype}{list(loss.shape)}."
        f" {remedy}."
      )
    return loss, aux

  def program(self, params: Sequence[Any], args: Sequence[Any], chunk: Sequence[Any]) -> "Program":
    """Traces the loss on one chunk (arrays or shapes)."""
    treedef = None

    def flat(params, chunk):
      nonlocal treedef
      loss, aux = self.call(params, args, chunk)
      leaves, treedef = jax.tree.flatten(aux)
      return [loss, *leaves]

    jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(flat)(list(params), list(chunk)))
    return Program(branches.settled(jaxpr), consts, treedef)

  def trace(
    self,
    params: Sequence[Any],
    args: Sequence[Any],
    chunk: Sequence[Any],
    known: Growth | None = None,
  ) -> "Traced":
    """Traces the loss on one chunk (arrays or shapes) and walks its jaxpr.

    What grows with the batch is not known of one trace alone, but of a trace of the same program.
    """
    program = self.program(params, args, chunk)
    fits = known is not None and known.fits(program.jaxpr)
    return self.walked(program, params, known if fits else None)

  def walked(self, program: "Program", params: Sequence[Any], growth: Growth | None) -> "Traced":
    shapes = [tuple(leaf.shape) for leaf in params]
    found = walk(program.jaxpr, program.consts, shapes, self.args.batch, growth)
    return Traced(*program, found, growth)


def trace_twice(
  signature: Signature,
  params: Sequence[Any],
  args: Sequence[Any],
  size: int,
  chunk: Sequence[Any] | None = None,
) -> tuple[Traced, Traced | None]:
  """Traces on types of `size` and of twice as many examples; None where that cannot be traced.

  The first is traced on `chunk` and on the parameters themselves, if it is given.
  """
  types = list(map(type_of, params))
  if chunk is None:
    program = signature.program(types, args, signature.args.resized(args, size))
  else:
    program = signature.program(params, args, chunk)
  try:
    twice = signature.program(types, args, signature.args.resized(args, 2 * size))
  except Exception:  # of any kind: the user's loss takes one size only
    return signature.walked(program, params, None), None
  growth = compare(program.jaxpr, twice.jaxpr)
  return signature.walked(program, params, growth), signature.walked(twice, params, growth)


def raw_numbers(signature: Signature, params: Sequence[Any], args: Sequence[Any]) -> frozenset[int]:
  """Indices of the leaves `uint32[2]` that look like raw keys but are numbers to the loss."""
  inputs = [index for index, role in enumerate(signature.args.roles) if role != "static"]
  raw = [i for i in inputs if signature.args.roles[i] == "key" and is_raw_key(args[i])]
  if not raw:
    return frozenset()
  types = [[type_of(leaf) for leaf in params], [type_of(args[i]) for i in inputs]]
  whole = jax.make_jaxpr(lambda params, chunk: signature.call(params, args, chunk))
  jaxpr, _ = _compat.open_jaxpr(whole(*types))
  wrap = _compat.unexported()["random_wrap"]

  def is_number(index):
    flags = [False] * len(params) + [i == index for i in inputs]
    return any(flow.depends(jaxpr, flags)) and not flow.reaches(jaxpr, flags, wrap)

  return frozenset(filter(is_number, raw))


def growing(traced: Traced, twice: Traced | None, size: int) -> dict[Key, Use]:
  """The uses that hold up with twice as many examples.

  Rows of examples are twice as many then (an operand counts as theirs if it has as many rows, such
  as the zeros at which a recurrence starts), and so are those of a constant that is repeated for
  each of them; fixed rows are as many as before. Where the loss can be traced for one size only, a
  multiple of it has to do.
  """
  uses = traced.found.uses
  if twice is None:
    return {key: use for key, use in uses.items() if use.fixed or use.rows % size == 0}
  bigger = twice.found.uses

  def holds(key, use):
    other = bigger.get(key)
    return other is not None and other.rows == (1 if use.fixed else 2) * use.rows

  return {key: use for key, use in uses.items() if holds(key, use)}


def terms_of(found: Found, size: int, given: int | None, read: int) -> int:
  """R, the number of terms that the mean loss has for an example; `read` off its final mean.

  Raises:
    ValueError: if the marked losses do not say it.
  """
  marked = [mark.count for mark in found.marks]
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

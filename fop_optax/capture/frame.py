"""The state of the walk of one jaxpr, and what it leaves behind."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

from jax.extend import core
from jax.extend.core import primitives

from fop_optax import _compat
from fop_optax.capture import flow, steps
from fop_optax.capture.growth import Growth
from fop_optax.capture.marks import Mark
from fop_optax.capture.values import BiasUse, Key, Path, Pending, Use, Value


@dataclasses.dataclass
class Found:
  """What a walk leaves behind.

  Attributes:
    shapes: of the parameters.
    uses: products in which a parameter is the weight, by key.
    biases: additions of a parameter to the output of such a product.
    refused: for each parameter with a use that is not understood, the first reason.
    apart: for each parameter that is used in other ways where there is no batch, the first of them.
    marks: the marked losses.
    hidden: the equations that are taken whole, as `cond`, with one inside, and their lines.
    meetings: where a product with a constant meets the batch: the equation, the operand, and along
      which axis of the output it is repeated. None: nowhere, one row of it is as good as another.
    as_weight: for sums of a parameter and what depends on the batch, which are tables if they are
      rows, the products of which they are the weight;
    as_rows: and the other equations that they enter.
  """

  shapes: Sequence[tuple[int, ...]]
  uses: dict[Key, Use] = dataclasses.field(default_factory=dict)
  biases: list[BiasUse] = dataclasses.field(default_factory=list)
  refused: dict[int, str] = dataclasses.field(default_factory=dict)
  apart: dict[int, str] = dataclasses.field(default_factory=dict)
  marks: list[Mark] = dataclasses.field(default_factory=list)
  hidden: list[str] = dataclasses.field(default_factory=list)
  meetings: dict[Path, dict[int, int | None]] = dataclasses.field(default_factory=dict)
  as_weight: dict[Key, set[Path]] = dataclasses.field(default_factory=dict)
  as_rows: dict[Key, set[Path]] = dataclasses.field(default_factory=dict)


PARTS = {primitives.real_p: (0,), primitives.imag_p: (1,)}


@dataclasses.dataclass
class Frame:
  """The walk of one jaxpr: at `path`, within scans of lengths `scans`, the innermost at `loop`.

  `each` says whether one of these scans goes over examples, `needed` which outputs a gradient comes
  back to, `affine` which of them the loss is a sum of, `called` where the jaxpr is called (within
  functions of libraries JAX knows no other line).
  """

  jaxpr: Any
  needed: Sequence[bool]
  affine: Sequence[bool | None]
  path: Path
  scans: tuple[int, ...]
  loop: Path
  each: bool
  found: Found
  growth: Growth | None
  called: Callable[[], str] = str

  def __post_init__(self):
    self.live, self.wanted = flow.relevant(self.jaxpr, self.needed)
    self.grows = self.growth.of(self.jaxpr, self.path) if self.growth else {}
    self.terms: set[Any] = set()  # variables that the loss is a sum of, known from its inputs on
    self.pending: set[Pending] = set()  # all that there were
    self.at(0, False)
    self.readers = readers = dict[Any, list[Any]]()
    for index in self.live:
      equation = self.jaxpr.eqns[index]
      for atom in equation.invars:
        if not isinstance(atom, core.Literal):
          readers.setdefault(atom, []).append(equation)
    for atom, need in zip(self.jaxpr.outvars, self.needed, strict=True):
      if need and not isinstance(atom, core.Literal):
        readers.setdefault(atom, []).append(None)
    # the cotangent of a variable is that of the one place that reads it, or of disjoint slices
    self.shared = {v for v, by in readers.items() if len(by) > 1 and not steps.disjoint(by)}

  def at(self, index: int, free: bool) -> None:
    """Goes on to the equation of that number; `free` if it has nothing to do with the batch."""
    self.here: Path = (*self.path, index)
    self.is_live = index in self.live
    self.free = free
    self.new_pending: set[Pending] = set()
    self.new_products: set[Key] = set()

  def inside(self, jaxpr: Any, needed: Sequence[bool], affine: Sequence[bool | None]) -> "Frame":
    """The frame of a jaxpr in the equation at hand, as if it were written out."""
    called = functools.partial(self.line, self.jaxpr.eqns[self.here[-1]])
    return dataclasses.replace(
      self, jaxpr=jaxpr, needed=needed, affine=affine, path=self.here, called=called
    )

  def gradient_to(self, equation: Any) -> list[bool]:
    """Which outputs of an equation a gradient comes back to."""
    return [variable in self.wanted for variable in equation.outvars]

  def affine_at(self, equation: Any) -> list[bool | None]:
    """Which outputs of an equation the loss is a sum of; None for those no gradient comes to."""
    return [v in self.terms if v in self.wanted else None for v in equation.outvars]

  def refuse(self, equation: Any, operands: Sequence[Value], why: str) -> None:
    """Notes for the parameters among the operands that they are in no layer, unless apart."""
    for view in (view for operand in operands for view in operand.views):
      if view.leaf not in self.found.refused:
        reason = why + self.source(equation)
        if self.free:
          self.new_pending.add(Pending(self.here, view.leaf, reason))
        else:
          self.found.refused[view.leaf] = reason

  def refuse_pending(self, pending: Iterable[Pending]) -> None:
    """Notes that parameters are in no layer, as what is made of them has met the batch."""
    for _, leaf, why in sorted(pending):
      self.found.refused.setdefault(leaf, why)

  def parts_read(self, variable: Any) -> tuple[int, ...]:
    """Which parts of a complex variable a gradient comes back to: 0, the real one, 1 or both."""
    parts = set[int]()
    for reader in self.readers.get(variable, ()):
      moves = reader is not None and reader.primitive in steps.steps()
      if moves and len(reader.outvars) == 1:
        parts.update(self.parts_read(reader.outvars[0]))
      else:
        parts.update(PARTS.get(reader and reader.primitive, (0, 1)))
    return tuple(sorted(parts))

  def source(self, equation: Any) -> str:
    line = self.line(equation)
    return f" at {line}" if line else ""

  def line(self, equation: Any) -> str:
    """The source line of an equation, or the nearest that calls it; empty if none is known."""
    return _compat.source_of(self.jaxpr, equation) or self.called()


def is_apart(operands: Sequence[Value]) -> bool:
  """Whether some are made of parameters, without the batch, in other ways than as a view."""
  return any(operand.products or operand.pending for operand in operands)

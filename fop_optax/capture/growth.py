"""Which axes of a variable grow with the batch: the loss is traced for N and for 2N examples.

What does not depend on the batch by its values may do so by its shape (the zeros at which a
recurrence starts); and where a constant meets the batch, the axis that grows is the one along which
it is repeated.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from jax.extend.core import primitives

from fop_optax import _compat
from fop_optax.capture import flow
from fop_optax.capture.values import Path

Axes = frozenset[int]
Place = tuple[int, int]  # an equation, or -1 for the inputs, and the number of a variable there
NESTED = (*flow.INLINED, primitives.scan_p)


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
  """The axes that grow, by place and not by variable: good for every trace of one program.

  Attributes:
    places: path of a jaxpr -> place in it -> axes; what is missing does not grow.
    program: the equations of the program, nested ones included.
  """

  places: Mapping[Path, Mapping[Place, Axes]]
  program: tuple[Any, ...]

  def fits(self, jaxpr: Any) -> bool:
    """Whether `jaxpr` is a trace of the same program."""
    return self.program == _program(jaxpr)

  def of(self, jaxpr: Any, path: Path) -> Mapping[Any, Axes]:
    """The axes of each variable of `jaxpr`, which stands at `path`."""
    places = self.places.get(path, {})
    return {v: places[place] for place, v in _variables(jaxpr) if place in places}


def compare(jaxpr: Any, twice: Any) -> Growth | None:
  """The axes that grow from `jaxpr` to `twice`; None if these are two programs."""
  program = _program(jaxpr)
  if program != _program(twice):
    return None
  places: dict[Path, dict[Place, Axes]] = {}
  for (path, one), (_, other) in zip(_nested(jaxpr, ()), _nested(twice, ()), strict=True):
    for (place, v), (_, w) in zip(_variables(one), _variables(other), strict=True):
      sizes = enumerate(zip(v.aval.shape, w.aval.shape, strict=True))
      if axes := frozenset(axis for axis, (size, larger) in sizes if larger > size):
        places.setdefault(path, {})[place] = axes
  return Growth(places, program)


def _nested(jaxpr: Any, path: Path) -> Iterator[tuple[Path, Any]]:
  """A jaxpr and those that are walked inside it, with their paths."""
  yield path, jaxpr
  for index, equation in enumerate(jaxpr.eqns):
    if equation.primitive in NESTED:
      inner, _ = _compat.open_jaxpr(flow.inner_jaxpr(equation))
      yield from _nested(inner, (*path, index))


def _variables(jaxpr: Any) -> Iterator[tuple[Place, Any]]:
  yield from (((-1, number), v) for number, v in enumerate(jaxpr.invars))
  for index, equation in enumerate(jaxpr.eqns):
    yield from (((index, number), v) for number, v in enumerate(equation.outvars))


def _program(jaxpr: Any) -> tuple[Any, ...]:
  """The primitives of a program, and the ranks of their outputs."""
  return tuple(
    (
      equation.primitive.name,
      tuple(len(v.aval.shape) for v in equation.outvars),
      _program(_compat.open_jaxpr(flow.inner_jaxpr(equation))[0])
      if equation.primitive in NESTED
      else (),
    )
    for equation in jaxpr.eqns
  )

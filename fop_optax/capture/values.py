"""What the walk knows of a variable of the loss, and the records it leaves behind."""

import dataclasses
from typing import Any, NamedTuple, Protocol

from fop_optax.views import View

Path = tuple[int, ...]  # indices of equations, from the loss's jaxpr inwards


class Key(NamedTuple):
  """Names a use: the equation, and which part of a weight that is joined from several."""

  path: Path
  part: int = 0


@dataclasses.dataclass(frozen=True)
class ParamView:
  """A variable that holds entries of one parameter and nothing else.

  `shape` is the variable's, with 1 on the axes along which the entries are repeated by a
  broadcast. `levels` are the depths of the enclosing scans that go over the parameter. `vector`
  says that the entries came along one axis once, however they are laid out now.
  """

  leaf: int
  steps: View
  shape: tuple[int, ...]
  levels: tuple[int, ...] = ()
  vector: bool = False


class Part(NamedTuple):
  """A view that is one piece of a variable: `size` entries from `start` on along `axis`."""

  view: ParamView
  axis: int
  start: int
  size: int


class Atom(NamedTuple):
  """An axis of a product's output, or a part of one: `kind` is `"stack"`, `"row"` or `"out"`."""

  kind: str
  order: tuple[int, ...]  # sorts the atoms of a kind into the order of the weight's axes
  size: int


@dataclasses.dataclass(frozen=True)
class Linear:
  """A variable that is a product's output plus something else, so that its cotangent is the same.

  `axes` says for each axis of the variable which atoms of the product's output it is made of.
  """

  use: Key
  leaf: int
  axes: tuple[tuple[Atom, ...], ...]

  def transposed(self, permutation: tuple[int, ...]) -> "Linear":
    return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

  def reshaped(self, shape: tuple[int, ...]) -> "Linear | None":
    """The atoms regrouped for `shape`, split where need be; None if they do not fit."""
    atoms = [atom for axis in self.axes for atom in axis]
    axes = []
    for size in shape:
      axis = []
      while size > 1:
        atom = atoms.pop(0)
        if size % atom.size == 0:
          size //= atom.size
        elif atom.size % size == 0:  # split: the outer part belongs here, the inner one comes next
          atoms.insert(0, Atom(atom.kind, (*atom.order, 1), atom.size // size))
          atom, size = Atom(atom.kind, (*atom.order, 0), size), 1
        else:
          return None
        axis.append(atom)
      axes.append(tuple(axis))
    return dataclasses.replace(self, axes=tuple(axes))


@dataclasses.dataclass(frozen=True)
class Value:
  """What is known of a variable.

  Attributes:
    batch: whether it depends on the batch (or on a key that differs between groups).
    view: set if it is a view of a parameter.
    parts: set if it is joined from views of parameters.
    linear: set if a bias added to it would be the bias of a layer.
  """

  batch: bool = False
  view: ParamView | None = None
  parts: tuple[Part, ...] = ()
  linear: Linear | None = None

  @property
  def views(self) -> tuple[ParamView, ...]:
    """The views that it holds, one or several."""
    return (self.view,) if self.view else tuple(part.view for part in self.parts)


class Product(Protocol):
  """How one equation is a product of a weight: what `dense`, `lookup` and others bring.

  Moments are sums over rows in the order of the weight's own axes, `[stack, d, d]` or, as
  diagonals, `[stack, d]`.
  """

  @property
  def weight(self) -> int:
    """Which operand is the weight."""
    ...

  @property
  def kind(self) -> str:
    """What the layer is called in the table."""
    ...

  @property
  def row_axes(self) -> tuple[tuple[int, int], ...]:
    """Axes of x and of y that are rows of both, pair by pair."""
    ...

  def input_moment(self, x: Any, bias: bool, diagonal: bool, dtype: Any) -> Any: ...

  def output_moment(self, x: Any, dy: Any, diagonal: bool, dtype: Any) -> Any: ...


class Matching(NamedTuple):
  """An equation as a layer: its product, and the weight operand as `[stack, inputs, outputs]`."""

  product: Product
  steps: View  # take the weight operand there
  stack: int
  inputs: int
  outputs: int
  rows: int  # rows of the other operand
  axes: tuple[tuple[Atom, ...], ...]  # what each axis of the output is made of


@dataclasses.dataclass(frozen=True)
class BiasUse:
  """An addition of a view of parameter `leaf` to the output of the product at `use`."""

  leaf: int
  view: View  # to [stack, outputs]
  use: Key


@dataclasses.dataclass(frozen=True)
class Mark:
  """A marked loss: a mean over terms, whose first operand parametrises a distribution.

  Attributes:
    path: where the equation stands.
    distribution: name of the mark, as of `fop_optax.losses`.
    terms: number of terms in one evaluation of the equation.
    scans: lengths of the enclosing scans.
  """

  path: Path
  distribution: str
  terms: int
  scans: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Use:
  """One product of the loss in which a parameter is the weight.

  Attributes:
    key: where the equation stands, and which part of its weight this is.
    leaf: the parameter.
    view: takes the parameter to `[stack, inputs, outputs]`.
    levels: depths of the enclosing scans that go over the parameter.
    product: roles of the axes.
    stack, inputs, outputs: sizes of the view.
    rows: rows that the weight is applied to in one evaluation of the loss.
    own_rows: those of one evaluation of the equation, without the repeats of scans.
    batch: whether the other operand depends on the batch.
    source: source line of the equation.
  """

  key: Key
  leaf: int
  view: View
  levels: tuple[int, ...]
  product: Product
  stack: int
  inputs: int
  outputs: int
  rows: int
  own_rows: int
  batch: bool
  source: str

"""What the walk knows of a variable of the loss, and the records it leaves behind."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import numpy as np

from fop_optax.capture.entries import Fold
from fop_optax.layers import Bias
from fop_optax.views import View

ONE_HOT = frozenset(("lookup", "table"))  # kinds whose rows have one entry: diagonal factors
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
  says that the entries came along one axis once, however they are laid out now. The variable holds
  `scale` times the entries.
  """

  leaf: int
  steps: View
  shape: tuple[int, ...]
  levels: tuple[int, ...] = ()
  vector: bool = False
  scale: complex = 1.0


class Part(NamedTuple):
  """A view that is one piece of a variable: `size` entries from `start` on along `axis`.

  Pieces lie side by side, or, of complex numbers, all on all of the variable, which is their sum.
  """

  view: ParamView
  axis: int
  start: int
  size: int


class Atom(NamedTuple):
  """An axis of a product's output, or a part of one: `kind` is `"stack"`, `"row"` or `"out"`.

  Of its `full` places the variable has `size`, from `start` on.
  """

  kind: str
  order: tuple[int, ...]  # sorts the atoms of a kind into the order of the weight's axes
  size: int
  start: int
  full: int


def atom(kind: str, order: int, size: int) -> Atom:
  """A whole axis of a product's output."""
  return Atom(kind, (order,), size, 0, size)


class Window(NamedTuple):
  """A part of a variable: `size` places from `start` on along `axis`."""

  axis: int
  start: int
  size: int


@dataclasses.dataclass(frozen=True)
class Linear:
  """A variable that is `factor` times a product's output, plus something else.

  The product's cotangent is then `factor` times the variable's. See `fop_optax.capture.biases`.

  Attributes:
    use: the product.
    leaf: its weight.
    axes: for each axis of the variable, which atoms of the product's output it is made of.
    held: atoms of which the variable has one place only.
    factor: see above.
    window: the part of the variable that is the product's, if its weight was joined from several.
  """

  use: Key
  leaf: int
  axes: tuple[tuple[Atom, ...], ...]
  held: tuple[Atom, ...] = ()
  factor: float = 1.0
  window: Window | None = None


class Constant:
  """A value that is known before the loss is run, worked out when it is asked for."""

  def __init__(self, evaluate: Callable[[], Any]):
    self._evaluate = evaluate

  @functools.cached_property
  def value(self) -> np.ndarray:
    return np.asarray(self._evaluate())

  def number(self) -> complex | None:
    """The value if it is one finite number, once or repeated, else None."""
    value = self.value
    if not value.size or not np.issubdtype(value.dtype, np.number):
      return None
    first = complex(value.flat[0])
    if not np.isfinite(first) or not np.all(value == value.flat[0]):
      return None
    return first if first.imag else first.real


class Shifted(NamedTuple):
  """A variable that is a view of a parameter plus something that depends on the batch.

  `table` is the sum as a use, which it is unless the variable is the weight of a product. `own`
  says that what is added depends on the parameter itself.
  """

  table: Key
  view: ParamView
  own: bool


class Pending(NamedTuple):
  """Why a parameter is in no layer, if what is made of it meets the batch."""

  path: Path  # of the equation; sorts reasons into the order of the program
  leaf: int
  why: str


@dataclasses.dataclass(frozen=True)
class Value:
  """What is known of a variable.

  Attributes:
    batch: whether it depends on the batch (or on a key that differs between groups).
    view: set if it is a view of a parameter.
    parts: set if it is joined from views of parameters.
    linears: set if a bias added to it would be the bias of a layer: of one, or of several side by
      side.
    tainted: whether a gradient that comes to it may go on to a parameter.
    constant: set if it is known without running the loss.
    shifted: set if it is a view of a parameter plus something that depends on the batch.
    leaves: parameters that it depends on.
    products: where it does not depend on the batch, the products of a weight with a constant that
      it is made of.
    pending: where it does not depend on the batch, parameters that it is made of in another way,
      and why that makes no layer. That is no matter for a term of the loss (a penalty), and is for
      what meets the batch.
  """

  batch: bool = False
  view: ParamView | None = None
  parts: tuple[Part, ...] = ()
  linears: tuple[Linear, ...] = ()
  tainted: bool = False
  constant: Constant | None = None
  shifted: Shifted | None = None
  leaves: frozenset[int] = frozenset()
  products: frozenset[Key] = frozenset()
  pending: frozenset["Pending"] = frozenset()

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
  window: Window | None = None  # the part of the output that is its own; None: all of it


@dataclasses.dataclass(frozen=True)
class BiasUse:
  """An addition of `coordinate` times a view of a parameter to the output of the product at `use`.

  `place` takes `[stack, outputs]` to the slice that the view is added to.
  """

  bias: Bias
  use: Key
  coordinate: float


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
    batch: whether the other operand depends on the batch.
    loop: path of the innermost scan that it stands in.
    each: whether it stands in a scan over examples.
    where: gives the source line of the equation, which takes a while.
    scale: of the weight where it is used; it counts as a scale of the inputs.
    repeats: of a product with a constant that meets the batch: how often it is repeated there.
    fold: how the entries of `view` are repeated in the weight as the product meets it, if they are.
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
  batch: bool
  loop: Path
  each: bool
  where: Callable[[], str] = dataclasses.field(compare=False)
  scale: complex = 1.0
  repeats: int = 0
  fold: Fold | None = None

  @property
  def source(self) -> str:
    return self.where()

  @property
  def fixed(self) -> bool:
    """Whether its rows are no examples' but a term of the loss of their own."""
    return not self.batch and not self.repeats

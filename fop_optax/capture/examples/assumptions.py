"""What the analysis says of a whole loss: whether chunks of the batch make it up, its terms.

`capture` assumes that the loss of the batch is the mean of the losses of its groups and
micro-batches, which holds if it is a mean of a function of each example.
"""

from collections.abc import Mapping
import dataclasses
import math
import warnings

from fop_optax.capture import batch as batches
from fop_optax.capture.examples.values import Batch, Cause, Constant, Piece, Unknown, Value
from fop_optax.capture.examples.walk import Product, Walk
from fop_optax.capture.trace import Traced
from fop_optax.capture.values import Key, Path, Use

Rows = tuple[Piece, Piece]  # where the examples lie in x and in y of a product

WORDS = {
  "pairs": "examples meet in pairs at {}",
  "statistic": "a statistic of all examples enters at {}",
  "carry": "a `scan` over examples carries something from one to the next at {}",
  "order": "examples are told apart by their order at {}",
  "place": "a constant differs from example to example at {}",
  "normalised": "normalised over the examples of a {} at {}",
}
SHOWN = 3  # causes that a warning names


@dataclasses.dataclass(frozen=True)
class Examples:
  """What is known of the examples in a loss.

  Attributes:
    loss: its value.
    size: N, the number of examples traced.
    products: its products and lookups, by path.
  """

  loss: Value
  size: int
  products: Mapping[Path, Product]

  @property
  def causes(self) -> list[Cause]:
    """Why examples depend on each other, in the order of the source."""
    found = set() if isinstance(self.loss, Constant) else set(self.loss.causes)
    if isinstance(self.loss, Batch) and self.loss.bent:
      found.add(self.loss.bent)
    return sorted({cause._replace(root=None) for cause in found})

  @property
  def interactions(self) -> list[Cause]:
    """The same without normalisations."""
    return [cause for cause in self.causes if cause.kind != "normalised"]

  @property
  def degree(self) -> float:
    """The loss goes with that power of the number of examples: 0 for a mean, and if not known."""
    known = isinstance(self.loss, Batch) and self.loss.bent is None and self.loss.summed
    return self.loss.degree or 0.0 if known and isinstance(self.loss, Batch) else 0.0

  @property
  def means(self) -> dict[int, str]:
    """R, the entries an example of which the final mean is taken, and the line that takes it.

    Several where means over different numbers of entries add up; none where it is not clear.
    """
    if not isinstance(self.loss, Batch) or not self.loss.summed or self.interactions:
      return {}
    found = sorted(self.loss.count.means, key=lambda mean: mean.entries)
    whole = [mean for mean in found if mean.entries % self.size == 0 and mean.source]
    return {mean.entries // self.size: mean.source for mean in whole}

  @property
  def terms(self) -> int:
    """R if it is clear, else 1."""
    return next(iter(self.means)) if len(self.means) == 1 else 1

  @property
  def weights(self) -> tuple[Path, int] | None:
    """Where the weights of the final mean are summed, so many to a sum, where that is clear."""
    if len(self.means) != 1 or not isinstance(self.loss, Batch):
      return None
    found, sizes = {mean.weights for mean in self.loss.count.means}, self.loss.count.sizes
    weights = found.pop()
    left = sizes and (weights is None or weights[1] != math.prod(sizes))
    return None if found or left else weights

  def check(self, groups: int, micro_batches: int) -> None:
    """Warns where a chunk of the batch gives another loss than the batch.

    Raises:
      ValueError: if the loss is no mean over the examples, and is to be cut into chunks.
    """
    chunks = f"groups={groups} and micro_batches={micro_batches}"
    if self.degree:
      where = f", summed at {_source(self.loss)}" if _source(self.loss) else ""
      grown = (
        f"The loss is no mean over the batch: it goes with N^{self.degree:g} for N examples{where}."
      )
      remedy = (
        " Write `jnp.mean(...)`, or divide by the number of examples at hand (`len(x)`, not a"
        " constant)."
      )
      if groups * micro_batches > 1:
        raise ValueError(
          f"{grown} With {chunks} its value would be the mean over {groups * micro_batches} chunks,"
          f" which is another one.{remedy} Or capture with groups=1 and micro_batches=1."
        )
      warnings.warn(
        f"{grown} Gradients are those of the loss as it is, but G = N R sum dy dy' goes with"
        f" N^{2 * self.degree:g} then, and with it what `damping` means.{remedy}",
        stacklevel=3,
      )
    causes = self.interactions
    if causes and groups * micro_batches > 1:
      listed = "; ".join(WORDS[kind].format(source) for kind, source, _ in causes[:SHOWN])
      more = f"; and {len(causes) - SHOWN} more" if len(causes) > SHOWN else ""
      warnings.warn(
        f"The loss of a batch is not the mean of the losses of its chunks: {listed}{more}. With"
        f" {chunks} it is another loss, in which examples of different chunks never meet. Capture"
        " with groups=1 and micro_batches=1 if that is not meant; and move the axis of examples"
        " first if the leading axis is another one (time).",
        stacklevel=3,
      )

  def notes(self, groups: int, micro_batches: int) -> list[str]:
    """Lines for the table."""
    chunk = "batch" if groups * micro_batches == 1 else "group" if micro_batches == 1 else "chunk"
    lines = []
    for kind, source, _ in self.causes:
      line = WORDS[kind].format(*([chunk, source] if kind == "normalised" else [source]))
      lines.append(f"{line[0].upper()}{line[1:]}.")
    return lines

  def terms_note(self, weighted: bool) -> list[str]:
    """The line of the table that says what R is, where the loss says more than one.

    So it does where the final mean is `weighted`, and the weights count.
    """
    found = self.means
    if len(found) > 1:
      listed = ", ".join(f"{terms} at {source}" for terms, source in found.items())
      return [
        f"1 term an example: means over different numbers of entries an example add up ({listed})."
        " `terms_per_example` says otherwise."
      ]
    less = ", less what its weights leave out" if weighted else ""
    return [
      f"{terms} term{'s'[: terms > 1]} an example{less}, from the mean at {source}."
      for terms, source in found.items()
      if terms > 1 or weighted
    ]

  def rows(self, uses: Mapping[Key, Use]) -> dict[Key, Rows]:
    """Where the examples lie in x and y of each use whose rows have an axis of them."""
    out = {}
    for key, use in uses.items():
      product = self.products.get(key.path)
      if product is None:
        continue
      x, y = product.operands[1 - use.product.weight], product.output
      pieces = [v.pieces if isinstance(v, Batch) else () for v in (x, y)]
      if len(pieces[0]) == len(pieces[1]) == 1:
        (own,), (other,) = pieces
        if own[1:] == other[1:] and (own.axis, other.axis) in use.product.row_axes:
          out[key] = (own, other)
    return out


def _source(value: Value) -> str:
  return value.source if isinstance(value, Batch) else ""


def analyse(
  traced: Traced, twice: Traced | None, arguments: batches.Arguments, size: int
) -> Examples:
  """Follows the examples through a loss.

  Args:
    traced: the loss on `size` examples.
    twice: the loss on twice as many, if it could be traced.
    arguments: roles of the arguments.
    size: number of examples; of a single one nothing is said.
  """
  if size == 1:
    return Examples(Unknown(), size, {})
  roles = [role for role in arguments.roles if role != "static"]
  parameters = len(traced.jaxpr.invars) - len(roles)
  inputs: list[Value] = [Constant(active=True)] * parameters
  for role in roles:
    inputs.append(Batch((Piece(0, size),)) if role == "batch" else Constant(free=role == "key"))
  walk = Walk(size)
  twin = (twice.jaxpr, twice.consts) if twice else None
  loss, *_ = walk.run(traced.jaxpr, traced.consts, twin, inputs)
  return Examples(loss, size, walk.products)

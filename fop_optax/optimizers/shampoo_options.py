"""Hyperparameters of Shampoo, and which blocks and exponents they give a parameter."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from fop_optax.curvature.precondition import Side
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.grafting import Graft
from fop_optax.sharding import Sharding
from fop_optax.tensors import Tensor, Tensors, merged_from_right, tensors

ROOTS = ("eigh", "newton")
BLOCK_SIZE = 1024

Exponents = float | Mapping[int, float | Mapping[int, float]] | None


@dataclasses.dataclass(frozen=True)
class ShampooOptions:
  """Hyperparameters of the direction; checked where they are Python numbers."""

  b1: Scalar
  b2: Scalar
  b3: Scalar | None
  eps: Scalar
  exponents: Exponents
  graft: Graft
  inverse_update_period: ScalarOrSchedule
  start_step: Scalar | None
  stagger: bool
  correct_bias: bool
  root: str
  eigenvalue_correction: bool
  kl: bool
  contrast: bool
  block_size: int | None
  merge_to: int | None
  dimension_numbers: Dimensions
  layers: Layers | None
  sharding: Sharding | None

  def __post_init__(self):
    checks.one_of("root", self.root, ROOTS)
    for name in ("b1", "b3"):
      checks.check(name, getattr(self, name), lambda x: 0 <= x < 1, "in [0, 1)")
    checks.check("b2", self.b2, lambda x: 0 < x <= 1, "above 0 and at most 1")
    checks.check("eps", self.eps, lambda x: x >= 0, "at least 0")
    checks.check_period("inverse_update_period", self.inverse_update_period)
    checks.check_period("start_step", self.start_step)
    for name in ("block_size", "merge_to"):
      if getattr(self, name) is not None:
        checks.check_static(name, getattr(self, name))
    checks.check_sharding(self.sharding)
    by_tensor.check_views(self.dimension_numbers, self.layers)
    self._check_exponents()

  def _check_exponents(self) -> None:
    given = [self.exponents]
    if isinstance(self.exponents, Mapping):
      given = [x for v in self.exponents.values() for x in _values(v)]
    for exponent in given:
      if exponent is None:
        continue
      if not isinstance(exponent, float | int) or exponent < 0:
        raise ValueError(
          f"`exponents={self.exponents!r}` should be a Python number of at least 0 for all axes, or"
          " a mapping from the number of axes to one, or to a mapping from an axis to one, such as"
          " `{2: {0: 0.5, 1: 0.0}}`: a left side alone."
        )
      if self.root == "newton" and exponent and not (1 / exponent).is_integer():
        raise ValueError(
          f'`exponents={self.exponents!r}` has {exponent}: with `root="newton"` exponents are'
          ' 1 / r, with r a whole number. Use `root="eigh"`.'
        )

  @property
  def has_powers(self) -> bool:
    """Whether the inverses of the roots are kept."""
    return self.contrast and not self.eigenvalue_correction

  def given_exponent(self, order: int, mode: int) -> float | None:
    """The exponent that the user gave for an axis of tensors of so many axes, None if none."""
    exponents = self.exponents
    if isinstance(exponents, Mapping):
      exponents = exponents.get(order)
    if isinstance(exponents, Mapping):
      exponents = exponents.get(mode)
    return exponents

  def exponent(self, factors: Sequence[Side], mode: int) -> float:
    """The exponent of an axis; 1/2k where nothing is given, with k axes preconditioned."""
    given = self.given_exponent(len(factors), mode)
    return 0.5 / max(sum(f is not None for f in factors), 1) if given is None else float(given)

  def tensors(self, tree: Any) -> Tensors:
    """The blocks of a tree, and which of their axes are preconditioned."""
    return tensors(tree, self.dimension_numbers, self.layers).map(self._blocks)

  def _blocks(self, tensor: Tensor) -> list[Tensor]:
    size = BLOCK_SIZE if self.block_size is None else self.block_size
    if tensor.natural and self.merge_to is not None:
      tensor = tensor.reshaped(merged_from_right(tensor.dims, size, self.merge_to))
    order = len(tensor.dims)
    without = tuple(
      kept or self.given_exponent(order, mode) == 0 for mode, kept in enumerate(tensor.diagonal)
    )
    return list(dataclasses.replace(tensor, diagonal=without).cut(size))


def _values(exponents):
  return list(exponents.values()) if isinstance(exponents, Mapping) else [exponents]

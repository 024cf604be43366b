"""Hyperparameters of SOAP, and which matrices and bases they give a parameter."""

import dataclasses
from typing import Any

from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.sharding import Sharding
from fop_optax.tensors import Tensor, Tensors, merged_from_left, tensors

STARTS = ("eigh", "identity")
MAX_PRECOND_DIM = 10_000


@dataclasses.dataclass(frozen=True)
class SoapOptions:
  """Hyperparameters of the direction; checked where they are Python numbers."""

  b1: Scalar
  b2: Scalar
  eps: Scalar
  shampoo_beta: Scalar | None
  inverse_update_period: ScalarOrSchedule
  stagger: bool
  max_precond_dim: int | None
  merge_dims: bool
  precondition_1d: bool
  one_sided: bool
  factorized: bool
  normalize_grads: bool
  correct_bias: bool
  eps_after_correction: bool
  skip_first: bool
  start: str
  kl: bool
  fisher: bool
  contrast: bool
  dimension_numbers: Dimensions
  layers: Layers | None
  mu_dtype: Any
  statistics_dtype: Any
  sharding: Sharding | None

  def __post_init__(self):
    checks.one_of("start", self.start, STARTS)
    for name in ("b1", "b2", "shampoo_beta"):
      checks.check(name, getattr(self, name), lambda x: 0 <= x < 1, "in [0, 1)")
    checks.check("eps", self.eps, lambda x: x >= 0, "at least 0")
    checks.check_period("inverse_update_period", self.inverse_update_period)
    if self.max_precond_dim is not None:
      checks.check_static("max_precond_dim", self.max_precond_dim)
    checks.check_dtype("mu_dtype", self.mu_dtype)
    checks.check_dtype("statistics_dtype", self.statistics_dtype)
    checks.check_sharding(self.sharding)
    by_tensor.check_views(self.dimension_numbers, self.layers)
    if self.fisher and self.layers is None:
      raise ValueError(
        "`fisher=True` takes the bases from the factors of a captured loss: give it"
        " `layers=captured.layers` of `captured = fop_optax.capture(loss, params, ...)`."
      )
    if self.fisher and self.kl:
      raise ValueError("`kl=True` whitens gradients, and `fisher=True` has none in its bases.")

  def tensors(self, tree: Any) -> Tensors:
    """The tensors of a tree, and which of their modes have a basis."""
    found = tensors(tree, self.dimension_numbers, self.layers, join_biases=self.fisher)
    return found.map(self._sides)

  def _sides(self, tensor: Tensor) -> list[Tensor]:
    vector = tensor.natural and len(tensor.dims) == 1
    limit = MAX_PRECOND_DIM if self.max_precond_dim is None else self.max_precond_dim
    if tensor.natural and self.merge_dims:
      tensor = tensor.reshaped(merged_from_left(tensor.dims, limit))
    kept = [d > limit or d == 1 for d in tensor.dims]  # a basis of one: +-1
    if (vector and not self.precondition_1d) or (self.fisher and tensor.layer is None):
      kept = [True] * len(kept)
    if self.one_sided and len(kept) > 1:
      smallest = min(range(len(kept)), key=tensor.dims.__getitem__)
      kept = [own or mode != smallest for mode, own in enumerate(kept)]
    diagonal = tuple(map(bool.__or__, kept, tensor.diagonal))
    return [dataclasses.replace(tensor, diagonal=diagonal)]

"""Networks as a configuration names them: one dataclass each, its fields the sizes."""

from collections.abc import Sequence
import dataclasses

from experiments import models
from experiments.models import mlp


@dataclasses.dataclass(frozen=True)
class Mlp:
  """Dense layers over the flattened image, ReLU between them."""

  hidden: tuple[int, ...] = (256, 128)  # widths of the hidden layers
  dropout: float = 0.0  # share of the hidden units that is dropped

  @property
  def title(self) -> str:
    return f"MLP {'-'.join(map(str, self.hidden))}"

  def build(self, image: Sequence[int], classes: int) -> models.Model:
    return mlp.mlp(image, classes, self.hidden, dropout=self.dropout)

"""Networks as a configuration names them: one dataclass each, its fields the sizes."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from experiments import models
from experiments.models import inception, mlp, resnet, speedrun, t2t_vit, transformer, vit

Dtype = Any


@dataclasses.dataclass(frozen=True)
class Network:
  """What all of them have."""

  @property
  def title(self) -> str:
    """For tables and plots."""
    raise NotImplementedError

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    """The model for inputs of a shape (without the batch) and so many classes or tokens."""
    raise NotImplementedError

  def prepare(self, state: models.functional.State, images: Any) -> models.functional.State:
    """The model's state after a look at some training images, before training."""
    del images
    return state


@dataclasses.dataclass(frozen=True)
class Mlp(Network):
  """Dense layers over the flattened image, ReLU between them."""

  hidden: tuple[int, ...] = (256, 128)  # widths of the hidden layers
  dropout: float = 0.0  # share of the hidden units that is dropped

  @property
  def title(self) -> str:
    return f"MLP {'-'.join(map(str, self.hidden))}"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    return mlp.mlp(shape, classes, self.hidden, dropout=self.dropout, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class ResNet(Network):
  """Residual networks: 18 and 32 layers for CIFAR, 50 and 101 for ImageNet."""

  depth: Literal[18, 32, 50, 101] = 18  # layers
  width: int = 64  # channels of the first stage

  @property
  def title(self) -> str:
    return f"ResNet-{self.depth}, width {self.width}"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    del shape
    make = getattr(resnet, f"resnet{self.depth}")
    return make(classes, width=self.width, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Inception(Network):
  """Inception-V3 or Inception-ResNet-V2, for images of 75 pixels at least."""

  kind: Literal["v3", "resnet_v2"] = "v3"
  width: float = 1.0  # times the channels of every layer

  @property
  def title(self) -> str:
    return {"v3": "Inception-V3", "resnet_v2": "Inception-ResNet-V2"}[self.kind]

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    del shape
    make = getattr(inception, f"inception_{self.kind}")
    return make(classes, width=self.width, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Speedrun(Network):
  """The network of the public CIFAR-10 speed runs; its first filters are made from the images."""

  width: float = 1.0  # times the channels of the three groups

  @property
  def title(self) -> str:
    return f"speed-run network, width {self.width:g}"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    del shape
    return speedrun.speedrun(classes, width=self.width, dtype=dtype)

  def prepare(self, state: models.functional.State, images: Any) -> models.functional.State:
    return speedrun.whiten(state, images)


@dataclasses.dataclass(frozen=True)
class ViT(Network):
  """Vision transformer."""

  patch: int = 16  # side of a patch, pixels
  width: int = 384
  depth: int = 12
  heads: int = 6

  @property
  def title(self) -> str:
    return f"ViT, width {self.width}, depth {self.depth}"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    sizes = (self.patch, self.width, self.depth, self.heads)
    return vit.vit(shape[0], *sizes, classes, channels=shape[-1], dtype=dtype)


@dataclasses.dataclass(frozen=True)
class T2tViT(Network):
  """T2T-ViT-14."""

  tokens: Literal["performer", "transformer"] = "performer"  # the tokens-to-token module

  @property
  def title(self) -> str:
    return "T2T-ViT-14"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    return t2t_vit.t2t_vit_14(classes, tokens=self.tokens, image=shape[0], dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LanguageModel(Network):
  """A decoder-only transformer."""

  size: str = "0.2m"  # one of `experiments.models.transformer.SIZES`
  tied: bool = False  # whether the output matrix is the embedding
  remat: bool = False  # whether activations of a block are computed anew in the backward pass

  @property
  def title(self) -> str:
    return f"transformer {self.size}"

  def build(self, shape: Sequence[int], classes: int, dtype: Dtype = None) -> models.Model:
    del shape
    return transformer.language_model(
      self.size, vocabulary=classes, tied=self.tied, remat=self.remat, dtype=dtype
    )


AnyNetwork = Mlp | ResNet | Inception | Speedrun | ViT | T2tViT | LanguageModel

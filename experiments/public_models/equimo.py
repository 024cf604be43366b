"""The vision models of Equimo, in Equinox."""

from typing import Any

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

EQUIMO = Collection(
  "Equimo",
  repository="clementpoiret/Equimo",
  commit="706457248d1526921814888a86fb6835d80c1f7a",
  root="src",
)


def _models(name: str) -> Any:
  """One file of models: `equimo.vision.models` imports all of them, with all they need."""
  import importlib

  problem.namespace("equimo.vision.models")
  return importlib.import_module(f"equimo.vision.models.{name}")


def _classifier(model: Any, size: int = 32) -> Problem:
  inputs = [problem.images(3, size, size)]
  forward = lambda model, x, key: model(x, key=key, inference=False)
  return problem.equinox(model, inputs, problem.cross_entropy, problem.labels(10), forward=forward)


@EQUIMO.model("ViT", "Equinox")
def vit() -> Problem:
  model = _models("vit").VisionTransformer(
    img_size=32, in_channels=3, dim=32, patch_size=8, num_heads=[4], depths=[2], num_classes=10,
    key=problem.KEY,
  )  # fmt: skip
  return _classifier(model)


@EQUIMO.model("MobileNetV3", "Equinox")
def mobilenet() -> Problem:
  model = _models("mobilenet").mobilenetv3_small(in_channels=3, num_classes=10, key=problem.KEY)
  return _classifier(model, 64)


@EQUIMO.model("VSSD (Mamba-2)", "Equinox")
def vssd() -> Problem:
  model = _models("vssd").Vssd(
    img_size=64, in_channels=3, dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], d_state=8,
    num_classes=10, key=problem.KEY,
  )  # fmt: skip
  return _classifier(model, 64)


@EQUIMO.model("MLLA (linear attention)", "Equinox")
def mlla() -> Problem:
  model = _models("mlla").Mlla(
    img_size=64, in_channels=3, dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4],
    num_classes=10, key=problem.KEY,
  )  # fmt: skip
  return _classifier(model, 64)

"""Google Research's vision models, in Flax Linen."""

import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

VISION_TRANSFORMER = Collection(
  "vision_transformer",
  repository="google-research/vision_transformer",
  commit="c6de1e5378c9831a8477feb30994971bdc409e46",
)
BIG_VISION = Collection(
  "big_vision",
  repository="google-research/big_vision",
  commit="0127fb6b337ee2a27bf4e54dea79cff176527356",
)


def _images(model, objective=problem.cross_entropy, **call) -> Problem:
  return problem.linen(
    model, [problem.images(32, 32, 3)], objective, problem.labels(10), train=True, **call
  )


@VISION_TRANSFORMER.model("ViT", "Linen")
def vit() -> Problem:
  models = VISION_TRANSFORMER.load("vit_jax/models_vit.py")
  model = models.VisionTransformer(
    num_classes=10, patches=_Patches((8, 8)), hidden_size=32,
    transformer={"mlp_dim": 64, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.1},
  )  # fmt: skip
  return _images(model)


@VISION_TRANSFORMER.model("ViT on ResNet", "Linen")
def hybrid() -> Problem:
  models = VISION_TRANSFORMER.load("vit_jax/models_vit.py")
  model = models.VisionTransformer(
    num_classes=10, patches=_Patches((1, 1)), hidden_size=32,
    transformer={"mlp_dim": 64, "num_heads": 4, "num_layers": 2},
    resnet=_ResNet((1, 1), 0.5),
  )  # fmt: skip
  return _images(model)


@VISION_TRANSFORMER.model("MLP-Mixer", "Linen")
def mixer() -> Problem:
  models = VISION_TRANSFORMER.load("vit_jax/models_mixer.py")
  model = models.MlpMixer(
    patches=_Patches((8, 8)), num_classes=10, num_blocks=2, hidden_dim=32, tokens_mlp_dim=16,
    channels_mlp_dim=64,
  )  # fmt: skip
  return _images(model)


class _Patches:
  """A configuration with one entry, as its users read it."""

  def __init__(self, size):
    self.size = size


class _ResNet:
  def __init__(self, num_layers, width_factor):
    self.num_layers, self.width_factor = num_layers, width_factor


@BIG_VISION.model("ViT, attention pooling", "Linen")
def siglip() -> Problem:
  from big_vision.models import vit

  model = vit.Model(
    num_classes=10, patch_size=(8, 8), width=32, depth=2, mlp_dim=64, num_heads=4, pool_type="map",
    rep_size=True, scan=True,
  )  # fmt: skip
  return _images(model, lambda outputs, y: problem.cross_entropy(outputs[0], y))


VMOE = Collection(
  "vmoe", repository="google-research/vmoe", commit="942a78bc81d2e63199f0933733582ddae0715416"
)


@VMOE.model("ViT with 4 experts", "Linen")
def vit_moe() -> Problem:
  from vmoe.nn import vit_moe

  router = {
    "num_selected_experts": 2, "noise_std": 1e-3, "importance_loss_weight": 0.02,
    "load_loss_weight": 0.02,
    "dispatcher": {"name": "einsum", "capacity": 8, "batch_priority": False, "bfloat16": False},
  }  # fmt: skip
  moe = {"layers": (1,), "num_experts": 4, "group_size": 16, "router": router}
  encoder = {"num_layers": 2, "mlp_dim": 64, "num_heads": 4, "moe": moe}
  model = vit_moe.VisionTransformerMoe(
    num_classes=10, patch_size=(8, 8), hidden_size=32, encoder=encoder, classifier="gap"
  )

  def objective(outputs, y):
    logits, metrics = outputs
    return problem.cross_entropy(logits, y) + jnp.mean(metrics["auxiliary_loss"])

  return problem.linen(model, [problem.images(32, 32, 3)], objective, problem.labels(10))

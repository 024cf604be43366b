"""The models of jax-ml/bonsai, in Flax NNX."""

import jax

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

BONSAI = Collection(
  "bonsai", repository="jax-ml/bonsai", commit="36284254cf738d99c1c5d1e3a292d27656a0a365"
)


def _classifier(model, size: int = 32, **call) -> Problem:
  inputs = [problem.images(size, size, 3)]
  forward = lambda model, x: model(x, **call)
  return problem.nnx(model, inputs, problem.cross_entropy, problem.labels(10), forward=forward)


@BONSAI.model("ConvNeXt", "NNX")
def convnext() -> Problem:
  from bonsai.models.convnext import modeling
  from flax import nnx

  config = modeling.ModelConfig(
    stage_depths=(1, 1, 2, 1), stage_dims=(16, 24, 32, 48), drop_path_rate=0.1, num_classes=10
  )
  model = modeling.ConvNeXt(config, rngs=nnx.Rngs(0))
  return _classifier(model, 64, rngs=jax.random.key(3), train=True)


@BONSAI.model("DenseNet", "NNX")
def densenet() -> Problem:
  from bonsai.models.densenet121 import modeling
  from flax import nnx

  config = modeling.ModelConfig(num_classes=10, dense_block_layers=[2, 2, 2, 2], growth_rate=8)
  return _classifier(modeling.DenseNet(config, rngs=nnx.Rngs(0)))


@BONSAI.model("ViT", "NNX")
def vit() -> Problem:
  from bonsai.models.vit import modeling
  from flax import nnx

  config = modeling.ModelConfig((32, 32), (8, 8), 3, 32, 0.0, 0.0, 4, 64, 1e-12, 2, 10)
  return _classifier(modeling.ViTClassificationModel(config, rngs=nnx.Rngs(0)), rngs=None)


@BONSAI.model("Mamba-2", "NNX")
def mamba() -> Problem:
  from bonsai.models.mamba2 import modeling
  from flax import nnx

  config = modeling.ModelConfig(
    vocab_size=96, hidden_size=32, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=2
  )
  tokens = problem.labels(96, 16)
  model = modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
  return problem.nnx(model, [tokens, tokens], lambda outputs: outputs["loss"])


@BONSAI.model("UMT5", "NNX")
def umt5() -> Problem:
  from bonsai.models.umt5 import modeling
  from flax import nnx
  import jax.numpy as jnp

  config = modeling.ModelConfig(
    vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
  )
  tokens = problem.labels(96, 12)

  def forward(model, tokens):
    return model.lm_head(model(tokens, jnp.ones_like(tokens), jnp.roll(tokens, 1, 1)))

  model = modeling.UMT5Model(config, rngs=nnx.Rngs(0))
  return problem.nnx(model, [tokens], problem.cross_entropy, tokens, forward=forward)


@BONSAI.model("DINOv3 ViT", "NNX")
def dino() -> Problem:
  from bonsai.models.dinov3 import modeling
  from flax import nnx

  config = modeling.ModelConfig(
    patch_size=(8, 8), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, image_size=32,
  )  # fmt: skip
  model = modeling.Dinov3ViTModel(config, rngs=nnx.Rngs(0))

  def distil(outputs, targets):
    return problem.squared_error(outputs["pooler_output"], targets)

  return problem.nnx(model, [problem.images(3, 32, 32)], distil, problem.images(32))

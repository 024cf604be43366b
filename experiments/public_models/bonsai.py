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


@BONSAI.model("EfficientNet", "NNX")
def efficientnet() -> Problem:
  from bonsai.models.efficientnet import modeling
  from flax import nnx

  blocks = modeling.BlockConfigs.default_block_config()
  config = modeling.ModelConfig(0.25, 0.3, 32, 0.2, 1, 0.99, 1e-5, blocks, 10)
  model = modeling.EfficientNet(config, rngs=nnx.Rngs(0))
  model.dropout.rngs = nnx.Rngs(1)
  return _classifier(model, 32, training=True)


@BONSAI.model("VGG", "NNX")
def vgg() -> Problem:
  from bonsai.models.vgg19 import modeling
  from flax import nnx

  config = modeling.ModelConfig(10, [2, 2, 2, 2, 2], [8, 16, 16, 24, 24, 64])
  return _classifier(modeling.VGG(config, rngs=nnx.Rngs(0)))


@BONSAI.model("ViT", "NNX")
def vit() -> Problem:
  from bonsai.models.vit import modeling
  from flax import nnx

  config = modeling.ModelConfig((32, 32), (8, 8), 3, 32, 0.0, 0.0, 4, 64, 1e-12, 2, 10)
  return _classifier(modeling.ViTClassificationModel(config, rngs=nnx.Rngs(0)), rngs=None)


@BONSAI.model("U-Net", "NNX")
def unet() -> Problem:
  from bonsai.models.unet import modeling
  from flax import nnx

  config = modeling.ModelConfig(in_channels=3, num_classes=4, features=(4, 8, 16, 32, 64))
  model = modeling.UNet(config, rngs=nnx.Rngs(0))
  inputs = [problem.images(32, 32, 3)]
  return problem.nnx(model, inputs, problem.cross_entropy, problem.labels(4, 32, 32))


@BONSAI.model("VAE of Stable Diffusion", "NNX")
def vae() -> Problem:
  from bonsai.models.vae import modeling
  from flax import nnx

  config = modeling.ModelConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
  x = problem.images(32, 32, 3)
  return problem.nnx(modeling.VAE(config, nnx.Rngs(0)), [x], problem.squared_error, x)


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


@BONSAI.model("Qwen3", "NNX")
def qwen() -> Problem:
  from bonsai.models.qwen3 import modeling
  from flax import nnx
  import jax.numpy as jnp

  config = modeling.ModelConfig(
    num_layers=2, vocab_size=96, emb_dim=32, mlp_dim=64, num_heads=4, head_dim=8, num_kv_heads=2,
    rope_theta=10_000, rope_scaling_factor=1, local_rope_theta=1e4, norm_eps=1e-6,
    tie_word_embeddings=True,
  )  # fmt: skip
  tokens = problem.labels(96, 16)

  def forward(model, tokens):
    cache = modeling.init_cache(config, len(tokens), 16, 0, jnp.float32)
    return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

  model = modeling.Qwen3(config, rngs=nnx.Rngs(0))
  return problem.nnx(model, [tokens], problem.next_token, tokens, forward=forward)


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

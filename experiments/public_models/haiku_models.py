"""Haiku's own networks and examples."""

import jax

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

HAIKU = Collection("Haiku", package="dm-haiku")
EXAMPLES = Collection(
  "Haiku examples",
  repository="google-deepmind/dm-haiku",
  commit="f4d858a5cbb29140855d68f81f5fd625e078a5ae",
)


def _classifier(make) -> Problem:
  """`make()` gives a network of images that is told whether it trains."""
  images = [problem.images(32, 32, 3)]
  return problem.haiku(
    lambda x: make()(x, is_training=True), images, problem.cross_entropy, problem.labels(10)
  )


@HAIKU.model("ResNet", "Haiku")
def resnet() -> Problem:
  import haiku as hk

  make = lambda: hk.nets.ResNet(
    blocks_per_group=(1, 1, 1, 1), num_classes=10, bottleneck=True, resnet_v2=True,
    channels_per_group=(16, 32, 48, 64),
  )  # fmt: skip
  return _classifier(make)


@HAIKU.model("MobileNet", "Haiku")
def mobilenet() -> Problem:
  import haiku as hk

  make = lambda: hk.nets.MobileNetV1(
    strides=(1, 2, 1, 2), channels=(16, 32, 32, 48), num_classes=10
  )
  return _classifier(make)


@HAIKU.model("VQ-VAE", "Haiku")
def vq_vae() -> Problem:
  import haiku as hk

  def apply(x):
    encoder = hk.Sequential([hk.Conv2D(16, 4, 2), jax.nn.relu, hk.Conv2D(8, 3)])
    decoder = hk.Sequential([hk.Conv2D(16, 3), jax.nn.relu, hk.Conv2DTranspose(3, 4, 2)])
    quantizer = hk.nets.VectorQuantizer(embedding_dim=8, num_embeddings=32, commitment_cost=0.25)
    quantized = quantizer(encoder(x), is_training=True)
    return decoder(quantized["quantize"]), quantized["loss"]

  x = problem.images(16, 16, 3)
  objective = lambda outputs, x: problem.squared_error(outputs[0], x) + outputs[1]
  return problem.haiku(apply, [x], objective, x)


@HAIKU.model("GRU", "Haiku")
def gru() -> Problem:
  import haiku as hk

  def apply(x):
    core = hk.GRU(32)
    outputs, _ = hk.dynamic_unroll(core, x.swapaxes(0, 1), core.initial_state(len(x)))
    return hk.Linear(10)(outputs[-1])

  return problem.haiku(apply, [problem.images(12, 16)], problem.cross_entropy, problem.labels(10))


@EXAMPLES.model("Transformer", "Haiku")
def transformer() -> Problem:
  models = EXAMPLES.load("examples/transformer/model.py")

  def apply(tokens):
    stack = models.Transformer(num_heads=4, num_layers=2, attn_size=8, dropout_rate=0.1)
    return models.LanguageModel(stack, model_size=32, vocab_size=96, pad_token=0)(tokens)

  tokens = problem.labels(96, 16)
  return problem.haiku(apply, [tokens], problem.next_token, tokens)


RESEARCH = Collection(
  "deepmind-research",
  repository="google-deepmind/deepmind-research",
  commit="f5de0ede8430809180254ee957abf36ed62579ef",
)


@RESEARCH.model("Perceiver", "Haiku")
def perceiver() -> Problem:
  from perceiver import perceiver as models

  def apply(x):
    encoder = models.PerceiverEncoder(
      num_self_attends_per_block=2, num_blocks=2, z_index_dim=8, num_z_channels=32,
      num_cross_attend_heads=1, num_self_attend_heads=4,
    )  # fmt: skip
    decoder = models.ClassificationDecoder(
      num_classes=10, num_z_channels=32, use_query_residual=True,
      position_encoding_type="trainable",
      trainable_position_encoding_kwargs={"num_channels": 32, "init_scale": 0.02},
    )  # fmt: skip
    return models.Perceiver(encoder, decoder)(x, is_training=True)

  x = problem.images(20, 16)
  return problem.haiku(apply, [x], problem.cross_entropy, problem.labels(10))

"""Speech and other sound, in Flax Linen."""

import importlib

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

PERCH = Collection(
  "Perch",
  repository="google-research/perch",
  commit="b216270c0220c47318ba25b4b11a5c80951315cd",
)
SEQ2SEQ = Collection(
  "seq2seq-speech",
  repository="sanchit-gandhi/seq2seq-speech",
  commit="193197730514d91be6d36dce783c4a34303cbf92",
)


@PERCH.model("Conformer over mel spectrograms", "Linen")
def conformer() -> Problem:
  from chirp.models import frontend, taxonomy_model

  model = taxonomy_model.TaxonomyModel(
    num_classes={"label": 10},
    encoder=taxonomy_model.ConformerModel(num_conformer_blocks=2, features=32, kernel_size=5),
    frontend=frontend.MelSpectrogram(
      features=16, stride=40, kernel_size=80, sample_rate=8000, freq_range=(60, 4000),
      scaling_config=frontend.LogScalingConfig(),
    ),
  )  # fmt: skip
  hot = jax.nn.one_hot(problem.labels(10), 10)

  def objective(outputs, hot):
    logits = outputs["label"]
    return jnp.mean(jax.nn.softplus(logits) - hot * logits)

  return problem.linen(model, [0.1 * problem.images(1280)], objective, hot, train=True)


@PERCH.model("separation, U-Net with learned filters", "Linen")
def separation() -> Problem:
  from chirp.models import frontend, metrics, separation_model, soundstream_unet

  model = separation_model.SeparationModel(
    bank_transform=frontend.LearnedFrontend(features=16, stride=4, kernel_size=8),
    unbank_transform=frontend.InverseLearnedFrontend(stride=4, kernel_size=8),
    mask_generator=soundstream_unet.SoundstreamUNet(
      base_filters=16, bottleneck_filters=16, output_filters=32, strides=(2, 2),
      feature_mults=(2, 2), groups=(1, 2), num_residual_layers=2,
    ),
    num_mask_channels=2, bank_is_real=True,
  )  # fmt: skip
  sources = 0.1 * problem.images(2, 320)

  def objective(outputs, sources):
    return jnp.mean(metrics.negative_snr_loss(sources, outputs.separated_audio, 30.0))

  return problem.linen(model, [sources.sum(1)], objective, sources, train=True)


@SEQ2SEQ.model("wav2vec 2.0, CTC, scanned layers", "Linen")
def wav2vec2() -> Problem:
  import optax

  problem.namespace("models")  # its `__init__` imports BART's too, which names removed types
  config_class = importlib.import_module("models.configuration_wav2vec2").Wav2Vec2Config
  importlib.import_module("models").Wav2Vec2Config = config_class
  models = importlib.import_module("models.modeling_flax_wav2vec2")
  config = config_class(
    vocab_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), feat_extract_norm="layer",
    do_stable_layer_norm=True, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0, use_scan=True, fuse_matmuls=True,
  )  # fmt: skip
  config.gradient_checkpointing = False
  model = models.FlaxWav2Vec2ForCTC(config, input_shape=(1, 400))
  sound, tokens = problem.images(400), problem.labels(32, 4)

  def loss_fn(params, sound, tokens, key):
    logits = model(sound, params=params, dropout_rng=key, train=True)[0]
    heard = jnp.zeros(logits.shape[:2])
    losses = optax.ctc_loss(logits, heard, tokens, jnp.zeros(tokens.shape))
    return jnp.mean(losses / tokens.shape[1])

  return Problem(loss_fn, model.params, (sound, tokens, problem.KEY))

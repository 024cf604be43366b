"""Flax models of Hugging Face transformers, the last version that has them, from configurations."""

from typing import Any

import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

TRANSFORMERS = Collection("transformers", package="transformers")
V, T = 96, 16


def _problem(model: Any, inputs: dict[str, Any], objective: Any, *targets: Any) -> Problem:
  """The loss of a model in training mode; `inputs` by name."""

  def loss_fn(params, inputs, targets, key):
    outputs = model(**inputs, params=params, dropout_rng=key, train=True)
    return objective(outputs, *targets)

  return Problem(loss_fn, model.params, (inputs, targets, problem.KEY))


def _text(**more: Any) -> dict[str, Any]:
  return {"input_ids": problem.labels(V, T), "attention_mask": jnp.ones((problem.BATCH, T)), **more}


@TRANSFORMERS.model("BERT, masked tokens", "Linen")
def bert() -> Problem:
  from transformers import BertConfig, FlaxBertForMaskedLM

  config = BertConfig(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=T,
  )  # fmt: skip
  objective = lambda outputs, tokens: problem.cross_entropy(outputs.logits, tokens)
  return _problem(FlaxBertForMaskedLM(config), _text(), objective, problem.labels(V, T))


@TRANSFORMERS.model("GPT-2", "Linen")
def gpt2() -> Problem:
  from transformers import FlaxGPT2LMHeadModel, GPT2Config

  config = GPT2Config(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4)
  objective = lambda outputs, tokens: problem.next_token(outputs.logits, tokens)
  inputs = _text()
  return _problem(FlaxGPT2LMHeadModel(config), inputs, objective, inputs["input_ids"])


@TRANSFORMERS.model("Llama", "Linen")
def llama() -> Problem:
  from transformers import FlaxLlamaForCausalLM, LlamaConfig

  config = LlamaConfig(
    vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=T,
  )  # fmt: skip
  objective = lambda outputs, tokens: problem.next_token(outputs.logits, tokens)
  inputs = _text()
  return _problem(FlaxLlamaForCausalLM(config), inputs, objective, inputs["input_ids"])


@TRANSFORMERS.model("CLIP", "Linen")
def clip() -> Problem:
  from transformers import CLIPConfig, FlaxCLIPModel

  tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
  tower |= {"num_attention_heads": 4, "projection_dim": 16}
  config = CLIPConfig(
    text_config={**tower, "vocab_size": V, "max_position_embeddings": T, "eos_token_id": V - 1},
    vision_config={**tower, "image_size": 32, "patch_size": 8},
    projection_dim=16,
  )

  def contrastive(outputs):
    logits = outputs.logits_per_image
    pairs = jnp.arange(len(logits))
    return 0.5 * (problem.cross_entropy(logits, pairs) + problem.cross_entropy(logits.T, pairs))

  model = FlaxCLIPModel(config, input_shape=((1, 1), (1, 32, 32, 3)))
  return _problem(model, _text(pixel_values=problem.images(3, 32, 32)), contrastive)


@TRANSFORMERS.model("Whisper", "Linen")
def whisper() -> Problem:
  from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

  config = WhisperConfig(
    vocab_size=V, num_mel_bins=16, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, d_model=32,
    max_source_positions=16, max_target_positions=T, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=3,
  )  # fmt: skip
  model = FlaxWhisperForConditionalGeneration(config, input_shape=(1, 16, 32))
  objective = lambda outputs, tokens: problem.cross_entropy(outputs.logits, tokens)
  tokens = problem.labels(V, T)
  inputs = {"input_features": problem.images(16, 32), "decoder_input_ids": jnp.roll(tokens, 1, 1)}
  return _problem(model, inputs, objective, tokens)


@TRANSFORMERS.model("Wav2Vec2, classifier head", "Linen")
def wav2vec2() -> Problem:
  from transformers import FlaxWav2Vec2ForCTC, Wav2Vec2Config

  config = Wav2Vec2Config(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), feat_extract_norm="layer",
    do_stable_layer_norm=True, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
  )  # fmt: skip
  model = FlaxWav2Vec2ForCTC(config, input_shape=(1, 400))
  objective = lambda outputs, y: problem.cross_entropy(outputs.logits.mean(1), y)
  return _problem(model, {"input_values": problem.images(400)}, objective, problem.labels(V))


@TRANSFORMERS.model("BEiT", "Linen")
def beit() -> Problem:
  from transformers import BeitConfig, FlaxBeitForImageClassification

  config = BeitConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=32, patch_size=8, num_labels=10, use_relative_position_bias=True,
    use_absolute_position_embeddings=True, layer_scale_init_value=0.1,
  )  # fmt: skip
  model = FlaxBeitForImageClassification(config)
  objective = lambda outputs, y: problem.cross_entropy(outputs.logits, y)
  return _problem(model, {"pixel_values": problem.images(3, 32, 32)}, objective, problem.labels(10))

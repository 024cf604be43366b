"""Workloads of MLCommons' AlgoPerf benchmark, in Flax Linen."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

ALGOPERF = Collection(
  "AlgoPerf",
  repository="mlcommons/algorithmic-efficiency",
  commit="2c90454fc05d5bdf3598b0c7651e611f132a7060",
)


def _models(workload: str) -> Any:
  """The models of a workload; the package's own `__init__` needs a file that installing writes."""
  problem.namespace("algoperf")
  return ALGOPERF.load(f"algoperf/workloads/{workload}_jax/models.py")


def _binary(logits: jax.Array, y: jax.Array) -> jax.Array:
  y = y.reshape(logits.shape)
  return jnp.mean(jax.nn.softplus(logits) - y * logits)


@ALGOPERF.model("DLRM (Criteo)", "Linen")
def dlrm() -> Problem:
  models = _models("criteo1tb/criteo1tb")
  model = models.DlrmSmall(
    vocab_size=128, mlp_bottom_dims=(32, 16), mlp_top_dims=(64, 32, 1), embed_dim=16
  )
  numbers, ids = problem.images(13), problem.labels(10_000, 26)
  x = jnp.concatenate([numbers, ids.astype(numbers.dtype)], 1)
  return problem.linen(model, [x], _binary, problem.labels(3) - 1.0, train=True)


@ALGOPERF.model("U-Net (fastMRI)", "Linen")
def unet() -> Problem:
  models = _models("fastmri/fastmri")
  model = models.UNet(num_channels=8, num_pool_layers=2)
  objective = lambda outputs, y: jnp.mean(jnp.abs(outputs - y))
  x = problem.images(32, 32)
  return problem.linen(model, [x], objective, x, train=True)


@ALGOPERF.model("graph network (ogbg)", "Linen")
def graphs() -> Problem:
  models = _models("ogbg/ogbg")
  model = models.GNN(num_outputs=8, latent_dim=32, hidden_dims=(32,), num_message_passing_steps=2)
  return problem.graphs(
    lambda graph: model.init(problem.KEY, graph, train=False)["params"],
    lambda params, graph, key: model.apply(
      {"params": params}, graph, train=True, rngs={"dropout": key}
    ),
    lambda logits: _binary(logits, jnp.ones_like(logits)),
  )


@ALGOPERF.model("Conformer (LibriSpeech)", "Linen")
def conformer() -> Problem:
  models = _models("librispeech_conformer/librispeech")
  config = models.ConformerConfig(
    vocab_size=32, encoder_dim=32, num_attention_heads=4, num_encoder_layers=2, use_specaug=False
  )
  return _speech(models.Conformer(config))


@ALGOPERF.model("DeepSpeech (LibriSpeech)", "Linen")
def deepspeech() -> Problem:
  models = _models("librispeech_deepspeech/librispeech")
  config = models.DeepspeechConfig(
    vocab_size=32, encoder_dim=32, num_lstm_layers=2, num_ffn_layers=2, use_specaug=False
  )
  return _speech(models.Deepspeech(config))


def _speech(model: Any) -> Problem:
  import optax

  sound, silence = 0.1 * problem.images(3200), jnp.zeros((problem.BATCH, 3200))

  def ctc(outputs, tokens):
    logits, paddings = outputs
    return jnp.mean(optax.ctc_loss(logits, paddings, tokens, jnp.zeros(tokens.shape)))

  return problem.linen(model, [sound, silence], ctc, problem.labels(32, 2), train=True)

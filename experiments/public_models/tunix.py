"""The language models of Google's tunix, in Flax NNX."""

from typing import Any

import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

TUNIX = Collection(
  "tunix", repository="google/tunix", commit="c7d8950f12a9c55a976bf2e1a0d8b447d71c20b3"
)


def _language_model(model: Any) -> Problem:
  """The loss of a causal model over whole sequences."""
  tokens = problem.labels(96, 16)
  mask = jnp.tril(jnp.ones((16, 16), bool))

  def forward(model, tokens):
    shape = (len(tokens), 16)
    positions = jnp.broadcast_to(jnp.arange(16), shape)
    return model(tokens, positions, None, jnp.broadcast_to(mask, (*shape, 16)))[0]

  return problem.nnx(model, [tokens], problem.next_token, tokens, forward=forward)


@TUNIX.model("Qwen3 with 4 experts", "NNX")
def qwen3() -> Problem:
  problem.namespace("tunix")
  from flax import nnx
  from tunix.models.qwen3 import model

  config = model.ModelConfig(
    num_layers=2, vocab_size=96, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-6, num_experts=4, num_experts_per_tok=2,
  )  # fmt: skip
  return _language_model(model.Qwen3(config, rngs=nnx.Rngs(0)))

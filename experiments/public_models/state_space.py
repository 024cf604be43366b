"""State-space models over sequences, in Flax Linen."""

import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

ANNOTATED = Collection(
  "Annotated S4",
  repository="srush/annotated-s4",
  commit="f19e2464990f0c07943bb922894d6f2af65c9bd9",
)
LRU = Collection(
  "minimal-LRU",
  repository="NicolasZucchet/minimal-LRU",
  commit="bbd71b1104c399ec0d13819527d791949e66f599",
)
MAMBA = Collection(
  "mamba-jax",
  repository="shjwudp/mamba-jax",
  commit="b956fec5e898e3b56b8cb4a94c19759a0adae784",
)
GRIFFIN = Collection(
  "recurrentgemma",
  repository="google-deepmind/recurrentgemma",
  commit="2efa84dac0e68e63547a27a18fa943c98f1c312e",
)
LENGTH = 16


def _log_likelihood(log_probabilities: jax.Array, targets: jax.Array) -> jax.Array:
  """Both S4's and LRU's networks end in a logarithmic softmax."""
  return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], -1))


@ANNOTATED.model("S4", "Linen")
def s4() -> Problem:
  """Images pixel by pixel; eight features a state, as their configuration for CIFAR has."""
  problem.namespace("s4")
  models = importlib.import_module("s4.s4")
  model = models.BatchStackedModel(
    layer_cls=models.S4Layer, layer={"N": 4, "l_max": LENGTH}, d_output=10, d_model=32, n_layers=2,
    dropout=0.1, classification=True,
  )  # fmt: skip
  return problem.linen(model, [problem.images(LENGTH, 1)], _log_likelihood, problem.labels(10))


@LRU.model("LRU", "Linen")
def lru() -> Problem:
  from lru import model as models

  model = models.BatchClassificationModel(
    lru=functools.partial(models.LRU, d_hidden=16, d_model=32), d_output=10, d_model=32, n_layers=2,
    norm="layer",
  )  # fmt: skip
  return problem.linen(model, [problem.images(LENGTH, 3)], _log_likelihood, problem.labels(10))


@MAMBA.model("Mamba", "Linen")
def mamba() -> Problem:
  from mamba_ssm_jax.modules import mamba_simple as models

  config = models.MambaConfig(d_model=32, d_inner=64, d_state=8, d_conv=4, n_layer=2, vocab_size=96)
  tokens = problem.labels(96, LENGTH)
  objective = lambda outputs, tokens: problem.next_token(outputs.logits, tokens)
  return problem.linen(models.MambaLMHeadModel(config), [tokens], objective, tokens)


@GRIFFIN.model("Griffin", "Linen")
def griffin() -> Problem:
  with mock.patch("typeguard.typechecked", lambda function: function):  # 4 cannot read "*b t d"
    from recurrentgemma import common
    from recurrentgemma.jax import griffin as models

  block = common.TemporalBlockType
  config = common.GriffinConfig(
    vocab_size=96, width=32, mlp_expanded_width=64, num_heads=2, lru_width=32,
    block_types=(block.RECURRENT, block.RECURRENT, block.ATTENTION),
    embeddings_scale_by_sqrt_dim=True, attention_window_size=8, logits_soft_cap=30.0,
    scan_type=common.ScanType.LINEAR_NATIVE,
  )  # fmt: skip
  tokens = problem.labels(96, LENGTH)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
  objective = lambda outputs, tokens: problem.next_token(outputs[0], tokens)
  return problem.linen(models.Griffin(config), [tokens, positions], objective, tokens)

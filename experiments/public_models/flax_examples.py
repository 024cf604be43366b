"""The examples of the Flax repository."""

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

FLAX = Collection(
  "Flax examples",
  repository="google/flax",
  commit="18f8f311c275d57f46d95e41b15aa97b454754c0",
  root="examples",
)


@FLAX.model("VAE", "Linen")
def vae() -> Problem:
  models = FLAX.load("vae/models.py")
  model = models.VAE(latents=20)
  x = jax.nn.sigmoid(problem.images(784))
  params = model.init(problem.KEY, x, problem.KEY)["params"]

  def loss_fn(params, x, key):
    logits, mean, logvar = model.apply({"params": params}, x, key)
    likelihood = jnp.sum(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits), 1)
    divergence = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), 1)
    return jnp.mean(divergence - likelihood)

  return Problem(loss_fn, params, (x, problem.KEY))


@FLAX.model("LSTM seq2seq", "Linen")
def seq2seq() -> Problem:
  models = FLAX.load("seq2seq/models.py")
  vocabulary, length = 15, 8
  model = models.Seq2seq(teacher_force=True, hidden_size=48, vocab_size=vocabulary)
  tokens = problem.labels(vocabulary, length)
  hot = jax.nn.one_hot(tokens, vocabulary)
  objective = lambda outputs, tokens: problem.cross_entropy(outputs[0], tokens[:, 1:])
  return problem.linen(model, [hot, hot], objective, tokens)


@FLAX.model("Transformer (WMT)", "Linen")
def wmt() -> Problem:
  models = FLAX.load("wmt/models.py")
  config = models.TransformerConfig(
    vocab_size=96, output_vocab_size=96, share_embeddings=True, logits_via_embedding=True,
    emb_dim=32, num_heads=4, num_layers=2, qkv_dim=32, mlp_dim=64, max_len=16,
  )  # fmt: skip
  tokens = problem.labels(96, 16)
  return problem.linen(models.Transformer(config), [tokens, tokens], problem.cross_entropy, tokens)


@FLAX.model("language model (LM1B)", "Linen")
def lm1b() -> Problem:
  models = FLAX.load("lm1b/models.py")
  config = models.TransformerConfig(
    vocab_size=96, output_vocab_size=96, emb_dim=32, num_heads=4, num_layers=2, qkv_dim=32,
    mlp_dim=64, max_len=16,
  )  # fmt: skip
  tokens = problem.labels(96, 16)
  return problem.linen(models.TransformerLM(config), [tokens], problem.cross_entropy, tokens)


@FLAX.model("LSTM with attention (SST-2)", "Linen")
def sst2() -> Problem:
  models = FLAX.load("sst2/models.py")
  model = models.TextClassifier(
    embedding_size=32, hidden_size=32, vocab_size=96, output_size=1, dropout_rate=0.1,
    word_dropout_rate=0.1, unk_idx=1,
  )  # fmt: skip
  objective = lambda logits, y: jnp.mean(
    jax.nn.softplus(jnp.where(y > 0, -logits[:, 0], logits[:, 0]))
  )
  inputs = [problem.labels(96, 12), problem.labels(12)]
  return problem.linen(model, inputs, objective, problem.labels(3) - 1, deterministic=False)


@FLAX.model("actor-critic (PPO, Atari)", "Linen")
def ppo() -> Problem:
  models = FLAX.load("ppo/models.py")
  model = models.ActorCritic(num_outputs=4)

  def objective(outputs, actions, returns):
    log_probabilities, values = outputs
    chosen = jnp.take_along_axis(log_probabilities, actions[:, None], 1)[:, 0]
    advantages = jax.lax.stop_gradient(returns - values[:, 0])
    return jnp.mean(0.5 * (returns - values[:, 0]) ** 2 - advantages * chosen)

  actions, returns = problem.labels(4), problem.images()
  return problem.linen(model, [problem.images(84, 84, 4)], objective, actions, returns)


@FLAX.model("graph network (ogbg-molpcba)", "Linen")
def graphs() -> Problem:
  models = FLAX.load("ogbg_molpcba/models.py")
  make = lambda deterministic: models.GraphNet(
    latent_size=32, num_mlp_layers=2, message_passing_steps=2, output_globals_size=8,
    dropout_rate=0.1, deterministic=deterministic,
  )  # fmt: skip
  return problem.graphs(
    lambda graph: make(True).init(problem.KEY, graph)["params"],
    lambda params, graph, key: make(False).apply({"params": params}, graph, rngs={"dropout": key}),
    lambda graph: jnp.mean(jax.nn.softplus(-graph.globals)),
  )

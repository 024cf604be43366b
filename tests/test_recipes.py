"""The recipes of the README compose: two compiled steps each, all finite, all parameters move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from selection import slow_but

import fop_optax


def loss(params, tokens, y):
  """An embedding, two layers of equal shape with biases, a norm scale, a head outputs first."""
  x = params["embedding"][tokens] * params["gain"]
  for i in range(2):
    x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
  return fop_optax.softmax_cross_entropy(x @ params["head"].T, y)


def make_params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
  layers = {f"w{i}": draw(5, 5) for i in range(2)} | {f"b{i}": 0.1 * draw(5) for i in range(2)}
  return layers | {"embedding": draw(9, 5), "head": draw(9, 5), "gain": jnp.ones(5)}


PARAMS = make_params()
Y = jnp.arange(16) % 9
BATCH = (3 * Y) % 9, Y
CAPTURED = fop_optax.capture(loss, PARAMS, *BATCH)
LAYERS = CAPTURED.layers
POLAR = fop_optax.orthogonalize(layers=LAYERS)
RATE = optax.scale_by_learning_rate(0.02)
KFAC = fop_optax.scale_by_kfac(LAYERS, relative_damping=1e-2)
SOAP = fop_optax.scale_by_soap(inverse_update_period=1, layers=LAYERS)


def matrices(params):
  """Matrices here, the rest elsewhere; also the embedding and the head."""
  return {name: "matrices" if name in ("w0", "w1") else "rest" for name in params}


RECIPES = {
  "soap-muon": optax.chain(SOAP, POLAR, RATE),
  "soap, one-sided by size, then polar": optax.chain(
    fop_optax.scale_by_soap(inverse_update_period=1, max_precond_dim=8), POLAR, RATE
  ),
  "newton-muon": optax.chain(KFAC, optax.trace(0.95), POLAR, RATE),
  "kfac then polar": optax.chain(KFAC, optax.trace(0.9), POLAR, RATE),
  "kl-soap": fop_optax.soap(
    3e-3,
    0.9,
    0.95,
    kl=True,
    correct_bias=False,
    start="identity",
    inverse_update_period=1,
    weight_decay=0.1,
    layers=LAYERS,
  ),
  "adam-h": optax.chain(optax.scale_by_adam(0.9, 0.95), fop_optax.hyperball(0.018)),
  "soap-h": optax.chain(
    fop_optax.scale_by_soap(inverse_update_period=1, correct_bias=False),
    fop_optax.hyperball(0.018),
  ),
  "matrices here, the rest adamw": optax.partition(
    {"matrices": optax.chain(SOAP, POLAR, RATE), "rest": optax.adamw(3e-3)}, matrices
  ),
}


@pytest.mark.parametrize("recipe", slow_but(RECIPES, "matrices here, the rest adamw"))
def test_recipe(recipe):
  tx = RECIPES[recipe]

  @jax.jit
  def step(params, state):
    _, grads, stats = CAPTURED.value_and_grad(params, *BATCH)
    stats = stats.inputs_only() if recipe == "newton-muon" else stats
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  params, state = step(*step(PARAMS, tx.init(PARAMS)))
  assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
  moved = {name: bool(jnp.any(params[name] != own)) for name, own in PARAMS.items()}
  assert all(moved.values()), moved

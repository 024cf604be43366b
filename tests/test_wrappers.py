"""The table of optax's wrappers in the README, row by row: what works, and what to do instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import problems
import pytest

import fop_optax

SIZES = ((5, 5), (5, 5))  # one stack: quick to compile
PARAMS = problems.make_params(sizes=SIZES)
LAYERS = problems.layers_of(PARAMS)
OPTIONS = {
  "damping": 1e-3,
  "momentum": None,
  "norm_constraint": None,
  "curvature_update_period": 10,
  "fallback": optax.sgd(0.1),
}
MAKERS = {
  name: functools.partial(make, layers=LAYERS, **OPTIONS)
  for name, make in (("kfac", fop_optax.kfac), ("fop", fop_optax.fop))
}
OPTIMIZERS = {name: make(0.1) for name, make in MAKERS.items()}
BATCHES = [
  problems.value_and_grad(PARAMS, problems.make_batch(seed=seed, sizes=SIZES))[1:]
  for seed in range(2)
]
GRADS, STATS = BATCHES[0]
FROZEN = {"fc0": True, "fc1": False, "gain": False}


@pytest.fixture(params=list(OPTIMIZERS))
def name(request):
  return request.param


def first(tx, grads=GRADS, stats=STATS):
  """The first update and the state after it."""
  return tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)


def close(a, b):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), a, b)


@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.chain(tx, optax.ema(0.9)),  # its first average is the update itself
    lambda tx: optax.chain(tx, optax.snapshot("norm", optax.tree.norm)),
  ],
  ids=["apply_if_finite", "ema", "snapshot"],
)
def test_around_the_update(name, wrap):
  tx = OPTIMIZERS[name]
  wrapped, state = first(wrap(tx))
  close(wrapped, first(tx)[0])
  assert not fop_optax.refresh_due(state)


def test_schedule_free(name):
  tx = OPTIMIZERS[name]
  _, state = first(optax.contrib.schedule_free(tx, learning_rate=0.1))
  close(state.z, optax.apply_updates(PARAMS, first(tx)[0]))


@pytest.mark.parametrize("wrapper", ["partition", "masked", "freeze", "selective_transform"])
def test_a_layer_kept_out(name, wrapper):
  """All but `freeze`, which comes after, take the weight with its bias or neither."""
  tx = OPTIMIZERS[name]
  labels = {k: "frozen" if frozen else "train" for k, frozen in FROZEN.items()}
  by_leaf = jax.tree.map(lambda _: False, PARAMS) | {"fc0": {"b": True, "w": True}}
  wrapped = {
    "partition": lambda: optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels),
    "masked": lambda: optax.masked(tx, {k: not frozen for k, frozen in FROZEN.items()}),
    "freeze": lambda: optax.chain(tx, optax.freeze(by_leaf)),
    "selective_transform": lambda: optax.selective_transform(tx, freeze_mask=by_leaf),
  }[wrapper]()
  updates, _ = first(wrapped)
  kept = GRADS["fc0"] if wrapper == "masked" else jax.tree.map(jnp.zeros_like, GRADS["fc0"])
  close(updates, first(tx)[0] | {"fc0": kept})


def test_inject_hyperparams(name):
  tx = optax.inject_hyperparams(MAKERS[name])(0.1)
  updates, state = first(tx)
  assert state.hyperparams["learning_rate"] == np.float32(0.1)
  close(updates, first(OPTIMIZERS[name])[0])


def test_multi_steps_hands_on_the_last_statistics(name):
  tx = optax.MultiSteps(OPTIMIZERS[name], 2)
  state = tx.init(PARAMS)
  for grads, stats in BATCHES:
    updates, state = tx.update(grads, state, PARAMS, stats=stats)
  mean = jax.tree.map(lambda *g: sum(g) / 2, *(grads for grads, _ in BATCHES))
  close(updates, first(OPTIMIZERS[name], mean, BATCHES[1][1])[0])


def test_lookahead_takes_no_statistics(name):
  tx = optax.lookahead(OPTIMIZERS[name], 5, 0.5)
  params = optax.LookaheadParams.init_synced(PARAMS)
  with pytest.raises(TypeError, match="stats"):
    tx.update(GRADS, tx.init(params), params, stats=STATS)
  with pytest.raises(ValueError, match="No `stats`"):
    tx.update(GRADS, tx.init(params), params)
  # Instead: the slow weights by hand, every so many steps.
  slow, fast = PARAMS, optax.apply_updates(PARAMS, first(OPTIMIZERS[name])[0])
  slow = fast = optax.incremental_update(fast, slow, 0.5)
  close(fast, jax.tree.map(lambda p, u: p + 0.5 * u, PARAMS, first(OPTIMIZERS[name])[0]))

"""Bad input to the optimizers: each message says what came and what to write instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax
from fop_optax.layers import Layers

PARAMS = problems.make_params()
LAYERS = problems.layers_of(PARAMS)
BATCH = problems.make_batch()


@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.fop])
@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"damping": -1e-3}, "`damping=-0.001` should be at least 0"),
    ({"relative_damping": -1.0}, "`relative_damping=-1.0` should be at least 0"),
    ({"decay": 1.0}, r"`decay=1.0` should be in \[0, 1\)"),
    ({"momentum": -0.1}, r"`momentum=-0.1` should be in \[0, 1\)"),
    ({"weight_decay": -1}, "`weight_decay=-1` should be at least 0"),
    ({"curvature_update_period": 0}, "`curvature_update_period=0` should be a whole number"),
    ({"inverse_update_period": 2.5}, "`inverse_update_period=2.5` should be a whole number"),
    ({"norm_constraint": 0.0}, "`norm_constraint=0.0` should be above 0"),
    ({"scaling": "exakt"}, "`scaling='exakt'` should be one of 'factored', 'exact'"),
    ({"factor_dtype": jnp.int8}, "`factor_dtype=.*int8.*` should be a floating dtype, as jnp.bf"),
    ({"factor_dtype": "half?"}, "`factor_dtype='half[?]'` should be a floating dtype"),
    ({"factor_dtype": jnp.ones(())}, 'declare it with .*static_args="factor_dtype"'),
    ({"mask": True}, '`mask=True` .*static_args="mask"'),
    ({"learning_rate": None}, "`learning_rate=None`: it takes a number"),
    ({"learning_rate": True}, "`learning_rate` should be one number .* not True"),
    (
      {"learning_rate": LAYERS},
      r"the rate comes first, as in `fop_optax.kfac\(0.1, captured.layers",
    ),
    ({"learning_rate": optax.adam(0.1)}, "not a GradientTransformation"),
    ({"learning_rate": [0.1, 0.2]}, r"`learning_rate` should be one number .* not \[0.1, 0.2\]"),
    ({"learning_rate": np.ones(2)}, r"not float64\[2\]. For parameters .* `optax.partition`"),
    ({"damping": jnp.ones((1,))}, r"`damping` should be one number .* not float32\[1\]"),
    ({"momentum": "0.9"}, "`momentum` should be one number .* not '0.9'"),
  ],
)
def test_hyperparameters(make, kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**{"learning_rate": 0.1, "layers": LAYERS} | kwargs)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [({"period": 0}, "period=0.*at least 1"), ({"steps": -1}, "steps=-1"), ({"steps": 0.5}, "0.5")],
)
def test_warmup_period(kwargs, message):
  with pytest.raises(ValueError, match=message):
    fop_optax.WarmupPeriod(**kwargs)


def test_arrays_without_axes_are_numbers():
  for number in (np.float32(0.1), np.array(0.1), jnp.asarray(0.1)):
    fop_optax.kfac(number, LAYERS, damping=number, momentum=number)


def test_a_schedule_of_vectors():
  schedule = lambda count: jnp.ones(2)
  with pytest.raises(ValueError, match=r"schedule returned float32\[2\] where .* one number"):
    update(make=lambda rate, layers: fop_optax.kfac(rate, layers, damping=schedule))


@pytest.mark.parametrize(
  ("groups", "kwargs", "message"),
  [
    (2, {"projection_metric": "euclid"}, "one of 'fisher', 'damped', 'inverse'"),
    (2, {"total_gradient": "both"}, '`total_gradient` is "mean" or "sum", not \'both\''),
    (1, {}, "captured with groups=1: use .*groups=2"),
    (
      3,
      {"beta": 0.5},
      "groups=3 of examples: with more than two groups it would depend on the basis",
    ),
  ],
)
def test_fop_hyperparameters(groups, kwargs, message):
  layers = problems.layers_of(PARAMS, groups)
  for make in (fop_optax.scale_by_fop, lambda layers, **k: fop_optax.fop(0.1, layers, **k)):
    with pytest.raises(ValueError, match=message):
      make(layers, **kwargs)


def test_negative_learning_rate():
  with pytest.raises(ValueError, match="`learning_rate=-0.1` should be at least 0"):
    fop_optax.kfac(-0.1, LAYERS)


def test_layers_of_another_type():
  with pytest.raises(TypeError, match=r"`layers` is a dict, not a `Layers`.*captured.layers"):
    fop_optax.kfac(0.1, {})
  with pytest.raises(ValueError, match="`layers` is empty"):
    fop_optax.kfac(0.1, Layers((), (), (), 2))


@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.fop])
@pytest.mark.parametrize(
  ("fallback", "message"),
  [({}, r"not \{\}"), (optax.adam, "not the function adam"), (LAYERS, "not a Layers")],
)
def test_a_fallback_that_is_no_optimizer(make, fallback, message):
  with pytest.raises(TypeError, match=f"`fallback` should be an `optax.Grad.*{message}"):
    make(0.1, LAYERS, fallback=fallback)


def test_by_group_of_something_else():
  with pytest.raises(TypeError, match="`inner` should be an `optax.*not 0.01"):
    fop_optax.by_group(0.01)


@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.fop])
def test_a_callable_mask_has_to_be_static_when_injected(make):
  mask = lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)
  tx = optax.inject_hyperparams(make)(0.1, LAYERS, mask=mask)
  with pytest.raises(ValueError, match='declare it with.*static_args="mask"'):
    tx.init(PARAMS)
  tx = optax.inject_hyperparams(make, static_args="mask")(0.1, LAYERS, mask=mask)
  tx.init(PARAMS)


def update(change=lambda grads, stats: (grads, stats), make=fop_optax.fop):
  tx = make(0.1, LAYERS)
  _, grads, stats = problems.value_and_grad(PARAMS, BATCH)
  grads, stats = change(grads, stats)
  return tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)


def test_statistics_go_by_name():
  tx = fop_optax.kfac(0.1, LAYERS)
  _, grads, stats = problems.value_and_grad(PARAMS, BATCH)
  with pytest.raises(TypeError, match="write `tx.update.grads, opt_state, params, stats=stats"):
    tx.update(grads, tx.init(PARAMS), PARAMS, stats)


def test_diagnostics_take_layers():
  state = fop_optax.kfac(0.1, LAYERS).init(PARAMS)
  with pytest.raises(TypeError, match="has a tuple for layers: pass `captured.layers`"):
    fop_optax.diagnostics(state, (LAYERS,))


def other_factors(grads, stats):
  return grads, stats._replace(factors=stats.factors[::-1])


def fewer_factors(grads, stats):
  return grads, stats._replace(factors=stats.factors[:1])


@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.fop])
@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (
      lambda g, s: (g, None),
      ValueError,
      r"No `stats`.*`tx.update\(grads, opt_state, params, stats=stats\)`.*`TrainState."
      r"apply_gradients` cannot hand them on",
    ),
    (
      lambda g, s: (g, {"A": 1}),
      TypeError,
      "`stats` is a dict: pass the third of what `captured.value_and_grad`",
    ),
    (other_factors, ValueError, "`stats` are of another loss: their factors have shapes"),
    (fewer_factors, ValueError, "`stats` are of another loss"),
    (
      lambda g, s: (g, s._replace(contrasts=())),
      ValueError,
      "`stats` have 0 contrasts, but these layers were captured with groups=2",
    ),
    (
      lambda g, s: ({"gain": g["gain"]}, s),
      ValueError,
      r"lacks \['fc0'\]\['b'\], .* and 3 more of params",
    ),
    (
      lambda g, s: ({**g, "gain": jnp.ones(3)}, s),
      ValueError,
      r"is float32\[3\] at \['gain'\], where params are float32\[6\]\. Pass the",
    ),
  ],
)
def test_what_comes_in(make, change, error, message):
  with pytest.raises(error, match=message):
    update(change, make)


def test_wrong_params_in_init():
  for params in ({"w": jnp.ones(3)}, {**PARAMS, "gain": jnp.ones(3)}):
    with pytest.raises(ValueError, match=r"Pass the tree that went into `fop_optax.capture"):
      fop_optax.kfac(0.1, LAYERS).init(params)


@pytest.mark.parametrize("part", ["b", "w"])
def test_a_layer_masked_in_part(part):
  mask = jax.tree.map(lambda _: True, PARAMS)
  mask["fc1"][part] = False
  names = rf"\['fc1'\]\['{part}'\]"
  for tx in (
    optax.masked(fop_optax.kfac(0.1, LAYERS), mask),
    optax.masked(fop_optax.fop(0.1, LAYERS), mask),
  ):
    with pytest.raises(ValueError, match=f"masked in part: {names} is masked, the rest is not"):
      tx.init(PARAMS)


def test_refresh_due_finds_one_state():
  with pytest.raises(ValueError, match=r"found no curvature state.*`tx.init\(params\)`"):
    fop_optax.refresh_due(optax.adam(0.1).init(PARAMS))
  state = optax.chain(fop_optax.kfac(0.1, LAYERS), fop_optax.fop(0.1, LAYERS)).init(PARAMS)
  with pytest.raises(ValueError, match="found 2 curvature states, at") as caught:
    fop_optax.refresh_due(state)
  where = re.findall(r"opt_state(\[\d\])\.inner_states", str(caught.value))
  assert where == ["[0]", "[1]"]
  with pytest.raises(ValueError, match="found 2 states of this library"):
    fop_optax.diagnostics(state)


def test_diagnostics_under_jit():
  state = fop_optax.kfac(0.1, LAYERS).init(PARAMS)
  with pytest.raises(ValueError, match="under `jax.jit` needs `layers`"):
    jax.jit(fop_optax.diagnostics)(state)
  masked = optax.masked(fop_optax.kfac(0.1, LAYERS), {name: name != "fc2" for name in PARAMS})
  with pytest.raises(ValueError, match="which of the layers are masked"):
    jax.jit(lambda state: fop_optax.diagnostics(state, LAYERS))(masked.init(PARAMS))

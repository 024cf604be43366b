"""The experiments' optimizers: their numbers are arguments of one program, their parts are kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from selection import slow_but

from experiments import configs, data, networks, optimizers, parts, tasks, training
from experiments.models import speedrun


def digits(**changes):
  config, _ = configs.load("digits_mlp")
  own = {"model": networks.Mlp((8,)), "epochs": 2, "looped": False} | changes
  return dataclasses.replace(config, **own)


@functools.cache
def task_of():
  with jax.ensure_compile_time_eval():
    return tasks.classification(digits(), data.load("digits"))


def other_values(hyper):
  """The same optimizer with every number another one."""
  numbers = {name: 0.7 * float(value) + 1e-3 for name, value in training.numbers_of(hyper).items()}
  return dataclasses.replace(hyper, **numbers)


@pytest.mark.parametrize("name", slow_but(list(optimizers.TABLE), "sgd", "kfac"))
def test_a_program_compiled_for_other_numbers_takes_the_same_steps(name):
  """Against the optimizer made with the numbers themselves."""
  config, task = digits(), task_of()
  compiled_for = getattr(config, name)
  hyper = other_values(compiled_for)
  assert training.structure_of(hyper) == training.structure_of(compiled_for)
  program = training.build(config, compiled_for, task).of(hyper)
  state, start = program.init(0), jnp.uint32(0)

  layers, gradient = training.gradient_of(config, hyper, task)
  schedule = training.schedule_of(config, hyper.learning_rate, config.epochs * task.steps)
  tx = optax.with_extra_args_support(training.with_steps(hyper, task).make(schedule, layers))

  @jax.jit
  def step(state, fed):
    picked, drawn = jax.random.split(jax.random.fold_in(jax.random.key(start), state.step))
    batch = task.pick(task.arrays, fed, picked)
    _, model, grads, extra = gradient(state, batch, drawn)
    updates, optimizer = tx.update(grads, state.optimizer, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, model=model, optimizer=optimizer)

  want = program.init(0)
  for fed in training.calls(config, task, 0, 0, 3):
    state, _ = program.advance(state, task.arrays, fed, start, program.values)
    want = step(want, jax.tree.map(lambda x: x[0], fed))
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", slow_but(list(optimizers.TABLE), "kfac", "soap"))
def test_numbers_may_be_zero(name):
  """A stage that is left out for a Python zero is in the program, whatever the number."""
  config, task = digits(), task_of()
  hyper = getattr(config, name)
  if "weight_decay" in {field.name for field in dataclasses.fields(hyper)}:
    hyper = dataclasses.replace(hyper, weight_decay=0.0)
  program = training.build(config, hyper, task)
  state = program.init(0)
  (fed,) = training.calls(config, task, 0, 0, 1)
  state, loss = program.advance(state, task.arrays, fed, jnp.uint32(0), program.values)
  assert np.isfinite(loss).all()


def test_parts_of_the_speed_run():
  """Filters keep their norm and turn by the rate; the first bias stops; the rest is SGD."""
  model = speedrun.speedrun(width=0.05)
  params, _ = model.init(0)
  own = parts.Parts(whitening_epochs=1)
  hyper = optimizers.Sgd(0.1, rest=0.5, momentum=0.0)
  schedule = lambda peak: optax.linear_schedule(peak, 0.0, 4)
  tx = parts.divided(own, hyper, None, schedule, steps_per_epoch=2)
  state = tx.init(params)
  rng = np.random.default_rng(0)
  before, after = params, params
  moved = []
  for _ in range(4):
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), before)
    updates, state = tx.update(grads, state, before)
    after = optax.apply_updates(before, updates)
    moved.append((before, grads, after))
    before = after
  labels = jax.tree_util.tree_map_with_path(parts.label, params)
  assert set(jax.tree.leaves(labels)) == {"filters", "head", "biases", "whitening"}
  names = jax.tree.leaves(labels)
  of_each = lambda tree: dict(zip(names, jax.tree.leaves(tree), strict=True))  # one leaf of each
  steps = [[of_each(tree) for tree in own] for own in moved]
  for count, (old, _, new) in enumerate(steps):
    share = 1 - count / 4
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(new["filters"]), norm(old["filters"]), rtol=1e-5)
    turned = jnp.vdot(old["filters"], new["filters"]) / norm(old["filters"]) ** 2
    assert 0 <= 1 - turned < 0.75 * (0.1 * share) ** 2 + 1e-6
    if count < 2:
      assert jnp.any(new["whitening"] != old["whitening"])
    else:
      np.testing.assert_array_equal(new["whitening"], old["whitening"])
  # the first step of Nesterov's momentum m is 1 + m times the gradient, with its decay
  old, grad, new = steps[0]
  for name, rate in (("head", own.head), ("biases", own.biases)):
    step = 0.5 * rate * grad[name] + own.weight_decay * old[name]
    want = old[name] - (1 + own.momentum) * step
    np.testing.assert_allclose(new[name], want, rtol=1e-4)

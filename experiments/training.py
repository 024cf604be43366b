"""One training step for every optimizer, and the program that takes many of them in one call.

An optimizer's numbers (rate, damping, decay, ...) are arguments of the program: it is compiled once
for all their values.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import parts
from experiments.configs import Config
from experiments.optimizers import Neumann, Optimizer
from experiments.tasks import Task
import fop_optax


class State(NamedTuple):
  """All that a run needs to go on, but for what follows from the seed and the step."""

  step: jax.Array  # int32, shape=(): steps taken
  params: Any
  model: Any  # what the model keeps beside its parameters, such as BatchNorm's averages
  optimizer: Any
  average: Any  # running average of the parameters, None without one


class Program(NamedTuple):
  """An optimizer's training, compiled."""

  init: Callable[[int], State]  # seed -> state
  # state, arrays of the task, one of `calls`, seed, values of `numbers_of`
  # -> state, losses [steps]; consumes the state
  advance: Callable[[State, Any, Any, jax.Array, dict[str, Any]], tuple[State, jax.Array]]
  values: dict[str, Any]
  evaluated: Callable[[State], Any]  # the parameters that an evaluation is of
  layers: fop_optax.Layers
  compile_seconds: float

  def of(self, hyper: Optimizer) -> "Program":
    """The same for another optimizer of `structure_of(hyper)`."""
    return self._replace(values=numbers_of(hyper))


def numbers_of(hyper: Optimizer) -> dict[str, Any]:
  """The values of an optimizer that its program is fed with: all real numbers."""
  fields = dataclasses.asdict(hyper)
  return {name: np.float32(own) for name, own in fields.items() if isinstance(own, float)}


def structure_of(hyper: Optimizer) -> tuple[Any, ...]:
  """What its program is compiled for: everything else."""
  fields = dataclasses.asdict(hyper)
  return type(hyper), *(
    (name, "a number" if isinstance(own, float) else own) for name, own in fields.items()
  )


def schedule_of(config: Config, peak: Any, steps: int) -> optax.Schedule:
  """A linear warm-up from a first step above zero, then what `config.schedule` says."""
  warmup = round(config.warmup * steps)
  rest = max(steps - warmup, 1)
  decay = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    "staircase": lambda: optax.exponential_decay(
      peak, round(config.stair_epochs * steps / config.epochs), config.stair, staircase=True
    ),
    "constant": lambda: optax.constant_schedule(peak),
    "plateau": lambda: optax.constant_schedule(peak),  # what comes off it follows the losses
    # to a hundredth
    "exponential": lambda: optax.exponential_decay(peak, rest, 0.01),
    # a tenth at half, a hundredth at three quarters
    "step": lambda: optax.piecewise_constant_schedule(peak, {rest // 2: 0.1, 3 * rest // 4: 0.1}),
  }[config.schedule]()
  if not warmup:
    return decay
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def gradient_of(config: Config, hyper: Optimizer, task: Task) -> tuple[Any, Callable]:
  """The layers of the loss; and loss, model state, mean gradient and extra arguments of an update.

  Micro-batches are `capture`'s for all optimizers, so that they see the same batches.
  """
  params, state = task.model.shapes
  key = jax.eval_shape(lambda: jax.random.key(0))

  def loss(params, batch, state, key):
    return task.loss(params, state, batch, key)

  captured = fop_optax.capture(
    loss, params, task.batch, state, key,
    has_aux=True, batch_argnums=0, groups=hyper.groups or 1, micro_batches=config.micro_batches,
  )  # fmt: skip

  def plain(state, batch, key):
    if config.micro_batches == 1:
      aux, grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.model, key)
    else:
      args = state.params, batch, state.model, key
      aux, grads, _ = captured.value_and_grad(*args, refresh=False)
    return *aux, grads, {}

  def with_statistics(state, batch, key):
    more = {"refresh": True if hyper.always else fop_optax.refresh_due(state.optimizer)}
    if hyper.basis:
      more["basis"] = fop_optax.bases(state.optimizer)
    aux, grads, stats = captured.value_and_grad(state.params, batch, state.model, key, **more)
    return *aux, grads, {"stats": stats}

  return captured.layers, plain if hyper.groups is None else with_statistics


def with_steps(hyper: Optimizer, task: Task) -> Optimizer:
  """With the length of an epoch, of an optimizer that counts in them."""
  return (
    dataclasses.replace(hyper, steps_per_epoch=task.steps) if isinstance(hyper, Neumann) else hyper
  )


def build(config: Config, hyper: Optimizer, task: Task) -> Program:
  """Compiles the training of one optimizer."""
  hyper = with_steps(hyper, task)
  layers, gradient = gradient_of(config, hyper, task)
  steps = config.epochs * task.steps

  def transformation(hyper):
    schedule = lambda peak: schedule_of(config, peak, steps)
    if config.parts is None:
      tx = hyper.make(schedule(hyper.learning_rate), layers)
    else:
      tx = parts.divided(config.parts, hyper, layers, schedule, task.steps)
    if config.schedule == "plateau":
      tx = optax.chain(
        tx, optax.contrib.reduce_on_plateau(0.5, patience=2, accumulation_size=task.steps)
      )
    return optax.with_extra_args_support(tx)

  def of(values):
    return transformation(dataclasses.replace(hyper, **values))

  # made of the same values as in the step: what an optimizer has may depend on one being zero
  start = jax.jit(lambda params, values: of(values).init(params))

  def init(seed):
    params, model = task.model.init(seed)
    average = jax.tree.map(jnp.copy, params) if config.average else None
    return State(jnp.zeros((), jnp.int32), params, model, start(params, numbers_of(hyper)), average)

  def step(state, fed, arrays, seed, values):
    tx = of(values)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    picked, drawn = jax.random.split(key)
    batch = task.pick(arrays, fed, picked)
    loss, model, grads, extra = gradient(state, batch, drawn)
    updates, optimizer = tx.update(grads, state.optimizer, state.params, value=loss, **extra)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:  # as long as there are few, the plain mean of all
      weight = jnp.minimum(config.average, state.step / (state.step + 1))
      average = optax.incremental_update(params, average, 1 - weight)
    return State(state.step + 1, params, model, optimizer, average), loss

  def evaluated(state):
    if state.average is not None:
      return state.average
    return hyper.evaluated(state.params, state.optimizer)

  def advance(state, arrays, fed, seed, values):
    if not config.looped:
      state, loss = step(state, jax.tree.map(lambda x: x[0], fed), arrays, seed, values)
      return state, loss[None]
    return jax.lax.scan(lambda state, own: step(state, own, arrays, seed, values), state, fed)

  begin = time.perf_counter()
  (fed,) = calls(config, task, 0, 0, task.steps if config.looped else 1)
  args = task.arrays, fed, jnp.uint32(0), numbers_of(hyper)
  state = init(0)
  compiled = jax.jit(advance, donate_argnums=0).lower(state, *args).compile()
  # A first call sets up buffers and threads: it would be seen in the times of short steps.
  state, _ = jax.block_until_ready(compiled(state, *args))
  task.evaluate(state.params, state.model)
  seconds = time.perf_counter() - begin
  return Program(init, compiled, numbers_of(hyper), evaluated, layers, seconds)


def calls(config: Config, task: Task, seed: int, first: int, count: int) -> Iterator[Any]:
  """What the program is fed with from step `first` on, a call after the other: `[steps, ...]`."""
  size = count if config.looped else 1
  steps = task.feed(seed, first, count)
  while own := list(itertools.islice(steps, size)):
    yield jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *own)

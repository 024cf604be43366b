"""Flax Linen: a network with BatchNorm and dropout, trained by FOP on all devices, resumable.

    python -m experiments.examples.linen_digits [FOLDER]

Flax's `TrainState.apply_gradients` hands no extra arguments to an optimizer: here the state is a
NamedTuple, and the update is called by itself.
"""

import pathlib
import sys
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp

from experiments import data
import fop_optax

BATCH = 256


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3), strides=2)(x)))
    h = nn.Dropout(0.1, deterministic=not train)(h.reshape(len(h), -1))
    return nn.Dense(10)(h)


class State(NamedTuple):
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState


def main(folder: str = "results/linen_digits", steps: int = 100, every: int = 20) -> tuple:
  digits, model = data.load("digits"), Network()
  variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)

  def loss_fn(params, batch_stats, key, x, y):
    logits, new = model.apply(
      {"params": params, "batch_stats": batch_stats}, x, train=True,
      rngs={"dropout": key}, mutable=["batch_stats"],
    )  # fmt: skip
    return fop_optax.softmax_cross_entropy(logits, y), new["batch_stats"]

  shapes = (
    jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32),
    jax.ShapeDtypeStruct((BATCH,), jnp.int32),
  )
  captured = fop_optax.capture(
    loss_fn, variables["params"], variables["batch_stats"], jax.random.key(0), *shapes,
    has_aux=True, batch_argnums=(2, 3), groups=2, micro_batches=2,
  )  # fmt: skip
  rate = optax.warmup_cosine_decay_schedule(0.01, 0.1, steps // 10, steps)
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  tx = optax.chain(
    optax.clip_by_global_norm(10.0),
    fop_optax.fop(rate, captured.layers, weight_decay=0.1, mask=matrices),
  )

  def step(state, x, y):
    key = jax.random.fold_in(jax.random.key(1), state.step)
    refresh = fop_optax.refresh_due(state.opt_state)
    (loss, batch_stats), grads, stats = captured.value_and_grad(
      state.params, state.batch_stats, key, x, y, refresh=refresh
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params, stats=stats)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, batch_stats, opt_state), loss

  # Auto: the partitioner places what is between; dropout and the like know no Explicit axes.
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  everywhere, by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
  variables = jax.device_put(variables, everywhere)
  opt_state = tx.init(variables["params"])
  state = State(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], opt_state)
  state, compiled = jax.device_put(state, everywhere), jax.jit(step, donate_argnums=0)

  with ocp.CheckpointManager(pathlib.Path(folder).absolute()) as manager:
    if manager.latest_step() is not None:
      like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    for number in range(int(state.step), steps):
      chosen = np.random.default_rng(number).choice(len(digits.train_labels), BATCH, replace=False)
      x = (digits.train_images[chosen] - digits.mean) / digits.std
      x, y = jax.device_put((x.astype(np.float32), digits.train_labels[chosen]), by_batch)
      state, loss = compiled(state, x, y)
      if (number + 1) % every == 0:
        print(f"step {number + 1:4d}  loss {loss:.4f}")
        manager.save(number + 1, args=ocp.args.StandardSave(state))
  x = (digits.test_images - digits.mean) / digits.std
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  right = model.apply(variables, x, train=False).argmax(-1) == digits.test_labels
  print(f"test accuracy {100 * float(right.mean()):.1f} %")
  return state, float(right.mean())


if __name__ == "__main__":
  main(*sys.argv[1:])

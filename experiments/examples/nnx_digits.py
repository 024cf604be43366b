"""Flax NNX: a network with BatchNorm and dropout, trained by K-FAC on all devices, resumable.

    python -m experiments.examples.nnx_digits [FOLDER]

Started again with the same folder, it goes on from its last checkpoint.
"""

import pathlib
import sys
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp

from experiments import data
import fop_optax

BATCH = 256


class Network(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.1)
    self.head = nnx.Linear(256, 10, rngs=rngs)

  def __call__(self, x, train, rngs=None):
    h = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
    h = self.dropout(h.reshape(len(h), -1), deterministic=not train, rngs=rngs)
    return self.head(h)


class State(NamedTuple):
  step: jax.Array
  params: nnx.State
  rest: nnx.State  # BatchNorm's averages
  opt_state: optax.OptState


def main(folder: str = "results/nnx_digits", steps: int = 100, every: int = 20) -> tuple:
  digits = data.load("digits")
  graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

  def loss_fn(params, rest, key, x, y):
    params, rest = jax.tree.map(lambda leaf: leaf, (params, rest))  # variables of this trace
    model = nnx.merge(graph, params, rest)
    logits = model(x, train=True, rngs=nnx.Rngs(dropout=key))
    return fop_optax.softmax_cross_entropy(logits, y), nnx.state(model, nnx.Not(nnx.Param))

  shapes = (
    jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32),
    jax.ShapeDtypeStruct((BATCH,), jnp.int32),
  )
  captured = fop_optax.capture(
    loss_fn, params, rest, jax.random.key(0), *shapes,
    has_aux=True, batch_argnums=(2, 3), micro_batches=2,
  )  # fmt: skip
  rate = optax.warmup_cosine_decay_schedule(0.01, 0.1, steps // 10, steps)
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  tx = optax.chain(
    optax.clip_by_global_norm(10.0),
    fop_optax.kfac(rate, captured.layers, weight_decay=0.1, mask=matrices),
  )

  def step(state, x, y):
    key = jax.random.fold_in(jax.random.key(1), state.step)
    refresh = fop_optax.refresh_due(state.opt_state)
    (loss, rest), grads, stats = captured.value_and_grad(
      state.params, state.rest, key, x, y, refresh=refresh
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params, stats=stats)
    return State(state.step + 1, optax.apply_updates(state.params, updates), rest, opt_state), loss

  # Auto: the partitioner places what is between; dropout and the like know no Explicit axes.
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  everywhere, by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
  params, rest = jax.device_put((params, rest), everywhere)
  state = jax.device_put(State(jnp.zeros((), jnp.int32), params, rest, tx.init(params)), everywhere)
  compiled = jax.jit(step, donate_argnums=0)

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
  model = nnx.merge(graph, state.params, state.rest)
  x = (digits.test_images - digits.mean) / digits.std
  accuracy = float(jnp.mean(model(x, train=False).argmax(-1) == digits.test_labels))
  print(f"test accuracy {100 * accuracy:.1f} %")
  return state, accuracy


if __name__ == "__main__":
  main(*sys.argv[1:])

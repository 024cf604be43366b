"""Equinox: a network with dropout, trained by K-FAC on all devices, resumable.

    python -m experiments.examples.equinox_digits [FOLDER]

Needs `pip install equinox`. The arrays of a module are the parameters, the rest stays outside.
"""

import pathlib
import sys
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp

from experiments import data
import fop_optax

BATCH = 256


class Network(eqx.Module):
  first: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  dropout: eqx.nn.Dropout
  head: eqx.nn.Linear

  def __init__(self, key):
    first, head = jax.random.split(key)
    self.first, self.norm = eqx.nn.Linear(64, 128, key=first), eqx.nn.LayerNorm(128)
    self.dropout, self.head = eqx.nn.Dropout(0.1), eqx.nn.Linear(128, 10, key=head)

  def __call__(self, image, key=None):
    h = jax.nn.relu(self.norm(self.first(image.ravel())))
    return self.head(self.dropout(h, key=key, inference=key is None))


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: optax.OptState


def main(folder: str = "results/equinox_digits", steps: int = 100, every: int = 20) -> tuple:
  digits = data.load("digits")
  params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)

  def loss_fn(params, keys, x, y):
    logits = jax.vmap(eqx.combine(params, static))(x, keys)
    return fop_optax.softmax_cross_entropy(logits, y)

  key_shapes = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
  shapes = (
    jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32),
    jax.ShapeDtypeStruct((BATCH,), jnp.int32),
  )
  captured = fop_optax.capture(loss_fn, params, key_shapes, *shapes, micro_batches=2)
  rate = optax.warmup_cosine_decay_schedule(0.01, 0.1, steps // 10, steps)
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  tx = optax.chain(
    optax.clip_by_global_norm(10.0),
    fop_optax.kfac(rate, captured.layers, weight_decay=0.1, mask=matrices),
  )

  def step(state, x, y):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), state.step), BATCH)
    refresh = fop_optax.refresh_due(state.opt_state)
    loss, grads, stats = captured.value_and_grad(state.params, keys, x, y, refresh=refresh)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, stats=stats)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

  # Auto: the partitioner places what is between; dropout and the like know no Explicit axes.
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  everywhere, by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
  params = jax.device_put(params, everywhere)
  state = jax.device_put(State(jnp.zeros((), jnp.int32), params, tx.init(params)), everywhere)
  compiled = eqx.filter_jit(step, donate="all")

  with ocp.CheckpointManager(pathlib.Path(folder).absolute()) as manager:
    # A module is no container that Orbax knows: its leaves are saved.
    leaves, structure = jax.tree.flatten(state)
    if manager.latest_step() is not None:
      like = list(map(ocp.utils.to_shape_dtype_struct, leaves))
      leaves = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
      state = jax.tree.unflatten(structure, leaves)
    for number in range(int(state.step), steps):
      chosen = np.random.default_rng(number).choice(len(digits.train_labels), BATCH, replace=False)
      x = (digits.train_images[chosen] - digits.mean) / digits.std
      x, y = jax.device_put((x.astype(np.float32), digits.train_labels[chosen]), by_batch)
      state, loss = compiled(state, x, y)
      if (number + 1) % every == 0:
        print(f"step {number + 1:4d}  loss {loss:.4f}")
        manager.save(number + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
  x = (digits.test_images - digits.mean) / digits.std
  right = jax.vmap(eqx.combine(state.params, static))(x).argmax(-1) == digits.test_labels
  print(f"test accuracy {100 * float(right.mean()):.1f} %")
  return state, float(right.mean())


if __name__ == "__main__":
  main(*sys.argv[1:])

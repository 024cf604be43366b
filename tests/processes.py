"""What each of two processes runs, `python processes.py <number> <port> <folder>`: K-FAC over both.

On a mesh of four devices, two a process. Parameters after the steps, and a checkpoint, go into the
folder.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax

import fop_optax

N, D, H, C, STEPS = 64, 8, 16, 4, 4
WHOLE = {name: PartitionSpec() for name in ("up", "bias", "head")}
SHARDED = WHOLE | {"up": PartitionSpec("data"), "head": PartitionSpec("data")}
LAYOUTS = {"plain": (WHOLE, False), "owned": (WHOLE, True), "fsdp": (SHARDED, True)}


def loss(p, x, y):
  return fop_optax.softmax_cross_entropy(jnp.tanh(x @ p["up"] + p["bias"]) @ p["head"], y)


def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype("float32") / 3
  params = {"up": draw(D, H), "bias": np.zeros(H, "float32"), "head": draw(H, C)}
  return params, draw(STEPS, N, D), rng.integers(0, C, (STEPS, N)).astype("int32")


def make(sharding=None):
  """The loss, and the optimizer of it."""
  params, x, y = inputs()
  captured = fop_optax.capture(loss, params, x[0], y[0])
  tx = fop_optax.kfac(
    0.1, captured.layers, damping=0.1, curvature_update_period=2, sharding=sharding
  )
  return captured, tx


def step_of(captured, tx):
  @jax.jit
  def step(params, state, x, y):
    refresh = fop_optax.refresh_due(state)
    _, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


class Run:
  """One layout on a mesh of all devices of all processes."""

  def __init__(self, layout):
    specs, owned = LAYOUTS[layout]
    self.mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    self.named = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
    self.sharding = fop_optax.Sharding(self.mesh, "data", self.named) if owned else None
    self.captured, self.tx = make(self.sharding)
    self.step = step_of(self.captured, self.tx)

  def put(self, array, sharding=None):
    """An array that every process has, over all of them."""
    sharding = sharding or NamedSharding(self.mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  def start(self):
    params = jax.tree.map(self.put, inputs()[0], self.named)
    return params, self.tx.init(params)

  def train(self, params, state, steps):
    _, x, y = inputs()
    for i in steps:
      params, state = self.step(params, state, self.put(x[i]), self.put(y[i]))
    return params, state

  def host(self, tree):
    """The whole of a tree, on this process."""
    whole = NamedSharding(self.mesh, PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


def restored(run, folder):
  """Parameters and state of a checkpoint in the order of blocks, with their owners."""
  import orbax.checkpoint as ocp

  whole = NamedSharding(run.mesh, PartitionSpec())
  like = inputs()[0], make()[1].init(inputs()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
  with ocp.StandardCheckpointer() as checkpointer:
    params, state = checkpointer.restore(folder, like)
  params = jax.tree.map(jax.device_put, params, run.named)
  shardings = fop_optax.state_shardings(run.tx, params)
  return params, jax.device_put(fop_optax.to_owners(state, run.sharding), shardings)


def main(number, port, folder):
  import orbax.checkpoint as ocp

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, number, initialization_timeout=60)
  for layout in LAYOUTS:
    run = Run(layout)
    with jax.set_mesh(run.mesh):
      params, state = run.train(*run.start(), range(STEPS // 2))
      if layout == "fsdp":
        with ocp.StandardCheckpointer() as checkpointer:
          checkpointer.save(folder / "half", (params, fop_optax.to_blocks(state)))
          checkpointer.wait_until_finished()
        params, state = restored(run, folder / "half")
      params, state = run.train(params, state, range(STEPS // 2, STEPS))
      found = run.host(params)
    if number == 0:
      np.savez(folder / f"{layout}.npz", compiled=run.step._cache_size(), **found)


if __name__ == "__main__":
  main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))

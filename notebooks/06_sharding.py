# %% [markdown]
# # Eight devices
#
# A batch is cut into eight shards, one for each device of a mesh. You see that loss, gradient and
# statistics are those of one device, what travels between the devices, how `shard_map` is written,
# and how micro-batches save memory. The eight devices are virtual ones on the CPU, so nothing here
# gets quicker; the code is that for eight accelerators.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/06_sharding.ipynb)

# %%
import importlib.util
import os
import subprocess
import sys

# Before JAX is imported. On a machine with eight devices leave these two lines out.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

if not all(map(importlib.util.find_spec, ("fop_optax", "experiments"))):  # as on Colab
  clone = "git clone --quiet --depth 1 https://github.com/OWNER/fop_optax fop_optax_clone"
  if not os.path.exists("fop_optax_clone"):
    subprocess.run(clone.split(), check=True)
  install = [sys.executable, "-m", "pip", "install", "--quiet", "./fop_optax_clone", "matplotlib"]
  subprocess.run(install, check=True)
  sys.path.insert(0, "fop_optax_clone")

# %%
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import data  # of the repository: the digits are stored in it
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
print(len(jax.devices()), "devices")

digits = data.load("digits")
images = ((digits.train_images - digits.mean) / digits.std).reshape(-1, 64).astype(np.float32)
labels = digits.train_labels
BATCH, STEPS = 512, 40


def init(seed=0, sizes=(64, 128, 64, 10)):
  params = {}
  for i, key in enumerate(jax.random.split(jax.random.key(seed), 3)):
    scale = np.sqrt(2 / sizes[i])
    params[f"w{i}"] = scale * jax.random.normal(key, (sizes[i], sizes[i + 1]))
    params[f"b{i}"] = jnp.zeros(sizes[i + 1])
  return params


def loss_fn(params, x, y):
  x = jax.nn.relu(x @ params["w0"] + params["b0"])
  x = jax.nn.relu(x @ params["w1"] + params["b1"])
  return fop_optax.softmax_cross_entropy(x @ params["w2"] + params["b2"], y)


# %% [markdown]
# ## The same step, on one device and on eight
#
# Nothing about the mesh goes into `capture` or the optimizer. Parameters and state are put on every
# device, the batch along the axis `data`, and `jax.jit` does the rest. The batch has to be
# divisible by groups x micro-batches x devices.

# %%
captured = fop_optax.capture(loss_fn, init(), images[:BATCH], labels[:BATCH])
tx = fop_optax.kfac(optax.cosine_decay_schedule(0.1, STEPS), captured.layers)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
everywhere = NamedSharding(mesh, PartitionSpec())
by_batch = NamedSharding(mesh, PartitionSpec("data"))


@jax.jit
def step(params, opt_state, x, y):
  refresh = fop_optax.refresh_due(opt_state)
  loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
  updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
  return optax.apply_updates(params, updates), opt_state, loss


def train(put_state=lambda tree: tree, put_batch=lambda tree: tree):
  rng, params, losses = np.random.default_rng(0), init(), []
  params, opt_state = put_state((params, tx.init(params)))
  for _ in range(STEPS):
    chosen = rng.choice(len(labels), BATCH, replace=False)
    batch = put_batch((images[chosen], labels[chosen]))
    params, opt_state, loss = step(params, opt_state, *batch)
    losses.append(float(loss))
  return np.array(losses), params


one, params_one = train()
with jax.set_mesh(mesh):
  eight, params_eight = train(
    lambda tree: jax.device_put(tree, everywhere), lambda tree: jax.device_put(tree, by_batch)
  )
print("sharding of the parameters:", params_eight["w0"].sharding.spec, "on", mesh.shape)
print(f"largest difference of the losses, relative: {np.abs(eight / one - 1).max():.0e}")
apart = jax.tree.map(lambda a, b: float(np.abs(np.array(a) - b).max()), params_eight, params_one)
print("largest difference of the last parameters:", f"{max(jax.tree.leaves(apart)):.0e}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
number = np.arange(1, STEPS + 1)
left.plot(number, one, color="#FF800E", linewidth=4, alpha=0.6, label="one device")
left.plot(number, eight, "--", color="#006BA4", label="eight devices")
left.set(yscale="log", xlabel="step", ylabel="training loss (nats)")
left.legend(frameon=False)
right.plot(number, np.maximum(np.abs(eight / one - 1), 1e-9), ".", color="#595959")
right.set(yscale="log", xlabel="step", ylabel="relative difference (1e-9: none)")
plt.show()

# %% [markdown]
# ## What travels
#
# Gradient and factors are means over the batch, so they are added up over the devices: once a step,
# all together. We read it off the compiled programs.


# %%
def traffic(compiled):
  """Each operation between devices, with its bytes."""
  found = []
  for line in compiled.as_text().splitlines():
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    if match := re.match(rf"\s+(?:ROOT )?\S+ = (.*?) ({names})(?:-start)?\(", line):
      shapes = re.findall(r"[fsu]32\[([\d,]*)\]", match[1])
      sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
      found.append((match[2], 4 * sum(sizes)))
  return found


first = images[:BATCH], labels[:BATCH]
shapes = jax.eval_shape(captured.value_and_grad, init(), *first)
size = lambda tree: f"{4 * sum(leaf.size for leaf in jax.tree.leaves(tree)):,} bytes"
print("gradient:", size(shapes[1]), " factors:", size(shapes[2].factors))
with jax.set_mesh(mesh):
  params, batch = jax.device_put(init(), everywhere), jax.device_put(first, by_batch)
  for refresh in (False, True):
    program = jax.jit(lambda *args, r=refresh: captured.value_and_grad(*args, refresh=r))
    for operation, moved in traffic(program.lower(params, *batch).compile()):
      print(f"refresh={refresh}: {operation}, {moved:,} bytes")

# %% [markdown]
# ## With `shard_map`
#
# Inside `jax.shard_map` each device has its own loss, gradient and statistics. One `pmean` over all
# three makes them those of the batch. An optimizer refuses statistics that were not averaged.


# %%
def averaged(params, x, y):
  return jax.lax.pmean(captured.value_and_grad(params, x, y), "data")


spec = PartitionSpec("data")
mapped = jax.jit(
  jax.shard_map(
    averaged, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=PartitionSpec()
  )
)
ours = mapped(params, *batch)
whole = jax.jit(captured.value_and_grad)(init(), *first)
close = jax.tree.map(lambda a, b: float(np.abs(np.array(a) - np.array(b)).max()), ours, whole)
print(f"loss {float(ours[0]):.4f} and {float(whole[0]):.4f}")
print(f"largest difference: gradient {max(jax.tree.leaves(close[1])):.0e},", end=" ")
print(f"factors {max(jax.tree.leaves(close[2].factors)):.0e}")

# %% [markdown]
# ## Less memory by micro-batches
#
# `capture(micro_batches=m)` works a batch off in m pieces, with the same result. Here on one
# device, with a wide layer, the temporary memory of the compiled program:

# %%
wide = init(sizes=(64, 512, 512, 10))
many = jnp.tile(images[:BATCH], (8, 1)), jnp.tile(labels[:BATCH], 8)
pieces, megabytes, outcomes = (1, 2, 4, 8, 16), [], []
for m in pieces:
  own = fop_optax.capture(loss_fn, wide, *many, micro_batches=m)
  program = jax.jit(own.value_and_grad).lower(wide, *many).compile()
  megabytes.append(program.memory_analysis().temp_size_in_bytes / 2**20)
  outcomes.append(program(wide, *many)[1])
apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), outcomes[0], outcomes[-1])
largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(outcomes[0]))
print("megabytes:", dict(zip(pieces, np.round(megabytes, 1).tolist(), strict=True)))
print(f"gradients in 1 and {pieces[-1]} pieces: {max(jax.tree.leaves(apart)):.0e} apart,", end=" ")
print(f"of up to {largest:.2f}")

# %%
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(pieces, megabytes, "o-")
ax.set(xscale="log", xticks=pieces, xticklabels=pieces, ylim=(0, None), xlabel="micro-batches")
ax.set(ylabel="temporary memory (MiB)", title="4,096 examples, widths 64-512-512-10")
ax.minorticks_off()
plt.show()

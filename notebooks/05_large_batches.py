# %% [markdown]
# # Large batches: what they buy
#
# With a larger batch a step takes longer, and there should be fewer of them. Up to some size that
# is a fair exchange; beyond it a larger batch buys nothing. You see where that happens on CIFAR-10,
# for AdamW, Muon, K-FAC and FOP: steps and seconds to a given loss at three batch sizes. And at the
# end what a GPU gave with the whole data set, at a batch of 2,000.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/05_large_batches.ipynb)

# %%
import importlib.util
import os
import subprocess
import sys

if not all(map(importlib.util.find_spec, ("fop_optax", "experiments"))):  # as on Colab
  clone = "git clone --quiet --depth 1 https://github.com/OWNER/fop_optax fop_optax_clone"
  if not os.path.exists("fop_optax_clone"):
    subprocess.run(clone.split(), check=True)
  extra = "./fop_optax_clone[experiments]"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", extra], check=True)
  sys.path.insert(0, "fop_optax_clone")

# %%
import itertools
import pathlib
import time

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd

import experiments
from experiments import data
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Data
#
# CIFAR-10, the first 3,200 training images and 1,000 test images. TFDS reads it from its folder
# (`TFDS_DATA_DIR`); where there is none it is downloaded and prepared, for which TFDS needs
# TensorFlow (Colab has it).

# %%
try:
  cifar = data.load("cifar10")
except SystemExit:
  import tensorflow_datasets as tfds

  tfds.builder("cifar10", file_format="array_record").download_and_prepare()
  cifar = data.load("cifar10")


def normalised(images):
  return ((images - cifar.mean) / cifar.std).astype(np.float32)


train_x, train_y = normalised(cifar.train_images[:3200]), cifar.train_labels[:3200]
test_x, test_y = normalised(cifar.test_images[:1000]), cifar.test_labels[:1000]
print(train_x.shape, test_x.shape)

# %% [markdown]
# ## A network, and one loop for all
#
# Three convolutions and a linear layer. Each run is of so many steps, with a cosine to zero, on the
# same batches from the same parameters. The clock stands while the test images are looked at.


# %%
class Network(nnx.Module):
  def __init__(self, rngs):
    sizes = (3, 12, 24, 32)
    self.convolutions = nnx.List(
      nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in itertools.pairwise(sizes)
    )
    self.head = nnx.Linear(sizes[-1], 10, rngs=rngs)

  def __call__(self, x):
    for convolution in self.convolutions:
      x = nnx.relu(convolution(x))
    return self.head(x.mean((1, 2)))


graphdef, initial = nnx.split(Network(nnx.Rngs(0)))


def loss_fn(params, x, y):
  return fop_optax.softmax_cross_entropy(nnx.merge(graphdef, params)(x), y)


accuracy = jax.jit(lambda params: jnp.mean(nnx.merge(graphdef, params)(test_x).argmax(1) == test_y))
print(fop_optax.capture(loss_fn, initial, train_x[:100], train_y[:100]))

# %%
RUNS = {100: 200, 400: 100, 1600: 40}  # batch size: steps
OPTIMIZERS = {  # rates, groups, optimizer
  "AdamW": ((3e-3, 1e-2, 3e-2), None, lambda rate, _: optax.adamw(rate)),
  "Muon": (
    (3e-2, 1e-1, 3e-1),
    None,
    lambda rate, layers: optax.contrib.muon(
      rate, muon_weight_dimension_numbers=fop_optax.dimension_numbers(layers)
    ),
  ),
  "K-FAC": ((0.1,), 1, fop_optax.kfac),
  "FOP": ((0.1,), 2, fop_optax.fop),
}


def train(name, batch_size):
  """The runs of one optimizer at one batch size, a program for all of its rates."""
  rates, groups, make = OPTIMIZERS[name]
  captured = fop_optax.capture(
    loss_fn, initial, train_x[:batch_size], train_y[:batch_size], groups=groups or 1
  )
  steps = RUNS[batch_size]
  optimizer = lambda rate: optax.with_extra_args_support(
    make(optax.cosine_decay_schedule(rate, steps), captured.layers)
  )

  @jax.jit
  def step(rate, params, state, x, y):
    if groups is None:
      loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
      updates, state = optimizer(rate).update(grads, state, params)
    else:
      refresh = fop_optax.refresh_due(state)
      loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
      updates, state = optimizer(rate).update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  def run(rate, steps):
    params, state, seconds, rows = initial, optimizer(0.1).init(initial), 0.0, []
    order = np.random.default_rng(0)
    for count in range(steps):
      index = order.choice(len(train_x), batch_size, replace=False)
      batch = train_x[index], train_y[index]
      start = time.perf_counter()
      params, state, loss = jax.block_until_ready(step(rate, params, state, *batch))
      seconds += time.perf_counter() - start
      row = {"step": count + 1, "seconds": seconds, "loss": float(loss)}
      if (count + 1) % (steps // 20 or 1) == 0:
        row["accuracy"] = float(accuracy(params))
      rows.append(row)
    return pd.DataFrame(rows).assign(optimizer=name, batch_size=batch_size, rate=rate)

  run(0.1, 1)  # compiles
  return [run(rate, steps) for rate in rates]


runs = pd.concat(
  run for batch_size in RUNS for name in OPTIMIZERS for run in train(name, batch_size)
)

# %% [markdown]
# ## Steps and seconds to a training loss
#
# The target is a training loss (the mean of five steps), as the small number of images would make
# a test accuracy a matter of regularisation. AdamW and Muon are at the best of three rates for each
# batch size, K-FAC and FOP have their defaults.

# %%
TARGET = 1.7


def to_target(run):
  """Steps and seconds to the target, else none."""
  smooth = run.loss.rolling(5, min_periods=1).mean()
  there = np.flatnonzero(smooth <= TARGET)
  first = run.iloc[there[0]] if len(there) else None
  return pd.Series(
    {
      "steps": np.nan if first is None else first.step,
      "seconds": np.nan if first is None else first.seconds,
      "last loss": smooth.iloc[-1],
      "test accuracy": run.accuracy.dropna().iloc[-1],
    }
  )


keys = ["batch_size", "optimizer", "rate"]
table = runs.groupby(keys, sort=False)[list(runs.columns)].apply(to_target).reset_index()
order = table.assign(steps=table.steps.fillna(np.inf)).sort_values(["steps", "last loss"])
best = order.groupby(["batch_size", "optimizer"]).head(1).sort_values(["batch_size", "steps"])
print(best.to_string(index=False, float_format="{:.3g}".format))

# %%
COLOURS = dict(zip(OPTIMIZERS, ("C0", "C1", "C2", "C3"), strict=True))
best = best.replace({"steps": np.inf}, np.nan)  # what never came there is not drawn
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name in OPTIMIZERS:
  own = best[best.optimizer == name].sort_values("batch_size")
  for axis, what in zip(axes, ("steps", "seconds"), strict=True):
    axis.plot(own.batch_size, own[what], "o-", color=COLOURS[name], label=name)
sizes = np.array(list(RUNS))
first = best[best.batch_size == sizes[0]].steps.max()
axes[0].plot(sizes, first * sizes[0] / sizes, "k:", linewidth=1, label="the same images")
for axis, what in zip(axes, ("steps", "seconds"), strict=True):
  axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel=f"{what} to {TARGET}")
  axis.set_xticks(sizes, map(str, sizes))
  low, high = axis.get_ylim()
  ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < tick < high]
  axis.set_yticks(ticks, map(str, ticks))
  axis.minorticks_off()
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Along the dotted line twice the batch takes half the steps: the same number of images. Where a
# curve is flatter, larger batches cost images; where it rises in the plot of seconds, they cost
# time on this machine, on which a step takes as long as its images do. On a device that is not busy
# with a small batch the seconds go with the steps: there it is the left picture that counts.
#
# ## Over the whole training

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained", sharey=True)
for axis, batch_size in zip(axes, RUNS, strict=True):
  for _, row in best[best.batch_size == batch_size].iterrows():
    chosen = (runs.batch_size == batch_size) & (runs.optimizer == row.optimizer)
    own = runs[chosen & (runs.rate == row.rate)]
    smooth = own.loss.rolling(5, min_periods=1).mean()
    axis.plot(own.seconds, smooth, color=COLOURS[row.optimizer], label=row.optimizer)
  axis.axhline(TARGET, color="k", linewidth=0.7, linestyle=":")
  axis.set(title=f"batch {batch_size}", xlabel="seconds", ylim=(0.9, 2.4))
axes[0].set_ylabel("training loss")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The whole of CIFAR-10, on a GPU
#
# The repository keeps what one H200 gave: the network and recipe of the public CIFAR-10 speed runs
# at a batch of 2,000, each optimizer in the place of the recipe's Muon, at the best of six trials,
# four seeds (`python -m experiments compare cifar10_speedrun`). Of these runs the epochs count, not
# the seconds, as they shared the device.

# %%
folder = pathlib.Path(experiments.__file__).parent / "recorded" / "cifar10_speedrun"
recorded = pd.read_csv(folder / "curves.csv")
mean = recorded.groupby(["optimizer", "epoch"], sort=False).test_accuracy.mean().unstack(0) * 100
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
mean.plot(ax=axis, marker="o", markersize=3)
axis.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(15, 96))
axis.legend(frameon=False, fontsize=8)
plt.show()

for target in (80, 90, 93):
  epochs = (mean >= target).idxmax().where((mean >= target).any())
  words = ", ".join(
    f"{name} {'never' if np.isnan(epoch) else f'{epoch:.0f}'}" for name, epoch in epochs.items()
  )
  print(f"epochs to {target} %: {words}")

# %% [markdown]
# Next: [a batch over eight devices](06_sharding.ipynb), and [what else to turn](08_tuning.ipynb).

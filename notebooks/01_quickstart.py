# %% [markdown]
# # Quick start: handwritten digits in eighty steps
#
# You train a small network with K-FAC as it comes, without turning anything. You see which layers
# it found, what the training step looks like, and how it does against AdamW at the best of four
# rates: on the same batches, from the same parameters, over five seeds, in steps and in seconds.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/01_quickstart.ipynb)

# %%
import importlib.util
import os
import subprocess
import sys

if not all(map(importlib.util.find_spec, ("fop_optax", "experiments"))):  # as on Colab
  clone = "git clone --quiet --depth 1 https://github.com/OWNER/fop_optax fop_optax_clone"
  if not os.path.exists("fop_optax_clone"):
    subprocess.run(clone.split(), check=True)
  install = [sys.executable, "-m", "pip", "install", "--quiet", "./fop_optax_clone", "matplotlib"]
  subprocess.run(install, check=True)
  sys.path.insert(0, "fop_optax_clone")

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import data  # of the repository: the digits are stored in it
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Data
#
# 1,437 images of 8 x 8 pixels to train on, 360 to test on. We divide by nothing but the spread of
# the training images.

# %%
digits = data.load("digits")


def normalised(images):
  return ((images - digits.mean) / digits.std).reshape(len(images), -1).astype(np.float32)


train_x, train_y = normalised(digits.train_images), digits.train_labels
test_x, test_y = normalised(digits.test_images), digits.test_labels
print(train_x.shape, test_x.shape)

# %% [markdown]
# ## A network and its loss
#
# Nothing here is special to this library: a dictionary of arrays, and a function whose value is the
# *mean* of the loss over the batch. Any loss that JAX can trace will do; `softmax_cross_entropy`
# of `fop_optax` is optax's, averaged, with a mark that says which distribution it stands for.


# %%
def init(seed, sizes=(64, 128, 64, 10)):
  params = {}
  for i, key in enumerate(jax.random.split(jax.random.key(seed), len(sizes) - 1)):
    scale = np.sqrt(2 / sizes[i])
    params[f"w{i}"] = scale * jax.random.normal(key, (sizes[i], sizes[i + 1]))
    params[f"b{i}"] = jnp.zeros(sizes[i + 1])
  return params


def logits(params, x):
  x = jax.nn.relu(x @ params["w0"] + params["b0"])
  x = jax.nn.relu(x @ params["w1"] + params["b1"])
  return x @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
  return fop_optax.softmax_cross_entropy(logits(params, x), y)


# %% [markdown]
# ## Does it find my layers?
#
# `capture` traces the loss on shapes and computes nothing. Print what it returns before anything
# else: it says what became of every parameter.

# %%
BATCH, STEPS = 256, 80

params = init(seed=0)
captured = fop_optax.capture(loss_fn, params, train_x[:BATCH], train_y[:BATCH])
print(captured)

# %% [markdown]
# ## The training step
#
# Two lines differ from a step of any optax optimizer. `captured.value_and_grad` stands where
# `jax.value_and_grad` would, and its statistics go to `update`. `refresh_due` says in which steps
# they are wanted: in each of the first twenty, then in every tenth.

# %%
tx = fop_optax.kfac(optax.cosine_decay_schedule(0.1, STEPS), captured.layers)


@jax.jit
def step(params, opt_state, x, y):
  refresh = fop_optax.refresh_due(opt_state)
  loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
  updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
  return optax.apply_updates(params, updates), opt_state, loss


def batches(seed):
  """Epochs of whole batches, shuffled."""
  rng, order = np.random.default_rng(seed), []
  for _ in range(STEPS):
    if len(order) < BATCH:
      order = rng.permutation(len(train_x))
    chosen, order = order[:BATCH], order[BATCH:]
    yield train_x[chosen], train_y[chosen]


opt_state = tx.init(params)
for number, (x, y) in enumerate(batches(seed=0)):
  params, opt_state, loss = step(params, opt_state, x, y)
  if number % 10 == 0:
    print(f"step {number:3d}  loss {loss:.5f}")
right = logits(params, test_x).argmax(-1) == test_y
print(f"test accuracy {100 * right.mean():.1f} %")

# %% [markdown]
# ## Against AdamW
#
# AdamW gets four rates, and we keep the one with the lowest final training loss. K-FAC gets one
# rate, the default. Both fall to zero along a cosine. A second row of K-FAC has weight decay, which
# its defaults lack; look at the test loss to see why.
#
# The clock stands still while a step compiles. Of each step the quickest of five seeds counts, so
# that the seconds mean something on a busy machine too.


# %%
def train(tx, captured=None, seeds=range(5)):
  """Training losses [seeds, steps], test losses, test accuracies, seconds up to each step."""
  tx = optax.with_extra_args_support(tx)  # AdamW ignores `stats`

  @jax.jit
  def step(params, opt_state, x, y):
    if captured is None:
      (loss, grads), stats = jax.value_and_grad(loss_fn)(params, x, y), None
    else:
      refresh = fop_optax.refresh_due(opt_state)
      loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state, loss

  params = init(0)
  jax.block_until_ready(step(params, tx.init(params), train_x[:BATCH], train_y[:BATCH]))  # compiles
  out = []
  for seed in seeds:
    params = init(seed)
    opt_state, losses, seconds = tx.init(params), [], []
    for x, y in batches(seed):
      start = time.perf_counter()
      params, opt_state, loss = step(params, opt_state, x, y)
      losses.append(float(loss))
      seconds.append(time.perf_counter() - start)
    right = logits(params, test_x).argmax(-1) == test_y
    out.append((losses, loss_fn(params, test_x, test_y), 100 * right.mean(), seconds))
  *numbers, seconds = map(np.array, zip(*out, strict=True))
  return *numbers, np.cumsum(seconds.min(axis=0))


def final(losses):
  return losses[:, -8:].mean(1)  # of each seed, over the last eight steps


schedule = lambda rate: optax.cosine_decay_schedule(rate, STEPS)
adamw = {rate: train(optax.adamw(schedule(rate))) for rate in (0.003, 0.01, 0.03, 0.1)}
best = min(adamw, key=lambda rate: final(adamw[rate][0]).mean())
kfac = {
  decay: train(fop_optax.kfac(schedule(0.1), captured.layers, weight_decay=decay), captured)
  for decay in (0.0, 0.1)
}

# %%
rows = {f"AdamW, rate {rate}" + " (best)" * (rate == best): run for rate, run in adamw.items()}
rows |= {"K-FAC, defaults": kfac[0.0], "K-FAC, weight_decay=0.1": kfac[0.1]}
print(f"{'':24} {'training loss':>19} {'test loss':>15} {'test accuracy, %':>17} {'seconds':>8}")
for name, (losses, test, accuracy, seconds) in rows.items():
  train_loss = f"{final(losses).mean():.5f} ± {final(losses).std():.5f}"
  test_loss = f"{test.mean():.3f} ± {test.std():.3f}"
  percent = f"{accuracy.mean():.1f} ± {accuracy.std():.1f}"
  print(f"{name:24} {train_loss:>19} {test_loss:>15} {percent:>17} {seconds[-1]:8.3f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
shown = {
  f"AdamW, best of four rates ({best})": adamw[best],
  "K-FAC, defaults": kfac[0.0],
}
for (name, (losses, _, _, seconds)), line in zip(shown.items(), ("--", "-"), strict=True):
  for ax, at in zip(axes, (np.arange(1, STEPS + 1), seconds), strict=True):
    low, middle, high = np.percentile(losses, (0, 50, 100), axis=0)
    (drawn,) = ax.plot(at, middle, line, label=name, linewidth=2)
    ax.fill_between(at, low, high, alpha=0.2, color=drawn.get_color(), linewidth=0)
axes[0].set(yscale="log", xlabel="step", ylabel="training loss (nats)")
axes[1].set(xlabel="seconds, without compilation")
axes[0].legend(frameon=False)
fig.suptitle("Median and range of five seeds")
plt.show()

# %% [markdown]
# ## What came out

# %%
level = final(adamw[best][0]).mean()
middle = np.median(kfac[0.0][0], axis=0)
seconds, whole = kfac[0.0][3], adamw[best][3][-1]
needed = int(np.argmax(middle <= level)) + 1
wins = int(np.sum(final(kfac[0.0][0]) < final(adamw[best][0])))
print(f"K-FAC ends below the best AdamW in {wins} of 5 seeds.")
print(f"It reaches AdamW's final loss, {level:.4f}, after {needed} of {STEPS} steps.")
print(f"That takes {seconds[needed - 1]:.3f} s; AdamW's {STEPS} steps take {whole:.3f} s.")
print(f"A step takes {seconds[-1] / whole:.1f} times as long as AdamW's, in the mean.")
tests = [run[1].mean() for run in (adamw[best], kfac[0.0], kfac[0.1])]
print("Test loss: AdamW {:.3f}, K-FAC {:.3f}, with weight decay {:.3f}.".format(*tests))

# %% [markdown]
# Three things to take along:
#
# - A step of K-FAC takes longer. Compare the seconds, not only the steps.
# - The training loss comes near zero on this little data. Whether the test loss follows is another
#   matter, and where `weight_decay` comes in.
# - The rate was not tuned. If you do tune, tune it alone first: 0.03, 0.1, 0.3.
#
# Next: [what capture sees](02_what_capture_sees.ipynb), and
# [what to turn when training goes wrong](08_tuning.ipynb).

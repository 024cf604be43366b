# %% [markdown]
# # What capture sees
#
# `capture` finds the layers of a loss by reading its program. You learn to read its table, to see
# why a parameter was left out and how to write the model so that it is found, to check its
# assumptions on your data, and to look at the curvature itself: factors, spectra, damping.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/02_what_capture_sees.ipynb)

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
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import data  # of the repository: the digits are stored in it
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

digits = data.load("digits")
train_x = ((digits.train_images - digits.mean) / digits.std).astype(np.float32)
train_y = digits.train_labels

# %% [markdown]
# ## A network with something of everything
#
# A convolution, a table of positions, one weight that is used twice, a scale, and a weight that is
# multiplied by a gain before it is used. Plain arrays and plain `jax.numpy`: there are no layer
# classes to register.


# %%
def init(seed):
  shapes = {
    "kernel": (3, 3, 1, 8),
    "embed": (8, 32),
    "position": (16, 32),
    "shared": (32, 32),
    "middle": (32, 24),
    "head": (24, 10),
  }
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  params = {
    name: jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
    for (name, shape), key in zip(shapes.items(), keys, strict=True)
  }
  return params | {
    "scale": jnp.ones(32),
    "shared_bias": jnp.zeros(32),
    "gain": jnp.ones(24),
    "head_bias": jnp.zeros(10),
  }


def conv(x, kernel):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)


def features(params, x):
  h = jax.nn.relu(conv(x, params["kernel"]))
  h = h.reshape(len(h), 16, 8) @ params["embed"] + params["position"]
  for _ in range(2):
    h = h + jnp.tanh((params["scale"] * h) @ params["shared"] + params["shared_bias"])
  return h.mean(axis=1)


def loss_fn(params, x, y):
  h = jnp.tanh(features(params, x) @ (params["middle"] * params["gain"]))
  return fop_optax.softmax_cross_entropy(h @ params["head"] + params["head_bias"], y)


params, (x, y) = init(0), (train_x[:256], train_y[:256])
with warnings.catch_warnings(record=True) as caught:
  captured = fop_optax.capture(loss_fn, params, x, y)
print(captured)
print()
print("It warned:", caught[0].message)

# %% [markdown]
# Read a row like this: `['kernel']` is a convolution whose weight, as a matrix, has 9 rows (3 x 3
# pixels of one channel) and 8 columns. So its *input factor* A is 9 x 9 and its *output factor* G
# 8 x 8. A bias is one more row of its weight. `9d` would mean that only the diagonal is kept.
# `['shared']` has two uses, whose statistics are added.
#
# ## A parameter that falls back, and how to write it so that it is found
#
# Three parameters are in no layer. The table says why, and where: the numbers are the line and the
# column in the cell. `scale` and `gain` are vectors that multiply: few numbers, which may be left
# to Adam. `middle` is a matrix, though. It is multiplied by the gain *before* the product. The same
# function, written with the gain after the product, has a plain weight:


# %%
def loss_fn(params, x, y):
  h = jnp.tanh((features(params, x) @ params["middle"]) * params["gain"])  # the gain after
  return fop_optax.softmax_cross_entropy(h @ params["head"] + params["head_bias"], y)


before = captured
captured = fop_optax.capture(loss_fn, params, x, y)
print(captured)
print()
print("left the fallback:", sorted(set(before.fallbacks) - set(captured.fallbacks)))

# %% [markdown]
# To be told rather than to look, write `strict=True`. It raises if any parameter is in no layer.

# %%
try:
  fop_optax.capture(loss_fn, params, x, y, strict=True)
except ValueError as error:
  print(error)

# %% [markdown]
# ## Are the assumptions true?
#
# `capture` read the program. `check` evaluates it once, on one batch, and says in sentences whether
# what it takes for granted holds.

# %%
findings = captured.check(params, x, y)

# %% [markdown]
# The usual mistake is a loss that is a *sum* over the batch. Here a warning comes already from
# `capture`, with the line of the sum, and `check` names what does not hold.


# %%
def summed(params, x, y):
  h = jnp.tanh((features(params, x) @ params["middle"]) * params["gain"])
  logits = h @ params["head"] + params["head_bias"]
  return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y))


with warnings.catch_warnings(record=True) as caught:
  mistaken = fop_optax.capture(summed, params, x, y)
print(caught[0].message, end="\n\n")
names = [finding.name for finding in mistaken.check(params, x, y) if finding.holds is False]
print("\ndoes not hold:", names)

# %% [markdown]
# ## The factors
#
# `value_and_grad` gives the loss, the gradient and, on request, the statistics of the batch: one A
# and one G for each layer. The block of the Fisher matrix that belongs to a layer is taken for the
# Kronecker product of the two.

# %%
loss, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
for layer, factors in zip(captured.layers, stats.factors, strict=True):
  full, kept = np.prod(layer.dims) ** 2, factors.A.size + factors.G.size
  print(
    f"{layer.path:13} block {full:9,} numbers, factors {kept:6,}  ({full / kept:.0f} times less)"
  )

# %% [markdown]
# What an optimizer will take is known before anything is allocated:

# %%
estimate = fop_optax.estimate(captured, "kfac")
print(estimate)
state = fop_optax.kfac(0.1, captured.layers).init(params)
made = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
print(f"\nstate: {estimate.state_bytes:,} bytes estimated, {made:,} made")

# %% [markdown]
# For a weight that is shared, A is the mean over all rows that meet it: here 2 uses x 16 positions
# of each example. Let us see by hand.

# %%
h = jax.nn.relu(conv(x, params["kernel"])).reshape(len(x), 16, 8)
h = h @ params["embed"] + params["position"]
rows = []
for _ in range(2):
  inputs = params["scale"] * h
  rows.append(jnp.concatenate([inputs, jnp.ones((*h.shape[:2], 1))], axis=-1).reshape(-1, 33))
  h = h + jnp.tanh(inputs @ params["shared"] + params["shared_bias"])
rows = jnp.concatenate(rows)
by_hand = rows.T @ rows / len(rows)

index = [layer.path for layer in captured.layers].index("['shared']")
A = stats.factors[index].A[0]
print(f"{len(rows):,} rows; largest difference {jnp.abs(A - by_hand).max():.1e} of {A.max():.2f}")

# %% [markdown]
# With `sharing="reduce"` the rows of an example are added up first. The statistics get cheaper, and
# the table says which layers do it.

# %%
reduced = fop_optax.capture(loss_fn, params, x, y, sharing="reduce")
print("\n".join(reduced.notes))

# %% [markdown]
# ## What the factors look like
#
# We train for 60 steps and look again. Left: A of the convolution. Pixels that stand one above the
# other (0 and 3, 1 and 4) are alike. Right: G of the head, one row a class.

# %%
tx = fop_optax.kfac(optax.cosine_decay_schedule(0.1, 60), captured.layers)


@jax.jit
def step(params, opt_state, x, y):
  refresh = fop_optax.refresh_due(opt_state)
  loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
  updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
  return optax.apply_updates(params, updates), opt_state, loss


start, opt_state, rng = stats, tx.init(params), np.random.default_rng(0)
for _ in range(60):
  chosen = rng.choice(len(train_y), 256, replace=False)
  params, opt_state, loss = step(params, opt_state, train_x[chosen], train_y[chosen])
print(f"training loss {loss:.3f}")
_, _, stats = jax.jit(captured.value_and_grad)(params, x, y)

# %%
by_path = {layer.path: own for layer, own in zip(captured.layers, stats.factors, strict=True)}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
shown = (
  ("A of ['kernel']: pixels of a 3 x 3 patch", by_path["['kernel']"].A[0]),
  ("G of ['head']: classes", by_path["['head']"].G[0]),
)
for ax, (title, matrix) in zip(axes, shown, strict=True):
  limit = float(jnp.abs(matrix).max())
  image = ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit)
  ax.set(title=title, xticks=range(len(matrix)), yticks=range(len(matrix)))
  fig.colorbar(image, ax=ax, shrink=0.9)
plt.show()

# %% [markdown]
# ## Their spectra
#
# The eigenvalues of each factor, over their mean. The dashed line, 1, is the damping that the
# defaults add (`relative_damping=1`): directions far below it are treated as flat, with a step like
# that of gradient descent; those above it are shortened.

# %%
# colours and marks that can be told apart without colour
marks = ("o", "s", "^", "D", "v", "x")
fig, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey=True, layout="constrained")
for row, (when, own) in enumerate((("at the start", start), ("after 60 steps", stats))):
  for column, side in enumerate("AG"):
    ax = axes[row, column]
    for layer, factors, mark in zip(captured.layers, own.factors, marks, strict=True):
      factor = getattr(factors, side)[0]
      values = factor if factor.ndim == 1 else jnp.linalg.eigvalsh(factor)
      values = np.sort(values)[::-1] / np.mean(values)
      place = np.linspace(0, 1, len(values))
      ax.plot(place, np.maximum(values, 1e-8), marker=mark, markersize=3, lw=1, label=layer.path)
    ax.axhline(1, linestyle="--", color="black", linewidth=1)
    ax.set(yscale="log", ylim=(1e-6, 50), title=f"{side} {when}")
for ax in axes[1]:
  ax.set_xlabel("place among the eigenvalues of the factor")
for ax in axes[:, 0]:
  ax.set_ylabel("eigenvalue / mean")
axes[0, 1].legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
plt.show()

# %% [markdown]
# Two things to see in the pictures. The smallest eigenvalue of the head's G is zero, at all times:
# the gradient of a softmax sums to zero over the classes. And `embed` and `position` have the same
# G, as what they make is added up. In numbers:

# %%
ones = jnp.ones(10) / np.sqrt(10)
G = by_path["['head']"].G[0]
print(
  f"G of the head along (1, ..., 1): {ones @ G @ ones:.0e}, largest {jnp.linalg.norm(G, 2):.0e}"
)
G, other = by_path["['embed']"].G, by_path["['position']"].G
print(f"G of embed and of position: {jnp.abs(G - other).max():.0e} apart, of up to {G.max():.0e}")
print()
print("layer          eigenvalues above their mean, after 60 steps")
for layer, factors in zip(captured.layers, stats.factors, strict=True):
  values = {}
  for side, factor in zip("AG", (factors.A[0], factors.G[0]), strict=True):
    own = factor if factor.ndim == 1 else jnp.linalg.eigvalsh(factor)
    values[side] = f"{int(jnp.sum(own > jnp.mean(own)))} of {len(own)}"
  print(f"{layer.path:13}  A {values['A']:9}  G {values['G']}")

# %% [markdown]
# ## What the optimizer did
#
# `diagnostics` reads an optimizer's state: how often statistics came in, how many inverses were
# made, what damping was used, and whether anything was refused.

# %%
numbers = fop_optax.diagnostics(opt_state, captured.layers, condition=True)
print({name: int(value) for name, value in numbers.items() if name != "layers"})
columns = ("folds", "inverses", "failed_inverses", "damping_A", "damping_G", "condition")
print(f"{'layer':13}", *(f"{name:>16}" for name in columns))
for name, own in numbers["layers"].items():
  print(f"{name:13}", *(f"{float(own[column][0]):16.3g}" for column in columns))

# %% [markdown]
# `folds` is 24 in 60 steps: statistics came at each of the first twenty steps and then at every
# tenth. `condition` is that of the damped block: the same gradient makes a step so many times
# longer in the flattest direction than in the steepest. With `spectra=True` there are all
# eigenvalues of the running factors.
#
# Next: [the geometry of FOP](03_geometry_of_fop.ipynb).

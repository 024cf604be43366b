# %% [markdown]
# # Tuning: each symptom made to happen, and cured
#
# The [site](https://OWNER.github.io/fop_optax/symptoms.html) has a table of what can go wrong and
# what to turn. Here each row of it happens: you see the loss curve that gives it away, the number
# to look at, and the curve after the cure. All on small problems, one seed each: the curves show
# what the symptom looks like, not how large the effect will be on yours.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/08_tuning.ipynb)

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
scaled = lambda images: ((images - digits.mean) / digits.std).reshape(-1, 64).astype(np.float32)
train_set = scaled(digits.train_images), digits.train_labels
test_set = scaled(digits.test_images), digits.test_labels


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


def batches(size, steps, examples=train_set):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    chosen = rng.choice(len(examples[0]), size, replace=False)
    yield tuple(part[chosen] for part in examples)


def train(captured, params, batches, *, steps, validate=False, rate=0.1, **options):
  """Losses, test losses and the last state of K-FAC with these options, the rest its defaults."""
  tx = fop_optax.kfac(optax.cosine_decay_schedule(rate, steps), captured.layers, **options)

  @jax.jit
  def step(params, opt_state, key, *batch):
    refresh = fop_optax.refresh_due(opt_state)
    loss, grads, stats = captured.value_and_grad(params, *batch, refresh=refresh, key=key)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    test = loss_fn(params, *test_set) if validate else jnp.nan
    return optax.apply_updates(params, updates), opt_state, (loss, test)

  opt_state, out = tx.init(params), []
  for key, batch in zip(jax.random.split(jax.random.key(1), steps), batches, strict=True):
    params, opt_state, losses = step(params, opt_state, key, *batch)
    out.append(losses)
  losses, tests = np.array(out).T
  return losses, tests, opt_state


def show(curves, title, ylabel="training loss (nats)", top=None):
  """Loss curves: the symptom in orange and solid, cures after it."""
  fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
  looks = zip(("#FF800E", "#006BA4", "#595959"), ("-", "--", ":"), strict=True)
  for (name, losses), (colour, line) in zip(curves.items(), looks, strict=False):
    ax.plot(np.arange(1, len(losses) + 1), losses, line, color=colour, label=name, linewidth=1.8)
  ax.set(yscale="log", xlabel="step", ylabel=ylabel, title=title)
  if top is not None:
    ax.set_ylim(top=top)
  ax.legend(frameon=False, fontsize=9)
  plt.show()


captured = fop_optax.capture(loss_fn, init(), *next(batches(256, 1)))

# %% [markdown]
# ## The loss explodes in the first steps
#
# A small absolute damping, statistics every ten steps from the start, and no bound on the step: the
# step is right for the point where the statistics were taken, and far too long elsewhere. The bound
# is on by default; here it is taken away.

# %%
risky = {"damping": 1e-3, "curvature_update_period": 10}
curves, states = {}, {}
for name, options in (
  ("no bound", {"norm_constraint": None}),
  ("norm_constraint=0.1, the default", {}),
):
  curves[name], _, states[name] = train(
    captured, init(), batches(256, 60), steps=60, **risky, **options
  )
  refused = int(fop_optax.diagnostics(states[name])["nonfinite_losses"])
  print(f"{name}: last loss {curves[name][-1]:.2g}, {refused} of 60 steps refused")
show(curves, "The loss explodes", top=1e6)

# %% [markdown]
# ## It stalls at first, without noise
#
# Regression with large residuals. Statistics from the labels grow with the *square* of the
# residual, so steps are tiny exactly where the target is far. The defaults make up for it: their
# steps are in units of the loss. With an absolute `damping` they are not. Further still goes
# curvature that does not ask the labels, `fisher="sampled"`, for which the loss has to be marked
# (`squared_error` is). Then it is the bound that holds the steps back, and here it can go: the
# problem is quadratic.

# %%
rng = np.random.default_rng(0)
inputs = rng.normal(size=(512, 20)).astype(np.float32)
targets = (10 * inputs @ rng.normal(size=(20, 1)) + 10).astype(np.float32)
linear = {"w": jnp.zeros((20, 1)), "b": jnp.zeros(1)}


def regression(params, x, y):
  return fop_optax.squared_error(x @ params["w"] + params["b"], y)


curves = {}
for name, fisher, options in (
  ("absolute damping", "empirical", {"damping": 1e-3}),
  ("the defaults, in units of the loss", "empirical", {}),
  ("sampled, without the bound", "sampled", {"norm_constraint": None}),
):
  own = fop_optax.capture(regression, linear, inputs, targets, fisher=fisher)
  same = [(inputs, targets)] * 100
  curves[name], _, _ = train(own, linear, same, steps=100, **options)
  print(f"{name}: {curves[name][0]:.0f} -> {curves[name][-1]:.2g}")
show(curves, "It stalls", ylabel="loss")

# %% [markdown]
# ## Training falls, validation rises
#
# 300 images alone, 120 steps. K-FAC fits them to the end, and on the way the test loss turns.
# Weight decay is the first thing to try, then a smaller bound.

# %%
few = tuple(part[:300] for part in train_set)
tests = {}
for name, options in (
  ("defaults", {}),
  ("weight_decay=0.1", {"weight_decay": 0.1}),
  ("norm_constraint=0.03", {"norm_constraint": 0.03}),
):
  losses, tests[name], _ = train(
    captured, init(), batches(100, 120, few), steps=120, validate=True, **options
  )
  lowest = tests[name].min()
  print(
    f"{name:21} training {losses[-8:].mean():.5f}  test {tests[name][-1]:.3f}, lowest {lowest:.3f}"
  )
show(tests, "Validation rises", ylabel="test loss (nats)")

# %% [markdown]
# ## It falls too slowly in a recurrent network
#
# Here an image is read row by row, and the same matrix acts at each of them. Old statistics cost
# steps. Where they are cheap beside the network, take them at every step.


# %%
def init_rnn(width=64):
  first, second, third = jax.random.split(jax.random.key(0), 3)
  return {
    "in": jax.random.normal(first, (8, width)) / np.sqrt(8),
    "state": jax.random.normal(second, (width, width)) / np.sqrt(width),
    "bias": jnp.zeros(width),
    "head": jax.random.normal(third, (width, 10)) / np.sqrt(width),
  }


def rnn_loss(params, x, y):
  def cell(h, row):
    return jnp.tanh(row @ params["in"] + h @ params["state"] + params["bias"]), None

  start = jnp.zeros((len(x), params["state"].shape[0]))
  h, _ = jax.lax.scan(cell, start, x.reshape(-1, 8, 8).swapaxes(0, 1))
  return fop_optax.softmax_cross_entropy(h @ params["head"], y)


rnn = fop_optax.capture(rnn_loss, init_rnn(), *next(batches(256, 1)))
curves = {}
for name, period in (
  ("statistics every 40 steps", 40),
  ("the default: first 20, then every 10", fop_optax.WarmupPeriod(20, 10)),
  ("every step", 1),
):
  options = {"curvature_update_period": period}
  curves[name], _, _ = train(rnn, init_rnn(), batches(256, 60), steps=60, **options)
  print(f"{name}: {curves[name][-8:].mean():.4f}")
show(curves, "Stale statistics")

# %% [markdown]
# ## Noise at small batches
#
# Sixteen examples say little about 129 x 129 entries of a factor. Let statistics be averaged over
# more steps, and the step be shorter.

# %%
small = fop_optax.capture(loss_fn, init(), *next(batches(16, 1)))
tests = {}
for name, options in (
  ("defaults", {}),
  ("decay=0.99, norm_constraint=0.03", {"decay": 0.99, "norm_constraint": 0.03}),
):
  losses, tests[name], _ = train(
    small, init(), batches(16, 300), steps=300, validate=True, **options
  )
  print(f"{name}: training {losses[-50:].mean():.4f}, test {tests[name][-1]:.3f}")
show(tests, "Batches of 16", ylabel="test loss (nats)")

# %% [markdown]
# ## `nonfinite_*` counts in `diagnostics`
#
# Three batches hold a pixel that is not a number. The steps are left out, and nothing else is
# harmed. If such counts grow, look at the data (`nonfinite_losses`), the precision
# (`nonfinite_gradients` alone) or the damping (`nonfinite_directions`).


# %%
def spoilt(at):
  for number, (x, y) in enumerate(batches(256, 60)):
    yield (np.where(x == x[0, 20], np.nan, x) if number in at else x), y


losses, _, state = train(captured, init(), spoilt({5, 15, 25}), steps=60)
numbers = fop_optax.diagnostics(state, captured.layers)
print({name: int(value) for name, value in numbers.items() if name != "layers"})
print("losses of steps 4 to 7:", losses[4:8].round(3), " last:", losses[-1].round(4))

# %% [markdown]
# ## A layer with `inverses` 0
#
# The middle weight starts at zero, and ReLU passes no gradient at zero. So the statistics of two
# layers are zero, there is nothing to invert, and the layers get no update. The cure is in the
# initial values. A last layer of zeros is harmless: the layers before it fail once and start with
# the next statistics.

# %%
dead = init() | {"w1": jnp.zeros((128, 64))}
last_zero = init() | {"w2": jnp.zeros((64, 10))}
curves = {}
for name, params in (
  ("middle layer zero", dead),
  ("last layer zero", last_zero),
  ("neither", init()),
):
  curves[name], _, state = train(captured, params, batches(256, 60), steps=60)
  made = fop_optax.diagnostics(state, captured.layers)["layers"]
  counts = {
    path: (int(own["inverses"][0]), int(own["failed_inverses"][0])) for path, own in made.items()
  }
  print(f"{name:18} (inverses, failed): {counts}")
show(curves, "A dead layer")
findings = captured.check(dead, *next(batches(256, 1)))

# %% [markdown]
# ## A layer learns slowly
#
# The first weight is multiplied by a gain before its product, so it is in no layer: the fallback,
# Adam at 0.03 of the rate, takes care of it. Two cures: a fallback with a rate of its own, or the
# gain after the product, so that the weight is found ([what capture
# sees](02_what_capture_sees.ipynb) has more).


# %%
def gain_before(params, x, y):
  return loss_fn(params | {"w0": params["w0"] * params["gain"]}, x, y)


def gain_after(params, x, y):
  x = jax.nn.relu((x @ params["w0"]) * params["gain"] + params["b0"])
  x = jax.nn.relu(x @ params["w1"] + params["b1"])
  return fop_optax.softmax_cross_entropy(x @ params["w2"] + params["b2"], y)


params = init() | {"gain": jnp.ones(128)}
with warnings.catch_warnings(record=True) as caught:
  before = fop_optax.capture(gain_before, params, *next(batches(256, 1)))
after = fop_optax.capture(gain_after, params, *next(batches(256, 1)))
print(before)
print()
print("It warned:", caught[0].message)
print()
curves = {}
for name, own, options in (
  ("gain before the product", before, {}),
  ("fallback=adam(0.01)", before, {"fallback": optax.adam(optax.cosine_decay_schedule(0.01, 60))}),
  ("gain after the product", after, {}),
):
  curves[name], _, _ = train(own, params, batches(256, 60), steps=60, **options)
  print(f"{name}: {curves[name][-8:].mean():.5f}")
show(curves, "A weight in no layer")

# %% [markdown]
# A higher rate of the fallback is quicker in the first steps here, and no better in the end. The
# other cure is.

# %% [markdown]
# ## In short
#
# Start with the defaults, a schedule that ends at zero, and the rate alone: 0.03, 0.1, 0.3. Then
# turn `norm_constraint`, `relative_damping`, `weight_decay` and `curvature_update_period`, in this
# order. Before a long training `print(captured)` and run `captured.check`; while it runs look at
# `diagnostics` now and then.

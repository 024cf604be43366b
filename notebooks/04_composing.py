# %% [markdown]
# # Composing with optax and with module libraries
#
# `kfac` and `fop` are optax transformations. You see how they go together with schedules, injected
# hyperparameters, other optimizers for some of the parameters, other last steps, per-example
# gradients and clipping, and with Flax NNX, Linen and Equinox. Each section is a short cell that
# stands alone; take the one you need.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/04_composing.ipynb)

# %%
import importlib.util
import os
import subprocess
import sys

if not all(map(importlib.util.find_spec, ("fop_optax", "experiments"))):  # as on Colab
  clone = "git clone --quiet --depth 1 https://github.com/OWNER/fop_optax fop_optax_clone"
  if not os.path.exists("fop_optax_clone"):
    subprocess.run(clone.split(), check=True)
  install = [sys.executable, "-m", "pip", "install", "--quiet", "./fop_optax_clone"]
  subprocess.run([*install, "matplotlib", "flax", "equinox"], check=True)
  sys.path.insert(0, "fop_optax_clone")

# %%
import equinox as eqx
from flax import linen, nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from optax.experimental import aggregating

from experiments import data  # of the repository: the digits are stored in it
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

digits = data.load("digits")
images = ((digits.train_images - digits.mean) / digits.std).reshape(-1, 64).astype(np.float32)
labels = digits.train_labels
BATCH, STEPS = 256, 40
x, y = images[:BATCH], labels[:BATCH]


def init(seed, sizes=(64, 64, 10)):
  params = {}
  for i, key in enumerate(jax.random.split(jax.random.key(seed), 2)):
    params[f"w{i}"] = jax.random.normal(key, sizes[i : i + 2]) * np.sqrt(2 / sizes[i])
    params[f"b{i}"] = jnp.zeros(sizes[i + 1])
  return params


def logits(params, x):
  return jax.nn.relu(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]


def loss_fn(params, x, y):
  return fop_optax.softmax_cross_entropy(logits(params, x), y)


captured = fop_optax.capture(loss_fn, init(0), x, y)
layers = captured.layers


# %% [markdown]
# One loop for all of them. It is the step of the [quick start](01_quickstart.ipynb).


# %%
def batches(spoilt=None):
  rng = np.random.default_rng(0)
  for number in range(STEPS):
    chosen = rng.choice(len(labels), BATCH, replace=False)
    yield images[chosen] * (np.nan if number == spoilt else 1), labels[chosen]


def train(tx, captured=captured, params=None, watch=lambda opt_state: None, spoilt=None):
  """Losses, what `watch` saw of the state in each step, and the last state."""
  params = init(0) if params is None else params

  @jax.jit
  def step(params, opt_state, x, y):
    refresh = fop_optax.refresh_due(opt_state)
    loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state, losses, watched = tx.init(params), [], []
  for x, y in batches(spoilt):
    params, opt_state, loss = step(params, opt_state, x, y)
    losses.append(float(loss))
    watched.append(watch(opt_state))
  return losses, watched, opt_state


final = {}  # mean loss of the last five steps, by section


def note(name, losses):
  final[name] = np.mean(losses[-5:])
  print(f"{name}: loss {losses[0]:.3f} -> {final[name]:.4f}")


# %% [markdown]
# ## Schedules
#
# The rate, the damping, the bound on the step and the period of statistics can each be a schedule.

# %%
rate = optax.warmup_cosine_decay_schedule(0.01, 0.1, STEPS // 10, STEPS)
damping = optax.exponential_decay(1.0, STEPS, 0.1)
losses, _, _ = train(fop_optax.kfac(rate, layers, relative_damping=damping))
note("schedules", losses)

# %% [markdown]
# ## Chains
#
# `optax.chain` hands `stats` on to whoever takes it. Weight decay for matrices alone is a mask, as
# in AdamW.

# %%
matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
tx = optax.chain(
  optax.clip_by_global_norm(10.0),
  fop_optax.kfac(rate, layers, weight_decay=0.1, mask=matrices),
)
losses, _, _ = train(tx)
note("chain", losses)

# %% [markdown]
# ## Injected hyperparameters
#
# `optax.inject_hyperparams` puts numbers into the state: there they can be read, and set by hand
# between steps without compiling anew.

# %%
tx = optax.inject_hyperparams(fop_optax.kfac)(
  learning_rate=rate, layers=layers, relative_damping=damping
)
read = lambda s: {
  name: float(s.hyperparams[name]) for name in ("learning_rate", "relative_damping")
}
losses, watched, opt_state = train(tx, watch=read)
note("inject_hyperparams", losses)
print(sorted(opt_state.hyperparams))

# %%
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained")
axes[0].plot(losses)
axes[0].set(yscale="log", ylabel="training loss (nats)", xlabel="step")
for ax, name in zip(axes[1:], watched[0], strict=True):
  ax.plot([own[name] for own in watched])
  ax.set(xlabel="step", ylabel=name)
plt.show()

# %% [markdown]
# ## Some parameters here, some there
#
# `optax.partition` gives each group of parameters an optimizer. Keep a weight and its bias
# together, as their curvature is one block.

# %%
labels_of = lambda params: {name: "head" if name in ("w1", "b1") else "body" for name in params}
tx = optax.partition({"body": fop_optax.kfac(rate, layers), "head": optax.adamw(0.01)}, labels_of)
losses, _, _ = train(tx)
note("partition", losses)

apart = lambda params: {name: "head" if name == "w1" else "body" for name in params}
tx = optax.partition({"body": fop_optax.kfac(rate, layers), "head": optax.adamw(0.01)}, apart)
try:
  tx.init(init(0))
except ValueError as error:
  print("\na weight without its bias:", error)

# %% [markdown]
# ## Batches that are not finite
#
# A step whose loss, gradient or direction is not finite is left out, and counted by its cause. So
# `optax.apply_if_finite` is not needed; but it works. Here one batch of the forty is spoilt.

# %%
for name, tx in (
  ("alone", fop_optax.kfac(rate, layers)),
  ("apply_if_finite", optax.apply_if_finite(fop_optax.kfac(rate, layers), 5)),
):
  losses, _, opt_state = train(tx, spoilt=10)
  numbers = fop_optax.diagnostics(opt_state, layers)
  counts = {key: int(numbers[key]) for key in ("count", "nonfinite_losses", "nonfinite_gradients")}
  print(f"{name:16} loss in step 10: {losses[10]}, last {np.mean(losses[-5:]):.4f}; {counts}")
print("counted by apply_if_finite:", opt_state.total_notfinite)

# %% [markdown]
# ## Other last steps
#
# `scale_by_kfac` is a direction. What makes a step of it can be a rate, or the polar factor of each
# matrix (`orthogonalize`), or a rotation of fixed size that keeps each weight on its sphere
# (`hyperball`).

# %%
direction = lambda: optax.chain(
  fop_optax.scale_by_kfac(layers, relative_damping=1e-2), optax.trace(0.9)
)
falling = lambda peak: optax.cosine_decay_schedule(peak, STEPS)
last_steps = {
  "polar factor": [
    fop_optax.orthogonalize(layers=layers),
    optax.scale_by_learning_rate(falling(0.1)),
  ],
  "hyperball": [fop_optax.hyperball(falling(0.1), layers=layers)],
}
for name, last in last_steps.items():
  losses, _, _ = train(optax.chain(direction(), *last))
  note(name, losses)

# %% [markdown]
# ## Per-example gradients
#
# Where there are per-example gradients anyway, nothing has to be captured: `vmap` of `grad`, and an
# optimizer that takes leaves `[B, *param]`. Their curvature is not K-FAC's; the docstring of
# `kfac_per_example` says what it is.


# %%
def example_loss(params, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


per_example = jax.vmap(jax.value_and_grad(example_loss), (None, 0, 0))


def train_per_example(tx):
  @jax.jit
  def step(params, opt_state, x, y):
    loss, grads = per_example(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss.mean()

  params = init(0)
  opt_state, losses = tx.init(params), []
  for x, y in batches():
    params, opt_state, loss = step(params, opt_state, x, y)
    losses.append(float(loss))
  return losses


note("per example", train_per_example(fop_optax.kfac_per_example(rate)))

# %% [markdown]
# Each example's gradient can be clipped before they are averaged, as in private training:

# %%
clip = jax.vmap(optax.projections.projection_l2_ball)
tx = aggregating.process(
  optax.stateless(lambda grads, params: clip(grads)),
  fop_optax.scale_by_kfac_per_example(),
  optax.sgd(falling(0.1), momentum=0.9),
)
note("clipped by example", train_per_example(tx))

# %% [markdown]
# ## Flax NNX
#
# The weights are split from the rest; `copy=True` where the loss closes over that rest.

# %%
model = nnx.Sequential(
  nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 10, rngs=nnx.Rngs(1))
)
graphdef, weights, rest = nnx.split(model, nnx.Param, ...)


def nnx_loss(weights, x, y):
  return fop_optax.softmax_cross_entropy(nnx.merge(graphdef, weights, rest, copy=True)(x), y)


nnx_captured = fop_optax.capture(nnx_loss, weights, x, y)
losses, _, _ = train(fop_optax.kfac(rate, nnx_captured.layers), nnx_captured, weights)
note("Flax NNX", losses)

# %% [markdown]
# With `nnx.Optimizer`, `update` takes `stats` as one more argument:

# %%
optimizer = nnx.Optimizer(model, fop_optax.kfac(rate, nnx_captured.layers), wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
  refresh = fop_optax.refresh_due(optimizer.opt_state)
  weights = nnx.state(model, nnx.Param)
  loss, grads, stats = nnx_captured.value_and_grad(weights, x, y, refresh=refresh)
  optimizer.update(model, grads, stats=stats)
  return loss


note("nnx.Optimizer", [float(nnx_step(model, optimizer, x, y)) for x, y in batches()])


# %% [markdown]
# ## Flax Linen


# %%
class Network(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(10)(linen.relu(linen.Dense(64)(x)))


network = Network()
variables = network.init(jax.random.key(0), x)


def linen_loss(params, x, y):
  return fop_optax.softmax_cross_entropy(network.apply({"params": params}, x), y)


linen_captured = fop_optax.capture(linen_loss, variables["params"], x, y)
tx = fop_optax.kfac(rate, linen_captured.layers)
losses, _, _ = train(tx, linen_captured, variables["params"])
note("Flax Linen", losses)

# %% [markdown]
# ## Equinox
#
# The arrays of a module are the parameters; `vmap` of a model of one example is seen through.

# %%
mlp = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(0))
arrays, static = eqx.partition(mlp, eqx.is_inexact_array)


def equinox_loss(arrays, x, y):
  return fop_optax.softmax_cross_entropy(jax.vmap(eqx.combine(arrays, static))(x), y)


equinox_captured = fop_optax.capture(equinox_loss, arrays, x, y)
losses, _, _ = train(fop_optax.kfac(rate, equinox_captured.layers), equinox_captured, arrays)
note("Equinox", losses)

# %% [markdown]
# ## All of them
#
# Not a contest: rates were not tuned, initial weights differ between libraries, and what is done
# differs. It shows that each of them trains.

# %%
fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.plot(list(final.values()), list(final), "o")
ax.grid(axis="y", alpha=0.3)
ax.invert_yaxis()
ax.set(xscale="log", xlabel=f"training loss (nats), mean of the last 5 of {STEPS} steps")
ax.axvline(np.log(10), color="black", linestyle="--", linewidth=1)
ax.annotate("guessing", (np.log(10), len(final) - 1), xytext=(-54, 0), textcoords="offset points")
plt.show()

# %% [markdown]
# What does not fit: `optax.MultiSteps` hands on the statistics of its last micro-step alone (use
# `capture(micro_batches=m)`), and `optax.lookahead` has no way for `stats`. [The
# whole table](https://OWNER.github.io/fop_optax/composing.html) is on the site.
#
# Next: [what to turn when training goes wrong](08_tuning.ipynb).

# %% [markdown]
# # A character transformer
#
# Two transformer blocks learn to continue this project's pages, character by character. You see a
# scan over blocks, attention, an embedding and a table of positions captured; how K-FAC goes into
# the same loop as AdamW, Muon and SOAP; and how the four fare, in steps and in seconds: the others
# at the best of three rates each, K-FAC with its defaults.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/07_character_transformer.ipynb)

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
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import experiments
import fop_optax

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The text
#
# The last tenth is held out. It is small, and not prose; what matters here is the optimizers.

# %%
pages = pathlib.Path(experiments.__file__).parents[1] / ".docs" / "pages"
text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(pages.glob("**/*.md")))
alphabet = sorted(set(text))
codes = np.array([alphabet.index(character) for character in text], np.int32)
cut = len(codes) * 9 // 10
CONTEXT, BATCH, STEPS, WIDTH, HEADS, BLOCKS = 64, 16, 120, 64, 4, 2


def windows(part, count, rng):
  starts = rng.integers(0, len(part) - CONTEXT - 1, count)
  window = part[starts[:, None] + np.arange(CONTEXT + 1)]
  return window[:, :-1], window[:, 1:]


held_out = windows(codes[cut:], 64, np.random.default_rng(1))
print(f"{len(text):,} characters, {len(alphabet)} different ones")

# %% [markdown]
# ## The network
#
# One function of a block, and `jax.lax.scan` over the stacked weights of all blocks: the program is
# as short for 2 blocks as for 48.


# %%
def init(seed=0):
  keys = iter(jax.random.split(jax.random.key(seed), 8))

  def draw(*shape, fan_in):
    return jax.random.normal(next(keys), shape) / np.sqrt(fan_in)

  return {
    "tokens": draw(len(alphabet), WIDTH, fan_in=WIDTH),
    "positions": draw(CONTEXT, WIDTH, fan_in=WIDTH),
    "blocks": {
      "qkv": draw(BLOCKS, WIDTH, 3, HEADS, WIDTH // HEADS, fan_in=WIDTH),
      "out": draw(BLOCKS, HEADS, WIDTH // HEADS, WIDTH, fan_in=4 * WIDTH),
      "up": draw(BLOCKS, WIDTH, 4 * WIDTH, fan_in=WIDTH),
      "up_bias": jnp.zeros((BLOCKS, 4 * WIDTH)),
      "down": draw(BLOCKS, 4 * WIDTH, WIDTH, fan_in=16 * WIDTH),
    },
    "head": draw(WIDTH, len(alphabet), fan_in=4 * WIDTH),
  }


def normalised(h):
  return h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def block(h, own):
  q, k, v = jnp.moveaxis(jnp.einsum("btd,dche->btche", normalised(h), own["qkv"]), 2, 0)
  scores = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(WIDTH // HEADS)
  scores = jnp.where(np.tri(CONTEXT, dtype=bool), scores, -1e9)
  mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v)
  h = h + jnp.einsum("bthe,hed->btd", mixed, own["out"])
  up = jax.nn.gelu(normalised(h) @ own["up"] + own["up_bias"])
  return h + up @ own["down"], None


def loss_fn(params, x, y):
  h = params["tokens"][x] + params["positions"]
  h, _ = jax.lax.scan(block, h, params["blocks"])
  return fop_optax.softmax_cross_entropy(normalised(h) @ params["head"], y)


captured = fop_optax.capture(loss_fn, init(), *held_out)
print(captured)

# %% [markdown]
# The stacked weights are layers, a block each of them. Letters that are looked up (`9d` in a table
# means a diagonal) have counts for an input factor.
#
# ## Four optimizers, one loop
#
# SOAP and Muon take gradients alone. `layers` tells SOAP which axes of a weight are its rows and
# columns, and Muon which parameters are matrices. Rates fall to zero along a cosine; `peak`
# multiplies the update, so that one compiled program serves all rates.
#
# All take turns, three times, and of each step the quickest of three counts: so the seconds mean
# something on a busy machine too. K-FAC makes the same run three times.

# %%
cosine = optax.cosine_decay_schedule(1.0, STEPS)
default = optax.cosine_decay_schedule(0.1, STEPS)
optimizers = {
  "AdamW": (optax.adamw(cosine), (0.003, 0.01, 0.03)),
  "Muon": (
    optax.contrib.muon(
      cosine, muon_weight_dimension_numbers=fop_optax.dimension_numbers(captured.layers)
    ),
    (0.01, 0.03, 0.1),
  ),
  "SOAP": (fop_optax.soap(cosine, layers=captured.layers), (0.003, 0.01, 0.03)),
  "K-FAC": (fop_optax.kfac(default, captured.layers), (1.0, 1.0, 1.0)),  # rate 0.1
}


def compiled_step(name, tx):
  @jax.jit
  def step(params, opt_state, peak, x, y):
    if name == "K-FAC":
      refresh = fop_optax.refresh_due(opt_state)
      loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    else:
      (loss, grads), stats = jax.value_and_grad(loss_fn)(params, x, y), None
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    updates = jax.tree.map(lambda u: peak * u, updates)
    return optax.apply_updates(params, updates), opt_state, loss

  params, batch = init(), windows(codes[:cut], BATCH, np.random.default_rng(0))
  jax.block_until_ready(step(params, tx.init(params), 0.0, *batch))  # compiles
  return step


def train(step, tx, peak):
  """Training losses, held-out loss, and the seconds of each step."""
  rng, params, losses, seconds = np.random.default_rng(0), init(), [], []
  opt_state = tx.init(params)
  for _ in range(STEPS):
    batch, start = windows(codes[:cut], BATCH, rng), time.perf_counter()
    params, opt_state, loss = jax.block_until_ready(step(params, opt_state, peak, *batch))
    losses.append(float(loss))
    seconds.append(time.perf_counter() - start)
  return np.array(losses), float(loss_fn(params, *held_out)), seconds


every = {name: optax.with_extra_args_support(tx) for name, (tx, _) in optimizers.items()}
steps = {name: compiled_step(name, tx) for name, tx in every.items()}
runs, clocks = {name: {} for name in every}, {name: [] for name in every}
for turn in range(3):
  for name, tx in every.items():
    peak = optimizers[name][1][turn]
    losses, held, seconds = train(steps[name], tx, peak)
    runs[name][peak] = losses, held
    clocks[name].append(seconds)
clock = {name: np.cumsum(np.min(own, axis=0)) for name, own in clocks.items()}

# %%
last = lambda run: run[0][-10:].mean()
best = {name: min(own, key=lambda peak: last(own[peak])) for name, own in runs.items()}
print("            rate   training loss   held-out loss   seconds")
for name, own in runs.items():
  for peak, run in own.items():
    rate = 0.1 if name == "K-FAC" else peak
    star = "*" if peak == best[name] else " "
    print(
      f"{name:8} {rate:6.3f}{star}  {last(run):13.3f}   {run[1]:13.3f}   {clock[name][-1]:7.1f}"
    )
print(f"(* the best of its optimizer; guessing: {np.log(len(alphabet)):.3f})")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
lines = ((0, ()), (0, (6, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
colours = ("#006BA4", "#595959", "#5F9ED1", "#FF800E")
smooth = lambda losses: np.convolve(losses, np.ones(5) / 5, mode="valid")
for (name, own), line, colour in zip(runs.items(), lines, colours, strict=True):
  losses, _ = own[best[name]]
  for ax, at in zip(axes, (np.arange(1, STEPS + 1), clock[name]), strict=True):
    look = {"linestyle": line, "color": colour, "linewidth": 2, "label": name}
    ax.plot(at[4:], smooth(losses), **look)
axes[0].set(xlabel="step", ylabel="training loss (nats), mean of 5 steps")
axes[1].set(xlabel="seconds, without compilation")
axes[0].legend(frameon=False)
plt.show()

# %%
losses, _ = runs["K-FAC"][best["K-FAC"]]
for name in ("AdamW", "Muon", "SOAP"):
  level = smooth(runs[name][best[name]][0])[-1]
  below = np.flatnonzero(smooth(losses) <= level)
  if len(below):
    step = below[0] + 5
    print(
      f"K-FAC is at {name}'s last loss after {step} of {STEPS} steps,"
      f" {clock['K-FAC'][step - 1]:.1f} s against {clock[name][-1]:.1f} s."
    )
  else:
    print(f"K-FAC does not come to {name}'s last loss, {level:.3f}, in {STEPS} steps.")

# %% [markdown]
# One seed, one small text, and rates of three only: take it for a template, not for a ranking. The
# [site](https://OWNER.github.io/fop_optax/tuning.html) has thirteen workloads with three seeds.

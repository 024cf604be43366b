# %% [markdown]
# # The geometry of FOP
#
# K-FAC uses the mean gradient of a batch. Fisher-Orthogonal Projection
# ([FOP](https://arxiv.org/abs/2508.13898)) cuts the batch into halves and also uses the difference
# of their gradients. You see, with two parameters and in pictures, what it does with it, when it is
# nothing but K-FAC, and, with numbers from many draws and from a small training, what it gains.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fop_optax/blob/main/notebooks/03_geometry_of_fop.ipynb)

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
BLUE, ORANGE, GREY, DARK, SKY, RUST = (
  "#006BA4",
  "#FF800E",
  "#ABABAB",
  "#595959",
  "#5F9ED1",
  "#C85200",
)

# %% [markdown]
# ## Two parameters
#
# Linear regression with two correlated inputs and noise in the targets: a long, narrow valley. A
# batch of 16 examples is cut into two halves. `capture(groups=2)` gives, in one backward pass, the
# mean gradient, the *contrast* (gradient of the first half minus that of the second), and the
# factors of the Fisher matrix. With one output the product of the factors is the Fisher matrix
# itself, and for this loss it is the Hessian. So nothing is approximate here.


# %%
MIX, TRUE, NOISE = jnp.array([[1.0, 0.6], [0.0, 0.6]]), jnp.array([1.0, -1.0]), 0.7


def draw(key, size=16):
  kx, ky = jax.random.split(key)
  x = jax.random.normal(kx, (size, 2)) @ MIX
  return x, (x @ TRUE + NOISE * jax.random.normal(ky, (size,)))[:, None]


def loss_fn(params, x, y):
  return fop_optax.squared_error(x @ params["w"], y)


x, y = draw(jax.random.key(5))
start = jnp.array([-1.2, 1.6])
params = {"w": start[:, None]}
captured = fop_optax.capture(loss_fn, params, x, y, groups=2, fisher="exact")
loss, grads, stats = captured.value_and_grad(params, x, y)

mean, contrast = grads["w"][:, 0], stats.contrasts[0]["w"][:, 0]
g1, g2 = mean + contrast / 2, mean - contrast / 2
F = stats.factors[0].A[0] * stats.factors[0].G[0, 0, 0]
hessian = jax.hessian(lambda w: loss_fn({"w": w[:, None]}, x, y))(start)
print("Fisher matrix\n", F)
print("differs from the Hessian by at most", jnp.abs(F - hessian).max())

# %% [markdown]
# ## The projection
#
# FOP takes out of the contrast its part along the mean gradient, as the Fisher matrix measures
# angles: `g_perp = contrast - s mean`, with `s` such that `mean' F g_perp = 0`. It then steps along
# `mean + beta g_perp`, preconditioned by the inverse of the damped Fisher matrix M, with the `beta`
# that minimises a quadratic model, times a length `eta`.

# %%
damping = 0.1 * jnp.trace(F) / 2
M = F + damping * jnp.eye(2)
solve, multiply = lambda v: jnp.linalg.solve(M, v), lambda v: F @ v
fop = fop_optax.fop_direction(mean, contrast[None], solve, multiply)
perp = contrast - fop.s[0] * mean

norm = lambda v: jnp.sqrt(v @ F @ v)
for name, v in (("contrast", contrast), ("g_perp  ", perp)):
  inner = mean @ F @ v
  print(f"mean' F {name}  = {inner:9.6f}, a cosine of {inner / norm(mean) / norm(v):7.4f}")
print(f"mean' g_perp      = {mean @ perp:9.6f}: not orthogonal in the ordinary sense")
print(f"mean' M^-1 g_perp = {mean @ solve(perp):9.6f}: nor as the inverse measures it")
print(f"beta {fop.beta[0]:.3f}   eta {fop.eta:.3f}   rho2 {fop.rho2:.3f}")

# %% [markdown]
# The line but last is where FOP's effect comes from. If `mean` and `g_perp` were orthogonal in the
# metric of the inverse, `beta` would be 0. `rho2`, between 0 and 1, says how far they are from it.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")


def arrow(ax, tail, by, colour, label, style="-"):
  """From `tail` by `by`, with its name a little beyond the tip."""
  look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "linestyle": style}
  ax.annotate("", xy=tail + by, xytext=tail, arrowprops=look | {"shrinkA": 0, "shrinkB": 0})
  place = {"ha": "right" if by[0] < 0 else "left", "va": "top" if by[1] < 0 else "bottom"}
  ax.text(*(tail + by + 0.03 * jnp.sign(by)), label, color=colour, fontsize=9, **place)


# Left: gradients. On the ellipse v' F v is constant; its tangent is F-orthogonal to the mean.
angles = jnp.linspace(0, 2 * jnp.pi, 200)
circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
ellipse = jnp.linalg.solve(jnp.linalg.cholesky(F).T, circle) * jnp.sqrt(mean @ F @ mean)
left.plot(*ellipse, color=GREY, linewidth=1, label="v' F v as large as the mean's")
along = 3 * perp / jnp.linalg.norm(perp)
left.plot(*jnp.stack([mean - along, mean + along]).T, ":", color=GREY, label="tangent at the mean")
origin = jnp.zeros(2)
arrow(left, origin, g1, SKY, "half 1")
arrow(left, origin, g2, SKY, "half 2")
arrow(left, origin, mean, BLUE, "mean")
arrow(left, origin, contrast, DARK, "contrast", "--")
arrow(left, origin, perp, ORANGE, "g_perp")
reach = 1.4 * max(float(jnp.abs(v).max()) for v in (ellipse, g1, g2, contrast, perp))
left.set(title="Gradients at the start", xlabel="by parameter 1", ylabel="by parameter 2")
left.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)

# Right: the loss of the batch, and one step of each.
batch_loss = jax.jit(lambda w: loss_fn({"w": w[:, None]}, x, y))
best = (mean @ mean) / (mean @ F @ mean)  # the best length along the gradient
steps = {
  "gradient": (best * mean, DARK, "--"),
  "natural gradient": (solve(mean), BLUE, "-"),
  "FOP": (fop.direction, ORANGE, "-"),
}
minimum = start - jnp.linalg.solve(F, mean)
radius = 0.8 * float(jnp.abs(start - minimum).max())
grid = np.linspace(-radius, radius, 80)
w1, w2 = np.array((start + minimum) / 2)[:, None] + grid
surface = jax.vmap(lambda b: jax.vmap(lambda a: batch_loss(jnp.stack([a, b])))(w1))(w2)
lowest = batch_loss(minimum)
levels = lowest + (loss - lowest) * np.array([0.02, 0.1, 0.3, 0.6, 1, 1.6, 2.5])
right.contour(w1, w2, surface, levels=levels, colors=GREY, linewidths=0.8)
for name, (by, colour, style) in steps.items():
  arrow(right, start, -by, colour, name, style)
right.plot(*start, "o", color="black", markersize=5)
right.plot(*minimum, "*", color="black", markersize=11)
right.annotate("start", start, textcoords="offset points", xytext=(-30, 4))
right.annotate("minimum", minimum, textcoords="offset points", xytext=(-64, -4))
right.set(title="Loss of the batch, and one step", aspect="equal")
right.set(xlabel="parameter 1", ylabel="parameter 2")
for ax in (left, right):
  ax.locator_params(nbins=5)
plt.show()

# %%
print(f"loss at the start             {loss:.4f}")
for name, (by, _, _) in steps.items():
  print(f"after {name:22}  {batch_loss(start - by):.4f}")
print(f"lowest possible               {batch_loss(minimum):.4f}")
print("(that of the gradient is of the length that is best along it)")

# %% [markdown]
# ## One draw proves nothing
#
# So we draw 2,000 batches, and ask for the loss on *all* data after one step from the same start,
# of the natural gradient and of FOP, at a rate of one and of one half. Damping is in units of the
# mean eigenvalue of the Fisher matrix.

# %%
covariance = MIX.T @ MIX


def excess(w):
  """Loss on all data, over that of the best parameters."""
  return (w - TRUE) @ covariance @ (w - TRUE) / 2


def after_one_step(key, relative_damping, rate):
  x, y = draw(key)
  half_1, half_2 = (jax.grad(loss_fn)(params, x[i::2], y[i::2])["w"][:, 0] for i in range(2))
  mean, contrast, F = (half_1 + half_2) / 2, half_1 - half_2, x.T @ x / len(x)
  M = F + relative_damping * jnp.trace(F) / 2 * jnp.eye(2)
  solve = lambda v: jnp.linalg.solve(M, v)
  fop = fop_optax.fop_direction(mean, contrast[None], solve, lambda v: F @ v)
  return excess(start - rate * solve(mean)), excess(start - rate * fop.direction), fop.rho2


keys = jax.random.split(jax.random.key(0), 2000)
print(f"excess loss at the start {excess(start):.3f}; after one step, mean of 2,000 draws:")
print("damping   rate   natural gradient     FOP   FOP lower in   median rho2")
for relative_damping in (1e-3, 0.1, 1.0):
  for rate in (1.0, 0.5):
    natural, own, rho2 = jax.vmap(lambda k, d=relative_damping, r=rate: after_one_step(k, d, r))(
      keys
    )
    share = 100 * jnp.mean(own < natural)
    print(
      f"{relative_damping:7.3f}   {rate:4.1f}   {natural.mean():16.4f}  {own.mean():6.4f}"
      f"   {share:10.0f} %   {jnp.median(rho2):11.3f}"
    )

# %% [markdown]
# With hardly any damping, a natural gradient step of rate one almost solves the problem; FOP's does
# not. With much damping FOP comes out lower more often than not. But compare the rows: the natural
# gradient with a tenth of that damping, which costs nothing, gets far lower still.
#
# ## When FOP is K-FAC
#
# Five facts that follow from the equations, as numbers. The fourth says what the contrast cannot
# be: a measure of noise. A contrast ten times as large gives the same step.

# %%
natural = solve(mean)
apart = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
direction = lambda *args: fop_optax.fop_direction(*args).direction
identity = lambda v: 2.0 * v
print("relative distance of the directions")
equal = direction(mean, jnp.zeros((1, 2)), solve, multiply)
print(f"  equal halves, from K-FAC                          {apart(equal, natural):.0e}")
round_ = direction(mean, contrast[None], lambda v: v / 2.1, identity)
print(f"  F a multiple of the identity, from K-FAC          {apart(round_, mean / 2.1):.0e}")
inverse = direction(mean, contrast[None], solve, None)
print(f"  projection in the metric of the inverse, K-FAC    {apart(inverse, natural):.0e}")
longer = direction(mean, 10 * contrast[None], solve, multiply)
print(f"  ten times the contrast, from FOP                  {apart(longer, fop.direction):.0e}")
swapped = direction(mean, -contrast[None], solve, multiply)
print(f"  halves swapped, from FOP                          {apart(swapped, fop.direction):.0e}")
print(f"  (FOP from K-FAC, in this notebook's example       {apart(fop.direction, natural):.0e})")

# %% [markdown]
# ## In many dimensions
#
# One contrast is one direction. One would think that the more dimensions there are, the less it has
# in common with the mean gradient. That holds where all dimensions count, but not where a few of
# them carry the gradient. Random gradients with the covariance F, damping of one mean eigenvalue:


# %%
def rho2_of(key, values):
  g1, g2 = jax.random.normal(key, (2, len(values))) * jnp.sqrt(values)
  M = values + jnp.mean(values)
  return fop_optax.fop_direction(
    (g1 + g2) / 2, (g1 - g2)[None], lambda v: v / M, lambda v: values * v
  ).rho2


dims = (2, 4, 10, 30, 100, 300, 1000)
spectra = {
  "eigenvalues 1, 1/2, 1/3, ...": lambda d: 1 / jnp.arange(1, d + 1),
  "eigenvalues evenly from 1 to 0.01 (logarithms)": lambda d: jnp.logspace(0, -2, d),
}
fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for (name, spectrum), colour, mark in zip(spectra.items(), (ORANGE, BLUE), "os", strict=True):
  found = [jax.vmap(rho2_of, (0, None))(keys[:500], spectrum(d)) for d in dims]
  low, median, high = np.percentile(np.array(found), (10, 50, 90), axis=1)
  ax.plot(dims, median, marker=mark, color=colour, label=name)
  ax.fill_between(dims, low, high, color=colour, alpha=0.2, linewidth=0)
  print(f"median rho2 at {dims[-1]} dimensions, {name}: {median[-1]:.4f}")
ax.set(xscale="log", yscale="log", xlabel="dimensions", ylabel="rho2")
ax.set(ylim=(1e-6, 3), title="Median, and 10 to 90 % of 500 draws")
ax.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## A real training, with paired seeds
#
# Digits, the network of the [quick start](01_quickstart.ipynb), six seeds. In each seed K-FAC and
# FOP have the same initial parameters, the same batches and the same rate; both have their
# defaults. We look at the *differences*, seed by seed.

# %%
digits = data.load("digits")
scaled = lambda images: ((images - digits.mean) / digits.std).reshape(len(images), -1)
train_x, train_y = scaled(digits.train_images).astype(np.float32), digits.train_labels
test_x, test_y = scaled(digits.test_images).astype(np.float32), digits.test_labels
BATCH, STEPS, SEEDS = 256, 80, range(6)


def init(seed, sizes=(64, 128, 64, 10)):
  params = {}
  for i, key in enumerate(jax.random.split(jax.random.key(seed), 3)):
    scale = np.sqrt(2 / sizes[i])
    params[f"w{i}"] = scale * jax.random.normal(key, (sizes[i], sizes[i + 1]))
    params[f"b{i}"] = jnp.zeros(sizes[i + 1])
  return params


def mlp_loss(params, x, y):
  x = jax.nn.relu(x @ params["w0"] + params["b0"])
  x = jax.nn.relu(x @ params["w1"] + params["b1"])
  return fop_optax.softmax_cross_entropy(x @ params["w2"] + params["b2"], y)


def train(make, groups):
  """Losses and seconds [seeds, steps], test losses; of FOP rho2 [seeds, steps, layers]."""
  batch = train_x[:BATCH], train_y[:BATCH]
  captured = fop_optax.capture(mlp_loss, init(0), *batch, groups=groups)
  tx = make(optax.cosine_decay_schedule(0.1, STEPS), captured.layers)

  @jax.jit
  def step(params, opt_state, x, y):
    refresh = fop_optax.refresh_due(opt_state)
    loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    numbers = fop_optax.diagnostics(opt_state, captured.layers)["layers"]
    rho2 = {name: own["rho2"][0] for name, own in numbers.items() if "rho2" in own}
    return optax.apply_updates(params, updates), opt_state, (loss, rho2)

  jax.block_until_ready(step(init(0), tx.init(init(0)), *batch))  # compiles
  runs = []
  for seed in SEEDS:
    rng, params, out, seconds = np.random.default_rng(seed), init(seed), [], []
    opt_state = tx.init(params)
    for _ in range(STEPS):
      chosen = rng.choice(len(train_y), BATCH, replace=False)
      batch, start = (train_x[chosen], train_y[chosen]), time.perf_counter()
      params, opt_state, numbers = jax.block_until_ready(step(params, opt_state, *batch))
      seconds.append(time.perf_counter() - start)
      out.append(jax.device_get(numbers))
    losses, rho2 = zip(*out, strict=True)
    runs.append(
      (losses, mlp_loss(params, test_x, test_y), seconds, [list(own.values()) for own in rho2])
    )
  return tuple(map(np.array, zip(*runs, strict=True)))


kfac_losses, kfac_test, kfac_seconds, _ = train(fop_optax.kfac, groups=1)
fop_losses, fop_test, fop_seconds, rho2 = train(fop_optax.fop, groups=2)

# %%
T = 2.571  # Student's, 95 %, five degrees of freedom


def paired(name, kfac, fop):
  apart = fop - kfac
  half = T * apart.std(ddof=1) / np.sqrt(len(apart))
  low, high = apart.mean() - half, apart.mean() + half
  verdict = "FOP lower" if high < 0 else "K-FAC lower" if low > 0 else "no difference shown"
  print(
    f"{name:34} K-FAC {kfac.mean():8.4f}  FOP {fop.mean():8.4f}"
    f"  FOP - K-FAC {apart.mean():8.4f} [{low:.4f}, {high:.4f}]  {verdict}"
  )


print("mean of six seeds, 95 % interval of the paired difference")
paired("loss, mean of steps 1 to 20", kfac_losses[:, :20].mean(1), fop_losses[:, :20].mean(1))
ends = [np.log10(own[:, -8:].mean(1)) for own in (kfac_losses, fop_losses)]
paired("log10 of the loss, last 8 steps", *ends)
paired("test loss", kfac_test, fop_test)
took = [own.min(axis=0).sum() for own in (kfac_seconds, fop_seconds)]  # the quickest of six
print("seconds of all steps: K-FAC {:.3f}, FOP {:.3f}".format(*took))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
number = np.arange(1, STEPS + 1)
for losses, name, colour, line in (
  (kfac_losses, "K-FAC", BLUE, "--"),
  (fop_losses, "FOP", ORANGE, "-"),
):
  left.plot(number, np.median(losses, axis=0), line, color=colour, label=name)
  left.fill_between(number, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
left.set(yscale="log", xlabel="step", ylabel="training loss (nats)", title="Median and range")
left.legend(frameon=False)
for i, (line, colour) in enumerate(zip(("-", "--", ":"), (BLUE, ORANGE, DARK), strict=True)):
  right.plot(number, np.median(rho2, axis=0)[:, i], line, color=colour, label=f"layer {i + 1}")
right.set(yscale="log", xlabel="step", ylabel="rho2", title="How far FOP is from K-FAC")
right.legend(frameon=False)
plt.show()
print("median rho2 over all steps, by layer:", np.median(rho2, axis=(0, 1)).round(4))

# %% [markdown]
# ## What to take from it
#
# Read the verdicts above, not our hopes. FOP's step differs from K-FAC's as far as `rho2` is above
# zero, and the cost of the contrast is in the seconds. On
# [thirteen workloads](https://OWNER.github.io/fop_optax/tuning.html) it was no better than K-FAC.
# If you train, take `kfac`; if you study FOP, `diagnostics` gives you `rho2`, `beta` and `eta` of
# every layer.
#
# Next: [composing with optax](04_composing.ipynb).

"""The pages on coming from elsewhere: the functions they give take the steps of the other project.

Numbers of the others are those stored in `oracles`, optax's own, or, where there are none, of
`theirs`. The functions are read out of the pages' blocks.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pages
import pytest
from selection import slow_but
import theirs

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
ORACLES = pathlib.Path(__file__).parent / "oracles"


def given(page, name):
  """What the page says a name is."""
  return pages.defining(pages.PAGES / "migration" / f"{page}.md", name)


def run(tx, params, grads):
  """Parameters after each of the given gradients, as optax applies them."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads)[1])(params)


def close(got, want, tolerance=1e-10):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
  )


def some_tensors(steps, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"w": (4, 6), "tall": (6, 3), "b": (3,)}
  draw = lambda *lead: {k: jnp.asarray(rng.normal(size=(*lead, *s))) for k, s in shapes.items()}
  return draw(), draw(steps)


# AdamW


def test_adamw():
  params, grads = some_tensors(8)
  mask = {"w": True, "tall": True, "b": False}
  kwargs = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "mask": mask}
  rate = optax.linear_schedule(0.1, 0.01, 8)
  close(
    run(given("adamw", "adamw")(rate, **kwargs), params, grads),
    run(optax.adamw(rate, **kwargs), params, grads),
  )


def test_kfac_decays_weights_as_adamw_did():
  """Where the gradient is zero; what is in no layer is the fallback's: AdamW's own steps."""
  loss = lambda params, x: jnp.mean((params["gain"] * (x @ params["w"])) ** 2)
  params = {"w": jnp.ones((3, 2)), "gain": jnp.array([2.0, 3.0])}
  captured = fop_optax.capture(loss, params, jnp.ones((4, 3)))
  assert set(captured.fallbacks) == {"['gain']"}
  tx = given("adamw", "from_adamw")(captured.layers, 3e-4, 0.1, b2=0.9)
  grads = {"w": jnp.zeros((3, 2)), "gain": jnp.array([1.0, -1.0])}

  @jax.jit
  def update(params):
    _, _, stats = captured.value_and_grad(params, jnp.ones((4, 3)))
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  adam = optax.adamw(3e-4, b2=0.9, weight_decay=0.1)
  close(update(params), adam.update(grads, adam.init(params), params)[0])


# Muon


@pytest.mark.parametrize(
  "kwargs",
  [
    {"weight_decay": 0.1, "adam_learning_rate": 1e-3, "adam_weight_decay": 0.05},
    *(
      pytest.param(row, marks=pytest.mark.slow)
      for row in (
        {"nesterov": False, "consistent_rms": 0.2, "ns_steps": 3, "beta": 0.8},
        {"ns_coeffs": ((4.0848, -6.8946, 2.927), (3.9505, -6.3029, 2.6377)), "ns_steps": 2},
      )
    ),
  ],
)
def test_muon(kwargs):
  """On matrices and the rest; a small eps is their only division that we do not have."""

  def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["tall"] + params["b"]) ** 2)

  params, grads = some_tensors(6)
  layers = fop_optax.capture(loss, params, jnp.ones((5, 4))).layers
  kwargs = {"eps": 1e-30} | kwargs
  got = run(given("muon", "muon")(0.02, layers, **kwargs), params, grads)
  close(got, run(optax.contrib.muon(0.02, **kwargs), params, grads), 1e-9)


def test_the_start_of_optax_muon_has_less_momentum():
  """`optax.trace` against optax's Muon, up to a factor; the numbers on the page."""
  share = lambda t, beta=0.95: (1 - beta**t) / (1 - beta ** (t + 1))
  assert [round(float(share(t)), n) for t, n in ((1, 2), (50, 3))] == [0.51, 0.996]
  grads = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))

  def outputs(tx):
    step = lambda state, g: tx.update(g, state)[::-1]
    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

  trace = outputs(optax.trace(0.95))
  muon = outputs(given("muon", "muon_momentum")(0.95))
  t = jnp.arange(1, 21)[:, None]
  close(muon * (1 - 0.95**t) / 0.05, grads + 0.95 * share(t) * trace)


# kfac-jax


def steps_of_a_captured_loss(captured, tx, params, x, y):
  """Parameters after each step on the batches `x[t], y[t]`."""

  @jax.jit
  def step(params, state, x, y):
    refresh = fop_optax.refresh_due(state)
    _, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  state, after = tx.init(params), []
  for batch in zip(x, y, strict=True):
    params, state = step(params, state, *map(jnp.asarray, batch))
    after.append(params)
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)


def start(file):
  """Stored numbers, and the parameters of a network of two layers that they start from."""
  oracle = np.load(ORACLES / file)
  return oracle, {name: jnp.asarray(oracle[f"p0_{name}"]) for name in ("w1", "b1", "w2", "b2")}


@pytest.mark.parametrize(
  ("mode", "exact"),
  [
    ("fisher_exact", False),
    *(
      pytest.param(*row, marks=pytest.mark.slow)
      for row in (("fisher_exact", True), ("fisher_empirical", False), ("fisher_empirical", True))
    ),
  ],
)
def test_kfac_jax_first_step(mode, exact):
  """Stored numbers of their optimizer, from the loss of the page."""
  oracle = np.load(ORACLES / "kfac_jax.npz")
  params = {name: jnp.asarray(oracle[f"p_{name}"]) for name in ("w1", "b1", "w2", "b2")}
  batch = jnp.asarray(oracle["x"]), jnp.asarray(oracle["y"])
  captured = given("kfac_jax", "capture")(params, *batch, mode)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, *batch)
  for damping in (0.01, 0.1):
    tx = given("kfac_jax", "from_kfac_jax")(
      captured.layers,
      learning_rate=1.0,
      momentum=0.0,
      damping=damping,
      use_exact_inverses=exact,
      examples=len(batch[0]) if mode == "fisher_empirical" else 1,
    )
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    key = f"{mode}/damp{damping}/{'exact' if exact else 'pi'}"
    close(updates, {name: -oracle[f"{key}/prec_{name}"] for name in params})


BOUND = {
  "bound": {"norm_constraint": 1e-3, "inverse_update_period": 2},
  "exact_inverses": {
    "norm_constraint": 1e-2,
    "inverse_update_period": 1,
    "use_exact_inverses": True,
    "l2_reg": 0.01,
  },
  "empirical": {"norm_constraint": 1e-4, "inverse_update_period": 1, "examples": 12},
}


@pytest.mark.parametrize("config", slow_but(BOUND, "empirical"))
def test_kfac_jax_bound_and_momentum(config):
  """Stored: six steps with bound, momentum and plain means of statistics."""
  oracle, params = start("kfac_jax_steps.npz")
  x, y = oracle["x"], oracle["y"]
  mode = "fisher_empirical" if config == "empirical" else "fisher_exact"
  captured = given("kfac_jax", "capture")(params, x[0], y[0], mode)
  tx = given("kfac_jax", "from_kfac_jax")(
    captured.layers, 0.3, momentum=0.9, damping=0.02, curvature_ema=1.0, **BOUND[config]
  )
  got = steps_of_a_captured_loss(captured, tx, params, x, y)
  close(got, {name: oracle[f"{config}/p_{name}"] for name in params})


# KAISA

CLIPPED = {
  "eigen": {"kl_clip": 1e-3, "inv_update_steps": 2, "factor_decay": 0.6},
  "free": {"kl_clip": None},
}


@pytest.mark.parametrize("config", slow_but(CLIPPED, "eigen"))
def test_kaisa(config):
  """Stored: six steps, with a `factor_decay` there whose average starts as ours does."""
  oracle, params = start("kaisa.npz")
  x, y = oracle["x"], oracle["y"]
  params = {name: p.T for name, p in params.items()}  # PyTorch's weights are [out, in]
  captured = fop_optax.capture(given("kaisa", "loss_fn"), params, x[0], y[0])
  tx = given("kaisa", "from_kaisa")(
    captured.layers, 0.02, weight_decay=0.05, damping=0.003, examples=12, **CLIPPED[config]
  )
  got = steps_of_a_captured_loss(captured, tx, params, x, y)
  close({name: p.mT if p.ndim == 3 else p for name, p in got.items()},
        {name: oracle[f"{config}/p_{name}"] for name in params})  # fmt: skip


# ASDL


@pytest.mark.parametrize("damping", [0.01, pytest.param(0.1, marks=pytest.mark.slow)])
def test_asdl_first_step(damping):
  """Stored numbers of `KfacGradientMaker`, from the loss of the page."""
  oracle = np.load(ORACLES / "asdl_kfac_mlp.npz")
  weights, biases = (
    {name: jnp.asarray(oracle[f"{name}/{part}"]) for name in ("l1", "l2", "l3")}
    for part in ("weight", "bias")
  )
  batch = jnp.asarray(oracle["x"]), jnp.asarray(oracle["y"])
  captured = given("asdl", "capture")(weights, biases, *batch, "fisher_emp")
  tx = given("asdl", "from_asdl")(captured.layers, lr=1.0, damping=damping)

  @jax.jit
  def update(weights):
    _, grads, stats = captured.value_and_grad(weights, biases, *batch)
    return tx.update(grads, tx.init(weights), weights, stats=stats)[0]

  want = {name: -oracle[f"damp{damping}/{name}/prec_weight"] for name in weights}
  close(update(weights), want)


@pytest.mark.slow
def test_asdl_and_sgd():
  """Four steps, with each of the numbers that SGD and the two scales add."""
  weights, (x, y) = theirs.network(), theirs.batches(4)
  kwargs = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3, "damping": 0.02, "scale": 3.0,
            "grad_scale": 0.5}  # fmt: skip
  want = theirs.asdl(weights, x, y, **kwargs)
  params = {f"l{i}": jnp.asarray(w[:-1].T) for i, w in enumerate(weights)}
  biases = {f"l{i}": jnp.asarray(w[-1]) for i, w in enumerate(weights)}
  capture = given("asdl", "capture")
  captured = capture(params, biases, x[0], y[0], "fisher_emp")
  tx = given("asdl", "from_asdl")(captured.layers, **kwargs)
  state = tx.init(params)
  for batch, after in zip(zip(x, y, strict=True), want, strict=True):
    _, grads, stats = captured.value_and_grad(params, biases, *map(jnp.asarray, batch))
    updates, state = tx.update(grads, state, params, stats=stats)
    params = optax.apply_updates(params, updates)
    close(params, {f"l{i}": w[:-1].T for i, w in enumerate(after)}, 1e-9)


@pytest.mark.parametrize("page", ["asdl", pytest.param("kaisa", marks=pytest.mark.slow)])
def test_what_is_in_no_layer_takes_the_step_of_sgd(page):
  loss = lambda params, x: jnp.mean((params["gain"] * (x @ params["w"])) ** 2)
  params, x = {"w": jnp.ones((3, 2)), "gain": jnp.array([2.0, 3.0])}, jnp.ones((4, 3))
  captured = fop_optax.capture(loss, params, x)
  more = {"scale": 3.0, "grad_scale": 1.0} if page == "asdl" else {"examples": 4}
  tx = given(page, f"from_{page}")(
    captured.layers, lr=0.1, momentum=0.9, weight_decay=0.2, damping=0.1, **more
  )
  sgd = optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1, 0.9))

  @jax.jit
  def update(params):
    _, grads, stats = captured.value_and_grad(params, x)
    own = tx.update(grads, tx.init(params), params, stats=stats)[0]
    return own["gain"], sgd.update(grads, sgd.init(params), params)[0]["gain"]

  close(*update(params))


# SOAP and Shampoo: stored trajectories

SOAP = {
  "a_default": {},
  "b_1d_wd0": {"precondition_1d": True, "weight_decay": 0.0},
  "c_1d_norm": {"precondition_1d": True, "normalize_grads": True},
  "d_onesided": {"max_precond_dim": 4},
  "e_merge9": {"merge_dims": True, "max_precond_dim": 9},
  "f_betas": {
    "betas": (0.9, 0.99),
    "shampoo_beta": 0.9,
    "precondition_frequency": 1,
    "correct_bias": False,
    "eps": 1e-6,
  },
}
# Of the others one gradient leaves the first basis open: see `test_soap`, which gives it.
DETERMINED = {"a_default": "SbT", "b_1d_wd0": "ST", "c_1d_norm": "ST", "e_merge9": "Sb",
              "f_betas": "SbT", "d_onesided": ("W1", "b", "W2", "S", "T")}  # fmt: skip


def stored(file, names):
  oracle = np.load(ORACLES / file)
  params, grads = (
    {name: jnp.asarray(oracle[f"{what}_{name}"], float) for name in names} for what in ("p0", "g")
  )
  return oracle, params, grads


@pytest.mark.parametrize("config", slow_but(SOAP, "a_default"))
def test_soap(config):
  names = DETERMINED[config]
  oracle, params, grads = stored("soap_official.npz", names)
  tx = given("soap", "from_soap")(**{"lr": 3e-3, "precondition_frequency": 3} | SOAP[config])
  close(run(tx, params, grads), {name: oracle[f"{config}/f64/p_{name}"] for name in names})


KEPT = {"target_parameter_dimensionality": float("inf")}
ADAM = {"grafting_config": ("adam", 0.999, 1e-8)}
META = {
  "a_plain": KEPT,
  "b_override": KEPT | {"inverse_exponent_override": {2: 0.5}},
  "c_onesided": KEPT | {"inverse_exponent_override": {2: {0: 0.5, 1: 0.0}}},
  "d_adamgraft": KEPT | ADAM | {"start_preconditioning_step": 5, "weight_decay": 0.01},
  "e_adagrad": KEPT
  | {
    "betas": (0.9, 1.0),
    "precondition_frequency": 1,
    "grafting_config": ("adagrad", None, 1e-10),
  },
  "f_defaultmerge": ADAM,
  "g_block3": KEPT | ADAM | {"max_preconditioner_dim": 3},
  "h_nobias_l2_beta3": KEPT
  | {
    "precondition_frequency": 2,
    "beta3": 0.95,
    "use_bias_correction": False,
    "weight_decay": 0.05,
    "weight_decay_type": "L2",
  },
  "i_newton": KEPT | ADAM | {"root": "newton"},
  "j_eigcorr": KEPT | {"eigenvalue_correction": True},
  "k_kl": KEPT | {"precondition_frequency": 1, "kl": True, "inverse_exponent_override": {2: 0.5}},
}


@pytest.mark.parametrize("config", slow_but(META, "d_adamgraft"))
def test_distributed_shampoo(config):
  oracle, params, grads = stored("shampoo_meta.npz", ("W1", "W2", "b"))
  common = {"lr": 2**-7, "betas": (0.9, 0.999), "epsilon": 1e-6, "precondition_frequency": 3}
  tx = given("shampoo", "from_meta")(**common | META[config])
  want = {name: oracle[f"{config}/p_{name}"] for name in params}
  close(run(tx, params, grads), want, 1e-8)


SCALABLE = {
  "rmsprop": {"weight_decay": 0.05},
  "sgd": {"nesterov": False},
  "adagrad": {"weight_decay": 0.05, "exponent_override": 2},
}


@pytest.mark.parametrize("graft_type", slow_but(SCALABLE, "rmsprop"))
def test_scalable_shampoo(graft_type):
  """From their step 0 on; their factors start at eps, beside which they are large here."""
  oracle = np.load(ORACLES / "scalable_shampoo.npz")
  tx = given("shampoo", "from_scalable_shampoo")(
    0.03,
    block_size=128,
    beta2=0.9,
    matrix_epsilon=1e-7,
    diagonal_epsilon=1e-3,
    start_preconditioning_step=0,
    graft_type=graft_type,
    **SCALABLE[graft_type],
  )
  w, grads = (jnp.asarray(oracle[name], jnp.float64) for name in ("w", "grads"))
  close(run(tx, w, grads), oracle[graft_type], 1e-5)

"""What the pages on coming from elsewhere say in their tables: units, arguments, names."""

import inspect
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pages
import pytest
import theirs

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
FOLDER = pages.PAGES / "migration"


def rows_of(convolution, pooled):
  """A loss, its weight, x; and in NumPy inputs and gradients of the mean loss, row by row."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 5, 4, 3) if convolution else (6, 5, 4))
  if convolution:
    w = rng.normal(size=(2, 2, 3, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    apply = lambda w, x: jax.lax.conv_general_dilated(
      x, w, (1, 1), "VALID", dimension_numbers=numbers
    )
    patches = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2))
    a = patches.transpose(0, 1, 2, 4, 5, 3).reshape(6, -1, 12)
  else:
    w = rng.normal(size=(4, 2))
    apply = lambda w, x: x @ w
    a = x
  terms = 1 if pooled else math.prod(a.shape[1:-1])

  def tail(y):
    y = jnp.tanh(y.reshape(6, -1, 2))
    y = jnp.mean(y, axis=1) if pooled else y
    return fop_optax.squared_error(y, jnp.ones(y.shape))

  dy = np.asarray(jax.jit(jax.grad(tail))(apply(w, x))).reshape(6, -1, 2)
  return lambda params, x: tail(apply(params["w"], x)), {"w": jnp.asarray(w)}, x, a, dy, terms


def ratios():
  """Project -> what its curvature is over ours, of dense and of convolution, given N, T, R."""
  (rows,) = [rows for rows in pages.tables(FOLDER / "index.md") if rows[0][0] == "project"]

  def formula(text):
    code = re.sub(r"(?<=[A-Z0-9]) (?=[A-Z])", " * ", text.replace("^", "**"))
    return lambda N, T, R: eval(code, {}, {"N": N, "T": T, "R": R})

  return {name: tuple(map(formula, cells)) for name, *cells in rows[1:]}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("convolution", [False, True])
def test_curvature_in_other_units(convolution, pooled):
  """N examples, T rows and R terms of each; the whole Fisher block of each project over ours."""
  loss, params, x, a, dy, R = rows_of(convolution, pooled)
  captured = fop_optax.capture(loss, params, jnp.asarray(x))
  (factors,) = jax.jit(captured.value_and_grad)(params, x)[2].factors
  ours = np.kron(factors.A[0], factors.G[0])
  N, T = a.shape[:2]
  a, dy = a.reshape(N * T, -1), dy.reshape(N * T, -1)
  g = N * R * dy  # of the summed loss
  over = lambda rows, n: rows.T @ rows / n
  if convolution:
    kfac_jax = np.kron(over(a, N * T), over(g, N * T)) * T / R  # the loss has the weight 1 / R
    asdl = np.kron(over(a, N * R * T), over(g, N * R))  # data_size is N R
    kaisa = np.kron(over(a / T, N * T), over(dy / T, N * T))
  else:
    kfac_jax = np.kron(over(a, N), over(g, N)) / T / R
    asdl = np.kron(over(a, N * R), over(g, N * R))
    kaisa = np.kron(over(a, N * T), over(dy, N * T))
  blocks = {
    "kfac-jax, all but `fisher_empirical`": kfac_jax,
    "kfac-jax, `fisher_empirical`": kfac_jax / N,
    "ASDL": asdl,
    "KAISA (kfac-pytorch)": kaisa,
  }
  assert set(blocks) == set(ratios())
  for name, block in blocks.items():
    ratio = ratios()[name][int(convolution)](N, T, R)
    rounding = 1e-12 * np.abs(block).max()  # some are small as a whole
    np.testing.assert_allclose(block, ratio * ours, rtol=1e-10, atol=rounding, err_msg=name)


ORACLES = pathlib.Path(__file__).parent / "oracles"


def dense(p, x, y):
  hidden = jnp.mean(jnp.tanh(x @ p["w1"] + p["b1"]), axis=1)
  return fop_optax.softmax_cross_entropy(hidden @ p["w2"] + p["b2"], y)


def convolutions(p, x, y):
  for name, stride in (("c1", 1), ("c2", 2)):
    x = jax.lax.conv_general_dilated(
      x,
      p[f"{name}_w"],
      (stride, stride),
      [(1, 1), (1, 1)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + p[f"{name}_b"])
  x = jnp.moveaxis(x, -1, 1).reshape(len(y), -1)
  return fop_optax.softmax_cross_entropy(x @ p["fc_w"] + p["fc_b"], y)


def their_network(convolution):
  """A loss, its parameters and batch, as the stored numbers of several codes have it."""
  if not convolution:
    oracle = np.load(ORACLES / "positions.npz")
    params = {name: oracle[name] for name in ("w1", "b1", "w2", "b2")}
    return dense, jax.tree.map(jnp.asarray, params), jnp.asarray(oracle["x"]), oracle["y"]
  oracle = np.load(ORACLES / "asdl_kfac_cnn.npz")
  params = {f"{name}_b": oracle[f"{name}/bias"] for name in ("c1", "c2", "fc")}
  params |= {f"{name}_w": oracle[f"{name}/weight"].transpose(2, 3, 1, 0) for name in ("c1", "c2")}
  params |= {"fc_w": oracle["fc/weight"].T}
  x = jnp.asarray(oracle["x"].transpose(0, 2, 3, 1))
  return convolutions, jax.tree.map(jnp.asarray, params), x, oracle["y"]


@pytest.mark.parametrize("convolution", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_curvature_of_their_codes_in_other_units(convolution):
  """Stored factors of ASDL and KAISA, of layers with positions that are pooled."""
  loss, params, x, y = their_network(convolution)
  captured = fop_optax.capture(loss, params, x, y)
  factors = jax.jit(captured.value_and_grad)(params, x, y)[2].factors
  ours = dict(zip([layer.path for layer in captured.layers], factors, strict=True))
  oracle = np.load(ORACLES / "positions.npz")
  # their patches are (c, kh, kw), ours (kh, kw, c), the bias last in both
  order = lambda c: np.append(np.arange(9 * c).reshape(c, 9).T.ravel(), 9 * c)
  if convolution:
    cases = [
      ("KAISA (kfac-pytorch)", f"cnn/kaisa/{name}_", "AG", f"['{name}_w']", T, order(c))
      for name, T, c in (("c1", 42, 2), ("c2", 12, 4))
    ]
  else:
    cases = [
      ("KAISA (kfac-pytorch)", "kaisa/", "AG", "['w1']", 5, np.arange(5)),
      ("ASDL", "asdl/", "AB", "['w1']", 5, np.arange(4)),  # without the bias
    ]
  for project, place, sides, path, T, own in cases:
    A, G = (oracle[place + side] for side in sides)
    block = np.kron(A[np.ix_(own, own)], G)
    side = ours[path].A[0][: len(own), : len(own)]
    ratio = ratios()[project][int(convolution)](len(x), T, 1)
    want = ratio * np.kron(side, ours[path].G[0])
    np.testing.assert_allclose(block, want, rtol=0, atol=1e-10 * np.abs(want).max(), err_msg=path)


@pytest.mark.parametrize("convolution", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_directions_of_kfac_jax_where_there_are_positions(convolution):
  """Stored first steps of it, `fisher_exact`, at damping 0.1: ours are the same."""
  loss, params, x, y = their_network(convolution)
  captured = fop_optax.capture(loss, params, x, y, fisher="exact")
  make = pages.defining(FOLDER / "kfac_jax.md", "from_kfac_jax")
  tx = make(captured.layers, learning_rate=1.0, momentum=0.0, damping=0.1)

  @jax.jit
  def update(params):
    _, grads, stats = captured.value_and_grad(params, x, y)
    return tx.update(grads, tx.init(params), params, stats=stats)[0]

  oracle, updates = np.load(ORACLES / "positions.npz"), update(params)
  stored = "cnn/kfac_jax/prec_" if convolution else "kfac_jax/prec_"
  names = [key.removeprefix(stored) for key in oracle if key.startswith(stored)]
  assert len(names) == 4
  for name in names:
    np.testing.assert_allclose(updates[name], -oracle[stored + name], rtol=0, atol=1e-10)


def signature(function):
  return set(inspect.signature(function).parameters)


ADAMW, MUON = " ".join(signature(optax.adamw)), " ".join(signature(optax.contrib.muon))
# page, first cell of its table -> arguments of theirs, function given, arguments of that not theirs
TABLES = {
  ("adamw", "`optax.adamw`"): (ADAMW, "adamw", "max_precond_dim inverse_update_period"),
  ("muon", "`optax.contrib.muon`"): (MUON, "muon", "layers"),
  ("kfac_jax", "`kfac_jax.Optimizer`"): (
    theirs.KFAC_JAX,
    "from_kfac_jax",
    "layers learning_rate momentum damping examples",
  ),
  ("soap", "`SOAP`"): (theirs.SOAP, "from_soap", ""),
  ("shampoo", "`DistributedShampoo`"): (
    theirs.META_SHAMPOO,
    "from_meta",
    "target_parameter_dimensionality inverse_exponent_override root eigenvalue_correction kl",
  ),
  ("shampoo", "`distributed_shampoo`"): (theirs.SCALABLE_SHAMPOO, "from_scalable_shampoo", ""),
  ("asdl", "`PreconditioningConfig`, `KfacGradientMaker`"): (
    theirs.ASDL,
    "from_asdl",
    "layers lr momentum nesterov weight_decay",
  ),
  ("kaisa", "`KFACPreconditioner`"): (
    theirs.KAISA,
    "from_kaisa",
    "layers examples momentum weight_decay",
  ),
}


@pytest.mark.parametrize(("page", "header"), TABLES)
def test_every_argument_is_in_the_table(page, header):
  """Once, and the function given takes no others."""
  names, function, more = TABLES[page, header]
  names, page = set(names.split()), FOLDER / f"{page}.md"
  (rows,) = [rows for rows in pages.tables(page) if rows[0][0] == header]
  listed = [name for row in rows[1:] for name in re.findall(r"`(\w+)`", row[0])]
  assert sorted(listed) == sorted(names)
  assert signature(pages.defining(page, function)) - names == set(more.split())


def known_arguments():
  ours = [x for x in vars(fop_optax).values() if callable(x)]
  others = [fop_optax.Captured.value_and_grad, optax.ema]
  return set().union(*map(signature, [*ours, *others]))


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=pages.name)
def test_names_of_ours_exist(page):
  """What the tables and the text name as `argument=`, `fop_optax.x` and `optax.x`."""
  prose = re.sub(r"```.*?```", "", pages.text(page), flags=re.DOTALL)
  assert set(re.findall(r"`(\w+)=", prose)) <= known_arguments()
  modules = {"fop_optax": fop_optax, "optax": optax}
  for module, path in re.findall(r"`(fop_optax|optax)\.([\w.]+)", prose):
    found = modules[module]
    for part in path.split("."):
      found = getattr(found, part)

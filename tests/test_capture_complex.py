"""Real weights in products of complex numbers: `re + 1j im` of Fourier layers and recurrences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

N, D, C = 6, 5, 4
RANDOM = np.random.default_rng(0)
PARAMS = {"im": RANDOM.normal(size=(D, C)), "re": RANDOM.normal(size=(D, C))}
X = RANDOM.normal(size=(N, D)) + 1j * RANDOM.normal(size=(N, D))


def real(p, x):
  return jnp.mean((x.real @ p["re"] - x.imag @ p["im"]) ** 2)


def imaginary(p, x):
  return jnp.mean((x.real @ p["im"] + x.imag @ p["re"]) ** 2)


SPELLINGS = {
  "sum": (real, lambda p, x: jnp.mean((x @ (p["re"] + 1j * p["im"])).real ** 2)),
  "complex": (real, lambda p, x: jnp.mean(jnp.real(x @ jax.lax.complex(p["re"], p["im"])) ** 2)),
  "transposed": (
    real, lambda p, x: jnp.mean(((p["re"].T - 1j * p["im"].T).conj() @ x.T).real ** 2),
  ),
  "reshaped": (
    real, lambda p, x: jnp.mean((x @ (p["re"] + 1j * p["im"]).reshape(1, D, C)[0]).real ** 2),
  ),
  "over i": (real, lambda p, x: jnp.mean((x @ (p["re"] - p["im"] / 1j)).real ** 2)),
  "imaginary": (imaginary, lambda p, x: jnp.mean((x @ (p["re"] + 1j * p["im"])).T.imag ** 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_part_of_the_output_is_that_of_real_products(name):
  plain, spelled = SPELLINGS[name]
  (loss, grads, ours), layers = evaluated(spelled, PARAMS, X)
  (expected, wanted, theirs), _ = evaluated(plain, PARAMS, X)
  assert [layer.kind for layer in layers] == ["dense", "dense"]
  np.testing.assert_allclose(loss, expected, rtol=1e-12)
  jax.tree.map(close, grads, wanted)
  jax.tree.map(close, ours.factors, theirs.factors)


@pytest.mark.parametrize("options", [{}, {"groups": 2, "micro_batches": 3}], ids=str)
def test_a_fourier_layer(options):
  """Of products by frequency: a row each of the real and of the imaginary parts."""
  modes = 3
  p = {name: RANDOM.normal(size=(modes, D, C)) for name in ("im", "re")}
  x = RANDOM.normal(size=(N, 8, D))
  transform = lambda x: jnp.fft.rfft(x, axis=1)[:, :modes]

  def loss_of(y):
    return jnp.mean(jnp.fft.irfft(y, 8, axis=1) ** 2)

  def loss(p, x):
    return loss_of(jnp.einsum("bki,kio->bko", transform(x), p["re"] + 1j * p["im"]))

  (value, grads, stats), layers = evaluated(loss, p, x, **options)
  assert [(layer.path, layer.stack) for layer in layers] == [("['im']", modes), ("['re']", modes)]
  close(value, loss(p, x))
  jax.tree.map(close, grads, jax.grad(loss)(p, x))
  if options:
    return
  h = transform(x)
  y = jnp.einsum("bki,kio->bko", h, p["re"] + 1j * p["im"])
  dy = jax.grad(lambda re, im: loss_of(re + 1j * im), (0, 1))(y.real, y.imag)
  for (A, G), turn in zip(stats.factors, (1j, 1), strict=True):
    rows = np.concatenate([(turn * h).real, (turn * h).imag])  # of both parts of the output
    close(A, np.einsum("bki,bkj->kij", rows, rows) / (2 * N))
    terms = 8 * C
    close(G, N * terms * sum(np.einsum("bko,bkp->kop", part, part) for part in dy))


def test_half_of_the_examples_for_curvature():
  loss = lambda p, x: jnp.mean(jnp.abs(x @ (p["re"] + 1j * p["im"])) ** 4)
  (_, _, thin), _ = evaluated(loss, PARAMS, X, curvature_fraction=0.5)
  (_, _, half), _ = evaluated(loss, PARAMS, X[::2])
  jax.tree.map(close, thin.factors, half.factors)


def test_a_slice_of_a_complex_weight():
  loss = lambda p, x: jnp.mean(jnp.abs(x[:, :2] @ (p["re"] + 1j * p["im"])[:2]) ** 2)
  (_, grads, ours), layers = evaluated(loss, PARAMS, X)
  cut = {name: w[:2] for name, w in PARAMS.items()}
  whole = lambda p, x: jnp.mean(jnp.abs(x[:, :2] @ (p["re"] + 1j * p["im"])) ** 2)
  (_, _, theirs), _ = evaluated(whole, cut, X)
  assert [layer.inputs for layer in layers] == [2, 2]
  jax.tree.map(close, ours.factors, theirs.factors)
  jax.tree.map(close, grads, jax.grad(loss)(PARAMS, X))


def test_one_entry_of_complex_numbers_is_no_layer():
  loss = lambda p, x: jnp.mean(jnp.abs(x @ p["re"] * (p["re"] + 1j * p["im"])[0, 0]) ** 2)
  with pytest.raises(ValueError, match=r"\['im'\]: it is used in `squeeze`"):
    fop_optax.capture(loss, PARAMS, X)


def test_what_is_not_a_complex_weight_has_a_true_reason():
  def loss(p, x):
    y = x @ (p["re"] + 1j * p["im"]) + p["bias"]
    y = y * (p["scale"] + 1j) + p["table"]
    line = jnp.convolve(x[0], p["kernel"] + 0j, mode="same")
    return jnp.mean(jnp.abs(y) ** 2) + jnp.mean(jnp.abs(line[:C] * y) ** 2)

  params = PARAMS | {
    "bias": jnp.ones(C), "scale": jnp.ones(C), "table": jnp.ones((N, C)), "kernel": jnp.ones(3),
  }  # fmt: skip
  (_, grads, _), layers = evaluated(loss, params, X)
  captured = fop_optax.capture(loss, params, X)
  assert [layer.path for layer in layers] == ["['im']", "['re']"]
  assert "added to complex numbers at " in captured.fallbacks["['bias']"]
  assert "added to complex numbers at " in captured.fallbacks["['table']"]
  assert "multiplied entry by entry" in captured.fallbacks["['scale']"]
  assert "complex in a `conv_general_dilated`" in captured.fallbacks["['kernel']"]
  jax.tree.map(close, grads, jax.grad(loss)(params, X))


def evaluated(loss, params, x, **options):
  captured = fop_optax.capture(loss, params, x, **options)
  return jax.jit(captured.value_and_grad)(params, x), captured.layers


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

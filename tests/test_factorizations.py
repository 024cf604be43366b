"""Factorisations: one matrix at a time on the CPU, and differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax
from fop_optax import factorizations

pytestmark = pytest.mark.usefixtures("x64")

PLAIN = {
  "cholesky": jnp.linalg.cholesky,
  "eigvalsh": jnp.linalg.eigvalsh,
  "eigh": lambda matrix: tuple(jnp.linalg.eigh(matrix)),
  "orthonormal": lambda matrix: jnp.linalg.qr(matrix)[0],
  "svd": lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_derivatives(name):
  x = np.random.default_rng(0).normal(size=(3, 4, 6))
  stack = jnp.asarray(x @ np.swapaxes(x, 1, 2))
  ours, plain = getattr(factorizations, name), PLAIN[name]
  if name == "cholesky":
    ours = lambda matrix: jnp.tril(factorizations.cholesky(matrix))
  total = lambda f: (
    lambda stack: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(jax.vmap(f)(stack)))
  )
  np.testing.assert_allclose(total(ours)(stack), total(plain)(stack), rtol=1e-12)
  symmetric = lambda g: g + jnp.swapaxes(g, 1, 2)  # which triangle is read is no matter
  got, want = (symmetric(jax.grad(total(f))(stack)) for f in (ours, plain))
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kfac", "soap", "shampoo"])
def test_the_derivative_of_a_step_by_the_rate(name):
  """Through three steps, against a difference."""
  params = {"w": jnp.arange(12.0).reshape(4, 3) / 7 - 0.4}
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)))
  loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) - 0.3) ** 2)
  captured = fop_optax.capture(loss, params, x)
  tx = {
    "kfac": lambda: fop_optax.scale_by_kfac(captured.layers, damping=0.1),
    "soap": lambda: fop_optax.scale_by_soap(eps=1e-2, inverse_update_period=2),
    "shampoo": lambda: fop_optax.scale_by_shampoo(eps=1e-2, inverse_update_period=2),
  }[name]()

  @jax.jit
  def trained(rate):
    own, state = params, tx.init(params)
    for _ in range(3):
      _, grads, stats = captured.value_and_grad(own, x)
      updates, state = tx.update(grads, state, own, stats=stats)
      own = optax.apply_updates(own, jax.tree.map(lambda u: -rate * u, updates))
    return loss(own, x)

  got = jax.jit(jax.grad(trained))(0.1)
  want = (trained(0.1 + 1e-6) - trained(0.1 - 1e-6)) / 2e-6
  np.testing.assert_allclose(got, want, rtol=1e-5)

"""`scaling="eigenvalue"` (EKFAC) over steps, against a dense reference in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ("fc0", "fc1", "fc2")
EIGENVALUE = {"scaling": "eigenvalue", "momentum": None, "norm_constraint": None}


class Reference:
  """EKFAC of one layer on row-major vectors, its basis an explicit Kronecker product `C`."""

  def __init__(self, damping, relative, decay, statistics_period, basis_period):
    self.damping, self.relative, self.decay = damping, relative, decay
    self.statistics_period, self.basis_period = statistics_period, basis_period
    self.count = self.folds = 0
    self.A = self.G = self.S = self.C = 0

  def step(self, A, G, V):
    """The direction, of a step's statistics and the gradients `V[n, rows, outputs]`."""
    v = V.reshape(len(V), -1)
    if self.count % self.statistics_period == 0:
      weight = min(1 - 1 / (self.folds + 1), self.decay)
      average = lambda old, new: weight * old + (1 - weight) * new
      self.A, self.G = average(self.A, A), average(self.G, G)
      self.S = average(self.S, np.mean((v @ self.C) ** 2, axis=0) if self.folds else 0)
      self.folds += 1
    if self.count % self.basis_period == 0:
      (a, U_A), (g, U_G) = np.linalg.eigh(self.A), np.linalg.eigh(self.G)
      C = np.kron(U_A, U_G)
      # the diagonal in the new basis of the Fisher block that is diagonal in the old one
      F = self.C @ np.diag(self.S) @ self.C.T if self.count else C @ np.diag(np.kron(a, g)) @ C.T
      self.S, self.C = np.diag(C.T @ F @ C), C
      self.added = self.damping + self.relative * self.S.mean()
    self.count += 1
    return self.C @ ((self.C.T @ v.mean(0)) / (self.S + self.added))


def matrix(tree, name):
  return np.concatenate([tree[name]["w"], tree[name]["b"][..., None, :]], axis=-2)


@functools.cache
def captured_problem(groups=1):
  params, batch = problems.make_params(dtype=jnp.float64), problems.make_batch(dtype=jnp.float64)
  return params, fop_optax.capture(problems.loss, params, batch, groups=groups)


def make_step(captured, tx):
  """A step at fixed parameters, with an example's batch."""

  @jax.jit
  def step(params, state, batch):
    due, basis = fop_optax.refresh_due(state), fop_optax.bases(state)
    _, grads, stats = captured.value_and_grad(params, batch, refresh=due, basis=basis)
    updates, state = tx.update(grads, state, params, stats=stats)
    return updates, state, stats

  return step


@pytest.mark.parametrize(("statistics", "inverses"), [(1, 2), (2, 3), (1, 1)])
def test_steps(statistics, inverses):
  """Statistics between the steps that make a new basis, and when one is made."""
  params, captured = captured_problem()
  tx = fop_optax.kfac(
    1.0,
    captured.layers,
    damping=0.01,
    relative_damping=0.1,
    decay=0.6,
    curvature_update_period=statistics,
    inverse_update_period=inverses,
    **EIGENVALUE,
  )
  step, state = make_step(captured, tx), tx.init(params)
  references = {name: Reference(0.01, 0.1, 0.6, statistics, inverses) for name in NAMES}
  for seed in range(5):
    batch = problems.make_batch(seed=seed, dtype=jnp.float64)
    updates, state, _ = step(params, state, batch)
    # the factors at hand, of which other tests say what they are
    stats = captured.value_and_grad(params, batch)[2]
    grads = problems.per_example_grads(params, batch)
    for name, factors, reference in zip(NAMES, stats.factors, references.values(), strict=True):
      A, G = (np.asarray(x[0]) for x in factors)
      want = reference.step(A, G, matrix(grads, name))
      np.testing.assert_allclose(-matrix(updates, name).ravel(), want, rtol=1e-7, atol=1e-9)
  assert step._cache_size() == 1

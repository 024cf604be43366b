"""Wave functions by variational Monte Carlo: FermiNet's functions, and NetKet's in Flax Linen.

Their training code writes the energy's gradient itself (a custom rule, or products with Jacobians):
`2 mean((e - mean e) d log|psi|)` with local energies `e`. The loss here has that gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

FERMINET = Collection(
  "FermiNet",
  repository="google-deepmind/ferminet",
  commit="0ce3411104542e30723731c77e65c36977fb4d81",
)
NETKET = Collection("NetKet", package="netket")


def _energy(log_psi: Callable, local_energy: Callable, params: Any, samples: jax.Array) -> Problem:
  """The variational energy: its value as aux, its gradient by the score function."""

  def loss_fn(params, samples):
    energies = jax.lax.stop_gradient(local_energy(params, samples))
    scores = jnp.conj(energies - jnp.mean(energies)) * log_psi(params, samples)
    return 2 * jnp.mean(scores.real), jnp.mean(energies.real)

  return Problem(loss_fn, params, (samples,), {"has_aux": True})


def _electrons(network: Any) -> Problem:
  """Lithium hydride, four electrons."""
  from ferminet import hamiltonian, networks

  atoms, charges = jnp.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]), jnp.array([3.0, 1.0])
  spins = jnp.array([1.0, 1.0, -1.0, -1.0])
  local = hamiltonian.local_energy(network.apply, charges, nspins=(2, 2))

  def log_psi(params, positions):
    return jax.vmap(lambda x: network.apply(params, x, spins, atoms, charges)[1])(positions)

  def local_energy(params, positions):
    data = lambda x: networks.FermiNetData(positions=x, spins=spins, atoms=atoms, charges=charges)
    return jax.vmap(lambda x: local(params, problem.KEY, data(x))[0])(positions)

  return _energy(log_psi, local_energy, network.init(problem.KEY), problem.images(12))


@FERMINET.model("FermiNet, LiH", "JAX")
def ferminet() -> Problem:
  from ferminet import networks

  network = networks.make_fermi_net(
    (2, 2), jnp.array([3.0, 1.0]), determinants=4, hidden_dims=((32, 8), (32, 8))
  )
  return _electrons(network)


@FERMINET.model("Psiformer, LiH", "JAX")
def psiformer() -> Problem:
  from ferminet import psiformer as models

  network = models.make_fermi_net(
    (2, 2), jnp.array([3.0, 1.0]), determinants=4, num_layers=2, num_heads=2, heads_dim=16,
    mlp_hidden_dims=(32,), use_layer_norm=True, tf32=False,
  )  # fmt: skip
  return _electrons(network)


def _spins(model: Any) -> Problem:
  """The transverse-field Ising chain of ten spins."""
  import netket as nk

  space = nk.hilbert.Spin(s=1 / 2, N=10)
  operator = nk.operator.IsingJax(space, graph=nk.graph.Chain(10), h=1.0)
  samples = space.random_state(problem.KEY, problem.BATCH, dtype=jnp.float32)
  params = model.init(problem.KEY, samples)["params"]
  log_psi = lambda params, samples: model.apply({"params": params}, samples)

  def local_energy(params, samples):
    connected, elements = operator.get_conn_padded(samples)
    flat = connected.reshape(-1, connected.shape[-1])
    logs = log_psi(params, flat).reshape(elements.shape) - log_psi(params, samples)[:, None]
    return jnp.sum(elements * jnp.exp(logs), 1)

  return _energy(log_psi, local_energy, params, samples)


@NETKET.model("restricted Boltzmann machine", "Linen")
def boltzmann() -> Problem:
  import netket as nk

  return _spins(nk.models.RBM(alpha=4, param_dtype=jnp.float32))


@NETKET.model("multilayer perceptron", "Linen")
def perceptron() -> Problem:
  import netket as nk

  return _spins(nk.models.MLP(hidden_dims=(32, 32), param_dtype=jnp.float32))


@NETKET.model("Boltzmann machines of modulus and phase", "Linen")
def modulus_and_phase() -> Problem:
  import netket as nk

  return _spins(nk.models.RBMModPhase(alpha=2, param_dtype=jnp.float32))

"""Differential equations, whose losses hold derivatives of networks, in Linen and Equinox."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

JAXPI = Collection(
  "jaxpi",
  repository="PredictiveIntelligenceLab/jaxpi",
  commit="e85b6947b0795a1bf68169ba6d378be3c713a6d9",
)
JINNS = Collection("jinns", package="jinns")


def _architectures() -> Any:
  """The package's own `__init__` imports `jax.tree_map`, which is no more."""
  problem.namespace("jaxpi")
  return JAXPI.load("jaxpi/archs.py")


def _points(seed: int, *low_high: tuple[float, float]) -> jax.Array:
  low, high = jnp.array(low_high).T
  return jax.random.uniform(
    jax.random.key(seed), (problem.BATCH, len(low_high)), jnp.float32, low, high
  )


def _burgers(apply: Callable, params: Any) -> Problem:
  """The loss of `examples/burgers`: initial values, and the residual of the equation."""

  def u_net(params, t, x):
    return apply(params, jnp.stack([t, x]))[0]

  def r_net(params, t, x):
    u = u_net(params, t, x)
    u_t = jax.grad(u_net, argnums=1)(params, t, x)
    u_x = jax.grad(u_net, argnums=2)(params, t, x)
    u_xx = jax.grad(jax.grad(u_net, argnums=2), argnums=2)(params, t, x)
    return u_t + u * u_x - 0.01 / jnp.pi * u_xx

  def loss_fn(params, points, x):
    u = jax.vmap(u_net, (None, None, 0))(params, 0.0, x)
    residual = jax.vmap(r_net, (None, 0, 0))(params, points[:, 0], points[:, 1])
    return jnp.mean((u + jnp.sin(jnp.pi * x)) ** 2) + jnp.mean(residual**2)

  return Problem(loss_fn, params, (_points(1, (0, 1), (-1, 1)), _points(2, (-1, 1))[:, 0]))


PERIODIC = {"period": (jnp.pi,), "axis": (1,), "trainable": (False,)}


@JAXPI.model("Burgers, Fourier features", "Linen")
def fourier_features() -> Problem:
  model = _architectures().Mlp(
    num_layers=2, hidden_dim=32, periodicity=PERIODIC,
    fourier_emb={"embed_scale": 1, "embed_dim": 32},
  )  # fmt: skip
  return _burgers(model.apply, model.init(problem.KEY, jnp.ones(2)))


@JAXPI.model("Burgers, modified MLP", "Linen")
def modified() -> Problem:
  model = _architectures().ModifiedMlp(num_layers=2, hidden_dim=32, periodicity=PERIODIC)
  return _burgers(model.apply, model.init(problem.KEY, jnp.ones(2)))


@JAXPI.model("DeepONet, antiderivative", "Linen")
def operator_network() -> Problem:
  model = _architectures().DeepONet(num_branch_layers=2, num_trunk_layers=2, hidden_dim=32)
  params = model.init(problem.KEY, jnp.ones(16), jnp.ones(1))

  def loss_fn(params, inputs, values, y):
    s_net = lambda u, y: model.apply(params, u, y)[0]
    s_y = jax.vmap(jax.grad(lambda y, u: s_net(u, y[None])))(y, inputs)
    start = jax.vmap(lambda u: s_net(u, jnp.zeros(1)))(inputs)
    return jnp.mean((s_y - values) ** 2) + jnp.mean(start**2)

  return Problem(loss_fn, params, (problem.images(16), problem.images(), problem.images()))


def _mlp(inputs: int) -> tuple:
  import equinox as eqx

  return (
    (eqx.nn.Linear, inputs, 32),
    (jax.nn.tanh,),
    (eqx.nn.Linear, 32, 32),
    (jax.nn.tanh,),
    (eqx.nn.Linear, 32, 1),
  )


def _equation(dimensions: int, dynamics: Callable, network: Any, params: Any, **equation: Any):
  """A time-dependent equation with initial and boundary values, as the package's tests pose it."""
  import equinox as eqx
  import jinns

  fields = dict.fromkeys(("D", "nu", "r", "g"), 0.0)  # the package allows one set of names
  values = jinns.parameters.Params(nn_params=params, eq_params=fields | equation)
  loss = jinns.loss.LossPDENonStatio(
    u=network, dynamic_loss=dynamics, params=values,
    loss_weights=jinns.loss.LossWeightsPDENonStatio(
      dyn_loss=1.0, initial_condition=1.0, boundary_loss=1.0
    ),
    initial_condition_fun=lambda x: jnp.prod(jnp.sin(jnp.pi * x)),
    boundary_condition=jinns.loss.Dirichlet(),
  )  # fmt: skip
  params, static = eqx.partition(params, eqx.is_inexact_array)

  def loss_fn(params, inside, initial, border):
    whole = eqx.tree_at(lambda v: v.nn_params, values, eqx.combine(params, static))
    batch = jinns.data.PDENonStatioBatch(
      domain_batch=inside, initial_batch=initial, border_batch=border
    )
    return loss.evaluate(whole, batch)[0]

  box = [(-1, 1)] * dimensions
  inside, start = _points(1, (0, 1), *box), _points(2, *box)
  facets = [
    _points(3, (0, 1), *box).at[:, 1 + d].set(s) for d in range(dimensions) for s in (-1, 1)
  ]
  return Problem(loss_fn, params, (inside, start, jnp.stack(facets, -1)))


@JINNS.model("Burgers", "Equinox")
def burgers() -> Problem:
  import jinns

  network, params = jinns.nn.PINN_MLP.create(
    key=problem.KEY, eqx_list=_mlp(2), eq_type="PDENonStatio"
  )
  return _equation(1, jinns.loss.BurgersEquation(Tmax=1), network, params, nu=0.01 / jnp.pi)


@JINNS.model("heat, Laplacian", "Equinox")
def heat() -> Problem:
  import jinns

  class HeatEquation(jinns.loss.PDENonStatio):
    def equation(self, t_x, u, params):
      u_dt = jax.grad(lambda t_x: u(t_x, params).squeeze())(t_x)[0:1]
      laplacian = jinns.loss.laplacian_rev(t_x, u, params, eq_type="PDENonStatio")
      return u_dt - params.eq_params.D * laplacian

  network, params = jinns.nn.PINN_MLP.create(
    key=problem.KEY, eqx_list=_mlp(3), eq_type="PDENonStatio"
  )
  return _equation(2, HeatEquation(), network, params, D=0.2)


@JINNS.model("Fisher-KPP", "Equinox")
def fisher() -> Problem:
  import jinns

  network, params = jinns.nn.PINN_MLP.create(
    key=problem.KEY, eqx_list=_mlp(2), eq_type="PDENonStatio"
  )
  return _equation(1, jinns.loss.FisherKPP(Tmax=1), network, params, D=0.5, r=1.0, g=2.0)

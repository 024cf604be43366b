"""Neural differential equations and normalising flows, in Equinox."""

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

DIFFRAX = Collection("diffrax", package="diffrax")
FLOWJAX = Collection("flowjax", package="flowjax")


@FLOWJAX.model("masked autoregressive flow", "Equinox")
def autoregressive_flow() -> Problem:
  from flowjax import flows
  from flowjax.distributions import Normal

  flow = flows.masked_autoregressive_flow(
    problem.KEY, base_dist=Normal(jnp.zeros(6)), flow_layers=2, nn_width=32, nn_depth=2
  )
  return _flow(flow)


@FLOWJAX.model("coupling flow of splines", "Equinox")
def coupling_flow() -> Problem:
  from flowjax import flows
  from flowjax.bijections import RationalQuadraticSpline
  from flowjax.distributions import Normal

  flow = flows.coupling_flow(
    problem.KEY, base_dist=Normal(jnp.zeros(6)), flow_layers=2, nn_width=32, nn_depth=2,
    transformer=RationalQuadraticSpline(knots=5, interval=4),
  )  # fmt: skip
  return _flow(flow)


def _flow(flow) -> Problem:
  import equinox as eqx
  import paramax

  params, static = eqx.partition(
    flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
  )

  def loss_fn(params, x):
    return -jnp.mean(paramax.unwrap(eqx.combine(params, static)).log_prob(x))

  return Problem(loss_fn, params, (problem.images(6),))


@DIFFRAX.model("neural ODE", "Equinox")
def neural_ode() -> Problem:
  import diffrax
  import equinox as eqx

  field = eqx.nn.MLP(4, 4, 32, 2, jax.nn.softplus, key=problem.KEY)

  def solve(field, y0):
    times = jnp.linspace(0.0, 1.0, 8)
    term = diffrax.ODETerm(lambda t, y, args: field(y))
    solution = diffrax.diffeqsolve(
      term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, saveat=diffrax.SaveAt(ts=times),
      stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
    )  # fmt: skip
    return solution.ys

  params, static = eqx.partition(field, eqx.is_inexact_array)

  def loss_fn(params, y0, target):
    ys = jax.vmap(lambda y: solve(eqx.combine(params, static), y))(y0)
    return problem.squared_error(ys, target)

  return Problem(loss_fn, params, (problem.images(4), problem.images(8, 4)))

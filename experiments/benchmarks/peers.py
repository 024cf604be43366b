"""Other people's optimizers; their packages are the user's to install."""

from collections.abc import Callable
import functools
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.cases import Case


def from_file(path: pathlib.Path, period: int) -> tuple[Callable[[], Any], str]:
  """An optimizer that somebody's file makes, and the method whose FLOPs are counted for it.

  The file has a function `optimizer(period)`, an optax transformation with a rate of 1e-3 whose
  matrices are new every `period` steps, and may have `LIKE`, a name in the table of methods::

      import soap_jax

      LIKE = "SOAP"


      def optimizer(period):
        return soap_jax.soap(1e-3, precondition_frequency=period)
  """
  given = runpy.run_path(str(path))
  if "optimizer" not in given:
    raise SystemExit(f"{path} has no function optimizer(period)")
  return functools.partial(given["optimizer"], period), given.get("LIKE", "")


class KfacJax:
  """`kfac_jax.Optimizer` with fixed rates: inverses every `period` steps.

  Its estimator is the default one; statistics come with every step (its default), or with every
  inverse as ours do.
  """

  def __init__(self, case: Case, period: int, curvature_period: int):
    try:
      import kfac_jax
    except ImportError as error:
      raise SystemExit(
        "--kfac-jax: kfac_jax cannot be imported. Its release 0.0.8 does not run on this JAX: "
        "pip install git+https://github.com/google-deepmind/kfac-jax"
      ) from error

    def loss(params, batch):
      logits = case.apply(params, batch[0])
      kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1])
      return case.loss(params, *batch)

    constant = lambda value: lambda step: jnp.asarray(value)
    self.optimizer = kfac_jax.Optimizer(
      value_and_grad_func=jax.value_and_grad(loss),
      l2_reg=0.0,
      inverse_update_period=period,
      curvature_update_period=curvature_period,
      learning_rate_schedule=constant(1e-3),
      momentum_schedule=constant(0.9),
      damping_schedule=constant(1e-2),
      num_burnin_steps=0,
      multi_device=False,
    )
    self.batch = (case.x, case.y)
    self.params = jax.tree.map(jnp.copy, case.params)
    self.state = self.optimizer.init(self.params, jax.random.PRNGKey(0), self.batch)
    self.count = 0

  def window(self, steps: int) -> Any:
    for _ in range(steps):
      self.params, self.state, _ = self.optimizer.step(
        self.params,
        self.state,
        jax.random.PRNGKey(self.count),
        batch=self.batch,
        global_step_int=self.count,
      )
      self.count += 1
    return self.params

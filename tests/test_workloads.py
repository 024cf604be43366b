"""The held-out workloads of the sweep: what they are, and that its optimizers take them."""

import jax
import numpy as np
import optax
import pytest

from experiments.benchmarks.defaults import results
from experiments.benchmarks.defaults.__main__ import Config, gradients, main
from experiments.benchmarks.defaults.methods import METHODS
from experiments.workloads import HELD_OUT, WORKLOADS, build


def test_held_out_workloads_are_beside_the_default_sweep():
  assert Config().workloads == tuple(WORKLOADS) and len(WORKLOADS) == 13
  assert len(HELD_OUT) == 14 and not set(HELD_OUT) & set(WORKLOADS)


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_workload_starts_with_a_finite_loss(name):
  workload = build(name)
  assert workload.name == name
  batch = next(workload.batches(0))
  assert len(batch[0]) == workload.batch
  value = jax.jit(lambda *batch: workload.loss(workload.init(0), *batch))(*batch)
  assert value.shape == () and np.isfinite(value)


@pytest.mark.parametrize(
  "name",
  [n if n == "small-units" else pytest.param(n, marks=pytest.mark.slow) for n in HELD_OUT],
)
def test_kfac_takes_a_held_out_workload_in_one_compile(name):
  workload, method = build(name), METHODS["K-FAC"]
  layers, gradient = gradients(workload, method)
  tx = method.make(optax.constant_schedule(0.1), layers)

  @jax.jit
  def step(params, state, *batch):
    loss, grads, extra = gradient(params, state, batch, jax.random.key(0))
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, loss

  params = workload.init(0)
  state, losses = jax.jit(tx.init)(params), []
  for _, batch in zip(range(24), workload.batches(0), strict=False):  # with statistics and without
    params, state, loss = step(params, state, *batch)
    losses.append(float(loss))
  assert step._cache_size() == 1
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0] or name == "td"  # where the target moves


def test_runs_at_other_rates_are_not_taken_for_ours(tmp_path):
  curve = np.linspace(2.0, 1.0, 10)
  asked = [("AdamW", 0.01), *(("SOAP", rate) for rate in METHODS["SOAP"].rates[:2])]
  made = [results.Run("mlp-digits", *at, 0, 1.0, 1.0, 1.0, curve) for at in asked]
  results.save(made, tmp_path)
  assert [(run.method, run.rate) for run in results.load(tmp_path)] == asked
  path = tmp_path / "runs.csv"
  path.write_text(path.read_text(encoding="utf-8").replace(",0.01,", ",0.02,"), encoding="utf-8")
  with pytest.raises(SystemExit, match="of another version: choose another --out"):
    results.load(tmp_path)


def test_held_out_stands_for_all_and_unknown_names_list_both():
  with pytest.raises(SystemExit, match=r"unknown: mlp; .* mlp-digits, .*, and held-out, which are"):
    main(Config(workloads=("held-out", "mlp")))

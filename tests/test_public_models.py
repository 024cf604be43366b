"""The table of public models: its measurements, and that what it needs is written down."""

import math
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.public_models import __main__ as program
from experiments.public_models import measure, problem

FOLDER = pathlib.Path(program.__file__).parent


class Network(nn.Module):
  """A product, dropout, batch statistics, and a matrix that is used as no layer can be."""

  @nn.compact
  def __call__(self, x, train):
    h = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
    h = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(h))
    odd = self.param("odd", nn.initializers.normal(), (16, 4))
    return h @ jnp.tanh(odd)


@pytest.mark.slow
def test_a_model_is_measured():
  inputs, targets = [problem.images(8)], problem.labels(4)
  made = problem.linen(Network(), inputs, problem.cross_entropy, targets, train=True)
  found = measure.measure(made)
  assert (found.elements, found.in_layers, found.layers) == (8 * 16 + 16 * 4, 8 * 16, 1)
  assert found.parameters == found.elements + 3 * 16
  ((array, reason),) = found.refused.items()
  assert array == "['odd'] [16, 4]"
  assert "`tanh`" in reason
  assert found.gradient_error < 1e-5
  assert found.kfac_finite
  assert found.fop_finite
  alone = measure.measure(made, steps=False)
  assert alone[:5] == found[:5]
  assert math.isnan(alone.gradient_error)


def test_a_loss_without_layers_is_measured_too():
  params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
  loss = lambda p, x: jnp.mean(x @ jnp.tanh(p["w"]) * p["b"])
  found = measure.measure(problem.Problem(loss, params, (problem.images(4),)))
  assert (found.elements, found.in_layers, found.layers) == (16, 0, 0)
  assert list(found.refused) == ["['w'] [4, 4]"]


def test_a_wrong_gradient_would_be_seen():
  ours = {"a": jnp.ones(4), "b": jnp.zeros(2)}
  assert measure._distance(ours, ours) == 0
  assert measure._distance(jax.tree.map(lambda a: 1.1 * a, ours), ours) == pytest.approx(0.1, 1e-3)


def test_missing_collections_are_skipped_and_named(tmp_path, capsys):
  options = program.Options(("bonsai", "nanodo"), tmp_path / "sources", tmp_path / "out")
  program.main(options)
  printed = capsys.readouterr().out.replace("\n", "")
  for name in ("bonsai", "nanodo"):
    assert f"skipped {name}: {tmp_path / 'sources' / name} is not there" in printed


@pytest.mark.slow
def test_a_model_that_does_not_run_is_a_row_with_its_error(tmp_path):
  collection = problem.Collection("none", package="none")

  @collection.model("broken", "Linen")
  def broken():
    raise ImportError("no module of that name")

  (model,) = collection.models
  row = program.run(model, "1.0")
  assert row.found is None
  table, _ = program.model_table.save(tmp_path, [row])
  assert "| broken | Linen | ImportError: no module of that name |" in table.read_text("utf-8")


def test_every_collection_is_in_the_readme_or_the_requirements():
  readme = (FOLDER / "README.md").read_text(encoding="utf-8")
  requirements = (FOLDER / "requirements.txt").read_text(encoding="utf-8")
  collections = program.collections()
  assert len(collections) >= 30
  for collection in collections:
    if collection.package:
      assert f"\n{collection.package}==" in requirements
    else:
      assert f"github.com/{collection.repository} " in readme
      assert f"checkout {collection.commit}\n" in readme

"""`diagnostics` as a table: a row a layer, ranges where there are several numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import fop_optax


def test_a_row_a_layer():
  params, batch = problems.make_params(), problems.make_batch()
  layers = problems.layers_of(params)
  tx = fop_optax.fop(0.1, layers)
  _, grads, stats = problems.value_and_grad(params, batch)
  _, state = tx.update(grads, tx.init(params), params, stats=stats)
  numbers = fop_optax.diagnostics(state, layers)
  first, header, *rows = fop_optax.diagnostics_table(numbers).splitlines()
  nu = float(numbers["norm_scale"])
  assert 0 < nu < 1
  start = "steps taken: 1; left out for losses, gradients, directions: 0, 0, 0"
  assert first == f"{start}; norm_scale {nu:.3g}"
  assert header.split() == ["layer", *numbers["layers"][layers[0].path]]
  assert [row.split()[0] for row in rows] == [layer.path for layer in layers]
  rho2 = float(numbers["layers"][layers[0].path]["rho2"][0])
  assert rows[0].split()[header.split().index("rho2")] == f"{rho2:.3g}"


def test_the_norm_constraint_is_told_by_its_factor():
  """Without a bound the step is 1 / nu as long; per-example optimizers have it too."""
  params, batch = problems.make_params(), problems.make_batch()
  layers, grads = problems.layers_of(params), problems.per_example_grads(params, batch)
  _, mean, stats = problems.value_and_grad(params, batch)

  def last(make, grads, **kwargs):
    tx = make(0.1, momentum=None, **kwargs)
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    return updates["fc0"]["w"], fop_optax.diagnostics(state)["norm_scale"]

  for make, given in (
    (functools.partial(fop_optax.kfac, layers=layers), mean),
    (functools.partial(fop_optax.fop, layers=layers), mean),
    (fop_optax.kfac_per_example, grads),
    (functools.partial(fop_optax.fop_per_example, curvature="exact"), grads),
  ):
    bound, nu = last(make, given, norm_constraint=1e-4)
    free, one = last(make, given, norm_constraint=None)
    assert one == 1 and 0 < nu < 1
    np.testing.assert_allclose(bound, nu * free, rtol=1e-4, atol=1e-8)


def test_layers_that_did_not_move():
  params, batch = problems.make_params(), problems.make_batch()
  layers = problems.layers_of(params)
  tx = fop_optax.kfac(0.1, layers)
  _, grads, stats = problems.value_and_grad(params, batch)

  def second_line(stats):
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    still = [not jnp.any(updates[name]["w"]) for name in ("fc0", "fc1", "fc2")]
    return still, fop_optax.diagnostics_table(fop_optax.diagnostics(state, layers)).split("\n")[1]

  still, line = second_line(stats._replace(refresh=jnp.asarray(False)))
  assert all(still)
  assert line.startswith("3 of 3 layers did not move: no statistics came. `captured.value_and_grad")
  assert "refresh=fop_optax.refresh_due(state)" in line
  first, *others = stats.factors
  for factor, why in (
    (jnp.zeros_like(first.G), "inverses failed, as of statistics that are zero"),
    (jnp.nan * first.G, "no statistics were finite"),
  ):
    still, line = second_line(stats._replace(factors=(first._replace(G=factor), *others)))
    assert line == f"1 of 3 layers did not move: {why}"
    assert still == [True, False, False]
  assert second_line(stats)[1].startswith("layer ")


def test_ranges_over_matrices_and_methods_without_layers():
  loss = lambda p, x: jnp.mean(jax.vmap(jnp.matmul)(jnp.stack([x, x + 1]), p["w"]) ** 2)
  params = {"w": jnp.stack([jnp.eye(3), 5 * jnp.eye(3)])}
  captured = fop_optax.capture(loss, params, x := jnp.arange(12.0).reshape(4, 3))
  tx = fop_optax.kfac(0.1, captured.layers)
  _, grads, stats = captured.value_and_grad(params, x)
  _, state = tx.update(grads, tx.init(params), params, stats=stats)
  text = fop_optax.diagnostics_table(fop_optax.diagnostics(state, captured.layers))
  low, high = map(float, text.splitlines()[-1].split()[6].split(".."))  # damping of G
  assert 0 < low < high
  state = fop_optax.soap(0.01).init(params)
  assert "\nstack" in fop_optax.diagnostics_table(fop_optax.diagnostics(state))
  state = fop_optax.neumann(0.01, steps_per_epoch=1).init(params)
  assert fop_optax.diagnostics_table(fop_optax.diagnostics(state)).startswith("steps taken: 0;")
  with pytest.raises(
    ValueError, match=r"has a tuple that is not of `diagnostics`: write `fop_optax"
  ):
    fop_optax.diagnostics_table(state)

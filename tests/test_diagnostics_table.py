"""`diagnostics` as a table: a row a layer, ranges where there are several numbers."""

import jax
import jax.numpy as jnp
import problems

import fop_optax


def test_a_row_a_layer():
  params, batch = problems.make_params(), problems.make_batch()
  layers = problems.layers_of(params)
  tx = fop_optax.fop(0.1, layers)
  _, grads, stats = problems.value_and_grad(params, batch)
  _, state = tx.update(grads, tx.init(params), params, stats=stats)
  numbers = fop_optax.diagnostics(state, layers)
  first, header, *rows = fop_optax.diagnostics_table(numbers).splitlines()
  assert first == "steps taken: 1; left out for losses, gradients, directions: 0, 0, 0"
  assert header.split() == ["layer", *numbers["layers"][layers[0].path]]
  assert [row.split()[0] for row in rows] == [layer.path for layer in layers]
  rho2 = float(numbers["layers"][layers[0].path]["rho2"][0])
  assert rows[0].split()[header.split().index("rho2")] == f"{rho2:.3g}"


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

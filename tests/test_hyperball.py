"""Steps of fixed relative length on spheres: the authors' rule in NumPy, norms, and guards."""

from attention import LAYERS, PARAMS
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax

RNG = np.random.default_rng(1)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def close(got, want, tol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), got, want)


def run(tx, params, gradients):
  """Parameters after each step, from the first on."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(params)), g))(params, gradients)
  return jax.tree.map(lambda p, own: jnp.concatenate([p[None], own]), params, after)


def test_adam_h():
  """Adam's direction, normalised, on the sphere; plain for the vector; the rate is a schedule."""
  params = {"w": draw(4, 3), "b": draw(3)}
  gradients = {"w": draw(5, 4, 3), "b": draw(5, 3)}
  rate = optax.linear_schedule(0.1, 0.0, 5)
  adam = optax.scale_by_adam(0.9, 0.95)
  got = run(optax.chain(adam, fop_optax.hyperball(rate)), params, gradients)
  _, directions = jax.lax.scan(lambda s, g: adam.update(g, s)[::-1], adam.init(params), gradients)
  W, b = np.asarray(params["w"], float), np.asarray(params["b"], float)
  R = np.linalg.norm(W)
  for t in range(5):
    d = np.asarray(directions["w"][t], float)
    W = W - rate(t) * R * d / np.linalg.norm(d)
    W *= R / np.linalg.norm(W)
    b = b - rate(t) * np.asarray(directions["b"][t])
    close({name: own[t + 1] for name, own in got.items()}, {"w": W, "b": b}, 1e-5)


def norms(w):
  return jnp.sqrt(jnp.sum(w**2, axis=(-2, -1)))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_norms_stay_and_steps_are_relative(size):
  """One sphere for each scanned matrix, whatever the length of the direction."""
  rng = np.random.default_rng(5)  # the bounds below are not of any draw
  own = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params, directions = own(2, 4, 6), own(20, 2, 4, 6)
  tx = fop_optax.hyperball(1e-2, dimension_numbers=fop_optax.DimensionNumbers(1, 2))
  after = run(tx, params, size * directions)
  np.testing.assert_allclose(norms(after), norms(params)[None] + jnp.zeros((21, 2)), rtol=1e-6)
  steps = norms(after[1:] - after[:-1]) / norms(params)
  assert jnp.all((steps > 0.8e-2) & (steps < 1.001e-2))  # but for what points along the weight


def plain(params, **kwargs):
  """Whether each leaf takes the plain step along ones."""
  tx = fop_optax.hyperball(0.1, **kwargs)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), jax.jit(tx.init)(params), params)
  return jax.tree.map(lambda u: bool(jnp.allclose(u, -0.1)), updates)


def test_which_leaves_have_a_sphere():
  assert plain(PARAMS, layers=LAYERS) == {
    "table": True,  # its rows are looked up
    "query": False,
    "fused": False,
    "b": True,
    "out": False,
    "gain": True,
    "scanned": {"w": False, "b": True},
    "last": False,
  }
  params = {"kernel": draw(2, 3, 4), "w": draw(3, 4), "b": draw(4)}
  assert plain(params) == {"kernel": False, "w": False, "b": True}  # no layers, no numbers
  numbers = {"w": fop_optax.DimensionNumbers()}
  assert plain(params, dimension_numbers=numbers) == {"kernel": True, "w": False, "b": True}


def test_guards():
  """Nothing moves along zero; what starts at zero has no sphere; a step onto the origin is one."""
  params = {"still": draw(3, 2), "zero": jnp.zeros((2, 2)), "onto": jnp.ones((3, 3))}
  updates = {"still": jnp.zeros((3, 2)), "zero": jnp.ones((2, 2)), "onto": jnp.ones((3, 3))}
  tx = fop_optax.hyperball(1.0)
  got, _ = tx.update(updates, tx.init(params), params)
  close(got, jax.tree.map(jnp.negative, updates))


def test_bfloat16_weights_stay_on_the_sphere():
  params = draw(8, 8).astype(jnp.bfloat16)
  after = run(fop_optax.hyperball(0.05), params, draw(30, 8, 8).astype(jnp.bfloat16))
  assert after.dtype == jnp.bfloat16
  wide = norms(after.astype(jnp.float32))
  np.testing.assert_allclose(wide, jnp.full(31, wide[0]), rtol=5e-3)


def test_errors():
  params = {"w": draw(3, 2)}
  tx = fop_optax.hyperball(0.1)
  state = tx.init(params)
  with pytest.raises(ValueError, match=r"No `params`: steps are relative .*state, params\)`"):
    tx.update(params, state)
  with pytest.raises(ValueError, match=r"`learning_rate=-1` should be at least 0\."):
    fop_optax.hyperball(-1)
  both = {"layers": LAYERS, "dimension_numbers": fop_optax.DimensionNumbers()}
  with pytest.raises(ValueError, match=r"`layers` and `dimension_numbers` both say"):
    fop_optax.hyperball(0.1, **both)
  with pytest.raises(ValueError, match=r"The gradient is int32\[3, 2\] at \['w'\]"):
    tx.update({"w": jnp.ones((3, 2), int)}, state, params)
  other = {"w": draw(3, 2), "v": draw(3, 2)}
  with pytest.raises(ValueError, match=r"state is of another model .*\[\(1,\)\].*has \[\(2,\)\]"):
    tx.update(other, state, other)

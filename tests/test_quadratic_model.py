"""The quadratic model against dense matrices, what it solves, and damping that follows it."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")


def network(seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  params = {
    "w1": normal(keys[0], 4, 6),
    "b1": 0.1 * normal(keys[1], 6),
    "blocks": jnp.stack([normal(key, 6, 6) for key in jax.random.split(keys[2], 2)]),
    "w2": normal(keys[3], 6, 3),
    "gain": jnp.ones(6),
  }
  return params, jax.random.normal(keys[4], (8, 4)), jnp.arange(8) % 3


def outputs(params, x):
  h = jnp.tanh(x @ params["w1"] + params["b1"]) * params["gain"]
  h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["blocks"])
  return h @ params["w2"]


def two_marks(params, x, y):
  """A softmax over all examples, terms with weights of their own, and a penalty without a mark."""
  z = outputs(params, x)
  terms = jax.vmap(fop_optax.softmax_cross_entropy)(z, y)
  weights = jnp.linspace(0.5, 2.0, len(y))
  normal = fop_optax.squared_error(z, jnp.ones_like(z))
  return jnp.mean(weights * terms) + 0.3 * normal + 0.01 * jnp.sum(params["w2"] ** 2)


def dense(params, x):
  """The Gauss-Newton matrix of `two_marks`, from explicit Jacobians and Hessians."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  J = jax.jacobian(lambda p: outputs(unravel(p), x))(flat)  # [examples, 3, parameters]
  weights = np.linspace(0.5, 2.0, len(x)) / len(x)
  total = 0
  for n, z in enumerate(outputs(params, x)):
    p = jax.nn.softmax(z)
    H = weights[n] * (jnp.diag(p) - jnp.outer(p, p)) + 0.3 / len(x) * jnp.eye(3)
    total += J[n].T @ H @ J[n]
  return total


def directions(params, k):
  shapes = lambda key, p: jax.random.normal(key, p.shape)
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(7), k * len(leaves)).reshape(k, -1)
  return [treedef.unflatten(list(map(shapes, keys[i], leaves))) for i in range(k)]


def flat(tree):
  return jax.flatten_util.ravel_pytree(tree)[0]


def test_against_dense_matrices():
  params, x, y = network()
  captured = fop_optax.capture(two_marks, params, x, y)
  vectors = directions(params, 3)
  model = jax.jit(lambda *v: fop_optax.quadratic_model(captured, params, (x, y), v))(*vectors)
  V, g = np.stack(list(map(flat, vectors))), flat(jax.grad(two_marks)(params, x, y))
  C = V @ dense(params, x) @ V.T
  np.testing.assert_allclose(model.loss, two_marks(params, x, y), rtol=1e-12)
  np.testing.assert_allclose(model.gram, V @ V.T, rtol=1e-12)
  np.testing.assert_allclose(model.linear, V @ g, rtol=1e-9)
  np.testing.assert_allclose(model.curvature, C, rtol=1e-9)
  damped = C + 0.1 * V @ V.T
  want = -np.linalg.solve(damped, V @ g)
  np.testing.assert_allclose(model.minimizer(0.1), want, rtol=1e-7)
  np.testing.assert_allclose(
    model.change(want, 0.1), want @ V @ g + 0.5 * want @ damped @ want, rtol=1e-9
  )
  given = model.minimizer(0.1, fixed=[None, 0.9, None])
  assert given[1] == 0.9
  free = np.array([0, 2])
  right = (V @ g + 0.9 * damped[:, 1])[free]
  want = -np.linalg.solve(damped[np.ix_(free, free)], right)
  np.testing.assert_allclose(given[free], want, rtol=1e-7)


@pytest.mark.slow
def test_pieces_of_the_batch_give_the_same():
  params, x, y = network()
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(outputs(params, x), y)
  vectors = directions(params, 2)
  whole, *pieces = (
    fop_optax.quadratic_model(
      fop_optax.capture(loss, params, x, y, groups=groups, micro_batches=micro),
      params,
      (x, y),
      vectors,
    )
    for groups, micro in ((1, 1), (2, 1), (2, 2), (1, 4))
  )
  for piece in pieces:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), piece, whole)


def test_the_slope_is_that_of_small_steps():
  params, x, y = network()
  captured = fop_optax.capture(two_marks, params, x, y)
  vectors = directions(params, 2)
  model = fop_optax.quadratic_model(captured, params, (x, y), vectors)
  errors = []
  for size in (1e-2, 1e-3):
    w = size * jnp.array([1.0, -0.5])
    after = jax.tree.map(lambda p, a, b, w=w: p + w[0] * a + w[1] * b, params, *vectors)
    errors.append(abs(two_marks(after, x, y) - model.loss - model.linear @ w))
  assert errors[1] < 0.02 * errors[0]  # what is left is quadratic


def least_squares(dimensions):
  keys = jax.random.split(jax.random.key(1), 2)
  x = jax.random.normal(keys[0], (20, dimensions)) * jnp.logspace(0, -1, dimensions)
  y = jax.random.normal(keys[1], (20, 1))
  loss = lambda params, x, y: fop_optax.squared_error(x @ params["w"], y)
  params = {"w": jnp.ones((dimensions, 1))}
  return loss, fop_optax.capture(loss, params, x, y), params, x, y


@pytest.mark.slow
def test_steps_are_conjugate_gradients():
  """On a quadratic, from the gradient and the step before: the end in as many steps as axes."""
  for dimensions in (2, 5):
    loss, captured, params, x, y = least_squares(dimensions)
    A = x.T @ x / 20
    solution = jnp.linalg.solve(A, x.T @ y / 20)
    step = jax.tree.map(jnp.zeros_like, params)
    residual = direction = x.T @ y / 20 - A @ params["w"]
    iterate = params["w"]
    for _ in range(dimensions):
      grads = jax.grad(loss)(params, x, y)
      model = fop_optax.quadratic_model(captured, params, (x, y), [grads, step])
      w = model.minimizer()
      step = jax.tree.map(lambda g, s, w=w: w[0] * g + w[1] * s, grads, step)
      before = loss(params, x, y)
      params = optax.apply_updates(params, step)
      np.testing.assert_allclose(
        loss(params, x, y) - before, model.change(w), rtol=1e-6, atol=1e-14
      )
      rate = jnp.vdot(residual, residual) / jnp.vdot(direction, A @ direction)  # Hestenes, Stiefel
      iterate = iterate + rate * direction
      new = residual - rate * A @ direction
      direction = new + jnp.vdot(new, new) / jnp.vdot(residual, residual) * direction
      residual = new
      np.testing.assert_allclose(params["w"], iterate, rtol=1e-6)
    np.testing.assert_allclose(params["w"], solution, rtol=1e-6)


def test_directions_without_extent_and_repeated_ones():
  _, captured, params, x, y = least_squares(3)
  one = {"w": jnp.ones((3, 1))}
  zero = jax.tree.map(jnp.zeros_like, one)
  model = fop_optax.quadratic_model(captured, params, (x, y), [one, zero, one])
  w = model.minimizer()
  alone = fop_optax.quadratic_model(captured, params, (x, y), [one]).minimizer()
  np.testing.assert_allclose(w, [alone[0] / 2, 0, alone[0] / 2], rtol=1e-9)


def test_bad_input():
  params, x, y = network()
  captured = fop_optax.capture(two_marks, params, x, y)
  with pytest.raises(ValueError, match="needs at least one direction"):
    fop_optax.quadratic_model(captured, params, (x, y), [])
  with pytest.raises(ValueError, match=r"tree `vectors\[0\]` in `quadratic_model`"):
    fop_optax.quadratic_model(captured, params, (x, y), [{"w1": params["w1"]}])
  with pytest.raises(TypeError, match="has a function for `captured`: pass what"):
    fop_optax.quadratic_model(two_marks, params, (x, y), [params])
  with pytest.raises(ValueError, match=r"as a tuple, `\(x, y\)` or `\(x,\)`, not a "):
    fop_optax.quadratic_model(captured, params, x, [params])
  model = fop_optax.quadratic_model(captured, params, (x, y), [params])
  with pytest.raises(ValueError, match="has 2 entries for 1 directions"):
    model.minimizer(fixed=[None, 0.9])
  plain = lambda params, x, y: jnp.mean(outputs(params, x) ** 2)
  unmarked = fop_optax.capture(plain, params, x, y)
  with pytest.raises(ValueError, match="`quadratic_model` needs to know the distribution"):
    fop_optax.quadratic_model(unmarked, params, (x, y), [params])


def injected(**kwargs):
  _, captured, params, *_ = least_squares(3)
  return optax.inject_hyperparams(fop_optax.kfac)(0.1, captured.layers, **kwargs).init(params)


def at(state, count):
  set_count = lambda path, x: (
    x + count if "curvature" in str(path) and _last(path) == "count" else x
  )
  return jax.tree_util.tree_map_with_path(set_count, state)


def _last(path):
  return getattr(path[-1], "name", None)


@pytest.mark.parametrize(
  ("ratio", "count", "factor"),
  [
    (0.9, 0, 0.95**5),
    (0.9, 10, 0.95**5),
    (0.5, 5, 1.0),
    (0.25, 5, 1.0),
    (0.75, 5, 1.0),
    (0.1, 5, 0.95**-5),
    (-3.0, 5, 0.95**-5),
    (jnp.nan, 5, 0.95**-5),
    (0.9, 4, 1.0),
    (jnp.nan, 1, 1.0),
  ],
)
def test_adapt_damping(ratio, count, factor):
  state = at(injected(damping=2.0, relative_damping=0.5), count)
  new = jax.jit(fop_optax.adapt_damping)(state, ratio)
  np.testing.assert_allclose(new.hyperparams["damping"], 2.0 * factor, rtol=1e-6)
  np.testing.assert_allclose(new.hyperparams["relative_damping"], 0.5 * factor, rtol=1e-6)
  rest = lambda s: s._replace(hyperparams=s.hyperparams | {"damping": 0, "relative_damping": 0})
  jax.tree.map(np.testing.assert_array_equal, rest(new), rest(state))
  low = fop_optax.adapt_damping(state, ratio, lower=10.0)
  assert low.hyperparams["damping"] == 10.0


def test_adapt_damping_needs_a_hyperparameter():
  for state in (injected(), injected(damping=lambda count: 0.1 + 0 * count).inner_state):
    with pytest.raises(ValueError, match="found 0 hyperparameters called damping .*inject"):
      fop_optax.adapt_damping(state, 0.5)


@pytest.mark.slow
def test_a_full_batch_never_gets_worse():
  """All of it together: a small autoencoder, steps refused where the loss would rise."""
  keys = jax.random.split(jax.random.key(3), 5)
  x = jax.nn.sigmoid(3 * jax.random.normal(keys[0], (40, 2)) @ jax.random.normal(keys[1], (2, 12)))
  sizes = (12, 6, 2, 6, 12)
  params = [
    {"w": jax.random.normal(key, (a, b)) / a**0.5, "b": jnp.zeros(b)}
    for key, a, b in zip(jax.random.split(keys[2], 4), sizes[:-1], sizes[1:], strict=True)
  ]

  def loss(params, x):
    h = x
    for layer in params[:-1]:
      h = jnp.tanh(h @ layer["w"] + layer["b"])
    return fop_optax.squared_error(h @ params[-1]["w"] + params[-1]["b"], x)

  captured = fop_optax.capture(loss, params, x, fisher="sampled")
  tx = optax.inject_hyperparams(fop_optax.scale_by_kfac)(
    captured.layers, damping=0.1, curvature_update_period=1
  )

  @jax.jit
  def step(params, state, previous, key):
    value, grads, stats = captured.value_and_grad(params, x, key=key)
    direction, state = tx.update(grads, state, params, stats=stats)
    model = fop_optax.quadratic_model(captured, params, (x,), [direction, previous])
    w = model.minimizer(state.hyperparams["damping"])
    change = jax.tree.map(lambda a, b: w[0] * a + w[1] * b, direction, previous)
    after = optax.apply_updates(params, change)
    risen = loss(after, x) - value
    state = fop_optax.adapt_damping(state, risen / model.change(w))
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(risen < 0, a, b), new, old)
    zero = jax.tree.map(jnp.zeros_like, params)
    return keep(after, params), state, keep(change, zero), value

  state, previous, losses = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
  for key in jax.random.split(keys[3], 80):
    params, state, previous, value = step(params, state, previous, key)
    losses.append(float(value))
  assert np.all(np.diff(losses) <= 0)
  assert losses[-1] < 0.02 * losses[0]

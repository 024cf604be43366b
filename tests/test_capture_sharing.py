"""`sharing="reduce"`: the rows of an example added up before second moments are formed.

The reference adds one perturbation an example to all outputs of a weight, whose gradient is the sum
over its rows, and keeps the sum of its inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
SLOW = pytest.mark.slow
N, T = 8, 6  # examples, rows


def explicit(network, params, x, y, terms=1):
  """`(A, G)` of each name that `network(params, x, y, tap)`, the mean loss, taps."""
  sums, counts, widths = {}, {}, {}

  def loss(eps):
    sums.clear()
    counts.clear()

    def tap(name, x, w, b=None):
      rows = x.reshape(len(x), -1, x.shape[-1])
      if b is not None:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
      sums[name] = sums.get(name, 0) + rows.sum(1)
      counts[name], widths[name] = counts.get(name, 0) + rows.shape[1], w.shape[1]
      out = x @ w + (0 if b is None else b)
      shift = jnp.zeros((len(x), w.shape[1])) if eps is None else eps[name]
      return out + shift.reshape(len(x), *[1] * (out.ndim - 2), -1)

    return network(params, x, y, tap), dict(sums)

  jax.eval_shape(lambda: loss(None))
  eps = {name: jnp.zeros((len(x), outputs)) for name, outputs in widths.items()}
  grads, found = jax.grad(loss, has_aux=True)(eps)
  mean = {name: total / counts[name] for name, total in found.items()}
  return {
    name: (a.T @ a / len(x), len(x) * terms * grads[name].T @ grads[name])
    for name, a in mean.items()
  }


def normal(*shapes, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [jax.random.normal(k, s) / s[-2] ** 0.5 for k, s in zip(keys, shapes, strict=True)]


def pooled_convolution():
  """Strides, padding and two feature groups; averaged over the image."""
  w, b, head = *normal((3, 2, 2, 6)), jnp.linspace(-1, 1, 6), *normal((6, 3), seed=1)
  params = {"w": w, "b": b, "head": head}
  numbers = ("NHWC", "HWIO", "NHWC")

  def loss(p, x, y):
    h = jax.lax.conv_general_dilated(
      x, p["w"], (1, 2), "SAME", None, None, numbers, feature_group_count=2
    )
    return fop_optax.softmax_cross_entropy(jnp.tanh(h + p["b"]).mean((1, 2)) @ p["head"], y)

  def canonical(p, x, y, tap):
    outs = []
    for group in range(2):
      part = x[..., 2 * group : 2 * group + 2]
      patches = jax.lax.conv_general_dilated_patches(
        part, (3, 2), (1, 2), "SAME", dimension_numbers=numbers
      )  # [N, H, W, C * kernel], the channel first
      patches = patches.reshape(*patches.shape[:3], 2, 6).swapaxes(3, 4)
      patches = patches.reshape(*patches.shape[:3], 12)
      kernel = p["w"].reshape(12, 6)[:, 3 * group : 3 * group + 3]
      outs.append(tap(f"w{group}", patches, kernel, p["b"][3 * group : 3 * group + 3]))
    h = jnp.tanh(jnp.concatenate(outs, axis=-1)).mean((1, 2))
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  return params, loss, canonical, {"['w']": ("w0", "w1")}, (5, 4, 4)


def recurrent():
  """Weights that are constant over a scan, whose axis comes first."""
  w, u, head = normal((3, 4), (4, 4), (4, 3))
  params = {"w": w, "u": u, "b": jnp.ones(4), "head": head}

  def loss(p, x, y):
    step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None)
    h, _ = jax.lax.scan(step, jnp.tile(0 * x[:, 0, :1], 4), x.swapaxes(0, 1))
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  def canonical(p, x, y, tap):
    h = jnp.zeros((len(x), 4))
    for t in range(T):
      h = jnp.tanh(tap("w", x[:, t], p["w"]) + tap("u", h, p["u"], p["b"]))
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  return params, loss, canonical, {"['w']": ("w",), "['u']": ("u",)}, (T, 3)


def attention():
  """Slices of one product, and blocks that a scan goes over; a term for each token."""
  qkv, out, head = normal((2, 4, 12), (2, 4, 4), (4, 3))
  params = {"qkv": qkv, "out": out, "head": head}

  def block(h, qkv, out):
    q, k, v = jnp.split(qkv(h), 3, axis=-1)
    return h + jnp.tanh(out(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v))

  def finish(h, p, y):
    return fop_optax.softmax_cross_entropy(h @ p["head"], jnp.repeat(y[:, None], T, 1))

  def loss(p, x, y):
    step = lambda h, w: (block(h, lambda h: h @ w[0], lambda h: h @ w[1]), None)
    return finish(jax.lax.scan(step, x, (p["qkv"], p["out"]))[0], p, y)

  def canonical(p, x, y, tap):
    h = x
    for i in range(2):
      own = lambda name, i=i: functools.partial(tap, f"{name}{i}", w=p[name][i])
      h = block(h, own("qkv"), own("out"))
    return finish(h, p, y)

  names = {"['qkv']": ("qkv0", "qkv1"), "['out']": ("out0", "out1")}
  return params, loss, canonical, names, (T, 4)


def mapped_and_scaled():
  """One example at a time under `vmap`, a weight used twice, once scaled and without its bias."""
  (w,), head = normal((4, 4)), *normal((4, 3), seed=1)
  params = {"w": w, "b": jnp.ones(4), "head": head}

  def of_one(p, x):
    return (jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ (2 * p["w"])).sum(0)) @ p["head"]

  def loss(p, x, y):
    return fop_optax.softmax_cross_entropy(jax.vmap(of_one, (None, 0))(p, x), y)

  def canonical(p, x, y, tap):
    h = jnp.tanh(tap("w", x, p["w"], p["b"]))
    rows = jnp.concatenate([2 * h, jnp.zeros_like(h[..., :1])], -1)  # without the bias: a zero
    whole = jnp.concatenate([p["w"], p["b"][None]])
    return fop_optax.softmax_cross_entropy(jnp.tanh(tap("w", rows, whole)).sum(1) @ p["head"], y)

  return params, loss, canonical, {"['w']": ("w",)}, (T, 4)


CASES = [pooled_convolution, recurrent, attention, mapped_and_scaled]


def batch(shape):
  x = jax.random.normal(jax.random.key(5), (N, *shape))
  return x, jax.random.randint(jax.random.key(6), (N,), 0, 3)


def assert_explicit(captured, stats, case, pieces, terms):
  """The factors are the mean of those of the pieces of the batch."""
  params, _, canonical, names, _ = case
  want = [explicit(canonical, params, *piece, terms) for piece in pieces]
  found = {layer.path: f for layer, f in zip(captured.layers, stats.factors, strict=True)}
  for path, members in names.items():
    assert path in str(captured).split("added up")[1]
    for index, name in enumerate(members):
      for side in (0, 1):
        mean = np.mean([each[name][side] for each in want], axis=0)
        np.testing.assert_allclose(found[path][side][index], mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("make", CASES)
def test_explicit_sums(make, groups):
  params, loss, *_, shape = case = make()
  x, y = batch(shape)
  captured = fop_optax.capture(loss, params, x, y, groups=groups, sharing="reduce")
  _, _, stats = jax.jit(captured.value_and_grad)(params, x, y)
  pieces = [(x[i::groups], y[i::groups]) for i in range(groups)]
  assert_explicit(captured, stats, case, pieces, T if make is attention else 1)


@pytest.mark.parametrize("make", [pytest.param(pooled_convolution, marks=SLOW), recurrent])
def test_pieces_and_shares_of_the_batch(make):
  params, loss, *_, shape = case = make()
  x, y = batch(shape)
  captured = fop_optax.capture(loss, params, x, y, micro_batches=2, sharing="reduce")

  @jax.jit
  def step(refresh):
    return captured.value_and_grad(params, x, y, refresh=refresh)[2]

  assert_explicit(captured, step(True), case, [(x[i::2], y[i::2]) for i in range(2)], 1)
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(step(False).factors))
  captured = fop_optax.capture(loss, params, x, y, curvature_fraction=0.5, sharing="reduce")
  stats = jax.jit(captured.value_and_grad)(params, x, y)[2]
  assert_explicit(captured, stats, case, [(x[::2], y[::2])], 1)


@pytest.mark.parametrize("pooled", [True, False])
def test_which_is_exact_of_linear_layers(pooled):
  """Rows that are averaged into one term of the loss: reduce; a term a row: expand."""
  params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
  x = jax.random.normal(jax.random.key(1), (N, T, 4))
  y = jnp.zeros((N, 3) if pooled else (N, T, 3))

  def loss(p, x, y):
    z = x @ p["w"]
    return fop_optax.squared_error(z.mean(1) if pooled else z, y)

  hessian = jax.hessian(lambda w: loss({"w": w}, x, y))(params["w"]).reshape(12, 12)
  for sharing, exact in (("reduce", pooled), ("expand", not pooled)):
    captured = fop_optax.capture(loss, params, x, y, fisher="exact", sharing=sharing)
    (found,) = jax.jit(captured.value_and_grad)(params, x, y)[2].factors
    fisher = np.kron(found.A[0], found.G[0])
    assert np.allclose(fisher, hessian, rtol=1e-9, atol=1e-12) == exact


def test_sampled_is_exact_in_the_mean():
  params = dict(zip(("w", "head"), normal((4, 3), (3, 3)), strict=True))
  marked = lambda p, x, y: fop_optax.softmax_cross_entropy(
    jnp.tanh(x @ p["w"]).mean(1) @ p["head"], y
  )
  x, y = batch((T, 4))
  exact, sampled = (
    fop_optax.capture(marked, params, x, y, fisher=fisher, sharing="reduce")
    for fisher in ("exact", "sampled")
  )
  (_, want) = jax.jit(exact.value_and_grad)(params, x, y)[2].factors
  draw = lambda key: sampled.value_and_grad(params, x, y, key=key)[2].factors[1].G
  drawn = jax.lax.map(draw, jax.random.split(jax.random.key(3), 2000))
  error = jnp.std(drawn, axis=0) / 2000**0.5
  assert jnp.all(jnp.abs(drawn.mean(0) - want.G) < 4.5 * error + 1e-12)


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_sharded_batch(kind):
  params, loss, *_, shape = recurrent()
  x, y = batch(shape)
  captured = fop_optax.capture(loss, params, x, y, sharing="reduce")
  want = jax.jit(captured.value_and_grad)(params, x, y)[2].factors
  axis = jax.sharding.AxisType.Explicit if kind == "explicit" else jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((4,), ("data",), (axis,))
  data = jax.NamedSharding(mesh, jax.P("data"))
  factors = lambda params, x, y: jax.jit(captured.value_and_grad)(params, x, y)[2].factors
  if kind == "shard_map":
    local = lambda *args, own=factors: jax.lax.pmean(own(*args), "data")
    factors = jax.shard_map(
      local, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P()
    )
  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    got = jax.jit(factors)(params, *jax.device_put((x, y), data))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


def test_what_does_not_reduce_is_said():
  params = {"table": jnp.ones((5, 4)), "w": jnp.ones((4, 3)), "head": jnp.ones((3, 3))}
  x, y = jnp.zeros((N, T), int), jnp.zeros(N, int)
  loss = lambda p, x, y: fop_optax.softmax_cross_entropy(
    (p["table"][x] @ p["w"]).sum(1) @ p["head"], y
  )
  captured = fop_optax.capture(loss, params, x, y, sharing="reduce")
  assert str(captured).splitlines()[-1] == (
    "Rows of each example added up (`sharing='reduce'`): ['w']."
  )
  plain = fop_optax.capture(loss, params, x, y)
  a, b = (jax.jit(c.value_and_grad)(params, x, y)[2].factors for c in (captured, plain))
  for layer, one, other in zip(plain.layers, a, b, strict=True):
    if layer.path != "['w']":  # the lookup, and the head, which has one row an example
      jax.tree.map(np.testing.assert_array_equal, one, other)
  dense = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
  alone = fop_optax.capture(dense, {"w": jnp.ones((4, 3))}, jnp.ones((N, 4)), sharing="reduce")
  assert "no layer: none has several rows" in str(alone)
  with pytest.raises(ValueError, match=r"sharing='sum'.*unknown: one of expand, reduce"):
    fop_optax.capture(dense, {"w": jnp.ones((4, 3))}, jnp.ones((N, 4)), sharing="sum")

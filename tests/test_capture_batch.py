"""Arguments, aux, keys, cost and errors of `capture` and `value_and_grad`."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

N, D, C = 8, 4, 3
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def cross_entropy(p, x, y):
  return fop_optax.softmax_cross_entropy(x @ p["w"] + p["b"], y)


def inputs(n=N):
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(D, C)), "float32"), "b": jnp.zeros(C)}
  return params, jnp.asarray(rng.normal(size=(n, D)), "float32"), jnp.arange(n) % C


@pytest.mark.parametrize("options", [{"groups": 2, "micro_batches": 2}, {"groups": 4}, {}])
@pytest.mark.parametrize("refresh", [True, False])
def test_aux_comes_back_whole(options, refresh):
  params, x, y = inputs()

  def loss(p, x, y):
    logits = x @ p["w"] + p["b"]
    aux = {
      "logits": logits,
      "twice": jnp.concatenate([x, x], 1).reshape(-1, D),  # two rows an example
      "right": (jnp.argmax(logits, 1) == y),
      "mean": jnp.mean(x, 0),
      "count": jnp.int32(3),
    }
    return cross_entropy(p, x, y), aux

  captured = fop_optax.capture(loss, params, x, y, has_aux=True, **options)
  value_and_grad = jax.jit(captured.value_and_grad, static_argnames="refresh")
  (value, aux), _, _ = value_and_grad(params, x, y, refresh=refresh)
  whole, expected = loss(params, x, y)
  np.testing.assert_allclose(value, whole, rtol=1e-6)
  assert jax.tree.structure(aux) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), aux, expected)


def test_aux_that_cannot_be_merged_is_named():
  params, x, y = inputs()
  wrong = lambda p, x, y: jnp.sum(jnp.argmax(x @ p["w"], 1) == y)
  loss = lambda p, x, y: (cross_entropy(p, x, y), {"right": wrong(p, x, y)})
  with pytest.raises(ValueError, match=r"aux\['right'\] \(int32\[\]\) depends on the batch"):
    fop_optax.capture(loss, params, x, y, has_aux=True, groups=2)
  fop_optax.capture(loss, params, x, y, has_aux=True)  # one chunk: as it is
  loss = lambda p, x, y: (cross_entropy(p, x, y), x.T)
  with pytest.raises(ValueError, match=r"aux has shape \[4, 4\] for 4 examples and \[4, 8\] for 8"):
    fop_optax.capture(loss, params, x, y, has_aux=True, groups=2)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_each_chunk_has_its_own_key(make):
  params, x, y = inputs()
  key = make(0)

  def loss(p, x, y, key):
    noise = jax.random.uniform(key, x.shape)
    new_key, _ = jax.random.split(key)
    return cross_entropy(p, x * noise, y), (noise, key, new_key)

  captured = fop_optax.capture(loss, params, x, y, key, has_aux=True, groups=2, micro_batches=2)
  (_, (noise, same, new_key)), _, _ = jax.jit(captured.value_and_grad)(params, x, y, key)
  assert len(np.unique(np.round(np.asarray(noise), 6))) == N * D
  assert new_key.shape == key.shape and new_key.dtype == key.dtype
  data = lambda k: jax.random.key_data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k
  np.testing.assert_array_equal(data(same), data(key))  # what went in comes out


@pytest.mark.parametrize("options", [{}, {"batch_argnums": (0, 1)}])
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_one_an_example_are_data(make, options):
  params, x, _ = inputs()
  noise = jax.vmap(lambda key: jax.random.normal(key, (D,)))
  loss = lambda p, x, keys: jnp.mean((noise(keys) * x @ p["w"]) ** 2)
  keys = jax.random.split(make(0), N)
  captured = fop_optax.capture(loss, params, x, keys, groups=2, **options)
  value, _, _ = captured.value_and_grad(params, x, keys, refresh=False)
  np.testing.assert_allclose(value, loss(params, x, keys), rtol=1e-6)


def test_two_numbers_in_the_form_of_a_key_are_none():
  params, x, _ = inputs()
  size, key = jnp.array([5, 7], jnp.uint32), jax.random.PRNGKey(0)

  @jax.jit
  def loss(p, x, size, key):
    noise = jax.random.normal(key, x.shape)
    return jnp.mean(((x + noise) @ p["w"]) ** 2) * size[0].astype("float32")

  captured = fop_optax.capture(loss, params, x, size, key, groups=2, batch_argnums=0)
  value, _, _ = captured.value_and_grad(params, x, size, key, refresh=False)
  each = [loss(params, x[i::2], size, jax.random.fold_in(key, i)) for i in range(2)]
  np.testing.assert_allclose(value, np.mean(each), rtol=1e-6)

  weighted = lambda p, x, size: jnp.mean((x @ p["w"])[:, 0] * size.astype("float32"))
  for options in ({}, {"batch_argnums": (0, 1)}):  # a batch of two
    captured = fop_optax.capture(weighted, params, x[:2], size, groups=2, **options)
    value, _, _ = captured.value_and_grad(params, x[:2], size, refresh=False)
    np.testing.assert_allclose(value, weighted(params, x[:2], size), rtol=1e-5)
  with pytest.raises(ValueError, match=r"args\[1\]: 2\).*batch_argnums=0"):
    fop_optax.capture(loss, params, x, size, key)


@pytest.mark.parametrize(
  "captured_weak, weak", [(True, False), *(SLOW(*row) for row in [(True, True), (False, True)])]
)
def test_weak_types_make_no_difference(captured_weak, weak):
  params, x, y = inputs()
  scales = {True: jnp.full(D, 0.5), False: jnp.full(D, 0.5, "float32")}
  assert scales[True].weak_type
  assert not scales[False].weak_type
  loss = lambda p, x, y: cross_entropy(p, x.astype("bfloat16") * p["scale"], y)
  captured = fop_optax.capture(loss, params | {"scale": scales[captured_weak]}, x, y, groups=2)
  params |= {"scale": scales[weak]}
  value, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  np.testing.assert_allclose(value, loss(params, x, y), rtol=1e-6)  # promoted as the loss does it
  assert grads["scale"].dtype == jnp.float32
  assert np.any(stats.factors[0].A)


@pytest.mark.parametrize(
  "options",
  [*map(SLOW, [{}, {"groups": 2}]), {"groups": 2, "micro_batches": 2}],
)
def test_complex_and_8_bit_leaves_have_their_gradients_and_no_layer(options):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), "float32")
  params = {
    "complex": draw(D, C) + 1j * draw(D, C),
    "eight": draw(D, D).astype(jnp.float8_e5m2),
    "imaginary": draw(D, C),
    "real": draw(D, C),
    "w": draw(D, D),
  }

  def loss(p, x, y):
    h = jnp.tanh(x @ p["w"]) @ p["eight"].astype("float32")
    both = jnp.abs(h @ (p["real"] + 1j * p["imaginary"]))  # of real parameters
    return fop_optax.softmax_cross_entropy(jnp.abs(h @ p["complex"]) + both, y)

  _, x, y = inputs()
  captured = fop_optax.capture(loss, params, x, y, **options)
  assert [layer.path for layer in captured.layers] == ["['imaginary']", "['real']", "['w']"]
  assert captured.fallbacks["['complex']"] == "complex64: curvature is of real parameters"
  assert captured.fallbacks["['eight']"].startswith("float8_e5m2: curvature is of parameters with")
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)
  for name, expected in jax.grad(loss)(params, x, y).items():
    tolerance = 0.25 if name == "eight" else 1e-5  # two bits of mantissa, rounded in each group
    ours, theirs = (np.asarray(g).astype(complex) for g in (grads[name], expected))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
  tx = fop_optax.fop(0.1, captured.layers) if options else fop_optax.kfac(0.1, captured.layers)
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
  assert all(np.any(np.asarray(u).astype(complex)) for u in jax.tree.leaves(updates))


def test_state_beside_the_batch_is_named_by_batch_argnums():
  params, x, y = inputs()
  state = {"mean": jnp.zeros(D), "steps": 0}

  def loss(p, state, x, y):
    centred = x - 0.1 * state["mean"]
    return cross_entropy(p, centred, y), {"mean": jnp.mean(x, 0), "steps": state["steps"] + 1}

  with pytest.raises(ValueError, match=r"(?s)leading axes.*args\[0\]\['mean'\]: 4.*batch_argnums"):
    fop_optax.capture(loss, params, state, x, y, has_aux=True)
  captured = fop_optax.capture(loss, params, state, x, y, has_aux=True, batch_argnums=(1, 2))
  (_, aux), grads, _ = jax.jit(captured.value_and_grad)(params, state, x, y)
  np.testing.assert_allclose(aux["mean"], jnp.mean(x, 0), rtol=1e-5)
  assert aux["steps"] == 1
  expected = jax.grad(lambda p: loss(p, state, x, y)[0])(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)


def test_traced_and_static_refresh_agree_without_recompiling():
  params, x, y = inputs()
  captured = fop_optax.capture(cross_entropy, params, x, y, groups=2)
  traces = []

  @jax.jit
  def step(params, x, y, refresh):
    traces.append(1)
    return captured.value_and_grad(params, x, y, refresh=refresh)

  for flag in (True, False):
    ours, expected = step(params, x, y, flag), captured.value_and_grad(params, x, y, refresh=flag)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)
    assert bool(ours[2].refresh) is flag
  assert len(traces) == 1


def deep(p, x, y):
  for w in list(p["stack"]):
    x = jnp.tanh(x @ w)
  return cross_entropy(p, x, y)


def test_without_refresh_no_flops_beyond_the_grouped_gradient():
  params, x, y = inputs()
  params = params | {"stack": jnp.ones((6, D, D))}

  def grouped(params, x, y):
    first, second = (jax.value_and_grad(deep)(params, x[i::2], y[i::2]) for i in range(2))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    return mean, jax.tree.map(jnp.subtract, first[1], second[1])

  def flops(f):
    cost = jax.jit(f).lower(params, x, y).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]

  captured = fop_optax.capture(deep, params, x, y, groups=2)
  ours = flops(lambda *args: captured.value_and_grad(*args, refresh=False))
  assert ours <= 1.01 * flops(grouped)
  assert flops(captured.value_and_grad) > 1.2 * ours  # the statistics are not free


def test_checkpoint_keeps_its_memory():
  """Temporaries of the compiled program: within a fifth of the plain checkpointed gradient's.

  On the CPU within a tenth; statistics of all steps of the scan stand beside them on a GPU.
  """
  depth, width = 12, 128
  params = {"stack": jnp.ones((depth, width, width)), "w": jnp.ones((width, C)), "b": jnp.zeros(C)}
  x, y = jnp.ones((16, 64, width)), jnp.zeros(16, int)

  def loss(p, x, y, wrap=jax.checkpoint):
    block = lambda h, w: (h + jnp.tanh(3 * jnp.tanh(h @ w)), None)
    h, _ = jax.lax.scan(wrap(block), x, p["stack"])
    return cross_entropy(p, h.mean(1), y)

  def temporaries(f):
    return jax.jit(f).lower(params, x, y).compile().memory_analysis().temp_size_in_bytes

  captured = fop_optax.capture(loss, params, x, y)
  plain = temporaries(jax.value_and_grad(loss))
  assert (
    temporaries(captured.value_and_grad) <= (1.1 if jax.default_backend() == "cpu" else 1.2) * plain
  )
  without = jax.value_and_grad(lambda *args: loss(*args, wrap=lambda f: f))
  assert plain < 0.6 * temporaries(without)


def test_a_batch_size_in_the_loss_is_named_where_pieces_do_not_fit():
  loss = lambda p, x, y: cross_entropy(p, x.reshape(N, D), y)
  fop_optax.capture(loss, P, X, Y)
  with pytest.raises(TypeError) as raised:
    fop_optax.capture(loss, P, X, Y, groups=2)
  said = f"on {N // 2} examples, one piece of 2 (groups=2, micro_batches=1)"
  assert any(said in note for note in raised.value.__notes__)


# Bad input: what is done, and the words of the error.

P, X, Y = inputs()
whole = lambda captured, *args: captured.value_and_grad(*args)
BAD = {
  "closed-over batch": (lambda: fop_optax.capture(lambda p: cross_entropy(p, X, Y), P),
                        r"No argument of the loss has a batch axis.*capture\(loss, params, x, y\)"),
  "batch not divisible": (lambda: fop_optax.capture(cross_entropy, P, X[:7], Y[:7], groups=2),
                          r"batch of 7 cannot be divided into groups=2 times micro_batches=1"),
  "last batch": (lambda: whole(fop_optax.capture(cross_entropy, P, X, Y, groups=2),
                               P, X[:5], Y[:5]),
                 r"batch of 5 cannot be divided.*multiple of 2"),
  "empty batch": (lambda: fop_optax.capture(cross_entropy, P, X[:0], Y[:0]), "batch of 0"),
  "different batches": (lambda: fop_optax.capture(cross_entropy, P, X, Y[:4]),
                        r"leading axes of the arguments differ \(args\[0\]: 8, args\[1\]: 4\).*=0"),
  "batch_argnums": (lambda: fop_optax.capture(cross_entropy, P, X, Y, batch_argnums=2),
                    r"batch_argnums=2 names argument 2, but the loss has 2 arguments"),
  "negative number": (lambda: fop_optax.capture(cross_entropy, P, X, Y, batch_argnums=-1),
                      r"batch_argnums=-1 names argument -1, but the loss has 2 arguments"),
  "flag": (lambda: fop_optax.capture(cross_entropy, P, X, Y, batch_argnums=(0, True)),
           r"batch_argnums=\(0, True\)\)` takes the number of an argument after params"),
  "named twice": (lambda: fop_optax.capture(cross_entropy, P, X, Y, batch_argnums=(0, 0)),
                  r"batch_argnums=\(0, 0\) names an argument twice"),
  "scalar as batch": (lambda: fop_optax.capture(cross_entropy, P, X, jnp.ones(()),
                                                batch_argnums=(0, 1)),
                      r"names argument 1, which has no array with an axis. It cannot be the batch"),
  "state between": (lambda: fop_optax.capture(cross_entropy, P, X, {"m": Y[:3], "v": X[:2]}, Y),
                    r"axes .* differ .*args\[1\]\['m'\]: 3.* has 8 examples, write"
                    r" `capture\(loss, params, \*args, batch_argnums=\(0, 2\)\)`"),
  "state beside data": (lambda: fop_optax.capture(cross_entropy, P, {"x": X, "m": X[:3]}, Y),
                        r"batch_argnums=1\)`.*args\[0\] has leaves with 8 and others: make two"),
  "fewer arguments": (lambda: whole(fop_optax.capture(cross_entropy, P, X, Y), P, X),
                      r"got 1 arguments after params, but 2 in `fop_optax.capture"),
  "complex loss": (lambda: fop_optax.capture(lambda p, x, y: 1j * cross_entropy(p, x, y), P, X, Y),
                   r"returned complex64\[\]. Convert it, or take its real part"),
  "integer parameter": (lambda: fop_optax.capture(cross_entropy, P | {"n": jnp.arange(3)}, X, Y),
                        r"params\['n'\] is int32\[3\]: only floating arrays have gradients"),
  "function in params": (lambda: fop_optax.capture(cross_entropy, P | {"f": jnp.tanh}, X, Y),
                         r"params\['f'\] is a .*, not an array.*equinox.partition"),
  "no parameter": (lambda: fop_optax.capture(cross_entropy, {}, X, Y), "params without leaves"),
  "no layer": (lambda: fop_optax.capture(lambda p, x, y: jnp.mean(x * p["w"].sum()), P, X, Y),
               r"(?s)found no layer.*\['b'\]: no gradient.*\['w'\]: it is used in `reduce_sum`"),
  "vector loss": (lambda: fop_optax.capture(lambda p, x, y: x @ p["w"][:, 0], P, X, Y),
                  r"floating scalar, but it returned float32\[8\].*mean over the batch"),
  "undeclared aux": (lambda: fop_optax.capture(lambda p, x, y: (cross_entropy(p, x, y), x),
                                               P, X, Y),
                     r"returned a tuple. Pass has_aux=True"),
  "missing aux": (lambda: fop_optax.capture(cross_entropy, P, X, Y, has_aux=True),
                  r"must return a pair `\(loss, aux\)`, but it returned one array"),
  "wrong tree": (lambda: whole(fop_optax.capture(cross_entropy, P, X, Y), {"w": P["w"]}, X, Y),
                 r"params has 1 leaves, but .* captured from params with 2: \['b'\], \['w'\]"),
  "wrong shape": (lambda: whole(fop_optax.capture(cross_entropy, P, X, Y), P | {"b": P["w"]}, X, Y),
                  r"params has shape \(4, 3\) at \['b'\], but .* with \(3,\) there"),
  "other layers": (lambda: whole(fop_optax.capture(
    lambda p, x, y: cross_entropy(p, x[:, :D] if x.shape[1] > D else x * p["b"].sum(), y), P, X, Y),
    P, jnp.ones((N, D + 1)), Y), r"(?s)other layers with these arguments.*now.*captured"),
  "groups": (lambda: fop_optax.capture(cross_entropy, P, X, Y, groups=0), r"groups=.*at least 1"),
  "fisher": (lambda: fop_optax.capture(cross_entropy, P, X, Y, fisher="true"),
             r"fisher='true'.*one of empirical, sampled, exact"),
  "fraction": (lambda: fop_optax.capture(cross_entropy, P, X, Y, curvature_fraction=0.3),
               r"curvature_fraction=0.3.*1 over a whole number"),
  "no fraction": (lambda: fop_optax.capture(cross_entropy, P, X, Y, curvature_fraction=0.0),
                  r"curvature_fraction=0.0.*1 over a whole number"),
  "fraction of the batch": (
    lambda: fop_optax.capture(cross_entropy, P, X, Y, groups=2, curvature_fraction=1 / 8),
    r"batch of 8 .* has 4 examples in each piece.*1/8` is no whole number. Use a multiple of 16"),
  "terms": (lambda: fop_optax.capture(cross_entropy, P, X, Y, terms_per_example=0.5),
            r"terms_per_example=.*not 0.5"),
  "one number an example": (lambda: fop_optax.capture(
    lambda p, x, y: fop_optax.squared_error((x @ p["w"])[:, 0], y * 1.0), P, X, Y),
    r"averages over \[1\] terms for 8 examples.*with one number an example \[batch, 1\]"),
  "two marks": (lambda: fop_optax.capture(lambda p, x, y: sum(
    cross_entropy(p, jnp.stack([x] * 2, 1), jnp.stack([y] * 2, 1)) for _ in range(2)) / 2, P, X, Y),
    r"2 marked losses.*Pass `terms_per_example`"),
  "mark in a branch": (lambda: fop_optax.capture(lambda p, x, y: cross_entropy(p, x, y)
    + jax.lax.cond(x.sum() > 0, lambda: cross_entropy(p, x, y), lambda: 0.0), P, X, Y,
    fisher="sampled"),
    r"marked loss stands inside of `cond`.* at .*test_capture_batch.py.*would leave it out"),
  "labels": (lambda: fop_optax.softmax_cross_entropy(X, X[:, :2]),
             r"float32\[8, 4\] and float32\[8, 2\]"),
  "predictions": (lambda: fop_optax.squared_error(X, X[:, 0]), r"\[8, 4\] and \[8\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
  act, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    act()


def test_a_batch_that_cannot_be_divided_is_said_once():
  with pytest.raises(ValueError, match="cannot be divided") as raised:
    fop_optax.capture(cross_entropy, P, X[:7], Y[:7], groups=2)
  assert raised.value.__context__ is None


def test_arguments_in_another_order():
  with pytest.raises(TypeError, match="takes the function of the loss first.*not a dict"):
    fop_optax.capture(P, X, Y)


def test_equinox_module_with_its_functions_says_how_to_split_it():
  model = eqx.nn.MLP(D, C, 4, 1, key=jax.random.key(0))
  loss = lambda m, x, y: fop_optax.softmax_cross_entropy(jax.vmap(m)(x), y)
  with pytest.raises(ValueError, match="equinox.partition"):
    fop_optax.capture(loss, model, X, Y)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_groups_in_a_loop_are_groups_written_out(micro_batches):
  """A long program goes in a loop under `jit`, and is written out when it runs eagerly."""
  rng = np.random.default_rng(0)
  params = [jnp.asarray(rng.normal(size=(3, 3)), "float32") for _ in range(20)]
  x, y = jnp.asarray(rng.normal(size=(12, 3)), "float32"), jnp.arange(12) % 3

  def loss(params, x, y, key):
    h = x + jax.random.normal(key)
    for w in params:
      h = jnp.tanh(h @ w)
    return fop_optax.softmax_cross_entropy(h, y), {"h": h, "mean": h.mean(), "key": key}

  key = jax.random.key(0)
  captured = fop_optax.capture(
    loss, params, x, y, key, has_aux=True, groups=3, micro_batches=micro_batches
  )
  (loss_, aux), *rest = jax.jit(captured.value_and_grad)(params, x, y, key)
  (looped, looped_aux), *looped_rest = jax.jit(captured.value_and_grad)(params, x, y, key)
  text = jax.jit(captured.value_and_grad).lower(params, x, y, key).as_text()
  assert "stablehlo.while" in text
  assert aux.pop("key").dtype == looped_aux.pop("key").dtype
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(near, (loss_, aux, rest), (looped, looped_aux, looped_rest))

"""Every spelling of a lookup of whole rows, and of what is the same for every example."""

from collections.abc import Callable
import functools
from typing import Any

import explicit
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import slow_but
from test_capture import draw, relative

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

N, T, V, D, C = 4, 3, 5, 2, 3


def head(h):
  """A loss of `h[N, ...]` without further parameters."""
  h = jnp.tanh(h).reshape(len(h), -1)
  logits = h @ jnp.cos(jnp.arange(h.shape[1] * C)).reshape(-1, C)
  return fop_optax.softmax_cross_entropy(logits, jnp.arange(len(h)) % C)


def tokens():
  return jnp.asarray(np.random.default_rng(0).integers(V, size=(N, T)))


def check(look_up, w, x, expected, kind="lookup"):
  """The one layer of `look_up(w, x)`, by its gradient and factors."""
  loss = lambda w, x: head(look_up(w, x))
  captured = fop_optax.capture(loss, w, x, strict=True, groups=1)
  assert [layer.kind for layer in captured.layers] == [kind]
  value, grads, stats = jax.jit(captured.value_and_grad)(w, x)
  relative(value, expected.loss)
  relative(grads, expected.grads[0])
  (A, G) = stats.factors[0]
  assert len(A) == len(expected.matrices)
  for place in range(len(A)):
    matrix = expected.matrices["w", place]
    relative(A[place], np.diagonal(matrix.factors[0]))
    relative(G[place], matrix.factors[1])


@functools.cache
def rows_of_a_matrix():
  """`w[x]` for tokens `x[N, T]` by the product with one-hot rows."""
  w, x = jnp.asarray(draw(V, D)), tokens()

  def loss(w, x, y, tap):
    return head(tap("w", jax.nn.one_hot(x, V, dtype=w.dtype), w))

  return w, x, explicit.evaluate(loss, w, x, x, groups=1)


QUICK = ("a scalar under vmap", "a scalar in a map", "dynamic_slice", "columns", "two indices")
SPELLINGS: dict[str, Callable[..., Any]] = {  # of w[x]
  "a scalar under vmap": lambda w, x: jax.vmap(jax.vmap(lambda t: w[t]))(x),
  "a scalar in a map": lambda w, x: lax.map(lambda t: w[t], x.ravel()).reshape(*x.shape, -1),
  "a scalar in a scan in a vmap": lambda w, x: jax.vmap(
    lambda x: lax.scan(lambda c, t: (c, w[t]), 0.0, x)[1]
  )(x),
  "dynamic_slice": lambda w, x: jax.vmap(
    jax.vmap(lambda t: lax.dynamic_slice(w, (t, jnp.int64(0)), (1, D))[0])
  )(x),
  "dynamic_index_in_dim": lambda w, x: lax.map(
    jax.vmap(lambda t: lax.dynamic_index_in_dim(w, t, keepdims=False)), x
  ),
  "take along an axis": lambda w, x: jnp.take_along_axis(w, x.reshape(-1, 1), 0).reshape(N, T, D),
  "columns": lambda w, x: jnp.moveaxis(w.T[:, x], 0, -1),
  "a column under vmap": lambda w, x: jax.vmap(jax.vmap(lambda t: w.T[:, t]))(x),
  "fill": lambda w, x: w.at[x].get(mode="fill", fill_value=0),
  "promise_in_bounds": lambda w, x: w.at[x].get(mode="promise_in_bounds"),
  "negative": lambda w, x: w[x - V],
  "uint8": lambda w, x: w[x.astype(jnp.uint8)],
  "of a reshaped table": lambda w, x: w.reshape(-1, 1, V, D)[0, 0][x],
  "two indices": lambda w, x: w.reshape(V, 1, D)[x, x * 0],
  "checkpoint": lambda w, x: jax.checkpoint(jax.jit(lambda w: jnp.take(w, x, axis=0)))(w),
}


@pytest.mark.parametrize("name", slow_but(SPELLINGS, *QUICK))
def test_a_lookup_of_whole_rows(name):
  check(SPELLINGS[name], *rows_of_a_matrix())


def one_hot(ids, w):
  return jax.nn.one_hot(ids, len(w), dtype=w.dtype)


def expected_of(loss, w, x):
  """Factors of `w` in `loss(w, x, tap)`, with calls `tap("w", rows, w)`."""
  return explicit.evaluate(lambda w, x, y, tap: loss(w, x, tap), w, x, x, groups=1)


@pytest.mark.slow
def test_windows_of_rows_are_lookups_of_each_and_clipped_as_jax_clips_them():
  w, x = jnp.asarray(draw(V, D)), jnp.array([0, V - 1, 2, -9])
  starts = jnp.clip(jnp.where(x < 0, x + V, x), 0, V - 2)
  rows = lambda w, x, tap: head(tap("w", one_hot(starts[:, None] + jnp.arange(2), w), w))
  expected = expected_of(rows, w, x)
  window = lambda w: lambda t: lax.dynamic_slice_in_dim(w, t, 2)
  check(lambda w, x: jax.vmap(window(w))(x), w, x, expected)
  check(lambda w, x: lax.map(window(w), x), w, x, expected)


@pytest.mark.slow
def test_tables_with_indices_of_their_own_are_a_stack():
  w, x = jnp.asarray(draw(2, V, D)), tokens()[:, :2]

  def rows(w, x, tap):
    return head(jnp.stack([tap("w", one_hot(x[:, i], w[i]), w[i], None, i) for i in (0, 1)], 1))

  expected = expected_of(rows, w, x)
  check(lambda w, x: jax.vmap(lambda w, i: w[i], (0, 1), 1)(w, x), w, x, expected)
  check(lambda w, x: jnp.moveaxis(lax.map(lambda wi: wi[0][wi[1]], (w, x.T)), 0, 1), w, x, expected)


@pytest.mark.parametrize(
  "look_up, why",
  [
    (lambda w, x: w[x, x % D], "its entries are looked up one by one"),
    (lambda w, x: w.reshape(D, V)[x[:, 0] % 2, :2], "parts of its rows are looked up"),
    (
      lambda w, x: lax.fori_loop(0, V, lambda i, h: h + w[i], 1.0 * x[:, :D]),
      "it is sliced at a traced index; scan over the slices instead",
    ),
  ],
)
def test_what_is_no_lookup_of_whole_rows_says_so(look_up, why):
  with pytest.raises(ValueError, match=why):
    fop_optax.capture(lambda w, x: head(look_up(w, x)), jnp.asarray(draw(V, D)), tokens())


ONES, TWICE = np.arange(T), np.array([2, 0, 2])
NEAR = np.abs(np.arange(T)[:, None] - np.arange(T))  # [T, T]
scores = lambda h: jnp.einsum("ntd,nsd->nts", h, h)[:, None]
ALWAYS: dict[str, tuple[Any, Callable[..., Any]]] = {  # rows that each example has, and spellings
  "range": (ONES, lambda w, h: h + w[jnp.arange(T)]),
  "take": (ONES, lambda w, h: h + jnp.take(w, jnp.arange(T)[None], axis=0)),
  "scalar": (ONES, lambda w, h: jax.vmap(lambda h: h + jax.vmap(lambda t: w[t])(ONES))(h)),
  "twice": (TWICE, lambda w, h: h + w[TWICE]),
  "columns": (TWICE, lambda w, h: h + w.T[:, TWICE].T),
  "relative": (NEAR, lambda w, h: scores(h) + w[NEAR].transpose(2, 0, 1)),
}


@pytest.mark.parametrize("name", slow_but(ALWAYS, "range", "twice"))
def test_rows_at_constant_indices_that_are_added_are_a_table(name):
  ids, add = ALWAYS[name]
  w, h = jnp.asarray(draw(V, D)), jnp.asarray(draw(N, T, D))

  def rows(w, h, tap):
    own = tap("w", one_hot(jnp.broadcast_to(ids, (len(h), *ids.shape)), w), w)
    return head(scores(h) + jnp.moveaxis(own, -1, 1) if ids.ndim == 2 else h + own)

  expected = expected_of(rows, w, h)
  if len(set(ids.ravel())) == ids.size:  # the table has these rows alone
    full = expected.matrices["w", 0]
    expected.matrices["w", 0] = full._replace(A=np.delete(full.A, [3, 4], 0)[:, [0, 1, 2, -1]])
  check(add, w, h, expected, "table")


def test_constant_indices_that_each_example_has_are_a_lookup():
  w, h = jnp.asarray(draw(V, D)), jnp.asarray(draw(N, D))
  rows = lambda w, h, tap: head(jnp.tanh(tap("w", one_hot(jnp.ones(len(h), int), w), w)) * h)
  check(
    lambda w, h: jnp.tanh(w[jnp.ones(len(h), int)]) * h, w, h, expected_of(rows, w, h), "lookup"
  )


def repeated(w, h):
  return jnp.broadcast_to(w, (len(h), *w.shape))


TOKENS: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {  # shape of w; h before, w after
  "vector": ((D,), lambda w, h: jnp.concatenate([h, repeated(w[None], h)], 1)),
  "registers": ((2, D), lambda w, h: jnp.concatenate([h, repeated(w, h)], 1)),
  "repeat": ((1, 1, D), lambda w, h: jnp.concatenate([h, jnp.repeat(w, len(h), 0)], 1)),
  "per example": ((2, D), lambda w, h: jax.vmap(lambda h: jnp.concatenate([h, w]))(h)),
  "append": ((D,), lambda w, h: lax.map(lambda h: jnp.append(h, w[None], 0), h)),
  "stack": ((D,), lambda w, h: jax.vmap(lambda h: jnp.stack([*h, w]))(h)),
}


@pytest.mark.parametrize("name", slow_but(TOKENS, "vector"))
def test_tokens_that_are_joined_to_each_example_are_a_table(name):
  shape, join = TOKENS[name]
  w, h = jnp.asarray(draw(*shape)), jnp.asarray(draw(N, T, D))

  def rows(w, h, tap):
    w = w.reshape(-1, D)
    return head(jnp.concatenate([h, tap("w", repeated(jnp.eye(len(w)), h), w)], 1))

  check(join, w, h, expected_of(rows, w, h), "table")


@pytest.mark.slow
def test_a_token_and_registers_around_the_batch_are_two_tables():
  params = {"a": jnp.asarray(draw(D)), "b": jnp.asarray(draw(2, D))}
  h = jnp.asarray(draw(N, T, D))
  join = lambda p, h: jnp.concatenate([p["a"][None], h, p["b"]])
  loss = lambda p, h: head(jax.vmap(join, (None, 0))(p, h))
  captured = fop_optax.capture(loss, params, h, strict=True, groups=2)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, h)

  def rows(p, h, _, tap):
    first = tap("a", jnp.ones((len(h), 1, 1)), p["a"][None])
    return head(jnp.concatenate([first, h, tap("b", repeated(jnp.eye(2), h), p["b"])], 1))

  _, each, matrices = explicit.evaluate(rows, params, h, h, groups=2)
  jax.tree.map(lambda g, *each: relative(g, np.mean(each, 0)), grads, *each)
  for (A, G), key in zip(stats.factors, [("a", 0), ("b", 0)], strict=True):
    relative(A[0], np.diagonal(matrices[key].factors[0]))
    relative(G[0], matrices[key].factors[1])


def inner(p, x, y):
  return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_adapted_to_each_task_are_weights(steps):
  """First-order MAML: `d loss / d w` is that of the adapted weight."""
  params = {"a": jnp.asarray(draw(2, 3)), "b": jnp.asarray(draw(3, 2))}
  x, y = jnp.asarray(draw(N, T, 2)), jnp.asarray(draw(N, T, 2, seed=1))

  def changes(p, x, y):
    q = p
    for _ in range(steps):
      g = lax.stop_gradient(jax.grad(inner)(q, x, y))
      q = jax.tree.map(lambda q, g: q + -0.1 * g, q, g)
    return q

  loss = lambda p, x, y: jnp.mean(jax.vmap(lambda x, y: inner(changes(p, x, y), x[::-1], y))(x, y))
  captured = fop_optax.capture(loss, params, x, y, strict=True, terms_per_example=1)
  assert [layer.kind for layer in captured.layers] == ["dense", "dense"]
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  jax.tree.map(relative, grads, jax.grad(loss)(params, x, y))

  def tapped(p, x, y, tap):
    q = jax.vmap(lambda x, y: changes(params, x, y))(x, y)
    apart = lambda name, x: tap(name, x, p[name]) + x @ (q[name] - params[name])
    h = jnp.tanh(apart("a", x[:, ::-1]))
    return jnp.mean((apart("b", h) - y) ** 2)

  matrices = explicit.evaluate(tapped, params, x, y, groups=1).matrices
  for (A, G), name in zip(stats.factors, "ab", strict=True):
    relative(A[0], matrices[name, 0].factors[0])
    relative(G[0], matrices[name, 0].factors[1])


def attention(q, k, v):
  return jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k)) @ v


def adapted_and_read(w, h):
  """A weight of each example that is also an activation of its own."""
  w = w + h[:, 0, :, None] * lax.stop_gradient(w[0, 0])
  return jnp.concatenate([h @ w, w], 1)


@pytest.mark.parametrize(
  "mix, shape, kind",
  [
    (lambda w, h: attention(h + w, h + w, h + w), (T, D), "table"),
    (lambda w, h: attention(h + w, h, h), (T, D), "table"),
    (lambda w, h: attention(attention(h + w, h, h) + w, h, h), (T, D), "table"),
    (lambda w, h: h @ (w + jnp.tanh(h[:, 0, :, None])), (D, 3), "dense"),
    (adapted_and_read, (D, 3), ""),
  ],
)
def test_a_sum_with_the_batch_is_a_table_if_it_is_an_activation(mix, shape, kind):
  w, h = jnp.asarray(draw(*shape)), jnp.asarray(draw(N, T, D))
  if not kind:
    with pytest.raises(ValueError, match="and then both a weight and something else"):
      fop_optax.capture(lambda w, h: head(mix(w, h)), w, h)
    return
  captured = fop_optax.capture(lambda w, h: head(mix(w, h)), w, h)
  assert [layer.kind for layer in captured.layers] == [kind]


def gathered(w, x, top):
  return jnp.einsum("nd,ndf->nf", x, w[top])


MATRICES_LOOKED_UP = {
  "gather": gathered,
  "take": lambda w, x, top: (x[:, None] @ jnp.take(w, top, axis=0))[:, 0],
  "top k": lambda w, x, top: jnp.einsum("nd,nkdf->nkf", x, w[jnp.stack([top] * 2, 1)])[:, 0],
  "vmap": lambda w, x, top: jax.vmap(lambda x, e: x @ w[e])(x, top),
  "map": lambda w, x, top: jax.lax.map(lambda each: each[0] @ w[each[1]], (x, top)),
  "cast, turned": lambda w, x, top: jnp.einsum("nd,nfd->nf", x, w.mT[top].astype("float32")),
}


def of_experts(experts):
  """A loss of experts of four inputs and three outputs, of which the second half of x chooses."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 3)), "float32")
  choose = lambda x: jnp.argmax(jax.lax.stop_gradient(x[:, 4:]), axis=1)
  loss = lambda p, x: jnp.mean(jnp.tanh(experts(p["w"], x[:, :4], choose(x))) @ p["head"])
  return loss, {"w": w, "head": jnp.ones(3)}, choose


@pytest.mark.parametrize("name", MATRICES_LOOKED_UP)
def test_matrices_that_are_looked_up_are_in_no_layer(name):
  loss, params, _ = of_experts(MATRICES_LOOKED_UP[name])
  with pytest.warns(UserWarning, match="in no layer"):
    captured = fop_optax.capture(loss, params, jax.ShapeDtypeStruct((8, 7), "float32"))
  ((path, why),) = captured.fallbacks.items()
  assert path == "['w']"
  assert "matrices of it are looked up by index and multiplied with rows of the batch at " in why
  assert "Write, with `m = one_hot(index, len(w))`, `x = einsum('ne,nd->end', m, x)`" in why


def test_experts_that_rows_are_sent_to_are_layers():
  """As the reason for gathered ones says to write: of the same loss, a layer for each expert."""

  def sent(w, x, top):
    m = jax.nn.one_hot(top, len(w))
    x = jnp.einsum("ne,nd->end", m, x)
    return jnp.einsum("ne,enf->nf", m, jnp.einsum("end,edf->enf", x, w))

  loss, params, choose = of_experts(sent)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 7)), "float32")
  captured = fop_optax.capture(loss, params, x)
  value, _, stats = captured.value_and_grad(params, x)
  np.testing.assert_allclose(value, of_experts(gathered)[0](params, x), rtol=1e-6)
  (index,) = (i for i, layer in enumerate(captured.layers) if layer.path == "['w']")
  y = sent(params["w"], x[:, :4], choose(x))
  dy = (1 - jnp.tanh(y) ** 2) / 8
  assert len(set(choose(x).tolist())) > 1
  for e in range(3):
    own = choose(x) == e
    A, G = stats.factors[index].A[e], stats.factors[index].G[e]
    np.testing.assert_allclose(A, x[own, :4].T @ x[own, :4] / 8, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(G, 8 * dy[own].T @ dy[own], rtol=1e-5, atol=1e-7)


def test_rows_of_several_axes_are_looked_up():
  """Of embeddings with an axis of heads, which a weight then takes in."""
  params = {"table": jnp.ones((10, 2, 3)), "w": jnp.ones((3, 4))}
  loss = lambda p, i: jnp.mean(jnp.einsum("nhd,df->nhf", p["table"][i], p["w"]) ** 2)
  captured = fop_optax.capture(loss, params, jnp.arange(8), strict=True)
  assert [layer.kind for layer in captured.layers] == ["lookup", "dense"]

"""Whether a loss is a mean of a function of each example, where these lie, how many terms it has.

Almost all is read from a trace on shapes: no program is compiled.
"""

import math
import re
import warnings

import equinox as eqx
from flax import linen, nnx
import haiku as hk
import hypothesis
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax
from fop_optax.capture.examples import axes
from fop_optax.capture.examples.values import Constant

N, T, D, C = 8, 5, 3, 4
P = {
  name: jax.ShapeDtypeStruct(shape, "float32")
  for name, shape in {"w": (D, C), "b": (C,), "scale": (2,)}.items()
}
X, Y = jax.ShapeDtypeStruct((N, D), "float32"), jax.ShapeDtypeStruct((N,), "int32")
XT, YT = jax.ShapeDtypeStruct((N, T, D), "float32"), jax.ShapeDtypeStruct((N, T), "int32")
MASK = jax.ShapeDtypeStruct((N, T), "float32")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def f(p, x):
  return x @ p["w"] + p["b"]


def each(p, x, y):
  return cross_entropy(f(p, x), y)


def scanned(p, x, y):
  return lax.scan(lambda total, xy: (total + each(p, *xy), None), 0.0, (x, y))[0]


def checkpointed(p, x, y):
  step = jax.checkpoint(lambda total, xy: (total + each(p, *xy).mean(), None))
  return lax.scan(step, 0.0, (x.reshape(2, -1, D), y.reshape(2, -1)))[0] / 2


def own_rows(p, x, y):
  return -jax.nn.log_softmax(f(p, x))[jnp.arange(len(x)), y].mean()


def two_views(p, x, y):
  z = jnp.tanh(f(p, jnp.concatenate([x, 2 * x])))
  return jnp.mean(jnp.sum(z[: len(x)] * z[len(x) :], -1))


def after_norms(p, x, y):
  h = f(p, x)
  h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
  return cross_entropy(h / jnp.linalg.norm(h, axis=-1, keepdims=True), y).mean()


def attention(p, x, y):
  h = jnp.tanh(f(p, x))
  return each({"w": p["w"], "b": p["b"]}, (jax.nn.softmax(h @ h.swapaxes(1, 2)) @ x), y).mean()


def pooled_and_written(p, x, y):
  h = linen.max_pool(jnp.tanh(f(p, x)), (2,), (1,), "SAME")
  cache = lax.dynamic_update_slice(jnp.zeros(h.shape), h[:, :2], (0, 1, 0))
  return cross_entropy(h + cache.at[:, 0].add(h[:, 1]), y).mean()


def recurrent(p, x, y):
  h = f(p, x).swapaxes(0, 1)
  _, states = lax.scan(lambda s, h: (jnp.tanh(s + h),) * 2, jnp.zeros(h.shape[1:]), h)
  return cross_entropy(states.swapaxes(0, 1), y).mean()


def positions(p, x, y):
  return each(p, x + jnp.arange(T)[:, None] + jnp.zeros((len(x), T, 1)), y).mean()


def perturbed(p, x, y):
  return jnp.mean(jax.vmap(jax.grad(lambda x: jnp.sum(jnp.tanh(f(p, x)))))(x) ** 2)


def looked_up_in_a_map(p, x, y):
  rows = lax.map(lambda i: lax.dynamic_slice_in_dim(p["w"], i % D, 1)[0], y.reshape(-1))
  return cross_entropy(rows.reshape(*y.shape, C) + f(p, x), y).mean()


def along_a_constant(p, x, y):
  by_row = lambda x: f(p, x.reshape(-1, D)).reshape(*x.shape[:-1], C)
  z, tangent = jax.jvp(by_row, (x,), (jnp.broadcast_to(jnp.arange(1.0, D + 1), x.shape),))
  return cross_entropy(jnp.tanh(z + tangent), y).mean()


weighted = lambda v, w: jnp.sum(v * w) / jnp.sum(w)
batch = (X, Y)
tokens = (XT, YT)
MEANS = {
  "mean": (lambda p, x, y: each(p, x, y).mean(), batch),
  "sum over the size": (lambda p, x, y: each(p, x, y).sum() / len(x), batch),
  "sum times its inverse": (lambda p, x, y: each(p, x, y).sum() * (1 / x.shape[0]), batch),
  "terms over the size": (lambda p, x, y: jnp.sum(each(p, x, y) / jnp.float32(len(x))), batch),
  "counted": (lambda p, x, y: each(p, x, y).sum() / jnp.ones_like(y).sum(), batch),
  "average": (lambda p, x, y: jnp.average(each(p, x, y), weights=x[:, 0]), batch),
  "weights that sum to one": (
    lambda p, x, y: jnp.sum(each(p, x, y) * (x[:, 0] / x[:, 0].sum())), batch),
  "dot": (lambda p, x, y: each(p, x, y) @ x[:, 0] / x[:, 0].sum(), batch),
  "penalty": (lambda p, x, y: each(p, x, y).mean() + 0.1 * jnp.sum(p["scale"] ** 2), batch),
  "vmap": (lambda p, x, y: jnp.mean(jax.vmap(lambda x, y: each(p, x, y))(x, y)), batch),
  "map in chunks": (
    lambda p, x, y: lax.map(lambda xy: each(p, *xy), (x, y), batch_size=2).mean(), batch),
  "scan over examples": (lambda p, x, y: scanned(p, x, y) / len(x), batch),
  "scan over chunks": (checkpointed, batch),
  "own rows": (own_rows, batch),
  "two views": (two_views, batch),
  "norms of each": (after_norms, batch),
  "no gradient where not finite": (
    lambda p, x, y: (lambda v: jnp.where(jnp.isfinite(v), v, 0.0))(each(p, x, y).mean()), batch),
  "gradients of inputs": (perturbed, batch),
  "loop over examples": (
    lambda p, x, y: sum(cross_entropy(f(p, x)[i], y[i]) for i in range(len(x))) / len(x), batch),
  "mean of means": (lambda p, x, y: each(p, x, y).mean(1).mean(), tokens),
  "flat tokens": (lambda p, x, y: each(p, x.reshape(-1, D), y.reshape(-1)).mean(), tokens),
  "mask": (lambda p, x, y, m: weighted(each(p, x, y), m), (*tokens, MASK)),
  "mask, guarded": (
    lambda p, x, y, m: jnp.where(
      m.sum() > 0, (each(p, x, y) * m).sum() / jnp.maximum(m.sum(), 1.0), 0.0), (*tokens, MASK)),
  "mean where": (lambda p, x, y, m: jnp.mean(each(p, x, y), where=m > 0), (*tokens, MASK)),
  "attention": (attention, tokens),
  "pooled and written": (pooled_and_written, tokens),
  "recurrent": (recurrent, tokens),
  "positions": (positions, tokens),
}  # fmt: skip


def captured(loss, args, p=P, **options):
  """The captured loss, any warning an error."""
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", ".*of the parameters are in no layer")
    return fop_optax.capture(loss, p, *args, **options)


# Their rows are not told apart by example, of which EKFAC's line in the table speaks.
NOT_TOLD_APART = ("map in chunks", "scan over examples", "scan over chunks", "gradients of inputs")


@pytest.mark.parametrize("name", MEANS)
def test_means_are_silent(name):
  loss, args = MEANS[name]
  for options in ({"groups": 1}, {"groups": 2, "micro_batches": 2}, {"groups": 8}):
    if options != {"groups": 8} or (args is batch and "chunks" not in name):
      notes = captured(loss, args, **options).notes
      others = [note for note in notes if " an example" not in note]
      assert [note.split()[0] for note in others] == ["EKFAC"] * (name in NOT_TOLD_APART), notes


SUMS = {
  "sum": (lambda p, x, y: each(p, x, y).sum(), 1),
  "constant size": (lambda p, x, y: each(p, x, y).sum() / 8, 1),
  "sum beside a penalty": (lambda p, x, y: each(p, x, y).sum() + 0.1 * jnp.sum(p["scale"] ** 2), 1),
  "sum beside a mean": (lambda p, x, y: each(p, x, y).sum() + each(p, x, y).mean(), 1),
  "mean of a sum": (lambda p, x, y: jnp.mean(jnp.sum(f(p, x), 0)), 1),
  "scan": (scanned, 1),
  "divided twice": (lambda p, x, y: each(p, x, y).mean() / len(x), -1),
  "root of the size": (lambda p, x, y: each(p, x, y).sum() / np.sqrt(len(x)), 0.5),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_loss_that_is_no_mean_raises_with_chunks_and_warns_without(name):
  loss, degree = SUMS[name]
  said = rf"no mean over the batch: it goes with N\^{degree} for N examples, summed at .*\.py:\d+"
  for options in ({"groups": 2}, {"groups": 1, "micro_batches": 2}, {"groups": 8}):
    with pytest.raises(ValueError, match=rf"{said}.*mean over [28] chunks.*jnp\.mean.*len\(x\)"):
      fop_optax.capture(loss, P, X, Y, **options)
  with pytest.warns(UserWarning, match=rf"{said}.*G = N R .*goes with N\^{2 * degree:g}.*damping"):
    fop_optax.capture(loss, P, X, Y, groups=1)


def time_major(p, x, y):
  _, states = lax.scan(lambda s, h: (jnp.tanh(s + h),) * 2, jnp.zeros(C), f(p, x))
  return cross_entropy(states, y).mean()


def contrastive(p, x, y):
  z = jnp.tanh(f(p, x))
  return cross_entropy(z @ f(p, 2 * x).T, jnp.arange(len(x))).mean()


def inner_step(p, x, y):
  h, v = jnp.tanh(f(p, x)), jnp.eye(C)
  grad = jax.grad(lambda v: cross_entropy(h @ v, y).mean())(v)
  return cross_entropy(h @ (v - 0.1 * grad), y).mean()


INTERACTIONS = {
  "scores": (lambda p, x, y: jnp.mean(jnp.tanh(f(p, x) @ f(p, x).T)), "meet in pairs"),
  "scores by einsum": (
    lambda p, x, y: jnp.mean(jnp.einsum("ni,mi->nm", f(p, x), f(p, x)) ** 2), "meet in pairs"),
  "distances": (
    lambda p, x, y: jnp.mean((f(p, x)[:, None] - f(p, x)[None]) ** 2), "meet in pairs"),
  "contrastive": (contrastive, "meet in pairs"),
  "centred": (lambda p, x, y: jnp.mean((f(p, x) - f(p, x).mean(0)) ** 2), "a statistic"),
  "centred inputs": (lambda p, x, y: each(p, x - x.mean(0), y).mean(), "a statistic"),
  "scaled by the largest": (lambda p, x, y: each(p, x / jnp.max(x), y).mean(), "a statistic"),
  "root of the mean": (lambda p, x, y: jnp.sqrt(jnp.mean(f(p, x) ** 2)), "a statistic"),
  "cross-correlation": (
    lambda p, x, y: jnp.sum((f(p, x).T @ f(p, x) / len(x) - jnp.eye(C)) ** 2), "a statistic"),
  "balance": (
    lambda p, x, y: jax.nn.softmax(f(p, x)).mean(0) @ (f(p, x) > 0).mean(0), "a statistic"),
  "logsumexp": (lambda p, x, y: jax.nn.logsumexp(each(p, x, y)), "a statistic"),
  "inner step": (inner_step, "a statistic"),
  "time first": (time_major, "`scan` over examples carries"),
  "running sum": (lambda p, x, y: jnp.mean(jnp.tanh(jnp.cumsum(f(p, x), 0))), "their order"),
  "sorted": (lambda p, x, y: jnp.mean(jnp.sort(f(p, x), 0)), "their order"),
  "next": (lambda p, x, y: cross_entropy(f(p, x)[:-1], y[1:]).mean(), "their order"),
  "rolled": (lambda p, x, y: jnp.mean(f(p, x) * jnp.roll(f(p, x), 1, 0)), "their order"),
  "even and odd": (lambda p, x, y: jnp.mean((f(p, x)[::2] - f(p, x)[1::2]) ** 2), "their order"),
  "positions": (
    lambda p, x, y: jnp.mean(jnp.tanh(f(p, x) + jnp.arange(len(x))[:, None])), "constant differs"),
  "weights by place": (
    lambda p, x, y: jnp.mean(each(p, x, y) * jnp.linspace(0, 1, 99)[: len(x)]), "constant differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERACTIONS)
def test_examples_that_interact_are_said_with_chunks(name):
  loss, words = INTERACTIONS[name]
  here = rf"{words}.* at \S*test_capture_examples\.py:\d+"
  for options in ({"groups": 2}, {"groups": 1, "micro_batches": 2}, {"groups": 8}):
    with pytest.warns(UserWarning, match=rf"(?s)not the mean of the losses of its chunks.*{here}"):
      fop_optax.capture(loss, P, X, Y, **options)
  whole = captured(loss, (X, Y), groups=1)
  assert re.search(f"(?i){here}", str(whole))


def test_metrics_may_mix_examples():
  loss = lambda p, x, y: (each(p, x, y).mean(), jnp.std(f(p, x) @ f(p, x).T))
  assert not captured(loss, (X, Y), has_aux=True, groups=2).notes


def shift_and_scale(p, h):
  mean, var = h.mean(0), (h * h).mean(0) - h.mean(0) ** 2
  scale = lax.rsqrt(jnp.maximum(var, 0) + 1e-5) * p["b"]
  return h * scale + (p["b"] - mean * scale)


NORMALISATIONS = {
  "variance": lambda p, h: (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5),
  "squares": shift_and_scale,
  "standard": lambda p, h: jax.nn.standardize(h, axis=0) * p["b"],
  "in bfloat16": lambda p, h: (h - h.mean(0)) * lax.rsqrt(h.astype("bfloat16").var(0) + 1e-5),
  "of a scan": lambda p, h: lax.scan(
    lambda h, _: ((h - h.mean(0)) / (h.std(0) + 1.0), None), h, None, 2)[0],
  "ghost": lambda p, h: jax.vmap(lambda h: (h - h.mean(0)) / (h.std(0) + 1))(
    h.reshape(-1, 2, C)).reshape(-1, C),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_is_a_line_of_the_table(name):
  normalise = NORMALISATIONS[name]
  loss = lambda p, x, y: cross_entropy(normalise(p, f(p, x)), y).mean()
  for options, what in (({"groups": 2}, "group"), ({"groups": 1}, "batch")):
    (note,) = captured(loss, (X, Y), **options).notes
    assert re.match(rf"Normalised over the examples of a {what} at \S+\.py:\d+", note)
  with pytest.warns(UserWarning, match="a statistic of all examples"):  # its mean again
    fop_optax.capture(
      lambda p, x, y: cross_entropy(normalise(p, f(p, x)) + f(p, x).mean(0) ** 2, y).mean(),
      P, X, Y, groups=2,
    )  # fmt: skip


def zeros(shapes):
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def of_nnx(x):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv, self.norm = nnx.Conv(D, C, (3,), rngs=rngs), nnx.BatchNorm(C, rngs=rngs)

  net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  graph, params, rest = nnx.split(net, nnx.Param, ...)
  rest = zeros(rest)

  def apply(p, x):
    net = nnx.merge(graph, p, rest, copy=True)
    return net.norm(net.conv(x)), nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

  return params, apply


def of_linen(x):
  norm = linen.BatchNorm(use_running_average=False, use_fast_variance=False)
  net = linen.Sequential([linen.Conv(C, (3,)), norm])
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  stats = {"batch_stats": zeros(variables["batch_stats"])}
  return variables["params"], lambda p, x: net.apply({"params": p} | stats, x, mutable=list(stats))


def of_haiku(x):
  net = lambda x: hk.BatchNorm(True, True, 0.9)(hk.Conv1D(C, 3)(x), True)
  net = hk.transform_with_state(net)
  params, state = jax.eval_shape(net.init, jax.random.key(0), x)
  return params, lambda p, x: net.apply(p, zeros(state), None, x)


def of_equinox(x):
  norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, "batch", mode="batch")
  params, static = eqx.partition(
    (eqx.nn.Conv1d(D, C, 3, padding=1, key=jax.random.key(0)), norm), eqx.is_inexact_array
  )

  def apply(p, x):
    conv, norm = eqx.combine(p, static)
    one = lambda x, state: norm(conv(x.T), state)
    h, state_ = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return h.swapaxes(1, 2), eqx.filter(state_, eqx.is_array)

  return params, apply


@pytest.mark.parametrize("build", [of_nnx, of_linen, of_haiku, of_equinox])
def test_batch_norm_of_each_framework(build):
  params, apply = build(jnp.ones((2, T, D)))

  def loss(p, x, y):
    h, state = apply(p, x)
    return cross_entropy(jnp.tanh(h), y).mean(), state

  capture = captured(loss, tokens, params, has_aux=True, groups=2)
  normalised, terms = capture.notes
  assert re.match(r"Normalised over the examples of a group at \S+\.py:\d+", normalised)
  assert terms.startswith(f"{T} terms an example")


TERMS = {
  "mean": (lambda v, m: v.mean(), T),
  "means": (lambda v, m: v.mean(1).mean(), T),
  "sum over tokens": (lambda v, m: v.sum(1).mean(), 1),
  "sum over both": (lambda v, m: v.sum() / v.size, T),
  "one after the other": (lambda v, m: v.sum() / len(v) / v.shape[1], T),
  "sum over the examples": (lambda v, m: v.sum() / len(v), 1),
  "half": (lambda v, m: 0.5 * v.mean(), T),
  "penalty": (lambda v, m: v.mean() + 1.0, T),
  "mask": (lambda v, m: weighted(v, m), T),
  "mask of each": (lambda v, m: jnp.mean((v * m).sum(1) / jnp.maximum(m.sum(1), 1.0)), T),
  "where": (lambda v, m: jnp.mean(v, where=m > 0), T),
  "weight an example": (lambda v, m: weighted(v.sum(1), m[:, 0]), 1),
  "scan over tokens": (
    lambda v, m: lax.scan(lambda s, v: (s + v.mean(), None), 0.0, v.T)[0] / v.shape[1], T),
  "first token": (lambda v, m: v[:, 0].mean(), 1),
  "pooled": (lambda v, m: jnp.tanh(v.mean(1)).mean(), 1),
  "pooled, less a bound": (lambda v, m: jnp.mean(jnp.tanh(v[:, 0]) - v.mean(1)), 1),
  "of squares": (lambda v, m: jnp.mean((v[..., None] * jnp.ones(3)) ** 2), 3 * T),
  "two of a kind": (lambda v, m: v.mean() + 0.3 * (v**2).mean(), T),
  "different ones": (lambda v, m: v.mean() + v[:, 0].mean(), None),
}  # fmt: skip


WEIGHTED = ("mask", "mask of each", "where")


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_read_off_the_mean(name):
  reduce, terms = TERMS[name]
  loss = lambda p, x, y, m: reduce(each(p, x, y), m)
  for options in ({"groups": 1}, {"groups": 2}, {"groups": 8}):
    table = str(captured(loss, (XT, YT, MASK), **options))
    table = table.rpartition("are in layers.")[2].splitlines()[1:]
    if terms == 1 and name not in WEIGHTED:
      assert not table
    elif terms:
      (line,) = table
      weights = ", less what its weights leave out" if name in WEIGHTED else ""
      start = rf"{terms} terms? an example{weights}, from the mean at \S+_examples.py:\d+"
      assert re.match(start, line)
    else:
      assert re.match(r"1 term an example: .*\(1 at \S+.*, 5 at .*`terms_per_example`", table[0])
  assert not captured(loss, (XT, YT, MASK), terms_per_example=2).notes


@pytest.mark.parametrize("shape", [(), (T,)])
def test_factors_of_a_mean_square_are_its_hessian(shape):
  """Residuals of second moment 1/2, those of the normal distribution the loss stands for, at
  every input: `A (x) G` is the Hessian if R counts every output of the mean."""
  rng = np.random.default_rng(0)
  x = np.repeat(rng.normal(size=(4, *shape, D)), C, axis=0)
  residuals = np.tile(np.sqrt(C / 2) * np.eye(C), (4, 1)).reshape(-1, *[1] * len(shape), C)
  residuals = np.broadcast_to(residuals, (*x.shape[:-1], C))
  params = {"w": jnp.asarray(rng.normal(size=(D, C)))}
  loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)
  args = jnp.asarray(x), jnp.asarray(x) @ params["w"] + residuals
  _, _, stats = jax.jit(captured(loss, args, params, groups=1).value_and_grad)(params, *args)
  ((A, G),) = [(f.A[0], f.G[0]) for f in stats.factors]
  hessian = jax.jit(jax.hessian(lambda w: loss({"w": w}, *args)))(params["w"])
  hessian = hessian.reshape(D * C, D * C)
  np.testing.assert_allclose(np.kron(A, G), hessian, rtol=1e-4, atol=1e-5)


def flattened(p, x):  # as many heads as examples
  h = x.reshape(-1, N, D)
  return jnp.mean(jnp.tanh(h @ p["w"]).reshape(len(x), -1).sum(1) ** 2)


def transposed(p, x):
  return jnp.mean(jnp.tanh(x.swapaxes(0, 2) @ p["w"]))


def mapped_last(p, x):
  return jnp.mean(jax.vmap(lambda x: jnp.tanh(x @ p["w"]), out_axes=-1)(x))


@pytest.mark.parametrize("loss", [flattened, transposed, mapped_last])
def test_a_fraction_is_taken_along_the_axis_of_examples(loss):
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(D, C)), "float32")}
  x = jnp.asarray(rng.normal(size=(N, N, N, D)), "float32")  # every axis has the size of the batch
  capture = captured(loss, (x,), params, groups=1, curvature_fraction=0.5)
  _, _, stats = jax.jit(capture.value_and_grad)(params, x)
  rows = np.asarray(x[::2]).reshape(-1, D)
  np.testing.assert_allclose(stats.factors[0].A[0], rows.T @ rows / len(rows), rtol=1e-5)


@pytest.mark.parametrize("loss", [looked_up_in_a_map, along_a_constant])
def test_terms_are_read_whatever_comes_before(loss):
  note, *others = captured(loss, tokens, groups=2).notes
  assert note.startswith(f"{T} terms an example")
  hidden = loss.__name__ in ("looked_up_in_a_map", "along_a_constant")
  assert [other.split()[0] for other in others] == ["EKFAC"] * hidden


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4).map(tuple)


@hypothesis.settings(max_examples=200)
@hypothesis.given(shape=SHAPES, data=st.data())
def test_uniform_axes_after_a_reshape(shape, data):
  """Exactly those that are, for any array that is repeated along some axes."""
  uniform = data.draw(st.sets(st.sampled_from(range(len(shape)))))
  new = [math.prod(shape)]
  for _ in range(data.draw(st.integers(0, 3))):  # cut in two where it can be
    size = data.draw(st.sampled_from([n for n in range(1, new[-1] + 1) if new[-1] % n == 0]))
    new[-1:] = [size, new[-1] // size]
  once = np.random.default_rng(0).normal(
    size=[1 if axis in uniform else size for axis, size in enumerate(shape)]
  )
  array = np.broadcast_to(once, shape).reshape(new)
  found = axes.reshape(Constant(frozenset(uniform)), shape, tuple(new)).uniform
  assert found == {a for a in range(len(new)) if np.all(array == np.take(array, [0], a))}

"""The same network in Flax NNX, Linen, Equinox and plain pytrees, with state, keys and loops."""

import functools

import equinox as eqx
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax

N, D, H, C = 8, 5, 6, 3


def batch():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(N, D)), "float32"), jnp.arange(N) % C


class NnxMlp(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(D, H, rngs=rngs), nnx.Linear(H, C, rngs=rngs)

  def __call__(self, x):
    return self.last(jnp.tanh(self.first(x)))


class LinenMlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(C, name="last")(jnp.tanh(nn.Dense(H, name="first")(x)))


def as_nnx(weights):
  model = NnxMlp(nnx.Rngs(0))
  model.first.kernel.value, model.first.bias.value = weights[:2]
  model.last.kernel.value, model.last.bias.value = weights[2:]
  graph, params = nnx.split(model)
  back = lambda p: (
    p["first"]["kernel"],
    p["first"]["bias"],
    p["last"]["kernel"],
    p["last"]["bias"],
  )
  return params, lambda p, x: nnx.merge(graph, p)(x), back


def as_nnx_module(weights):  # an nnx.Module is a pytree itself
  params, apply, back = as_nnx(weights)
  model = NnxMlp(nnx.Rngs(0))
  nnx.update(model, params)
  return model, lambda model, x: model(x), lambda model: back(nnx.state(model))


def as_linen(weights):
  first, last = ({"kernel": w, "bias": b} for w, b in (weights[:2], weights[2:]))
  back = lambda p: tuple(p[name][part] for name in ("first", "last") for part in ("kernel", "bias"))
  return {"first": first, "last": last}, lambda p, x: LinenMlp().apply({"params": p}, x), back


def as_equinox(weights):
  model = eqx.nn.MLP(D, C, H, 1, jnp.tanh, key=jax.random.key(0))
  where = lambda m: [getattr(layer, part) for layer in m.layers for part in ("weight", "bias")]
  model = eqx.tree_at(where, model, [w.T for w in weights])
  params, static = eqx.partition(model, eqx.is_inexact_array)
  apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
  return params, apply, lambda p: tuple(leaf.T for leaf in where(p))


def as_pytree(weights):
  return list(weights), lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3], tuple


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
FRAMEWORKS = [as_pytree, as_nnx, as_nnx_module, as_linen, as_equinox]


@pytest.mark.parametrize(
  ("framework", "optimizer"),
  [(framework, fop_optax.kfac) for framework in FRAMEWORKS] + [slow(as_nnx_module, fop_optax.fop)],
)
def test_the_same_network_gets_the_same_update(framework, optimizer):
  rng = np.random.default_rng(1)
  shapes = ((D, H), (H,), (H, C), (C,))
  weights = [jnp.asarray(0.5 * rng.normal(size=s), "float32") for s in shapes]

  def update(framework):
    params, apply, back = framework(weights)
    loss = lambda p, x, y: fop_optax.softmax_cross_entropy(apply(p, x), y)
    captured = fop_optax.capture(loss, params, *batch(), strict=True, groups=2)
    tx = optimizer(0.1, captured.layers)

    @jax.jit
    def step(params, opt_state):
      refresh = fop_optax.refresh_due(opt_state)
      _, grads, stats = captured.value_and_grad(params, *batch(), refresh=refresh)
      updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
      return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(2):
      params, opt_state = step(params, opt_state)
    return [jnp.asarray(leaf[...] if hasattr(leaf, "value") else leaf) for leaf in back(params)]

  for ours, plain in zip(update(framework), update(as_pytree), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


class WithState(nnx.Module):
  """A network with BatchNorm and Dropout."""

  def __init__(self, rngs):
    self.first, self.norm = nnx.Linear(D, H, rngs=rngs), nnx.BatchNorm(H, rngs=rngs)
    self.dropout, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(H, C, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("optimizer", [fop_optax.kfac, slow(fop_optax.fop)])
def test_nnx_optimizer_with_batch_norm_and_dropout(optimizer):
  model = WithState(nnx.Rngs(0))
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params, rest, x, y):
    model = nnx.merge(graph, params, rest, copy=True)
    value = fop_optax.softmax_cross_entropy(model(x), y)
    return value, nnx.state(model, nnx.Not(nnx.Param))

  captured = fop_optax.capture(
    loss, params, rest, *batch(), has_aux=True, batch_argnums=(1, 2), groups=2
  )
  assert set(captured.fallbacks) == {"['norm']['bias']", "['norm']['scale']"}
  trainer = nnx.Optimizer(model, optimizer(0.05, captured.layers, damping=0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, trainer, x, y):
    params, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    refresh = fop_optax.refresh_due(trainer.opt_state)
    (value, rest), grads, stats = captured.value_and_grad(params, rest, x, y, refresh=refresh)
    trainer.update(model, grads, stats=stats)
    nnx.update(model, rest)
    return value

  before = jax.tree.map(jnp.copy, nnx.state(model))
  losses = [float(step(model, trainer, *batch())) for _ in range(12)]
  assert losses[-1] < losses[0]
  assert int(model.dropout.rngs.count[...]) == int(before["dropout"]["rngs"]["count"][...]) + 12
  assert not np.allclose(model.norm.mean[...], before["norm"]["mean"][...])


def test_linen_loop_and_the_error_of_train_state():
  model, (x, y) = LinenMlp(), batch()
  params = model.init(jax.random.key(0), x)["params"]
  loss = lambda p, x, y: fop_optax.softmax_cross_entropy(model.apply({"params": p}, x), y)
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  tx = fop_optax.fop(0.1, captured.layers, damping=0.1)
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state, x, y):
    refresh = fop_optax.refresh_due(state.opt_state)
    value, grads, stats = captured.value_and_grad(state.params, x, y, refresh=refresh)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, stats=stats)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

  losses = []
  for _ in range(8):
    state, value = step(state, x, y)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  with pytest.raises(ValueError, match=r"TrainState.apply_gradients"):
    state.apply_gradients(grads=params)


@pytest.mark.slow
def test_linen_batch_norm_dropout_scan_and_attention():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
      return h + nn.MultiHeadDotProductAttention(num_heads=2)(h, h) + nn.Dense(H)(nn.relu(h)), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(H)(x)))
      h = nn.Dropout(0.2, deterministic=False)(h)
      stack = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
      )
      h, _ = stack()(jnp.stack([h, 2 * h], 1), None)
      return nn.Dense(C)(nn.DenseGeneral(H, axis=(-2, -1))(h))

  x, y = batch()
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  variables = Model().init(keys, x)

  def loss(p, stats, key, x, y):
    variables = {"params": p, "batch_stats": stats}
    logits, new = Model().apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
    return fop_optax.softmax_cross_entropy(logits, y), (new["batch_stats"], logits)

  args = (variables["batch_stats"], jax.random.key(2), x, y)
  params = variables["params"]
  captured = fop_optax.capture(loss, params, *args, has_aux=True, batch_argnums=(2, 3), groups=2)
  assert set(captured.fallbacks) == {"['BatchNorm_0']['bias']", "['BatchNorm_0']['scale']"}
  assert {layer.stack for layer in captured.layers} == {1, 3}
  (_, (stats, logits)), grads, _ = jax.jit(captured.value_and_grad)(params, *args)
  assert logits.shape == (N, C)
  assert jax.tree.structure(stats) == jax.tree.structure(args[0])

  key = args[1]
  halves = [
    jax.grad(lambda p, i=i: loss(p, args[0], jax.random.fold_in(key, i), x[i::2], y[i::2])[0])(
      params
    )
    for i in range(2)
  ]
  expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)


def test_equinox_attention_and_recurrent_cell():
  attention = eqx.nn.MultiheadAttention(2, H, key=jax.random.key(0))
  cell = eqx.nn.GRUCell(D, H, key=jax.random.key(1))
  params, static = eqx.partition((attention, cell), eqx.is_inexact_array)

  def one(params, x):
    attention, cell = eqx.combine(params, static)
    step = lambda h, x: (cell(x, h),) * 2
    _, h = jax.lax.scan(step, jnp.zeros(H), jnp.stack([x, -x, 2 * x]))
    return attention(h, h, h).mean(0)

  def loss(params, x, y):
    return fop_optax.softmax_cross_entropy(jax.vmap(one, (None, 0))(params, x)[:, :C], y)

  x, y = batch()
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  assert list(captured.fallbacks) == ["[1].bias_n"]  # it is multiplied by a gate
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  expected = jax.grad(lambda p: sum(loss(p, x[i::2], y[i::2]) for i in range(2)) / 2)(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))

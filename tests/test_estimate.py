"""`fop_optax.estimate` against states that are made, and programs that XLA compiles."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from selection import slow_but

from experiments.benchmarks import cases, hlo
import fop_optax
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.stacks import plan_stacks
from fop_optax.curvature.state import StackState
from fop_optax.optimizers.shampoo_step import ShampooStack
from fop_optax.optimizers.soap_step import SoapStack

MAKERS = {
  "kfac": lambda layers, **own: fop_optax.kfac(0.1, layers, **own),
  "fop": lambda layers, **own: fop_optax.fop(0.1, layers, **own),
  "ekfac": lambda layers, **own: fop_optax.kfac(0.1, layers, scaling="eigenvalue", **own),
  "soap": lambda layers, **own: fop_optax.soap(layers=layers, **own),
  "shampoo": lambda layers, **own: fop_optax.shampoo(0.1, layers=layers, **own),
}
float32, int32 = (lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)), jnp.int32


def mlp():
  """Weights with biases, and a gain in no layer."""
  widths = (300, 400, 400, 10)

  def loss(params, x, y):
    x = params["gain"] * x
    for w, b in params["layers"]:
      x = jnp.tanh(x @ w + b)
    return fop_optax.softmax_cross_entropy(x, y)

  sizes = zip(widths[:-1], widths[1:], strict=True)
  params = {"gain": float32(300), "layers": [(float32(n, m), float32(m)) for n, m in sizes]}
  return loss, params, float32(64, 300), jax.ShapeDtypeStruct((64,), int32)


def cnn():
  """Two convolutions, the second strided, and a head."""

  def loss(params, x, y):
    for w, stride in ((params["first"], 1), (params["second"], 2)):
      numbers = ("NHWC", "HWIO", "NHWC")
      x = jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)
      x = jax.nn.relu(x)
    return fop_optax.softmax_cross_entropy(x.mean((1, 2)) @ params["head"] + params["bias"], y)

  params = {"first": float32(3, 3, 8, 32), "second": float32(3, 3, 32, 48)}
  params |= {"head": float32(48, 10), "bias": float32(10)}
  return loss, params, float32(16, 12, 12, 8), jax.ShapeDtypeStruct((16,), int32)


def transformer():
  """A scan over blocks between an embedding and the head that is tied to it."""
  d, depth, tokens = 64, 3, 16

  def block(x, p):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    x = x + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ p["out"]
    return x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"], None

  def loss(params, x, y):
    x, _ = jax.lax.scan(block, params["tokens"][x] + params["positions"], params["blocks"])
    return fop_optax.softmax_cross_entropy(x @ params["tokens"].T, y)

  blocks = {"qkv": float32(depth, d, 3 * d), "out": float32(depth, d, d)}
  blocks |= {"up": float32(depth, d, 4 * d), "bias": float32(depth, 4 * d)}
  params = {"blocks": blocks | {"down": float32(depth, 4 * d, d)}}
  params |= {"tokens": float32(100, d), "positions": float32(tokens, d)}
  batch = jax.ShapeDtypeStruct((8, tokens), int32)
  return loss, params, batch, batch


NETWORKS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


def captured_of(network, optimizer="kfac", max_dim=300):
  loss, params, *batch = NETWORKS[network]()
  groups = 2 if optimizer == "fop" else 1
  return fop_optax.capture(loss, params, *batch, groups=groups, max_dim=max_dim), params, batch


def nbytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def curvature(state):
  """Factors, and inverses or bases, of a state."""
  is_stack = lambda x: isinstance(x, (StackState, SoapStack, ShampooStack))
  for stack in filter(is_stack, jax.tree.leaves(state, is_leaf=is_stack)):
    if isinstance(stack, StackState):
      yield stack.factors, stack.inverse
    elif isinstance(stack, SoapStack):
      yield stack.bases.statistics, stack.bases.bases
    else:
      yield stack.factors, stack.roots


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", MAKERS)
def test_bytes_are_those_of_the_state(optimizer, network, dtype):
  captured, params, _ = captured_of(network, optimizer)
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
  state = jax.eval_shape(MAKERS[optimizer](captured.layers).init, params)
  own = fop_optax.estimate(captured, optimizer, params=params)
  assert own.state_bytes == nbytes(state)
  factors, inverses = zip(*curvature(state), strict=True)
  assert (own.factor_bytes, own.inverse_bytes) == (nbytes(factors), nbytes(inverses))
  assert own.parameter_bytes == nbytes(params)


def compiled(captured, optimizer, params, batch, refresh):
  tx = MAKERS[optimizer](captured.layers)

  def step(carry, *batch):
    params, state = carry
    basis = fop_optax.bases(state) if optimizer == "ekfac" and refresh else None
    _, grads, stats = captured.value_and_grad(params, *batch, refresh=refresh, basis=basis)
    if optimizer == "ekfac" and not refresh:  # what would be zeros
      stats = stats._replace(
        second_moments=[jnp.zeros((x.stack, *x.dims)) for x in captured.layers]
      )
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  carry = params, jax.eval_shape(tx.init, params)
  return jax.jit(step, donate_argnums=0).lower(carry, *batch).compile()


def plain(loss, params, batch):
  descend = lambda params, *batch: jax.tree.map(
    jnp.subtract, params, jax.grad(loss)(params, *batch)
  )
  return jax.jit(descend, donate_argnums=0).lower(params, *batch).compile()


CASES = [(network, optimizer) for network in NETWORKS for optimizer in ("kfac", "fop", "ekfac")]


@pytest.mark.parametrize("case", slow_but(CASES, "mlp-kfac", name="-".join))
def test_flops_are_those_of_the_compiled_step(case):
  network, optimizer = case
  captured, params, batch = captured_of(network, optimizer)
  own = fop_optax.estimate(captured, optimizer)
  without = hlo.flops(plain(NETWORKS[network]()[0], params, batch))
  ordinary, refresh = (
    hlo.flops(compiled(captured, optimizer, params, batch, refresh)) - without
    for refresh in (False, True)
  )
  assert own.ordinary_flops == pytest.approx(ordinary, rel=1e-6)
  bound = 0.15 if optimizer == "ekfac" else 1e-6  # S of layers that are not measured is estimated
  assert own.refresh_flops == pytest.approx(refresh - ordinary, rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "transformer"])
@pytest.mark.parametrize("optimizer", ["soap", "shampoo"])
def test_flops_of_a_step_that_may_refresh(optimizer, network):
  """The branches with most: SOAP's has its first bases, too."""
  captured, params, batch = captured_of(network, optimizer, 8192)
  own = fop_optax.estimate(captured, optimizer)
  first = sum(
    layer.blocks * (9 * d**3 + 2 * d * math.prod(layer.dims))
    for layer in own.layers
    for d, diagonal in zip(layer.dims, layer.diagonal, strict=True)
    if optimizer == "soap" and not diagonal
  )
  without = hlo.flops(plain(NETWORKS[network]()[0], params, batch))
  found = hlo.flops(compiled(captured, optimizer, params, batch, False)) - without
  assert own.ordinary_flops + own.refresh_flops + first == pytest.approx(found, rel=1e-3)


LIMITS = [(optimizer, limit) for optimizer in MAKERS for limit in ("300", "8192")]


@pytest.mark.parametrize("case", slow_but(LIMITS, "kfac-8192", name="-".join))
def test_bytes_are_those_of_the_compiled_step(case):
  optimizer, limit = case
  captured, params, batch = captured_of("mlp", optimizer, int(limit))
  own = fop_optax.estimate(captured, optimizer)
  for refresh, expected in ((False, own.ordinary_bytes), (True, own.refresh_bytes)):
    memory = compiled(captured, optimizer, params, batch, refresh).memory_analysis()
    arguments = own.state_bytes + own.parameter_bytes + nbytes(batch)
    assert memory.argument_size_in_bytes == pytest.approx(arguments, abs=64)  # a mere alignment
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert expected == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("optimizer", MAKERS)
def test_owners_share_the_curvature(optimizer):
  """Against the state that the optimizer makes with a sharding: what is on one device."""
  captured, params, _ = captured_of("transformer", optimizer)
  one, eight = (fop_optax.estimate(captured, optimizer, devices=n) for n in (1, 8))
  sharding = fop_optax.Sharding(jax.make_mesh((8,), ("data",)))
  tx = MAKERS[optimizer](captured.layers, sharding=sharding)
  shapes, places = jax.eval_shape(tx.init, params), fop_optax.state_shardings(tx, params)
  held = sum(
    math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
    for x, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
  )
  blocks = sum(own.blocks for own in one.layers)
  assert held == eight.state_bytes + 4 * blocks  # where each block is
  statistics = sum(own.statistics_flops for own in one.layers)
  inverses = eight.refresh_flops - statistics / 8
  whole = sum(own.inverse_flops for own in one.layers)
  assert whole / 8 <= inverses < whole / 2
  if optimizer in ("kfac", "fop"):
    # the loads by which blocks are dealt, which is d^3; sides are short: so goes an inverse
    plan = plan_owners(plan_stacks(captured.layers), 8)
    assert inverses == pytest.approx(whole * max(plan.loads) / sum(plan.loads), rel=0.05)
  moments = optimizer in ("soap", "shampoo")  # which owners keep
  assert eight.other_bytes < one.other_bytes if moments else eight.other_bytes == one.other_bytes
  assert one.ordinary_flops / 8 <= eight.ordinary_flops < one.ordinary_flops


def test_what_would_save_memory_does():
  loss, params, *batch = mlp()
  whole, less = (
    fop_optax.capture(loss, params, *batch, max_dim=limit).layers for limit in (8192, 256)
  )
  own = fop_optax.estimate(whole)
  saved = {saving.how: saving.bytes for saving in own.savings}
  assert saved["capture(max_dim=256)"] == own.state_bytes - fop_optax.estimate(less).state_bytes
  half = fop_optax.estimate(whole, factor_dtype=jnp.bfloat16)
  assert saved["factor_dtype=jnp.bfloat16"] == own.state_bytes - half.state_bytes
  kfac = lambda **options: nbytes(
    jax.eval_shape(fop_optax.kfac(0.1, whole, **options).init, params)
  )
  assert saved["factor_dtype=jnp.bfloat16"] == kfac() - kfac(factor_dtype=jnp.bfloat16)
  assert 2 * half.factor_bytes == own.factor_bytes
  assert half.inverse_bytes == own.inverse_bytes
  soap = lambda **options: nbytes(
    jax.eval_shape(fop_optax.soap(layers=whole, **options).init, params)
  )
  saved = {saving.how: saving.bytes for saving in fop_optax.estimate(whole, "soap").savings}
  assert saved == {
    "soap(max_precond_dim=256)": soap() - soap(max_precond_dim=256),
    "soap(statistics_dtype=jnp.bfloat16)": soap() - soap(statistics_dtype=jnp.bfloat16),
    "soap(one_sided=True)": soap() - soap(one_sided=True),
  }


def test_rows_are_those_of_the_batch_or_given():
  loss, params, *batch = transformer()
  captured = fop_optax.capture(loss, params, *batch)
  own = fop_optax.estimate(captured)
  assert captured.rows == (8 * 16,) * 5 + (2 * 8 * 16,)  # the tied weight: looked up, multiplied
  assert fop_optax.estimate(captured.layers, rows=captured.rows) == own
  unknown = fop_optax.estimate(captured.layers)
  assert not unknown.counted
  assert "without second moments" in str(unknown)
  assert unknown.refresh_flops == sum(layer.inverse_flops for layer in own.layers)


@pytest.mark.parametrize(
  ("options", "rows"),
  [
    ({"groups": 2, "micro_batches": 2}, (128,) * 5 + (256,)),
    ({"curvature_fraction": 0.5}, (64,) * 5 + (128,)),
    # tables and tied weights keep their rows
    ({"sharing": "reduce"}, (8,) * 4 + (128, 256)),
  ],
)
def test_rows_are_those_of_the_statistics(options, rows):
  loss, params, *batch = transformer()
  assert fop_optax.capture(loss, params, *batch, **options).rows == rows


def test_a_large_model():
  """GPT-2 of 124 M parameters: 1.3 GB of factors, and as much of inverses."""
  loss = None

  def shapes():
    nonlocal loss
    case = cases.gpt2(8)
    loss = case.loss
    return case.params, case.x, case.y

  arguments = jax.eval_shape(shapes)
  captured = fop_optax.capture(loss, *arguments)
  own = fop_optax.estimate(captured)
  assert own.factor_bytes == own.inverse_bytes == pytest.approx(1.31e9, rel=0.01)
  table = str(own).splitlines()
  assert table[2].startswith("['blocks'][0]['up']['w'] and 11 more     12 * 769 x 3072   481 MB")
  assert table[-2] == "smaller by 2.32 GB: capture(max_dim=2048)"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"optimizer": "adam"}, "`optimizer='adam'` should be one of 'kfac', 'fop', "),
    ({"optimizer": "fop"}, "FOP needs the gradients of at least two groups"),
    ({"devices": 0}, r"`estimate\(devices=0\)` takes a whole number of at least 1"),
    ({"devices": 1.5}, r"`estimate\(devices=1.5\)` takes"),
    ({"rows": 0}, r"`estimate\(rows=0\)` takes .* one for each of the 3 layers"),
    ({"rows": [1, 2]}, r"`estimate\(rows=\[1, 2\]\)` takes"),
    ({"factor_dtype": "int8"}, r"`estimate\(factor_dtype='int8'\)` takes a floating dtype"),
    ({"params": [float32(2)]}, "params has 1 leaves, but these layers were captured"),
  ],
)
def test_errors(arguments, message):
  captured, *_ = captured_of("mlp")
  with pytest.raises(ValueError, match=message):
    fop_optax.estimate(captured, **arguments)


@pytest.mark.parametrize("optimizer", MAKERS)
def test_an_optimizer_that_is_made_is_its_method(optimizer):
  captured, params, _ = captured_of("transformer", optimizer)
  make = lambda **own: MAKERS[optimizer](captured.layers, **own)
  assert fop_optax.estimate(captured, make()) == fop_optax.estimate(captured, optimizer)
  mask = jax.tree.map(lambda x: x.ndim > 1, params)
  masked = optax.chain(make(), optax.add_decayed_weights(0.1, mask))
  own = fop_optax.estimate(captured.layers, masked, params=params)
  assert own == fop_optax.estimate(captured.layers, optimizer)
  with pytest.raises(ValueError) as caught:
    fop_optax.estimate(captured, masked)
  notes = "".join(caught.value.__notes__)
  assert "needs `fop_optax.estimate(captured, tx, params=params)`" in notes


@pytest.mark.parametrize("optimizer", ["ekfac", "soap"])
def test_an_optimizer_that_is_made_has_its_owners(optimizer):
  captured, params, _ = captured_of("transformer", optimizer)
  sharding = fop_optax.Sharding(jax.make_mesh((8,), ("data",)))
  own = fop_optax.estimate(captured, MAKERS[optimizer](captured.layers, sharding=sharding))
  named = fop_optax.estimate(captured, optimizer, devices=8)
  places = 4 * sum(layer.blocks for layer in own.layers)  # where each block is
  assert own.state_bytes == named.state_bytes + places
  assert (own.devices, own.factor_bytes) == (8, named.factor_bytes)
  assert (own.refresh_flops, own.savings) == (named.refresh_flops, named.savings)


def test_an_optimizer_that_is_made_has_its_dtype_and_momentum():
  captured, params, _ = captured_of("mlp")
  tx = fop_optax.kfac(0.1, captured.layers, momentum=None, factor_dtype=jnp.bfloat16)
  own = fop_optax.estimate(captured, optax.inject_hyperparams(lambda: tx, static_args=())())
  named = fop_optax.estimate(captured, factor_dtype=jnp.bfloat16)
  assert (own.factor_bytes, own.savings) == (named.factor_bytes, named.savings)
  assert own.state_bytes < named.state_bytes


def test_what_is_no_capture_and_no_optimizer():
  captured, params, _ = captured_of("mlp")
  tx = fop_optax.soap(0.1, layers=captured.layers)
  state = jax.eval_shape(tx.init, params)
  takes = "for `captured`: pass what `captured = fop_optax.capture"
  for wrong, shown in (
    (params, "a dict with 7 arrays"),
    (state, "an optimizer's state"),
    (tx, "an optimizer"),
    (mlp, "the function `mlp`"),
    (None, "None"),
  ):
    with pytest.raises(TypeError, match=rf"took {shown} {takes}"):
      fop_optax.estimate(wrong, captured)
  for wrong, message in (
    (
      params,
      r"`optimizer` is a dict with 7 arrays: pass a name, one of 'kfac', .*, or an optimizer",
    ),
    (state, "`optimizer` is an optimizer's state: pass a name"),
    (captured, "`optimizer` is a Captured: pass a name"),
    (
      fop_optax.kfac,
      r"is the function `kfac`, which makes one: call it, as `fop_optax.kfac\(0.1, ",
    ),
  ):
    with pytest.raises(TypeError, match=message):
      fop_optax.estimate(captured, wrong)


OTHER = {
  "scaling": lambda layers: fop_optax.kfac(0.1, layers, scaling="exact"),
  "sides": lambda layers: fop_optax.soap(0.1, layers=layers, max_precond_dim=64),
  "no layers": lambda layers: fop_optax.soap(0.1),
  "other parts": lambda layers: fop_optax.shampoo(0.1, layers=layers, eigenvalue_correction=True),
}


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_optimizers_with_other_curvature(make):
  layers = captured_of("mlp")[0].layers
  with pytest.raises(ValueError, match="keeps other curvature than any of .* `sharding`, `factor_"):
    fop_optax.estimate(layers, make(layers))


@pytest.mark.parametrize(
  "make, options, message",
  [
    (lambda layers: optax.adam(0.1), {}, "keeps no curvature that .*`jax.eval_shape"),
    (lambda layers: fop_optax.neumann(0.1, steps_per_epoch=2), {}, "keeps no curvature"),
    (lambda layers: optax.chain(*[MAKERS["kfac"](layers)] * 2), {}, "keeps 2 curvatures: pass one"),
    (MAKERS["kfac"], {"devices": 2}, r"`estimate\(devices=2\)` goes with the name of an optimizer"),
    (
      MAKERS["kfac"],
      {"factor_dtype": "bfloat16"},
      r"factor_dtype='bfloat16'\)` goes with the name",
    ),
  ],
)
def test_optimizers_that_are_not_reckoned_with(make, options, message):
  layers = captured_of("mlp")[0].layers
  with pytest.raises(ValueError, match=message):
    fop_optax.estimate(layers, make(layers), **options)


def test_what_a_program_holds_is_counted():
  """Two equal kernels are one, library calls are none; a loop and a branch count as they are."""

  def program(x, y):
    loop = jax.lax.fori_loop(0, 3, lambda i, a: jnp.sin(a) * i, x)
    branch = jax.lax.cond(x[0] > 0, lambda a: a, lambda a: 2 * a, y)
    return loop, branch, jnp.tanh(x) + 1, jnp.tanh(y) + 1

  found = hlo.counts(jax.jit(program).lower(*[jnp.ones(100)] * 2).compile())
  assert (found.conditionals, found.loops) == (1, 1)
  assert found.different < found.fusions

"""The papers' networks: parameters as published, shapes, state and keys, layers that are found."""

from collections.abc import Callable
import functools
import math
import re
from typing import NamedTuple

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import (
  Model,
  from_module,
  inception,
  layers,
  mlp,
  parameter_count,
  resnet,
  speedrun,
  t2t_vit,
  transformer,
  vit,
)
import fop_optax


class Published(NamedTuple):
  model: Callable[[], Model]
  parameters: int
  input: tuple[int, ...]
  classes: int


def _resnet18():
  # torchvision's ResNet-18 (models/resnet.py, num_params) has a 7x7 stem and 1,000 classes.
  stem, classes = (7 * 7 - 3 * 3) * 3 * 64, 990 * (512 + 1)
  count = 11_689_512 - stem - classes
  assert count == 11_173_962  # as printed for kuangliu/pytorch-cifar's
  return Published(resnet.resnet18, count, (32, 32, 3), 10)


def _resnet32():
  # He et al., table 6: 0.46 M. Stem, 3 stages of 10 convolutions of which the first is half as
  # wide on one side, two numbers of BatchNorm a channel, head.
  convs = 9 * (3 * 16 + sum(10 * w * w - (w * w // 2 if w > 16 else 0) for w in (16, 32, 64)))
  count = convs + 2 * (16 + 10 * (16 + 32 + 64)) + 65 * 10
  assert round(count / 1e6, 2) == 0.46
  return Published(resnet.resnet32, count, (32, 32, 3), 10)


def _inception_v3():
  # torchvision (models/inception.py, num_params) minus its auxiliary head: a 1x1 and a 5x5
  # convolution with BatchNorm, and a dense layer.
  auxiliary = 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 769 * 1000
  return Published(inception.inception_v3, 27_161_264 - auxiliary, (299, 299, 3), 1000)


PUBLISHED = {
  # The K-FAC paper's autoencoder, by its sizes: (784 + 1) 1000 + (1000 + 1) 500 + ...
  "autoencoder": Published(mlp.autoencoder, 2_837_314, (28, 28, 1), 784),
  "resnet18": _resnet18(),
  "resnet32": _resnet32(),
  # torchvision, models/resnet.py, num_params.
  "resnet50": Published(resnet.resnet50, 25_557_032, (224, 224, 3), 1000),
  "resnet101": Published(resnet.resnet101, 44_549_160, (224, 224, 3), 1000),
  "inception_v3": _inception_v3(),
  # timm, inception_resnet_v2: 55.84 M; exactly by Keras's below.
  "inception_resnet_v2": Published(inception.inception_resnet_v2, 55_843_464, (299, 299, 3), 1000),
  # DeiT-S (timm's vit_small_patch16_224), and torchvision's vit_b_16, num_params.
  "vit_s16": Published(vit.vit_s16, 22_050_664, (224, 224, 3), 1000),
  "vit_b16": Published(vit.vit_b16, 86_567_656, (224, 224, 3), 1000),
}
SLOW = ("resnet101", "inception_v3", "inception_resnet_v2", "vit_b16")  # seconds to trace


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PUBLISHED]
)
def test_parameters_are_as_published(name):
  published = PUBLISHED[name]
  model = _full(published.model)
  assert parameter_count(model.shapes[0]) == published.parameters
  x = jax.ShapeDtypeStruct((2, *published.input), jnp.float32)
  logits, _ = _abstract(model, x)
  assert logits.shape == (2, published.classes)


@functools.cache
def _full(make) -> Model:
  return make()


def _abstract(model: Model, x, train: bool = False):
  return jax.eval_shape(functools.partial(model.apply, train=train), *model.shapes, x)


def _keras_count(model: Model) -> int:
  """Keras leaves out BatchNorm's scales, and counts running means and variances."""
  params, state = model.shapes
  statistics = parameter_count(state)  # a mean and a variance a channel
  return parameter_count(params) - statistics // 2 + statistics


def test_inception_v3_as_keras():
  assert _keras_count(_full(inception.inception_v3)) == 23_851_784  # keras.io/api/applications, 2.2


@pytest.mark.slow
def test_inception_resnet_v2_as_keras():
  assert _keras_count(_full(inception.inception_resnet_v2)) == 55_873_736  # likewise


@pytest.mark.slow
def test_t2t_vit_14_shapes():
  x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  assert _abstract(t2t_vit.t2t_vit_14(), x)[0].shape == (2, 1000)


@pytest.mark.parametrize("tokens", t2t_vit.TOKENS)
def test_t2t_vit_14(tokens):
  """The official README says 21.5 M of both; MMPretrain 21.47 M, of the transformer."""
  model = t2t_vit.t2t_vit_14(tokens=tokens)
  assert round(parameter_count(model.shapes[0]) / 1e6, 2) == 21.47


def test_speedrun():
  """By the layers of airbench94_muon, which prints no count."""
  model = speedrun.speedrun()
  groups = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 2 * (64 + 256 + 256)
  assert parameter_count(model.shapes[0]) == 24 + groups + 256 * 10 == 1_971_352
  logits, _ = _abstract(model, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
  assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", transformer.SIZES)
def test_language_models(name):
  tied = name == "30m"
  model = transformer.language_model(name, tied=tied)
  size, vocabulary = transformer.SIZES[name], transformer.T5_VOCABULARY
  width, depth = size.width, size.depth
  blocks = depth * (12 * width**2 + 4 * width) + width
  tables = (2 - tied) * vocabulary * width
  assert parameter_count(model.shapes[0]) == blocks + tables
  assert width % size.head == 0
  if tied:
    logits, _ = _abstract(model, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert logits.shape == (2, 16, vocabulary)


@pytest.mark.parametrize(("name", "millions"), [("210m", 216), ("360m", 367), ("660m", 661)])
def test_sizes_of_the_soap_paper(name, millions):
  """Their names are all parameters, rounded down; 360m trains on 33.5 G tokens, 100 a parameter."""
  params, _ = transformer.language_model(name).shapes
  assert parameter_count(params) // 10**6 == millions
  if name == "360m":
    assert round((parameter_count(params) - parameter_count(params["embed"])) / 1e7, 1) == 33.5


# Narrow ones, as wide as it takes for matrices to be most of a model.


class Narrow(NamedTuple):
  make: Callable[..., Model]  # options -> model
  x: np.ndarray


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 11, (4, 6)).astype(np.int32)


def _images(size):
  return RNG.standard_normal((4, size, size, 3), np.float32)


def _resnet(block, padded, **options):
  return from_module(
    lambda rngs: resnet.ResNet(
      block, (1, 1), 16, 10, rngs, padded=padded, imagenet_stem=not padded, **options
    )
  )


def _t2t(**options):
  sizes = {"width": 64, "depth": 1, "heads": 2, "token_width": 32}
  return t2t_vit.t2t_vit_14(10, image=32, dropout=0.1, drop_path=0.1, **sizes, **options)


def _inception_resnet(depths=(0, 0, 1), **options):  # the other blocks take seconds to trace
  return inception.inception_resnet_v2(10, width=1 / 2, depths=depths, **options)


def _transformer(**options):
  size = transformer.Size(32, 2, head=8)
  return transformer.language_model(size, vocabulary=11, dropout=0.1, **options)


NARROW = {
  "mlp": Narrow(functools.partial(mlp.mlp, (4, 4, 3), 10, (8, 8), dropout=0.1), _images(4)),
  "resnet": Narrow(functools.partial(_resnet, resnet.Block, True), _images(8)),
  "bottleneck": Narrow(functools.partial(_resnet, resnet.Bottleneck, False), _images(16)),
  "inception": Narrow(_inception_resnet, _images(75)),
  "vit": Narrow(
    functools.partial(vit.vit, 8, 4, 64, 1, 2, 10, dropout=0.1, drop_path=0.1), _images(8)
  ),
  "t2t_vit": Narrow(_t2t, _images(32)),
  "t2t_vit_t": Narrow(functools.partial(_t2t, tokens="transformer"), _images(32)),
  "transformer": Narrow(_transformer, TOKENS),
  "transformer_tied": Narrow(functools.partial(_transformer, tied=True, remat=True), TOKENS),
  "speedrun": Narrow(functools.partial(speedrun.speedrun, width=1 / 8), _images(32)),
}
VARIANTS = ("bottleneck", "t2t_vit_t", "transformer_tied")  # of families that are there already
FAMILIES = [name for name in NARROW if name not in VARIANTS]


@functools.cache
def _narrow(name: str) -> Model:
  return NARROW[name].make()


def _drawn(model: Model):
  """Parameters and state from NumPy: `init` compiles a program for each shape."""
  rng = np.random.default_rng(0)
  draw = lambda s: rng.standard_normal(s.shape, np.float32) / math.prod(s.shape[:-1]) ** 0.5
  params, state = model.shapes
  return jax.tree.map(draw, params), jax.tree.map(lambda s: np.abs(draw(s)), state)


def _has_dropout(name: str) -> bool:
  return name not in ("resnet", "speedrun")


@pytest.mark.parametrize("name", FAMILIES)
def test_state_and_keys(name):
  """Finite outputs; statistics change in training alone, outputs with the key alone."""
  model, x = _narrow(name), NARROW[name].x
  params, state = _drawn(model)
  before = jax.tree.map(np.asarray, state)
  run = jax.jit(model.apply, static_argnames="train")
  keys = [jax.random.key(i) for i in range(2)]
  first, trained = run(params, state, x, train=True, key=keys[0])
  second, _ = run(params, state, x, train=True, key=keys[1])
  outputs, evaluated = run(params, state, x, train=False, key=keys[0])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((first, outputs, trained)))
  assert (np.abs(first - second).max() > 0) == _has_dropout(name)
  same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
  assert same(before, state)  # what was handed in stays as it is
  assert same(before, evaluated)
  normalised = any("mean" in str(path) for path, _ in jax.tree.leaves_with_path(state))
  assert same(before, trained) == (not normalised)
  assert jax.tree.structure(trained) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_seeds(name):
  model = _narrow(name)
  init = jax.jit(model.init)
  first, again, other = (init(seed) for seed in (0, 0, 1))
  as_shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  assert jax.tree.map(as_shape, first) == tuple(model.shapes)
  for (path, a), b, c in zip(
    jax.tree.leaves_with_path(first[0]), *map(jax.tree.leaves, (again[0], other[0])), strict=True
  ):
    np.testing.assert_array_equal(a, b)
    drawn = "scale" not in str(path) and "bias" not in str(path)
    assert np.array_equal(a, c) != drawn, path


def test_dropout_without_a_key():
  model, x = _narrow("vit"), NARROW["vit"].x
  _abstract(model, x, train=False)
  with pytest.raises(ValueError, match=r"This model has dropout.*key=jax.random.key"):
    _abstract(model, x, train=True)


def _products(jaxpr):
  """The types of all products' results."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      yield equation.outvars[0].aval.dtype
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _products(inner)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "inception"])
def test_bfloat16_is_of_the_computation_alone(name):
  row = NARROW[name]
  model = row.make(dtype=jnp.bfloat16)
  run = functools.partial(model.apply, train=True, key=jax.random.key(0))
  program, (outputs, state) = jax.make_jaxpr(run, return_shape=True)(*model.shapes, row.x)
  products = list(_products(program.jaxpr))
  half = sum(dtype == jnp.bfloat16 for dtype in products)
  assert half > len(products) / 2  # float32: logits of attention, random features, patches
  leaves = jax.tree.leaves((model.shapes, outputs, state))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def _capture(model: Model, x, **options):
  y = np.zeros(x.shape if x.ndim == 2 else len(x), np.int32)

  def loss_fn(params, state, x, y, key):
    logits, state = model.apply(params, state, x, train=True, key=key)
    return fop_optax.softmax_cross_entropy(logits, y), state

  return fop_optax.capture(
    loss_fn,
    *model.shapes,
    x,
    y,
    jax.random.key(0),
    has_aux=True,
    batch_argnums=(1, 2),
    **options,
  )


@pytest.mark.slow
def test_a_step_with_state():
  """As `Model` shows it, with two groups: statistics move as those of the groups' mean."""
  model, x = _narrow("speedrun"), NARROW["speedrun"].x
  params, state = _drawn(model)
  captured = _capture(model, x, groups=2)
  y, key = np.arange(4, dtype=np.int32), jax.random.key(0)
  step = jax.jit(functools.partial(captured.value_and_grad, refresh=False))
  (loss, moved), grads, _ = step(params, state, x, y, key)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, moved, grads)))
  run = jax.jit(functools.partial(model.apply, train=True))
  halves = [run(params, state, x[start::2])[1] for start in range(2)]
  for found, *expected in zip(*map(jax.tree.leaves, (moved, *halves)), strict=True):
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-4, atol=1e-6)


def _check_capture(captured):
  """All but a twentieth is in layers, and every matrix.

  Left over are scales and biases of BatchNorm and LayerNorm, which stand in no product; and the
  trained bias of the speed run's whitening, whose filters are no parameters.
  """
  vectors = r"\['norms?'\](\[\d\])?\['(scale|bias)'\]$|qk_norms|\['whitening'\]\['bias'\]"
  assert all(re.search(vectors, path) for path in captured.fallbacks), str(captured)
  shapes = dict(zip(captured.layers.paths, captured.layers.shapes, strict=True))
  outside = sum(math.prod(shapes[path]) for path in captured.fallbacks)
  assert outside < 0.05 * sum(map(math.prod, shapes.values())), str(captured)


@pytest.mark.parametrize("name", NARROW)
def test_capture_finds_all_matrices(name):
  _check_capture(_capture(_narrow(name), NARROW[name].x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_capture_finds_all_matrices_of_whole(name):
  _check_capture(_capture(_full(getattr(inception, name)), _images(75)))


# What the parts compute.


def test_batch_norm_as_torch():
  """Biased variance in the outputs, unbiased in the running one, 0.1 of it in a step."""
  norm = layers.BatchNorm(3, epsilon=1e-3, rngs=nnx.Rngs(0))
  x = 2 * RNG.standard_normal((4, 5, 3), np.float32) + 1
  outputs = norm(x, train=True)
  mean, var = x.mean((0, 1)), x.var((0, 1))
  np.testing.assert_allclose(outputs, (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)
  np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var * 20 / 19, rtol=1e-4)
  running = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
  expected = (x - running[0]) / np.sqrt(running[1] + 1e-3)
  np.testing.assert_allclose(norm(x, train=False), expected, atol=1e-5)


def test_language_model_is_causal_and_remat_changes_nothing():
  model = _narrow("transformer")
  params, state = _drawn(model)
  later = TOKENS.copy()
  later[:, 4:] = (later[:, 4:] + 1) % 11
  run = jax.jit(functools.partial(model.apply, train=False))
  ours, theirs = (run(params, state, x)[0] for x in (TOKENS, later))
  np.testing.assert_allclose(ours[:, :4], theirs[:, :4], atol=1e-6)
  assert np.abs(ours[:, 4:] - theirs[:, 4:]).max() > 1e-3
  remat = jax.jit(functools.partial(_transformer(remat=True).apply, train=False))
  np.testing.assert_allclose(remat(params, state, TOKENS)[0], ours, atol=1e-6)


def test_rotation_sees_distances_alone():
  q, k = RNG.standard_normal((2, 8), np.float32)
  same = lambda v: np.broadcast_to(v, (1, 7, 1, 8))  # the same vector at each position
  turned = jax.jit(transformer.rotate)(np.concatenate([same(q), same(k)]))
  q, k = turned[:, :, 0]
  scores = np.asarray(q @ k.T)
  for distance in range(-6, 7):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)


def test_whitening_makes_patches_white():
  """Second moments of the outputs are those of the identity, but for epsilon."""
  mixed = RNG.standard_normal((50, 8, 8, 3)) @ RNG.standard_normal((3, 3))
  images = jnp.asarray(mixed, jnp.float32)
  model = _narrow("speedrun")
  _, state = _drawn(model)
  state = speedrun.whiten(state, images)
  filters = np.asarray(state["whitening"]["filters"][...])
  windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))
  outputs = np.einsum("nhwcij,ijcf->nhwf", windows, filters).reshape(-1, 24)
  moments = outputs.T @ outputs / len(outputs)
  np.testing.assert_allclose(moments[:12, :12], np.eye(12), atol=0.03)
  np.testing.assert_allclose(outputs[:, 12:], -outputs[:, :12], atol=1e-5)
  assert jax.tree.structure(state) == jax.tree.structure(model.shapes[1])


def test_partial_identity_passes_inputs_on():
  weights = speedrun.partial_identity(jax.random.key(0), (3, 3, 4, 6))
  x = RNG.standard_normal((1, 5, 5, 4), np.float32)
  dimensions = ("NHWC", "HWIO", "NHWC")
  y = jax.lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=dimensions)
  np.testing.assert_allclose(y[..., :4], x, atol=1e-6)
  assert np.abs(weights[..., 4:]).max() <= (9 * 4) ** -0.5


def test_padded_shortcut():
  x = RNG.standard_normal((2, 4, 4, 4), np.float32)
  y = resnet.PaddedShortcut(4, 8, 2)(x, train=True)
  np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
  assert not np.any(y[..., :2]) and not np.any(y[..., 6:])


def test_unfold_gives_overlapping_patches():
  x = RNG.standard_normal((2, 8, 8, 3), np.float32)
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
  )[:, ::2, ::2]  # [batch, height, width, channels, 3, 3]
  np.testing.assert_array_equal(t2t_vit.unfold(x, 3, 2, 1), windows.reshape(2, 4, 4, 27))


def test_sparse_weights_of_the_autoencoder():
  weights = np.asarray(mlp.sparse_normal(3)(jax.random.key(0), (20, 50)))
  np.testing.assert_array_equal((weights != 0).sum(0), 3)
  assert len(np.unique((weights != 0).T, axis=0)) > 25  # not the same inputs for all


def test_unknown_names():
  with pytest.raises(ValueError, match="No language model '7b': sizes are 0.2m, "):
    transformer.language_model("7b")
  with pytest.raises(ValueError, match="none of the token modules: 'performer', 'transformer'"):
    t2t_vit.t2t_vit_14(tokens="convolution")

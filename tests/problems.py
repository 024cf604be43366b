"""A small network with its gradients and Kronecker statistics computed by hand.

A second way to what `fop_optax.capture` finds: explicit per-example inputs and output gradients.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.layers import Bias, Factors, Layer, Layers, Stats

SIZES = ((5, 6), (6, 4), (4, 6))  # inputs, outputs; the first and third stack with no other


class Batch(NamedTuple):
  x: jax.Array
  y: jax.Array


def make_batch(examples=16, seed=0, dtype=jnp.float32, sizes=SIZES) -> Batch:
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(examples, sizes[0][0])), dtype)
  return Batch(x, jnp.asarray(rng.integers(sizes[-1][1], size=examples)))


def make_params(seed=0, dtype=jnp.float32, sizes=SIZES) -> dict[str, Any]:
  """Weights and biases, and `gain`, a leaf that is in no layer."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)
  params: dict[str, Any] = {
    f"fc{i}": {"b": 0.1 * draw(outputs), "w": draw(inputs, outputs)}
    for i, (inputs, outputs) in enumerate(sizes)
  }
  return params | {"gain": jnp.ones(sizes[0][1], dtype)}


def layers_of(params, groups=2) -> Layers:
  """The layers of `loss`, as capture should find them."""
  paths_and_leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  paths = tuple(jax.tree_util.keystr(path) for path, _ in paths_and_leaves)
  shapes = tuple(tuple(leaf.shape) for _, leaf in paths_and_leaves)
  layers = []
  for name in sorted(k for k, v in params.items() if isinstance(v, dict)):
    weight, bias = paths.index(f"['{name}']['w']"), paths.index(f"['{name}']['b']")
    inputs, outputs = shapes[weight]
    layers.append(
      Layer(
        path=paths[weight],
        kind="dense",
        weight=weight,
        view=(("reshape", (1, inputs, outputs)),),
        stack=1,
        inputs=inputs,
        outputs=outputs,
        biases=(Bias(bias, (("reshape", (1, outputs)),)),),
      )
    )
  return Layers(tuple(layers), shapes, paths, groups)


def example_loss(params, x, y, probes=None):
  """Loss of one example and the inputs of its layers; `probes` are added to their outputs."""
  names = sorted(k for k, v in params.items() if isinstance(v, dict))
  inputs, a = [], x
  for i, name in enumerate(names):
    inputs.append(a)
    out = a @ params[name]["w"] + params[name]["b"]
    out = out if probes is None else out + probes[i]
    a = jnp.tanh(out) if i + 1 < len(names) else out
    a = a * params["gain"] if i == 0 else a
  return -jax.nn.log_softmax(a)[y], tuple(inputs)


def loss(params, batch):
  """Mean loss of a batch."""
  return jnp.mean(jax.vmap(lambda x, y: example_loss(params, x, y)[0])(*batch))


@functools.partial(jax.jit, static_argnames="groups")
def value_and_grad(params, batch, refresh=True, groups=2):
  """Loss, gradient and `Stats`, from per-example gradients and explicit factors."""
  names = sorted(k for k, v in params.items() if isinstance(v, dict))
  probes = [jnp.zeros_like(params[name]["b"]) for name in names]

  def one(x, y):
    f = lambda params, probes: example_loss(params, x, y, probes)
    (value, inputs), (grads, dy) = jax.value_and_grad(f, (0, 1), has_aux=True)(params, probes)
    return value, grads, inputs, dy

  values, grads, inputs, dy = jax.vmap(one)(*batch)
  factors = []
  for a, g in zip(inputs, dy, strict=True):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a, g = a.astype(wide), g.astype(wide)
    a = jnp.concatenate([a, jnp.ones_like(a[:, :1])], axis=1)
    factors.append(Factors((a.T @ a / len(a))[None], (g.T @ g / len(g))[None]))
  mean = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
  by_group = jax.tree.map(lambda g: jnp.mean(g.reshape(-1, groups, *g.shape[1:]), 0), grads)
  contrasts = tuple(
    jax.tree.map(lambda g, row=row: jnp.tensordot(row.astype(g.dtype), g, 1), by_group)
    for row in contrast_rows(groups)
  )
  return (
    jnp.mean(values),
    mean,
    Stats(jnp.asarray(refresh), tuple(factors), contrasts, jnp.mean(values)),
  )


@jax.jit
def per_example_grads(params, batch):
  """Gradient of each example, leaves `[examples, *param]`."""
  one = lambda params, x, y: example_loss(params, x, y)[0]
  return jax.vmap(jax.grad(one), (None, 0, 0))(params, *batch)


def second_moments(params, batch):
  """`mean_n V_n^2` of each layer, in the basis in which the gradients come."""
  grads = per_example_grads(params, batch)
  V = [
    jnp.concatenate([grads[name]["w"], grads[name]["b"][:, None]], axis=1).astype(jnp.float32)
    for name in sorted(k for k, v in params.items() if isinstance(v, dict))
  ]
  return tuple(jnp.mean(v * v, axis=0)[None] for v in V)


def contrast_rows(groups):
  """`sqrt(2) H`, with `H` the Helmert matrix: orthonormal rows that sum to zero."""
  rows = np.zeros((groups - 1, groups))
  for i in range(1, groups):
    rows[i - 1, :i] = 1
    rows[i - 1, i] = -i
  return jnp.asarray(np.sqrt(2) * rows / np.linalg.norm(rows, axis=1, keepdims=True))


def invert_block(factors, damping, scaling, relative=0.0):
  """The inverse of one damped block and its damping, and whether it is sound."""
  damping = Damping(*(jnp.asarray(x, factors.A.dtype) for x in (damping, relative)))
  stack = jax.tree.map(lambda f: f[None], factors)
  kept = [jax.vmap(SCALINGS[scaling].empty)(stack)]
  (inverse,), used, (sound,) = SCALINGS[scaling].invert([stack], damping, None, kept, jnp.zeros(1))
  return jax.tree.map(lambda x: x[0], (inverse, used)), sound

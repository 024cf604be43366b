"""What every model is to the rest: two functions over trees of arrays, made from an NNX module."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

Params = nnx.State  # of nnx.Param alone
State = nnx.State  # of everything else: BatchNorm's statistics, what is frozen; may be empty


class Model(NamedTuple):
  """A network without hidden state: for jit, grad and `fop_optax.capture` as any function.

      model = resnet.resnet18(classes=10)
      params, state = model.init(0)

      def loss_fn(params, state, x, y):
        logits, state = model.apply(params, state, x, train=True)
        return fop_optax.softmax_cross_entropy(logits, y), state

      captured = fop_optax.capture(
        loss_fn, *model.shapes, x, y, has_aux=True, batch_argnums=(1, 2)
      )

  Attributes:
    init: seed -> (params, state).
    apply: `apply(params, state, x, *, train, key=None) -> (outputs, state)`. `train`: batch
      statistics in BatchNorm, whose running ones come back in `state`, and dropout, whose random
      bits come from `key` (None where the model has no dropout). Outputs are float32 at least.
    shapes: what `init` returns, as shapes: nothing is computed for it.
  """

  init: Callable[[int], tuple[Params, State]]
  apply: Callable[..., tuple[jax.Array, State]]
  shapes: tuple[Params, State]


class _Stream(nnx.RngStream):
  """NNX's, but for `count[...] += 1`: that searches the whole program traced so far, each time."""

  def __call__(self) -> jax.Array:
    key = jax.random.fold_in(self.key[...], self.count[...])
    self.count.set_value(self.count[...] + 1)
    return key


def _rngs(seed: int) -> nnx.Rngs:
  rngs = nnx.Rngs()
  rngs.default = _Stream(jax.random.key(seed), tag="default")
  return rngs


def from_module(make: Callable[[nnx.Rngs], nnx.Module]) -> Model:
  """The `Model` of a module called as `module(x, train=train, rngs=rngs)`; `rngs` may be None."""
  abstract = nnx.eval_shape(lambda: make(_rngs(0)))
  graphdef, *shapes = nnx.split(abstract, nnx.Param, ...)
  drops = any(isinstance(m, nnx.Dropout) and m.rate > 0 for _, m in nnx.iter_modules(abstract))

  def init(seed):
    _, params, state = nnx.split(make(_rngs(seed)), nnx.Param, ...)
    return params, state

  def apply(params, state, x, *, train, key=None):
    if train and drops and key is None:
      raise ValueError(
        "This model has dropout: in training it needs random bits,"
        " `apply(params, state, x, train=True, key=jax.random.key(...))`."
      )
    # Variables of this trace: those of one outside (of `jax.grad`, of a scan) cannot be written to.
    params, state = jax.tree.map(lambda x: x, (params, state))
    module = nnx.merge(graphdef, params, state)
    rngs = None if key is None else nnx.Rngs(dropout=key)
    outputs = module(x, train=train, rngs=rngs)
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    return outputs, nnx.state(module, nnx.Not(nnx.Param))

  return Model(init, apply, tuple(shapes))


def parameter_count(tree: Any) -> int:
  """How many numbers the arrays, or shapes, of `tree` hold."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))

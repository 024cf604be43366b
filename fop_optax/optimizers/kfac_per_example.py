"""Natural gradient from per-example gradients: Kronecker factors of products, or the Fisher."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature import gram
from fop_optax.curvature.gram import Gram
from fop_optax.dimensions import Dimensions
from fop_optax.optimizers import common, completion, per_example
from fop_optax.optimizers.common import Options, Scalar, ScalarOrSchedule
from fop_optax.optimizers.kfac import ScaleByKfacState, precondition
from fop_optax.optimizers.per_example import Settings, Share, Weights
from fop_optax.optimizers.whole_steps import whole_steps


def scale_by_kfac_per_example(
  *,
  curvature: str = "kronecker",
  damping: ScalarOrSchedule | None = None,
  relative_damping: ScalarOrSchedule | None = None,
  decay: Scalar = 0.95,
  scaling: str = "factored",
  curvature_update_period: ScalarOrSchedule = common.UPDATE_PERIOD,
  inverse_update_period: ScalarOrSchedule | None = None,
  stagger: bool = False,
  norm_constraint: ScalarOrSchedule | None = None,
  learning_rate: ScalarOrSchedule = 1.0,
  dimension_numbers: Dimensions = None,
  max_dim: int = 8192,
  max_vector: int = 1024,
) -> optax.GradientTransformationExtraArgs:
  """Turns per-example gradients `[B, *param]` into a direction `[*param]`; no rate and no sign.

  See :func:`fop_optax.kfac_per_example` for more details: all arguments, and errors, are as there.
  But there is no `norm_constraint` unless it is given, and `learning_rate` is only what it reckons
  with.

  Example:
    With the gradients (1, 0) and (0, 2) the empirical Fisher matrix is diag(1/2, 2), and their mean
    (1/2, 1):

    >>> import fop_optax, jax.numpy as jnp
    >>> params, grads = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> tx = fop_optax.scale_by_kfac_per_example(curvature="exact", damping=1e-6)
    >>> direction, _ = tx.update(grads, tx.init(params), params)
    >>> print(direction.round(3))
    [1.  0.5]
  """
  options = Options(
    damping=damping,
    relative_damping=relative_damping,
    decay=decay,
    scaling=scaling,
    curvature_update_period=curvature_update_period,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    norm_constraint=norm_constraint,
    learning_rate=learning_rate,
    per_example=True,
  )
  settings = Settings(curvature, dimension_numbers, max_dim, max_vector)
  return whole_steps(_precondition(options, settings), ScaleByKfacState, settings.check)


def _precondition(options: Options, settings: Settings) -> optax.GradientTransformationExtraArgs:
  if settings.curvature == "kronecker":
    inner = lambda layers: precondition(options, layers)
    return per_example.kronecker(settings, options, inner)
  start = lambda curvature, dtype: ScaleByKfacState(curvature, jnp.ones(()))
  return per_example.exact(settings, options, start, _natural)


def _natural(
  of: Gram, weights: Weights, damping: jax.Array, count: jax.Array, resolution: float
) -> Share:
  """`M^-1 g`, with `g = X' w`."""
  del count, resolution
  y = gram.coordinates(of, weights.mean)
  norm2 = jnp.sum(y * gram.divide(of, y, damping))  # g' M^-1 g
  return Share(gram.solve_weights(of, weights.mean, damping), norm2)


def kfac_per_example(
  learning_rate: ScalarOrSchedule,
  *,
  curvature: str = "kronecker",
  damping: ScalarOrSchedule | None = None,
  relative_damping: ScalarOrSchedule | None = None,
  decay: Scalar = 0.95,
  momentum: Scalar | None = 0.9,
  nesterov: bool = False,
  weight_decay: Scalar = 0.0,
  mask: Any = None,
  scaling: str = "factored",
  curvature_update_period: ScalarOrSchedule = common.UPDATE_PERIOD,
  inverse_update_period: ScalarOrSchedule | None = None,
  stagger: bool = False,
  norm_constraint: ScalarOrSchedule | None = common.NORM_CONSTRAINT,
  dimension_numbers: Dimensions = None,
  max_dim: int = 8192,
  max_vector: int = 1024,
) -> optax.GradientTransformationExtraArgs:
  r"""Natural gradient from the gradients of single examples, without capture and layers.

  `tx.update(per_example_grads, state, params)` takes leaves `[B, *param]`, as
  `jax.vmap(jax.grad(loss), (None, 0))` gives them. They take `B` times the memory of parameters:
  this is for small models, and for where per-example gradients are there anyway, as in private
  training.

  With `curvature="kronecker"` each leaf is a block of its own. **This is not K-FAC**: of a layer's
  :math:`V_n = a_n g_n^\top` only the product is known, and

  .. math::
    F = L \otimes R / \mathrm{tr} L, \quad
    L = \tfrac{1}{B} \sum_n V_n V_n^\top, \quad R = \tfrac{1}{B} \sum_n V_n^\top V_n

  weighs the inputs of examples by the size of their output gradients, and the other way round. It
  equals K-FAC's `A (x) G` for layers without bias where :math:`|a_n|` and :math:`|g_n|` do not
  depend on `n`. `L` and `R` are running averages, damping is shared out between them and used as in
  :func:`fop_optax.kfac`. A vector (a bias, apart from its weight), a scalar, or a matrix of one row
  or one column has its own Fisher block :math:`\tfrac{1}{B} \sum_n g_n g_n^\top`, and plain
  :math:`+ \lambda I`.

  With `curvature="exact"` it is the damped empirical Fisher itself, of all leaves together and of
  this batch alone:

  .. math::
    (F + \lambda I)^{-1} g = X^\top (X X^\top / B + \lambda I)^{-1} \mathbf 1 / B, \quad
    F = X^\top X / B

  with the examples' gradients in the rows of `X`, in `B^2` numbers of memory; there is no curvature
  in the state.

  A step whose gradients (with `curvature="exact"` their squares) or update are not finite is
  skipped and counted, momentum and weight decay with it. Batches may differ in size from step to
  step.

  What optax puts around it sees `[B, *param]`: leaves that `optax.masked` or `optax.partition` keep
  from it go on as they came. Average those first, with
  `optax.experimental.aggregating.average_per_element_updates()`. `optax.apply_if_finite` and
  `optax.MultiSteps` expect updates like their input, and do not fit around it.

  Args:
    learning_rate: a number, an array or a schedule.
    curvature: `"kronecker"` or `"exact"`.
    damping: lambda, a number, an array or a schedule of the step.
    relative_damping: lambda in units of a block's mean eigenvalue (with `curvature="exact"` that of
      the Fisher of all leaves); 1 where no damping is given. With both, their sum.
    decay: weight of the old average when statistics are folded in; less in the beginning, so that
      the average starts exact. Kronecker only, as all up to `stagger` but what follows a direction.
    momentum: decay of the trace of directions, None for none.
    nesterov: whether momentum looks ahead.
    weight_decay: decoupled decay, times the learning rate.
    mask: which leaves decay, a tree of bools or a callable of params, as in `optax.adamw`.
    scaling: `"factored"` or `"exact"`, as in :func:`fop_optax.kfac`.
    curvature_update_period: statistics every that many steps; at each of the first 20, then every
      10.
    inverse_update_period: inverses every that many steps; None: whenever statistics came.
    stagger: whether blocks take turns to remake their inverses.
    norm_constraint: kappa, a bound of the squared length of the step that is taken in the damped
      Fisher metric, as in :func:`fop_optax.kfac`, with what goes with it there but the units of the
      loss, which gradients alone do not tell: multiply one that begins far from 1. With
      `curvature="kronecker"` alone is no step longer than twice the leaf that it moves. None: no
      bound.
    dimension_numbers: how leaves with two or more axes are matrices: a tree of
      :class:`fop_optax.DimensionNumbers` (or of those of `optax.contrib.muon`) like params or part
      of one, an entry standing for all leaves below it; or a callable that makes one from a tree
      like params. Where there is none, the last axis is out and the others are in. Kronecker only.
    max_dim: the largest side of a matrix whose factor is kept whole; above, its diagonal is.
    max_vector: the largest vector whose block is kept whole; above, its diagonal is.

  Returns:
    A transformation whose `update` takes per-example gradients, and needs params.

  Raises:
    ValueError: for hyperparameters out of range; in `init` and `update` for dimension numbers that
      do not fit; in `update` without params, for leaves that are not `[B, *param]` (plain gradients
      among them) or differ in `B`, and for states of another model.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> def loss(params, x, y):  # of one example
    ...   logits = x @ params["w"] + params["b"]
    ...   return optax.softmax_cross_entropy_with_integer_labels(logits, y)
    >>> params = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(3)}
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = jnp.argmax(x, axis=1)
    >>> tx = fop_optax.kfac_per_example(0.1)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(20):
    ...   params, state = step(params, state)
    >>> print(jnp.mean(jnp.argmax(x @ params["w"] + params["b"], axis=1) == y) > 0.95)
    True

  References:
    Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
    <https://arxiv.org/abs/1503.05671>`_, 2015, whose factors these stand for; Amari, `Natural
    Gradient Works Efficiently in Learning <https://doi.org/10.1162/089976698300017746>`_, 1998
  """
  options = Options(
    damping=damping,
    relative_damping=relative_damping,
    decay=decay,
    scaling=scaling,
    curvature_update_period=curvature_update_period,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    norm_constraint=norm_constraint,
    learning_rate=learning_rate,
    momentum=momentum,
    per_example=True,
  )
  settings = Settings(curvature, dimension_numbers, max_dim, max_vector)
  inner = _precondition(options, settings)
  complete = completion.complete(options, inner, nesterov, weight_decay, mask)
  return whole_steps(complete, ScaleByKfacState, settings.check)

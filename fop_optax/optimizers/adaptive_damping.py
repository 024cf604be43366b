"""Damping that follows how well the quadratic model predicts: the Levenberg-Marquardt rule."""

from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.optimizers.refresh import curvature_states

NAMES = ("damping", "relative_damping")


def adapt_damping(
  opt_state: Any,
  ratio: jax.typing.ArrayLike,
  *,
  every: int = 5,
  decay: jax.typing.ArrayLike = 19 / 20,
  lower: jax.typing.ArrayLike = 1e-8,
) -> Any:
  r"""The state with more damping where the model promised too much, less where it kept its word.

  With rho, the change of the loss over the change that the quadratic model predicted, on the same
  batch, every `every` steps

  .. math::
    \lambda \leftarrow
    \begin{cases}
      \omega^{\mathrm{every}} \lambda & \rho > 3/4 \\
      \lambda / \omega^{\mathrm{every}} & \rho < 1/4 \text{ or not a number}
    \end{cases}

  and never below `lower` (Martens and Grosse, 2015, section 6.5, with :math:`\omega` = `decay`).

  Args:
    opt_state: a state that holds `damping` or `relative_damping` as a hyperparameter, of
      `optax.inject_hyperparams(fop_optax.kfac)(..., damping=1.0)`; if it holds both, both change.
    ratio: rho. The model's change is :meth:`fop_optax.QuadraticModel.change`.
    every: how many steps lie between two changes.
    decay: omega.
    lower: the least damping.

  Returns:
    A state like `opt_state`.

  Raises:
    ValueError: if it has no such hyperparameter, or no single curvature state, whose steps count.

  Example:
    >>> import fop_optax, jax.numpy as jnp, optax
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> make = optax.inject_hyperparams(fop_optax.kfac)
    >>> state = make(0.1, captured.layers, damping=1.0).init(params)
    >>> state = fop_optax.adapt_damping(state, ratio=0.1)
    >>> print(f"{state.hyperparams['damping']:.4f}")
    1.2924
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
  places = [index for index, (path, _) in enumerate(flat) if _is_damping(path)]
  found = curvature_states(opt_state)
  if not places or len(found) != 1:
    raise ValueError(
      f"`adapt_damping(opt_state, ratio)` found {len(places)} hyperparameters called damping or"
      f" relative_damping, and {len(found)} curvature states. Pass the state of"
      " `optax.inject_hyperparams(fop_optax.kfac)(learning_rate, layers, damping=1.0)`, with a"
      " number for the damping and not a schedule."
    )
  ((fields),) = found.values()
  count, *_ = fields["steps"].values()
  factor = jnp.asarray(decay) ** every
  rho = jnp.asarray(ratio)
  change = jnp.where(rho > 0.75, factor, jnp.where(rho >= 0.25, 1, 1 / factor))
  change = jnp.where(count % every == 0, change, 1)
  leaves = [leaf for _, leaf in flat]
  for index in places:
    leaves[index] = jnp.maximum(leaves[index] * change, lower).astype(leaves[index].dtype)
  return jax.tree.unflatten(treedef, leaves)


def _is_damping(path: tuple[Any, ...]) -> bool:
  names = [str(getattr(key, "name", getattr(key, "key", None))) for key in path]
  return any(a == "hyperparams" and b in NAMES for a, b in zip(names, names[1:], strict=False))

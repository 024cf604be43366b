"""Gradients of examples, or of groups of them, for an optimizer that takes contrasts."""

import jax
import jax.numpy as jnp
import optax

from fop_optax import group_gradients
from fop_optax.layers import Stats, is_masked
from fop_optax.optimizers import checks
from fop_optax.optimizers.per_example import check_batch, means


def by_group(
  inner: optax.GradientTransformation, groups: int = 2
) -> optax.GradientTransformationExtraArgs:
  r"""Hands `inner` the mean gradient, and the contrasts of groups of examples in `stats`.

  Its gradients have an axis of examples before the axes of the parameter, as `jax.vmap(jax.grad)`
  and `optax.experimental.aggregating` have them; example `i` belongs to group `i mod groups`, so
  with one gradient a group they are those. For two groups the contrast is :math:`g_1 - g_2`, for
  more they are :math:`\sqrt 2 \sum_j H_{ij} g_j` with the Helmert matrix. There are no factors in
  these `stats`: it is for :func:`fop_optax.soap` and :func:`fop_optax.shampoo` with
  `contrast=True`.

  Args:
    inner: the optimizer.
    groups: number of groups, at least two.

  Returns:
    A transformation of gradients `[B, *shape of the parameter]`.

  Raises:
    ValueError: if there are no two groups; in `update` if these are no gradients of examples at
      `params`, or of a number that `groups` does not divide.
    TypeError: if `inner` is no optimizer.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)  # of one example
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(4, 3)
    >>> tx = fop_optax.by_group(fop_optax.soap(0.01, contrast=True))
    >>> state = tx.init(params)
    >>> grads = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    >>> updates, state = tx.update(grads, state, params)
    >>> print(updates["w"].shape)
    (3, 2)
  """
  if not isinstance(groups, int) or groups < 2:
    raise ValueError(f"`groups={groups!r}` should be a whole number of groups, at least 2.")
  checks.check_optimizer("inner", inner)
  inner = optax.with_extra_args_support(inner)

  def update(updates, state, params=None, **extra_args):
    check_batch(updates, params, groups)
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_masked)
    by_leaf = [leaf if is_masked(leaf) else means(leaf, groups) for leaf in leaves]
    mean = [own if is_masked(own) else group_gradients.mean(own) for own in by_leaf]
    parts = [
      [own] * (groups - 1) if is_masked(own) else group_gradients.contrasts(own) for own in by_leaf
    ]
    contrasts = tuple(treedef.unflatten(c) for c in zip(*parts, strict=True))
    stats = Stats(jnp.asarray(False), (), contrasts)
    return inner.update(treedef.unflatten(mean), state, params, stats=stats, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)

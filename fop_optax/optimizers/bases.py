"""Eigenbases out of a state, and the second moments of gradients that are measured in them."""

from typing import Any

import jax

from fop_optax.curvature.stacks import per_stack
from fop_optax.layers import Basis, Layers, Stats
from fop_optax.optimizers.refresh import curvature_state

FIELDS = ("basis_A", "basis_G", "S", "place")  # of a stack and its inverse


def bases(opt_state: Any) -> tuple[Basis, ...]:
  """The eigenbases of the Kronecker factors that `scaling="eigenvalue"` works in.

  Before the first statistics they are zeros; what is measured in them then is not folded in. Of an
  optimizer with `sharding` they are still with their owners: `value_and_grad` gathers them where it
  takes statistics.

  Args:
    opt_state: state of an optimizer that holds one curvature state, as for
      :func:`fop_optax.refresh_due`.

  Returns:
    One `Basis` for all layers of a shape, for `captured.value_and_grad(...,
    basis=bases(opt_state))`.

  Raises:
    ValueError: if there is no curvature state in it or more than one, or its optimizer has another
      `scaling`.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> tx = fop_optax.kfac(0.1, captured.layers, scaling="eigenvalue")
    >>> (basis,) = fop_optax.bases(tx.init(params))
    >>> basis.A.shape, basis.G.shape
    ((1, 3, 3), (1, 2, 2))
  """
  stacks: dict[str, dict[str, jax.Array]] = {}
  fields = curvature_state(opt_state, "bases")
  for (stack, *names), leaf in fields["stacks"].items():
    for field in set(FIELDS).intersection(names):
      stacks.setdefault(stack, {})[field] = leaf
  if not all("S" in stack for stack in stacks.values()):
    raise ValueError(
      "`bases(opt_state)`: the state has no second moments of gradients, which only"
      ' `scaling="eigenvalue"` has. Leave `basis` out of `value_and_grad`, or make the optimizer'
      ' with `fop_optax.kfac(..., scaling="eigenvalue")`.'
    )
  in_order = [stacks[name] for name in sorted(stacks, key=int)]  # dictionaries have "10" before "2"
  (layer,) = (leaf for names, leaf in fields["blocks"].items() if names[0] == "layer")
  owners = per_stack(layer, [len(stack.get("place", stack["S"])) for stack in in_order])
  return tuple(
    Basis(stack.get("basis_A"), stack.get("basis_G"), own, stack.get("place"))
    for stack, own in zip(in_order, owners, strict=True)
  )


def check_second_moments(layers: Layers, stats: Stats) -> None:
  """Checks that `stats` have second moments, of these layers.

  Raises:
    ValueError: if they have not.
  """
  got = [tuple(S.shape) for S in stats.second_moments]
  wanted = [(layer.stack, *layer.dims) for layer in layers]
  if got != wanted:
    what = f"of the shapes {got} where these layers have {wanted}" if got else "missing"
    raise ValueError(
      f'Second moments of gradients are {what}: `scaling="eigenvalue"` needs them in the eigenbases'
      " of its state. Form them with `captured.value_and_grad(params, ...,"
      " basis=fop_optax.bases(opt_state))`."
    )

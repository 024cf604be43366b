"""How auxiliary outputs of the chunks become one: in the batch's order, averaged, or checked."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

from fop_optax import group_gradients
from fop_optax.capture import flow
from fop_optax.capture.trace import Traced

# A role: ("batch", rows an example) | ("mean",) | ("same",) | ("input", index of the argument)
Role = tuple[Any, ...]
PyTree = Any


def roles(
  traced: Traced, twice: Traced | None, n_params: int, batch: Sequence[bool], size: int
) -> tuple[Role, ...]:
  """What becomes of each leaf of aux when the batch is cut into chunks.

  Args:
    traced: the loss on one chunk.
    twice: the loss on a chunk of twice as many examples, if it could be traced.
    n_params: number of parameters, the first inputs of the jaxpr.
    batch: for each further input whether it differs between chunks.
    size: number of examples of the chunk.

  Raises:
    ValueError: if a leaf differs between chunks and can be neither averaged nor put in order.
  """
  jaxpr = traced.jaxpr
  differs = flow.depends(jaxpr, [False] * n_params + list(batch))[1:]
  names = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(traced.treedef, differs))[0]
  bigger = twice.jaxpr.outvars[1:] if twice else [None] * len(differs)
  inputs = {v: i for i, v in enumerate(jaxpr.invars[n_params:])}
  out = []
  for (path, _), v, big, differ in zip(names, jaxpr.outvars[1:], bigger, differs, strict=True):
    name = "aux" + jax.tree_util.keystr(path)
    if not isinstance(v, core.Literal) and v in inputs:
      out.append(("input", inputs[v]))
    else:
      out.append(_role(name, v.aval, big.aval if big is not None else None, differ, size))
  return tuple(out)


def _role(name: str, aval: Any, bigger: Any, differs: bool, size: int) -> Role:
  shape = tuple(aval.shape)
  if bigger is None:  # only one size could be traced: go by the leading axis
    grown = (2 * shape[0], *shape[1:]) if differs and shape[:1] == (size,) else shape
  else:
    grown = tuple(bigger.shape)
  if grown != shape:
    if shape[0] % size == 0 and grown == (2 * shape[0], *shape[1:]):
      return ("batch", shape[0] // size)
    raise ValueError(
      f"{name} has shape {list(shape)} for {size} examples and {list(grown)} for {2 * size}: only a"
      " leading axis that goes with the batch can be put back in the batch's order. Move it first."
    )
  if jnp.issubdtype(aval.dtype, jnp.inexact):
    return ("mean",)
  key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
  key |= aval.dtype == jnp.uint32 and shape[-1:] == (2,)
  if not differs or key:  # of new keys, each group's is as good as another's
    return ("same",)
  raise ValueError(
    f"{name} ({aval.dtype}{list(shape)}) depends on the batch, so that it differs between the"
    " groups of examples, and cannot be averaged. Return it as a float (it is averaged), or one"
    " value an example."
  )


def merge(roles: Sequence[Role], auxes: Sequence[PyTree], inputs: Sequence[Any]) -> PyTree:
  """One aux out of those of the groups.

  Args:
    roles: of its leaves; empty if there is one chunk only.
    auxes: one a group, leaves `[micro_batches, ...]`.
    inputs: the traced arguments as the user gave them.
  """
  if not roles:
    return jax.tree.map(lambda leaf: leaf[0], auxes[0])
  treedef = jax.tree.structure(auxes[0])
  out = []
  for role, *ours in zip(roles, *map(jax.tree.leaves, auxes), strict=True):
    if role[0] == "input":
      out.append(inputs[role[1]])
    elif role[0] == "batch":
      pieces = [leaf.reshape((len(leaf), -1, role[1], *leaf.shape[2:])) for leaf in ours]
      # [micro, position, row] of each group -> [position, micro, group, row]
      ordered = jnp.moveaxis(jnp.stack(pieces, axis=2), 0, 1)
      out.append(ordered.reshape((-1, *ordered.shape[4:])))
    elif role[0] == "mean":
      out.append(group_gradients.mean([piece for group in ours for piece in group]))
    else:
      out.append(ours[0][-1])
  return jax.tree.unflatten(treedef, out)

"""Read-outs of an optimizer's state: what each layer did, and what went wrong."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.curvature.eigenvalue_inverse import EigenvalueInverse
from fop_optax.curvature.scaling import SplitDamping, UsedDamping
from fop_optax.curvature.stacks import plan_stacks
from fop_optax.curvature.state import BlockNumbers, CurvatureState, StackState, in_order
from fop_optax.factorizations import eigvalsh
from fop_optax.layers import Layers
from fop_optax.optimizers.checks import states_in
from fop_optax.optimizers.fop import ScaleByFopState
from fop_optax.optimizers.kfac import ScaleByKfacState
from fop_optax.optimizers.neumann import ScaleByNeumannState
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.shampoo import ScaleByShampooState
from fop_optax.optimizers.soap import ScaleBySoapState

STACKED = (ScaleBySoapState, ScaleByShampooState)
STATES = (ScaleByKfacState, ScaleByFopState, *STACKED, ScaleByNeumannState)


def diagnostics(
  opt_state: Any, layers: Layers | None = None, condition: bool = False, spectra: bool = False
) -> dict[str, Any]:
  """Numbers of the last step and events so far.

  Args:
    opt_state: state of an optimizer that holds one state of this library's, however deep.
    layers: `captured.layers`, for the names of layers; needed under `jax.jit`. Without it layers
      are named by their number. Per-example optimizers have none: theirs are the leaves of params.
    condition: whether to work out condition numbers, an eigendecomposition of each factor.
    spectra: whether to work out all eigenvalues of the factors, likewise.

  Returns:
    `count` (steps taken); of the steps that were skipped `nonfinite_losses`, `nonfinite_gradients`
    (a batch of NaN counts in both) and `nonfinite_directions` (of finite gradients); `norm_scale`,
    the factor by which `norm_constraint` shortened the last step, 1 where it did not; and `layers`:
    for each layer a dictionary of arrays with one entry a matrix of the layer along the leading
    axis:

    - `folds` and `nonfinite_statistics`: statistics folded in and refused;
    - `inverses` and `failed_inverses`: inverses stored and refused. A layer without any (0) gets
      no update;
    - `damping_A` and `damping_G`, or `damping` with other scalings: at the last inverse;
      `added_A` and `added_G`, or `added`: what of it was added because the damping asked for was
      below the rounding of the Fisher block;
    - FOP: `beta` and `s` (one a contrast), `eta`, `rho2` (how far FOP is from K-FAC) and
      `residual` (of orthogonality), as in `fop_optax.projection`;
    - with `condition`: `condition_A` and `condition_G` of the running factors, and `condition` of
      the damped Fisher block that they give with that damping;
    - with `spectra`: `spectrum_A` and `spectrum_G`, the eigenvalues of the running factors, the
      largest first.

    SOAP and Shampoo know no layers: they have `stacks`, for the shape of the tensors in each
    `inverses` and `failed_inverses`, the bases or roots stored and refused, one entry a tensor, and
    with `contrast` what FOP found. Of the Neumann optimizer there are the steps alone.

    With `curvature="exact"` of per-example gradients there are no layers, but `"all parameters"`
    with FOP's numbers.

  Raises:
    TypeError: if `layers` are none.
    ValueError: if there is no such state or more than one; under `jax.jit`, without `layers` or
      where some of them are masked.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x, groups=2)
    >>> tx = fop_optax.fop(0.1, captured.layers)
    >>> _, grads, stats = captured.value_and_grad(params, x)
    >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
    >>> (layer,) = fop_optax.diagnostics(state, captured.layers)["layers"].values()
    >>> print(layer["folds"], layer["inverses"], layer["beta"])  # equal halves: beta is 0
    [1] [1] [[0.]]
  """
  if layers is not None and not isinstance(layers, Layers):
    raise TypeError(
      f"`diagnostics(opt_state, layers)` has a {type(layers).__name__} for layers: pass"
      " `captured.layers`."
    )
  state = _find(opt_state)
  if isinstance(state, STACKED):
    return {**state.steps._asdict(), "stacks": _by_shape(state)}
  if isinstance(state, ScaleByNeumannState):
    return state.steps._asdict()
  curvature: CurvatureState = state.curvature
  steps = {**curvature.steps._asdict(), "norm_scale": state.norm_scale}
  out: dict[str, dict[str, jax.Array]] = {}
  if curvature.blocks is None:
    if isinstance(state, ScaleByFopState):
      out["all parameters"] = state.projection._asdict()
    return {**steps, "layers": out}
  numbers = _numbers(curvature.blocks)
  if isinstance(state, ScaleByFopState):
    numbers |= state.projection._asdict()
  if condition:
    numbers |= _conditions(in_order(curvature))
  owner = _owners(curvature, layers)
  name_of = lambda layer: layers[layer].path if layers is not None else f"layer {layer}"
  for layer in dict.fromkeys(owner[owner >= 0].tolist()):
    out[name_of(layer)] = {key: value[owner == layer] for key, value in numbers.items()}
  if spectra:
    for layer, own in _spectra(in_order(curvature), owner):
      out[name_of(layer)] |= own
  return {**steps, "layers": out}


def _by_shape(state: ScaleBySoapState | ScaleByShampooState) -> dict[str, dict[str, jax.Array]]:
  """Events of each stack, under the shape of its tensors; of those of one shape side by side."""
  out: dict[str, dict[str, jax.Array]] = {}
  for stack in state.stacks:
    of = stack.slots if isinstance(stack, OwnedStack) else stack
    own = {"inverses": of.made, "failed_inverses": of.failed}
    if of.projection is not None:
      own |= of.projection._asdict()
    if isinstance(stack, OwnedStack):
      own = stack.in_order(own)
    name = " x ".join(map(str, stack.dims[1:]))
    before = out.get(name)
    out[name] = own if before is None else jax.tree.map(lambda *x: jnp.concatenate(x), before, own)
  return out


def _numbers(blocks: BlockNumbers) -> dict[str, jax.Array]:
  inversions = blocks.inversions
  return {
    "folds": blocks.folds,
    "nonfinite_statistics": blocks.nonfinite,
    "inverses": inversions.made,
    "failed_inverses": inversions.failed,
    **inversions.damping._asdict(),
  }


def _spectra(
  curvature: CurvatureState, owner: np.ndarray
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """The eigenvalues of both factors of each layer."""
  start = 0
  for stack in curvature.stacks:
    own, start = owner[start : start + stack.blocks], start + stack.blocks
    spectra = [_spectrum(factor) for factor in stack.running]
    for layer in dict.fromkeys(own[own >= 0].tolist()):
      yield layer, {f"spectrum_{s}": x[own == layer] for s, x in zip("AG", spectra, strict=True)}


def _conditions(curvature: CurvatureState) -> dict[str, jax.Array]:
  own = map(_stack_conditions, curvature.stacks, curvature.damping)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *own)


def _stack_conditions(stack: StackState, used: UsedDamping) -> dict[str, jax.Array]:
  (low_A, high_A), (low_G, high_G) = map(_extremes, stack.running)
  if isinstance(used, SplitDamping):
    damped = (high_A + used.damping_A) / (low_A + used.damping_A)
    damped *= (high_G + used.damping_G) / (low_G + used.damping_G)
  elif isinstance(stack.inverse, EigenvalueInverse):
    low, high = (reduce(stack.inverse.S, axis=(1, 2)) for reduce in (jnp.min, jnp.max))
    damped = (high + used.damping) / (low + used.damping)
  else:
    damped = (high_A * high_G + used.damping) / (low_A * low_G + used.damping)
  return {"condition_A": high_A / low_A, "condition_G": high_G / low_G, "condition": damped}


def _extremes(factor):
  """Smallest and largest eigenvalue of each matrix of a stack."""
  values = _spectrum(factor)
  return values[..., -1], values[..., 0]


def _spectrum(factor):
  """Eigenvalues of each matrix of a stack, the largest first, at least 0."""
  values = jax.vmap(eigvalsh)(factor) if factor.ndim == 3 else factor
  return -jnp.sort(-jnp.maximum(values, 0), axis=-1)


def _find(opt_state: Any) -> Any:
  found = states_in(opt_state, STATES)
  if len(found) != 1:
    raise ValueError(
      f"`diagnostics(opt_state)` found {len(found)} states of this library's optimizers, where it"
      " needs one. Pass the state that `tx.init(params)` made, or the part of it with one of them"
      " (of a `flax.nnx.Optimizer`, its `opt_state`)."
    )
  return jax.tree.map(_unwrap, found[0], is_leaf=_is_wrapped)


def _is_wrapped(x: Any) -> bool:
  """Whether `x` is a node around one array: a Flax Variable, told from a container of arrays."""
  return not isinstance(x, tuple) and len(jax.tree.leaves(x)) == 1


def _unwrap(x: Any) -> Any:
  return jax.tree.leaves(x)[0]


def _owners(curvature: CurvatureState, layers: Layers | None) -> np.ndarray:
  """The layer of each block."""
  assert curvature.blocks is not None
  if not isinstance(curvature.blocks.layer, jax.core.Tracer):
    return np.asarray(curvature.blocks.layer)
  if layers is None:
    raise ValueError("`diagnostics` under `jax.jit` needs `layers`: pass `captured.layers`.")
  plan = plan_stacks(layers)
  stacks = jax.eval_shape(in_order, curvature).stacks
  shapes = [tuple(x.shape for x in stack.factors) for stack in stacks]
  if shapes != [stack.factor_shapes for stack in plan]:
    raise ValueError(
      "`diagnostics` cannot tell under `jax.jit` which of the layers are masked (or `layers` are of"
      " another loss): call it outside."
    )
  return np.concatenate([np.repeat(p.layers, [layers[i].stack for i in p.layers]) for p in plan])


def diagnostics_table(numbers: dict[str, Any]) -> str:
  """What :func:`fop_optax.diagnostics` returned, as a table: a row a layer, a column a number.

  Of a layer of several matrices (stacked, in parts) or contrasts there are the smallest and the
  largest, as `0.2..0.9`.

  Args:
    numbers: a dictionary of `diagnostics`, of arrays that have values (not under `jax.jit`).

  Returns:
    The table; the lines above it have the steps that were taken and left out, `norm_scale` where
    `norm_constraint` bound the last, and how many layers did not move at all, and why: without
    statistics there is no direction.

  Raises:
    ValueError: for something else than `diagnostics` returned.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> tx = fop_optax.kfac(0.1, captured.layers, damping=0.5, scaling="exact")
    >>> _, grads, stats = captured.value_and_grad(params, x)
    >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
    >>> print(fop_optax.diagnostics_table(fop_optax.diagnostics(state, captured.layers)))
    steps taken: 1; left out for losses, gradients, directions: 0, 0, 0; norm_scale 0.448
    layer  folds  nonfinite_statistics  inverses  failed_inverses  damping  added
    ['w']  1      0                     1         0                0.5      0
  """
  if not isinstance(numbers, dict) or "nonfinite_losses" not in numbers:
    raise ValueError(
      f"`diagnostics_table(numbers)` has a {type(numbers).__name__} that is not of `diagnostics`:"
      " write `fop_optax.diagnostics_table(fop_optax.diagnostics(opt_state, captured.layers))`."
    )
  skipped = [numbers[f"nonfinite_{what}"] for what in ("losses", "gradients", "directions")]
  lines = [
    f"steps taken: {int(numbers['count'])}; left out for losses, gradients, directions:"
    f" {', '.join(str(int(count)) for count in skipped)}"
  ]
  if (scale := float(numbers.get("norm_scale", 1))) < 1:
    lines[0] += f"; norm_scale {scale:.3g}"
  kind = "layers" if "layers" in numbers else "stacks"
  found = numbers.get(kind, {})
  if int(numbers["count"]) and kind == "layers":
    reasons = collections.Counter(filter(None, map(_still, found.values())))
    lines += [f"{n} of {len(found)} layers did not move: {why}" for why, n in reasons.items()]
  columns = list(dict.fromkeys(name for own in found.values() for name in own))
  rows = [(kind[:-1], *columns)]
  for path, own in found.items():
    rows.append((path, *(_shown(own[name]) if name in own else "" for name in columns)))
  if len(rows) > 1:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda row: "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
    lines += map(pad, rows)
  return "\n".join(lines)


def _still(own: dict[str, Any]) -> str:
  """Why a layer had no step so far, if it had none."""
  if np.any(own.get("inverses", 1)):
    return ""
  if np.any(own["failed_inverses"]):
    return "inverses failed, as of statistics that are zero"
  if np.any(own["nonfinite_statistics"]):
    return "no statistics were finite"
  return "no statistics came. `captured.value_and_grad(..., refresh=fop_optax.refresh_due(state))`"


def _shown(values: Any) -> str:
  """The smallest and the largest, or the one there is."""
  low, high = np.min(values), np.max(values)
  return f"{low:.3g}" if low == high or np.isnan(low) else f"{low:.3g}..{high:.3g}"

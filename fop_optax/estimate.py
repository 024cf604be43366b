"""What an optimizer will take, in bytes and FLOPs, from the shapes of its layers alone."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fop_optax import costs
from fop_optax.capture.captured import Captured
from fop_optax.costs import LayerEstimate, Saving
from fop_optax.layers import Layers
from fop_optax.optimizers.checks import check_layers
from fop_optax.which_method import Made, check_optimizer, made, what

SHOWN = 8  # lines of the table


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes and FLOPs of one device; `print` shows a table. See `fop_optax.estimate`.

  Attributes:
    optimizer: its name.
    devices: over how many devices the curvature is shared out.
    layers: what each layer takes, on all devices together.
    parameter_bytes: of the parameters.
    factor_bytes: of the running factors, on the device that holds most of the curvature.
    inverse_bytes: of inverses, eigenvectors or roots, on that device.
    other_bytes: of the rest of the state: moments, the fallback's state, counters.
    ordinary_bytes: of all that a step without refresh holds, but for activations.
    refresh_bytes: of all that one with a refresh does, and each step of a program that has both.
    ordinary_flops: of products of the curvature with the gradient, at each step; of SOAP and
      Shampoo with the gradient's second moments.
    refresh_flops: what a refresh adds: second moments of rows, and inverses, bases or roots.
    counted: whether second moments of rows are in that: rows are known, or there are none.
    savings: what would make the state smaller.

  Example:
    >>> import fop_optax, jax
    >>> params = {"w": jax.ShapeDtypeStruct((300, 10), "float32")}
    >>> x = jax.ShapeDtypeStruct((64, 300), "float32")
    >>> captured = fop_optax.capture(lambda p, x: ((x @ p["w"]) ** 2).mean(), params, x)
    >>> own = fop_optax.estimate(captured, "kfac")
    >>> print(own.factor_bytes == 4 * (300**2 + 10**2), own.layers[0].dims, own.savings[0])
    True (300, 10) Saving(how='capture(max_dim=256)', bytes=717600)
  """

  optimizer: str
  devices: int
  layers: tuple[LayerEstimate, ...]
  parameter_bytes: int
  factor_bytes: int
  inverse_bytes: int
  other_bytes: int
  ordinary_bytes: int
  refresh_bytes: int
  ordinary_flops: float
  refresh_flops: float
  counted: bool
  savings: tuple[Saving, ...]

  @property
  def state_bytes(self) -> int:
    """Of the optimizer's state."""
    return self.factor_bytes + self.inverse_bytes + self.other_bytes

  def __str__(self) -> str:
    return "\n".join([*_aligned(_rows(self.layers)), *_totals(self)])


def estimate(
  captured: Captured | Layers,
  optimizer: str | optax.GradientTransformation = "kfac",
  *,
  devices: int | None = None,
  rows: int | Sequence[int] | None = None,
  factor_dtype: jax.typing.DTypeLike | None = None,
  params: Any = None,
) -> Estimate:
  r"""Bytes and FLOPs of an optimizer before anything of it is allocated, from shapes alone.

  Bytes of the state are those that `tx.init(params)` will make: of an optimizer that is passed, or
  of one with default arguments where its name is. A step holds beside it the parameters, gradients
  and what is made of them, and at a refresh statistics of each group and new inverses next to the
  old: with default arguments within 0.15 of XLA's own account of a compiled step, whose state is
  donated, where layers have matrices and the network itself takes little. Its activations are gone
  when the update begins: they add at most what they take.

  FLOPs are those of matrix products and factorisations, as the compiled program has them. A product
  of a layer's matrix :math:`[r, o]` with both of its inverses has :math:`2 r o (r + o)`; a step has
  one of K-FAC, groups + 1 of FOP, two of EKFAC and Shampoo, three of SOAP, which for the last two
  includes second moments of the gradient. A refresh has of K-FAC, FOP and EKFAC
  :math:`2 n (r^2 + o^2)` for the second moments of n rows, and of each side d

  - K-FAC and FOP: :math:`10/3 \, d^3` up to 384, down to :math:`5/3 \, d^3` for longer ones:
    Cholesky, triangular inverse, product, of which a third to two thirds meet zeros;
  - EKFAC: :math:`11 d^3 + 2 r o d`, eigenvectors and `S` carried over; `S` of the rows comes to it;
  - SOAP: :math:`14/3 \, d^3 + 4 r o d`, a product, its QR, the first moment's turn;
  - Shampoo: :math:`11 d^3`, eigenvectors and their product.

  The loss, its gradient and what goes entry by entry are not in it, nor are further backward passes
  of `fisher="sampled"` and `"exact"`.

  Args:
    captured: what `fop_optax.capture` returned, or its `layers`.
    optimizer: `"kfac"`, `"fop"`, `"ekfac"` (`kfac(scaling="eigenvalue")`), `"soap"` or `"shampoo"`
      (both with `layers=captured.layers`); or one of these that was made, `tx`, whatever its
      `sharding`, `factor_dtype`, rates, momentum and fallback. Of one whose other options make
      other curvature `jax.eval_shape(tx.init, params)` has the shapes of the state.
    devices: with a name, over how many devices blocks of curvature have owners, as by the
      optimizer's `sharding` (its `devices`); None: one. Totals are of the device with most: of its
      slots, also those that stay empty. Examples are shared out evenly; parameters, gradients,
      statistics of a batch and moments are on each device, but of SOAP and Shampoo the moments are
      with the owners. EKFAC's bases are on each device while statistics are taken.
    rows: how many rows (examples, times tokens or pixels) each layer meets in a batch, a number for
      all or one for each; None: as many as in the batch of capture. Layers alone do not know it,
      and second moments are not counted.
    factor_dtype: with a name, in which the factors are held; None: that of the arithmetic.
    params: the parameters or their shapes, for dtypes; None: float32. An optimizer that knows their
      tree, as by a mask, needs them.

  Returns:
    An :class:`Estimate`, which prints as a table of what each layer takes, layers of one shape in
    one line, and lines on a device: totals, and what would make its state smaller.

  Raises:
    TypeError: if `captured` or `optimizer` is something else, as an optimizer's state, params or
      the function that makes an optimizer.
    ValueError: for an unknown name, an optimizer without curvature or with other than by default,
      numbers out of range, `devices` or `factor_dtype` beside an optimizer that was made, rows or
      params that do not fit the layers, and FOP of layers captured with `groups=1`.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> def loss(params, x, y):
    ...   h = jnp.tanh(x @ params["w1"] + params["b1"])
    ...   return fop_optax.softmax_cross_entropy(h @ params["w2"], y)
    >>> shape = jax.ShapeDtypeStruct
    >>> params = {"w1": shape((784, 2048), "float32"), "b1": shape((2048,), "float32")}
    >>> params |= {"w2": shape((2048, 10), "float32")}
    >>> x, y = shape((512, 784), "float32"), shape((512,), "int32")
    >>> captured = fop_optax.capture(loss, params, x, y)
    >>> estimate = fop_optax.estimate(captured, "kfac")
    >>> print(estimate)
    layers        matrices  factors  inverses   each step     refresh
    ['w1']  1 * 785 x 2048  19.2 MB   19.2 MB  9.11 GFLOP    21 GFLOP
    ['w2']   1 * 2048 x 10  16.8 MB   16.8 MB  84.3 MFLOP  19.4 GFLOP
    all                       36 MB     36 MB  9.19 GFLOP  40.4 GFLOP
    state 78.6 MB: factors 36 MB, inverses 36 MB, moments and the rest 6.51 MB
    a step holds 105 MB, one with a refresh 213 MB, activations not counted
    each step 9.19 GFLOP, a refresh 40.4 GFLOP more
    smaller by 67.1 MB: capture(max_dim=1024)
    smaller by 18 MB: factor_dtype=jnp.bfloat16
    >>> estimate.state_bytes
    78552236
    >>> tx = fop_optax.kfac(0.1, captured.layers, momentum=None)
    >>> fop_optax.estimate(captured, tx).state_bytes
    72039584
  """
  layers = _layers(captured)
  leaves = _leaves(layers, params)
  chosen = _of(optimizer, layers, leaves, params, devices, factor_dtype)
  method, devices, itemsize = costs.METHODS[chosen.name], chosen.devices, chosen.itemsize
  blocks = costs.blocks_of(method, layers, leaves)
  lengths = costs.remade_as(method, blocks)
  wide = costs.largest_share([costs.cost(method, 0, block, lengths) for block in blocks], 1)
  products = method.products(layers)
  found = [costs.cost(method, products, block, lengths, itemsize) for block in blocks]
  counts = _row_counts(captured, layers, rows) if method.of_rows else None
  if counts:
    found = [
      own._replace(statistics_flops=costs.statistics_flops(method, layer, n, counts.examples))
      for own, layer, n in zip(found, layers, counts.rows, strict=True)
    ]
  share, parameters = costs.largest_share(found, devices), _bytes(leaves)
  state = chosen.state_bytes
  if isinstance(optimizer, str):  # as it is by default, on one device
    state += share.bytes + share.moment_bytes - wide.bytes - wide.moment_bytes
  statistics = sum(costs.statistics_bytes(method, block) for block in blocks)
  gathered = sum(b.count * b.squares * b.itemsize for b in blocks) if method.squares else 0
  ordinary, refresh = method.temporaries(
    costs.Sizes(parameters, share.bytes, share.inverse_bytes, statistics, layers.groups)
  )
  return Estimate(
    optimizer=chosen.name,
    devices=devices,
    layers=tuple(found),
    parameter_bytes=parameters,
    factor_bytes=share.factor_bytes,
    inverse_bytes=share.inverse_bytes,
    other_bytes=state - share.bytes,
    ordinary_bytes=parameters + state + ordinary,
    refresh_bytes=parameters + state + refresh + (gathered if devices > 1 else 0),
    ordinary_flops=share.ordinary_flops,
    refresh_flops=share.inverse_flops + sum(own.statistics_flops for own in found) / devices,
    counted=bool(counts) or not method.of_rows,
    savings=tuple(costs.savings(method, layers, leaves, itemsize, devices)),
  )


def _layers(captured: Any) -> Layers:
  layers = captured.layers if isinstance(captured, Captured) else captured
  if not isinstance(layers, Layers):
    raise TypeError(
      f"`estimate(captured, optimizer)` took {what(captured)} for `captured`: pass what"
      " `captured = fop_optax.capture(loss, params, ...)` returned, or its `layers`."
    )
  return check_layers(layers)


def _of(
  optimizer: Any,
  layers: Layers,
  leaves: Sequence[Any],
  params: Any,
  devices: int | None,
  factor_dtype: Any,
) -> Made:
  """What is reckoned with, of a name as the optimizer is by default on one device."""
  check_optimizer(optimizer)
  if not isinstance(optimizer, str):
    for name, value in {"devices": devices, "factor_dtype": factor_dtype}.items():
      if value is not None:
        raise ValueError(
          f"`estimate({name}={value!r})` goes with the name of an optimizer. One that is made has"
          " its own: make it with that, or pass a name."
        )
    return made(optimizer, layers, leaves, params)
  devices = 1 if devices is None else devices
  if not isinstance(devices, int) or devices < 1:
    raise ValueError(f"`estimate(devices={devices!r})` takes a whole number of at least 1.")
  state = _bytes(jax.eval_shape(costs.METHODS[optimizer].make(layers).init, leaves))
  return Made(optimizer, devices, _itemsize(factor_dtype), state)


def _leaves(layers: Layers, params: Any) -> list[jax.ShapeDtypeStruct]:
  """The shapes of the parameters, in float32 where nothing is known of them."""
  if params is None:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in layers.shapes]
  leaves = layers.leaves(params, "params")
  return [jax.ShapeDtypeStruct(jnp.shape(leaf), costs.dtype_of(leaf)) for leaf in leaves]


def _itemsize(dtype: Any) -> int | None:
  if dtype is None:
    return None
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`estimate(factor_dtype={dtype!r})` takes a floating dtype, as jnp.bfloat16.")
  return jnp.dtype(dtype).itemsize


class _Counts(NamedTuple):
  rows: Sequence[int]  # of each layer
  examples: int | None  # that they are of, where it is known


def _row_counts(
  captured: Captured | Layers, layers: Layers, rows: int | Sequence[int] | None
) -> _Counts | None:
  """How many rows layers meet, where it is known."""
  if rows is None:
    return _Counts(captured.rows, captured.examples) if isinstance(captured, Captured) else None
  each = [rows] * len(layers) if isinstance(rows, int) else list(rows)
  if len(each) != len(layers) or not all(isinstance(n, int) and n > 0 for n in each):
    raise ValueError(
      f"`estimate(rows={rows!r})` takes a whole number of at least 1, or one for each of the"
      f" {len(layers)} layers."
    )
  return _Counts(each, None)


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _rows(layers: Sequence[LayerEstimate]) -> Iterator[tuple[str, ...]]:
  """Lines of the table: layers of one shape together, the largest first."""
  yield "layers", "matrices", "factors", "inverses", "each step", "refresh"
  by_shape: dict[Any, list[LayerEstimate]] = {}
  for own in layers:
    if not all(own.diagonal) or own.factor_bytes:
      by_shape.setdefault((own.dims, own.diagonal), []).append(own)
  numbers = lambda own: np.array([_numbers(x) for x in own]).sum(axis=0)
  groups = sorted(by_shape.values(), key=lambda own: tuple(numbers(own)[:2]), reverse=True)
  for own in groups[:SHOWN]:
    name = own[0].path + (f" and {len(own) - 1} more" if len(own) > 1 else "")
    yield name, _shape(own), *_short(numbers(own))
  if rest := list(itertools.chain.from_iterable(groups[SHOWN:])):
    yield f"{len(rest)} more", "", *_short(numbers(rest))
  yield "all", "", *_short(numbers(layers))


def _numbers(own: LayerEstimate) -> tuple[float, ...]:
  refresh = own.statistics_flops + own.inverse_flops
  return own.factor_bytes, own.inverse_bytes, own.ordinary_flops, refresh


def _shape(layers: Sequence[LayerEstimate]) -> str:
  """Number and sides of matrices of one shape, `d` marking a diagonal, as in capture's table."""
  (first, *_), count = layers, sum(own.blocks for own in layers)
  sides = zip(first.dims, first.diagonal, strict=True)
  return f"{count} * " + " x ".join(f"{d}{'d' if diagonal else ''}" for d, diagonal in sides)


def _short(numbers: Sequence[float]) -> list[str]:
  return [_prefixed(x, unit) for x, unit in zip(numbers, ("B", "B", "FLOP", "FLOP"), strict=True)]


def _prefixed(x: float, unit: str) -> str:
  """Three digits, a prefix and the unit."""
  prefixes = iter(("", "k", "M", "G", "T", "P"))
  prefix = next(prefixes)
  while x >= 999.5 and prefix != "P":
    x, prefix = x / 1000, next(prefixes)
  return f"{x:.3g} {prefix}{unit}"


def _aligned(rows: Iterator[tuple[str, ...]]) -> list[str]:
  """Columns, all but the first to the right."""
  lines = list(rows)
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  first = lambda line: line[0].ljust(widths[0])
  rest = lambda line: (x.rjust(n) for x, n in zip(line[1:], widths[1:], strict=True))
  return ["  ".join((first(line), *rest(line))) for line in lines]


def _totals(own: Estimate) -> Iterator[str]:
  """Sentences on one device."""
  size = lambda x: _prefixed(x, "B")
  if own.devices > 1:
    yield f"Of the device with most, of {own.devices}:"
  yield (
    f"state {size(own.state_bytes)}: factors {size(own.factor_bytes)}, inverses"
    f" {size(own.inverse_bytes)}, moments and the rest {size(own.other_bytes)}"
  )
  yield (
    f"a step holds {size(own.ordinary_bytes)}, one with a refresh {size(own.refresh_bytes)},"
    " activations not counted"
  )
  short = "" if own.counted else ", without second moments: `rows` are not known"
  yield (
    f"each step {_prefixed(own.ordinary_flops, 'FLOP')}, a refresh"
    f" {_prefixed(own.refresh_flops, 'FLOP')} more{short}"
  )
  for how, saved in own.savings:
    yield f"smaller by {size(saved)}: {how}"

"""What curvature is made of, operation by operation: how long it takes, and how accurate it is.

    python -m experiments.benchmarks.linear_algebra [--sides 768 4608] [--batch 4]

On stacks of matrices in float32, of a running second moment `S` with eigenvalues from 1 to 1e-7:

    products     S V in the precisions that `jax.numpy.matmul` has; error against float64
    moments      X'X of 2^17 rows in bfloat16 and in float32, at once and in parts
    inverses     of S + 1e-3 I: by Cholesky as the library does, `cho_solve` of the identity, `inv`
    bases        Q <- orthonormal columns of S Q, from a Q that is near the eigenvectors: by QR, by
                 Cholesky of the Gram matrix (once, twice), by five steps of Newton-Schulz; error is
                 the largest entry of |Q'Q - I|
    eigenvectors `eigh`

Times are medians of alternating runs, ratios are to the first line of each part.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import statistics
import sys
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import timing
from fop_optax.curvature.polar import newton_schulz
from fop_optax.curvature.positive import positive_inverse

HIGHEST = lax.Precision.HIGHEST
PRECISIONS: dict[str, Any] = {
  "float32 (highest)": HIGHEST,
  "default": None,
  "TF32 three times": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
  "bfloat16 six times": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
  "bfloat16 nine times": lax.DotAlgorithmPreset.BF16_BF16_F32_X9,
}
ROWS = 2**17


@dataclasses.dataclass(frozen=True)
class Config:
  """What to time.

  Attributes:
    sides: sides of the matrices.
    batch: how many of them in a stack.
    parts: of products, moments, inverses, bases, eigenvectors.
    rounds: rounds of alternating windows.
    steps: calls in a window.
    compile_threads: how many operations are compiled at a time.
    out: a CSV file to write.
  """

  sides: tuple[int, ...] = (768, 4608)
  batch: int = 4
  parts: tuple[str, ...] = ("products", "moments", "inverses", "bases", "eigenvectors")
  rounds: int = 5
  steps: int = 3
  compile_threads: int = 1
  out: str | None = None


@functools.cache
def second_moment(side: int, batch: int) -> jax.Array:
  """`[batch, side, side]`, eigenvalues from 1 to 1e-7 evenly in their logarithm."""
  random = np.random.default_rng(0)
  basis = np.linalg.qr(random.normal(size=(side, side)))[0]
  S = (basis * np.logspace(0, -7, side)) @ basis.T
  return jnp.asarray(np.stack([S * (1 + 0.1 * i) for i in range(batch)]), jnp.float32)


Operation = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], float]]


def products(side: int, batch: int) -> dict[str, Operation]:
  S = second_moment(side, batch)
  V = jax.random.normal(jax.random.key(0), S.shape)
  exact = np.asarray(S[0], np.float64) @ np.asarray(V[0], np.float64)
  error = lambda out: float(np.linalg.norm(np.asarray(out[0]) - exact) / np.linalg.norm(exact))
  multiply = lambda precision: functools.partial(jnp.matmul, precision=precision)
  return {name: (multiply(precision), (S, V), error) for name, precision in PRECISIONS.items()}


def moments(side: int, batch: int) -> dict[str, Operation]:
  del batch
  X = jax.random.normal(jax.random.key(0), (ROWS, side), jnp.bfloat16)
  trace = float(np.sum(np.asarray(X[:, 0], np.float64) ** 2))
  error = lambda out: abs(float(out[0, 0]) / trace - 1)

  def moment(parts, precision, X):
    X = X.reshape(parts, -1, side)
    product = lambda precision, X: lax.dot_general(
      X, X, (((1,), (1,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32
    )
    return product(precision, X).sum(0)

  out: dict[str, Operation] = {}
  for parts in (1, 4, 16):
    out[f"bfloat16, {parts} parts"] = functools.partial(moment, parts, HIGHEST), (X,), error
  wide = X.astype(jnp.float32)
  for name, precision in PRECISIONS.items():
    out[name] = functools.partial(moment, 4, precision), (wide,), error
  return out


def inverses(side: int, batch: int) -> dict[str, Operation]:
  S = second_moment(side, batch) + 1e-3 * jnp.eye(side)
  inverse = np.linalg.inv(np.asarray(S[0], np.float64))
  size = np.linalg.norm(inverse)
  error = lambda out: float(np.linalg.norm(np.asarray(out[0]) - inverse) / size)
  solved = lambda S: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(S), True), jnp.eye(side))
  return {
    "by Cholesky": (jax.vmap(positive_inverse), (S,), error),
    "cho_solve": (jax.vmap(solved), (S,), error),
    "inv": (jnp.linalg.inv, (S,), error),
    "Cholesky factor alone": (jnp.linalg.cholesky, (S,), lambda out: float("nan")),
  }


def bases(side: int, batch: int) -> dict[str, Operation]:
  S = second_moment(side, batch)
  turn = 1e-2 * jax.random.normal(jax.random.key(1), S.shape) / side**0.5
  Q = jnp.linalg.qr(jnp.linalg.eigh(S)[1][..., ::-1] + turn)[0]
  product = functools.partial(jnp.matmul, precision=HIGHEST)

  def error(Q):
    own = np.asarray(Q[0], np.float64)
    return float(np.abs(own.T @ own - np.eye(side)).max())

  def columns(S, Q):
    X = product(S, Q)
    return X / jnp.linalg.norm(X, axis=-2, keepdims=True)

  def cholesky(X):
    root = jnp.linalg.cholesky(product(jnp.swapaxes(X, -1, -2), X))
    return lax.linalg.triangular_solve(root, X, left_side=False, lower=True, transpose_a=True)

  quintic = [(15 / 8, -10 / 8, 3 / 8)] * 5
  return {
    "QR": (lambda S, Q: jnp.linalg.qr(product(S, Q))[0], (S, Q), error),
    "Cholesky": (lambda S, Q: cholesky(columns(S, Q)), (S, Q), error),
    "Cholesky twice": (lambda S, Q: cholesky(cholesky(columns(S, Q))), (S, Q), error),
    "Newton-Schulz": (lambda S, Q: newton_schulz(columns(S, Q), quintic), (S, Q), error),
  }


def eigenvectors(side: int, batch: int) -> dict[str, Operation]:
  S = second_moment(side, batch)
  error = lambda out: float(np.abs(np.asarray(out[0][0][-1]) - 1))
  return {"eigh": (jnp.linalg.eigh, (S,), error)}


PARTS = {own.__name__: own for own in (products, moments, inverses, bases, eigenvectors)}


def _compiled(operation: Operation) -> Any:
  """Compiled, or why it is not."""
  function, arguments, _ = operation
  try:
    return jax.jit(function).lower(*arguments).compile()
  except (ValueError, jax.errors.JaxRuntimeError) as refused:
    return refused


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  part: str
  side: int
  batch: int
  operation: str
  milliseconds: float
  ratio: float
  error: float


def measure(part: str, side: int, config: Config) -> list[Row]:
  """All lines of one part; an operation that the device does not have is left out."""
  operations = PARTS[part](side, config.batch)
  with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:
    made = dict(zip(operations, pool.map(_compiled, operations.values()), strict=True))
  windows, errors = {}, {}
  for name, (_, arguments, error) in operations.items():
    compiled = made[name]
    if isinstance(compiled, Exception):
      print(f"{part}, {name}: {str(compiled).splitlines()[0]}")
      continue

    def window(steps, compiled=compiled, arguments=arguments):
      return [compiled(*arguments) for _ in range(steps)][-1]

    windows[name], errors[name] = window, error(compiled(*arguments))
  seconds = timing.alternate(windows, config.steps, config.rounds)
  first = next(iter(windows))
  return [
    Row(
      part,
      side,
      config.batch,
      name,
      1e3 * statistics.median(own),
      timing.ratio(own, seconds[first])[0],
      errors[name],
    )
    for name, own in seconds.items()
  ]


def table(rows: list[Row]) -> Table:
  """The lines as a table."""
  out = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  for heading in ("part", "side", "stack", "operation", "ms", "ratio", "error"):
    out.add_column(heading, no_wrap=True)
  for row in rows:
    numbers = f"{row.milliseconds:.3f}", f"{row.ratio:.2f}", f"{row.error:.1e}"
    out.add_row(row.part, str(row.side), str(row.batch), row.operation, *numbers)
  return out


def main(config: Config) -> None:
  console = Console() if sys.stdout.isatty() else Console(width=110)
  rows: list[Row] = []
  for side in config.sides:
    for part in config.parts:
      own = measure(part, side, config)
      rows += own
      console.print(table(own))
  if config.out:
    console.print("saved", timing.save(rows, config.out))


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.linear_algebra"))

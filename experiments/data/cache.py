"""Files made once and read from then on, whole or not there."""

from collections.abc import Callable
import contextlib
import os
import pathlib
import tempfile
from typing import TypeVar
import warnings
import zipfile

import numpy as np

T = TypeVar("T")


def folder() -> pathlib.Path:
  """`$FOP_OPTAX_CACHE`, else `fop_optax` under `$XDG_CACHE_HOME`, else under `~/.cache`."""
  if chosen := os.environ.get("FOP_OPTAX_CACHE"):
    return pathlib.Path(chosen).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fop_optax"


@contextlib.contextmanager
def replacing(path: pathlib.Path):
  """A binary file to write, beside `path`, that takes its place when all is written.

  A process killed meanwhile leaves no half of a file at `path`, and of two that write at once the
  later one stays; an exception leaves nothing.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
    os.replace(name, path)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise


def arrays(key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The arrays that `make` gives, from the cache where they are.

  Args:
    key: file name without ending. It has all in it that the arrays depend on.
    make: called where no file of that name is, or where it cannot be read.

  Where the cache cannot be written there is a warning, and the arrays are made every time.
  """
  path = folder() / f"{key}.npz"
  try:
    with np.load(path) as file:
      return dict(file)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    made = make()
  try:
    with replacing(path) as file:
      np.savez(file, **made)  # as they are: compressed, reading would take longer than decoding
  except OSError as error:
    warnings.warn(f"Not cached: {error}. $FOP_OPTAX_CACHE may name another folder.", stacklevel=2)
  return made

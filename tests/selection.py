"""Which rows of a table the default tests take; the others are slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(rows: Iterable[Any], *quick: str, name=str) -> list[Any]:
  """Parameters for `pytest.mark.parametrize`: those not named are slow."""
  rows = list(rows)
  names = [name(row) for row in rows]
  missing = set(quick) - set(names)
  assert not missing, missing
  return [
    pytest.param(row, id=own, marks=() if own in quick else pytest.mark.slow)
    for row, own in zip(rows, names, strict=True)
  ]

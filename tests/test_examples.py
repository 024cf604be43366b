"""The examples train, and go on where they stopped."""

import importlib

import jax
import numpy as np
import pytest

slow = pytest.mark.slow


@pytest.mark.parametrize(
  "name",
  [
    "nnx_digits",
    pytest.param("linen_digits", marks=slow),
    pytest.param("equinox_digits", marks=slow),
  ],
)
def test_an_example_goes_on_where_it_stopped(name, tmp_path, capsys):
  main = importlib.import_module(f"experiments.examples.{name}").main
  whole, accuracy = main(str(tmp_path / "whole"), steps=20, every=4)
  assert accuracy > 0.9
  # the rate's schedule is that of all steps: stopped, not shortened
  with pytest.raises(RuntimeError, match="stopped"), pytest.MonkeyPatch.context() as patch:
    patch.setattr("builtins.print", stop_at("step    8"))
    main(str(tmp_path / "stopped"), steps=20, every=4)
  capsys.readouterr()
  again, _ = main(str(tmp_path / "stopped"), steps=20, every=4)
  printed = capsys.readouterr().out
  assert "step    4" not in printed and "step    8" in printed
  assert int(again.step) == 20
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def stop_at(start):
  def printed(text):
    if text.startswith(start):
      raise RuntimeError("stopped")

  return printed

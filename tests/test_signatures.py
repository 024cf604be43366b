"""Keyword lists that several functions repeat are the same list."""

import dataclasses
import inspect

import pytest

import fop_optax
from fop_optax.optimizers.neumann import NeumannOptions
from fop_optax.optimizers.shampoo_options import ShampooOptions
from fop_optax.optimizers.soap_options import SoapOptions

METHODS = ("kfac", "fop", "kfac_per_example", "fop_per_example", "soap", "shampoo", "neumann")
# A direction has no rate, and no constraint unless it is told the rate.
OWN = {"learning_rate", "norm_constraint"}


def parameters(name):
  return inspect.signature(getattr(fop_optax, name)).parameters


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_its_direction_takes(name):
  whole, direction = parameters(name), parameters(f"scale_by_{name}")
  for argument, own in direction.items():
    assert argument in whole
    if argument not in OWN:
      assert own.default == whole[argument].default, argument
  shared = [argument for argument in direction if argument not in OWN]
  assert shared == [argument for argument in whole if argument in shared]


@pytest.mark.parametrize("pair", [("kfac", "fop"), ("kfac_per_example", "fop_per_example")])
def test_fop_is_kfac_with_more_arguments(pair):
  kfac, fop = map(parameters, pair)
  assert {name: own.default for name, own in kfac.items()}.items() <= {
    name: own.default for name, own in fop.items()
  }.items()


@pytest.mark.parametrize(
  ("name", "options", "renamed"),
  [
    ("soap", SoapOptions, {}),
    ("shampoo", ShampooOptions, {"grafting": "graft", "graft_b2": "graft", "graft_eps": "graft"}),
    ("neumann", NeumannOptions, {}),
  ],
)
def test_options_are_the_arguments_of_the_direction(name, options, renamed):
  fields = {field.name for field in dataclasses.fields(options)}
  assert {renamed.get(own, own) for own in parameters(f"scale_by_{name}")} == fields

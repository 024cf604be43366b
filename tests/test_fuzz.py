"""Random networks in random spellings against explicit gradients and factors, none silently wrong.

The slow tests draw the same 200 networks every time; `FUZZ_EXAMPLES=n` draws n new ones. A failure
prints the network's specification: `check(<specification>)` with the names of `networks` imported
reproduces it.
"""

import contextlib
import functools
import os
import random

import explicit
import hypothesis
from hypothesis import HealthCheck
import jax
import networks
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
FIRST = random.randrange(10**9) if "FUZZ_EXAMPLES" in os.environ else 300_000
PARTS = 4  # that workers can share them
FUZZ = {
  "deadline": None,
  "database": None,
  "print_blob": False,
  "suppress_health_check": list(HealthCheck),
  "phases": [hypothesis.Phase.generate],  # to shrink takes minutes, and the networks are small
}


@hypothesis.settings(max_examples=2, derandomize=True, **FUZZ)
@hypothesis.given(network=networks.networks)
def test_a_few_random_networks(network):
  check(network)


@hypothesis.settings(max_examples=10, derandomize=True, **FUZZ)
@hypothesis.given(network=networks.networks)
def test_layers_of_a_few_random_networks(network):
  captured(network, network.data())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part):
  for network in drawn(range(part, EXAMPLES, PARTS)):
    with printed(network):
      check(network)


@pytest.mark.slow
def test_layers_of_random_networks():
  for network in drawn(range(EXAMPLES, 3 * EXAMPLES)):
    with printed(network):
      captured(network, network.data())  # which takes a fraction of what factors take


def drawn(numbers):
  return (networks.draw_network(random.Random(FIRST + number)) for number in numbers)


@contextlib.contextmanager
def printed(network):
  """An error in it says which network it is of."""
  try:
    yield
  except Exception as error:
    error.add_note(f"check({network})")
    raise


compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def captured(network, data):
  """The captured loss, each parameter in a layer or not as the specification demands."""
  capture = fop_optax.capture(
    network.spelled,
    *data,
    has_aux=network.aux,
    groups=network.groups,
    micro_batches=network.micro_batches,
    fisher=network.fisher,
  )
  check_roles(capture, network.roles())
  return capture


def check(network):
  """Compares everything that capture gives of a network with the explicit sums."""
  params, x, y = data = network.data()
  capture = captured(network, data)
  marked = network.marked if network.fisher == "exact" else None
  expected = explicit.evaluate(
    network.canonical, params, x, y, network.groups, network.terms, compiled, marked
  )
  single = any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  for fresh, (loss, grads, stats) in results(capture, network.refresh, *data):
    loss, aux = loss if network.aux else (loss, None)
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-6 if single else 1e-11)
    check_gradients(grads, stats.contrasts, expected.grads)
    if network.aux:
      np.testing.assert_array_equal(aux["doubled"], 2 * x)  # examples come back in their order
      np.testing.assert_allclose(aux["loss"], loss, rtol=1e-6)  # other floats averaged
    assert bool(stats.refresh) == fresh
    if fresh:
      check_factors(capture.layers, stats.factors, params, expected.matrices)
    else:
      assert not any(np.any(factor) for factor in jax.tree.leaves(stats.factors))


def results(capture, refresh, *args):
  """What `value_and_grad` gives, compiled once, as pairs of whether it has statistics and that."""
  call = capture.value_and_grad
  if refresh == "traced":
    step = compiled(lambda fresh, *args: call(*args, refresh=fresh))
    return [(fresh, step(fresh, *args)) for fresh in (True, False)]
  wanted = (True, False) if refresh == "both" else (True,)
  step = compiled(lambda *args: [call(*args, refresh=fresh) for fresh in wanted])
  return list(zip(wanted, step(*args), strict=True))


def check_roles(capture, roles):
  """Every parameter is in a layer or has a reason, as the specification demands."""
  flat, _ = jax.tree_util.tree_flatten_with_path(roles)
  for leaf, (path, role) in enumerate(flat):
    name = jax.tree_util.keystr(path)
    in_layer, why = leaf in capture.layers.covered, capture.fallbacks.get(name)
    if role != "either":
      assert in_layer == (role != "fallback"), f"{name} should be {role}, but: {why or 'a layer'}"
    assert in_layer != bool(why and why.strip()), (
      f"{name}: in no layer without a reason, or in both"
    )


def check_gradients(grads, contrasts, by_group):
  """The mean gradient, and the orthogonal contrasts of the groups' gradients."""
  groups = [jax.tree.leaves(group) for group in by_group]
  for i, mine in enumerate(jax.tree.leaves(grads)):
    assert mine.dtype == groups[0][i].dtype
    each = np.stack([np.asarray(group[i], np.float64) for group in groups])
    tolerance = (1e-10 if mine.dtype == np.float64 else 1e-5) * (np.abs(each).max() + 1e-3)
    np.testing.assert_allclose(mine, each.mean(0), rtol=0, atol=tolerance)
    assert len(contrasts) == len(groups) - 1
    for k, contrast in enumerate(contrasts, 1):  # g_1 - g_2; next what is orthogonal to it, ...
      wanted = (each[:k].mean(0) - each[k]) * np.sqrt(2 * k / (k + 1))
      np.testing.assert_allclose(jax.tree.leaves(contrast)[i], wanted, rtol=0, atol=tolerance)


def check_factors(layers, factors, params, matrices):
  """Each matrix of each layer is one of the network's, up to the order of its features.

  Parameters are distinct random numbers, so that an entry's value says where it belongs.
  """
  leaves = jax.tree.leaves(params)
  home = {value: key for key, matrix in matrices.items() for value in matrix.w.flat}
  seen = set()
  for layer, (A, G) in zip(layers, factors, strict=True):
    weights = np.asarray(layer.gather(leaves), np.float64)
    assert (A.shape, G.shape) == layer.factor_shapes
    tolerance = 1e-9 if leaves[layer.weight].dtype == np.float64 else 1e-4
    for place in range(layer.stack):
      w, b = weights[place, : layer.inputs], weights[place, layer.inputs :]
      key = home[w[0, 0]]
      matrix = matrices[key]
      assert key not in seen, f"{layer.path}: {key} is in two layers"
      seen.add(key)
      rows = [np.flatnonzero(np.any(matrix.w == value, axis=1))[0] for value in w[:, 0]]
      columns = [np.flatnonzero(np.any(matrix.w == value, axis=0))[0] for value in w[0]]
      np.testing.assert_array_equal(matrix.w[np.ix_(rows, columns)], w)
      assert w.shape == matrix.w.shape
      if layer.biases:
        if matrix.b is not None:
          np.testing.assert_array_equal(matrix.b[columns], b[0])
        for bias in layer.biases:
          assert parent(layers.paths[bias.leaf]) == parent(layers.paths[layer.weight])
        rows.append(-1)
      wanted = matrix.A[np.ix_(rows, rows)]
      wanted = np.diag(wanted) if layer.diagonal[0] else wanted
      close(A[place], wanted, tolerance, f"A of {key}")
      close(G[place], matrix.G[np.ix_(columns, columns)], tolerance, f"G of {key}")


def close(got, wanted, tolerance, what):
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale + 1e-25, err_msg=what)


def parent(path):
  return path.rpartition("[")[0]

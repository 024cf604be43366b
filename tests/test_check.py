"""`Captured.check`: what holds of right losses, and what is said of wrong ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax
from fop_optax.capture.check import Finding

N, D, C = 6, 3, 2
RNG = np.random.default_rng(0)
W, X = (jnp.asarray(RNG.normal(size=shape), "float32") for shape in ((D, C), (N, D)))
P = {"w": W, "b": jnp.ones(C)}


def outputs(p, x):
  return x @ p["w"] + p["b"]


def mean(p, x):
  return jnp.mean(outputs(p, x) ** 2)


def recurrent(p, x):  # its leading axis is time
  step = lambda h, x: (0.9 * h + jnp.tanh(outputs(p, x)), None)
  h, _ = jax.lax.scan(step, jnp.zeros(C), x)
  return jnp.mean(h**2)


def contrastive(p, x):
  scores = outputs(p, x) @ outputs(p, x).T
  return jnp.mean(jax.nn.logsumexp(scores, 1) - jnp.diag(scores))


def pairs(p, x):
  z = outputs(p, x)
  return jnp.mean((z[:, None] - z[None]) ** 4)


def frozen(p, x):
  return mean(p | {"b": jax.lax.stop_gradient(p["b"])}, x)


def noisy(p, x):
  return mean(p, x + RNG.normal(size=x.shape).astype("float32"))


def zeros(p, x):
  return mean(p, 0 * x)


# loss, what does not hold of it (False) or cannot be tried (None), and the words of it
CASES = {
  "sum": (lambda p, x: jnp.sum(outputs(p, x) ** 2), {"mean": False, "pieces": False},
          r"twice the loss \(.*\). It is a sum over the examples.*take `jnp.mean`"),
  "sum over a number": (lambda p, x: jnp.sum(outputs(p, x) ** 2) / N,
                        {"mean": False, "pieces": False}, r"divided by a number written into it"),
  "sum in part": (lambda p, x: mean(p, x) + jnp.sum(jnp.tanh(outputs(p, x))),
                  {"mean": False, "pieces": False}, r"no mean .* A part of it is a sum"),
  "one batch size": (lambda p, x: mean(p, x.reshape(N, D)), {"mean": None, "pieces": None},
                     r"cannot be evaluated on the batch taken twice, 12 examples: cannot reshape"),
  "time first": (recurrent, {"mean": False, "order": False, "pieces": False},
                 r"another order have another loss .* not that of examples \(time first\?\)"),
  "aligned": (lambda p, x: jnp.mean(outputs(p, x)[:, 0] * jnp.resize(jnp.arange(N), len(x))),
              {"order": False, "pieces": False}, r"an array in the order of the batch"),
  "contrastive": (contrastive, {"mean": False, "pieces": False}, r"examples interact \(pairs"),
  "pairs": (pairs, {"pieces": False}, r"2 pieces is not the loss .*examples interact .*one piece"),
  "frozen": (frozen, {"reached": False}, r"gradient of \['b'\] is zero: unused, frozen"),
  "zeros": (zeros, {"reached": False, "statistics": False}, r"Of the statistics A of \['w'\] is"),
  "NumPy's numbers": (noisy, {"repeatable": False, "mean": None, "order": None, "pieces": None,
                              "gradient": None}, r"Evaluated again the loss is another"),
  "not finite": (lambda p, x: mean(p, x / 0), {"finite": False, "mean": None, "order": None,
                 "pieces": None, "gradient": None, "statistics": False}, r"it comes of the loss"),
}  # fmt: skip


SLOW = {"sum over a number", "sum in part", "aligned", "zeros"}  # siblings of the others


def run(captured, *args, **options):
  """The findings by name."""
  return {finding.name: finding for finding in captured.check(*args, **options)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # capture itself says some of it
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_a_wrong_loss_is_told(name, capsys):
  loss, wrong, words = CASES[name]
  params = {"w": W} if name == "zeros" else P
  loss = (lambda p, x, loss=loss: loss(p | {"b": 0.0}, x)) if name == "zeros" else loss
  found = run(fop_optax.capture(loss, params, X), params, X)
  assert {name: finding.holds for name, finding in found.items() if not finding.holds} == wrong
  printed = capsys.readouterr().out.splitlines()
  assert printed == list(map(str, found.values()))
  assert any(re.search(words, line) for line in printed)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_right_loss_holds(dtype, capsys):
  def loss(p, x, weight):
    z = outputs(jax.tree.map(lambda a: a.astype(dtype), p), x.astype(dtype))
    return weight * jnp.mean(z**2), {"z": z, "mean": jnp.mean(z), "right": z[:, 0] > 0}

  captured = fop_optax.capture(loss, P, X, 0.5, has_aux=True, groups=2)
  found = run(captured, P, X, 0.5)
  assert list(found) == ["finite", "repeatable", "mean", "order", "pieces", "gradient", "aux",
                         "reached", "statistics"]  # fmt: skip
  assert all(finding.holds for finding in found.values())
  assert all(line.startswith("holds: ") for line in capsys.readouterr().out.splitlines())


def test_what_counts_as_the_same_is_said_where_something_does_not_hold():
  loss = lambda p, x: jnp.sum(outputs(p, x) ** 2)
  found = run(fop_optax.capture(loss, P, X), P, X)
  assert "Computed in float32, 0.0003 apart would count as the same." in found["mean"].text
  assert "Computed" not in found["finite"].text


def test_what_is_not_finite_is_named():
  found = run(fop_optax.capture(mean, P, X), P, X.at[1, 2].set(np.nan))
  assert "gradient of ['b'], ['w'] is not finite: 1 of 18 entries of args[0] are not" in (
    found["finite"].text
  )
  assert "A of ['w'] is not finite" in found["statistics"].text


def test_batch_statistics_differ_as_they_should():
  def loss(p, x):
    z = outputs(p, x)
    z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-3)
    return jnp.mean((z - 1) ** 4), {"variance": x.var(0)}

  found = run(fop_optax.capture(loss, P, X, has_aux=True, groups=2), P, X)
  assert {name for name, finding in found.items() if not finding.holds} == {"pieces", "aux"}
  assert "as it should be with BatchNorm" in found["pieces"].text
  assert "aux['variance'] (norm " in found["aux"].text


def test_random_numbers_of_a_key_are_compared_with_themselves_only():
  loss = lambda p, x, key: mean(p, x * jax.random.bernoulli(key, 0.5, x.shape))
  key = jax.random.key(0)
  captured = fop_optax.capture(loss, P, X, key, groups=2)
  found = run(captured, P, X, key)
  assert {name for name, finding in found.items() if finding.holds is None} == {
    "mean", "order", "pieces"}  # fmt: skip
  assert "draws other random numbers from the key" in found["pieces"].text
  assert found["gradient"].holds


def test_a_wrong_gradient_would_be_seen(monkeypatch):
  captured = fop_optax.capture(mean, P, X)
  right = type(captured).value_and_grad

  def wrong(self, *args, **kwargs):
    loss, grads, stats = right(self, *args, **kwargs)
    return loss, grads | {"b": 1.01 * grads["b"]}, stats

  monkeypatch.setattr(type(captured), "value_and_grad", wrong)
  finding = run(captured, P, X)["gradient"]
  assert finding.holds is False
  assert "are not those of `jax.grad` of the loss" in finding.text


def test_errors_are_those_of_value_and_grad_and_of_jit():
  captured = fop_optax.capture(mean, P, X, groups=2)
  with pytest.raises(ValueError, match="batch of 5 cannot be divided"):
    captured.check(P, X[:5])
  with pytest.raises(ValueError, match=r"call it outside of `jax.jit`, once before training"):
    jax.jit(captured.check)(P, X)


def test_a_finding_is_a_sentence():
  assert str(Finding("mean", None, "Why.")) == "not tried: Why."

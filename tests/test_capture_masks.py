"""How many terms count where the mean of a loss has weights: G against explicit sums over terms.

One layer without bias, `logits = x w`, whose gradient of term i is `p_i - onehot(y_i)`, in NumPy.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
N, T, D, C = 8, 5, 3, 4
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(D, C))}
X, Y = RNG.normal(size=(N, T, D)), RNG.integers(C, size=(N, T))
MASK = (RNG.random((N, T)) < 0.4).astype(float)
MASK[:, 0] = 1
WEIGHTS = RNG.random((N, T))


def terms(p, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(x @ p["w"], y)


def marked(p, x, y):
  return jax.vmap(jax.vmap(fop_optax.softmax_cross_entropy))(x @ p["w"], y)


def weighted(v, m):
  return (v * m).sum() / m.sum()


def of_each(v, m):
  return jnp.mean((v * m).sum(1) / jnp.maximum(m.sum(1), 1.0))


def G(reduce, weights=MASK, of=terms, **options):
  loss = lambda p, x, y, m: reduce(of(p, x, y), m)
  captured = fop_optax.capture(loss, PARAMS, X, Y, weights, **options)
  _, _, stats = jax.jit(captured.value_and_grad)(PARAMS, X, Y, weights)
  assert stats.factors[0].G.dtype == float
  return np.asarray(stats.factors[0].G[0]), captured.notes


def chunks(groups=1, micro_batches=1):
  """The arrays of each chunk: example i is in group i mod groups."""
  cut = lambda a: np.asarray(a).reshape(-1, micro_batches * groups, *a.shape[1:])
  return [[cut(a)[:, i] for a in (X, Y, MASK, WEIGHTS)] for i in range(micro_batches * groups)]


def expected(x, y, u):
  """`n sum_i (u_i g_i) (u_i g_i)'` with `n = (sum u)^2 / sum u^2`, u adding up to one."""
  g = u[..., None] * (np.asarray(jax.nn.softmax(x @ PARAMS["w"])) - np.eye(C)[y])
  return u.sum() ** 2 / (u**2).sum() * np.einsum("ntc,ntd->cd", g, g)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12)


FORMS = {
  "weighted": weighted,
  "at least one": lambda v, m: (v * m).sum() / jnp.maximum(m.sum(), 1.0),
  "average": lambda v, m: jnp.average(v, weights=m),
  "mean of means": lambda v, m: jnp.mean(v * m) / jnp.mean(m),
  "two sums": lambda v, m: (v * m).sum(1).sum() / m.sum(0).sum(),
  "normalised": lambda v, m: jnp.sum(v * (m / m.sum())),
  "dot": lambda v, m: jnp.vdot(v, m) / m.sum(),
  "within": lambda v, m: jax.checkpoint(jax.jit(weighted))(v, m),
  "two terms": lambda v, m: ((v * m).sum() + 0.3 * (0 * v * m).sum()) / m.sum(),
}


@pytest.mark.parametrize("name", FORMS)
def test_terms_that_count(name):
  """Of a mask their number; the size of weights makes no difference."""
  ((x, y, mask, w),) = chunks()
  got, notes = G(FORMS[name])
  g = np.asarray(jax.nn.softmax(x @ PARAMS["w"])) - np.eye(C)[y]
  close(got, np.einsum("nt,ntc,ntd->cd", mask, g, g) / mask.sum())
  assert any("5 terms an example, less what its weights leave out, from" in n for n in notes)
  if name == "weighted":
    for scale in (1.0, 1e-3, 1e3):
      close(G(weighted, scale * WEIGHTS)[0], expected(x, y, w / w.sum()))
    close(G(weighted, 7.0 + 0 * MASK)[0], G(lambda v, m: v.mean())[0])


def test_a_mask_by_where():
  for reduce in (
    lambda v, m: jnp.mean(v, where=m > 0),
    lambda v, m: jnp.where(m > 0, v, 0).sum() / (m > 0).sum(),
  ):
    close(G(reduce)[0], G(weighted)[0])


def test_with_a_mark_and_a_number_given():
  close(G(weighted, of=marked)[0], G(weighted)[0])
  got, notes = G(weighted, terms_per_example=T)
  close(got * float(MASK.sum()) / MASK.size, G(weighted)[0])
  assert not notes


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 2, "micro_batches": 4}])
@pytest.mark.parametrize("reduce", [weighted, of_each])
def test_each_chunk_has_its_own_count(reduce, options):
  def of_chunk(x, y, mask, w):
    return expected(
      x, y, mask / (mask.sum() if reduce is weighted else len(mask) * mask.sum(1)[:, None])
    )

  close(G(reduce, **options)[0], np.mean([of_chunk(*chunk) for chunk in chunks(**options)], axis=0))


def test_statistics_that_are_formed_otherwise():
  """Sums by example, every other example, second moments, a loss scale."""
  x, y, mask, _ = chunks()[0]
  g = mask[..., None] * (np.asarray(jax.nn.softmax(x @ PARAMS["w"])) - np.eye(C)[y])
  n, sums = mask.sum(), g.sum(1)
  close(G(weighted, sharing="reduce")[0], np.einsum("nc,nd->cd", sums, sums) / n)
  half = g[::2].reshape(-1, C)
  close(G(weighted, curvature_fraction=0.5)[0], 2 * half.T @ half / n)

  captured = fop_optax.capture(lambda p, *a: weighted(terms(p, *a[:2]), a[2]), PARAMS, X, Y, MASK)
  tx = fop_optax.kfac(0.1, captured.layers, scaling="eigenvalue")
  basis = fop_optax.bases(tx.init(PARAMS))
  with_basis = jax.jit(lambda *a: captured.value_and_grad(PARAMS, *a, basis=basis, loss_scale=8.0))
  _, _, stats = with_basis(X, Y, MASK)
  close(stats.factors[0].G[0], G(weighted)[0])
  V = np.einsum("ntd,ntc->ndc", x, g)
  A, Q = (
    np.eye(k) if b is None else np.asarray(b[0]) for k, b in ((D, basis[0].A), (C, basis[0].G))
  )
  close(stats.second_moments[0][0], ((A.T @ V @ Q) ** 2).sum(0) / n)
  _, _, none = with_basis(X, Y, 0 * MASK + 1e-30)
  assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(none))


def test_in_shard_map_the_count_is_the_device_s_own():
  captured = fop_optax.capture(lambda p, *a: weighted(terms(p, *a[:2]), a[2]), PARAMS, X, Y, MASK)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  own = lambda p, *a: jax.lax.pmean(captured.value_and_grad(p, *a)[2].factors[0].G, "data")
  split = PartitionSpec("data")
  mapped = jax.shard_map(
    own, mesh=mesh, in_specs=(PartitionSpec(), split, split, split), out_specs=PartitionSpec()
  )
  cut = lambda a: np.asarray(a).reshape(4, -1, *a.shape[1:])
  by_device = [expected(x, y, m / m.sum()) for x, y, m in zip(*map(cut, (X, Y, MASK)), strict=True)]
  close(jax.jit(mapped)(PARAMS, X, Y, MASK)[0], np.mean(by_device, axis=0))


UNCLEAR = {
  "two masks": (lambda v, m: weighted(v, m) + weighted(v, m[:, ::-1]), N * T),
  "lengths": (lambda v, m: (v * m).sum() / m.sum(1).max() / len(v), N),
  "of the examples": (lambda v, m: (v * m).sum() / m[:, 0].sum(), N),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_not_clear_counts_by_shapes(name):
  reduce, count = UNCLEAR[name]
  got, notes = G(reduce)
  loss = lambda z: reduce(optax.softmax_cross_entropy_with_integer_labels(z, Y), jnp.asarray(MASK))
  dy = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(X @ PARAMS["w"]))).reshape(-1, C)
  close(got, count * dy.T @ dy)
  assert not any("leave out" in note for note in notes)

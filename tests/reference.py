"""K-FAC and FOP for one layer, dense and step by step, in NumPy: a reference written separately."""

import numpy as np


def damped_inverse(A, G, damping, scaling):
  """The inverse of the damped Fisher block as one explicit matrix, on row-major vectors."""
  if scaling == "exact":
    return np.linalg.inv(np.kron(A, G) + damping * np.eye(len(A) * len(G)))
  pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
  A = A + pi * np.sqrt(damping) * np.eye(len(A))
  G = G + np.sqrt(damping) / pi * np.eye(len(G))
  return np.linalg.inv(np.kron(A, G))


class Reference:
  """The optimizer of one layer; `step` takes what one step brings and returns the update."""

  def __init__(
    self, rate, damping, decay, momentum, scaling, statistics_period, inverse_period, fop, relative,
    held="float64",
  ):  # fmt: skip
    self.rate, self.damping, self.decay, self.momentum = rate, damping, decay, momentum
    self.statistics_period, self.inverse_period = statistics_period, inverse_period
    self.scaling, self.fop, self.relative, self.held = scaling, fop, relative, held
    self.count, self.folds, self.trace, self.log = 0, 0, 0.0, []

  def step(self, A, G, average, contrast):
    if self.count % self.statistics_period(self.count) == 0:
      if self.folds == 0:
        self.A, self.G = A, G
      else:
        weight = min(1 - 1 / (self.folds + 1), self.decay)
        self.A, self.G = (
          weight * self.A + (1 - weight) * A,
          weight * self.G + (1 - weight) * G,
        )
      self.A, self.G = (x.astype(self.held).astype("float64") for x in (self.A, self.G))
      self.folds += 1
    if self.count % self.inverse_period(self.count) == 0:
      mean = np.linalg.eigvalsh(np.kron(self.A, self.G)).mean()
      damping = self.damping(self.count) + self.relative(self.count) * mean
      self.inverse = damped_inverse(self.A, self.G, damping, self.scaling)
    g = average.reshape(-1)
    direction = self.inverse @ g
    if self.fop:
      F, c = np.kron(self.A, self.G), contrast.reshape(-1)
      perp = c - (c @ F @ g) / (g @ F @ g) * g
      beta = (g @ self.inverse @ perp) / (perp @ self.inverse @ perp)
      comb = g + beta * perp
      eta = (g @ self.inverse @ comb) / (comb @ self.inverse @ comb)
      direction = eta * self.inverse @ comb
      self.log.append((beta, eta))
    self.trace = direction + self.momentum * self.trace
    update = -self.rate(self.count) * self.trace
    self.count += 1
    return update.reshape(average.shape)

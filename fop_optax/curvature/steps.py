"""Steps of an optimizer: how many were taken, how many skipped and why, and periods of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Period = jax.typing.ArrayLike | optax.Schedule


def whole_period(period: Period, count: jax.typing.ArrayLike) -> jax.Array:
  """A period at a step: whole steps, at least one."""
  value = period(jnp.asarray(count)) if callable(period) else period
  return jnp.maximum(jnp.asarray(value).astype(jnp.int32), 1)


class Finite(NamedTuple):
  """What of a step is finite."""

  loss: jax.Array  # bool, shape=()
  gradients: jax.Array  # bool, shape=(): of all parameters

  @property
  def both(self) -> jax.Array:
    return self.loss & self.gradients


class Steps(NamedTuple):
  """Counters of steps. A batch of NaN counts under its loss and its gradient."""

  count: jax.Array  # int32, shape=(): steps taken
  nonfinite_losses: jax.Array  # int32, shape=(): steps skipped for their loss
  nonfinite_gradients: jax.Array  # int32, shape=(): for their gradient (or the loss and it)
  nonfinite_directions: jax.Array  # int32, shape=(): for their update, of a finite gradient

  def counted(self, finite: Finite) -> "Steps":
    """After a step with such a loss and gradient: taken, or skipped and why."""
    return self._replace(
      count=jnp.where(finite.both, optax.safe_increment(self.count), self.count),
      nonfinite_losses=self.nonfinite_losses + ~finite.loss,
      nonfinite_gradients=self.nonfinite_gradients + ~finite.gradients,
    )

  def settled(self, before: "Steps", finite: jax.Array) -> "Steps":
    """With the count of `before` the step if its update is not `finite`, which is counted."""
    return self._replace(
      count=jnp.where(finite, self.count, before.count),
      nonfinite_directions=self.nonfinite_directions + (self.taken(before) & ~finite),
    )

  def taken(self, before: "Steps") -> jax.Array:
    """Whether loss and gradient of the step since `before` were finite."""
    losses = self.nonfinite_losses == before.nonfinite_losses
    return losses & (self.nonfinite_gradients == before.nonfinite_gradients)


def no_steps() -> Steps:
  """Before the first. No two arrays are one buffer, so that a state can be donated."""
  return Steps(*(jnp.zeros((), jnp.int32) for _ in Steps._fields))

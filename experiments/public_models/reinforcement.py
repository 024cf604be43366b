"""Agents and their losses, in Flax Linen."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

BRAX = Collection("brax", package="brax")
PUREJAXRL = Collection(
  "PureJaxRL",
  repository="luchris429/purejaxrl",
  commit="31756b197773a52db763fdbe6d635e4b46522a73",
  root="purejaxrl",
)
JAXRL = Collection(
  "jaxrl",
  repository="ikostrikov/jaxrl",
  commit="4a9abaff1c915b00ca73d35a30faf16b165e52ec",
)
OBSERVATION, ACTION = 17, 6


def _transitions(*time: int) -> Any:
  """Steps of eight environments."""
  from brax.training import types

  draw = lambda seed, *shape: jax.random.normal(
    jax.random.key(seed), (problem.BATCH, *time, *shape)
  )
  return types.Transition(
    observation=draw(1, OBSERVATION),
    action=jnp.tanh(draw(2, ACTION)),
    reward=draw(3),
    discount=jnp.ones((problem.BATCH, *time)),
    next_observation=draw(4, OBSERVATION),
    extras={
      "state_extras": {"truncation": jnp.zeros((problem.BATCH, *time))},
      "policy_extras": {
        "raw_action": draw(2, ACTION),
        "log_prob": draw(5),
        "value": draw(7),
        "distribution_params": draw(6, 2 * ACTION),
      },
    },
  )


def _ppo(**options: Any) -> Problem:
  from brax.training.agents.ppo import losses, networks

  network = networks.make_ppo_networks(
    OBSERVATION, ACTION, value_hidden_layer_sizes=(64,) * 3, **options
  )
  keys = jax.random.split(problem.KEY)
  params = losses.PPONetworkParams(
    policy=network.policy_network.init(keys[0]), value=network.value_network.init(keys[1])
  )

  def loss_fn(params, data, key):
    return losses.compute_ppo_loss(
      params, None, data, key, network, clipping_epsilon_value=1.0, **options
    )

  return Problem(loss_fn, params, (_transitions(5), problem.KEY), {"has_aux": True})


@BRAX.model("PPO", "Linen")
def ppo() -> Problem:
  return _ppo()


@BRAX.model("PPO, distributional critic", "Linen")
def distributional() -> Problem:
  return _ppo(use_distributional_critic=True)


def _sac() -> tuple:
  from brax.training.agents.sac import losses, networks

  network = networks.make_sac_networks(OBSERVATION, ACTION, hidden_layer_sizes=(64, 64))
  made = losses.make_losses(network, 1.0, 0.99, ACTION)
  return network.policy_network.init(problem.KEY), network.q_network.init(problem.KEY), *made


@BRAX.model("SAC, critic", "Linen")
def critic() -> Problem:
  policy, q, _, critic_loss, _ = _sac()

  def loss_fn(params, data, key):
    return critic_loss(params, policy, None, q, jnp.float32(0.1), data, key)

  return Problem(loss_fn, q, (_transitions(), problem.KEY))


@BRAX.model("SAC, actor", "Linen")
def actor() -> Problem:
  policy, q, _, _, actor_loss = _sac()

  def loss_fn(params, data, key):
    return actor_loss(params, None, q, jnp.float32(0.1), data, key)

  return Problem(loss_fn, policy, (_transitions(), problem.KEY))


def _surrogate(file: str, actions: jax.Array) -> Problem:
  """The loss that each of the collection's files writes."""
  problem.namespace("navix")  # environments, which `wrappers` imports
  network = importlib.import_module(file).ActorCritic(actions.shape[-1] if actions.ndim > 1 else 4)
  observations = problem.images(OBSERVATION)
  params = jax.jit(network.init)(problem.KEY, observations)

  def loss_fn(params, observations, actions, old, advantages, targets):
    policy, values = network.apply(params, observations)
    near = targets + (values - targets).clip(-0.2, 0.2)
    value_loss = 0.5 * jnp.maximum((values - targets) ** 2, (near - targets) ** 2).mean()
    ratio = jnp.exp(policy.log_prob(actions) - old)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    actor_loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages).mean()
    return actor_loss + 0.5 * value_loss - 0.01 * policy.entropy().mean()

  old = network.apply(params, observations)[0].log_prob(actions) + 0.1 * problem.images()
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (problem.BATCH,))
  return Problem(loss_fn, params, (observations, actions, old, draw(3), draw(4)))


@PUREJAXRL.model("PPO, discrete actions", "Linen")
def discrete() -> Problem:
  return _surrogate("ppo", problem.labels(4))


@PUREJAXRL.model("PPO, continuous actions", "Linen")
def continuous() -> Problem:
  return _surrogate("ppo_continuous_action", problem.images(ACTION))


def _networks(file: str) -> Any:
  """The package's own `__init__`s need environments."""
  for name in ("", ".networks", ".agents", ".agents.drq"):
    problem.namespace(f"jaxrl{name}")
  return importlib.import_module(f"jaxrl.{file}")


def _temporal_difference(network: Any, observations: jax.Array) -> Problem:
  """The loss of two critics, `agents/sac/critic.py`; the targets do not depend on them."""
  actions = jnp.tanh(problem.images(ACTION))
  params = jax.jit(network.init)(problem.KEY, observations, actions)

  def loss_fn(params, observations, actions, targets):
    first, second = network.apply(params, observations, actions)
    return ((first - targets) ** 2 + (second - targets) ** 2).mean()

  return Problem(loss_fn, params, (observations, actions, problem.images()))


@JAXRL.model("SAC, critics mapped", "Linen")
def critics() -> Problem:
  network = _networks("networks.critic_net").DoubleCritic((64, 64))
  return _temporal_difference(network, problem.images(OBSERVATION))


@JAXRL.model("DrQ, critics on pixels", "Linen")
def pixels() -> Problem:
  models = _networks("agents.drq.networks")
  network = models.DrQDoubleCritic((64, 64), (8, 8, 8), (2, 1, 1), latent_dim=16)
  return _temporal_difference(network, problem.labels(256, 32, 32, 3).astype(jnp.float32))


@JAXRL.model("behaviour cloning", "Linen")
def cloning() -> Problem:
  network = _networks("networks.policies").MSEPolicy((64, 64), ACTION)
  observations = problem.images(OBSERVATION)
  params = jax.jit(network.init)(problem.KEY, observations)

  def loss_fn(params, observations, actions):
    return problem.squared_error(network.apply(params, observations), actions)

  return Problem(loss_fn, params, (observations, jnp.tanh(problem.images(ACTION))))

"""What Dreamer learns, and the one loss that all of it is trained by; see `agents.dreamer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl import normalization
from mbrl.distributions import TwoHot
from mbrl.imagination import imagine, imagined_targets, replay_targets
from mbrl.losses.policy_gradient import reinforce_loss, two_hot_critic_loss
from mbrl.models.rssm import RSSM, Latent, RSSMState, Statistics
from mbrl.normalization import ReturnScale
from mbrl.policies import Policy
from mbrl.types import MDP, Array, EnvSpec, Key, Metrics, Network, Params, Record

if TYPE_CHECKING:
    from agents.dreamer import DreamerConfig

stop = jax.lax.stop_gradient


class Weights(NamedTuple):
    """What the optimizer trains: all of it, by one scalar loss."""

    model: Params
    policy: Params
    value: Params


class DreamerState(NamedTuple):
    """Everything Dreamer learns."""

    weights: Weights
    slow_value: Params
    statistics: Statistics
    scale: ReturnScale
    opt_state: optax.OptState

    @property
    def world(self) -> RSSMState:
        """Return the parameters of the world model."""
        return RSSMState(self.weights.model, self.statistics)


class Parts(NamedTuple):
    """What the algorithm is made of.

    Attributes:
      spec: spaces of the task.
      model: the world model.
      mdp: its imagination, with the reward source and the risk attitude asked for.
      params: `(RSSMState) -> parameters of mdp`.
      policy: `(params, latent) -> Policy`.
      critic: `(params, latent) -> TwoHot` distribution of the return.
      policy_net, value_net: networks behind the two.
    """

    spec: EnvSpec
    model: RSSM
    mdp: MDP
    params: Callable[[RSSMState], Any]
    policy: Callable[[Params, Latent], Policy]
    critic: Callable[[Params, Latent], TwoHot]
    policy_net: Network
    value_net: Network


class Found(NamedTuple):
    """What the loss finds on the way: refreshed latents [B, T], return scale, metrics."""

    latent: Latent
    scale: ReturnScale
    metrics: Metrics


def total_loss(
    parts: Parts, config: DreamerConfig, weights: Weights, state: DreamerState,
    record: Record, valid: Array, key: Key,
) -> tuple[Array, Found]:  # fmt: skip
    """Compute the one scalar that everything is trained by, on `record` [B, T + 1, ...]."""
    model_key, dream_key = jax.random.split(key)
    world = state._replace(weights=weights).world
    loss, learned = parts.model.loss(world, model_key, record, valid)
    scale, metrics = state.scale, learned.metrics
    # A planner needs no actor, and a critic would shape what the model learns.
    if config.actor == "policy":
        behaviour, scale, more = behaviour_loss(
            parts, config, weights, state, learned.latent, record, valid, dream_key
        )
        loss, metrics = loss + behaviour, metrics | more
    return loss, Found(learned.latent, scale, metrics | {"loss": loss})


def behaviour_loss(
    parts: Parts, config: DreamerConfig, weights: Weights, state: DreamerState,
    latent: Latent, record: Record, valid: Array, key: Key,
) -> tuple[Array, ReturnScale, Metrics]:  # fmt: skip
    """Compute the losses of actor and critic, with posteriors `latent` [B, T] of the records."""
    world = stop(state._replace(weights=weights).world)
    start = stop(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), latent))

    def act(key: Key, latent: Latent) -> Array:
        return parts.policy(weights.policy, latent).sample(key)

    dream = imagine(
        parts.mdp, parts.params(world), key, start, act, config.horizon, config.discount
    )
    critic = parts.critic(weights.value, dream.state)
    final = parts.critic(weights.value, dream.final)
    values = stop(jnp.concatenate([critic.mean, final.mean[None]]))
    root = config.discount * parts.model.survival(world, start) * valid[:, 1:].reshape(-1)
    targets = imagined_targets(dream, values, root, config.lambda_)

    scale = normalization.update_return_scale(state.scale, targets.returns)
    law = parts.policy(weights.policy, dream.state)
    actor_loss = reinforce_loss(
        law.log_prob(dream.action), targets.advantage / scale.value, law.entropy(),
        config.entropy, targets.weight,
    )  # fmt: skip
    critic_loss = two_hot_critic_loss(
        critic, targets.returns, parts.critic(state.slow_value, dream.state), targets.weight
    )
    beyond = targets.returns[0].reshape(valid[:, 1:].shape)
    real = jax.tree.map(lambda x: x[:, 1:], record)
    replayed = replay_targets(real, valid[:, 1:], beyond, config.discount, config.lambda_)
    seen = jax.tree.map(lambda x: x[:, :-1], latent)
    replay_loss = two_hot_critic_loss(
        parts.critic(weights.value, seen), replayed.returns,
        parts.critic(state.slow_value, seen), replayed.weight,
    )  # fmt: skip
    loss = actor_loss + critic_loss + config.replay_value * replay_loss
    metrics = {
        "actor/loss": actor_loss,
        "actor/entropy": jnp.mean(law.entropy()),
        "critic/loss": critic_loss,
        "critic/replay_loss": replay_loss,
        "critic/value": jnp.mean(values),
        "critic/return": jnp.mean(targets.returns),
        "critic/return_scale": scale.value,
    }
    return loss, scale, metrics

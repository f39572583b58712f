"""Settings of Dreamer, what it learns, and the one loss that trains it; see `agents.dreamer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl import normalization
from mbrl.distributions import TwoHot
from mbrl.imagination import imagine, imagined_targets, replay_targets
from mbrl.losses.policy_gradient import reinforce_loss, two_hot_critic_loss
from mbrl.models.rssm import RSSM, Latent, RSSMState, Size, Statistics
from mbrl.normalization import ReturnScale
from mbrl.planning import PlannerConfig
from mbrl.policies import Policy
from mbrl.types import MDP, Array, EnvSpec, Key, Metrics, Network, Params, Record

stop = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Settings of the latents, the published ones unless they say otherwise."""

    kind: Literal["discrete", "gaussian"] = "discrete"
    """Kind of the stochastic latents."""
    variables: int = 0
    """Number of stochastic latents, 0 = that of the size. Those that have nothing to tell are
    noise, at every step."""
    classes: int = 0
    """Categories of each, 0 = that of the size."""
    span: int = 0
    """Steps that the recurrent state is to remember from the start, 0 = as published: about three,
    until more has been learned. A state with a longer memory is read at unit scale."""


@dataclasses.dataclass(frozen=True)
class DreamerConfig:
    """Settings of Dreamer, the published values unless they say otherwise."""

    size: Size = "1m"
    """Number of parameters: 1m, 12m, 25m, 50m, 100m or 200m."""
    normalize: bool = True
    """Standardize vectors by their running moments (published: symlog alone)."""
    memory: bool = True
    """Carry a recurrent state; without, actor and critic see what the last observation tells, and
    the world model predicts one step from that and the action."""
    latent: LatentConfig = LatentConfig()
    """Number and kind of the latents, and how long the recurrent ones remember."""
    actor: Literal["policy", "planner"] = "policy"
    """What acts: the learned policy, or a planner on the latent model (PlaNet), which is then all
    that is learned."""
    members: int = 0
    """Networks that predict the next latent and reward again, for `penalty`; 0 = none."""
    penalty: float = 0.0
    """Imagined reward subtracted per standard deviation of model disagreement; < 0 is optimism.
    Recorded rewards, which the critic learns from too, stay as they are."""
    discount: float = 1.0 - 1.0 / 333.0
    """Per step; folded into the target of the continue head."""
    lambda_: float = 0.95
    """Mixes returns of different lengths."""
    horizon: int = 15
    """Imagined steps."""
    entropy: float = 3e-4
    """Bonus per nat of the policy's entropy."""
    replay_value: float = 0.3
    """Weight of the critic's loss on real sequences."""
    slow_rate: float = 0.02
    """Share by which the slow critic follows the critic per update."""
    free_nats: float = 1.0
    """Divergence of posterior and prior per step that costs nothing."""
    learning_rate: float = 4e-5
    """Step size of LaProp."""
    warmup: int = 1000
    """Updates over which the step size rises to `learning_rate`."""
    beta2: float = 0.999
    """Decay of the squared gradients that steps are divided by: those of the first updates are
    large, and shorten steps for some `1 / (1 - beta2)` updates more."""
    clip: float = 0.3
    """Largest norm of a tensor's gradient relative to the tensor's own."""
    batch_size: int = 16
    """Sequences per update."""
    length: int = 64
    """Records per sequence."""
    train_ratio: float = 1.0
    """Updates per environment step: a whole number, or one over a whole number."""
    random_steps: int = 1024
    """Environment steps of uniform actions before the first update."""
    capacity: int = 100_000
    """Records kept in replay (published: 5 million)."""
    dtype: str = "float32"
    """Precision of the matrix products, float32 or bfloat16."""
    planner: PlannerConfig = PlannerConfig(horizon=12)
    """Model-predictive control, with `actor` planner."""


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

"""SAC: an actor that is paid for reward and for entropy, and critics that are learned off policy.

Reference: Haarnoja et al. 2018 (arXiv:1812.05905); many critics of which a few count, Chen et al.
2021 (REDQ, arXiv:2101.05982); Discrete actions after Christodoulou 2019 (arXiv:1910.07207).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mbrl import normalization, optim, replay, spaces
from mbrl.losses.policy_gradient import average
from mbrl.losses.soft_actor_critic import (
    critic_loss,
    critic_target,
    soft_value,
    temperature_loss,
)
from mbrl.networks.core import mlp
from mbrl.networks.critics import critics
from mbrl.networks.observation import numeric, prepare, vector_of
from mbrl.normalization import Moments
from mbrl.policies import SoftPolicy, num_outputs
from mbrl.settings import check_whole, check_within
from mbrl.types import (
    Agent,
    Array,
    Batch,
    Box,
    Discrete,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Params,
    Transition,
)

RewardFn = Callable[[Any, Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Settings of the actor and the critics, wherever their transitions come from; sources are the
    paper (P), REDQ (R), or measured on small tasks here (M).
    """

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critics (P)."""
    critics: int = 2
    """Estimates of the value of an action N (P; R: 10)."""
    subset: int = 2
    """Critics, drawn anew at every update, whose least value is the target (P: all; R: 2). Where
    that is not all of them, the actor maximizes their mean (R)."""
    layer_norm: bool = False
    """Normalize the hidden layers of the critics: for many updates per step."""
    discount: float = 0.99
    """Per step (P)."""
    target_rate: float = 0.005
    """Share by which the target critics follow per update (P)."""
    learning_rate: float = 3e-4
    """Step size of Adam, for actor, critics and temperature (P)."""
    temperature: float = 1.0
    """Worth of a nat of entropy at the start, in units of reward."""
    tune_temperature: bool = True
    """Learn the temperature that keeps the entropy at its target (P)."""
    target_entropy: float = -1.0
    """Of Box actions, nats per dimension scaled to [-1, 1], where a uniform policy has 0.69 (P)."""
    discrete_entropy: float = 0.3
    """Target for Discrete actions, as a share of the entropy of the uniform policy."""
    batch_size: int = 256
    """Transitions per update (P)."""
    normalize_obs: bool = True
    """Standardize observations by what has been learned from so far."""

    def __post_init__(self) -> None:
        check_whole(self, "critics", "subset", "batch_size")
        check_within(self, "discount", 0, 1)
        check_within(self, "target_rate", 0, 1, "(]")
        check_within(self, "learning_rate", 0, ends="(]")
        check_within(self, "temperature", 0, ends="(]")
        check_within(self, "target_entropy", high=math.log(2.0))
        check_within(self, "discrete_entropy", 0, 1)
        if self.subset > self.critics:
            raise ValueError(
                f"subset must not exceed critics, got {self.subset} > {self.critics}; lower "
                "subset or raise critics"
            )


@dataclasses.dataclass(frozen=True)
class SACConfig(LearnerConfig):
    """Settings of SAC."""

    train_ratio: float = 1.0
    """Updates per environment step, a whole number or one over a whole number (P: 1; R: 20)."""
    random_steps: int = 1000
    """Environment steps of uniform actions before the first update."""
    capacity: int = 100_000
    """Records kept in replay (P: 1,000,000)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "random_steps", "capacity")


class Weights(NamedTuple):
    """What gradients change."""

    actor: Params
    critics: Params
    """Leaves [N, ...]."""
    log_temperature: Array


class SACState(NamedTuple):
    """Everything SAC learns."""

    weights: Weights
    target: Params
    """Critics that follow slowly, leaves [N, ...]."""
    opt_state: optax.OptState
    obs: Moments
    """Of the numbers that are observed."""


class Learner(NamedTuple):
    """Actor and critics as functions of one state, for transitions from anywhere.

    Attributes:
      init: `(key) -> SACState`.
      policy: `(state, obs [B, ...]) -> SoftPolicy` with encoded actions.
      learn: `(state, transition [B, ...], weight [B], key) -> (state, metrics)`, one update; the
        transition's `is_terminal` may be a probability.
    """

    init: Callable[[Key], SACState]
    policy: Callable[[SACState, Any], SoftPolicy]
    learn: Callable[[SACState, Transition, Array, Key], tuple[SACState, Metrics]]


def make_learner(spec: EnvSpec, config: LearnerConfig, agent: str = "SAC") -> Learner:
    """Build actor, critics and what they learn by.

    Args:
      spec: spaces of the task: observations without images; Discrete or bounded Box actions, or a
        mapping of Boxes.
      config: see `LearnerConfig`. Float fields may be traced.
      agent: name for messages.

    Raises:
      ValueError: for other spaces and two players.
    """
    _check(spec, agent)
    width = numeric(spec.observation).size
    norm = "layer" if config.layer_norm else None
    actor = mlp(config.hidden, num_outputs(spec.action), "relu", "fan_in", out_scale=0.1)
    critic = critics(spec.action, width, config.hidden, config.critics, norm)
    everyone = config.subset == config.critics
    optimizer = optim.apply_if_finite_counted(optax.adam(config.learning_rate))
    wanted = target_entropy(spec, config)

    def init(key: Key) -> SACState:
        actor_key, critic_key = jax.random.split(key)
        weights = Weights(
            actor.init(actor_key, jnp.zeros((1, width))),
            critic.init(critic_key),
            jnp.log(jnp.asarray(config.temperature, jnp.float32)),
        )
        target = jax.tree.map(jnp.copy, weights.critics)
        return SACState(weights, target, optimizer.init(weights), normalization.empty((width,)))

    def law(weights: Params, x: Array) -> SoftPolicy:
        return SoftPolicy(spec.action, actor.apply(weights, x))

    def vector(state: SACState, obs: Any) -> Array:
        return prepare(spec.observation, obs, state.obs).vector

    def policy(state: SACState, obs: Any) -> SoftPolicy:
        return law(state.weights.actor, vector(state, obs))

    def learn(
        state: SACState, data: Transition, weight: Array, key: Key
    ) -> tuple[SACState, Metrics]:
        subset_key, after_key, now_key = jax.random.split(key, 3)
        x, after = vector(state, data.obs), vector(state, data.next_obs)
        taken = spaces.encode_action(spec.action, data.action)
        stop = jax.lax.stop_gradient

        few = jax.random.permutation(subset_key, config.critics)[: config.subset]
        judges = state.target if everyone else jax.tree.map(lambda leaf: leaf[few], state.target)
        choices = law(state.weights.actor, after).choices(after_key)
        q = critic.considered(judges, after, choices.action)
        value = soft_value(q, choices, jnp.exp(state.weights.log_temperature))
        target = critic_target(data.reward, data.is_terminal, value, config.discount)

        def loss(weights: Weights) -> tuple[Array, Metrics]:
            # Three losses, each of which has a gradient for its own weights alone.
            error = critic_loss(critic.taken(weights.critics, x, taken), target, weight)
            choices = law(weights.actor, x).choices(now_key)
            q = critic.considered(stop(weights.critics), x, choices.action)
            temperature = stop(jnp.exp(weights.log_temperature))
            worth = average(soft_value(q, choices, temperature, everyone), weight)
            entropy = average(choices.entropy(), weight)
            total = error - worth
            if config.tune_temperature:
                # Without a row that counts there is no entropy to steer.
                steered = temperature_loss(weights.log_temperature, entropy, wanted)
                total += jnp.where(weight.any(), steered, 0.0)
            return total, {
                "policy/entropy": entropy,
                "policy/temperature": temperature,
                "value/loss": error,
                "value/mean": worth,
                "value/target": average(target, weight),
            }

        grads, metrics = jax.grad(loss, has_aux=True)(state.weights)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
        weights = cast(Weights, optax.apply_updates(cast(Params, state.weights), updates))
        followed = optim.polyak(state.target, weights.critics, config.target_rate)
        return state._replace(weights=weights, target=followed, opt_state=opt_state), metrics

    return Learner(init, policy, learn)


def make_sac(
    spec: EnvSpec, config: SACConfig = SACConfig(), reward_fn: RewardFn | None = None
) -> Agent:
    """Build the agent.

    Args:
      spec: see `make_learner`.
      config: see `SACConfig`. Float fields may be traced, except `train_ratio`.
      reward_fn: known reward `(obs, action, next_obs) -> [B]`, to learn from instead of the
        recorded one.

    Raises:
      ValueError: for tasks that SAC cannot act in, and impossible settings.
    """
    learner = make_learner(spec, config)

    def act(
        state: SACState, carry: Any, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, Any, Any]:
        return choose(spec, learner, state, obs, is_first, key, mode), carry, ()

    def update(state: SACState, batch: Batch, key: Key) -> tuple[SACState, Metrics, None]:
        data, valid = replay.transitions(batch)

        def learn(state: SACState, inputs: Any) -> tuple[SACState, Metrics]:
            part, rows, key = inputs
            if config.normalize_obs:
                seen = vector_of(spec.observation, part.obs)
                state = state._replace(obs=normalization.update(state.obs, seen, rows))
            part = rewarded(part, reward_fn)
            return learner.learn(state, part, rows.astype(jnp.float32), key)

        keys = jax.random.split(key, valid.shape[0])
        state, metrics = jax.lax.scan(learn, state, (data, valid, keys))
        return state, summary(state, metrics), None

    sampling = replay.minibatches(
        config.train_ratio, config.batch_size, 2, config.capacity, config.random_steps
    )
    return Agent(learner.init, lambda num_envs: (), act, update, sampling)


def choose(
    spec: EnvSpec, learner: Learner, state: SACState, obs: Any, is_first: Array, key: Key,
    mode: Mode,
) -> Any:  # fmt: skip
    """Act at observations [E, ...]: uniformly, by the policy, or by its mode."""
    if mode == "random":
        return spaces.sample(spec.action, key, is_first.shape)
    law = learner.policy(state, obs)
    encoded = law.mode() if mode == "greedy" else law.sample(key)
    return spaces.decode_action(spec.action, encoded)


def rewarded(data: Transition, reward_fn: RewardFn | None) -> Transition:
    """Replace the reward of transitions [B, ...] by a known one, if there is one."""
    if reward_fn is None:
        return data
    return data._replace(reward=reward_fn(data.obs, data.action, data.next_obs))


def summary(state: SACState, metrics: Metrics) -> Metrics:
    """Average the metrics [K] of several updates, and count those that were skipped."""
    counts = optim.skipped(cast(optim.FiniteState, state.opt_state), "policy")
    return {name: x.mean(0) for name, x in metrics.items()} | counts


def target_entropy(spec: EnvSpec, config: LearnerConfig) -> Array | float:
    """Return the entropy, in nats, that the temperature steers towards."""
    if isinstance(spec.action, Discrete):
        return config.discrete_entropy * math.log(spec.action.num)
    return config.target_entropy * spaces.flat_size(spec.action)


def _check(spec: EnvSpec, agent: str) -> None:
    spaces.check_one_player(spec, agent)
    spaces.check_no_images(spec, agent)
    leaves = spaces.leaves(spec.action)
    for path, leaf in leaves:
        if isinstance(leaf, Box):
            spaces.finite_bounds(leaf, f"action {path or spec.id}")
    if not isinstance(spec.action, Discrete) and not all(isinstance(x, Box) for _, x in leaves):
        raise ValueError(
            f"action space of {spec.id}: {agent} expected a Discrete, or a Box or a mapping of "
            f"Boxes, got {spec.action}; flatten it into one Discrete, or use `mbrl train ppo`"
        )

"""PPO: policy gradients that are clipped where the policy would move far, on the newest rollout.

Reference: Schulman et al. 2017 (arXiv:1707.06347); details after Huang et al. 2022, The 37
Implementation Details of Proximal Policy Optimization.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mbrl import normalization, optim, policies, replay, returns, spaces
from mbrl.losses.policy_gradient import (
    average,
    clipped_surrogate_loss,
    clipped_value_loss,
    explained,
    policy_change,
    whiten,
)
from mbrl.networks.actor_critic import ActorCritic, evaluate, unroll
from mbrl.networks.observation import numeric, prepare, vector_of
from mbrl.normalization import Moments
from mbrl.policies import Policy
from mbrl.settings import check_whole, check_within
from mbrl.types import (
    Agent,
    Array,
    Batch,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Params,
    SampleSpec,
    reset_rows,
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; the defaults are those of the paper's MuJoCo experiments (P) or of common
    practice since.
    """

    rollout: int = 2048
    """Environment steps between two updates, over all environments (P)."""
    epochs: int = 10
    """Passes over a rollout (P)."""
    minibatches: int = 32
    """Parts that each pass is cut into (P: of 64 steps)."""
    discount: float = 0.99
    """Per step (P)."""
    trace: float = 0.95
    """Lambda of the generalized advantages (P)."""
    clip: float = 0.2
    """Distance from 1 at which a ratio of probabilities gains nothing more (P)."""
    value_clip: float = 0.0
    """Distance at which a value gains nothing more, in normalized returns; 0 = none."""
    value_weight: float = 0.5
    """Of the critic's loss beside the actor's."""
    entropy: float = 0.0
    """Bonus per nat of the policy's entropy."""
    learning_rate: float = 3e-4
    """Step size of Adam (P)."""
    anneal: int = 0
    """Environment steps over which the step size falls to a tenth; 0 = never."""
    clip_norm: float = 0.5
    """Gradient norm above which it is scaled down."""
    target_kl: float = 0.0
    """Divergence, in nats, above which the rest of an update is left out; 0 = none."""
    normalize_obs: bool = True
    """Standardize observations by what has been seen so far."""
    normalize_reward: bool = True
    """Divide rewards by the deviation of discounted returns."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic (P)."""
    log_std: float = 0.0
    """Logarithm of the first deviation of Box actions, in half widths of the Box."""
    memory: int = 0
    """Width of a recurrent unit that actor and critic share; 0 = none."""
    length: int = 16
    """Records that a recurrent unit is unrolled over in training."""

    def __post_init__(self) -> None:
        check_whole(self, "rollout", "epochs", "minibatches", "length")
        check_whole(self, "anneal", "memory", least=0)
        check_within(self, "discount", 0, 1)
        check_within(self, "trace", 0, 1)
        check_within(self, "clip", 0, ends="(]")
        check_within(self, "value_clip", 0)
        check_within(self, "target_kl", 0)
        check_within(self, "learning_rate", 0, ends="(]")


class PPOState(NamedTuple):
    """Everything PPO learns."""

    params: Params
    start: Params
    """The first weights, to tell how far the policy has come."""
    opt_state: optax.OptState
    obs: Moments
    """Of the numbers that are observed."""
    returns: Moments
    """Of discounted sums of past rewards; their deviation is the unit of returns."""


class Rollout(NamedTuple):
    """What an update learns from, leaves [S, L, ...]: S stretches of L records each."""

    obs: Any
    is_first: Array
    memory: Array
    sample: Array
    log_prob: Array
    value: Array
    advantage: Array
    target: Array
    weight: Array


def make_ppo(spec: EnvSpec, config: PPOConfig = PPOConfig()) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task: any observation; Discrete, MultiDiscrete or bounded Box actions,
        or a mapping of them.
      config: see `PPOConfig`.

    Raises:
      ValueError: for other action spaces, two players, and impossible settings; when an update is
        traced, if the rollout of an environment does not hold whole stretches.
    """
    spaces.check_one_player(spec, "PPO")
    fixed = tuple(bool(x) for x in policies.deviations(spec.action))
    net = ActorCritic(fixed, config.log_std, config.hidden, config.memory)
    rate = optim.falling(config.learning_rate, _updates(config))
    optimizer = optim.apply_if_finite_counted(
        optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(rate, eps=1e-5))
    )

    def init(key: Key) -> PPOState:
        width = numeric(spec.observation).size
        moments = normalization.empty((width,)), normalization.empty()
        example = prepare(spec.observation, spaces.zeros(spec.observation, (1,)), moments[0])
        first = jnp.ones(1, bool)
        params = net.init(key, jnp.zeros((1, config.memory)), example, first)["params"]
        start = jax.tree.map(jnp.copy, params)
        return PPOState(params, start, optimizer.init(params), *moments)

    def begin(num_envs: int) -> Array:
        return jnp.zeros((num_envs, config.memory))

    def act(
        state: PPOState, memory: Array, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, Array, Any]:
        memory = reset_rows(is_first, jnp.zeros_like(memory), memory)
        seen = prepare(spec.observation, obs, state.obs)
        after, outputs, _ = evaluate(net, state.params, memory, seen, is_first)
        policy = Policy(spec.action, outputs, plain=True)
        # The first rollout is the policy's own as well: it is nearly uniform.
        sample = policy.mode() if mode == "greedy" else policy.sample(key)
        # What was drawn may lie outside of the bounds, and its probability is not theirs.
        extras = {"sample": sample, "log_prob": policy.log_prob(sample), "memory": memory}
        action = spaces.decode_action(spec.action, jnp.clip(sample, -1.0, 1.0))
        return action, after, extras

    def update(state: PPOState, batch: Batch, key: Key) -> tuple[PPOState, Metrics, Any]:
        data, units = rollout_of(spec, config, net, state, batch)
        grad_fn = jax.grad(partial(ppo_loss, spec, config, net), has_aux=True)

        def learn(learner: Any, rows: Array) -> tuple[Any, Metrics]:
            params, opt_state, stopped = learner
            part = jax.tree.map(lambda x: x[rows], data)
            grads, metrics = grad_fn(params, part)
            updates, changed = optimizer.update(grads, opt_state, params)
            stopped = stopped | (metrics["policy/kl"] > limit)
            learned = cast(Params, optax.apply_updates(params, updates)), changed
            kept = jax.tree.map(partial(jnp.where, stopped), (params, opt_state), learned)
            return (*kept, stopped), metrics | {"policy/stopped": stopped.astype(jnp.float32)}

        limit = jnp.where(jnp.asarray(config.target_kl) > 0.0, config.target_kl, jnp.inf)
        order = replay.shuffled(key, data.weight.shape[0], config.epochs, config.minibatches)
        start = state.params, state.opt_state, jnp.zeros((), bool)
        (params, opt_state, _), metrics = jax.lax.scan(learn, start, order)
        metrics = {name: x.mean() for name, x in metrics.items()} | {
            "policy/first_ratio": metrics["policy/ratio"][0],
            "policy/kl_from_start": distance(spec, net, state.start, data),
            "value/explained": explained(data.value, data.target, data.weight),
        }
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.record.obs)
        seen = vector_of(spec.observation, rows)
        # Only now: the policy that has acted is the one that the update began with.
        moments = normalization.update(state.obs, seen, batch.valid.reshape(-1))
        obs = moments if config.normalize_obs else state.obs
        state = PPOState(params, state.start, opt_state, obs, units)
        counts = optim.skipped(cast(optim.FiniteState, opt_state), "policy")
        return state, metrics | counts, None

    sampling = SampleSpec("latest", config.rollout, config.rollout, config.rollout, length=0)
    return Agent(init, begin, act, update, sampling)


def rollout_of(
    spec: EnvSpec, config: PPOConfig, net: ActorCritic, state: PPOState, batch: Batch
) -> tuple[Rollout, Moments]:
    """Evaluate what was done in the records [E, T, ...] of a batch, by the policy that did it.

    Also returned are the moments of returns, which these records count for already.
    """
    record = batch.record
    num_envs, time = record.reward.shape
    length = config.length if config.memory else 1
    if time % length:
        raise ValueError(
            f"rollout: got {time} records per environment, expected a multiple of the length "
            f"{length} that the recurrent unit is unrolled over; change --rollout, --num-envs or "
            "--length"
        )

    def stretches(x: Array) -> Array:
        return x.reshape(num_envs * time // length, length, *x.shape[2:])

    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), record.obs)
    seen = prepare(spec.observation, rows, state.obs)
    obs = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), seen)
    sample, is_first = stretches(record.extras["sample"]), stretches(record.is_first)
    memory = stretches(record.extras["memory"])[:, 0]
    value = unroll(net, state.params, memory, obs, is_first)[1].reshape(num_envs, time)

    signals = jax.vmap(returns.align, (0, None))(record, config.discount)
    units = state.returns
    if config.normalize_reward:
        past = jax.vmap(returns.running, (0, 0, None))(
            record.reward, record.is_first, config.discount
        )
        units = normalization.update(units, past, batch.valid)
    advantage = jax.vmap(returns.gae)(
        signals.r_t / units.std, signals.discount_t, value[:, :-1], value[:, 1:],
        config.trace * signals.trace_t,
    )  # fmt: skip
    weight = (signals.valid & batch.valid[:, :-1]).astype(jnp.float32)

    def starts(x: Array) -> Array:
        # The last record starts a transition that nobody has seen the end of.
        return stretches(jnp.pad(x, ((0, 0), (0, 1))))

    return Rollout(
        obs, is_first, memory, sample, stretches(record.extras["log_prob"]),
        stretches(value), starts(advantage), starts(advantage + value[:, :-1]), starts(weight),
    ), units  # fmt: skip


def ppo_loss(
    spec: EnvSpec, config: PPOConfig, net: ActorCritic, params: Params, part: Rollout
) -> tuple[Array, Metrics]:
    """Compute the loss of a part of a rollout, and metrics."""
    outputs, value = unroll(net, params, part.memory, part.obs, part.is_first)
    policy = Policy(spec.action, outputs, plain=True)
    log_prob, weight = policy.log_prob(part.sample), part.weight
    actor = clipped_surrogate_loss(
        log_prob, part.log_prob, whiten(part.advantage, weight), config.clip, weight
    )
    critic = clipped_value_loss(value, part.value, part.target, config.value_clip, weight)
    entropy = average(policy.entropy(), weight)
    ratio = jnp.exp(log_prob - part.log_prob)
    metrics = {
        "policy/loss": actor,
        "policy/entropy": entropy,
        "policy/kl": policy_change(log_prob, part.log_prob, weight),
        "policy/clipped": average(jnp.abs(ratio - 1.0) > config.clip, weight),
        "policy/ratio": jnp.max(weight * jnp.abs(ratio - 1.0)),
        "value/loss": critic,
    }
    return actor + config.value_weight * critic - config.entropy * entropy, metrics


def distance(spec: EnvSpec, net: ActorCritic, start: Params, data: Rollout) -> Array:
    """Estimate the divergence per step, in nats, of the policy that acted from the first one.

    A recurrent unit of the first weights begins each stretch with the memory of the newest.
    """
    outputs, _ = unroll(net, start, data.memory, data.obs, data.is_first)
    log_prob = Policy(spec.action, outputs, plain=True).log_prob(data.sample)
    return policy_change(log_prob, data.log_prob, data.weight)


def _updates(config: PPOConfig) -> int:
    """Count the steps of the optimizer in `anneal` environment steps."""
    steps = config.anneal * config.epochs * config.minibatches / config.rollout
    return max(1, round(steps)) if config.anneal else 0

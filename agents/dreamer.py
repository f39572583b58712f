"""Dreamer: an actor and a critic that learn in the imagination of a latent world model.

Reference: Hafner et al. 2023 (arXiv:2301.04104). With `--actor planner` the actor is
replaced by model-predictive control on the latent model: PlaNet (arXiv:1811.04551).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from agents.dreamer_loss import (
    DreamerConfig,
    DreamerState,
    LatentConfig,
    Parts,
    Weights,
    total_loss,
)
from mbrl import normalization, optim, policies, replay, spaces
from mbrl.distributions import TwoHot
from mbrl.exploitation import sequence_exploitation
from mbrl.mdp import SplitParams, penalized, with_reward
from mbrl.models.reward import given_reward, relabeled
from mbrl.models.rssm import NUM_BINS, Latent, RSSMConfig, recalled, rssm, rssm_size
from mbrl.networks.core import mlp
from mbrl.planning import planner
from mbrl.policies import Policy
from mbrl.two_hot import symexp_bins
from mbrl.types import (
    Agent,
    Array,
    Batch,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Network,
    reset_rows,
)


class DreamerCarry(NamedTuple):
    """Acting state [E, ...]: latent, last action (encoded), the planner's warm start."""

    latent: Latent
    action: Array
    plan: Any


def build(spec: EnvSpec, config: DreamerConfig, reward_fn: Any = None) -> Parts:
    """Build the parts; arguments as in `make_dreamer`."""
    shared = ("free_nats", "discount", "normalize", "members", "memory", "dtype")
    size = _latents(
        rssm_size(config.size, **{name: getattr(config, name) for name in shared}), config.latent
    )
    model = rssm(spec, size)
    mdp = model.mdp if reward_fn is None else with_reward(model.mdp, given_reward(reward_fn))
    mdp = penalized(mdp, config.penalty) if config.members else mdp
    bins = symexp_bins(NUM_BINS)

    def head(out: int, scale: float) -> Network:
        return mlp((size.units,) * 3, out, "silu", "fan_in", config.dtype, "rms", scale)

    def seen(latent: Latent) -> Array:
        # Without memory, the recurrent state still tells the last observation and action.
        return model.feature(latent._replace(deter=recalled(latent.deter, config.memory)))

    policy_net, value_net = head(policies.num_outputs(spec.action), 0.01), head(NUM_BINS, 0.0)
    return Parts(
        spec, model, mdp,
        lambda state: state if reward_fn is None else SplitParams(state, None),
        lambda params, latent: Policy(spec.action, policy_net.apply(params, seen(latent))),
        lambda params, latent: TwoHot(value_net.apply(params, seen(latent)), bins),
        policy_net, value_net,
    )  # fmt: skip


def _latents(size: RSSMConfig, config: LatentConfig) -> RSSMConfig:
    """Return a size with the latents asked for."""
    classes = 0 if config.kind == "gaussian" else config.classes or size.classes
    return dataclasses.replace(
        size, stoch=config.variables or size.stoch, classes=classes, span=config.span
    )


def make_dreamer(
    spec: EnvSpec,
    config: DreamerConfig = DreamerConfig(),
    reward_fn: Callable[[Any, Array, Any], Array] | None = None,
) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task: any observation, any action with finite bounds.
      config: see `DreamerConfig`. Float fields may be traced, except `train_ratio`.
      reward_fn: known reward `(obs, action, next_obs) -> [B]`, to learn from instead of the
        recorded one, and to imagine with instead of the learned one.

    Raises:
      ValueError: for unbounded actions, two players, and impossible settings.
    """
    spaces.check_one_player(spec, "Dreamer")
    _check(config)
    sampling = replay.minibatches(
        config.train_ratio, config.batch_size, config.length + 1, config.capacity,
        config.random_steps,
    )  # fmt: skip
    parts = build(spec, config, reward_fn)
    model = parts.model
    mpc = planner(parts.mdp, config.planner) if config.actor == "planner" else None
    optimizer = optim.apply_if_finite_counted(
        optax.chain(
            optim.adaptive_gradient_clip(config.clip),
            optim.laprop(config.learning_rate, beta2=config.beta2, warmup=config.warmup),
        )
    )

    def init(key: Key) -> DreamerState:
        model_key, policy_key, value_key = jax.random.split(key, 3)
        world, feature = model.init(model_key), model.feature(model.begin(1))
        value = parts.value_net.init(value_key, feature)
        weights = Weights(world.weights, parts.policy_net.init(policy_key, feature), value)
        slow, scale = jax.tree.map(jnp.copy, value), normalization.empty_return_scale()
        return DreamerState(weights, slow, world.statistics, scale, optimizer.init(weights))

    def begin(num_envs: int) -> DreamerCarry:
        action = jnp.zeros((num_envs, spaces.flat_size(spec.action)))
        return DreamerCarry(model.begin(num_envs), action, mpc.init(num_envs) if mpc else ())

    def act(
        state: DreamerState, carry: DreamerCarry, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, DreamerCarry, Any]:
        num_envs = is_first.shape[0]
        carry = reset_rows(is_first, begin(num_envs), carry)
        encode_key, act_key = jax.random.split(key)
        world = state.world
        # Evaluation draws nothing: the likeliest latent, then the likeliest action.
        draw = None if mode == "greedy" else encode_key
        latent = model.encode(world, draw, carry.latent, obs, carry.action, is_first)
        plan = carry.plan
        if mode == "random":
            action = spaces.sample(spec.action, act_key, (num_envs,))
        elif mpc:
            action, plan, _ = mpc.plan(parts.params(world), act_key, latent, plan)
        else:
            law = parts.policy(state.weights.policy, latent)
            encoded = law.mode() if mode == "greedy" else law.sample(act_key)
            action = spaces.decode_action(spec.action, jnp.clip(encoded, -1.0, 1.0))
        encoded = spaces.encode_action(spec.action, action)
        return action, DreamerCarry(latent, encoded, plan), model.pack(latent)

    def learn(state: DreamerState, inputs: Any) -> tuple[DreamerState, tuple[Metrics, Any]]:
        record, valid, key, gap_key = inputs
        before, record = state, record if reward_fn is None else relabeled(record, reward_fn)
        rest, known = jax.tree.map(lambda x: x[:, 1:], (record, valid))
        # What led to the first record is not there: a known reward says nothing of it.
        seen = (record, valid) if reward_fn is None else (rest, known)
        state = state._replace(statistics=model.standardize(state.statistics, *seen))
        grad_fn = jax.value_and_grad(partial(total_loss, parts, config), has_aux=True)
        (_, found), grads = grad_fn(state.weights, state, record, valid, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
        weights = cast(Weights, optax.apply_updates(state.weights, updates))
        slow_value = optim.polyak(state.slow_value, weights.value, config.slow_rate)
        counts = cast(optim.FiniteState, opt_state)
        gap = sequence_exploitation(model.mdp, state.world, gap_key, rest, known, found.latent)
        metrics = found.metrics | optim.skipped(counts) | gap
        # The latent before a sequence stays as it was: nothing newer is known of it. After a
        # skipped update everything does, or its NaN would spoil all that follow.
        applied = counts.consecutive == 0
        latents = jax.tree.map(
            lambda old, new: jnp.concatenate([old[:, :1], jnp.where(applied, new, old[:, 1:])], 1),
            record.extras, model.pack(found.latent),
        )  # fmt: skip
        learned = DreamerState(weights, slow_value, state.statistics, found.scale, before.opt_state)
        state = jax.tree.map(partial(jnp.where, applied), learned, before)
        state = state._replace(opt_state=opt_state)
        return state, (metrics, latents)

    def update(state: DreamerState, batch: Batch, key: Key) -> tuple[DreamerState, Metrics, Any]:
        keys = jax.random.split(key, (2, batch.valid.shape[0]))
        state, (metrics, latents) = jax.lax.scan(learn, state, (batch.record, batch.valid, *keys))
        return state, jax.tree.map(lambda x: x.mean(0), metrics), latents

    return Agent(init, begin, act, update, sampling)


def _check(config: DreamerConfig) -> None:
    for name, value, choices in (
        ("latent.kind", config.latent.kind, ("discrete", "gaussian")),
        ("actor", config.actor, ("policy", "planner")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {choices}")
    if config.latent.kind == "gaussian" and config.latent.classes:
        raise ValueError(
            f"latent.classes: got {config.latent.classes} with latent.kind gaussian, expected 0: "
            "only discrete latents have categories"
        )
    for name, least in (("horizon", 1), ("batch_size", 1), ("length", 2), ("members", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {least}")
    if config.members < 2 and isinstance(config.penalty, float) and config.penalty:
        raise ValueError(
            f"members: got {config.members} with penalty={config.penalty}, expected an ensemble to "
            "disagree; set for example --members 5"
        )

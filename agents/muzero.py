"""MuZero: tree search over a model that learns rewards, values and policies alone.

Reference: Schrittwieser et al. 2020 (arXiv:1911.08265); search after Danihelka et al. 2022
(Gumbel MuZero), continuous actions after Hubert et al. 2021 (arXiv:2104.06303), reanalysis and
consistency after Schrittwieser et al. 2021 (arXiv:2104.06294) and Ye et al. 2021
(arXiv:2111.00210).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from agents.reanalysis import reanalysed, remember, rows_of, targets_of
from mbrl import optim, replay, spaces
from mbrl.exploitation import sequence_exploitation
from mbrl.losses.value_equivalent import (
    Targets,
    cosine_error,
    unroll_weights,
)
from mbrl.mdp import penalized
from mbrl.models.value_equivalent import (
    ValueEquivalent,
    ValueEquivalentConfig,
    ValueEquivalentState,
    value_equivalent,
)
from mbrl.planning.search import SearchConfig, search
from mbrl.policies import explore, weighted_nll
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
    Record,
)


@dataclasses.dataclass(frozen=True)
class MuZeroConfig:
    """Settings of MuZero; sources are the papers (P) or measured on small tasks here (M)."""

    method: Literal["gumbel", "puct"] = "gumbel"
    """Search: Gumbel MuZero, or the original with its Dirichlet noise."""
    simulations: int = 16
    """Model evaluations per search (P: 50)."""
    candidates: int = 16
    """Actions that are sampled at every node, for continuous actions."""
    unroll: int = 5
    """Actions K that the model is unrolled over in training (P)."""
    td_steps: int = 40
    """Rewards per value target before it bootstraps (P: 5 to 10; M)."""
    td_age: int = 0
    """Updates of age after which a target has one reward less (EfficientZero); 0 = never. The
    last one goes where records are reanalysed: what the search finds now is then the target."""
    discount: float = 0.997
    """Per step (P)."""
    model: ValueEquivalentConfig = ValueEquivalentConfig(latent=32, hidden=64)
    """Size of the model, and range of rewards and values (M)."""
    penalty: float = 0.0
    """Reward subtracted per standard deviation of the heads in the search; < 0 is optimism."""
    reanalyse: float = 0.0
    """Share of every batch whose policy targets are searched again."""
    bootstrap: Literal["target", "search"] = "target"
    """Value beyond td_steps: the target network's, or what the search found when acting."""
    target_rate: float = 0.01
    """Share by which the target network follows per update (P: a copy every 100). Its average
    over many updates also acts when the agent is judged."""
    value_weight: float = 0.25
    """Of the value's loss beside the reward's and the policy's (P)."""
    consistency: float = 0.0
    """Weight of the similarity of predicted and true latents (EfficientZero: 2)."""
    learning_rate: float = 2e-3
    """Step size of AdamW (M)."""
    weight_decay: float = 0.1
    """Decoupled decay of the kernels, in units of the step size (P: with SGD as much; M)."""
    clip_norm: float = 5.0
    """Gradient norm above which it is scaled down."""
    priority: float = 0.0
    """Exponent of a sequence's error of value in its chance to be drawn (P: 1); 0 = uniform."""
    correction: float = 0.4
    """Exponent of the importance weights that make up for it (P: 1)."""
    anneal: int = 0
    """Updates over which `correction` rises to 1, the step size falls to a tenth and the
    temperature of puct to a quarter; 0 = never."""
    batch_size: int = 128
    """Sequences per update (P: 1024)."""
    train_ratio: float = 0.25
    """Updates per environment step: a whole number, or one over a whole number."""
    epsilon: float = 0.0
    """Chance of a uniform action per step of training, for games that repeat themselves."""
    random_steps: int = 500
    """Environment steps of uniform actions before the first update."""
    capacity: int = 100_000
    """Records kept in replay."""

    def __post_init__(self) -> None:
        check_whole(self, "simulations", "candidates", "unroll", "td_steps", "batch_size")
        check_whole(self, "td_age", "anneal", least=0)
        check_within(self, "discount", 0, 1, "(]")
        check_within(self, "reanalyse", 0, 1)
        check_within(self, "priority", 0)
        check_within(self, "correction", 0, 1)
        check_within(self, "epsilon", 0, 1)
        check_within(self, "target_rate", 0, 1, "(]")
        if self.model.members == 1 and isinstance(self.penalty, float) and self.penalty:
            raise ValueError(
                f"model.members: got 1 with penalty={self.penalty}, expected several heads to "
                "disagree; set for example --model.members 5"
            )


class MuZeroState(NamedTuple):
    """Everything MuZero learns."""

    model: ValueEquivalentState
    target: ValueEquivalentState
    opt_state: optax.OptState
    updates: Array
    priority: Array
    """Of new records: the greatest of the last batch."""


def make_muzero(spec: EnvSpec, config: MuZeroConfig = MuZeroConfig()) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task: any observation, Discrete or bounded Box actions.
      config: see `MuZeroConfig`.

    Raises:
      ValueError: for other action spaces, and impossible settings.
    """
    _check(spec)
    model = value_equivalent(spec, config.model, config.discount)
    find = search(
        penalized(model.mdp, config.penalty) if config.model.members > 1 else model.mdp,
        model.predictor,
        SearchConfig(
            method=config.method, simulations=config.simulations, candidates=config.candidates,
            discount=config.discount, two_player=spec.players == 2,
        ),
    )  # fmt: skip
    sampling = replay.minibatches(
        config.train_ratio, config.batch_size, config.unroll + config.td_steps + 1,
        config.capacity, config.random_steps, "priority" if config.priority else "",
    )  # fmt: skip
    rate = optim.falling(config.learning_rate, config.anneal)
    optimizer = optim.apply_if_finite_counted(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(rate, weight_decay=config.weight_decay, mask=optim.decay_mask),
        )
    )

    def init(key: Key) -> MuZeroState:
        state = model.init(key)
        opt_state = optimizer.init(state.weights)
        target = jax.tree.map(jnp.copy, state)
        return MuZeroState(state, target, opt_state, jnp.zeros((), int), jnp.ones(()))

    def act(
        state: MuZeroState, carry: Any, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, Any, Any]:
        search_key, random_key = jax.random.split(key)
        acting = state.target if mode == "greedy" else state.model
        latent = model.mdp.init(acting, key, obs)
        invalid = spaces.invalid_actions(spec, obs)
        noise = 0.0 if mode == "greedy" else 1.0
        temperature = 1.0 - 0.75 * _progress(config, state.updates)
        found = find(acting, search_key, latent, invalid, noise, noise * temperature)
        action, extras = found.action, remember(spec, found)
        if mode == "random" or config.epsilon:
            chance = {"random": 1.0, "explore": config.epsilon, "greedy": 0.0}[mode]
            action, explored = explore(spec.action, random_key, action, chance, invalid)
            extras |= {"explored": explored} if config.epsilon else {}
        if config.td_age:
            extras["born"] = jnp.broadcast_to(state.updates, is_first.shape)
        if config.priority:
            extras["priority"] = jnp.broadcast_to(state.priority, is_first.shape)
        return action, carry, extras

    def learn(state: MuZeroState, inputs: Any) -> tuple[MuZeroState, tuple[Metrics, Any]]:
        record, valid, odds, key, gap_key = inputs
        before = state
        moments = model.standardize(state.model.moments, rows_of(record.obs), valid.reshape(-1))
        state = state._replace(
            model=state.model._replace(moments=moments),
            target=state.target._replace(moments=moments),
        )
        record = reanalysed(spec, config, model, find, state.target, record, key)
        targets = targets_of(spec, config, model, state.target, state.updates, record, valid)
        rest = 1.0 - _progress(config, state.updates)
        weight = replay.importance(odds, 1.0 - (1.0 - config.correction) * rest)
        grad_fn = jax.grad(partial(muzero_loss, spec, config, model), has_aux=True)
        grads, (metrics, error) = grad_fn(state.model.weights, state, record, targets, weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model.weights)
        weights = cast(Params, optax.apply_updates(state.model.weights, updates))
        counts = cast(optim.FiniteState, opt_state)
        target = optim.polyak(state.target.weights, weights, config.target_rate)
        priority = (error + 1e-3) ** config.priority
        learned = MuZeroState(
            state.model._replace(weights=weights), state.target._replace(weights=target),
            before.opt_state, state.updates + 1, priority.max(),
        )  # fmt: skip
        # After a skipped update everything stays as it was, moments included.
        applied = counts.consecutive == 0
        state = jax.tree.map(partial(jnp.where, applied), learned, before)
        feedback = None
        if config.priority:
            old = record.extras["priority"][:, 0]
            feedback = {"priority": jnp.where(applied, priority, old)[:, None]}
        metrics |= optim.skipped(counts)
        if spec.players == 1:  # else a reward belongs to whoever has moved
            part = jax.tree.map(lambda x: x[:, : config.unroll + 1], (record, valid))
            metrics |= sequence_exploitation(model.mdp, before.model, gap_key, *part)
        return state._replace(opt_state=opt_state), (metrics, feedback)

    def update(state: MuZeroState, batch: Batch, key: Key) -> tuple[MuZeroState, Metrics, Any]:
        keys = jax.random.split(key, (2, batch.valid.shape[0]))
        inputs = batch.record, batch.valid, batch.odds, *keys
        state, (metrics, feedback) = jax.lax.scan(learn, state, inputs)
        return state, jax.tree.map(lambda x: x.mean(0), metrics), feedback

    return Agent(init, lambda num_envs: (), act, update, sampling)


def muzero_loss(
    spec: EnvSpec, config: MuZeroConfig, model: ValueEquivalent, weights: Params,
    state: MuZeroState, record: Record, targets: Targets, weight: Array,
) -> tuple[Array, tuple[Metrics, Array]]:  # fmt: skip
    """Compute the loss of an unroll from the first of `record` [B, T, ...].

    Also returned are metrics, and how far the first value is from its target, [B].
    """

    time_first = partial(jnp.swapaxes, axis1=0, axis2=1)
    taken = jax.tree.map(time_first, record.action)[: config.unroll]
    first = jax.tree.map(lambda x: x[:, 0], record.obs)
    out = model.unroll(state.model._replace(weights=weights), first, taken)
    t = jax.tree.map(time_first, targets)  # [K + 1, B]
    along = unroll_weights(config.unroll)[:, None]

    def average(error: Array, known: Array) -> Array:
        return jnp.mean(weight * jnp.sum(along * known * error, 0))

    value = model.value.nll(out.value, t.value[:, None]).mean(1)
    reward = model.reward.nll(out.reward, t.reward[:, None]).mean(1)
    extras = jax.tree.map(lambda x: time_first(x)[: config.unroll + 1], record.extras)
    parts = {
        "value": average(value, t.has_value),
        "reward": average(reward, t.has_reward),
        "policy": average(
            weighted_nll(spec.action, out.policy, extras["weights"], extras.get("candidates")),
            t.has_policy,
        ),
    }
    loss = config.value_weight * parts["value"] + parts["reward"] + parts["policy"]
    if config.consistency:
        seen = jax.tree.map(lambda x: time_first(x)[: config.unroll + 1], record.obs)
        true = jax.vmap(lambda obs: model.project(state.model._replace(weights=weights), obs))(seen)
        similar = cosine_error(out.projection, true)
        parts["consistency"] = average(similar, t.has_policy.at[0].set(0.0))
        loss = loss + config.consistency * parts["consistency"]
    metrics = {f"model/{name}_loss": error for name, error in parts.items()}
    first_value = model.value.mean(out.value[0]).mean(0)
    metrics["model/value"] = jnp.mean(first_value)
    metrics["model/clipped_targets"] = jnp.mean(
        (model.value.clips(t.value) & (t.has_value > 0))
        | (model.reward.clips(t.reward) & (t.has_reward > 0))
    )
    return loss, (metrics, t.has_value[0] * jnp.abs(first_value - t.value[0]))


def _progress(config: MuZeroConfig, updates: Array) -> Array | float:
    """Return how much of the schedules has passed, from 0 to 1."""
    return jnp.minimum(updates / config.anneal, 1.0) if config.anneal else 0.0


def _check(spec: EnvSpec) -> None:
    if not isinstance(spec.action, Box | Discrete):
        raise ValueError(
            f"action space of {spec.id}: MuZero searches Box or Discrete actions, got "
            f"{spec.action}; flatten it into one Discrete"
        )

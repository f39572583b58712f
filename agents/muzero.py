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

from mbrl import optim, replay, spaces
from mbrl.losses.value_equivalent import Targets, cosine_error, unroll_targets, unroll_weights
from mbrl.mdp import penalized
from mbrl.models.value_equivalent import (
    ValueEquivalent,
    ValueEquivalentConfig,
    ValueEquivalentState,
    value_equivalent,
)
from mbrl.planning.search import Found, SearchConfig, search
from mbrl.policies import Policy
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
    discount: float = 0.997
    """Per step (P)."""
    latent: int = 32
    """Width of the latent state (M)."""
    hidden: int = 64
    """Width of the hidden layers (M)."""
    depth: int = 8
    """Unit of the channels of convolutions, for images."""
    members: int = 1
    """Heads for reward and value; several make `penalty` possible."""
    penalty: float = 0.0
    """Reward subtracted per standard deviation of the heads in the search; < 0 is optimism."""
    max_reward: float = 1.0
    """Largest magnitude of a reward that is told apart."""
    max_value: float = 0.0
    """Largest magnitude of a return that is told apart; 0 = max_reward / (1 - discount)."""
    reanalyse: float = 0.0
    """Share of every batch whose policy targets are searched again."""
    bootstrap: Literal["target", "search"] = "target"
    """Value beyond td_steps: the target network's, or what the search found when acting."""
    target_every: int = 100
    """Updates between two copies to the target network (P)."""
    value_weight: float = 0.25
    """Of the value's loss beside the reward's and the policy's (P)."""
    consistency: float = 0.0
    """Weight of the similarity of predicted and true latents (EfficientZero: 2)."""
    learning_rate: float = 2e-3
    """Step size of AdamW (M)."""
    weight_decay: float = 1e-4
    """Decoupled decay of the kernels (P)."""
    clip_norm: float = 5.0
    """Gradient norm above which it is scaled down."""
    batch_size: int = 128
    """Sequences per update (P: 1024)."""
    train_ratio: float = 0.25
    """Updates per environment step: a whole number, or one over a whole number."""
    random_steps: int = 500
    """Environment steps of uniform actions before the first update."""
    capacity: int = 100_000
    """Records kept in replay."""

    def __post_init__(self) -> None:
        check_whole(
            self, "simulations", "candidates", "unroll", "td_steps", "target_every", "batch_size"
        )
        check_within(self, "discount", 0, 1, "(]")
        check_within(self, "reanalyse", 0, 1)
        check_within(self, "max_value", 0)
        if not self.max_value and not isinstance(self.discount, Array) and self.discount >= 1:
            raise ValueError(
                "max_value: got 0 with discount=1, expected the largest return that may occur; "
                "pass for example --max-value 1"
            )
        if self.members == 1 and isinstance(self.penalty, float) and self.penalty:
            raise ValueError(
                f"members: got 1 with penalty={self.penalty}, expected several heads to disagree; "
                "set for example --members 5"
            )


class MuZeroState(NamedTuple):
    """Everything MuZero learns."""

    model: ValueEquivalentState
    target: ValueEquivalentState
    opt_state: optax.OptState
    updates: Array


def make_muzero(spec: EnvSpec, config: MuZeroConfig = MuZeroConfig()) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task: any observation, Discrete or bounded Box actions.
      config: see `MuZeroConfig`.

    Raises:
      ValueError: for other action spaces, and impossible settings.
    """
    _check(spec)
    model = _model(spec, config)
    find = search(
        penalized(model.mdp, config.penalty) if config.members > 1 else model.mdp,
        model.predictor,
        SearchConfig(
            method=config.method, simulations=config.simulations, candidates=config.candidates,
            discount=config.discount,
        ),
    )  # fmt: skip
    sampling = replay.minibatches(
        config.train_ratio, config.batch_size, config.unroll + config.td_steps + 1,
        config.capacity, config.random_steps,
    )  # fmt: skip
    optimizer = optim.apply_if_finite_counted(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(
                config.learning_rate, weight_decay=config.weight_decay, mask=optim.decay_mask
            ),
        )
    )

    def init(key: Key) -> MuZeroState:
        state = model.init(key)
        opt_state = optimizer.init(state.weights)
        return MuZeroState(state, jax.tree.map(jnp.copy, state), opt_state, jnp.zeros((), int))

    def act(
        state: MuZeroState, carry: Any, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, Any, Any]:
        init_key, search_key = jax.random.split(key)
        latent = model.mdp.init(state.model, init_key, obs)
        noise = 0.0 if mode == "greedy" else 1.0
        found = find(state.model, search_key, latent, noise=noise, temperature=noise)
        action = found.action
        if mode == "random":
            action = spaces.sample(spec.action, jax.random.fold_in(key, 2), is_first.shape)
        return action, carry, _remember(spec, found)

    def learn(state: MuZeroState, inputs: Any) -> tuple[MuZeroState, Metrics]:
        record, valid, key = inputs
        before = state
        moments = model.standardize(state.model.moments, _rows(record.obs), valid.reshape(-1))
        state = state._replace(
            model=state.model._replace(moments=moments),
            target=state.target._replace(moments=moments),
        )
        record = _reanalysed(spec, config, model, find, state.target, record, key)
        targets = _targets(config, model, state.target, record, valid)
        grad_fn = jax.grad(partial(muzero_loss, spec, config, model), has_aux=True)
        grads, metrics = grad_fn(state.model.weights, state, record, targets)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model.weights)
        weights = cast(Params, optax.apply_updates(state.model.weights, updates))
        counts = cast(optim.FiniteState, opt_state)
        metrics |= {
            "model/skipped_updates": counts.skipped.astype(jnp.float32),
            "model/skipped_in_a_row": counts.consecutive.astype(jnp.float32),
        }
        copied = state.updates % config.target_every == config.target_every - 1
        target = jax.tree.map(partial(jnp.where, copied), weights, state.target.weights)
        learned = MuZeroState(
            state.model._replace(weights=weights), state.target._replace(weights=target),
            before.opt_state, state.updates + 1,
        )  # fmt: skip
        # After a skipped update everything stays as it was, moments included.
        applied = counts.consecutive == 0
        state = jax.tree.map(partial(jnp.where, applied), learned, before)
        return state._replace(opt_state=opt_state), metrics

    def update(state: MuZeroState, batch: Batch, key: Key) -> tuple[MuZeroState, Metrics, None]:
        keys = jax.random.split(key, batch.valid.shape[0])
        state, metrics = jax.lax.scan(learn, state, (batch.record, batch.valid, keys))
        return state, jax.tree.map(lambda x: x.mean(0), metrics), None

    return Agent(init, lambda num_envs: (), act, update, sampling)


def muzero_loss(
    spec: EnvSpec, config: MuZeroConfig, model: ValueEquivalent, weights: Params,
    state: MuZeroState, record: Record, targets: Targets,
) -> tuple[Array, Metrics]:  # fmt: skip
    """Compute the loss of an unroll from the first of `record` [B, T, ...]."""

    def time_first(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1)

    taken = jax.tree.map(time_first, record.action)[: config.unroll]
    first = jax.tree.map(lambda x: x[:, 0], record.obs)
    out = model.unroll(state.model._replace(weights=weights), first, taken)
    t = jax.tree.map(time_first, targets)  # [K + 1, B]
    along = unroll_weights(config.unroll)[:, None]

    def average(error: Array, known: Array) -> Array:
        return jnp.mean(jnp.sum(along * known * error, 0))

    value = model.value.nll(out.value, t.value[:, None]).mean(1)
    reward = model.reward.nll(out.reward, t.reward[:, None]).mean(1)
    extras = jax.tree.map(lambda x: time_first(x)[: config.unroll + 1], record.extras)
    parts = {
        "value": average(value, t.has_value),
        "reward": average(reward, t.has_reward),
        "policy": average(_policy_nll(spec, out.policy, extras), t.has_policy),
    }
    loss = config.value_weight * parts["value"] + parts["reward"] + parts["policy"]
    if config.consistency:
        seen = jax.tree.map(lambda x: time_first(x)[: config.unroll + 1], record.obs)
        true = jax.vmap(lambda obs: model.project(state.model._replace(weights=weights), obs))(seen)
        similar = cosine_error(out.projection, true)
        parts["consistency"] = average(similar, t.has_policy.at[0].set(0.0))
        loss = loss + config.consistency * parts["consistency"]
    metrics = {f"model/{name}_loss": error for name, error in parts.items()}
    metrics["model/value"] = jnp.mean(model.value.mean(out.value[0]))
    metrics["model/clipped_targets"] = jnp.mean(
        (model.value.clips(t.value) & (t.has_value > 0))
        | (model.reward.clips(t.reward) & (t.has_reward > 0))
    )
    return loss, metrics


def _policy_nll(spec: EnvSpec, out: Array, extras: Any) -> Array:
    """Cross-entropy [K + 1, B] between the improved policy of the search and the head's."""
    if isinstance(spec.action, Discrete):
        return -jnp.sum(extras["weights"] * jax.nn.log_softmax(out, -1), -1)
    law = Policy(spec.action, jnp.expand_dims(out, -2))
    return -jnp.sum(extras["weights"] * law.log_prob(extras["candidates"]), -1)


def _remember(spec: EnvSpec, found: Found) -> dict[str, Array]:
    kept = {"weights": found.weights, "value": found.value}
    if isinstance(spec.action, Box):
        encode = jax.vmap(partial(spaces.encode_action, spec.action))
        kept["candidates"] = encode(cast(Array, found.candidates))
    return kept


def _rows(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _targets(
    config: MuZeroConfig, model: ValueEquivalent, target: ValueEquivalentState,
    record: Record, valid: Array,
) -> Targets:  # fmt: skip
    value = record.extras["value"]
    if config.bootstrap == "target":
        latent = model.mdp.init(target, jax.random.key(0), _rows(record.obs))
        value = model.predictor.predict(target, latent)[1].reshape(valid.shape)
    compute = partial(
        unroll_targets, unroll=config.unroll, n=config.td_steps, gamma=config.discount
    )
    return jax.tree.map(jax.lax.stop_gradient, jax.vmap(compute)(record, valid, value))


def _reanalysed(
    spec: EnvSpec, config: MuZeroConfig, model: ValueEquivalent, find: Any,
    target: ValueEquivalentState, record: Record, key: Key,
) -> Record:  # fmt: skip
    """Search again, with the target network, where the first rows of a batch are unrolled."""
    rows = round(config.reanalyse * record.reward.shape[0])
    if not rows:
        return record
    init_key, search_key = jax.random.split(key)
    part = jax.tree.map(lambda x: x[:rows, : config.unroll + 1], record.obs)
    found = find(target, search_key, model.mdp.init(target, init_key, _rows(part)), noise=1.0)
    fresh = _remember(spec, found)

    def write(old: Array, new: Array) -> Array:
        new = new.reshape(rows, config.unroll + 1, *new.shape[1:])
        return old.at[:rows, : config.unroll + 1].set(new)

    return record._replace(extras=jax.tree.map(write, record.extras, fresh))


def _model(spec: EnvSpec, config: MuZeroConfig) -> ValueEquivalent:
    size = ValueEquivalentConfig(
        config.latent, config.hidden, config.depth, config.members, config.max_reward,
        config.max_value or config.max_reward / (1.0 - config.discount),
    )  # fmt: skip
    return value_equivalent(spec, size)


def _check(spec: EnvSpec) -> None:
    if not isinstance(spec.action, Box | Discrete):
        raise ValueError(
            f"action space of {spec.id}: MuZero searches Box or Discrete actions, got "
            f"{spec.action}; flatten it into one Discrete"
        )

"""The reward model: scalar heads on a language model, fitted to rankings of its answers.

Reference: Ouyang et al. 2022 (arXiv:2203.02155): all pairs of a prompt are one batch element, so
that K answers cost K evaluations, and prompts with more answers weigh no more than others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from agents.rlhf.stage import Stage, TuningConfig, descend, tuning
from mbrl.losses.policy_gradient import average
from mbrl.losses.preference import centering_loss, pair_nll, plackett_luce_nll
from mbrl.models.token_reward import Members, TokenReward, TokenRewardState, token_reward
from mbrl.networks.transformer import Transformer
from mbrl.preferences.evaluation import accuracy
from mbrl.settings import check_whole, check_within
from mbrl.text_batches import TextBatch
from mbrl.types import Array, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Settings of the reward model."""

    members: int = 1
    """Reward models that learn side by side."""
    kind: Members = "whole"
    """Members share the transformer ('heads') or have one each ('whole')."""
    loss: Literal["pairs", "ranking"] = "pairs"
    """Bradley-Terry over all pairs of a ranking, or Plackett-Luce over the whole of it."""
    smoothing: float = 0.0
    """Probability that an answer to a pair is reversed."""
    uniform: float = 0.0
    """Probability that it is drawn at random."""
    centering: float = 0.0
    """Weight of the squared mean score of a ranking, which preferences leave open."""
    bootstrap: bool = False
    """Each member counts a ranking as often as it would be drawn: 0, 1, 2, ... times."""
    tuning: TuningConfig = TuningConfig()
    """What is trained, and how fast."""

    def __post_init__(self) -> None:
        check_whole(self, "members")
        check_within(self, "smoothing", 0, 0.5)
        check_within(self, "uniform", 0, 1, ends="[)")
        check_within(self, "centering", 0)
        if self.loss not in ("pairs", "ranking"):
            raise ValueError(f"loss: got {self.loss!r}, expected 'pairs' or 'ranking'")


class RewardStageState(NamedTuple):
    """Everything that is learned: weights of the transformers and heads; draws of the bootstrap;
    the unit of the scores, gain [N] and bias [N], which is not trained.
    """

    trained: tuple[Params, Array]
    opt_state: Any
    draws: Key
    unit: tuple[Array, Array]


class RewardGiven(NamedTuple):
    """What the stage starts from: parameters of a language model; its responses, tokens and mask
    [R, T], where untrained heads shall give them mean 0 and deviation 1.
    """

    base: Params
    responses: tuple[Array, Array] | None = None


def make_reward(model: Transformer, config: RewardConfig = RewardConfig()) -> Stage:
    """Build the stage; its batches are `TextBatch` of rankings, its result a `TokenRewardState`.

    The result is not normalized: `TokenReward.normalize` knows what to normalize it on.
    """
    whole = config.kind == "whole"
    tuned, reward = tuning(config.tuning, members=whole), reward_of(model, config)

    def init(key: Key, given: RewardGiven) -> RewardStageState:
        head_key, weight_key, draws = jax.random.split(key, 3)
        first = reward.init(head_key, given.base)
        if given.responses is not None:
            first = reward.normalize(first, reward.scores(first, *given.responses))
        head = first.head
        if whole:
            keys = jax.random.split(weight_key, config.members)
            weights = jax.vmap(lambda key: tuned.init(key, given.base))(keys)
        else:
            weights = tuned.init(weight_key, given.base)
        trained = weights, head
        opt_state = tuned.optimizer.init(cast(Params, trained))
        return RewardStageState(trained, opt_state, draws, (first.gain, first.bias))

    def assemble(trained: Any, unit: Any, base: Params) -> TokenRewardState:
        weights, head = trained
        merge: Any = jax.vmap(tuned.merge, (None, 0)) if whole else tuned.merge
        return TokenRewardState(merge(base, weights), head, *unit)

    def loss(
        trained: Any, unit: Any, base: Params, batch: TextBatch, weight: Array
    ) -> tuple[Array, Array]:
        return reward_loss(config, reward, assemble(trained, unit, base), batch, weight)

    def step(
        state: RewardStageState, given: RewardGiven, batch: TextBatch, key: Key
    ) -> tuple[RewardStageState, Metrics]:
        del key
        weight = ranking_weights(config, state.draws, batch)
        (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(
            state.trained, state.unit, given.base, batch, weight
        )
        trained, opt_state, metrics = descend(
            tuned.optimizer, grads, state.opt_state, state.trained
        )
        metrics |= {
            "loss": value / config.members,
            "accuracy": jnp.mean(jax.vmap(accuracy, (0, None))(scores, batch.rank)),
            "score": jnp.mean(scores),
            "spread": jnp.mean(scores.std(0)),
        }
        return RewardStageState(trained, opt_state, state.draws, state.unit), metrics

    def result(state: RewardStageState, given: RewardGiven) -> TokenRewardState:
        return assemble(state.trained, state.unit, given.base)

    return Stage(init, step, result)


def reward_of(model: Transformer, config: RewardConfig) -> TokenReward:
    """Build the reward model that the stage trains."""
    return token_reward(model, config.members, config.kind)


def score_rankings(reward: TokenReward, state: TokenRewardState, batch: TextBatch) -> Array:
    """Score all answers, [N, B, K]: one evaluation for each of them, whatever the pairs."""
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (batch.tokens, batch.mask))
    return reward.scores(state, *rows).reshape(-1, *batch.rank.shape)


def reward_loss(
    config: RewardConfig, reward: TokenReward, state: TokenRewardState, batch: TextBatch,
    weight: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Compute the sum over members of mean losses; `weight` is [N, B]. Returns scores too."""
    scores, rank = score_rankings(reward, state, batch), batch.rank

    def one(scores: Array, rank: Array, margin: Array) -> Array:
        if config.loss == "ranking":
            # A sum over K - 1 choices: their mean, so that long rankings weigh no more.
            nll = plackett_luce_nll(scores, rank) / jnp.maximum(jnp.sum(rank >= 0) - 1, 1)
        else:
            nll = pair_nll(scores, rank, margin, config.smoothing, config.uniform)
        return nll + config.centering * centering_loss(scores, rank)

    losses = jax.vmap(jax.vmap(one), (0, None, None))(scores, rank, batch.margin)
    # A sum, so that the step size of a member does not depend on how many there are.
    return jnp.sum(jax.vmap(average)(losses, weight)), scores


def ranking_weights(config: RewardConfig, draws: Key, batch: TextBatch) -> Array:
    """Count each ranking for each member, [N, B]: absent rows 0, otherwise 1 or a draw.

    The draw of a row is the same in every epoch.
    """
    present = jnp.asarray(batch.row >= 0, jnp.float32)
    weight = jnp.broadcast_to(present, (config.members, *present.shape))
    if not config.bootstrap:
        return weight

    def draw(row: Array) -> Array:
        return jax.random.poisson(jax.random.fold_in(draws, row), 1.0, (config.members,))

    return weight * jax.vmap(draw)(jnp.maximum(batch.row, 0)).T

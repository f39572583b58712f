"""PPO on a language model: responses scored at their end, divergence paid for at every token.

The losses and the advantages are those of `agents/ppo.py`. With `advantage` 'rloo' or 'grpo' there
is no critic: responses to one prompt are compared with each other.

Reference: Ouyang et al. 2022 (arXiv:2203.02155); Ziegler et al. 2019 (arXiv:1909.08593).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp

from agents.rlhf.stage import Stage, TuningConfig, descend, tuning
from agents.rlhf.supervised import supervised_loss
from mbrl import replay
from mbrl.losses import token_policy
from mbrl.losses.policy_gradient import (
    average,
    clipped_surrogate_loss,
    clipped_value_loss,
    explained,
    policy_change,
    whiten,
)
from mbrl.models.generation import Generated, generate
from mbrl.models.token import chosen_log_probs, response_logits
from mbrl.models.token_reward import TokenReward, TokenRewardState
from mbrl.networks.transformer import Transformer
from mbrl.settings import check_whole, check_within
from mbrl.text_batches import SupervisedBatch
from mbrl.types import Array, Key, Metrics, Params
from mbrl.uncertainty import RiskKind, risk

Gold = Callable[[Array, Array], Array]
"""True reward where it is known: `(tokens [B, P + L], mask) -> [B]`."""


@dataclasses.dataclass(frozen=True)
class TokenPPOConfig:
    """Settings of PPO on a language model; (S) are those of Stiennon et al. 2020."""

    length: int = 48
    """Longest response, in tokens."""
    temperature: float = 0.7
    """Of sampling, and of every probability that is compared (S)."""
    samples: int = 1
    """Responses to each prompt of a batch."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """Of tokens, by a critic; or of responses, among those to one prompt."""
    epochs: int = 4
    """Passes over the responses (S)."""
    minibatches: int = 1
    """Parts that each pass is cut into (S)."""
    clip: float = 0.2
    """Distance from 1 at which a ratio of probabilities gains nothing more (S)."""
    value_clip: float = 0.2
    """Distance at which a value gains nothing more; 0 = none (S)."""
    value_weight: float = 0.1
    """Of the critic's loss beside the actor's (S)."""
    value: Literal["shared", "separate"] = "separate"
    """The critic reads the policy's transformer, or one of its own that begins as the reward's."""
    discount: float = 1.0
    """Per token (S)."""
    trace: float = 0.95
    """Lambda of the generalized advantages (S)."""
    kl_coef: float = 0.05
    """Units of score that a nat of divergence from the reference costs (S)."""
    kl_kind: token_policy.KlKind | Literal["exact"] = "k1"
    """Estimate of the divergence at a token; 'exact' sums over the vocabulary."""
    kl_target: float = 0.0
    """Nats per response that the cost is adapted to; 0 = it stays."""
    kl_horizon: float = 10_000.0
    """Responses over which it is adapted."""
    unended: float = 1.0
    """What a response without an end loses, in units of score."""
    unended_replaces: bool = False
    """Such a response scores `-unended`, whatever it says."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation, without moving their mean."""
    risk: RiskKind = "mean"
    """What the scores of an ensemble amount to, see `mbrl.uncertainty`."""
    risk_coef: float = 0.5
    """Coefficient of `risk`."""
    pretraining: float = 0.0
    """Weight of the supervised loss beside PPO's (PPO-ptx)."""
    tuning: TuningConfig = TuningConfig(learning_rate=1e-5)
    """What is trained, and how fast."""

    def __post_init__(self) -> None:
        check_whole(self, "length", "samples", "epochs", "minibatches")
        for name in ("temperature", "clip", "kl_horizon"):
            check_within(self, name, 0, ends="(]")
        for name in ("value_clip", "value_weight", "kl_coef", "kl_target", "unended"):
            check_within(self, name, 0)
        for name in ("discount", "trace"):
            check_within(self, name, 0, 1)
        for name, choices in (
            ("advantage", ("gae", "rloo", "grpo")), ("value", ("shared", "separate")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")
        if self.advantage != "gae" and self.samples < 2:
            raise ValueError(
                f"samples: got {self.samples} with advantage {self.advantage!r}, expected at least "
                "2 responses per prompt to compare; set for example samples to 4"
            )
        if self.kl_kind not in (*get_args(token_policy.KlKind), "exact"):
            raise ValueError(f"kl_kind: got {self.kl_kind!r}, expected k1, k2, k3 or exact")


class Critic(NamedTuple):
    """Value of what has been written so far: a head [D], on a transformer of its own or None's."""

    trunk: Params | None
    head: Array
    bias: Array


class TokenPPOState(NamedTuple):
    """Everything that is learned."""

    weights: Params
    critic: Critic
    opt_state: Any
    kl_coef: Array


class TokenPPOGiven(NamedTuple):
    """What the stage starts from, which is its reference too, and what it is paid by."""

    base: Params
    reward: TokenRewardState


class PromptBatch(NamedTuple):
    """Prompts [B, P], padded on the left; demonstrations, with `pretraining`."""

    tokens: Array
    mask: Array
    demonstrations: SupervisedBatch | None = None


class Responses(NamedTuple):
    """What an update learns from, rows [B, ...]; all but the first two are of the L tokens."""

    tokens: Array
    mask: Array
    log_prob: Array
    value: Array
    advantage: Array
    target: Array
    weight: Array


def make_token_ppo(
    model: Transformer, reward: TokenReward, eos: int,
    config: TokenPPOConfig = TokenPPOConfig(), gold: Gold | None = None,
) -> Stage:  # fmt: skip
    """Build the stage; its batches are `PromptBatch`, its result the policy's parameters.

    Args:
      model: the policy.
      reward: scores responses.
      eos: token that ends a response.
      config: see `TokenPPOConfig`.
      gold: true reward, to be logged beside the learned one.
    """
    tuned = tuning(config.tuning)

    def init(key: Key, given: TokenPPOGiven) -> TokenPPOState:
        weights = tuned.init(key, given.base)
        critic = first_critic(model, config, given)
        opt_state = tuned.optimizer.init(cast(Params, (weights, critic)))
        return TokenPPOState(weights, critic, opt_state, jnp.asarray(config.kl_coef, jnp.float32))

    def step(
        state: TokenPPOState, given: TokenPPOGiven, batch: PromptBatch, key: Key
    ) -> tuple[TokenPPOState, Metrics]:
        write_key, order_key = jax.random.split(key)
        params = tuned.merge(given.base, state.weights)
        prompts, mask = (jnp.repeat(x, config.samples, 0) for x in (batch.tokens, batch.mask))
        written = generate(
            model, params, write_key, prompts, mask, config.length, config.temperature, eos=eos
        )
        data, metrics = judge(model, reward, eos, config, gold, state, given, params, written)
        loss = partial(ppo_loss, model, config)

        def learn(learner: Any, rows: Array) -> tuple[Any, Metrics]:
            part = jax.tree.map(lambda x: x[rows], data)

            def total(trained: Any) -> tuple[Array, Metrics]:
                weights, critic = trained
                return loss(tuned.merge(given.base, weights), critic, part, batch.demonstrations)

            grads, found = jax.grad(total, has_aux=True)(learner[0])
            *learner, counts = descend(tuned.optimizer, grads, learner[1], learner[0])
            return tuple(learner), found | counts

        order = replay.shuffled(order_key, prompts.shape[0], config.epochs, config.minibatches)
        start = (state.weights, state.critic), state.opt_state
        ((weights, critic), opt_state), found = jax.lax.scan(learn, start, order)
        metrics |= {name: x.mean() for name, x in found.items()}
        metrics["policy/first_ratio"] = found["policy/ratio"][0]
        kl_coef = token_policy.adapt_kl_coef(
            state.kl_coef, metrics["kl"], prompts.shape[0], config.kl_target, config.kl_horizon
        )
        return TokenPPOState(weights, critic, opt_state, kl_coef), metrics

    def result(state: TokenPPOState, given: TokenPPOGiven) -> Params:
        return tuned.merge(given.base, state.weights)

    return Stage(init, step, result)


def first_critic(model: Transformer, config: TokenPPOConfig, given: TokenPPOGiven) -> Critic:
    """Make a critic that says 0, and knows what the reward model knows."""
    trunk = None
    if config.value == "separate" and config.advantage == "gae":
        whole = jax.tree.structure(given.reward.trunk) == jax.tree.structure(given.base)
        shapes = jax.tree.map(jnp.shape, given.reward.trunk) if whole else None
        alone = shapes == jax.tree.map(jnp.shape, given.base)
        trunk = jax.tree.map(lambda x: jnp.copy(x if alone else x[0]), given.reward.trunk)
    return Critic(trunk, jnp.zeros(model.config.width), jnp.zeros(()))


def evaluate(
    model: Transformer, config: TokenPPOConfig, params: Params, critic: Critic,
    tokens: Array, mask: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Return log-probabilities and values before each of the L tokens of responses, [B, L]."""
    length = config.length
    before = slice(-length - 1, -1)
    hidden = model.hidden(params, tokens, mask)[:, before]
    logits = model.logits(params, hidden)
    log_prob = chosen_log_probs(logits, tokens[:, -length:], mask[:, -length:], config.temperature)
    if critic.trunk is not None:
        hidden = model.hidden(critic.trunk, tokens, mask)[:, before]
    return log_prob, hidden @ critic.head + critic.bias


def judge(
    model: Transformer, reward: TokenReward, eos: int, config: TokenPPOConfig, gold: Gold | None,
    state: TokenPPOState, given: TokenPPOGiven, params: Params, written: Generated,
) -> tuple[Responses, Metrics]:  # fmt: skip
    """Score responses, charge for divergence, and compute advantages."""
    length, (tokens, mask, log_prob) = config.length, written
    response = mask[:, -length:]
    weight = response.astype(jnp.float32)
    kl = divergence(model, config, given.base, params, written)
    scores = reward.scores(given.reward, tokens, mask)
    ended = jnp.any(response & (tokens[:, -length:] == eos), 1)
    pursued = risk(scores, config.risk, config.risk_coef)
    score = token_policy.penalize_unended(pursued, ended, config.unended, config.unended_replaces)
    if config.advantage == "gae":
        rewards = token_policy.token_rewards(kl, score, response, state.kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, weight, shift=False)
        _, value = evaluate(model, config, params, state.critic, tokens, mask)
        advantage, target = token_policy.token_advantages(
            rewards, value, response, config.discount, config.trace
        )
        advantage = whiten(advantage, weight)
    else:
        total = (score - state.kl_coef * kl.sum(1)).reshape(-1, config.samples)
        compare = {
            "rloo": token_policy.leave_one_out_advantage,
            "grpo": token_policy.group_relative_advantage,
        }[config.advantage]
        advantage = jnp.broadcast_to(compare(total).reshape(-1, 1), response.shape)
        value = target = jnp.zeros(response.shape)
    metrics = {
        "kl": kl.sum(1).mean(),
        "kl_coef": state.kl_coef,
        "score": pursued.mean(),
        "score/penalized": score.mean(),
        "score/spread": scores.std(0).mean(),
        "length": weight.sum(1).mean(),
        "ended": ended.mean(),
        "policy/surprise": -average(log_prob, weight),
        "value/explained": explained(value, target, weight),
    }
    if gold is not None:
        true = gold(tokens, mask)
        metrics |= {"gold": true.mean(), "gold/error": true.std() / jnp.sqrt(true.size)}
    return Responses(tokens, mask, log_prob, value, advantage, target, weight), metrics


def divergence(
    model: Transformer, config: TokenPPOConfig, base: Params, params: Params, written: Generated
) -> Array:
    """Return the divergence from the reference at each token of the responses, [B, L] nats."""
    tokens, mask, log_prob = written
    length, temperature = config.length, config.temperature
    response = mask[:, -length:]
    reference = response_logits(model, base, tokens, mask, length)
    if config.kl_kind == "exact":
        logits = response_logits(model, params, tokens, mask, length)
        kl = token_policy.exact_kl(logits / temperature, reference / temperature)
    else:
        expected = chosen_log_probs(reference, tokens[:, -length:], response, temperature)
        kl = token_policy.kl_estimate(log_prob, expected, config.kl_kind)
    return jnp.where(response, kl, 0.0)


def ppo_loss(
    model: Transformer, config: TokenPPOConfig, params: Params, critic: Critic, part: Responses,
    demonstrations: SupervisedBatch | None,
) -> tuple[Array, Metrics]:  # fmt: skip
    """Compute the loss of some of the responses, and metrics."""
    log_prob, value = evaluate(model, config, params, critic, part.tokens, part.mask)
    weight = part.weight
    loss = actor = clipped_surrogate_loss(
        log_prob, part.log_prob, part.advantage, config.clip, weight
    )
    ratio = jnp.exp(log_prob - part.log_prob)
    metrics = {
        "policy/loss": actor,
        "policy/kl": policy_change(log_prob, part.log_prob, weight),
        "policy/clipped": average(jnp.abs(ratio - 1.0) > config.clip, weight),
        "policy/ratio": jnp.max(weight * jnp.abs(ratio - 1.0)),
    }
    if config.advantage == "gae":
        error = clipped_value_loss(value, part.value, part.target, config.value_clip, weight)
        loss, metrics["value/loss"] = loss + config.value_weight * error, error
    if config.pretraining and demonstrations is not None:
        nll = supervised_loss(model, params, demonstrations)
        loss, metrics["pretraining/loss"] = loss + config.pretraining * nll, nll
    return loss, metrics

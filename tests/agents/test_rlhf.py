"""The stages of RLHF on a model of a dozen tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.rlhf.direct import (
    DirectBatch,
    DirectConfig,
    DirectGiven,
    answer_log_probs,
    make_direct,
    pairs_of,
)
from agents.rlhf.ppo import PromptBatch, TokenPPOConfig, TokenPPOGiven, make_token_ppo
from agents.rlhf.reward import (
    RewardConfig,
    RewardGiven,
    make_reward,
    ranking_weights,
    reward_of,
    score_rankings,
)
from agents.rlhf.stage import TuningConfig, tuning
from agents.rlhf.supervised import SupervisedConfig, SupervisedGiven, make_supervised
from mbrl.losses.preference import pair_nll
from mbrl.models.token_reward import last_token, token_reward
from mbrl.networks.transformer import family_config, transformer
from mbrl.text_batches import BatchConfig, Cursor, SupervisedBatch, text_loader
from mbrl.text_rows import TokenRow

VOCAB, EOS, P, L = 12, 11, 3, 5
MODEL = transformer(
    family_config("gpt2", vocab=VOCAB, layers=1, width=16, heads=2, max_length=P + L)
)
FAST = TuningConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
def base() -> Any:
    # Weights of deviation 0.02 make every policy uniform, and any two of them alike.
    return jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, MODEL.init(jax.random.key(0)))


def rows(number: int, options: int, seed: int = 0) -> list[TokenRow]:
    rng = np.random.default_rng(seed)

    def answer() -> np.ndarray:
        return np.append(rng.integers(0, EOS, rng.integers(1, L)), EOS).astype(np.int32)

    return [
        TokenRow(
            rng.integers(0, EOS, rng.integers(1, P + 1)).astype(np.int32),
            tuple(answer() for _ in range(options)),
            tuple(range(options)),
        )
        for _ in range(number)
    ]


def batch_of(data: list[TokenRow]) -> Any:
    return text_loader(data, [(P, L)], BatchConfig(len(data), shuffle=False)).get(Cursor())[0]


def prompts(number: int) -> PromptBatch:
    data = [row._replace(answers=(), rank=()) for row in rows(number, 1)]
    batch = text_loader(data, [(P, 0)], BatchConfig(number, shuffle=False)).get(Cursor())[0]
    return PromptBatch(batch.tokens[:, 0], batch.mask[:, 0])


def run(stage: Any, given: Any, batch: Any, steps: int, key: int = 0) -> tuple[Any, list[Any]]:
    state, found = jax.jit(stage.init)(jax.random.key(key), given), []
    step = jax.jit(stage.step, donate_argnums=0)
    for number in range(steps):
        state, metrics = step(state, given, batch, jax.random.key(number))
        found.append(jax.device_get(metrics))
    return state, found


def equal(a: Any, b: Any) -> bool:
    return all(
        bool(jnp.array_equal(x, y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_supervised_learning_fits_only_what_is_to_be_predicted(base: Any) -> None:
    tokens = np.array([[1, 2, 3, 4, EOS, 0]])
    target = np.array([[0, 0, 1, 1, 1, 0]], bool)
    batch = SupervisedBatch(tokens, np.array([[1, 1, 1, 1, 1, 0]], bool), target)
    stage = make_supervised(MODEL, SupervisedConfig(FAST))
    state, found = run(stage, SupervisedGiven(base), batch, 60)
    assert found[-1]["loss"] < 0.05 < found[0]["loss"]
    # By hand: the mean over three tokens of minus their log-probability.
    params = stage.result(state, SupervisedGiven(base))
    hidden = MODEL.hidden(params, jnp.asarray(tokens), jnp.asarray(batch.mask))
    law = jax.nn.log_softmax(MODEL.logits(params, hidden))[0]
    nll = -np.mean([law[1, 3], law[2, 4], law[3, EOS]])
    _, again = jax.jit(stage.step)(state, SupervisedGiven(base), batch, jax.random.key(0))
    np.testing.assert_allclose(again["loss"], nll, rtol=1e-4)


def test_the_step_size_rises_and_falls_to_zero() -> None:
    weights = {"w": jnp.ones(3)}
    optimizer = tuning(TuningConfig(learning_rate=1.0, warmup=2, anneal=4, clip_norm=1e9)).optimizer
    state, sizes = optimizer.init(weights), []
    for _ in range(5):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, weights)
        sizes.append(-float(updates["w"][0]))
    np.testing.assert_allclose(sizes, [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-4)


def test_epsilon_is_added_to_the_root_of_the_second_moment() -> None:
    weights, tiny = {"w": jnp.ones(1)}, {"w": jnp.full(1, 1e-5)}
    for eps, size in ((1e-5, 0.5), (1e-8, 1.0)):
        optimizer = tuning(TuningConfig(learning_rate=1.0, eps=eps)).optimizer
        updates, _ = optimizer.update(tiny, optimizer.init(weights), weights)
        np.testing.assert_allclose(-updates["w"], size, rtol=2e-3)


def test_scores_are_read_at_the_last_real_token() -> None:
    x = jnp.arange(12.0).reshape(3, 4)[..., None]
    mask = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
    assert last_token(x, mask)[:, 0].tolist() == [1.0, 7.0, 11.0]


def test_a_score_does_not_depend_on_padding(base: Any) -> None:
    reward = token_reward(MODEL, 2)
    state = reward.init(jax.random.key(1), base)
    right = reward.scores(state, jnp.array([[1, 2, EOS, 7, 7]]), jnp.array([[1, 1, 1, 0, 0]], bool))
    left = reward.scores(
        state, jnp.array([[EOS, EOS, 1, 2, EOS]]), jnp.array([[0, 0, 1, 1, 1]], bool)
    )
    np.testing.assert_allclose(left, right, atol=1e-5)
    # Heads of deviation 1 / sqrt(D + 1) on normalized features give scores of size one.
    many = token_reward(MODEL, 4000).init(jax.random.key(2), base)
    np.testing.assert_allclose(many.head.std(), 17**-0.5, rtol=0.02)


def test_normalized_scores_have_mean_zero_and_deviation_one(base: Any) -> None:
    reward = token_reward(MODEL, 2)
    state = reward.init(jax.random.key(1), base)
    batch = batch_of(rows(32, 1))
    given = jnp.asarray(batch.tokens[:, 0]), jnp.asarray(batch.mask[:, 0])
    state = reward.normalize(state, reward.scores(state, *given))
    scores = reward.scores(state, *given)
    np.testing.assert_allclose(scores.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(scores.std(1), 1.0, atol=1e-4)
    assert equal(reward.normalize(state, scores).head, state.head)
    # On request before training, too; the members are still drawn as they would be without.
    config, start = RewardConfig(members=2), RewardGiven(base, given)
    stage = make_reward(MODEL, config)
    first = jax.jit(lambda key: stage.result(stage.init(key, start), start))(jax.random.key(1))
    scores = reward_of(MODEL, config).scores(first, *given)
    np.testing.assert_allclose(scores.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(scores.std(1), 1.0, atol=1e-4)
    other = jax.jit(stage.init)(jax.random.key(1), RewardGiven(base))
    assert equal(other.trained[1], first.head)
    assert other.unit[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("loss", ["pairs", "ranking"])
def test_prompts_with_more_answers_weigh_no_more(base: Any, loss: Any) -> None:
    long, short = rows(1, 4, 1)[0], rows(1, 2, 2)[0]
    batch = batch_of([long, short])
    assert batch.rank.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    config = RewardConfig(loss=loss, tuning=FAST)
    reward, stage = reward_of(MODEL, config), make_reward(MODEL, config)
    _, found = run(stage, RewardGiven(base), batch, 1, key=5)
    first = jax.jit(stage.init)(jax.random.key(5), RewardGiven(base))
    scores = score_rankings(reward, stage.result(first, RewardGiven(base)), batch)[0]
    each = [pair_nll(s, jnp.asarray(r)) for s, r in zip(scores, batch.rank, strict=True)]
    if loss == "ranking":  # the mean over the choices among what is left, three and one
        a, b, c, d = np.asarray(scores)[0].tolist()
        chosen = [np.exp(a), np.exp(b), np.exp(c)]
        left = [np.exp([a, b, c, d]).sum(), np.exp([b, c, d]).sum(), np.exp([c, d]).sum()]
        each[0] = jnp.asarray(-np.mean(np.log(np.divide(chosen, left))))
    np.testing.assert_allclose(found[0]["loss"], np.mean(each), rtol=1e-5)


def test_members_learn_as_if_they_were_alone(base: Any) -> None:
    batch, given = batch_of(rows(4, 3)), RewardGiven(base)
    stage = make_reward(MODEL, RewardConfig(members=2, tuning=FAST))
    step = jax.jit(stage.step)
    state = jax.jit(stage.init)(jax.random.key(0), given)
    weights, head = state.trained
    other = state._replace(trained=(weights, head.at[1].mul(50.0)))
    (w_a, h_a), (w_b, h_b) = (
        step(s, given, batch, jax.random.key(0))[0].trained for s in (state, other)
    )
    assert not equal(h_a[1], h_b[1])
    one = jax.tree.map(lambda x: x[0], (w_a, h_a)), jax.tree.map(lambda x: x[0], (w_b, h_b))
    for a, b in zip(*map(jax.tree.leaves, one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_reward_model_learns_rankings(base: Any) -> None:
    batch = batch_of(rows(8, 3))
    for config in (
        RewardConfig(members=2, kind="heads", centering=0.01, tuning=FAST),
        RewardConfig(members=2, loss="ranking", tuning=dataclasses.replace(FAST, lora=2)),
    ):
        _, found = run(make_reward(MODEL, config), RewardGiven(base), batch, 60)
        assert found[-1]["loss"] < 0.6 * found[0]["loss"]
    assert found[-1]["accuracy"] > 0.9


def test_a_row_is_drawn_as_often_in_every_epoch() -> None:
    config = RewardConfig(members=400, bootstrap=True)
    batch = batch_of(rows(3, 2))
    weight = ranking_weights(config, jax.random.key(0), batch)
    swapped = batch._replace(row=batch.row[::-1])
    assert equal(ranking_weights(config, jax.random.key(0), swapped), weight[:, ::-1])
    np.testing.assert_allclose(weight.mean(0), 1.0, atol=0.2)
    absent = batch._replace(row=np.array([0, -1, 2]))
    assert float(ranking_weights(config, jax.random.key(0), absent)[:, 1].max()) == 0.0


def likes_threes() -> Any:
    """Score a sequence by the share of token 3, without any parameters."""
    reward = token_reward(MODEL, 2)

    def scores(state: Any, tokens: Any, mask: Any) -> Any:
        share = jnp.sum((tokens == 3) & mask, 1) / 3.0
        return jnp.stack([share, share])

    return reward._replace(scores=scores)


def ppo(base: Any, steps: int, size: int = 32, **changes: Any) -> tuple[Any, Any, list[Any]]:
    config = TokenPPOConfig(**({
        "length": L, "temperature": 0.7, "value": "shared", "epochs": 2, "kl_coef": 0.02,
        "unended": 0.0, "tuning": TuningConfig(learning_rate=3e-3),
    } | changes))  # fmt: skip
    reward = likes_threes()
    given = TokenPPOGiven(base, reward.init(jax.random.key(3), base))
    stage = make_token_ppo(MODEL, reward, EOS, config)
    state, found = run(stage, given, prompts(size), steps)
    return stage.result(state, given), given, found


def test_ppo_begins_at_its_reference_and_learns(base: Any) -> None:
    before = jax.tree.map(np.array, base)
    _, given, found = ppo(base, 30)
    # Probabilities of the cached decoder, of the reference and of the first epoch agree.
    assert abs(found[0]["kl"]) < 1e-5
    assert found[0]["policy/first_ratio"] < 1e-5
    assert found[-1]["score"] > found[0]["score"] + 0.5
    assert found[-1]["kl"] > 0.5
    # Each step donates the state: the reference is not part of it.
    assert equal(given.base, before)


def test_a_cost_of_divergence_keeps_the_policy_at_its_reference(base: Any) -> None:
    _, _, free = ppo(base, 15)
    _, _, held = ppo(base, 15, kl_coef=5.0)
    assert held[-1]["kl"] < 0.3 * free[-1]["kl"]


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_responses_to_one_prompt_need_no_critic(base: Any, advantage: str) -> None:
    lora = TuningConfig(learning_rate=1e-2, lora=4)
    params, given, found = ppo(base, 30, 16, advantage=advantage, samples=4, tuning=lora)
    assert abs(found[0]["kl"]) < 1e-5
    assert found[0]["policy/first_ratio"] < 1e-5
    assert found[-1]["score"] > found[0]["score"] + 0.2
    # Adapters of dense layers leave all else as it was.
    assert equal(params["embed"], given.base["embed"])


def test_exact_divergence_pretraining_and_a_critic_of_its_own(base: Any) -> None:
    config = TokenPPOConfig(
        length=L, kl_kind="exact", pretraining=1.0, epochs=1, unended=7.0, risk="worst",
        whiten_rewards=True, kl_target=0.5, tuning=TuningConfig(learning_rate=1e-3),
    )  # fmt: skip
    reward = likes_threes()
    given = TokenPPOGiven(base, reward.init(jax.random.key(3), base))
    shown = SupervisedBatch(
        np.array([[1, 3, EOS]]), np.ones((1, 3), bool), np.array([[0, 1, 1]], bool)
    )
    batch = prompts(32)._replace(demonstrations=shown)
    state, found = run(make_token_ppo(MODEL, reward, EOS, config), given, batch, 3)
    assert abs(found[0]["kl"]) < 1e-5
    assert found[-1]["kl"] > 0.0
    assert found[-1]["pretraining/loss"] < found[0]["pretraining/loss"]
    lost = 7.0 * (1.0 - found[0]["ended"])
    np.testing.assert_allclose(found[0]["score/penalized"], found[0]["score"] - lost, rtol=1e-4)
    # Below its target the divergence becomes cheaper: an error of 20 % at most, 32 of 10,000.
    np.testing.assert_allclose(found[1]["kl_coef"], 0.05 * (1 - 0.2 * 32 / 10_000), rtol=1e-5)
    assert state.critic.trunk is not None


def test_direct_preference_begins_at_log_two_and_learns(base: Any) -> None:
    text = batch_of(pairs_of(rows(6, 3)))
    assert text.tokens.shape == (18, 2, P + L)
    reference = answer_log_probs(MODEL, base, text)
    stage = make_direct(MODEL, DirectConfig(tuning=FAST))
    _, found = run(stage, DirectGiven(base), DirectBatch(text, reference), 40)
    np.testing.assert_allclose(found[0]["loss"], np.log(2.0), rtol=1e-5)
    assert found[-1]["loss"] < 0.2
    assert found[-1]["accuracy"] == 1.0


def test_answers_that_are_merely_good_or_bad_suffice_for_kto(base: Any) -> None:
    data = [row._replace(rank=(i % 2,)) for i, row in enumerate(rows(8, 1))]
    text = batch_of(data)
    batch = DirectBatch(text, answer_log_probs(MODEL, base, text))
    _, found = run(
        make_direct(MODEL, DirectConfig(kind="kto", tuning=FAST)), DirectGiven(base), batch, 30
    )
    np.testing.assert_allclose(found[0]["loss"], 0.5, rtol=1e-5)
    assert found[-1]["reward/good"] > 0.0 > found[-1]["reward/bad"]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="samples: got 1 with advantage 'rloo'"):
        TokenPPOConfig(advantage="rloo")
    with pytest.raises(ValueError, match="kl_kind"):
        TokenPPOConfig(kl_kind="k9")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="advantage: got 'td', expected one of"):
        TokenPPOConfig(advantage="td")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="members, kind: got 0"):
        token_reward(MODEL, 0)

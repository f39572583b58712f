"""Generation, probabilities of responses, and the token task as a decision process."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.mdp import SplitParams, penalized, rollout, with_resets
from mbrl.models.generation import generate, sample_token, truncate
from mbrl.models.token import response_logits, token_log_probs, token_mdp, token_predictor
from mbrl.networks.transformer import family_config, transformer
from mbrl.planning.config import SearchConfig
from mbrl.planning.search import search

VOCAB, LENGTH, EOS = 6, 5, 2
MODEL = transformer(family_config("gpt2", vocab=VOCAB, layers=2, width=8, heads=2, max_length=8))
PROMPTS = jnp.array([[0, 0, 3], [1, 4, 5], [0, 2, 1], [5, 5, 5]])
MASK = jnp.array([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]], bool)


@pytest.fixture(scope="module")
def params() -> dict:
    # Larger than at the start, or every token would get nearly the same probability.
    params = jax.jit(MODEL.init)(jax.random.key(3))
    return jax.tree.map(lambda x: 12.0 * x if x.ndim > 1 else x, params)


@partial(jax.jit, static_argnames="stop")
def sampled(params, key, temperature, stop=True):
    # The pad token is EOS: the mask still tells the one that was drawn.
    return generate(
        MODEL, params, key, PROMPTS, MASK, LENGTH, temperature, eos=EOS, pad=EOS, stop=stop
    )


whole = jax.jit(MODEL.hidden)


@jax.jit
def log_probs(params, tokens, mask, temperature):
    return token_log_probs(MODEL, params, tokens, mask, LENGTH, temperature)


def test_reported_probabilities_are_those_of_training(params: dict) -> None:
    for temperature in (1.0, 0.5):
        out = sampled(params, jax.random.key(0), temperature)
        again = log_probs(params, out.tokens, out.mask, temperature)
        np.testing.assert_allclose(out.log_prob, again, atol=1e-5)
    assert jnp.abs(log_probs(params, out.tokens, out.mask, 1.0) - out.log_prob).max() > 0.1


def test_a_response_ends_with_its_eos(params: dict) -> None:
    out = sampled(params, jax.random.key(0), 1.0)
    ended = 0
    for tokens, mask, log_prob in zip(
        out.tokens[:, 3:].tolist(), out.mask[:, 3:].tolist(), out.log_prob, strict=True
    ):
        length = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        ended += length < LENGTH
        assert tokens[length:] == [EOS] * (LENGTH - length)
        assert mask == [True] * length + [False] * (LENGTH - length)
        assert (log_prob[:length] < 0).all() and (log_prob[length:] == 0).all()
    assert 0 < ended < 4
    np.testing.assert_array_equal(out.tokens[:, :3], PROMPTS)
    np.testing.assert_array_equal(out.mask[:, :3], MASK)


def test_stopping_early_changes_nothing(params: dict) -> None:
    early, late = (sampled(params, jax.random.key(1), 1.0, stop) for stop in (True, False))
    jax.tree.map(np.testing.assert_array_equal, early, late)


def test_greedy_generation_takes_the_likeliest_token_of_the_whole_sequence(params: dict) -> None:
    key = jax.random.key(0)
    out = jax.jit(lambda p: generate(MODEL, p, key, PROMPTS, MASK, LENGTH, 0.0))(params)
    assert out.mask[:, 3:].all()
    # Again without a cache, and padded on the other side.
    texts = [PROMPTS[row][MASK[row]].tolist() for row in range(4)]
    for _ in range(LENGTH):
        tokens = jnp.array([text + [0] * (8 - len(text)) for text in texts])
        length = jnp.array([len(text) for text in texts])
        hidden = whole(params, tokens, jnp.arange(8) < length[:, None])
        best = MODEL.logits(params, hidden[jnp.arange(4), length - 1]).argmax(-1)
        texts = [[*text, token] for text, token in zip(texts, best.tolist(), strict=True)]
    assert out.tokens[:, 3:].tolist() == [text[-LENGTH:] for text in texts]
    assert len({tuple(text[-LENGTH:]) for text in texts}) > 1


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = jnp.tile(jnp.log(jnp.array([0.1, 0.5, 0.0, 0.4])), (8000, 1))
    token, log_prob = sample_token(jax.random.key(0), logits, 0.5, top_k=2)
    # At temperature 1/2 probabilities are squared: 0.01, 0.25 and 0.16 of 0.42.
    count = np.bincount(token, minlength=4) / 8000
    np.testing.assert_allclose(count, [0, 25 / 41, 0, 16 / 41], atol=4 * 0.5 / 8000**0.5)
    expected = jnp.log(jnp.array([0.01, 0.25, 0.0, 0.16]) / 0.42)
    np.testing.assert_allclose(log_prob, expected[token], atol=1e-5)


def test_truncation_keeps_what_a_sorted_list_keeps() -> None:
    probability = jnp.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = jnp.log(probability)

    def kept(**options: float) -> list[int]:
        return np.flatnonzero(np.isfinite(truncate(logits, **options))).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.75) == [1, 3, 4]
    # Of the three that are left, 0.4 and 0.3 have 0.82 of the probability.
    assert kept(top_k=3, top_p=0.8) == [1, 3]


def test_truncation_makes_estimates_negative_but_not_the_exact_divergence() -> None:
    """The trap: a sampler that is truncated only sees where the policy has lost probability."""
    policy, reference = jnp.array([[0.5, 0.3, 0.2]]), jnp.array([[0.7, 0.2, 0.1]])
    token, log_prob = sample_token(jax.random.key(0), jnp.log(policy), 1.0, top_k=1)
    assert token.tolist() == [0]
    assert float(log_prob[0] - jnp.log(reference)[0, 0]) == pytest.approx(np.log(5 / 7))
    # What is reported is of the whole distribution, where nothing is missing.
    exact = jnp.sum(policy * (jnp.log(policy) - jnp.log(reference)))
    assert float(exact) == pytest.approx(0.5 * np.log(5 / 7) + 0.3 * np.log(1.5) + 0.2 * np.log(2))
    assert exact > 0
    everything = truncate(jnp.log(policy), top_k=1)
    assert np.isneginf(everything).sum() == 2


def test_nothing_but_the_response_is_predicted(params: dict) -> None:
    out = sampled(params, jax.random.key(0), 1.0)
    logits = response_logits(MODEL, params, out.tokens, out.mask, LENGTH)
    full = MODEL.logits(params, whole(params, out.tokens, out.mask))
    np.testing.assert_allclose(logits, full[:, 2:-1], atol=1e-5)
    total = jnp.exp(jax.nn.log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 6}, "length: got 6 after prompts of 3, expected 1 to 5"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"mask": MASK[:, 1:]}, r"prompts: got shape \(4, 3\) with a mask \(4, 2\)"),
    ],
)
def test_impossible_settings_are_refused(params: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(
            MODEL, params, jax.random.key(0), PROMPTS, **({"mask": MASK, "length": 2} | options)
        )


def test_probabilities_are_refused_where_there_is_no_context(params: dict) -> None:
    with pytest.raises(ValueError, match="length: got 3 for sequences of 3 tokens"):
        token_log_probs(MODEL, params, PROMPTS, MASK, 3)
    with pytest.raises(ValueError, match="temperature: got 0"):
        token_log_probs(MODEL, params, PROMPTS, MASK, 2, 0.0)


def token_sum(weight, tokens, mask):
    total = jnp.sum(jnp.where(mask, weight[tokens], 0.0), 1)
    return total, 0.5 * jnp.ones_like(total)


WEIGHT = jnp.array([0.3, -1.0, 0.2, 1.0, -0.5, 0.1])
TASK = token_mdp(MODEL, token_sum, 3, LENGTH, EOS)
init, step = jax.jit(TASK.init), jax.jit(TASK.step)


def padded(tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Fill up to the length of an observation."""
    room = ((0, 0), (0, 8 - tokens.shape[1]))
    return {"tokens": jnp.pad(tokens, room), "mask": jnp.pad(mask, room)}


def test_the_token_task_is_generation_step_by_step(params: dict) -> None:
    both = SplitParams(params, WEIGHT)
    task = penalized(with_resets(TASK, {"tokens": PROMPTS, "mask": MASK}), 2.0)

    @jax.jit
    def play(key):
        state = task.init(both, key, None, 16)
        policy = lambda key, state, t: jax.random.categorical(key, state.logits)  # noqa: E731
        return rollout(
            task, both, key, state, policy, LENGTH, lambda obs, a, o: (a, o.reward, o.discount)
        )

    state, (action, reward, discount) = play(jax.random.key(7))
    tokens, mask = state.tokens, state.mask
    assert state.done.all() and len({tuple(row) for row in tokens[:, :3].tolist()}) > 1
    length = mask[:, 3:].sum(1)
    for row in range(16):
        drawn = action[:, row].tolist()
        expected = drawn.index(EOS) + 1 if EOS in drawn else LENGTH
        assert length[row] == expected
        assert tokens[row, 3 : 3 + expected].tolist() == drawn[:expected]
        assert discount[:, row].tolist() == [1.0] * (expected - 1) + [0.0] * (6 - expected)
        assert np.count_nonzero(reward[:, row]) == 1
    assert 1 < len(set(length.tolist()))
    # Twice the deviation of 0.5 is taken off, once.
    np.testing.assert_allclose(reward.sum(0), token_sum(WEIGHT, tokens, mask)[0] - 1.0, atol=1e-5)


def test_a_state_goes_on_from_any_observation(params: dict) -> None:
    both = SplitParams(params, WEIGHT)
    key = jax.random.key(0)
    state = init(both, key, padded(PROMPTS, MASK))
    # The rows differ in length: the second one has ended.
    for action in ([3, EOS, 1, 4], [1, 1, 3, EOS]):
        state, _ = step(both, key, state, jnp.array(action))
    again = init(both, key, TASK.observe(both, state))
    np.testing.assert_array_equal(again.done, [False, True, False, True])
    for name in ("tokens", "mask", "count", "done"):
        np.testing.assert_array_equal(getattr(again, name), getattr(state, name))
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(getattr(again, name)[::2], getattr(state, name)[::2], atol=1e-5)
    after = [step(both, key, s, jnp.array([4, 0, 5, 0]))[0].logits[::2] for s in (state, again)]
    np.testing.assert_allclose(*after, atol=1e-5)


def test_search_beats_the_greedy_choice_of_its_own_prior(params: dict) -> None:
    """Two tokens are left: the best of the 31 ways to end is found by trying all."""
    both = SplitParams(params, WEIGHT.at[3].set(-2.0).at[5].set(2.0))
    config = SearchConfig(simulations=64, max_considered=6, discount=1.0)
    find = jax.jit(search(TASK, token_predictor(), config))
    tokens = jnp.concatenate([PROMPTS, jnp.array([[0, 1, 3]] * 4)], 1)
    real = jnp.pad(MASK, ((0, 0), (0, 3)), constant_values=True)
    start = init(both, jax.random.key(0), padded(tokens, real))

    def play(planned: bool) -> jax.Array:
        state, total = start, jnp.zeros(4)
        for key in jax.random.split(jax.random.key(0)):
            found = find(both, key, state, noise=0.0) if planned else None
            action = state.logits.argmax(-1) if found is None else found.action
            state, outcome = step(both, key, state, action)
            total += outcome.reward
        assert state.done.all()
        return total

    weight = both.reward
    ends = [weight[EOS]] + [
        weight[a] + weight[b] for a, b in itertools.product(range(VOCAB), repeat=2) if a != EOS
    ]
    assert len(ends) == 31
    best = token_sum(weight, tokens, real)[0] + max(ends)
    np.testing.assert_allclose(play(True), best, atol=1e-5)
    assert (best - play(False)).mean() > 1.0


def test_the_token_task_is_refused_where_it_does_not_fit(params: dict) -> None:
    with pytest.raises(ValueError, match="prompt, length: got 4 and 5"):
        token_mdp(MODEL, token_sum, 4, 5)
    both = SplitParams(params, WEIGHT)
    with pytest.raises(ValueError, match="obs: got None"):
        TASK.init(both, jax.random.key(0))
    with pytest.raises(ValueError, match=r"obs: got tokens \(4, 2\)"):
        TASK.init(both, jax.random.key(0), {"tokens": PROMPTS[:, 1:], "mask": MASK[:, 1:]})

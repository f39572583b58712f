"""Open-loop predictions: a linear system worked out by hand, a real model step by step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.models.open_loop import error_ahead, open_loop, open_loop_from_first
from mbrl.models.rssm import RSSM, Latent, RSSMConfig, RSSMState, rssm
from mbrl.types import MDP, Discrete, EnvSpec, Outcome, Record

B, T = 2, 7


def linear(noise: float) -> RSSM:
    """Remember half of the state, the whole action and, while looking, the observation."""
    spec = EnvSpec("linear", spaces.box(-np.inf, np.inf, (1,)), spaces.box(-1.0, 1.0, (1,)))

    def begin(batch):
        return Latent(jnp.zeros((batch, 1)), jnp.zeros((batch, 1)))

    def encode(state, key, latent, obs, prev_action, is_first):
        before = jnp.where(is_first[:, None], 0.0, state * latent.deter + prev_action)
        return Latent(before + obs, jnp.zeros_like(before))

    def step(state, key, latent, action):
        drawn = noise * jax.random.normal(key, latent.deter.shape)
        latent = Latent(state * latent.deter + action, drawn)
        return latent, Outcome(reward(state, latent), survival(state, latent), None)

    def decode(state, latent):
        return latent.deter + latent.stoch

    def reward(state, latent):
        return 2.0 * latent.deter[:, 0]

    def survival(state, latent):
        return jax.nn.sigmoid(latent.deter[:, 0])

    fields = dict.fromkeys(RSSM._fields)
    fields |= {"begin": begin, "encode": encode, "decode": decode, "reward": reward}
    fields |= {"survival": survival, "mdp": MDP(begin, step, decode, spec)}
    return RSSM(**fields)  # type: ignore[arg-type]


def recorded(seed: int = 0, reset: int | None = None) -> Record:
    rng = np.random.default_rng(seed)
    is_first = np.zeros((B, T), bool)
    is_first[:, 0] = True
    if reset is not None:
        is_first[1, reset] = True
    off = np.zeros((B, T), bool)
    obs, action = rng.uniform(-1, 1, (2, B, T, 1)).astype(np.float32)
    return Record(obs, action, np.zeros((B, T), np.float32), is_first, off, off)


def by_hand(record: Record, context: int) -> np.ndarray:
    found = np.zeros((B, T))
    for b in range(B):
        state = 0.0
        for t in range(T):
            seen = t < context
            forget = seen and record.is_first[b, t]
            state = 0.0 if forget else 0.5 * state + float(record.action[b, t - 1, 0])
            state += float(record.obs[b, t, 0]) if seen else 0.0
            found[b, t] = state
    return found


@functools.cache
def compiled(context: int, samples: int, noise: float) -> Any:
    return jax.jit(
        lambda key, record: open_loop(linear(noise), 0.5, key, record, context, samples)  # type: ignore[arg-type]
    )


def predict(record: Record, context: int = 3, samples: int = 1, noise: float = 0.0) -> Any:
    found = compiled(context, samples, noise)(jax.random.key(0), record)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("context", [1, 3, T])
@pytest.mark.parametrize("reset", [None, 2])
def test_looks_in_the_context_and_imagines_after_it(context, reset):
    record = recorded(reset=reset)
    found, wanted = predict(record, context), by_hand(record, context)
    np.testing.assert_allclose(found.obs[:, 0, :, 0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.reward[:, 0], 2 * wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.survival[:, 0], 1 / (1 + np.exp(-wanted)), rtol=1e-5)


def test_nothing_after_the_context_is_seen():
    record, other = recorded(0), recorded(1)
    late = np.arange(T) >= 3
    changed = record._replace(
        obs=np.where(late[:, None], other.obs, record.obs),
        is_first=record.is_first | (np.arange(T) == 5),
        is_terminal=record.is_terminal | (np.arange(T) == 4),
        reward=np.where(late, 7.0, record.reward).astype(np.float32),
    )
    jax.tree.map(np.testing.assert_array_equal, predict(record), predict(changed))


@pytest.mark.parametrize("at", [1, 2, 4, T - 1])
def test_an_action_counts_from_the_next_record_on(at):
    record = recorded()
    action = record.action.copy()
    action[:, at] += 0.5
    differs = predict(record).obs != predict(record._replace(action=action)).obs
    assert differs.any((0, 1, 3)).tolist() == [t > at for t in range(T)]


def test_a_reset_in_the_context_forgets_what_was_before():
    record, other = recorded(0, reset=2), recorded(1)
    early = (np.arange(T) < 2)[:, None]
    mixed = record._replace(
        obs=np.where(early, other.obs, record.obs),
        action=np.where(early, other.action, record.action),
    )
    before, after = predict(record).obs, predict(mixed).obs
    np.testing.assert_array_equal(before[1, :, 2:], after[1, :, 2:])
    assert (before[0, :, 2:] != after[0, :, 2:]).all()  # no reset in this row


def test_samples_share_the_context_and_part_after_it():
    found = predict(recorded(), 3, 400, noise=2.0).obs[..., 0]
    assert (found[:, :, :3] == found[:, :1, :3]).all()
    after = found[:, :, 3:] - by_hand(recorded(), 3)[:, None, 3:]
    np.testing.assert_allclose(after.mean(1), 0.0, atol=0.5)
    np.testing.assert_allclose(after.std(1), 2.0, atol=0.3)
    assert len(np.unique(after)) == after.size


def drawn(model: RSSM) -> RSSMState:
    """Fill the shapes of the parameters: to compile their initialization takes seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes.weights)
    return RSSMState(weights, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.statistics))


def test_a_real_model_is_filtered_and_imagined_step_by_step():
    space = {"cell": Discrete(3), "x": spaces.box(-9.0, 9.0, (2,))}
    spec = EnvSpec("tiny", space, spaces.box(-2.0, 2.0, (1,)))
    config = RSSMConfig(deter=16, hidden=8, units=8, stoch=3, classes=4, blocks=2)
    model, context = rssm(spec, config), 3
    obs = {"cell": np.zeros((B, T), np.int32), "x": recorded(1).obs.repeat(2, -1)}
    record = recorded(reset=1)._replace(obs=obs)
    state, key = drawn(model), jax.random.key(3)
    found = jax.jit(lambda *args: open_loop(model, *args, context, 2))(state, key, record)
    found = jax.tree.map(np.asarray, found)
    assert found.obs["cell"].shape == (B, 2, T)
    assert found.obs["cell"].dtype == jnp.int32
    assert found.obs["x"].shape == (B, 2, T, 2)
    assert found.reward.shape == found.survival.shape == (B, 2, T)

    @jax.jit
    def look(key, latent, obs, action, is_first):
        latent = model.encode(state, key, latent, obs, action, is_first)
        return latent, (model.decode(state, latent), model.reward(state, latent))

    @jax.jit
    def imagine(key, latent, action):
        latent, outcome = model.mdp.step(state, key, latent, action)
        return latent, (model.decode(state, latent), outcome.reward)

    # The same keys, one record at a time, for the second sample.
    filter_key, dream_key = jax.random.split(key)
    keys = [*jax.random.split(filter_key, T)[:context]]
    keys += [*jax.random.split(jax.random.split(dream_key, 2)[1], T - context)]
    latent, action = model.begin(B), np.zeros((B, 1), np.float32)
    for t in range(T):
        if t < context:
            obs, first = jax.tree.map(lambda x: x[:, t], (record.obs, record.is_first))
            latent, (obs, reward) = look(keys[t], latent, obs, action, first)
            action = record.action[:, t] / 2.0  # as the model is told: from -1 to 1
        else:
            latent, (obs, reward) = imagine(keys[t], latent, record.action[:, t - 1])
        np.testing.assert_array_equal(found.obs["cell"][:, 1, t], obs["cell"])
        np.testing.assert_allclose(found.obs["x"][:, 1, t], obs["x"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.reward[:, 1, t], reward, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    for context in (0, T + 1):
        with pytest.raises(ValueError, match=f"context: got {context}, expected 1 to {T}"):
            predict(recorded(), context)
    with pytest.raises(ValueError, match="samples: got 0"):
        predict(recorded(), samples=0)


def ahead(*args: Any, **more: Any) -> tuple[list[float], list[float]]:
    truth, guess, valid, context, steps = args
    arrays = (jnp.asarray(truth, jnp.float32), jnp.asarray(guess, jnp.float32))
    found = error_ahead(*arrays, jnp.asarray(valid), context, jnp.asarray(steps), **more)
    return found.model.tolist(), found.constant.tolist()


def test_errors_by_hand():
    # After the context of one record: 1, 3 and -1, -3; mean 0, variance 5.
    truth = np.array([[[2.0], [1.0], [3.0]], [[0.0], [-1.0], [-3.0]]])
    valid = np.ones((2, 3), bool)
    model, constant = ahead(truth, truth + 1.0, valid, 1, [1, 2, 3])
    np.testing.assert_allclose(model, [1 / np.sqrt(5), 1 / np.sqrt(5), np.nan])
    np.testing.assert_allclose(constant, [np.sqrt(1 / 5), np.sqrt((1 + 9) / 2 / 5), np.nan])


def test_records_beyond_an_episode_do_not_count():
    truth = np.array([[[0.0], [1.0], [5.0]], [[0.0], [-1.0], [99.0]]])
    valid = np.array([[True, True, False], [True, True, False]])
    guess = np.array([[[0.0], [1.5], [5.0]], [[0.0], [-1.5], [np.inf]]])
    model, constant = ahead(truth, guess, valid, 1, [0, 1, 2])
    np.testing.assert_allclose(model, [np.nan, 0.5, np.nan])
    np.testing.assert_allclose(constant, [np.nan, 1.0, np.nan])


def test_numbers_have_units_of_their_own_and_pixels_share_one():
    rng = np.random.default_rng(0)
    truth = rng.normal((0.0, 0.0, 9.81), (1.0, 100.0, 0.0), (50, 3, 3))
    valid = np.ones((50, 3), bool)
    guess = truth + np.array([1.0, 100.0, 5.0])  # one deviation of each that has one
    (alone,), _ = ahead(truth, guess, valid, 1, [1])
    np.testing.assert_allclose(alone, 1.0, rtol=0.1)
    (pooled,), _ = ahead(truth, guess, valid, 1, [1], pooled=True)
    variance = truth[:, 1:].var((0, 1)).sum()
    np.testing.assert_allclose(pooled, np.sqrt((1.0 + 100.0**2 + 25.0) / variance), rtol=1e-4)


def test_what_never_changes_has_no_error():
    still = np.full((2, 3, 1), 0.1)
    for pooled in (False, True):
        model, constant = ahead(still, still + 1.0, np.ones((2, 3), bool), 1, [1], pooled=pooled)
        assert np.isnan(model).all() and np.isnan(constant).all()


def test_from_the_first_record_on_actions_are_all_that_is_told():
    """x' = x + a + c, where the constant c belongs to the sample; the reward is x'."""

    def init(params, key, obs=None, batch=1):
        return obs, jnp.arange(obs.shape[0]) // B

    def step(params, key, state, action):
        moved = state[0] + action + state[1][:, None]
        return (moved, state[1]), Outcome(moved[:, 0], 0.5 * jnp.ones(len(moved)), None)

    mdp = MDP(init, step, lambda params, state: state[0], linear(0.0).mdp.spec)
    record = recorded()
    found = jax.jit(lambda r: open_loop_from_first(mdp, None, jax.random.key(0), r, 3))(record)
    assert found.obs.shape == (B, 3, T, 1)
    first, action = np.asarray(record.obs)[:, :1], np.asarray(record.action)[:, :-1]
    for sample in range(3):
        moved = np.cumsum(np.concatenate([first, action + sample], 1), 1)
        np.testing.assert_allclose(found.obs[:, sample], moved, rtol=1e-5)
        np.testing.assert_allclose(found.reward[:, sample, 1:], moved[:, 1:, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.reward[..., 0], 0.0)
    np.testing.assert_array_equal(found.survival[..., 0], 1.0)
    np.testing.assert_array_equal(found.survival[..., 1:], 0.5)

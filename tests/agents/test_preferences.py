"""An agent on preferences learns what the teacher wants, and never sees the true reward."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agents.muzero import MuZeroConfig, make_muzero
from agents.preferences import (
    PreferencesConfig,
    PreferencesState,
    fit_reward,
    meet,
    relabel,
    score,
    with_preferences,
)
from mbrl import normalization, optim, replay, spaces
from mbrl.models.reward import reward_model
from mbrl.preferences.comparisons import add, empty, filled
from mbrl.preferences.teachers import TEACHERS, TeacherConfig
from mbrl.training.device import run_device
from mbrl.training.learner import DriverConfig, Report, per_call
from mbrl.types import MDP, Agent, Batch, Discrete, EnvSpec, Outcome, Record, SampleSpec, Transition

SPEC = EnvSpec("drift", spaces.box(-np.inf, np.inf, (2,)), spaces.box(-1.0, 1.0, (1,)), 12)
SMALL = PreferencesConfig(
    labels=60, sessions=6, ask_every=80, segment=4, pool=4, members=2, hidden=(16,), updates=60,
    learning_rate=3e-3,
)  # fmt: skip
LATEST = SampleSpec("latest", 80, 80, 80, length=0)
SEQUENCES = SampleSpec("sequences", 400, 80, 80, updates=2, batch_size=16, length=6)
ALL = SampleSpec("all", 400, 80, 80)


def drift(scale: float = 1.0, shift: float = 0.0) -> MDP:
    """Positions that drift with the action; the reward is the first of them, scaled and shifted."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return jax.random.normal(key, (batch, 2)) if obs is None else obs

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        state = 0.9 * state + 0.3 * jax.random.normal(key, state.shape) + 0.2 * action
        return state, Outcome(scale * state[:, 0] + shift, jnp.ones(state.shape[0]), None)

    return MDP(init, step, lambda params, state: state, SPEC)


def spy(sampling: SampleSpec, rows: int = 2) -> Agent:
    """Act at random; keep what the last update was given."""

    def shown(batch: Batch) -> Any:
        return {"obs": batch.record.obs, "reward": batch.record.reward, "valid": batch.valid,
                "latent": batch.record.extras["latent"]}  # fmt: skip

    def act(state: Any, carry: Any, obs: Any, is_first: Any, key: Any, mode: Any) -> Any:
        action = jax.random.uniform(key, (is_first.shape[0], 1), minval=-1.0, maxval=1.0)
        return action, carry, {"latent": obs[:, 0]}

    def update(state: Any, batch: Batch, key: Any) -> Any:
        feedback = None
        if sampling.kind == "sequences":
            feedback = {"latent": batch.record.extras["latent"] + 100.0}
        return shown(batch), {"inner": jnp.zeros(())}, feedback

    def init(key: Any) -> Any:
        lead = {"latest": (4, 20), "all": (4, 100), "sequences": (rows, 16, 6)}[sampling.kind]
        return {"obs": jnp.zeros((*lead, 2)), "reward": jnp.zeros(lead),
                "valid": jnp.zeros(lead, bool), "latent": jnp.zeros(lead)}  # fmt: skip

    return Agent(init, lambda num: (), act, update, sampling)


def run(
    sampling: SampleSpec,
    config: PreferencesConfig = SMALL,
    steps: int = 800,
    mdp: MDP | None = None,
) -> Report:
    driver = DriverConfig(steps, 4, (0,), interval=80)

    def factory(hyper: Any) -> Agent:
        return with_preferences(spy(sampling), SPEC, config)

    return collections.deque(run_device(factory, mdp or drift(), driver), maxlen=1).pop()


def seen_by_agent(report: Report) -> dict[str, np.ndarray]:
    return {k: np.asarray(v[0]) for k, v in report.learner.agent.agent.items()}


@pytest.mark.parametrize("sampling", [LATEST, SEQUENCES, ALL], ids=lambda s: s.kind)
def test_what_the_teacher_prefers_is_learned_from_answers_alone(sampling):
    report = run(sampling)
    metrics = {name: float(value[0]) for name, value in report.metrics.items()}
    assert metrics["preferences/labels"] == 60
    assert metrics["preferences/correlation"] > 0.8
    assert metrics["preferences/accuracy"] > 0.9
    assert metrics["preferences/agreement"] > 0.5
    seen = seen_by_agent(report)
    # The reward arrives one record after what it is for: the position then.
    obs, reward = seen["obs"].reshape(-1, 2), seen["reward"].reshape(-1)
    known = (reward != 0) & seen["valid"].reshape(-1)
    assert np.corrcoef(obs[known, 0], reward[known])[0, 1] > 0.8


def test_the_agent_never_sees_the_true_reward():
    # An oracle answers the same for any positive scale, and nothing else reads the reward.
    one, other = (seen_by_agent(run(LATEST, steps=320, mdp=drift(s))) for s in (1.0, 1024.0))
    np.testing.assert_array_equal(one["reward"], other["reward"])
    assert np.abs(one["reward"]).max() > 0.1


def test_nothing_is_rewarded_across_the_border_of_episodes():
    report = run(LATEST, steps=320)
    ring = jax.tree.map(lambda x: np.asarray(x[0]), report.learner.ring)
    first = np.roll(ring.record.is_first, -int(ring.head), 1)[:, -20:]
    assert first[:, 1:].any()
    reward = seen_by_agent(report)["reward"]
    assert (reward[first] == 0.0).all()
    assert (reward[:, 1:][~first[:, 1:]] != 0.0).all()


def test_sequences_and_what_goes_back_belong_together():
    report = run(SEQUENCES, steps=160)
    seen = seen_by_agent(report)
    # The latents are observations, or those of an earlier update raised by a hundred.
    np.testing.assert_allclose(seen["latent"] % 100.0, seen["obs"][..., 0] % 100.0, atol=1e-3)
    ring = jax.tree.map(lambda x: np.asarray(x[0]), report.learner.ring)
    raised = ring.record.extras["latent"] - ring.record.obs[..., 0]
    filled_rows = slice(0, int(ring.size))
    off = raised[:, filled_rows] / 100.0
    np.testing.assert_allclose(off, np.round(off), atol=1e-4)
    assert {0.0, 1.0} <= set(np.round(off).reshape(-1))


def test_sessions_without_an_answer_leave_everything_in_order(monkeypatch):
    monkeypatch.setitem(TEACHERS, "skip", TeacherConfig(skip=100.0))
    skipping = dataclasses.replace(SMALL, teacher="skip")
    too_long = dataclasses.replace(SMALL, segment=13)  # no episode has that many transitions
    for config in (skipping, too_long):
        report = run(LATEST, config, 320, drift(shift=10.0))
        assert float(report.metrics["preferences/labels"][0]) == 0
        # All is worth the same as long as nobody has said anything.
        assert float(report.metrics["preferences/reward"][0]) == 0.0
        np.testing.assert_array_equal(seen_by_agent(report)["reward"], 0.0)
        state = report.learner.agent
        assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.reward))
        # A session is not used up by there being nothing to ask.
        assert int(state.session[0]) == (4 if config is skipping else 0)


def test_the_gap_is_zero_on_what_was_labelled_and_grows_with_what_is_overrated():
    report = run(LATEST)
    metrics = {name: float(value[0]) for name, value in report.metrics.items()}
    truth = jax.tree.map(lambda x: float(x[0]), report.learner.agent.truth)
    assert truth.count == 60 * 2 * 4  # answers, segments and steps
    expected = (metrics["preferences/true_reward"] - truth.mean) / np.sqrt(truth.var)
    gap = metrics["preferences/reward"] - expected
    np.testing.assert_allclose(metrics["preferences/gap"], gap, atol=1e-4)
    # Actions are random all along: what was labelled is like what is done now.
    assert abs(gap) < 0.3
    assert 0.5 < truth.var < 1.0  # between that of a long episode and that of starts


def test_heads_of_agents_that_learn_at_every_step_learn_as_much_per_step():
    config = dataclasses.replace(SMALL, updates=100)
    counts = []
    for every, num_envs in ((1, 1), (1, 5), (80, 1), (200, 1)):
        sampling = SampleSpec("sequences", 400, 80, every, batch_size=16, length=6)
        agent = with_preferences(spy(sampling), SPEC, config)
        state = jax.eval_shape(agent.init, jax.random.key(0))
        batches = per_call(agent.sampling, num_envs).updates
        lead = (batches, 16, 7)
        flag = jnp.zeros(lead, bool)
        record = Record(
            jnp.zeros((*lead, 2)), jnp.zeros((*lead, 1)), jnp.zeros(lead), flag, flag, flag,
            {"latent": jnp.zeros(lead)},
        )  # fmt: skip
        batch = Batch(record, flag, jnp.zeros((batches, 16, 2), int))
        program = jax.make_jaxpr(agent.update)(state, batch, jax.random.key(0))
        scans = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
        counts.append(scans)
    expected = (2, 10, 100, 100)
    assert [n in found for n, found in zip(expected, counts, strict=True)] == [True] * 4
    assert not {10, 100} & set(counts[0])


def test_sessions_come_by_the_steps_of_all_environments():
    asked = dataclasses.replace(SMALL, labels=20, sessions=2, first=0.0, ask_every=160)
    driver = DriverConfig(240, 4, (0,), interval=80)
    for every in (1, 80):
        sampling = SampleSpec("sequences", 400, 80, every, batch_size=16, length=6)

        def factory(hyper: Any, sampling: SampleSpec = sampling) -> Agent:
            return with_preferences(
                spy(sampling, rows=4 if sampling.every == 1 else 1), SPEC, asked
            )

        labels = [
            float(report.metrics["preferences/labels"][0])
            for report in run_device(factory, drift(), driver)
            if report.metrics
        ]
        # The second session comes 160 steps after the first, which the warm-up of 80 ends with.
        assert labels[0] < 20, every
        assert labels[-1] == 20, every


def test_a_teacher_errs_as_often_as_was_asked_for():
    wrong = dataclasses.replace(SMALL, teacher="mistake", mistake=1.0, updates=200)
    metrics = run(LATEST, wrong).metrics
    assert float(metrics["preferences/correlation"][0]) < -0.8  # all it says is the opposite
    assert run(LATEST, dataclasses.replace(wrong, teacher="oracle")).metrics[
        "preferences/correlation"
    ][0] > 0.8  # fmt: skip


def test_updates_that_read_less_than_a_segment_are_refused():
    with pytest.raises(ValueError, match=r"preferences\.segment: got 20 .* 20 records.*--num-envs"):
        run(LATEST, dataclasses.replace(SMALL, segment=20), 160)


@pytest.mark.parametrize("query", ["uniform", "entropy", "k_center"])
def test_every_kind_of_query_asks_as_much(query):
    report = run(LATEST, dataclasses.replace(SMALL, query=query, updates=2), 480)
    assert float(report.metrics["preferences/labels"][0]) == 60


def answers(num: int) -> Any:
    """Comparisons of random segments by the sum of their first entries."""
    rng = np.random.default_rng(0)
    obs = jnp.asarray(rng.normal(size=(num, 2, 4, 2)), jnp.float32)
    action = jnp.asarray(rng.uniform(-1, 1, (num, 2, 4, 1)), jnp.float32)
    nothing: Any = None
    segments = Transition(obs, action, nothing, obs + 1.0, nothing)
    total = obs[..., 0].sum(-1)
    rank = jnp.stack([total[:, 0] < total[:, 1], total[:, 0] >= total[:, 1]], 1).astype(int)
    start = empty(jax.tree.map(lambda x: x[0], segments), 2 * num)
    return add(start, segments, rank, jnp.ones(num, bool))[0]


def fitted(config: PreferencesConfig) -> Any:
    model = reward_model(SPEC, config.members, config.hidden)
    state = model.init(jax.random.key(0))
    units = jnp.zeros((config.members, 1)), jnp.ones((config.members, 1))
    state = state._replace(offset=units[0], scale=units[1])
    optimizer = optim.apply_if_finite_counted(optax.adamw(3e-3))
    labelled, zero = answers(50), jnp.zeros((), int)
    whole = PreferencesState(
        (),
        state,
        optimizer.init(state.weights),
        labelled,
        labelled,
        zero,
        zero,
        zero,
        jnp.zeros(()),
        normalization.empty(),
    )
    reward, _, metrics = fit_reward(
        config, model, optimizer, whole, jax.random.key(1), config.updates
    )
    return model, reward, whole.comparisons, metrics


def test_every_head_has_mean_zero_and_deviation_one_over_what_was_labelled():
    config = dataclasses.replace(SMALL, updates=300, members=3)
    model, reward, comparisons, metrics = fitted(config)
    assert float(metrics["preferences/accuracy"]) > 0.9
    known = np.asarray(filled(comparisons))
    assert known.sum() == 50
    everyone = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (3, *x.shape)), comparisons.segments
    )  # fmt: skip
    given = np.asarray(model.score(reward.weights, reward, everyone))[:, known]
    np.testing.assert_allclose(given.mean((1, 2, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(given.std((1, 2, 3)), 1.0, atol=1e-3)
    # The likelihood is that of the networks themselves: units are not learned against.
    raw = np.asarray(score(model, reward, comparisons.segments))[:, known]
    assert (np.abs(raw.std((1, 2, 3)) - 1.0) > 1e-3).all()


def test_agreement_is_with_answers_that_nothing_was_learned_from():
    config = dataclasses.replace(SMALL, updates=300)
    model, reward, comparisons, _ = fitted(config)
    zero, nothing, none = jnp.zeros((), int), jnp.zeros(()), normalization.empty()
    state = PreferencesState(
        (), reward, (), comparisons, comparisons, zero, zero, zero, nothing, none
    )
    assert float(meet(model, state).agreement) > 0.9  # all are new
    known = state._replace(known=comparisons.size, agreement=jnp.asarray(0.3))
    assert float(meet(model, known).agreement) == np.float32(0.3)  # none is
    # Five answers that contradict all that was said before.
    rows = jax.tree.map(lambda x: x[:5], comparisons.segments)
    more, _ = add(comparisons, rows, 1 - comparisons.rank[:5], jnp.ones(5, bool))
    met = meet(model, known._replace(comparisons=more))
    assert float(met.agreement) < 0.3
    assert int(met.known) == 55
    # People take answers back: those that remain are not new.
    fewer = meet(model, met._replace(comparisons=comparisons, agreement=jnp.asarray(0.7)))
    assert (int(fewer.known), float(fewer.agreement)) == (50, np.float32(0.7))


def test_what_is_learned_depends_on_the_step_alone_and_pessimism_costs_its_spread():
    config = dataclasses.replace(SMALL, penalty=2.0)
    model, reward, comparisons, _ = fitted(config)
    rows = jax.tree.map(lambda x: x[:3, 0], comparisons.segments)
    flag = jnp.zeros((3, 4), bool)
    record = Record(rows.obs, rows.action, jnp.ones((3, 4)), flag, flag, flag, ())
    batch = Batch(record, ~flag)
    neutral, _ = relabel(dataclasses.replace(config, penalty=0.0), model, reward, batch, False)
    cautious, metrics = relabel(config, model, reward, batch, False)
    lost = np.asarray(neutral.record.reward - cautious.record.reward)
    np.testing.assert_array_equal(lost[:, 0], 0.0)
    np.testing.assert_allclose(lost[:, 1:].mean(), 2.0 * metrics["preferences/spread"], rtol=1e-5)
    assert (lost[:, 1:] > 0).all()
    # That an episode ended, or how long it was, is not seen.
    ended = record._replace(is_terminal=flag.at[:, 3].set(True), is_last=flag.at[:, 3].set(True))
    again, _ = relabel(config, model, reward, batch._replace(record=ended), False)
    np.testing.assert_array_equal(again.record.reward, cautious.record.reward)


def test_agents_and_settings_that_do_not_fit_are_refused():
    spec = SPEC._replace(action=Discrete(2))
    prioritized = make_muzero(spec, MuZeroConfig(priority=1.0))
    with pytest.raises(ValueError, match="--priority 0"):
        with_preferences(prioritized, spec, SMALL)
    with pytest.raises(ValueError, match="preferences.labels"):
        with_preferences(spy(LATEST), SPEC, PreferencesConfig())
    with pytest.raises(ValueError, match="preferences.segment"):
        PreferencesConfig(segment=0)


def test_short_sequences_are_read_long_enough_for_a_segment():
    two = SampleSpec("sequences", 100, 20, 20, length=2)
    assert with_preferences(spy(two), SPEC, SMALL).sampling.length == 5
    long = with_preferences(spy(SEQUENCES), SPEC, SMALL).sampling
    assert long.length == 7
    assert replay.minibatches(0.5, 4, long.length, 100, 50).length == 7

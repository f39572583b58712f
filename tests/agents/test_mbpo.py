"""MBPO: what actor and critics learn from, how it is imagined, and everything in one update."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import mbpo
from agents.mbpo import MBPOConfig, make_mbpo
from agents.preferences import PreferencesConfig, with_preferences
from agents.sac import LearnerConfig
from mbrl import replay, spaces
from mbrl.training import checkpoint
from mbrl.training.device import run_device
from mbrl.training.host import run_host
from mbrl.training.learner import DriverConfig, Report
from mbrl.training.offline import run_offline
from mbrl.types import MDP, Discrete, EnvSpec, Outcome
from tests.mbrl.toys import StreamEnv

LEARNER = LearnerConfig(
    hidden=(16,), learning_rate=1e-2, batch_size=20, discount=0.5, temperature=0.1,
    target_rate=0.1, target_entropy=-2.0, discrete_entropy=0.1,
)  # fmt: skip
TINY = MBPOConfig(
    members=3, elites=2, hidden=(8,), batch_size=16, max_epochs=4, termination_epochs=2,
    rollouts=32, train_ratio=2.0, random_steps=40, train_every=40, capacity=200, sac=LEARNER,
)  # fmt: skip
LINE = spaces.box(-np.inf, np.inf, (2,))
SPEC = EnvSpec("reach", LINE, spaces.box(-1.0, 3.0, (1,)), 5)
KEY = jax.random.key(3)


def task(spec: EnvSpec = SPEC, edge: float = np.inf) -> MDP:
    """Drift a little; paid for large actions; over beyond the edge."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return 0.5 * jax.random.normal(key, (batch, 2))

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        moved = state + 0.2 * jax.random.normal(key, state.shape)
        alive = (moved[:, 0] < edge).astype(jnp.float32)
        return moved, Outcome(1.0 * action.reshape(state.shape[0]), alive, None)

    return MDP(init, step, lambda params, state: state, spec)


def factory_of(spec: EnvSpec = SPEC, config: MBPOConfig = TINY, **options: Any) -> Any:
    return lambda hyper: make_mbpo(spec, dataclasses.replace(config, **hyper), **options)


def last(reports: Any) -> Report:
    return collections.deque(reports, maxlen=1).pop()


@functools.cache
def trained() -> Report:
    return last(run_device(factory_of(), task(), DriverConfig(400, 2, interval=40)))


def greedy(report: Report, spec: EnvSpec = SPEC, seed: int = 0) -> np.ndarray:
    state = jax.tree.map(lambda x: x[seed], report.learner.agent)
    obs, first = 0.3 * jax.random.normal(KEY, (6, 2)), jnp.ones(6, bool)
    return np.asarray(make_mbpo(spec, TINY).act(state, (), obs, first, KEY, "greedy")[0])


def test_actions_go_where_the_reward_is_and_stay_within_their_bounds():
    report = trained()
    assert all(np.isfinite(value).all() for value in report.metrics.values())
    assert greedy(report).min() > 2.3
    agent, first = make_mbpo(SPEC, TINY), jnp.ones(64, bool)
    state = jax.tree.map(lambda x: x[0], report.learner.agent)
    for mode in ("random", "explore"):
        action = agent.act(state, (), jnp.zeros((64, 2)), first, KEY, mode)[0]
        assert -1.0 <= action.min() < action.max() <= 3.0


@pytest.mark.slow
def test_integers_are_chosen_as_well():
    spec = SPEC._replace(action=Discrete(4))
    report = last(run_device(factory_of(spec), task(spec), DriverConfig(400, 2, interval=40)))
    np.testing.assert_array_equal(greedy(report, spec), 3)


@functools.cache
def ring(edge: float = 0.6) -> Any:
    """Return the learner of a task that ends, and the batch of its next update."""
    report = last(run_device(factory_of(), task(edge=edge), DriverConfig(120, 2, interval=40)))
    learner = jax.tree.map(lambda x: x[0], report.learner)
    return learner, replay.sample(learner.ring, KEY, make_mbpo(SPEC, TINY).sampling)


def test_an_explorer_learns_from_imagined_disagreement_and_acts_while_exploring(monkeypatch):
    agent = make_mbpo(SPEC, dataclasses.replace(TINY, explore="disagreement"))
    state, batch = jax.jit(agent.init)(KEY), ring()[1]
    worlds, ratios = [], []

    def branches(mdp: Any, *rest: Any) -> Any:
        worlds.append(mdp)
        return imagined(mdp, *rest)

    def mixed(*rest: Any) -> Any:
        ratios.append(rest[-1])
        return draw(*rest)

    imagined, draw = mbpo.branches, mbpo.mixed
    monkeypatch.setattr(mbpo, "branches", branches)
    monkeypatch.setattr(mbpo, "mixed", mixed)
    metrics = jax.eval_shape(agent.update, state, batch, KEY)[1]
    assert ratios == [TINY.real_ratio, 0.0]
    assert {"explorer/reward", "explorer/skipped_updates", "explorer/skipped_in_a_row"} <= set(
        metrics
    )
    model, obs, action = state.ensemble.model, jnp.ones((6, 2)), jnp.ones((6, 1))
    plain, curious = (jax.jit(world.step)(model, KEY, obs, action)[1] for world in worlds)
    assert plain.uncertainty is None
    np.testing.assert_array_equal(curious.reward, curious.uncertainty)
    assert np.all(curious.reward > 0)

    first = jnp.ones(6, bool)

    @functools.partial(jax.jit, static_argnums=3)
    def act(sac: Any, explorer: Any, acts: bool, mode: Any) -> Any:
        now = state._replace(sac=sac, explorer=mbpo.Explorer(explorer, jnp.asarray(acts)))
        return agent.act(now, (), obs, first, KEY, mode)[0]

    one, two = state.sac, state.explorer.sac
    mine, others = act(one, one, False, "greedy"), act(two, two, False, "greedy")
    assert np.any(mine != others)
    for acts in (False, True):  # turns are of exploring alone
        np.testing.assert_array_equal(act(one, two, acts, "greedy"), mine)
    mine, others = act(one, one, False, "explore"), act(two, two, False, "explore")
    assert np.any(mine != others)
    np.testing.assert_array_equal(act(one, two, False, "explore"), mine)
    np.testing.assert_array_equal(act(one, two, True, "explore"), others)


def test_an_explorer_takes_turns_with_the_policy_that_is_evaluated():
    agent = make_mbpo(SPEC, dataclasses.replace(TINY, explore="disagreement", max_epochs=1))
    state, batch = jax.jit(agent.init)(KEY), ring()[1]
    update = jax.jit(agent.update)
    turns = [
        bool(update(state, batch, jax.random.key(seed))[0].explorer.acts) for seed in range(12)
    ]
    assert 1 <= sum(turns) <= 11


def test_branches_begin_where_episodes_go_on_and_a_share_of_what_is_learned_is_real(monkeypatch):
    learner, batch = ring()
    kept: dict[str, Any] = {}

    def branches(mdp: Any, params: Any, key: Any, obs: Any, *rest: Any) -> Any:
        found = imagined(mdp, params, key, obs, *rest)
        jax.debug.callback(lambda *x: kept.update(starts=x[0], found=x[1]), obs, found)
        return found

    def mixed(real: Any, other: Any, key: Any, num: int, ratio: Any) -> Any:
        kept.update(num=num, ratio=ratio)
        jax.debug.callback(lambda *x: kept.update(real=x[0], imagined=x[1]), real, other)
        return draw(real, other, key, num, ratio)

    imagined, draw = mbpo.branches, mbpo.mixed
    monkeypatch.setattr(mbpo, "branches", branches)
    monkeypatch.setattr(mbpo, "mixed", mixed)
    jax.jit(make_mbpo(SPEC, TINY).update)(learner.agent, batch, KEY)
    jax.effects_barrier()
    record = jax.tree.map(np.asarray, batch.record)
    going_on = {tuple(x) for x in record.obs[np.asarray(batch.valid)].tolist()}
    ends = {tuple(x) for x in record.obs[record.is_last].tolist()}
    assert len(ends) > 3
    starts = {tuple(x) for x in np.asarray(kept["starts"]).tolist()}
    assert starts <= going_on
    assert not starts & ends
    assert (kept["num"], kept["ratio"]) == (20, 0.05)
    data, counts = kept["found"]
    rows = kept["imagined"].rows[: int(kept["imagined"].count)]
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(counts))
    assert int(kept["real"].count) == int(batch.valid.sum())
    assert float(data.is_terminal.max()) > 0.5  # the model has learned where episodes end


def test_rollouts_grow_with_the_steps_of_the_environment():
    config = dataclasses.replace(TINY, length=(1, 4), schedule=(40, 160), train_ratio=0.1)
    found = []
    for report in run_device(factory_of(config=config), task(), DriverConfig(200, 2, interval=40)):
        found.append(float(report.metrics["imagined/length"][0]))
        rows = report.metrics["imagined/transitions"][0]
        assert rows == 32 * found[-1]  # nothing ends here, and nothing else is cut
    assert found == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_pessimism_lowers_what_is_imagined_by_the_disagreement():
    learner, batch = ring()

    def imagined(penalty: float) -> float:
        agent = make_mbpo(SPEC, dataclasses.replace(TINY, penalty=penalty, train_ratio=0.025))
        return float(jax.jit(agent.update)(learner.agent, batch, KEY)[1]["imagined/reward"])

    neutral, careful, more, bold = (imagined(x) for x in (0.0, 1.0, 2.0, -1.0))
    assert careful < neutral < bold
    np.testing.assert_allclose(more - neutral, 2.0 * (careful - neutral), rtol=1e-3)
    np.testing.assert_allclose(bold - neutral, neutral - careful, rtol=1e-3)


def test_imagined_episodes_end_where_the_model_knows_less_than_it_did_of_the_data():
    learner, batch = ring(np.inf)

    @jax.jit
    def imagined(halt: Any) -> Any:
        config = dataclasses.replace(TINY, halt=halt, halt_margin=3.0, train_ratio=0.025)
        agent = make_mbpo(SPEC, dataclasses.replace(config, length=(3, 3)))
        return agent.update(learner.agent, batch, KEY)[1]

    never, seldom, often = (imagined(jnp.asarray(x)) for x in (0.0, 1.0, 0.2))
    assert float(never["imagined/ended"]) < 0.01
    assert never["imagined/ended"] <= seldom["imagined/ended"] < 0.3 < often["imagined/ended"]
    # Steps after a halt do not count.
    assert often["imagined/transitions"] < 0.7 * never["imagined/transitions"]
    assert often["imagined/reward"] < seldom["imagined/reward"]


def test_a_known_reward_replaces_the_recorded_one_everywhere():
    def given(obs: Any, action: Any, next_obs: Any) -> Any:
        return -2.0 - action[:, 0]

    report = last(
        run_device(factory_of(reward_fn=given), task(), DriverConfig(400, 2, interval=40))
    )
    assert greedy(report).max() < -0.3
    assert float(report.metrics["imagined/reward"][0]) < 0.0
    assert float(report.metrics["replay/reward"][0]) < 0.0


@pytest.mark.slow
def test_what_is_preferred_is_learned_instead_of_the_reward():
    asked = PreferencesConfig(
        labels=40, sessions=4, ask_every=80, segment=3, pool=2, members=2, hidden=(8,), updates=100,
        batch_size=16, learning_rate=1e-2,
    )  # fmt: skip

    def factory(hyper: Any) -> Any:
        return with_preferences(make_mbpo(SPEC, TINY), SPEC, asked)

    report = last(run_device(factory, task(), DriverConfig(400, 2, interval=80)))
    assert float(report.metrics["preferences/labels"][0]) == 40.0
    assert float(report.metrics["preferences/correlation"][0]) > 0.5


@pytest.mark.slow
def test_both_drivers_end_with_the_same_learner():
    config = DriverConfig(80, 2, interval=40)
    device = last(run_device(factory_of(), task(), config)).learner
    host = last(run_host(factory_of(), [StreamEnv(task(), 2)], config)).learner
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        device.agent, host.agent,
    )  # fmt: skip


@pytest.mark.slow
def test_seeds_share_a_program_and_settings_may_differ():
    hyper = {"penalty": jnp.array([0.0, 5.0]), "real_ratio": jnp.array([0.5, 0.1])}
    config = DriverConfig(80, 2, (5, 5), interval=40)
    both = last(run_device(factory_of(), task(), config, hyper))
    alone = last(
        run_device(
            factory_of(), task(), dataclasses.replace(config, seeds=(5,)),
            {k: v[1:] for k, v in hyper.items()},
        )
    )  # fmt: skip
    np.testing.assert_allclose(
        both.metrics["imagined/reward"][1], alone.metrics["imagined/reward"][0], rtol=1e-3
    )
    assert both.metrics["imagined/reward"][0] > both.metrics["imagined/reward"][1]


def test_a_run_that_is_cut_ends_bit_for_bit(tmp_path):
    def run(steps: int, snapshot: Any = None) -> Any:
        config = DriverConfig(steps, 2, interval=40)
        return last(run_device(factory_of(), task(), config, snapshot=snapshot)).snapshot()

    half = run(90)
    checkpoint.save(tmp_path, 90, half, {})
    restored: Any = checkpoint.restore(tmp_path, half)
    assert checkpoint.digest(run(160, restored.tree)) == checkpoint.digest(run(160))


@pytest.mark.slow
def test_records_alone_are_enough():
    record = jax.tree.map(lambda x: np.asarray(x)[0], trained().learner.ring.record)
    report = last(run_offline(factory_of(), SPEC, record, DriverConfig(8, interval=4)))
    assert greedy(report).min() > 2.3


def test_an_update_before_the_first_transition_changes_no_weight():
    agent = make_mbpo(SPEC, TINY)
    state = agent.init(KEY)
    _, batch = ring()
    empty = batch._replace(valid=jnp.zeros_like(batch.valid))
    after, metrics, _ = jax.jit(agent.update)(state, empty, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.sac.weights, state.sac.weights)
    assert float(metrics["imagined/transitions"]) == float(metrics["value/loss"]) == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"elites": 4}, "elites must not exceed members, got 4 > 3"),
        ({"length": (0, 1)}, r"length must be at least 1 step, got \(0, 1\).*--length 1 1"),
        ({"schedule": (5, 3)}, r"schedule must be .* got \(5, 3\).*--schedule 20000 100000"),
        ({"real_ratio": 1.5}, "real_ratio must be in"),
        ({"halt": 1.5}, "halt must be in"),
        (
            {"halt": 0.9, "sac": dataclasses.replace(LEARNER, discount=1.0)},
            "discount must be below 1 where imagined episodes halt",
        ),
        ({"rollouts": 0}, "rollouts must be at least 1"),
        ({"train_ratio": 0.0}, "train_ratio must be in"),
        ({"holdout": 1.0}, "holdout must be in"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_tasks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="players: reach has 2, MBPO expected 1"):
        make_mbpo(SPEC._replace(players=2), TINY)

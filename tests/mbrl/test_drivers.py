"""Both drivers run the same agent on the same records, and go on bit for bit after a stop."""

from __future__ import annotations

import collections
import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from agents.pets import PETSConfig, make_pets
from mbrl.planning import PlannerConfig
from mbrl.spaces import box
from mbrl.training import checkpoint
from mbrl.training.device import run_device, start_state
from mbrl.training.host import run_host
from mbrl.training.learner import DriverConfig, Learner, Report, schedule, start_learners
from mbrl.training.offline import run_offline
from mbrl.types import MDP
from tests.agents.tiny import TINY, tiny_dreamer
from tests.mbrl.toys import StreamEnv, counter_mdp, linear_agent

PETS = PETSConfig(
    members=2, elites=2, hidden=(8,), batch_size=8, max_epochs=2,
    random_steps=20, train_every=20, capacity=100,
    planner=PlannerConfig(horizon=3, population=8, iterations=2, particles=2, elites=2),
)  # fmt: skip


def pendulum() -> Any:
    mdp: Any = envs.make("device/Pendulum", max_episode_steps=15)
    return mdp


def linear(mdp: Any, **options: Any) -> Any:
    return lambda hyper: linear_agent(mdp.spec, hyper, **options)


def pets(mdp: Any) -> Any:
    return lambda hyper: make_pets(mdp.spec, dataclasses.replace(PETS, **hyper))


def host_of(mdp: Any, config: DriverConfig) -> list[Any]:
    return [StreamEnv(mdp, config.num_envs) for _ in config.seeds]


def last(reports: Any) -> Report:
    return collections.deque(reports, maxlen=1).pop()


def assert_same(one: Learner, two: Learner, tolerance: float = 0.0) -> None:
    """Keys, flags and counters must be equal; floats as near as `tolerance`."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True)
    for (path, a), b in pairs:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        exact = tolerance == 0.0 or not jnp.issubdtype(a.dtype, jnp.floating)
        tolerances = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": tolerance, "atol": tolerance}
        np.testing.assert_allclose(a, b, **tolerances, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("seeds", [(3,), (3, 8)])
def test_drivers_end_with_the_same_learner(seeds):
    mdp = counter_mdp()
    config = DriverConfig(130, num_envs=2, seeds=seeds, interval=40)
    device = last(run_device(linear(mdp), mdp, config))
    host = last(run_host(linear(mdp), host_of(mdp, config), config))
    assert device.step == host.step == 130
    assert np.all(np.asarray(device.learner.agent["updates"]) == 6)
    assert_same(device.learner, host.learner, tolerance=1e-5)
    # What the simulator emits is exact here: so are the records.
    assert np.array_equal(device.learner.ring.record.obs, host.learner.ring.record.obs)


def test_drivers_end_with_the_same_pets():
    mdp = pendulum()
    config = DriverConfig(40, num_envs=2)
    device = last(run_device(pets(mdp), mdp, config))
    host = last(run_host(pets(mdp), host_of(mdp, config), config))
    assert_same(device.learner, host.learner, tolerance=1e-3)


def test_drivers_report_the_same_episodes():
    mdp = counter_mdp(limit=7)
    config = DriverConfig(56, num_envs=2, interval=20)
    for reports in (
        run_device(linear(mdp), mdp, config),
        run_host(linear(mdp), host_of(mdp, config), config),
    ):
        found = []
        for report in reports:
            done = np.asarray(report.episodes.done)
            found += zip(
                np.asarray(report.episodes.returns)[done].tolist(),
                np.asarray(report.episodes.lengths)[done].tolist(),
                strict=True,
            )
        # 28 vector steps: records 0 .. 7 are the first episode, 8 .. 15 the second, ...
        assert found == [(7.0, 7)] * 6


def test_seeds_in_one_program_are_the_runs_of_each_seed():
    mdp = pendulum()
    config = DriverConfig(60, num_envs=2, seeds=(0, 5))
    both = last(run_device(linear(mdp), mdp, config)).learner
    for index, seed in enumerate(config.seeds):
        alone = last(
            run_device(linear(mdp), mdp, dataclasses.replace(config, seeds=(seed,)))
        ).learner
        assert_same(
            jax.tree.map(lambda x: x[index : index + 1], both), alone, tolerance=1e-4
        )  # fmt: skip
    assert not np.allclose(both.agent["w"][0], both.agent["w"][1])
    assert not np.allclose(both.ring.record.obs[0], both.ring.record.obs[1])


@pytest.mark.parametrize("seeds", [(3,), (3, 8)])
@pytest.mark.parametrize("driver", ["device", "host", "offline"])
def test_metrics_of_an_interval_are_means_and_of_counts_the_latest(driver, seeds):
    mdp = counter_mdp()

    def factory(hyper: Any) -> Any:
        agent = linear_agent(mdp.spec, hyper)

        def update(*args: Any) -> Any:
            state, _, feedback = agent.update(*args)
            number = state["updates"].astype(jnp.float32)
            names = ("plain", "model/skipped_updates", "model/skipped_in_a_row")
            return state, {name: number * (k + 1) for k, name in enumerate(names)}, feedback

        return agent._replace(update=update)

    config = DriverConfig(140, seeds=seeds, interval=60)
    if driver == "device":
        reports = run_device(factory, mdp, config)
    elif driver == "host":
        reports = run_host(factory, host_of(mdp, config), config)
    else:
        ring = last(run_device(factory, mdp, config)).learner.ring
        record = jax.tree.map(lambda x: np.asarray(x)[0], ring.record)
        reports = run_offline(
            factory, mdp.spec, record, dataclasses.replace(config, steps=7, interval=3)
        )
    before = 0
    several = 0
    for report in reports:
        (updates,) = set(np.asarray(report.learner.agent["updates"]).tolist())
        if not report.metrics:
            assert updates == before
            continue
        since = range(before + 1, updates + 1)
        np.testing.assert_allclose(report.metrics["plain"], [np.mean(since)] * len(seeds), 1e-5)
        for name, factor in (("updates", 2), ("in_a_row", 3)):
            found = report.metrics[f"model/skipped_{name}"]
            assert found.tolist() == [factor * updates] * len(seeds)
        before, several = updates, several + (len(since) > 1)
    assert before == 7
    assert several >= 2


def test_float_settings_are_mapped_over_seeds_in_one_trace():
    mdp = pendulum()
    traces = []

    def factory(hyper: Any) -> Any:
        agent = linear_agent(mdp.spec, hyper)

        def update(*args: Any) -> Any:
            traces.append(hyper["learning_rate"].shape)
            return agent.update(*args)

        return agent._replace(update=update)

    rates = jnp.array([1e-4, 1e-2, 1e-1])
    config = DriverConfig(60, num_envs=2, seeds=(1, 1, 1), interval=20)
    learner = last(run_device(factory, mdp, config, {"learning_rate": rates})).learner
    # The warm-up, the cycles, and the shapes of the metrics of the cycles; for all rates.
    assert traces == [()] * len(traces)
    assert len(traces) <= 3
    weights = np.asarray(learner.agent["w"])
    # The seed is the same: only the settings tell the runs apart.
    assert len({row.tobytes() for row in weights}) == 3
    assert np.array_equal(learner.ring.record.obs[0][:, :10], learner.ring.record.obs[2][:, :10])
    alone = last(
        run_device(
            linear(mdp), mdp, dataclasses.replace(config, seeds=(1,)),
            {"learning_rate": rates[1:2]},
        )
    )  # fmt: skip
    np.testing.assert_allclose(weights[1:2], alone.learner.agent["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_settings_of_pets_are_mapped_over_seeds():
    mdp = pendulum()
    hyper = {"learning_rate": jnp.array([1e-4, 1e-2, 1e-2]), "penalty": jnp.array([0.0, 0.0, 50.0])}
    config = DriverConfig(44, num_envs=2, seeds=(1, 1, 1))
    learner = last(run_device(pets(mdp), mdp, config, hyper)).learner
    kernel = np.asarray(jax.tree.leaves(learner.agent.model.weights)[1])
    records = learner.ring.record
    assert np.array_equal(records.obs[0][:, :10], records.obs[1][:, :10])
    assert not np.allclose(kernel[0], kernel[1], atol=1e-4)
    assert not np.array_equal(records.action[1], records.action[2])
    assert np.array_equal(records.action[1][:, :10], records.action[2][:, :10])


def compiled(caplog: Any) -> list[str]:
    found = [
        re.match(r"Finished XLA compilation of jit\((\w+)\)", r.message) for r in caplog.records
    ]
    return [match[1] for match in found if match]


def test_one_run_compiles_its_programs_once_and_none_later(caplog):
    mdp = counter_mdp()
    config = DriverConfig(105, seeds=(0,), interval=20)
    factory = linear(mdp)
    starts = {
        "device": {"state": start_state(factory, mdp, config, {}), "step": 0},
        "host": {
            "learner": start_learners(factory, mdp.spec, config, {}),
            "step": 0,
            "envs": [started(mdp, config)],
        },
    }
    runs = {
        "device": run_device(factory, mdp, config, snapshot=starts["device"]),
        "host": run_host(factory, host_of(mdp, config), config, snapshot=starts["host"]),
    }
    for name, reports in runs.items():
        caplog.clear()
        with jax.log_compiles():
            next(reports), next(reports)
            early = [n for n in compiled(caplog) if n in ("single", "run_cycles")]
            caplog.clear()
            next(reports), next(reports)
            assert compiled(caplog) == [], name
            last(reports)  # on the device, the part of a cycle that is left is a third one
            late = compiled(caplog)
        # Acting at random and not, and learning; on the host replay has three of its own.
        assert len(late) <= 1, name
        assert len(early) + len(late) == {"device": 3, "host": 6}[name], name


def started(mdp: Any, config: DriverConfig) -> Any:
    env = StreamEnv(mdp, config.num_envs)
    env.reset(0)
    return env.state()


def place(name: str, folder: Any) -> Any:
    return folder / "replay" if name == "disk" else name


def tiny(mdp: Any) -> Any:
    agent = tiny_dreamer(mdp.spec, dataclasses.replace(TINY, capacity=60, train_ratio=0.1))
    return lambda hyper: agent


@pytest.mark.parametrize(
    ("make", "seeds"), [(linear, (3,)), (linear, (3, 8)), (pets, (3, 8)), (tiny, (3,))]
)
def test_replay_on_the_host_gives_the_same_learner_bit_for_bit(make, seeds, tmp_path):
    mdp = pendulum()
    config = DriverConfig(130, num_envs=2, seeds=seeds, interval=40)

    def run(name: str) -> Any:
        envs = host_of(mdp, config)
        return last(run_host(make(mdp), envs, config, where=place(name, tmp_path))).snapshot()

    device = run("device")
    learner = device["learner"]
    # More records than the ring holds, all of the agent's own kind of batch.
    assert np.all(np.asarray(learner.ring.size) == learner.ring.record.reward.shape[2])
    assert learner.ring.record.reward.shape[2] < 65
    for name in ("host", "disk"):
        other = run(name)
        assert isinstance(other["learner"].ring.record.reward, np.ndarray)
        assert_same(other["learner"], learner)
        assert checkpoint.digest(other) == checkpoint.digest(device)
    stored = sum(path.stat().st_size for path in (tmp_path / "replay").iterdir())
    assert stored > sum(leaf.nbytes for leaf in jax.tree.leaves(learner.ring.record))


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        (linear, "host", "host"),
        (linear, "disk", "disk"),
        (linear, "device", "disk"),
        (linear, "host", "device"),
        (pets, "disk", "host"),
    ],
)
def test_a_cut_run_goes_on_bit_for_bit_wherever_its_replay_is_kept(kind, first, then, tmp_path):
    mdp = pendulum()
    config = DriverConfig(91, num_envs=2, seeds=(4, 9), interval=20)

    def run(steps: int, name: str, snapshot: Any = None) -> Any:
        there = dataclasses.replace(config, steps=steps)
        where = place(name, tmp_path)
        return run_host(kind(mdp), host_of(mdp, config), there, snapshot=snapshot, where=where)

    whole = checkpoint.digest(last(run(150, "device")).snapshot())
    half = saved(last(run(90, first)).snapshot(), tmp_path / "saves")
    ring = half["learner"].ring
    before = checkpoint.digest(ring)
    assert checkpoint.digest(last(run(150, then, half)).snapshot()) == whole
    if "device" not in (first, then):  # what a run goes on from is not its working storage
        assert checkpoint.digest(ring) == before


def resumable(kind: str, config: DriverConfig) -> Any:
    """Return `run(steps, snapshot, should_stop)` for a device or a host environment."""
    if kind == "device":
        mdp = pendulum()

        def run(steps: int, snapshot: Any = None, **options: Any) -> Any:
            there = dataclasses.replace(config, steps=steps)
            return run_device(linear(mdp), mdp, there, snapshot=snapshot, **options)

        return run

    def make() -> list[Any]:
        return [
            envs.make("Pendulum-v1", config.num_envs, max_episode_steps=15) for _ in config.seeds
        ]

    factory = linear(make()[0])

    def run(steps: int, snapshot: Any = None, **options: Any) -> Any:
        there = dataclasses.replace(config, steps=steps)
        return run_host(factory, make(), there, snapshot=snapshot, **options)

    return run


def saved(snapshot: Any, folder: Any) -> Any:
    checkpoint.save(folder, int(snapshot["step"]), snapshot, {})
    restored = checkpoint.restore(folder, snapshot)
    assert restored is not None
    return restored.tree


@pytest.mark.parametrize("kind", ["device", "host"])
# Within the warm-up, at an update, and in the middle of a cycle.
@pytest.mark.parametrize(("seeds", "cuts"), [((4,), (7, 40, 51)), ((4, 9), (51,))])
def test_a_run_that_is_cut_ends_bit_for_bit(kind, seeds, cuts, tmp_path):
    run = resumable(kind, DriverConfig(1, 1, seeds, interval=20))
    whole = checkpoint.digest(last(run(80)).snapshot())
    for cut in cuts:
        half = saved(last(run(cut)).snapshot(), tmp_path / str(cut))
        assert checkpoint.digest(last(run(80, half)).snapshot()) == whole, cut


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_stop_reports_where_it_stopped_and_resumes_bit_for_bit(kind, tmp_path):
    run = resumable(kind, DriverConfig(1, 2, interval=20))
    whole = checkpoint.digest(last(run(130)).snapshot())
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > (2 if kind == "device" else 33)

    stopped = last(run(130, should_stop=stop))
    assert 0 < stopped.step < 130
    assert stopped.step == (40 if kind == "device" else 66)
    half = saved(stopped.snapshot(), tmp_path)
    assert checkpoint.digest(last(run(130, half)).snapshot()) == whole


def test_a_finished_run_has_nothing_left_to_report():
    run = resumable("host", DriverConfig(1, 1, interval=20))
    done = last(run(25)).snapshot()
    assert list(run(25, done)) == []


def test_the_schedule_counts_vector_steps():
    spec = counter_mdp().spec
    agent = linear_agent(spec, start=25, every=30)
    plan = schedule(agent, DriverConfig(steps=100, num_envs=4, interval=70))
    assert plan == (7, 7, 2, 25)  # 25 / 4 up, 30 / 4 down, 70 / 28 down, 100 / 4
    assert [t for t in range(1, 26) if plan.updates_after(t)] == [7, 14, 21]
    for t in range(25):
        due = t + plan.until_update(t)
        assert plan.updates_after(due)
        assert not any(plan.updates_after(s) for s in range(t + 1, due))
    many = schedule(agent, DriverConfig(steps=100, num_envs=64))
    assert (many.warmup, many.cycle, many.total) == (1, 1, 2)


@pytest.mark.parametrize("field", ["steps", "num_envs", "interval"])
def test_the_schedule_refuses_no_steps(field):
    agent = linear_agent(counter_mdp().spec)
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        schedule(agent, dataclasses.replace(DriverConfig(10), **{field: 0}))


@pytest.mark.parametrize(
    ("steps", "start", "every", "updates"),
    [(15, 20, 10, 0), (20, 20, 10, 1), (29, 20, 10, 1), (47, 20, 10, 3), (13, 5, 50, 1)],
)
def test_both_drivers_do_the_updates_of_the_schedule(steps, start, every, updates):
    mdp = counter_mdp()
    factory, config = linear(mdp, start=start, every=every), DriverConfig(steps)
    for reports in (
        run_device(factory, mdp, config),
        run_host(factory, host_of(mdp, config), config),
    ):
        report = last(reports)
        assert report.step == steps
        assert int(report.learner.agent["updates"][0]) == updates
        assert int(report.learner.ring.size[0]) == min(steps, 60)


def test_host_environments_must_fit_the_configuration():
    mdp = counter_mdp()
    run = partial(run_host, linear(mdp))
    with pytest.raises(ValueError, match=r"one per seed \(2\), got 1"):
        next(run([StreamEnv(mdp, 1)], DriverConfig(10, 1, (0, 1))))
    with pytest.raises(ValueError, match="configuration says 2, the environment has 3"):
        next(run([StreamEnv(mdp, 3)], DriverConfig(10, 2)))


def test_an_unknown_place_of_replay_is_refused():
    mdp = counter_mdp()
    config = DriverConfig(10)
    with pytest.raises(ValueError, match="where: got 'disk', expected .*Path"):
        next(run_host(linear(mdp), host_of(mdp, config), config, where="disk"))  # type: ignore


def breaking(leaf: str, when: Any) -> Any:
    """Count for ever; environments where `when(state)` holds yield a number that is not finite."""
    mdp = counter_mdp(limit=None)
    spec = mdp.spec._replace(
        observation={"count": box(-np.inf, np.inf, (1,)), "sum": box(-np.inf, np.inf, (1,))}
    )

    def step(params, key, state, action):
        state, outcome = mdp.step(params, key, state, action)
        bad = when(state)
        if leaf == "reward":
            outcome = outcome._replace(reward=jnp.where(bad, jnp.inf, outcome.reward))
        return state, outcome

    def observe(params, state):
        total = state[:, 1]
        if leaf == "observation/sum":
            total = jnp.where(when(state), jnp.nan, total)
        return {"count": state[:, :1], "sum": total[:, None]}

    return MDP(mdp.init, step, observe, spec)


def finite(tree: Any) -> bool:
    return all(
        bool(jnp.isfinite(x).all())
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


# Warm-up: steps 0 .. 9; a report after 10 and 30; steps 31, 32, 33 are a part of a cycle.
@pytest.mark.parametrize(
    ("leaf", "total", "seeds"),
    [("reward", 2, (8, 3)), ("observation/sum", 8, (4, 8)), ("reward", 13, (0, 2))],
)
def test_a_simulator_that_breaks_is_named_with_its_first_step(leaf, total, seeds):
    config = DriverConfig(66, num_envs=2, seeds=seeds, interval=40)
    healthy = breaking("", lambda state: False)
    report = last(run_device(lambda hyper: roomy(healthy), healthy, config))
    sums = np.asarray(report.learner.ring.record.obs["sum"])[..., 0]
    # Read off an undisturbed run, step by step: who is the first to get there.
    step, seed, env = min(
        (int(np.argmax(row >= total)), seed, env)
        for seed, rows in enumerate(sums) for env, row in enumerate(rows) if (row >= total).any()
    )  # fmt: skip
    broken = breaking(leaf, lambda state: state[:, 1] == total)
    place = f"counter, seed {seeds[seed]}, environment {env}, step {step}: {leaf} is NaN or Inf"
    with pytest.raises(ValueError, match=place):
        last(run_device(lambda hyper: roomy(broken), broken, config))


def roomy(mdp: Any) -> Any:
    agent = linear_agent(mdp.spec)
    return agent._replace(sampling=agent.sampling._replace(capacity=200))


@pytest.mark.parametrize(
    ("step", "reports"), [(1, 0), (10, 0), (11, 1), (24, 1), (30, 1), (31, 2), (33, 2)]
)
def test_no_report_holds_what_a_broken_simulator_gave(step, reports):
    leaf = ("reward", "observation/sum")[step % 2]
    config = DriverConfig(66, num_envs=2, interval=40)
    broken = breaking(leaf, lambda state: state[:, 0] == step)
    seen = []
    with pytest.raises(ValueError, match=f"seed 0, environment 0, step {step}: {leaf} is NaN"):
        for report in run_device(lambda hyper: roomy(broken), broken, config):
            seen.append(finite(report.snapshot()))  # the simulator, too, which comes next
    assert seen == [True] * reports

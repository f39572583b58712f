"""A run on disk: its settings, and how to build agent and environments from them again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import envs
from agents import AGENTS
from agents.preferences import PreferencesConfig, with_preferences
from envs.experience import read_experience
from envs.host import HostEnv
from mbrl import replay, spaces
from mbrl.memory import readable
from mbrl.training import checkpoint, run_directory
from mbrl.training.device import run_device, start_state
from mbrl.training.evaluation import evaluate_device, evaluate_host
from mbrl.training.host import run_host
from mbrl.training.learner import (
    DriverConfig,
    Hyper,
    Learner,
    Report,
    example_record,
    per_call,
    sample_key,
    schedule,
    seed_keys,
    start_learners,
)
from mbrl.training.offline import run_offline
from mbrl.training.storage import Where
from mbrl.types import MDP, Agent, EnvSpec, Record
from scripts import config_json

CHECKPOINTS = "checkpoints"
REPLAY = "replay"
"""Folder of the files that `--replay disk` works on, below that of the run."""
EVALUATION_SEED = 1_000_003
"""Offset between the seeds of training and of the evaluation that ends it."""


class Run(NamedTuple):
    """What a configuration builds.

    Attributes:
      agent_name: key of `agents.AGENTS`.
      config: of the agent.
      env_id: of the training environment.
      driver: how much to run.
      on_bad: policy for numbers that are not finite.
      env: a device MDP, or None when the environment lives on the host.
      spec: of the task that the agent is trained on.
      options: further arguments of `envs.make`.
      data: file of recorded data to train on instead of the environment, or ''.
      replay: where it is kept while training: 'device', 'host' or 'disk'.
      preferences: where the reward is learned from comparisons, when they are at least 1.
    """

    agent_name: str
    config: Any
    env_id: str
    driver: DriverConfig
    on_bad: Any
    env: MDP | None
    spec: EnvSpec
    options: Mapping[str, Any]
    data: str
    replay: str = "device"
    preferences: PreferencesConfig = PreferencesConfig()

    def factory(self, hyper: Hyper) -> Agent:
        """Build the agent, with float settings replaced by traced ones."""
        entry = AGENTS[self.agent_name]
        agent = entry.make(self.spec, dataclasses.replace(self.config, **hyper))
        if not self.preferences.labels:
            return agent
        return with_preferences(agent, self.spec, self.preferences)

    def host_envs(self, num_envs: int | None = None, **options: Any) -> list[HostEnv]:
        """Build one host environment per seed."""
        num_envs = num_envs or self.driver.num_envs
        options = {**self.options, **options}
        return [
            typing.cast(HostEnv, envs.make(self.env_id, num_envs, self.on_bad, **options))
            for _ in self.driver.seeds
        ]


def build(
    agent_name: str, config: Any, env_id: str, driver: DriverConfig, on_bad: Any = "raise",
    options: Mapping[str, Any] | None = None, data: str = "", replay: str = "device",
    preferences: PreferencesConfig | None = None,
) -> Run:  # fmt: skip
    """Check that everything fits together, and how much memory replay takes on the device.

    Raises:
      ValueError: for an unknown environment, settings or spaces that do not fit, or a
        replay that is larger than the memory.
    """
    options = options or {}
    env = envs.make(env_id, driver.num_envs, on_bad, **options)
    on_device = env if isinstance(env, MDP) else None
    if isinstance(env, HostEnv):
        env.close()
    if replay != "device" and (on_device or data):
        raise ValueError(
            f"--replay: got {replay!r} with {'--data' if data else f'--env {env_id}'}, expected "
            "'device', because learning there is one compiled program that replay is a part of; "
            "leave --replay out, or train in a Gymnasium environment"
        )
    run = Run(
        agent_name, config, env_id, driver, on_bad, on_device, env.spec, options, data, replay,
        preferences or PreferencesConfig(),
    )  # fmt: skip
    agent = run.factory({})
    schedule(agent, driver)
    if not data and replay == "device":
        _check_replay(run, driver.num_envs, agent.sampling.capacity)
    return run


def _check_replay(run: Run, num_envs: int, capacity: int) -> None:
    example = example_record(run.factory({}), run.spec, num_envs)
    size = replay.nbytes(example, num_envs, capacity) * len(run.driver.seeds)
    replay.check_memory(size, "replay")


def describe_memory(run: Run, out: Path) -> str:
    """Say how much memory replay and the agent will take, without taking it (F15).

    Args:
      run: see `build`.
      out: its folder, for the disk that it is on.

    Raises:
      ValueError: when they do not fit together.
    """
    learner = jax.eval_shape(lambda: start_learners(run.factory, run.spec, run.driver, {}))
    ring, agent = _size(learner.ring), _size(learner.agent)
    check = replay.check_memory
    if run.replay == "device":
        check(ring + agent, "replay and agent together")
        return f"memory: replay {readable(ring)}, agent with optimizer {readable(agent)}"
    batch = _size(jax.eval_shape(partial(_batches, run), learner))
    # A save passes through memory, wherever replay is kept.
    on_host = ring * (2 if run.replay == "host" else 1) + batch
    if replay.device_memory() is None:
        on_host += agent + batch
    else:
        check(agent + batch, "agent and batch together")
    check(on_host, "replay, a save of it, batch and agent together", replay.host_memory())
    place = "in host memory"
    if run.replay == "disk":
        place = f"in files of {out / REPLAY}"
        check(ring, "replay", _disk_space(out / REPLAY), f"the disk of {out}")
    again = "as much again" if run.replay == "host" else "as much memory"
    return (
        f"memory: replay {readable(ring)} {place}, {again} while it is saved, batch "
        f"{readable(batch)}, agent with optimizer {readable(agent)}"
    )


def _batches(run: Run, learner: Learner) -> Any:
    spec = per_call(run.factory({}).sampling, run.driver.num_envs)
    return jax.vmap(lambda one: replay.sample(one.ring, sample_key(one), spec))(learner)


def _disk_space(folder: Path) -> int:
    """Return the free bytes, with those of files that a killed run has left there."""
    return replay.disk_space(folder) + sum(x.stat().st_size for x in _working_files(folder))


def _working_files(folder: Path) -> list[Path]:
    return list(folder.glob("leaf_*.npy"))


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def read_data(run: Run) -> Record | None:
    """Read the recorded data of an offline run; None when it trains in an environment.

    Raises:
      ValueError: for data that do not fit the task or the memory.
    """
    if not run.data:
        return None
    record = read_experience(run.data, run.spec)
    streams, rows = record.reward.shape
    _check_replay(run, streams, streams * rows)
    return record


@contextlib.contextmanager
def working_storage(run: Run, out: Path) -> Iterator[Where]:
    """Say where `train` keeps replay; its files are gone afterwards, as saves hold all of it."""
    if run.replay != "disk":
        yield "host" if run.replay == "host" else "device"
        return
    folder = out / REPLAY
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            for file in _working_files(folder):
                file.unlink()
            folder.rmdir()


def train(
    run: Run, snapshot: Any, should_stop: Any, data: Record | None, where: Where = "device"
) -> Generator[Report, Learner | None, None]:
    """Run the driver that fits the environment, or the one that needs none."""
    options = {"snapshot": snapshot, "should_stop": should_stop}
    if data is not None:
        return run_offline(run.factory, run.spec, data, run.driver, **options)
    if run.env is not None:
        return run_device(run.factory, run.env, run.driver, **options)
    host_envs: list[Any] = run.host_envs()
    return run_host(run.factory, host_envs, run.driver, where=where, **options)


def evaluate(
    run: Run,
    agent_state: Any,
    episodes: int,
    seed: int,
    on_step: Any = lambda now, envs: None,
    **options: Any,
) -> np.ndarray:
    """Play greedy episodes: [S, episodes] returns.

    Args:
      run: see `build`; its environment may be another one with the same spaces.
      agent_state: leaves [S, ...].
      episodes: per seed.
      seed: of the start states; seed `s` of the run uses `seed + s`.
      on_step: sees each time step and the environments, for videos (host only).
      **options: handed to `envs.make` (host only), such as `render_mode`.
    """  # fmt: skip
    seeds = tuple(seed + s for s in range(len(run.driver.seeds)))
    if run.env is not None:
        return evaluate_device(run.factory, agent_state, run.env, seed_keys(seeds), episodes)
    host_envs: list[Any] = run.host_envs(min(episodes, 20), **options)
    try:
        return evaluate_host(
            run.factory, agent_state, host_envs, seed_keys(seeds), seeds, episodes,
            on_step=lambda now: on_step(now, host_envs),
        )  # fmt: skip
    finally:
        for env in host_envs:
            env.close()


def snapshot_like(run: Run, manifest: Mapping[str, Any]) -> Any:
    """Describe the snapshot of a driver without running it: what `restore` compares with."""

    streams_and_rows = tuple(manifest["ring"]) if run.data and manifest else None

    def shapes() -> Any:
        return start_learners(run.factory, run.spec, run.driver, {}, streams_and_rows)

    learner = jax.eval_shape(shapes)
    if run.replay != "device":
        learner = learner._replace(ring=jax.tree.map(_numpy_like, learner.ring))
    step = np.zeros((), np.int64)
    if run.data:
        return {"learner": learner, "step": step}
    if run.env is not None:
        env = run.env
        state = jax.eval_shape(lambda: start_state(run.factory, env, run.driver, {}))
        return {"state": state, "step": step}
    host_envs = run.host_envs()
    states = [env.state() for env in host_envs]
    for env, state, rows in zip(host_envs, states, manifest.get("log_rows", []), strict=False):
        # Without a time limit the log of actions grows with the longest episode.
        state["actions"] = np.zeros((env.num_envs, rows, *state["actions"].shape[2:]),
                                    state["actions"].dtype)  # fmt: skip
        env.close()
    return {"learner": learner, "step": step, "envs": states}


def _numpy_like(leaf: Any) -> np.ndarray:
    """Stand for an array that `restore` leaves on the host, without its memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def manifest_of(snapshot: Any) -> dict[str, Any]:
    """Return what `snapshot_like` must know of a snapshot."""
    ring = learner_of(snapshot).ring.record.reward.shape[1:]
    rows = [int(state["actions"].shape[1]) for state in snapshot.get("envs", [])]
    return {"log_rows": rows, "ring": [int(n) for n in ring]}


def restore(run: Run, directory: Path) -> checkpoint.Restored | None:
    """Read the newest intact save of a run; None when there is none."""
    folder = directory / CHECKPOINTS
    newest = checkpoint.read_manifest(folder)
    return checkpoint.restore(folder, snapshot_like(run, newest[1] if newest else {}))


def agent_of(run: Run, snapshot: Any) -> Any:
    """Return the state of a run's agent itself, without what its reward is learned with."""
    state = learner_of(snapshot).agent
    return state.agent if run.preferences.labels else state


def with_learner(snapshot: Any, learner: Learner) -> Any:
    """Put another learner into a snapshot of any driver."""
    if "learner" in snapshot:
        return {**snapshot, "learner": learner}
    return {**snapshot, "state": snapshot["state"]._replace(learner=learner)}


def learner_of(snapshot: Any) -> Learner:
    """Return the learner in a snapshot of any driver, leaves [S, ...]."""
    return snapshot["learner"] if "learner" in snapshot else snapshot["state"].learner


def load(directory: Path, env_id: str | None = None) -> Run:
    """Rebuild a run from the settings in its folder.

    Args:
      directory: of the run.
      env_id: another environment with the same spaces; the agent stays that of the task which
        it was trained on.

    Raises:
      ValueError: when there is no run, or the spaces differ.
    """
    saved = run_directory.read_config(directory)
    if saved is None:
        raise ValueError(f"{directory}: expected the folder of a run, found no config.json")
    name = saved["agent"]
    if name not in AGENTS:
        raise ValueError(f"{directory}: agent {name!r} is unknown, expected one of {list(AGENTS)}")
    config = config_json.from_json(AGENTS[name].config, saved["config"])
    driver = DriverConfig(
        saved["steps"], saved["num_envs"], tuple(saved["seeds"]), saved["log_every"]
    )
    run = build(
        name, config, saved["env"], driver, saved["on_bad"], saved.get("env_options", {}),
        saved.get("data", ""), saved.get("replay", "device"),
        config_json.from_json(PreferencesConfig, saved["preferences"])
        if "preferences" in saved else PreferencesConfig(),
    )  # fmt: skip
    return moved(run, env_id or run.env_id)


def moved(run: Run, env_id: str) -> Run:
    """Put the agent of a run, as it is, into another environment with the same spaces.

    Raises:
      ValueError: for an unknown environment, or one with other spaces.
    """
    if env_id == run.env_id:
        return run
    rest = (run.driver, run.on_bad, run.options, run.data, "device", run.preferences)
    other = build(run.agent_name, run.config, env_id, *rest)
    check_spaces(env_id, other.spec, run.env_id, run.spec)
    return other._replace(spec=run.spec)


def check_spaces(env_id: str, spec: EnvSpec, known_id: str, known: EnvSpec) -> None:
    """Refuse an environment whose spaces are not those of the one that is known."""
    for part in ("observation", "action"):
        before, now = (spaces.describe(getattr(s, part)) for s in (known, spec))
        if not _alike(before, now):
            raise ValueError(
                f"--env {env_id}: its {part} space {now} differs from that of {known_id}, "
                f"{before}; name an environment with the same spaces"
            )


def _alike(a: Any, b: Any) -> bool:
    """Compare descriptions of spaces; bounds may differ by the rounding of float32."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b

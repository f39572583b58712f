"""`run_host`: train on environments that live in Python, such as Gymnasium's."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import numpy as np

from mbrl.training.learner import (
    AgentFactory,
    DriverConfig,
    Episodes,
    Hyper,
    Learner,
    Report,
    add_metrics,
    example_record,
    fetch,
    learner_act,
    learner_learn,
    over_seeds,
    per_call,
    sample_key,
    schedule,
    start_learners,
)
from mbrl.training.storage import Storage, Where, make_storage
from mbrl.types import Agent, Batch, EnvSpec, Metrics, Mode, TimeStep


class HostEnvironment(Protocol):
    """What `run_host` needs of an environment; see `envs.host.HostEnv`."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seed: int) -> TimeStep: ...
    def step(self, action: Any) -> TimeStep: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def restore(self, state: dict[str, np.ndarray]) -> TimeStep: ...


def run_host(
    factory: AgentFactory,
    envs: list[HostEnvironment],
    config: DriverConfig,
    hyper: Hyper | None = None,
    snapshot: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
    where: Where = "device",
) -> Generator[Report, Learner | None, None]:
    """Train on environments that live on the host, one `HostEnvironment` per seed.

    Per vector step there is one transfer in, one compiled call that acts, one transfer
    out; an update is dispatched before the simulators step and overlaps with them. Replay
    stays outside of the programs that act and learn, so that these, and what they compute,
    are the same wherever it is kept.

    Args:
      factory: builds the agent, possibly from traced hyper-parameters.
      envs: one per seed, `config.num_envs` environments each.
      config: see `DriverConfig`.
      hyper: float hyper-parameters [S], one value per seed.
      snapshot: what `Report.snapshot()` of an earlier run returned: go on from there.
      should_stop: asked at every vector step.
      where: replay is kept: 'device', 'host' (ordinary memory), or a folder for
        memory-mapped files. A snapshot of any of them goes on with any other.

    Yields:
      A `Report` per interval, the last one at `config.steps` or where it was stopped. Its
      learner is only valid until the next one is asked for: its memory is then reused. Another
      learner may be sent in answer (`generator.send`), to go on with; replay stays as it is.

    Raises:
      ValueError: when the environments do not fit the configuration.
      OSError: when the disk has no room for the files.
    """
    hyper = hyper or {}
    num_seeds = len(config.seeds)
    _check_envs(envs, config)
    agent = factory({k: v[0] for k, v in hyper.items()})
    plan = schedule(agent, config)

    def act(learner: Learner, now: TimeStep, hyper: Hyper, mode: Mode) -> Any:
        return learner_act(factory(hyper), learner, now, mode)

    def learn(learner: Learner, batch: Batch, hyper: Hyper) -> Any:
        return learner_learn(factory(hyper), learner, batch)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(over_seeds(fn, num_seeds), donate_argnums=0)

    def actor(mode: Mode) -> Callable[..., Any]:
        return compiled(lambda learner, now, hyper: act(learner, now, hyper, mode))

    run_act = {"random": actor("random"), "explore": actor("explore")}
    run_learn = compiled(learn)
    next_keys = jax.jit(jax.vmap(sample_key))
    rings = _storage(where, agent, envs[0].spec, config, snapshot)
    if snapshot is None:
        learner, step = _start(factory, envs[0].spec, config, hyper), 0
        now = stack([env.reset(seed) for env, seed in zip(envs, config.seeds, strict=True)])
    else:
        learner, step = snapshot["learner"]._replace(ring=()), int(snapshot["step"])
        now = stack([env.restore(s) for env, s in zip(envs, snapshot["envs"], strict=True)])

    logged: list[Metrics] = []
    finished: list[Episodes] = []
    stop = should_stop()
    while step < plan.total and not stop:
        mode: Mode = "random" if step < plan.warmup else "explore"
        learner, record, episodes = run_act[mode](learner, now, hyper)
        rings.add(record)
        action = per_seed(record.action)
        if now.is_last.any():
            finished.append(fetch(episodes))
        step += 1
        if plan.updates_after(step):
            batch = rings.sample(next_keys(learner))
            learner, metrics, feedback = run_learn(learner, batch, hyper)
            rings.write_back(batch.index, feedback)
            logged.append(metrics)
        now = stack([env.step(a) for env, a in zip(envs, action, strict=True)])
        # Asked once per step: whoever is told to stop has been given the last report.
        stop = should_stop()
        if stop or step == plan.total or step % (plan.cycles_per_report * plan.cycle) == 0:
            whole = learner._replace(ring=rings.state())
            done = {"learner": whole, "step": np.int64(step)}
            sent = yield Report(
                step * config.num_envs, whole, _summary(logged),
                _join_episodes(finished, num_seeds),
                lambda done=done: {**done, "envs": [env.state() for env in envs]},
            )  # fmt: skip
            learner = learner if sent is None else sent._replace(ring=())
            logged, finished = [], []


def _start(factory: AgentFactory, spec: EnvSpec, config: DriverConfig, hyper: Hyper) -> Learner:
    """Make learners without replay: what is not returned is not allocated."""

    def start(hyper: Hyper) -> Learner:
        return start_learners(factory, spec, config, hyper)._replace(ring=())

    return jax.jit(start)(hyper)


def _storage(
    where: Where, agent: Agent, spec: EnvSpec, config: DriverConfig, snapshot: Any
) -> Storage:
    """Allocate replay, with the content of a snapshot if there is one."""
    example = example_record(agent, spec, config.num_envs)
    shape = (len(config.seeds), config.num_envs, agent.sampling.capacity)
    asked = per_call(agent.sampling, config.num_envs)
    return make_storage(
        where, example, shape, asked, None if snapshot is None else snapshot["learner"].ring
    )


def _check_envs(envs: list[HostEnvironment], config: DriverConfig) -> None:
    if len(envs) != len(config.seeds):
        raise ValueError(f"envs: expected one per seed ({len(config.seeds)}), got {len(envs)}")
    for env in envs:
        if env.num_envs != config.num_envs:
            raise ValueError(
                f"num_envs: the configuration says {config.num_envs}, the environment has "
                f"{env.num_envs}; build it with num_envs={config.num_envs}"
            )


def stack(steps: list[TimeStep]) -> TimeStep:
    """Join the time steps [E, ...] of all seeds into [S, E, ...]."""
    return jax.tree.map(lambda *x: np.stack(x), *steps)


def per_seed(action: Any) -> list[Any]:
    """Bring actions [S, E, ...] of any space to the host, one [E, ...] per seed."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, action))
    return [structure.unflatten(parts) for parts in zip(*leaves, strict=True)]


def _summary(logged: list[Metrics]) -> dict[str, np.ndarray]:
    """Join the metrics of the updates of an interval, [S] each."""
    found: Any = dict.fromkeys(logged[0], np.float32(0.0)) if logged else {}
    for metrics in logged:
        found = add_metrics(found, fetch(metrics), len(logged))
    return found


def _join_episodes(finished: list[Episodes], num_seeds: int) -> Episodes:
    """Join lists of [S, E] into [S, n, E]."""
    if not finished:
        none: list[Any] = [np.zeros((num_seeds, 0), t) for t in (bool, np.float32, np.int32)]
        return Episodes(*none)
    return jax.tree.map(lambda *x: np.stack(x, 1), *finished)

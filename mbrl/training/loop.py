"""The two drivers: one agent, one record stream, on the device or on Gymnasium.

Both share `learner_step` (act, record, store) and `learner_update` (sample, learn), so
that equal records give an equal learner. Everything carries a leading seed axis [S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mbrl import replay, spaces
from mbrl.mdp import EpisodicState, episodic, timestep
from mbrl.types import (
    MDP,
    Agent,
    Array,
    Carry,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Record,
    State,
    TimeStep,
)

Hyper = Mapping[str, Array]
"""Float hyper-parameters, one value per seed [S]; empty for the agent as configured."""

AgentFactory = Callable[[Hyper], Agent]
"""Builds the agent from (possibly traced) hyper-parameters of one seed."""


class HostEnvironment(Protocol):
    """What `run_host` needs of an environment; see `envs.host.HostEnv`."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seed: int) -> TimeStep: ...
    def step(self, action: np.ndarray) -> TimeStep: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def restore(self, state: dict[str, np.ndarray]) -> TimeStep: ...


@chex.dataclass(frozen=True)
class Learner:
    """Agent, replay and randomness of one seed: all that survives a save.

    Attributes:
      agent: state of the agent.
      carry: its acting state, leaves [E, ...].
      ring: replay.
      key: the only source of randomness.
      episode_return: [E] sum of rewards of the running episodes.
      episode_length: int32 [E] steps of the running episodes.
    """

    agent: State
    carry: Carry
    ring: replay.Ring
    key: Key
    episode_return: Array
    episode_length: Array


class Episodes(NamedTuple):
    """Finished episodes of a stretch of steps; arrays of equal shape."""

    done: Array
    returns: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class DriverConfig:
    """How much to run, and how often to look up."""

    steps: int
    """Environment steps per seed."""
    num_envs: int = 1
    """Environments E per seed that step in lock step."""
    seeds: tuple[int, ...] = (0,)
    """One training run per seed, all in one compiled program."""
    interval: int = 1000
    """Environment steps between two reports, rounded to whole updates."""


class Report(NamedTuple):
    """What a driver yields after every interval.

    Attributes:
      step: environment steps per seed so far.
      learner: leaves [S, ...].
      metrics: means over the interval, [S] each; empty before the first update.
      episodes: finished episodes of the interval, [S, ...].
      snapshot: call for everything a later run needs to go on bit for bit.
    """

    step: int
    learner: Learner
    metrics: dict[str, np.ndarray]
    episodes: Episodes
    snapshot: Callable[[], Any]


def init_learner(agent: Agent, spec: EnvSpec, num_envs: int, key: Key) -> Learner:
    """Make the learner of one seed before its first step."""
    agent_key, key = jax.random.split(key)
    state = agent.init(agent_key)
    carry = agent.begin(num_envs)
    obs = spaces.zeros(spec.observation, (num_envs,))
    flags = jnp.ones(num_envs, bool)
    extras = jax.eval_shape(
        lambda: agent.act(state, carry, obs, flags, agent_key, "random")[2]
    )
    one = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    example = Record(
        obs=jax.eval_shape(lambda: spaces.zeros(spec.observation)),
        action=jax.eval_shape(lambda: spaces.zeros(spec.action)),
        reward=one[0], is_first=one[1], is_last=one[1], is_terminal=one[1],
        extras=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), extras),
    )  # fmt: skip
    return Learner(
        agent=state,
        carry=carry,
        ring=replay.init(example, num_envs, agent.sampling.capacity),
        key=key,
        episode_return=jnp.zeros(num_envs),
        episode_length=jnp.zeros(num_envs, jnp.int32),
    )


def learner_step(
    agent: Agent, learner: Learner, now: TimeStep, mode: Mode
) -> tuple[Learner, Array, Episodes]:
    """Act on a time step of [E] environments and store the record.

    Returns:
      The learner, the action [E, ...] and the episodes that end with this record.
    """
    act_key, key = jax.random.split(learner.key)
    action, carry, extras = agent.act(
        learner.agent, learner.carry, now.obs, now.is_first, act_key, mode
    )
    record = Record(
        now.obs, action, now.reward, now.is_first, now.is_last, now.is_terminal, extras
    )
    returns = jnp.where(now.is_first, 0.0, learner.episode_return + now.reward)
    lengths = jnp.where(now.is_first, 0, learner.episode_length + 1)
    learner = learner.replace(
        carry=carry,
        ring=replay.add(learner.ring, record),
        key=key,
        episode_return=returns,
        episode_length=lengths,
    )
    return learner, action, Episodes(now.is_last, returns, lengths)


def learner_update(agent: Agent, learner: Learner) -> tuple[Learner, Metrics]:
    """Sample what the agent asks for and let it learn."""
    sample_key, update_key, key = jax.random.split(learner.key, 3)
    batch = replay.sample(learner.ring, sample_key, agent.sampling)
    state, metrics, feedback = agent.update(learner.agent, batch, update_key)
    ring = learner.ring
    if feedback is not None:
        ring = replay.write_back(ring, batch.index, feedback)
    return learner.replace(agent=state, ring=ring, key=key), metrics


def over_seeds(fn: Callable[..., Any], num_seeds: int) -> Callable[..., Any]:
    """Map `fn` over the leading seed axis; a single seed is not batched at all.

    One seed is unpacked instead of mapped, because a batched loop runs until its last
    member is done and copies its carry at every trip.
    """
    if num_seeds > 1:
        return jax.vmap(fn)

    def single(*args: Any) -> Any:
        out = fn(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], out)

    return single


class Schedule(NamedTuple):
    """Vector steps (one step of all E environments) between the landmarks of a run."""

    warmup: int
    cycle: int
    cycles_per_report: int
    total: int

    def updates_after(self, step: int) -> bool:
        """Tell whether an update follows vector step number `step` (counted from 1)."""
        return step >= self.warmup and (step - self.warmup) % self.cycle == 0


def schedule(agent: Agent, config: DriverConfig) -> Schedule:
    """Turn environment steps into whole vector steps: warm-up, then cycles of acting and
    one update. The first update follows the warm-up, the last one the last cycle.

    Raises:
      ValueError: when a number of steps is not positive.
    """
    for name in ("steps", "num_envs", "interval"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    cycle = max(1, agent.sampling.every // config.num_envs)
    warmup = max(1, -(-agent.sampling.start // config.num_envs))
    per_report = max(1, config.interval // (cycle * config.num_envs))
    return Schedule(warmup, cycle, per_report, -(-config.steps // config.num_envs))


def seed_keys(seeds: tuple[int, ...]) -> Key:
    """Return one key per seed, [S]; a seed's key does not depend on its neighbours."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def start_learners(
    factory: AgentFactory, spec: EnvSpec, config: DriverConfig, hyper: Hyper
) -> Learner:
    """Make the learners of all seeds, leaves [S, ...]."""

    def start(key: Key, hyper: Hyper) -> Learner:
        return init_learner(factory(hyper), spec, config.num_envs, key)

    return jax.jit(over_seeds(start, len(config.seeds)))(seed_keys(config.seeds), hyper)


class DeviceState(NamedTuple):
    """Learners and simulators of `run_device`, leaves [S, ...]."""

    learner: Learner
    env: EpisodicState
    key: Key


def run_device(
    factory: AgentFactory,
    env: MDP,
    config: DriverConfig,
    hyper: Hyper | None = None,
    snapshot: Any = None,
    params: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train on an `MDP`: acting, stepping, storing and learning in one compiled loop.

    Args:
      factory: builds the agent, possibly from traced hyper-parameters.
      env: the task; episodes end after `env.spec.max_episode_steps`.
      config: see `DriverConfig`.
      hyper: float hyper-parameters [S], one value per seed.
      snapshot: what `Report.snapshot()` of an earlier run returned: go on from there.
      params: parameters of `env`.
      should_stop: asked between intervals.

    Yields:
      A `Report` per interval, the last one at `config.steps`. Its learner is only valid
      until the next one is asked for: its memory is then reused.
    """
    hyper = hyper or {}
    stream = episodic(env, env.spec.max_episode_steps)
    plan = schedule(factory({k: v[0] for k, v in hyper.items()}), config)
    num_seeds = len(config.seeds)

    def start_env(key: Key) -> tuple[EpisodicState, Key]:
        init_key, key = jax.random.split(key)
        return stream.init(params, init_key, None, config.num_envs), key

    def collect(agent: Agent, state: DeviceState, length: int, mode: Mode) -> Any:
        def step(state: DeviceState, _: None) -> tuple[DeviceState, Episodes]:
            env_key, key = jax.random.split(state.key)
            now = timestep(stream, params, state.env)
            learner, action, episodes = learner_step(agent, state.learner, now, mode)
            env_state, _ = stream.step(params, env_key, state.env, action)
            return DeviceState(learner, env_state, key), episodes

        return jax.lax.scan(step, state, None, length=length)

    def learn(agent: Agent, state: DeviceState) -> tuple[DeviceState, Metrics]:
        learner, metrics = learner_update(agent, state.learner)
        return state._replace(learner=learner), metrics

    def stretch(state: DeviceState, hyper: Hyper, length: int, mode: Mode) -> Any:
        agent = factory(hyper)
        state, episodes = collect(agent, state, length, mode)
        state, metrics = learn(agent, state)
        return state, metrics, episodes

    def cycles(state: DeviceState, hyper: Hyper, num: Array) -> Any:
        agent = factory(hyper)
        rows = (plan.cycles_per_report, plan.cycle, config.num_envs)
        empty = Episodes(jnp.zeros(rows, bool), jnp.zeros(rows), jnp.zeros(rows, jnp.int32))
        shapes = jax.eval_shape(lambda s: learn(agent, s)[1], state)
        totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def cycle(i: Array, carry: Any) -> Any:
            state, totals, log = carry
            state, episodes = collect(agent, state, plan.cycle, "explore")
            state, metrics = learn(agent, state)
            totals = jax.tree.map(lambda a, b: a + b / num, totals, metrics)
            return state, totals, jax.tree.map(lambda a, b: a.at[i].set(b), log, episodes)

        return jax.lax.fori_loop(0, num, cycle, (state, totals, empty))

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(over_seeds(fn, num_seeds), donate_argnums=0)

    run_cycles = compiled(cycles)
    if snapshot is None:
        keys = jax.vmap(lambda k: jax.random.fold_in(k, 1))(seed_keys(config.seeds))
        env_state, keys = jax.jit(over_seeds(start_env, num_seeds))(keys)
        state = DeviceState(start_learners(factory, env.spec, config, hyper), env_state, keys)
        step = 0
    else:
        state, step = snapshot["state"], int(snapshot["step"])

    while step < plan.total and not should_stop():
        remaining = (plan.total - step) // plan.cycle
        if step == 0 or remaining == 0:
            length = min(plan.warmup, plan.total) if step == 0 else plan.total - step
            mode: Mode = "random" if step == 0 else "explore"
            once = compiled(lambda s, h, n=length, m=mode: stretch(s, h, n, m))
            state, metrics, episodes = once(state, hyper)
            step += length
        else:
            num = min(remaining, plan.cycles_per_report)
            counts = jnp.full(num_seeds, num)
            state, metrics, episodes = run_cycles(state, hyper, counts)
            step += num * plan.cycle
        done = {"state": state, "step": np.int64(step)}
        yield Report(
            step * config.num_envs, state.learner, _host(metrics), _host(episodes),
            lambda done=done: done,
        )  # fmt: skip


def run_host(
    factory: AgentFactory,
    envs: list[HostEnvironment],
    config: DriverConfig,
    hyper: Hyper | None = None,
    snapshot: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train on environments that live on the host, one `HostEnvironment` per seed.

    Per vector step there is one transfer in, one compiled act-and-store, one transfer
    out; an update is dispatched before the simulators step and overlaps with them.

    Args:
      factory: builds the agent, possibly from traced hyper-parameters.
      envs: one per seed, `config.num_envs` environments each.
      config: see `DriverConfig`.
      hyper: float hyper-parameters [S], one value per seed.
      snapshot: what `Report.snapshot()` of an earlier run returned: go on from there.
      should_stop: asked at every vector step.

    Yields:
      A `Report` per interval, the last one at `config.steps` or where it was stopped. Its
      learner is only valid until the next one is asked for: its memory is then reused.

    Raises:
      ValueError: when the environments do not fit the configuration.
    """
    hyper = hyper or {}
    num_seeds = len(config.seeds)
    _check_envs(envs, config)
    plan = schedule(factory({k: v[0] for k, v in hyper.items()}), config)

    def act(learner: Learner, now: TimeStep, hyper: Hyper, mode: Mode) -> Any:
        return learner_step(factory(hyper), learner, now, mode)

    def learn(learner: Learner, hyper: Hyper) -> Any:
        return learner_update(factory(hyper), learner)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(over_seeds(fn, num_seeds), donate_argnums=0)

    def actor(mode: Mode) -> Callable[..., Any]:
        return compiled(lambda learner, now, hyper: act(learner, now, hyper, mode))

    run_act = {"random": actor("random"), "explore": actor("explore")}
    run_learn = compiled(learn)
    if snapshot is None:
        learner = start_learners(factory, envs[0].spec, config, hyper)
        now = _stack([env.reset(seed) for env, seed in zip(envs, config.seeds, strict=True)])
        step = 0
    else:
        learner, step = snapshot["learner"], int(snapshot["step"])
        now = _stack([env.restore(s) for env, s in zip(envs, snapshot["envs"], strict=True)])

    logged: list[Metrics] = []
    finished: list[Episodes] = []
    while step < plan.total and not should_stop():
        mode: Mode = "random" if step < plan.warmup else "explore"
        learner, action, episodes = run_act[mode](learner, now, hyper)
        action = np.asarray(action)
        if now.is_last.any():
            finished.append(_host(episodes))
        step += 1
        if plan.updates_after(step):
            learner, metrics = run_learn(learner, hyper)
            logged.append(metrics)
        now = _stack([env.step(a) for env, a in zip(envs, action, strict=True)])
        last = step == plan.total or should_stop()
        if last or step % (plan.cycles_per_report * plan.cycle) == 0:
            done = {"learner": learner, "step": np.int64(step)}
            yield Report(
                step * config.num_envs, learner, _mean_metrics(logged),
                _join_episodes(finished, num_seeds),
                lambda done=done: {**done, "envs": [env.state() for env in envs]},
            )  # fmt: skip
            logged, finished = [], []


def _check_envs(envs: list[HostEnvironment], config: DriverConfig) -> None:
    if len(envs) != len(config.seeds):
        raise ValueError(
            f"envs: expected one per seed ({len(config.seeds)}), got {len(envs)}"
        )
    for env in envs:
        if env.num_envs != config.num_envs:
            raise ValueError(
                f"num_envs: the configuration says {config.num_envs}, the environment has "
                f"{env.num_envs}; build it with num_envs={config.num_envs}"
            )


def _stack(steps: list[TimeStep]) -> TimeStep:
    return jax.tree.map(lambda *x: np.stack(x), *steps)


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _mean_metrics(logged: list[Metrics]) -> dict[str, np.ndarray]:
    """Average each metric over the updates of an interval, [S] each."""
    if not logged:
        return {}
    return {k: np.mean([np.asarray(m[k]) for m in logged], 0) for k in logged[0]}


def _join_episodes(finished: list[Episodes], num_seeds: int) -> Episodes:
    """Join lists of [S, E] into [S, n, E]."""
    if not finished:
        return Episodes(*(np.zeros((num_seeds, 0), t) for t in (bool, np.float32, np.int32)))
    return jax.tree.map(lambda *x: np.stack(x, 1), *finished)

"""What both drivers share: acting, storing and learning, for all seeds at once.

`learner_act` and `learner_learn` are all that touches an agent, so that equal records give
an equal learner on the device and on the host; `learner_step` and `learner_update` add a
replay that lives in the same compiled program. Everything outside of one seed carries a
leading seed axis [S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import replay, spaces
from mbrl.types import (
    Agent,
    Array,
    Batch,
    Carry,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Record,
    SampleSpec,
    State,
    TimeStep,
)

Hyper = Mapping[str, Array]
"""Float hyper-parameters, one value per seed [S]; empty for the agent as configured."""

AgentFactory = Callable[[Hyper], Agent]
"""Builds the agent from (possibly traced) hyper-parameters of one seed."""


class Learner(NamedTuple):
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
      metrics: means over the interval (of `COUNTS` the latest), [S] each; empty before the
        first update.
      episodes: finished episodes of the interval, [S, ...].
      snapshot: call for everything a later run needs to go on bit for bit.
    """

    step: int
    learner: Learner
    metrics: dict[str, np.ndarray]
    episodes: Episodes
    snapshot: Callable[[], Any]


def example_record(agent: Agent, spec: EnvSpec, num_envs: int) -> Any:
    """Describe one record of one environment, a `Record` of `jax.ShapeDtypeStruct`s."""

    def extras(key: Key) -> Any:
        obs = spaces.zeros(spec.observation, (num_envs,))
        state, carry, first = agent.init(key), agent.begin(num_envs), jnp.ones(num_envs, bool)
        return agent.act(state, carry, obs, first, key, "random")[2]

    def record(key: Key) -> Record:
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), jax.eval_shape(extras, key))
        flag = jnp.zeros((), bool)
        obs, action = spaces.zeros(spec.observation), spaces.zeros(spec.action)
        return Record(obs, action, jnp.zeros(()), flag, flag, flag, rows)

    return jax.eval_shape(record, jax.random.key(0))


def init_learner(
    agent: Agent, spec: EnvSpec, num_envs: int, key: Key, ring_shape: tuple[int, int] | None = None
) -> Learner:
    """Make the learner of one seed before its first step.

    Args:
      agent: what learns.
      spec: spaces of the task.
      num_envs: environments that it acts in.
      key: of the seed.
      ring_shape: streams and rows of replay; None = as the agent asks for.
    """
    agent_key, key = jax.random.split(key)
    example = example_record(agent, spec, num_envs)
    streams, rows = ring_shape or (num_envs, agent.sampling.capacity // num_envs)
    return Learner(
        agent=agent.init(agent_key),
        carry=agent.begin(num_envs),
        ring=replay.init(example, streams, streams * rows),
        key=key,
        episode_return=jnp.zeros(num_envs),
        episode_length=jnp.zeros(num_envs, jnp.int32),
    )


def learner_act(
    agent: Agent, learner: Learner, now: TimeStep, mode: Mode
) -> tuple[Learner, Record, Episodes]:
    """Act on a time step of [E] environments; replay is not touched.

    Returns:
      The learner, the record [E, ...] to store, and the episodes that end with it.
    """
    act_key, key = jax.random.split(learner.key)
    action, carry, extras = agent.act(
        learner.agent, learner.carry, now.obs, now.is_first, act_key, mode
    )
    record = Record(now.obs, action, now.reward, now.is_first, now.is_last, now.is_terminal, extras)
    returns = jnp.where(now.is_first, 0.0, learner.episode_return + now.reward)
    lengths = jnp.where(now.is_first, 0, learner.episode_length + 1)
    learner = learner._replace(carry=carry, key=key, episode_return=returns, episode_length=lengths)
    return learner, record, Episodes(now.is_last, returns, lengths)


def learner_step(
    agent: Agent, learner: Learner, now: TimeStep, mode: Mode
) -> tuple[Learner, Array, Episodes]:
    """Act on a time step of [E] environments and store the record.

    Returns:
      The learner, the action [E, ...] and the episodes that end with this record.
    """
    learner, record, episodes = learner_act(agent, learner, now, mode)
    return learner._replace(ring=replay.add(learner.ring, record)), record.action, episodes


def sample_key(learner: Learner) -> Key:
    """Return the key of the batch that the next update learns from."""
    return jax.random.split(learner.key, 3)[0]


def learner_learn(agent: Agent, learner: Learner, batch: Batch) -> tuple[Learner, Metrics, Any]:
    """Learn from a batch that was drawn with `sample_key`; replay is not touched.

    Returns:
      The learner, metrics, and what should go back into replay.
    """
    _, update_key, key = jax.random.split(learner.key, 3)
    state, metrics, feedback = agent.update(learner.agent, batch, update_key)
    return learner._replace(agent=state, key=key), metrics, feedback


def learner_update(agent: Agent, learner: Learner) -> tuple[Learner, Metrics]:
    """Sample what the agent asks for and let it learn."""
    spec = per_call(agent.sampling, learner.episode_return.shape[0])
    batch = replay.sample(learner.ring, sample_key(learner), spec)
    learner, metrics, feedback = learner_learn(agent, learner, batch)
    if feedback is not None:
        learner = learner._replace(ring=replay.write_back(learner.ring, batch.index, feedback))
    return learner, metrics


def per_call(sampling: SampleSpec, num_envs: int) -> SampleSpec:
    """Fill in what depends on the number of environments: the records of a rollout, and the
    updates where one step of all environments holds several calls' worth of them.
    """
    if sampling.kind == "latest" and not sampling.length:
        return sampling._replace(length=max(1, sampling.every // num_envs))
    return sampling._replace(updates=sampling.updates * max(1, num_envs // sampling.every))


COUNTS = ("skipped_updates", "skipped_in_a_row", "preferences/labels", "preferences/agreement")
"""Last words of metrics that count: their mean over an interval would mean nothing."""


def add_metrics(totals: Metrics, metrics: Metrics, num: Any) -> Metrics:
    """Add the metrics of one of `num` updates to those of an interval, which begin at 0.

    Returns:
      The mean of each so far, times the share of updates seen; of `COUNTS` the latest.
    """
    return {
        name: value if name.endswith(COUNTS) else totals[name] + value / num
        for name, value in metrics.items()
    }


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

    def until_update(self, step: int) -> int:
        """Count the vector steps from `step` to the next update."""
        if step < self.warmup:
            return self.warmup - step
        return self.cycle - (step - self.warmup) % self.cycle


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
    if agent.sampling.kind == "latest" and not agent.sampling.length and cycle < 2:
        raise ValueError(
            f"num_envs: got {config.num_envs} with an update every {agent.sampling.every} "
            "environment steps, expected at most half as many, or no environment takes two steps "
            "in between; lower --num-envs or raise --rollout"
        )
    warmup = max(1, -(-agent.sampling.start // config.num_envs))
    per_report = max(1, config.interval // (cycle * config.num_envs))
    return Schedule(warmup, cycle, per_report, -(-config.steps // config.num_envs))


def updates_per_step(agent: Agent, num_envs: int) -> float:
    """Return the minibatches that are learned from per environment step (0 without any)."""
    sampling = agent.sampling
    if sampling.kind != "sequences":
        return 0.0
    steps = max(1, sampling.every // num_envs) * num_envs
    return sampling.updates * max(1, num_envs // sampling.every) / steps


def seed_keys(seeds: tuple[int, ...]) -> Key:
    """Return one key per seed, [S]; a seed's key does not depend on its neighbours."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def start_learners(
    factory: AgentFactory,
    spec: EnvSpec,
    config: DriverConfig,
    hyper: Hyper,
    ring_shape: tuple[int, int] | None = None,
) -> Learner:
    """Make the learners of all seeds, leaves [S, ...]; arguments as in `init_learner`."""

    def start(key: Key, hyper: Hyper) -> Learner:
        return init_learner(factory(hyper), spec, config.num_envs, key, ring_shape)

    return jax.jit(over_seeds(start, len(config.seeds)))(seed_keys(config.seeds), hyper)


def fetch(tree: Any) -> Any:
    """Copy a pytree to the host, as numpy arrays."""
    return jax.tree.map(np.asarray, tree)

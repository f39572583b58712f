"""`run_offline`: train on recorded experience alone, without an environment."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import replay
from mbrl.training.learner import (
    AgentFactory,
    DriverConfig,
    Episodes,
    Hyper,
    Learner,
    Report,
    add_metrics,
    fetch,
    learner_update,
    over_seeds,
    start_learners,
)
from mbrl.types import Agent, Array, Batch, EnvSpec, Key, Record


def run_offline(
    factory: AgentFactory,
    spec: EnvSpec,
    record: Record,
    config: DriverConfig,
    hyper: Hyper | None = None,
    snapshot: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Report, Learner | None, None]:
    """Train on records; every step is one update, and no environment is stepped.

    Args:
      factory: builds the agent, possibly from traced hyper-parameters.
      spec: spaces of the task.
      record: leaves [E, T, ...], streams in the order of time; their extras are not used.
      config: `steps` and `interval` count updates (calls of `Agent.update`).
      hyper: float hyper-parameters [S], one value per seed.
      snapshot: what `Report.snapshot()` of an earlier run returned: go on from there.
      should_stop: asked between intervals.

    Yields:
      A `Report` per interval, without episodes, the last one at `config.steps`. Its learner
      is only valid until the next one is asked for: its memory is then reused. Another
      learner may be sent in answer (`generator.send`), to go on with.

    Raises:
      ValueError: for an agent that learns from its own newest steps only, and for streams
        that are shorter than the sequences it asks for.
    """
    hyper = hyper or {}
    num_seeds = len(config.seeds)
    shape: Any = record.reward.shape
    _check(factory({k: v[0] for k, v in hyper.items()}), shape, config)

    def learn(learner: Learner, hyper: Hyper, num: Array) -> Any:
        agent = _without_news(factory(hyper))
        shapes = jax.eval_shape(lambda learner: learner_update(agent, learner)[1], learner)
        totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def one(i: Array, carry: Any) -> Any:
            learner, totals = carry
            learner, metrics = learner_update(agent, learner)
            return learner, add_metrics(totals, metrics, num)

        return jax.lax.fori_loop(0, num, one, (learner, totals))

    @partial(jax.jit, donate_argnums=0)
    def run(learner: Learner, hyper: Hyper, num: Array) -> Any:
        # The number is shared by all seeds, as in `run_device`.
        return over_seeds(lambda learner, hyper: learn(learner, hyper, num), num_seeds)(
            learner, hyper
        )

    if snapshot is None:
        learner, step = start_learners(factory, spec, config, hyper, shape), 0
        learner = learner._replace(ring=_filled(learner.ring, record))
    else:
        learner, step = snapshot["learner"], int(snapshot["step"])
    none: list[Any] = [np.zeros((num_seeds, 0), t) for t in (bool, np.float32, np.int32)]
    while step < config.steps and not should_stop():
        num = min(config.interval, config.steps - step)
        learner, metrics = run(learner, hyper, jnp.asarray(num))
        step += num
        done = {"learner": learner, "step": np.int64(step)}
        sent = yield Report(step, learner, fetch(metrics), Episodes(*none), lambda done=done: done)
        learner = learner if sent is None else sent


def _without_news(agent: Agent) -> Agent:
    """Let an agent know that no record has come since it last learned."""

    def update(state: Any, batch: Batch, key: Key) -> Any:
        return agent.update(state, batch._replace(newest=None), key)

    return agent._replace(update=update)


def _filled(ring: replay.Ring, record: Record) -> replay.Ring:
    """Put records [E, T, ...] into empty rings [S, E, T, ...]; extras stay zero."""
    num_seeds, _, rows = ring.record.reward.shape

    def copies(old: Array, new: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(new, old.dtype), (num_seeds, *new.shape))

    kept = record._replace(extras=())
    stored = jax.tree.map(copies, ring.record._replace(extras=()), kept)
    full = jnp.full_like(ring.size, rows)
    return replay.Ring(stored._replace(extras=ring.record.extras), jnp.zeros_like(ring.head), full)


def _check(agent: Any, shape: tuple[int, ...], config: DriverConfig) -> None:
    for name in ("steps", "interval"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if agent.sampling.kind == "latest":
        raise ValueError(
            "data: this agent learns from the newest steps of its own policy, which recorded "
            "data does not hold; use one that learns from replay"
        )
    if agent.sampling.kind == "sequences" and shape[1] < agent.sampling.length:
        raise ValueError(
            f"data: got streams of {shape[1]} records, expected at least the length of a "
            f"sequence, {agent.sampling.length}; record more or lower --length"
        )

"""`run_device`: train where the simulator lives, in one compiled loop."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.mdp import EpisodicState, episodic, timestep
from mbrl.training.faults import Fault, first_fault, no_fault, raise_fault
from mbrl.training.learner import (
    AgentFactory,
    DriverConfig,
    Episodes,
    Hyper,
    Learner,
    Report,
    add_metrics,
    fetch,
    learner_step,
    learner_update,
    over_seeds,
    schedule,
    seed_keys,
    start_learners,
)
from mbrl.types import MDP, Agent, Array, Key, Metrics, Mode, TimeStep


class DeviceState(NamedTuple):
    """Learners and simulators of `run_device`, leaves [S, ...]."""

    learner: Learner
    env: EpisodicState
    key: Key


Running = tuple[DeviceState, Fault]
"""What a compiled loop carries from step to step."""


def start_state(
    factory: AgentFactory, env: MDP, config: DriverConfig, hyper: Hyper, params: Any = None
) -> DeviceState:
    """Make learners and simulators of all seeds, leaves [S, ...]."""
    stream = episodic(env, env.spec.max_episode_steps)

    def start_env(key: Key) -> tuple[EpisodicState, Key]:
        init_key, key = jax.random.split(key)
        return stream.init(params, init_key, None, config.num_envs), key

    # A branch of each seed's key: the stream of the environment is its own.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(seed_keys(config.seeds))
    env_state, keys = jax.jit(over_seeds(start_env, len(config.seeds)))(keys)
    return DeviceState(start_learners(factory, env.spec, config, hyper), env_state, keys)


def run_device(
    factory: AgentFactory,
    env: MDP,
    config: DriverConfig,
    hyper: Hyper | None = None,
    snapshot: Any = None,
    params: Any = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Report, Learner | None, None]:
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
      until the next one is asked for: its memory is then reused. Another learner may be sent in
      answer (`generator.send`), to go on with.

    Raises:
      ValueError: when the simulator has yielded NaN or Inf, naming seed, environment, step
        and leaf; no report holds them.
    """
    hyper = hyper or {}
    stream = episodic(env, env.spec.max_episode_steps)
    plan = schedule(factory({k: v[0] for k, v in hyper.items()}), config)
    num_seeds = len(config.seeds)

    def emitted(state: DeviceState) -> TimeStep:
        return timestep(stream, params, state.env)

    def collect(agent: Agent, carry: Running, steps: Array, mode: Mode) -> Any:
        def step(carry: Running, t: Array) -> tuple[Running, Episodes]:
            state, fault = carry
            env_key, key = jax.random.split(state.key)
            now = emitted(state)
            learner, action, episodes = learner_step(agent, state.learner, now, mode)
            env_state = stream.step(params, env_key, state.env, action)[0]
            return (DeviceState(learner, env_state, key), first_fault(fault, now, t)), episodes

        return jax.lax.scan(step, carry, steps)

    def learn(agent: Agent, state: DeviceState) -> tuple[DeviceState, Metrics]:
        learner, metrics = learner_update(agent, state.learner)
        return state._replace(learner=learner), metrics

    def stretch(state: DeviceState, hyper: Hyper, length: int, mode: Mode, update: bool) -> Any:
        agent = factory(hyper)
        (state, fault), episodes = collect(agent, (state, no_fault()), jnp.arange(length), mode)
        state, metrics = learn(agent, state) if update else (state, {})
        # What comes next is saved with the state, and looked at for that.
        return state, metrics, episodes, first_fault(fault, emitted(state), length)

    def cycles(state: DeviceState, hyper: Hyper, num: Array) -> Any:
        agent = factory(hyper)
        rows = (plan.cycles_per_report, plan.cycle, config.num_envs)
        empty = Episodes(jnp.zeros(rows, bool), jnp.zeros(rows), jnp.zeros(rows, jnp.int32))
        shapes = jax.eval_shape(lambda s: learn(agent, s)[1], state)
        totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def cycle(i: Array, carry: Any) -> Any:
            state, totals, log, fault = carry
            steps = i * plan.cycle + jnp.arange(plan.cycle)
            (state, fault), episodes = collect(agent, (state, fault), steps, "explore")
            state, metrics = learn(agent, state)
            totals = add_metrics(totals, metrics, num)
            return state, totals, jax.tree.map(lambda a, b: a.at[i].set(b), log, episodes), fault

        carry = jax.lax.fori_loop(0, num, cycle, (state, totals, empty, no_fault()))
        state, totals, log, fault = carry
        return state, totals, log, first_fault(fault, emitted(state), num * plan.cycle)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(over_seeds(fn, num_seeds), donate_argnums=0)

    @partial(jax.jit, donate_argnums=0)
    def run_cycles(state: DeviceState, hyper: Hyper, num: Array) -> Any:
        # The number is shared by all seeds: a loop with one per seed would select, and so
        # copy, the whole state after each of its trips.
        return over_seeds(lambda state, hyper: cycles(state, hyper, num), num_seeds)(state, hyper)

    if snapshot is None:
        state, step = start_state(factory, env, config, hyper, params), 0
    else:
        state, step = snapshot["state"], int(snapshot["step"])

    while step < plan.total and not should_stop():
        left, due = plan.total - step, plan.until_update(step)
        if plan.updates_after(step) and left >= plan.cycle:
            num = min(left // plan.cycle, plan.cycles_per_report)
            state, metrics, episodes, fault = run_cycles(state, hyper, jnp.asarray(num))
            length = num * plan.cycle
        else:  # the warm-up, or a part of a cycle where a run ends or has ended before
            length = min(left, due)
            mode: Mode = "random" if step < plan.warmup else "explore"
            once = partial(stretch, length=length, mode=mode, update=length == due)
            state, metrics, episodes, fault = compiled(once)(state, hyper)
        raise_fault(fault, state.learner.ring.record, step, env.spec.id, config.seeds)
        step += length
        done = {"state": state, "step": np.int64(step)}
        sent = yield Report(
            step * config.num_envs, state.learner, fetch(metrics), fetch(episodes),
            lambda done=done: done,
        )  # fmt: skip
        state = state if sent is None else state._replace(learner=sent)

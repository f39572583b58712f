"""The parts of `mbrl bench mbpo`: an epoch in one call or call by call, rollouts and updates."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import envs
from agents.mbpo import MBPOConfig, MBPOState, make_mbpo
from agents.presets import preset
from agents.sac import SACState, make_learner
from mbrl import replay, spaces
from mbrl.exploitation import newest_exploitation
from mbrl.imagination import branches
from mbrl.mdp import episodic, timestep
from mbrl.mixing import Pool, mixed, pool
from mbrl.models.fitted_ensemble import (
    Fitter,
    build_ensemble,
    ensemble_optimizer,
    fit_ensemble,
    propagation_of,
)
from mbrl.training.device import DeviceState, start_state
from mbrl.training.learner import (
    DriverConfig,
    Learner,
    learner_step,
    learner_update,
    sample_key,
)
from mbrl.types import Key, Metrics, Mode
from scripts.bench import GEMM, QUICK_GEMM
from scripts.flops import count_flops
from scripts.timing import beside_gemm, warm_seconds

COUNTED = (
    "two FLOP per multiply-add of all matrix products, from the jaxpr, loops as often as they run, "
    "the fit of the model as one minibatch because its length depends on the data; call by call = "
    "a compiled call for every environment step, one for the model and its rollouts, and one for "
    "every update of actor and critics, from Python, which waits for the last of them alone"
)
TASK = "device/Pendulum"


class Sizes(NamedTuple):
    """The agent, the records before the epoch, and the GEMM, so that a test can shrink them."""

    config: MBPOConfig = dataclasses.replace(
        preset("mbpo", TASK), train_every=250, train_ratio=10.0, rollouts=100_000
    )
    records: int = 2_000
    gemm: tuple[int, int] = GEMM


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs."""
    config = dataclasses.replace(
        preset("mbpo", TASK), members=2, elites=1, hidden=(4,), batch_size=4, max_epochs=1,
        termination_epochs=1, rollouts=8, train_every=4, train_ratio=1.0, capacity=64,
    )  # fmt: skip
    sac = dataclasses.replace(config.sac, hidden=(4,), batch_size=4)
    return Sizes(dataclasses.replace(config, sac=sac), 16, QUICK_GEMM)


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name."""
    sizes = quick_sizes() if quick else Sizes()
    return {
        "epoch": lambda: epoch(sizes, max(2, repeats // 4)),
        "imagine": lambda: imagine(sizes, repeats),
        "update": lambda: update(sizes, max(2, repeats // 4)),
    }


class Model(NamedTuple):
    """What actor and critics learn with and from: the first half of an update of MBPO."""

    sac: SACState
    real: Pool
    imagined: Pool
    metrics: Metrics


class Programs(NamedTuple):
    """An epoch as one function, and the functions that it is made of; none is compiled.

    Attributes:
      epoch: `(state) -> state`, steps of the environment and an update of the agent.
      step: `(state, mode) -> state`, one step of the environment.
      model: `(learner) -> Model`, the fit and the rollouts.
      rollouts: `(agent state, starts [M, ...], key) -> (transitions, counts)`, these alone.
      learn: `(sac, key, real, imagined) -> (sac, key)`, one update of actor and critics.
      updates: the same, as many as an epoch has.
    """

    epoch: Callable[[DeviceState], DeviceState]
    step: Callable[..., DeviceState]
    model: Callable[[Learner], Model]
    rollouts: Callable[[MBPOState, Any, Key], Any]
    learn: Callable[..., tuple[SACState, Key]]
    updates: Callable[..., tuple[SACState, Key]]


def programs(config: MBPOConfig) -> Programs:
    """Build both ways through an epoch from the functions that the agent and its driver use."""
    env: Any = envs.make(TASK, 1)
    spec = env.spec
    agent, sac = make_mbpo(spec, config), make_learner(spec, config.sac)
    stream = episodic(env, spec.max_episode_steps)
    ensemble, optimizer = build_ensemble(spec, config), ensemble_optimizer(config)
    mdp = ensemble.mdp(propagation_of(config), uncertainty=False)

    def step(state: DeviceState, mode: Mode = "explore") -> DeviceState:
        env_key, key = jax.random.split(state.key)
        now = timestep(stream, None, state.env)
        learner, action, _ = learner_step(agent, state.learner, now, mode)
        return DeviceState(learner, stream.step(None, env_key, state.env, action)[0], key)

    def epoch(state: DeviceState) -> DeviceState:
        state = jax.lax.fori_loop(0, config.train_every, lambda _, state: step(state), state)
        return state._replace(learner=learner_update(agent, state.learner)[0])

    def rollouts(state: MBPOState, starts: Any, key: Key) -> Any:
        def act(key: Key, obs: Any) -> Any:
            return spaces.decode_action(spec.action, sac.policy(state.sac, obs).sample(key))

        length = config.length[0]
        return branches(mdp, state.ensemble.model, key, starts, act, length, max(config.length))

    def model(learner: Learner) -> Model:
        batch = replay.sample(learner.ring, sample_key(learner), agent.sampling)
        model_key, ending_key, gap_key, start_key, branch_key = jax.random.split(learner.key, 5)
        data, valid = replay.transitions(batch)
        num_envs, rows = batch.valid.shape
        held = replay.holdout_mask((num_envs, rows), config.holdout).reshape(-1)
        fit = Fitter(optimizer, data, valid & held)
        state = learner.agent
        fitted, metrics = fit_ensemble(
            ensemble, config, state.ensemble, fit, valid, model_key, ending_key
        )
        metrics |= newest_exploitation(
            mdp, state.ensemble.model, gap_key, batch, data, config.train_every, state.calls > 0
        )
        real = pool(data._replace(is_terminal=1.0 * data.is_terminal), valid)
        starts = real.draw(start_key, config.rollouts).obs
        found = rollouts(state._replace(ensemble=fitted), starts, branch_key)
        return Model(state.sac, real, pool(*found), metrics)

    def learn(state: SACState, key: Key, real: Pool, imagined: Pool) -> tuple[SACState, Key]:
        draw_key, learn_key, key = jax.random.split(key, 3)
        rows = mixed(real, imagined, draw_key, config.sac.batch_size, config.real_ratio)
        return sac.learn(state, *rows, learn_key)[0], key

    def updates(state: SACState, key: Key, real: Pool, imagined: Pool) -> tuple[SACState, Key]:
        def once(_: Any, carry: tuple[SACState, Key]) -> tuple[SACState, Key]:
            return learn(*carry, real, imagined)

        return jax.lax.fori_loop(0, num_updates(config), once, (state, key))

    return Programs(epoch, step, model, rollouts, learn, updates)


def num_updates(config: MBPOConfig) -> int:
    """Return the updates of actor and critics in an epoch."""
    return round(config.train_ratio * config.train_every)


@functools.cache
def start(sizes: Sizes) -> tuple[Programs, DeviceState]:
    """Build the programs, and the state after random steps and one epoch."""
    config, built = sizes.config, programs(sizes.config)
    env: Any = envs.make(TASK, 1)
    driver = DriverConfig(1, 1)
    state = start_state(lambda hyper: make_mbpo(env.spec, config), env, driver, {})
    state = jax.tree.map(lambda x: x[0], state)
    fill = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, sizes.records, lambda _, state: built.step(state, "random"), state
        )
    )
    return built, jax.jit(built.epoch)(fill(state))


def call_by_call(built: Programs, config: MBPOConfig) -> Callable[[DeviceState], Any]:
    """Return an epoch that Python dispatches; what is handed on is reused in place."""
    step = jax.jit(built.step, donate_argnums=0)
    model = jax.jit(built.model)
    learn = jax.jit(built.learn, donate_argnums=0)

    def run(state: DeviceState) -> Any:
        for _ in range(config.train_every):
            state = step(state)
        sac, real, imagined, _ = model(state.learner)
        key = state.key
        for _ in range(num_updates(config)):
            sac, key = learn(sac, key, real, imagined)
        return sac

    return run


def epoch(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure whole epochs from one state, in one call and call by call in turns."""
    built, begun = start(sizes)
    ways = {
        "one": jax.jit(built.epoch, donate_argnums=0),
        "calls": call_by_call(built, sizes.config),
    }
    found = in_turns(ways, begun, repeats, sizes.gemm)
    config = sizes.config
    return {
        **described(sizes),
        "env_steps": config.train_every,
        "imagined_steps": config.rollouts * config.length[0],
        "updates": num_updates(config),
        "gflop": 1e-9 * count_flops(built.epoch, begun),
        **found,
    }


def imagine(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure the rollouts of an epoch alone, beside the GEMM rate."""
    built, begun = start(sizes)
    config, rollouts = sizes.config, jax.jit(built.rollouts)
    state, real = begun.learner.agent, jax.jit(built.model)(begun.learner).real
    starts = real.draw(jax.random.key(0), config.rollouts).obs
    gflop = 1e-9 * count_flops(built.rollouts, state, starts, jax.random.key(1))
    jax.block_until_ready(rollouts(state, starts, jax.random.key(1)))
    timed = beside_gemm(
        lambda i: rollouts(state, starts, jax.random.key(i)), repeats, sizes.gemm
    )  # fmt: skip
    rates = timed.rates(gflop)
    steps = config.rollouts * config.length[0]
    return {
        **described(sizes), **rates, "imagined_steps": steps,
        "steps_per_second": steps / rates["median_seconds"],
    }  # fmt: skip


def update(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure the updates of an epoch alone, in one call and call by call in turns."""
    built, begun = start(sizes)
    sac, real, imagined, _ = jax.jit(built.model)(begun.learner)
    learn = jax.jit(built.learn, donate_argnums=0)
    num = num_updates(sizes.config)

    def calls(state: SACState) -> Any:
        key = jax.random.key(3)
        for _ in range(num):
            state, key = learn(state, key, real, imagined)
        return state

    updates = jax.jit(built.updates, donate_argnums=0)
    ways = {"one": lambda state: updates(state, jax.random.key(3), real, imagined), "calls": calls}
    found = in_turns(ways, sac, repeats, sizes.gemm)
    gflop = 1e-9 * count_flops(built.updates, sac, jax.random.key(3), real, imagined)
    return {
        **described(sizes),
        "updates": num,
        "batch": sizes.config.sac.batch_size,
        "updates_per_second": num / found["one_seconds"],
        "updates_per_second_calls": num / found["calls_seconds"],
        "gflop": gflop,
        "share_of_gemm": gflop / found["one_seconds"] / found["gemm_gflops"],
        **found,
    }


def described(sizes: Sizes) -> dict[str, Any]:
    """Return what the networks of a case are."""
    config = sizes.config
    return {
        "task": TASK,
        "members": config.members,
        "model": list(config.hidden),
        "hidden": list(config.sac.hidden),
    }


def in_turns(
    ways: dict[str, Callable[[Any], Any]], state: Any, repeats: int, shape: tuple[int, int]
) -> dict[str, float]:
    """Measure two ways to do the same, one after the other, beside the GEMM rate.

    Args:
      ways: 'one' and 'calls', functions that may reuse the memory of their argument.
      state: where every call begins.
      repeats: turns; one more of each comes before, and compiles.
      shape: of the GEMM.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    def turn(i: int) -> None:
        del i
        for name, way in ways.items():
            fresh = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
            seconds[name] += warm_seconds(lambda i, way=way, fresh=fresh: way(fresh), 1)

    turn(-1)
    for found in seconds.values():
        found.clear()
    gemm = beside_gemm(turn, repeats, shape).gemm
    ratios = [b / a for a, b in zip(seconds["one"], seconds["calls"], strict=True)]
    return {
        "one_seconds": statistics.median(seconds["one"]),
        "calls_seconds": statistics.median(seconds["calls"]),
        "times_faster": statistics.median(ratios),
        "gemm_gflops": statistics.median(gemm),
    }

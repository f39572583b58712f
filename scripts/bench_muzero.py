"""The parts of `mbrl bench muzero`: searches, reanalysis, training and updates."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import envs
from agents.muzero import MuZeroConfig, MuZeroState, make_muzero
from agents.presets import preset
from mbrl import spaces
from mbrl.models.value_equivalent import ValueEquivalentConfig, value_equivalent
from mbrl.training.device import run_device
from mbrl.training.learner import DriverConfig, example_record, schedule
from mbrl.types import MDP, Agent, Array, Batch, Key
from scripts.bench import GEMM, QUICK_GEMM
from scripts.bench_dreamer import in_new_process
from scripts.timing import beside_gemm, beside_updates, gemm_rate, warm_seconds

COUNTED = (
    "two FLOP per multiply-add of all matrix products of one update, loops as often as they run, "
    "from the jaxpr, where layers without a use are still present (those of consistency at weight "
    "0); bookkeeping = 1 - seconds of as many network calls in a row / seconds of the search"
)
TASK = "device/CartPole"
CALLS = 5
"""Calls of a search, then of its network alone, of whose seconds a repeat takes the median."""


class Sizes(NamedTuple):
    """How large the cases are, so that a test can shrink them."""

    gemm: tuple[int, int] = GEMM
    config: MuZeroConfig = MuZeroConfig()
    batches: tuple[int, ...] = (1, 16, 256)
    simulations: tuple[int, ...] = (8, 50)
    puct_batch: int = 16
    reanalysis: int = 16
    trained: MuZeroConfig = dataclasses.replace(preset("muzero", TASK), simulations=16)
    num_envs: int = 16
    interval: int = 1000


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs."""
    tiny = MuZeroConfig(
        simulations=2, unroll=1, td_steps=1, model=ValueEquivalentConfig(4, 4), batch_size=2,
        train_ratio=0.5, random_steps=8, capacity=64,
    )  # fmt: skip
    return Sizes(QUICK_GEMM, tiny, (4,), (2,), 4, 2, tiny, 2, 4)


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name."""
    sizes = quick_sizes() if quick else Sizes()
    # A new process, which starts as cold as one that trains.
    cold = train if quick else partial(in_new_process, train)
    return {
        "search": lambda: searches(sizes, repeats),
        "reanalysis": lambda: reanalysis(sizes, repeats),
        "train": lambda: cold(sizes, max(3, repeats // 2)),
        "update": lambda: update(sizes, repeats),
    }


def task() -> tuple[MDP, tuple[int, ...]]:
    """Make the task, and return the shape of its observations as well."""
    env: Any = envs.make(TASK, 1)
    return env, env.spec.observation.shape


def searches(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Measure searches of several sizes, most of them Gumbel MuZero's."""
    sized = list(itertools.product(sizes.batches, sizes.simulations))
    cases = [("gumbel", *size) for size in sized]
    cases += [("puct", sizes.puct_batch, simulations) for simulations in sizes.simulations]
    return [search_case(sizes, *case, repeats) for case in cases]


def reanalysis(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure the search from all that an update unrolls over."""
    roots = sizes.config.batch_size * (sizes.config.unroll + 1)
    return search_case(sizes, sizes.config.method, roots, sizes.reanalysis, repeats)


def search_case(
    sizes: Sizes, method: Any, batch: int, simulations: int, repeats: int
) -> dict[str, Any]:
    """Measure one search from `batch` observations, in turns with its network calls alone."""
    config = dataclasses.replace(sizes.config, method=method, simulations=simulations)
    find, network, args = programs(config, batch)
    find, network = jax.jit(find), jax.jit(network)
    keys = list(jax.random.split(jax.random.key(2), CALLS))
    start = time.perf_counter()
    jax.block_until_ready(find(*args, keys[0]))
    first = time.perf_counter() - start
    jax.block_until_ready(network(*args, keys[0]))
    searched, alone = [], []

    def turn(i: int) -> None:
        del i
        for seconds, call in ((searched, find), (alone, network)):
            found = warm_seconds(lambda i, call=call: call(*args, keys[i]), CALLS)
            seconds.append(statistics.median(found))

    gemm = beside_gemm(turn, repeats, sizes.gemm).gemm
    median = statistics.median(searched)
    shares = [1.0 - a / s for a, s in zip(alone, searched, strict=True)]
    return {
        "method": method,
        "batch": batch,
        "simulations": simulations,
        "median_seconds": median,
        "min_seconds": min(searched),
        "network_seconds": statistics.median(alone),
        "simulations_per_second": batch * simulations / median,
        "actions_per_second": batch / median,
        "bookkeeping_share": statistics.median(shares),
        "gemm_gflops": statistics.median(gemm),
        "first_call_seconds": first,
    }


def programs(
    config: MuZeroConfig, batch: int
) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, Array]]:
    """Build an action of the agent, and what the network does for it.

    Returns:
      Two functions `(state, obs [B, ...], key)` and their first two arguments. The first
      searches; the second represents the observations as well, and takes as many steps as the
      search has simulations, one after another.
    """
    env, shape = task()
    spec = env.spec
    agent = make_muzero(spec, config)
    model = value_equivalent(spec, config.model, config.discount)

    def find(state: Any, obs: Array, key: Key) -> Any:
        first = jnp.zeros(batch, bool)
        action, _, found = agent.act(state, agent.begin(batch), obs, first, key, "explore")
        return action, found

    def network(state: Any, obs: Array, key: Key) -> Any:
        latent = model.mdp.init(state.model, key, obs)
        root = model.predictor.predict(state.model, latent)

        def step(carry: tuple[Array, Array], key: Key) -> Any:
            latent, policy = carry
            action = jnp.argmax(policy, -1)  # of the last policy, as a search waits for it
            latent, outcome = model.mdp.step(state.model, key, latent, action)
            policy, value = model.predictor.predict(state.model, latent)
            return (latent, policy), (policy, value, outcome.reward)

        keys = jax.random.split(key, config.simulations)
        return root, jax.lax.scan(step, (latent, root[0]), keys)[1]

    init_key, head_key, obs_key = jax.random.split(jax.random.key(1), 3)
    state = with_opinions(jax.jit(agent.init)(init_key), head_key)
    return find, network, (state, jax.random.normal(obs_key, (batch, *shape)))


def with_opinions(state: MuZeroState, key: Key) -> MuZeroState:
    """Add noise to the heads, whose outputs begin at 0.

    Where all is alike a tree grows evenly, is flat, and takes a third less time than that of a
    trained network. Of 0.02 to 0.5, 0.5 came closest to one after 4,480 steps of the task: 4.4
    and 4.2 ms for 16 roots and 50 simulations, 2.6 without noise.
    """
    heads = {name: state.model.weights[name] for name in ("policy", "value", "reward")}
    leaves, structure = jax.tree.flatten(heads)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + 0.5 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    weights = {**state.model.weights, **jax.tree.unflatten(structure, noisy)}
    return state._replace(model=state.model._replace(weights=weights))


def train(sizes: Sizes, intervals: int) -> dict[str, Any]:
    """Train on the device; time the first report, and whole intervals when all is compiled."""
    env, _ = task()
    config = sizes.trained
    driver = DriverConfig(1, sizes.num_envs, interval=sizes.interval)
    plan = schedule(make_muzero(env.spec, config), driver)
    interval = plan.cycle * plan.cycles_per_report
    steps = (plan.warmup + (1 + intervals) * interval) * sizes.num_envs
    gemm = [gemm_rate(sizes.gemm)]
    ends = [time.perf_counter()]
    for report in run_device(
        lambda hyper: make_muzero(env.spec, dataclasses.replace(config, **hyper)), env,
        dataclasses.replace(driver, steps=steps),
    ):  # fmt: skip
        jax.block_until_ready(report.learner)
        ends.append(time.perf_counter())
    gemm.append(gemm_rate(sizes.gemm))
    # The first report is the warm-up and the second compiles the loop.
    first, second, *warm = (b - a for a, b in itertools.pairwise(ends))
    return {
        "task": TASK,
        "num_envs": sizes.num_envs,
        "simulations": config.simulations,
        "reanalyse": config.reanalyse,
        "train_ratio": config.train_ratio,
        "steps": steps,
        "steps_per_interval": interval * sizes.num_envs,
        "interval_seconds": warm,
        "steps_per_second": interval * sizes.num_envs / statistics.median(warm),
        "first_report_steps": plan.warmup * sizes.num_envs,
        "first_report_seconds": first,
        "second_report_seconds": first + second,
        "gemm_gflops": statistics.mean(gemm),
    }


def update(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure one update with the default settings."""
    agent, batch = setup(sizes.config)
    timed, flop, _ = beside_updates(agent, batch, repeats, sizes.gemm)
    return {
        "batch": sizes.config.batch_size,
        "unroll": sizes.config.unroll,
        **timed.rates(1e-9 * flop),
    }


def setup(config: MuZeroConfig) -> tuple[Agent, Batch]:
    """Build the agent and one batch of random records."""
    env, shape = task()
    agent = make_muzero(env.spec, config)
    lead = (1, config.batch_size, agent.sampling.length)
    record = jax.tree.map(
        lambda x: jnp.zeros((*lead, *x.shape), x.dtype), example_record(agent, env.spec, 1)
    )
    obs_key, action_key = jax.random.split(jax.random.key(0))
    obs = jax.random.normal(obs_key, (*lead, *shape))
    action = spaces.sample(env.spec.action, action_key, lead)
    odds = jnp.ones(lead[:2]) if agent.sampling.priority else None
    return agent, Batch(record._replace(obs=obs, action=action), jnp.ones(lead, bool), odds=odds)

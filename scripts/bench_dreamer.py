"""The parts of `mbrl bench dreamer`: updates and policy steps of published sizes."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.dreamer import DreamerConfig, make_dreamer
from mbrl import spaces
from mbrl.training.learner import example_record
from mbrl.types import Agent, Batch, Discrete, EnvSpec
from scripts.bench import GEMM, QUICK_GEMM
from scripts.flops import count_flops
from scripts.timing import beside_gemm, warm_seconds

COUNTED = (
    "two FLOP per multiply-add of all matrix products and convolutions of one update, loops as "
    "often as they run, from the jaxpr"
)
SEEDS = 4


class Sizes(NamedTuple):
    """How large the cases are, so that a test can shrink them."""

    gemm: tuple[int, int] = GEMM
    config: DreamerConfig = DreamerConfig()
    large: str = "12m"
    pixels: int = 64


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs."""
    tiny = DreamerConfig(batch_size=2, length=3, horizon=2, random_steps=4)
    return Sizes(QUICK_GEMM, tiny, "1m", 8)


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name."""
    sizes = quick_sizes() if quick else Sizes()
    large: Any = dataclasses.replace(sizes.config, size=sizes.large)
    vector = spaces.box(-np.inf, np.inf, (4,))
    image = spaces.box(0, 255, (sizes.pixels, sizes.pixels, 3), np.uint8)
    return {
        "1m": lambda: case(sizes, sizes.config, vector, repeats),
        "12m": lambda: case(sizes, large, vector, max(2, repeats // 4)),
        "image": lambda: case(sizes, sizes.config, image, max(2, repeats // 4)),
        "seeds": lambda: seeds(sizes, vector, max(2, repeats // 2)),
    }


def setup(config: DreamerConfig, observation: Any) -> tuple[Agent, Batch]:
    """Build the agent of a task with two actions, and one batch of random records."""
    spec = EnvSpec("bench", observation, Discrete(2))
    agent = make_dreamer(spec, config)
    lead = (1, config.batch_size, config.length + 1)
    record = jax.tree.map(
        lambda x: jnp.zeros((*lead, *x.shape), x.dtype), example_record(agent, spec, 1)
    )
    key = jax.random.key(0)
    if np.issubdtype(observation.dtype, np.integer):
        obs = spaces.sample(observation, key, lead)
    else:
        obs = jax.random.normal(key, (*lead, *observation.shape))
    record = record._replace(obs=obs, action=jax.random.randint(key, lead, 0, 2))
    return agent, Batch(record, jnp.ones(lead, bool))


def case(sizes: Sizes, config: DreamerConfig, observation: Any, repeats: int) -> dict[str, Any]:
    """Measure one update, one policy step, and the way to the first update."""
    start = time.perf_counter()
    agent, batch = setup(config, observation)
    state = jax.jit(agent.init)(jax.random.key(1))
    flop = count_flops(agent.update, state, batch, jax.random.key(0))
    counting = time.perf_counter()
    update = jax.jit(agent.update, donate_argnums=0)
    state = jax.block_until_ready(update(state, batch, jax.random.key(2)))[0]
    # Counting the work is part of the benchmark, not of a user's start.
    first = time.perf_counter() - counting
    started = counting - start

    def learn(i: int) -> Any:
        nonlocal state
        state, metrics, _ = update(state, batch, jax.random.key(i))
        return metrics

    timed = beside_gemm(learn, repeats, sizes.gemm)
    policy = policy_step(agent, state, batch, 10 * repeats)
    return {
        "size": config.size,
        "observation": list(observation.shape),
        "batch": [config.batch_size, config.length],
        "dtype": config.dtype,
        **timed.rates(1e-9 * flop),
        "first_update_seconds": first,
        "setup_seconds": started,
        "policy_milliseconds": 1e3 * statistics.median(policy),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def policy_step(agent: Agent, state: Any, batch: Batch, repeats: int) -> list[float]:
    """Time one action for one environment."""
    obs = jax.tree.map(lambda x: x[0, 0, :1], batch.record.obs)
    carry = agent.begin(1)
    act = jax.jit(
        lambda state, carry, key: agent.act(state, carry, obs, jnp.zeros(1, bool), key, "explore")
    )
    jax.block_until_ready(act(state, carry, jax.random.key(0)))
    return warm_seconds(lambda i: act(state, carry, jax.random.key(i)), repeats)


def seeds(sizes: Sizes, observation: Any, repeats: int) -> dict[str, Any]:
    """Compare one update of several seeds in one program with one of a single seed."""
    agent, batch = setup(sizes.config, observation)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    several = jax.jit(jax.vmap(agent.update, (0, None, 0)), donate_argnums=0)
    one = jax.jit(agent.update, donate_argnums=0)
    found = {}
    for name, update, state, key in (
        ("one", one, jax.jit(agent.init)(keys[0]), keys[0]),
        ("several", several, jax.jit(jax.vmap(agent.init))(keys), keys),
    ):
        state = jax.block_until_ready(update(state, batch, key))[0]
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            state = jax.block_until_ready(update(state, batch, key))[0]
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    return {"seeds": SEEDS, **found, "ratio": found["several"] / found["one"]}

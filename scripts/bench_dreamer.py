"""The parts of `mbrl bench dreamer`: updates and policy steps of published sizes."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.dreamer import DreamerConfig, make_dreamer
from mbrl import spaces
from mbrl.training.learner import example_record
from mbrl.types import Agent, Batch, Discrete, EnvSpec
from scripts.bench import GEMM, QUICK_GEMM
from scripts.timing import beside_updates, warm_seconds

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
    # A process each, whose peak of memory is its own.
    measure = case if quick else partial(in_new_process, case)
    return {
        "1m": lambda: measure(sizes, sizes.config, vector, repeats),
        "12m": lambda: measure(sizes, large, vector, max(2, repeats // 4)),
        "image": lambda: measure(sizes, sizes.config, image, max(2, repeats // 4)),
        "start": lambda: start(sizes.config, vector),
        "seeds": lambda: seeds(sizes, vector, max(2, repeats // 2)),
    }


def in_new_process(job: Callable[..., Any], *args: Any) -> Any:
    """Return `job(*args)`, computed by a new Python."""
    with ProcessPoolExecutor(1, get_context("spawn"), without_cache) as pool:
        return pool.submit(job, *args).result()


def without_cache() -> None:
    """Compile everything: a program read from the disk compiles in no time."""
    jax.config.update("jax_enable_compilation_cache", False)


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
    """Measure one update and one policy step."""
    agent, batch = setup(config, observation)
    timed, flop, state = beside_updates(agent, batch, repeats, sizes.gemm)
    policy = policy_step(agent, state, batch, 10 * repeats)
    return {
        "size": config.size,
        "observation": list(observation.shape),
        "batch": [config.batch_size, config.length],
        "dtype": config.dtype,
        **timed.rates(1e-9 * flop),
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


def start(config: DreamerConfig, observation: Any) -> dict[str, float]:
    """Time a new Python from its start to the end of its first update, twice.

    The second finds the compiled programs on disk, as every run but a machine's first does.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold_seconds", "cached_seconds"):
            begun = time.perf_counter()
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(first_update, config, observation, folder).result()
                found[name] = time.perf_counter() - begun
    return found


def first_update(config: DreamerConfig, observation: Any, cache: str) -> None:
    """Do one update, with compiled programs kept in the folder `cache`."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    agent, batch = setup(config, observation)
    state = jax.jit(agent.init)(jax.random.key(1))
    jax.block_until_ready(jax.jit(agent.update)(state, batch, jax.random.key(2)))


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

"""Warm timings, and the rate of the machine to compare them with."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Agent, Batch
from scripts.flops import count_flops

_product = jax.jit(jnp.matmul)


def warm_seconds(call: Callable[[int], Any], repeats: int) -> list[float]:
    """Time `call(i)` for every repeat; the first call, which compiles, was made before."""
    found = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(i))
        found.append(time.perf_counter() - start)
    return found


class Timed(NamedTuple):
    """Seconds of each repeat, and the GEMM rate around it, in GFLOP/s."""

    seconds: list[float]
    gemm: list[float]

    def rates(self, gflop: float) -> dict[str, float]:
        """Return what a result tells of calls that do `gflop` of work each."""
        median = statistics.median(self.seconds)
        shares = [gflop / s / rate for s, rate in zip(self.seconds, self.gemm, strict=True)]
        return {
            "median_seconds": median,
            "min_seconds": min(self.seconds),
            "gflop": gflop,
            "gflops": gflop / median,
            "gemm_gflops": statistics.median(self.gemm),
            "share_of_gemm": statistics.median(shares),
        }


def beside_gemm(
    call: Callable[[int], Any], repeats: int, shape: tuple[int, int], dtype: str = "float32"
) -> Timed:
    """Time `call(i)` in turns with the product that stands for what the machine can do.

    A shared machine changes its speed within seconds; a rate from before or after the
    whole measurement says little about the time between.
    """
    around, seconds = [gemm_rate(shape, dtype=dtype)], []
    for i in range(repeats):
        seconds += warm_seconds(lambda _, i=i: call(i), 1)
        around.append(gemm_rate(shape, dtype=dtype))
    return Timed(seconds, [statistics.mean(pair) for pair in itertools.pairwise(around)])


def beside_updates(
    agent: Agent, batch: Batch, repeats: int, shape: tuple[int, int]
) -> tuple[Timed, int, Any]:
    """Time the updates of an agent on one batch beside the GEMM rate.

    Args:
      agent: what learns.
      batch: what every update learns from.
      repeats: updates.
      shape: of the GEMM.

    Returns:
      The times, the floating-point operations of one update, and the state after all of them.
    """
    state = jax.jit(agent.init)(jax.random.key(1))
    flop = count_flops(agent.update, state, batch, jax.random.key(0))
    update = jax.jit(agent.update, donate_argnums=0)
    state = jax.block_until_ready(update(state, batch, jax.random.key(2)))[0]

    def learn(i: int) -> Any:
        nonlocal state
        state, metrics, _ = update(state, batch, jax.random.key(i))
        return metrics

    return beside_gemm(learn, repeats, shape), flop, state


def gemm_rate(shape: tuple[int, int], repeats: int = 20, dtype: str = "float32") -> float:
    """Return the GFLOP/s of one product [rows, width] @ [width, width] of `dtype`, warm."""
    rows, width = shape
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = (
        jax.random.normal(key, (size, width), dtype)
        for key, size in ((x_key, rows), (w_key, width))
    )
    _product(x, w).block_until_ready()
    seconds = statistics.median(warm_seconds(lambda i: _product(x, w), repeats))
    return 2e-9 * rows * width * width / seconds

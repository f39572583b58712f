"""Warm timings, and the rate of the machine to compare them with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def warm_seconds(call: Callable[[int], Any], repeats: int) -> list[float]:
    """Time `call(i)` for every repeat; the first call, which compiles, was made before."""
    found = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(i))
        found.append(time.perf_counter() - start)
    return found


def gemm_rate(shape: tuple[int, int], repeats: int = 20) -> float:
    """Return the GFLOP/s of one f32 product [rows, width] @ [width, width], warm."""
    rows, width = shape
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (rows, width)), jax.random.normal(w_key, (width, width))
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    seconds = statistics.median(warm_seconds(lambda i: product(x, w), repeats))
    return 2e-9 * rows * width * width / seconds

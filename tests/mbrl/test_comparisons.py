"""The buffer of comparisons against a list in Python, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.preferences import comparisons as buffers
from mbrl.types import Transition

K, L, CAPACITY = 3, 4, 10


def segments(num: int, seed: int = 0) -> Transition:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=(num, K, L, *shape)), jnp.float32)

    obs = {"x": draw(2), "pixel": (255 * jnp.abs(draw(1))).astype(jnp.uint8)}
    return Transition(obs, draw(1), draw(), obs, jnp.zeros((num, K, L), bool))


def example() -> Transition:
    return jax.tree.map(lambda x: x[0], segments(1))


def ranks(num: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).integers(-1, K, (num, K)), jnp.int32)


def test_an_empty_buffer_holds_no_reward_and_ranks_nothing():
    buffer = buffers.empty(example(), CAPACITY)
    assert buffer.segments.reward is None and buffer.segments.is_terminal is None
    assert buffer.segments.obs["pixel"].shape == (CAPACITY, K, L, 1)
    assert buffer.segments.obs["pixel"].dtype == jnp.uint8
    np.testing.assert_array_equal(buffer.rank, -1)
    assert buffer.size == 0 and not buffers.filled(buffer).any()
    shapes = jax.eval_shape(lambda: example())
    assert jax.tree.structure(buffers.empty(shapes, CAPACITY)) == jax.tree.structure(buffer)


def test_rows_are_kept_in_order_until_there_is_no_room():
    # Three batches of 5, of which 3, 4 and 4 answered: the last one has room for 3.
    keeps = ["10101", "11011", "11110"]
    buffer, stored = buffers.empty(example(), CAPACITY), []
    traces = []

    def count_and_add(*args: Any) -> Any:
        traces.append(1)
        return buffers.add(*args)

    add = jax.jit(count_and_add)
    counts = []
    for seed, flags in enumerate(keeps):
        keep = jnp.array([flag == "1" for flag in flags])
        data, rank, margin = segments(5, seed), ranks(5, seed), jnp.arange(5.0) + 10 * seed
        buffer, added = add(buffer, data, rank, keep, margin)
        counts.append(int(added))
        stored += [
            (data.obs["x"][i], data.action[i], rank[i], margin[i]) for i in range(5) if keep[i]
        ]
    assert counts == [3, 4, 3] and int(buffer.size) == CAPACITY and len(traces) == 1
    got = (buffer.segments.next_obs["x"], buffer.segments.action, buffer.rank, buffer.margin)
    for row in range(CAPACITY):
        for leaf, want in zip(got, stored[row], strict=True):
            np.testing.assert_array_equal(leaf[row], want)
    full, added = add(buffer, segments(5), ranks(5), jnp.ones(5, bool), jnp.ones(5))
    assert added == 0
    jax.tree.map(np.testing.assert_array_equal, full, buffer)


def test_rows_without_an_answer_leave_no_trace():
    buffer = buffers.empty(example(), CAPACITY)
    after, added = jax.jit(buffers.add)(buffer, segments(4), ranks(4), jnp.zeros(4, bool))
    assert added == 0
    jax.tree.map(np.testing.assert_array_equal, after, buffer)
    after, added = jax.jit(buffers.add)(
        buffer, segments(4), ranks(4), jnp.array([False, True, False, True])
    )
    np.testing.assert_array_equal(buffers.filled(after), np.arange(CAPACITY) < 2)
    np.testing.assert_array_equal(after.rank[2:], -1)
    np.testing.assert_array_equal(after.segments.action[2:], 0.0)
    np.testing.assert_array_equal(after.margin, 0.0)


def test_seeds_fill_their_own_buffers():
    keep = jnp.array([[True, True, False], [False, False, True]])
    data = jax.tree.map(lambda *x: jnp.stack(x), segments(3, 1), segments(3, 2))
    rank = jnp.stack([ranks(3, 1), ranks(3, 2)])
    start = jax.tree.map(lambda x: jnp.stack([x, x]), buffers.empty(example(), CAPACITY))
    both, added = jax.jit(jax.vmap(buffers.add))(start, data, rank, keep)
    np.testing.assert_array_equal(added, [2, 1])
    np.testing.assert_array_equal(buffers.filled(both).sum(-1), [2, 1])
    for seed in range(2):
        alone, _ = jax.jit(buffers.add)(
            buffers.empty(example(), CAPACITY), segments(3, seed + 1), rank[seed], keep[seed]
        )
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda x, s=seed: x[s], both), alone
        )


def test_the_split_is_fixed_and_has_the_share_asked_for():
    mask = buffers.split_mask(4000, 0.2)
    assert mask.shape == (4000,) and mask.dtype == bool
    # Three standard deviations of a fair draw.
    assert abs(float(mask.mean()) - 0.2) < 3 * (0.2 * 0.8 / 4000) ** 0.5
    np.testing.assert_array_equal(buffers.split_mask(50, 0.2), mask[:50])
    assert not buffers.split_mask(100, 0.0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": jnp.zeros((2, K + 1), jnp.int32)}, "rank: got int32"),
        ({"rank": jnp.zeros((2, K))}, "expected integers"),
        ({"margin": jnp.zeros(3)}, r"margin: got shape \(3,\)"),
        ({"segments": segments(3)}, r"segments.obs\['pixel'\]: got uint8"),
        ({"segments": segments(2)._replace(obs=jnp.zeros((2, K, L, 2)))}, "segments: got"),
        (
            {"segments": segments(2)._replace(action=jnp.zeros((2, K, L, 1), int))},
            "segments.action: got int32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str):
    fine = {"segments": segments(2), "rank": ranks(2), "keep": jnp.ones(2, bool)}
    with pytest.raises(ValueError, match=message):
        buffers.add(buffers.empty(example(), CAPACITY), **{**fine, **change})


def test_a_buffer_without_room_is_refused():
    with pytest.raises(ValueError, match="capacity: got 0"):
        buffers.empty(example(), 0)

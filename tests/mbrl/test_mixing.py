"""Minibatches of recorded and imagined rows: the exact share, and only rows that count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.mixing import mixed, pool

KEY = jax.random.key(0)
# Recorded rows are even, imagined ones are negative.
REAL = pool({"x": 2.0 * jnp.arange(10)}, jnp.arange(10) % 3 == 1)
IMAGINED = pool({"x": -1.0 - jnp.arange(6)}, jnp.array([True, False, False, True, False, False]))


@pytest.mark.parametrize(("ratio", "num", "count"), [(0.05, 40, 2), (0.3, 5, 2), (0.0, 8, 0),
                                                     (1.0, 8, 8)])  # fmt: skip
def test_the_share_of_real_rows_is_exact(ratio, num, count):
    for traced in (False, True):
        draw = jax.jit(lambda key, ratio: mixed(REAL, IMAGINED, key, num, ratio))
        share = jnp.float32(ratio) if traced else ratio
        data, weight = draw(KEY, share) if traced else mixed(REAL, IMAGINED, KEY, num, share)
        assert int((data["x"] >= 0.0).sum()) == count
        assert data["x"].shape == weight.shape == (num,)
        assert (np.asarray(weight) == 1.0).all()


def test_only_marked_rows_are_drawn_and_all_of_them():
    data, _ = mixed(REAL, IMAGINED, KEY, 200, 0.5)
    assert set(np.asarray(data["x"]).tolist()) == {2.0, 8.0, 14.0, -1.0, -4.0}


def test_rows_of_an_empty_source_do_not_count():
    nothing = pool({"x": jnp.ones(6)}, jnp.zeros(6, bool))
    _, weight = mixed(REAL, nothing, KEY, 8, 0.25)
    assert weight.tolist() == [1.0, 1.0] + [0.0] * 6

"""Which queries are chosen: closed forms, greedy search in Python; how many, to the last label."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.preferences.queries import QueryKind, schedule, select

N, M, F = 3, 12, 2
KINDS: list[QueryKind] = ["uniform", "disagreement", "entropy", "k_center"]


def logits(probabilities: Any) -> Any:
    """Scores [N, M, 2] that give P(first better) [N, M]."""
    p = jnp.asarray(probabilities, jnp.float32)
    return jnp.stack([jnp.log(p), jnp.log1p(-p)], -1)


def candidates(seed: int = 0, k: int = 2) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.normal(size=(N, M, k)), jnp.float32)
    return scores, jnp.asarray(rng.normal(size=(M, F)), jnp.float32)


def test_members_that_disagree_and_members_that_do_not_know():
    # Candidate 0: all say 1/2. 1: they contradict each other. 2: all are sure. 3: nearly.
    scores = logits([[0.5, 0.9, 0.99, 0.8], [0.5, 0.1, 0.99, 0.7]])
    features, key = jnp.zeros((4, 1)), jax.random.key(0)
    # Variances 0, 0.16, 0, 0.0025; the mean probabilities are 0.5, 0.5, 0.99, 0.75.
    disagree = np.asarray(select("disagreement", key, scores, features, 2))
    np.testing.assert_array_equal(disagree, [1, 3])
    unsure = np.asarray(select("entropy", key, scores, features, 4))
    assert set(unsure[:2]) == {0, 1} and list(unsure[2:]) == [3, 2]


@pytest.mark.parametrize("k", [2, 4])
def test_uncertainty_is_a_mean_over_pairs(k: int):
    scores, features = candidates(k=k)
    s = np.asarray(scores, np.float64)
    first = [1.0 / (1.0 + np.exp(s[..., j] - s[..., i])) for i in range(k) for j in range(i + 1, k)]
    variance = np.mean([p.var(0) for p in first], 0)
    means = [p.mean(0) for p in first]
    entropy = np.mean([-q * np.log(q) - (1 - q) * np.log(1 - q) for q in means], 0)
    for kind, value in (("disagreement", variance), ("entropy", entropy)):
        got = select(kind, jax.random.key(0), scores, features, M)
        np.testing.assert_array_equal(got, np.argsort(-value))


def test_the_farthest_point_is_next():
    scores, features = candidates()
    points = np.asarray(features, np.float64)
    got = np.asarray(select("k_center", jax.random.key(5), scores, features, 6))
    chosen = [got[0]]
    for row in got[1:]:
        gap = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(1)
        assert row == gap.argmax()
        chosen.append(row)
    # The first one is drawn.
    firsts = {int(select("k_center", jax.random.key(i), scores, features, 1)[0]) for i in range(9)}
    assert len(firsts) > 2


def test_centers_keep_away_from_earlier_queries():
    features = jnp.arange(5.0)[:, None]
    asked, mask = jnp.array([[0.1], [100.0]]), jnp.array([True, False])
    for seed in range(3):
        key = jax.random.key(seed)
        got = select("k_center", key, jnp.zeros((1, 5, 2)), features, 3, asked, mask)
        # 4 is the farthest from 0.1; then 2 (1.9 and 2 away); then 3 or 1.
        assert list(got[:2]) == [4, 2]
    # Without a mask all of them count.
    got = select("k_center", key, jnp.zeros((1, 5, 2)), features, 3, asked[:1])
    assert list(got[:2]) == [4, 2]
    blind = jnp.array([False, False])
    alone = select("k_center", key, jnp.zeros((1, 5, 2)), features, 5, asked, blind)
    np.testing.assert_array_equal(alone, select("k_center", key, jnp.zeros((1, 5, 2)), features, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_different_even_where_candidates_are_alike(kind: QueryKind):
    scores, features = jnp.zeros((N, M, 2)), jnp.ones((M, F))
    got = [np.asarray(select(kind, jax.random.key(i), scores, features, M)) for i in range(3)]
    for rows in got:
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(np.sort(rows), np.arange(M))
    # Nothing favours the first rows.
    assert any((rows != got[0]).any() for rows in got[1:])


def test_uniform_queries_are_uniform():
    scores, features = candidates()
    keys = jax.random.split(jax.random.key(2), 3000)
    rows = jax.vmap(lambda key: select("uniform", key, scores, features, 3))(keys)
    share = np.bincount(np.asarray(rows).ravel(), minlength=M) / 3000
    np.testing.assert_allclose(share, 3 / M, atol=4 * (0.25 * 0.75 / 3000) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_choose_alike_alone_and_together(kind: QueryKind):
    keys = jax.random.split(jax.random.key(1), 3)
    sets = [candidates(seed) for seed in range(3)]
    scores, features = (jnp.stack(x) for x in zip(*sets, strict=True))
    traces = []

    def choose(*args: Any) -> Any:
        traces.append(1)
        return select(kind, *args, 5)

    program = jax.jit(choose)
    alone = [program(*args) for args in zip(keys, scores, features, strict=True)]
    assert len(traces) == 1
    together = jax.vmap(lambda *args: select(kind, *args, 5))(keys, scores, features)
    np.testing.assert_array_equal(together, alone)


def test_too_many_queries_and_unknown_kinds_are_refused():
    scores, features = candidates()
    for num in (0, M + 1):
        with pytest.raises(ValueError, match=f"num: got {num}, expected 1 to {M}"):
            select("uniform", jax.random.key(0), scores, features, num)
    with pytest.raises(ValueError, match="kind: got 'best', expected one of"):
        select("best", jax.random.key(0), scores, features, 2)  # type: ignore[arg-type]


def test_schedules_by_hand():
    np.testing.assert_array_equal(schedule(10, 4, "constant"), [3, 3, 2, 2])
    # Weights 1, 2/3, 1/2 of 13/6: shares 6, 4, 3 of 13.
    np.testing.assert_array_equal(schedule(13, 3), [6, 4, 3])
    # 200 labels as in a documented run: 20 up front, 180 over 5 by 1, 4/5, 2/3, 4/7, 1/2.
    np.testing.assert_array_equal(schedule(200, 6, first=0.1), [20, 51, 41, 34, 29, 25])
    np.testing.assert_array_equal(schedule(100, 2, "constant", first=0.29), [29, 71])
    np.testing.assert_array_equal(schedule(7, 1), [7])
    np.testing.assert_array_equal(schedule(0, 3), [0, 0, 0])


@pytest.mark.parametrize("kind", ["constant", "decaying"])
@pytest.mark.parametrize("first", [0.0, 0.1, 0.73])
def test_no_label_is_lost(kind: Any, first: float):
    for total in (0, 1, 7, 99, 100, 1400):
        for sessions in (2, 3, 10, 31):
            labels = schedule(total, sessions, kind, first)
            assert labels.sum() == total and labels.shape == (sessions,) and (labels >= 0).all()
            assert (np.diff(labels[1:]) <= 1).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 3, "rising"), "kind: got 'rising'"),
        ((10, 3, "constant", 1.0), "first: got 1.0"),
        ((-1, 3), "total: got -1"),
        ((10, 0), "sessions: got 0, expected at least 1"),
        ((10, 1, "constant", 0.1), "sessions: got 1, expected at least 2"),
    ],
)
def test_schedules_without_a_meaning_are_refused(args: Any, message: str):
    with pytest.raises(ValueError, match=message):
        schedule(*args)

"""Running moments against numpy in float64, masks, merging in any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import normalization as norm

FIT = jax.jit(norm.fit, static_argnums=2)
UPDATE = jax.jit(norm.update)
MERGE = jax.jit(norm.merge)


def _rows(seed: int, *shape: int) -> np.ndarray:
    scale = np.array([1e-3, 1.0, 50.0, 2.0])
    shift = np.array([0.0, -3.0, 1e3, 1e4])
    return np.random.default_rng(seed).normal(size=(*shape, 4)) * scale + shift


def _check(got: norm.Moments, rows: np.ndarray, rtol: float = 1e-4) -> None:
    rows = rows.astype(np.float32).astype(np.float64)
    assert got.count == len(rows)
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.var, rows.var(0), rtol=rtol)


def test_fit_is_numpy_in_float64() -> None:
    rows = _rows(0, 300)
    _check(FIT(jnp.asarray(rows, jnp.float32)), rows)
    batch = jnp.asarray(rows.reshape(3, 100, 4), jnp.float32)
    _check(FIT(batch), rows)


def test_masked_rows_do_not_count_even_when_they_are_nan() -> None:
    rows = _rows(1, 60)
    mask = np.random.default_rng(2).random(60) < 0.4
    mask[0] = False
    dirty = np.where(mask[:, None], rows, np.nan).astype(np.float32)
    dirty[0] = np.inf
    _check(FIT(jnp.asarray(dirty), jnp.asarray(mask)), rows[mask])
    shaped = FIT(jnp.asarray(dirty.reshape(6, 10, 4)), jnp.asarray(mask.reshape(6, 10)))
    _check(shaped, rows[mask])


def test_an_empty_mask_gives_empty_moments_that_change_nothing() -> None:
    x = jnp.full((5, 4), jnp.nan)
    nothing = FIT(x, jnp.zeros(5, bool))
    for a, b in zip(nothing, norm.empty((4,)), strict=True):
        np.testing.assert_array_equal(a, b)
    some = FIT(jnp.asarray(_rows(3, 7), jnp.float32))
    for merged in (MERGE(some, nothing), MERGE(nothing, some)):
        for a, b in zip(merged, some, strict=True):
            np.testing.assert_array_equal(a, b)
    y = jnp.arange(4.0)
    np.testing.assert_array_equal(norm.normalize(norm.empty((4,)), y), y)


def test_updates_in_batches_are_the_moments_of_all_rows() -> None:
    rows = _rows(4, 500)
    moments = norm.empty((4,))
    for part in np.split(rows, 25):
        moments = UPDATE(moments, jnp.asarray(part, jnp.float32))
    _check(moments, rows, rtol=2e-3)


def test_row_by_row_is_welford() -> None:
    rows = _rows(5, 64)

    def step(moments: norm.Moments, row: jax.Array) -> tuple[norm.Moments, None]:
        return norm.update(moments, row[None]), None

    start = norm.empty((4,))
    moments, _ = jax.lax.scan(step, start, jnp.asarray(rows, jnp.float32))
    _check(moments, rows, rtol=2e-3)


def test_merge_is_commutative_and_associative() -> None:
    parts = [FIT(jnp.asarray(_rows(6 + n, n), jnp.float32)) for n in (3, 40, 11)]
    a, b, c = parts
    left, right, swapped = MERGE(MERGE(a, b), c), MERGE(a, MERGE(b, c)), MERGE(MERGE(c, b), a)
    for other in (right, swapped):
        for x, y in zip(left, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5)
    rows = np.concatenate([_rows(6 + n, n) for n in (3, 40, 11)])
    _check(left, rows, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 + 0.3, -7e7])
def test_a_constant_dimension_has_scale_one_and_normalizes_to_zero(value: float) -> None:
    x = jnp.stack([jnp.full(77, value), jnp.arange(77.0)], -1)
    moments = UPDATE(FIT(x[:50]), x[50:])
    assert moments.std[0] == 1.0
    np.testing.assert_array_equal(norm.normalize(moments, x)[:, 0], 0.0)
    np.testing.assert_allclose(moments.std[1], np.arange(77).std(), rtol=1e-5)


def test_normalize_standardizes_and_denormalize_inverts() -> None:
    x = jnp.asarray(_rows(9, 200), jnp.float32)
    moments = FIT(x)
    z = norm.normalize(moments, x)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(z.std(0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(norm.denormalize(moments, z), x, rtol=1e-5, atol=1e-5)


def test_scalars_and_matrices_as_features() -> None:
    x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    scalars = FIT(x, None, 0)
    assert scalars.mean == 3.0
    assert scalars.var == 3.5
    assert scalars.count == 4
    matrix = FIT(x[None], None, 2)
    np.testing.assert_array_equal(matrix.mean, x)
    masked = UPDATE(norm.empty(()), x, jnp.array([[True, False], [True, False]]))
    assert masked.mean == 2.0
    assert masked.var == 1.0


def test_integers_are_averaged_as_numbers() -> None:
    moments = FIT(jnp.array([[250], [255]], jnp.uint8))
    assert moments.mean[0] == 252.5
    assert moments.var[0] == 6.25


def test_half_precision_rows_are_averaged_in_float32() -> None:
    # Their sum needs more than the 8 bits of a bfloat16.
    rows = jnp.concatenate([jnp.full(743, 1.0), jnp.full(257, 2.0)]).astype(jnp.bfloat16)
    moments = FIT(rows[:, None])
    assert moments.mean.dtype == jnp.float32
    np.testing.assert_allclose(moments.mean, 1.257, rtol=1e-6)


def test_fit_names_a_mask_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"mask: got shape \(4,\), expected \(5,\)"):
        norm.fit(jnp.zeros((5, 4)), jnp.ones(4, bool))


def test_return_scale_is_an_average_of_percentiles_with_a_floor() -> None:
    scale = norm.empty_return_scale()
    assert scale.value == 1.0
    returns = jnp.arange(101.0).reshape(1, 101) * 10
    step = jax.jit(norm.update_return_scale)
    scale = step(scale, returns)  # percentiles 50 and 950
    np.testing.assert_allclose(scale, [0.5, 9.5], rtol=1e-5)
    np.testing.assert_allclose(scale.value, 9.0, rtol=1e-5)
    scale = step(scale, returns)
    np.testing.assert_allclose(scale, [0.5 * 1.99, 9.5 * 1.99], rtol=1e-5)
    assert step(norm.empty_return_scale(), returns / 1000).value == 1.0


def test_rows_without_entries_have_moments_too():
    # An agent that sees images alone still keeps the moments of its empty vector.
    empty = norm.fit(jnp.zeros((5, 0)))
    assert empty.mean.shape == empty.var.shape == (0,)
    assert empty.count == 5

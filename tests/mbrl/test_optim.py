"""Optimizer parts: members stay independent, bad gradients leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import optim
from mbrl.networks import core


def _grads() -> dict:
    # Norms of the members: 5 (3-4-0), 0, 13 (0-5-12).
    return {
        "kernel": jnp.array([[[3.0, 0.0]], [[0.0, 0.0]], [[0.0, 5.0]]]),
        "bias": jnp.array([[4.0], [0.0], [12.0]]),
    }


def test_clip_by_member_norm_by_hand() -> None:
    clip: Any = optim.clip_by_member_norm(6.5)
    out, _ = jax.jit(clip.update)(_grads(), clip.init(_grads()))
    np.testing.assert_array_equal(out["kernel"][0], [[3.0, 0.0]])  # below: untouched
    np.testing.assert_array_equal(out["bias"][1], [0.0])  # zero: no NaN
    np.testing.assert_allclose(out["kernel"][2], [[0.0, 2.5]])
    np.testing.assert_allclose(out["bias"], [[4.0], [0.0], [6.0]])


def test_one_member_with_a_huge_or_bad_gradient_does_not_touch_the_others() -> None:
    clip: Any = optim.clip_by_member_norm(1.0)
    calm, _ = clip.update(_grads(), clip.init(None))
    for value in (1e9, jnp.nan):
        grads = jax.tree.map(lambda g, value=value: g.at[2].set(value), _grads())
        wild, _ = clip.update(grads, clip.init(None))
        for name in grads:
            np.testing.assert_array_equal(wild[name][:2], calm[name][:2])


def test_clip_agrees_with_optax_on_every_member_alone() -> None:
    grads = {"a": jax.random.normal(jax.random.key(0), (4, 3, 5)), "b": jnp.ones((4, 2))}
    grads = jax.tree.map(lambda g: g * jnp.arange(4.0).reshape(4, *[1] * (g.ndim - 1)), grads)
    one: Any = optax.clip_by_global_norm(2.0)
    all_: Any = optim.clip_by_member_norm(2.0)
    expected = jax.vmap(lambda g: one.update(g, one.init(None))[0])(grads)
    got, _ = all_.update(grads, all_.init(None))
    for name in grads:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


def test_clip_refuses_leaves_without_a_member_axis() -> None:
    clip: Any = optim.clip_by_member_norm(1.0)
    with pytest.raises(ValueError, match="members"):
        clip.update({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}, clip.init(None))
    with pytest.raises(ValueError, match="members"):
        clip.update({"a": jnp.ones(())}, clip.init(None))


PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}


def _step(optimizer: Any, poison: float) -> Iterator[tuple[Any, Any]]:
    params: Any = PARAMS
    state = optimizer.init(PARAMS)
    step = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    for scale in (1.0, poison, poison, -0.3):
        grads = jax.tree.map(lambda p, scale=scale: p * scale, params)
        grads["b"] = jnp.float32(0.1)  # only one leaf is bad
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 1e30])
def test_bad_gradients_are_skipped_without_a_trace_and_counted(poison: float) -> None:
    # 1e30 is finite but its square is not: Adam's second moment would stay infinite.
    optimizer: Any = optim.apply_if_finite_counted(optax.adamw(1e-2))
    first, second, third, last = _step(optimizer, poison)
    assert [int(s.skipped) for _, s in (first, second, third, last)] == [0, 1, 2, 2]
    assert [int(s.consecutive) for _, s in (first, second, third, last)] == [0, 1, 2, 0]
    for a, b in zip(jax.tree.leaves(third[0]), jax.tree.leaves(first[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(third[1].inner), jax.tree.leaves(first[1].inner), strict=True):
        np.testing.assert_array_equal(a, b)
    # The last step is the second step of plain Adam: as if the bad ones never were.
    plain: Any = optax.adamw(1e-2)
    _, state = plain.update({"w": PARAMS["w"], "b": jnp.float32(0.1)}, plain.init(PARAMS), PARAMS)
    grads = {"w": -0.3 * first[0]["w"], "b": jnp.float32(0.1)}
    updates, _ = plain.update(grads, state, first[0])
    expected: Any = optax.apply_updates(first[0], updates)
    np.testing.assert_allclose(last[0]["w"], expected["w"], rtol=1e-6)
    assert np.all(last[0]["w"] != first[0]["w"])


def test_it_never_gives_up() -> None:
    optimizer: Any = optim.apply_if_finite_counted(optax.sgd(1.0))
    state = optimizer.init(PARAMS)

    def step(state: optim.FiniteState, _: None) -> tuple[optim.FiniteState, jax.Array]:
        bad = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
        updates, state = optimizer.update(bad, state, PARAMS)
        return state, updates["w"]

    state, updates = jax.lax.scan(step, state, None, 50)
    assert state.consecutive == 50
    np.testing.assert_array_equal(updates, 0.0)


def test_skipping_is_per_seed_under_vmap() -> None:
    optimizer: Any = optim.apply_if_finite_counted(optax.adam(1e-2))
    grads = jnp.array([[1.0, 1.0], [1.0, jnp.nan]])
    state = jax.vmap(optimizer.init)(jnp.ones((2, 2)))
    updates, state = jax.vmap(optimizer.update)(grads, state)
    np.testing.assert_array_equal(state.skipped, [0, 1])
    assert np.all(updates[0] != 0)
    np.testing.assert_array_equal(updates[1], 0.0)


def test_adaptive_clip_by_hand() -> None:
    # Norms of the parameters: 5, 0 (counts as 0.001) and 2; a tenth of them is allowed.
    params = {"a": jnp.array([[3.0], [4.0]]), "b": jnp.zeros(2), "c": jnp.array(-2.0)}
    grads = {
        "a": jnp.array([[0.0], [2.0]]),
        "b": jnp.array([3e-4, 4e-4]),
        "c": jnp.array(-0.1),
    }
    clip: Any = optim.adaptive_gradient_clip(0.1, min_norm=1e-3)
    out, _ = jax.jit(clip.update)(grads, clip.init(params), params)
    np.testing.assert_allclose(out["a"], [[0.0], [0.5]], rtol=1e-6)
    np.testing.assert_allclose(out["b"], [6e-5, 8e-5], rtol=1e-6)
    np.testing.assert_array_equal(out["c"], grads["c"])


def test_adaptive_clip_has_one_norm_per_tensor_and_leaves_small_gradients_alone() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (3, 4, 5)), "b": jax.random.normal(keys[1], (7,))}
    grads = {"a": jax.random.normal(keys[2], (3, 4, 5)), "b": jax.random.normal(keys[3], (7,))}
    clip: Any = optim.adaptive_gradient_clip(0.3)
    small = jax.tree.map(lambda g: 0.01 * g, grads)
    untouched, _ = jax.jit(clip.update)(small, clip.init(params), params)
    clipped, _ = jax.jit(clip.update)(grads, clip.init(params), params)
    for name in grads:
        np.testing.assert_array_equal(untouched[name], small[name])
        limit = 0.3 * np.linalg.norm(np.ravel(params[name]))
        np.testing.assert_allclose(np.linalg.norm(np.ravel(clipped[name])), limit, rtol=1e-5)
        ratio = np.ravel(clipped[name] / grads[name])
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)  # the direction is kept
    zeros = jax.tree.map(jnp.zeros_like, params)
    still, _ = clip.update(zeros, clip.init(params), zeros)
    jax.tree.map(np.testing.assert_array_equal, still, zeros)


def test_adaptive_clip_keeps_the_dtype_and_measures_in_float32() -> None:
    params, grads = jnp.ones(400, jnp.bfloat16), jnp.full(400, 2.0, jnp.bfloat16)
    clip: Any = optim.adaptive_gradient_clip(0.5)
    out, _ = clip.update(grads, clip.init(params), params)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 0.5)


def test_adaptive_clip_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="clip: expected a number above 0, got 0"):
        optim.adaptive_gradient_clip(0.0)
    with pytest.raises(ValueError, match="min_norm: expected a number above 0, got -1"):
        optim.adaptive_gradient_clip(0.3, -1.0)
    clip: Any = optim.adaptive_gradient_clip()
    with pytest.raises(ValueError, match="params: .* and got None; call update"):
        clip.update(PARAMS, clip.init(PARAMS))


def _laprop_in_float64(
    grads: np.ndarray, lr: float, beta1: float, beta2: float, eps: float, warmup: int
) -> np.ndarray:
    """LaProp of one weight, line by line; `grads` [T]."""
    nu = mu = 0.0
    updates = []
    for n, g in enumerate(grads.astype(np.float64), start=1):
        nu = beta2 * nu + (1 - beta2) * g * g
        mu = beta1 * mu + (1 - beta1) * (g / (np.sqrt(nu / (1 - beta2**n)) + eps) if g else 0.0)
        rate = lr * min(1.0, n / warmup) if warmup else lr
        updates.append(-rate * mu / (1 - beta1**n))
    return np.array(updates)


def _gradients() -> jax.Array:
    """Twenty gradients of two weights over ten orders of magnitude, zeros among them."""
    scale = 10.0 ** jax.random.uniform(jax.random.key(1), (20, 2), minval=-6.0, maxval=4.0)
    grads = scale * jax.random.normal(jax.random.key(2), (20, 2))
    return grads.at[jnp.array([0, 7])].set(0.0).at[3:6, 1].set(0.0)


def _updates(optimizer: Any, grads: jax.Array, params: jax.Array) -> jax.Array:
    """Give `grads` [T, ...] one after another; returns the updates."""

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        updates, state = optimizer.update(g, state, params)
        return state, updates

    return jax.lax.scan(step, optimizer.init(params), grads)[1]


@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_laprop_agrees_with_its_formula_in_float64(warmup: int) -> None:
    settings: Any = (0.02, 0.8, 0.99, 1e-4, warmup)
    grads = _gradients()
    got = jax.jit(lambda g: _updates(optim.laprop(*settings), g, jnp.ones(2)))(grads)
    for i in range(2):
        expected = _laprop_in_float64(np.asarray(grads[:, i]), *settings)
        np.testing.assert_allclose(got[:, i], expected, rtol=2e-5, atol=1e-9)


def test_laprop_with_its_defaults() -> None:
    grads = _gradients()
    got = _updates(optim.laprop(4e-5), grads, jnp.ones(2))
    expected = _laprop_in_float64(np.asarray(grads[:, 0]), 4e-5, 0.9, 0.999, 1e-20, 0)
    np.testing.assert_allclose(got[:, 0], expected, rtol=2e-4)
    # Steps of a constant gradient have the length of the learning rate, from the first.
    constant = _updates(optim.laprop(0.1), jnp.full((20, 1), -1e-3), jnp.ones(1))
    np.testing.assert_allclose(constant, 0.1, rtol=1e-4)


def test_laprop_is_not_adam() -> None:
    # After a huge gradient Adam still divides the small steps before it; LaProp keeps them.
    grads = jnp.array([[1.0], [1.0], [1e6]])
    adam = _updates(optax.adam(1.0, 0.9, 0.9, 1e-20), grads, jnp.ones(1))
    ours = _updates(optim.laprop(1.0, 0.9, 0.9), grads, jnp.ones(1))
    np.testing.assert_allclose(ours[:2], adam[:2], rtol=1e-5)
    scaled = np.array([1.0, 1.0, 1.0 / np.sqrt(0.1 / (1 - 0.9**3))])
    mean = np.sum(scaled * [0.081, 0.09, 0.1]) / (1 - 0.9**3)
    np.testing.assert_allclose(ours[2], -mean, rtol=1e-5)
    assert ours[2] < adam[2] - 0.3


def test_laprop_zero_gradients_give_exactly_zero_and_tiny_ones_stay_bounded() -> None:
    zeros = _updates(optim.laprop(1.0, warmup=3), jnp.zeros((20, 3)), jnp.ones(3))
    np.testing.assert_array_equal(zeros, 0.0)
    # The square of these is 0 in float32: nothing but eps is left to divide by.
    tiny = jnp.full((5, 4), 1.0) * jnp.array([1e-17, -1e-18, 1e-19, 1e-30])
    out = np.abs(_updates(optim.laprop(1.0), tiny, jnp.ones(4)))
    assert np.isfinite(out).all()
    assert out.max() < 32.0


def test_laprop_takes_a_traced_learning_rate_under_vmap() -> None:
    rates, grads = jnp.array([0.1, 0.01]), _gradients()[:, :1]
    got = jax.jit(jax.vmap(lambda lr: _updates(optim.laprop(lr, warmup=4), grads, jnp.ones(1))))(
        rates
    )
    for rate, updates in zip((0.1, 0.01), got, strict=True):
        alone = _updates(optim.laprop(rate, warmup=4), grads, jnp.ones(1))
        np.testing.assert_allclose(updates, alone, rtol=1e-5)
    with pytest.raises(ValueError, match="warmup: expected a number of updates of at least 0"):
        optim.laprop(0.1, warmup=-1)


def test_clipping_bounds_gradients_before_laprop_and_steps_behind_it() -> None:
    params, grads = jnp.array([1.0, 0.0]), jnp.full((20, 2), 1e-2).at[10].set(1e5)
    clip, rate = optim.adaptive_gradient_clip(0.1), 0.5
    before = _updates(optax.chain(clip, optim.laprop(rate)), grads, params)
    behind = _updates(optax.chain(optim.laprop(rate), clip), grads, params)
    # Before: the outlier counts as a gradient of norm 0.1, and steps keep their length.
    limited = grads.at[10].set(0.1 / np.sqrt(2.0))
    np.testing.assert_allclose(before, _updates(optim.laprop(rate), limited, params), rtol=1e-4)
    assert np.linalg.norm(before, axis=1).min() > 0.1
    # Behind: no step is longer than a tenth of the weights, whatever the gradients were.
    assert np.linalg.norm(behind, axis=1).max() < 0.1 + 1e-6


def test_laprop_with_clipping_skips_bad_gradients_per_seed() -> None:
    optimizer: Any = optim.apply_if_finite_counted(
        optax.chain(optim.adaptive_gradient_clip(), optim.laprop(1e-2, warmup=5))
    )
    params = jnp.ones((2, 3))
    state = jax.vmap(optimizer.init)(params)
    update = jax.jit(jax.vmap(optimizer.update))
    first, state = update(jnp.ones((2, 3)), state, params)
    bad, after = update(jnp.ones((2, 3)).at[1, 1].set(jnp.nan), state, params)
    np.testing.assert_array_equal(after.skipped, [0, 1])
    np.testing.assert_array_equal(bad[1], 0.0)
    for new, old in zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
    # The warm-up of the seed that was skipped has not moved on.
    again, _ = update(jnp.ones((2, 3)), after, params)
    np.testing.assert_allclose(first, -0.002, rtol=1e-4)
    np.testing.assert_allclose(again, -jnp.array([[0.006], [0.004]]) * jnp.ones(3), rtol=1e-4)


def test_polyak_by_hand_and_its_ends_are_exact() -> None:
    target, online = {"a": jnp.array([1.0, 1e8])}, {"a": jnp.array([3.0, 0.1])}
    np.testing.assert_allclose(optim.polyak(target, online, 0.25)["a"][0], 1.5)
    np.testing.assert_array_equal(optim.polyak(target, online, 0.0)["a"], target["a"])
    np.testing.assert_array_equal(optim.polyak(target, online, 1.0)["a"], online["a"])


class _Weights(NamedTuple):
    net: dict
    logvar_low: jax.Array


def test_weight_decay_spares_biases_norms_and_log_variance_bounds() -> None:
    net = core.mlp((4,), 2, norm="layer")
    params = _Weights(net.init(jax.random.key(0), jnp.ones((1, 3))), jnp.full(2, -10.0))
    mask = optim.decay_mask(params)
    decayed = {
        jax.tree_util.keystr(path)
        for path, keep in jax.tree_util.tree_leaves_with_path(mask)
        if keep
    }
    assert decayed == {".net['Dense_0']['kernel']", ".net['Dense_1']['kernel']"}
    optimizer: Any = optax.adamw(0.1, weight_decay=0.5, mask=optim.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(updates.logvar_low, 0.0)
    np.testing.assert_array_equal(updates.net["LayerNorm_0"]["scale"], 0.0)
    np.testing.assert_allclose(
        updates.net["Dense_0"]["kernel"], -0.05 * params.net["Dense_0"]["kernel"], rtol=1e-5
    )


def test_weight_decay_knows_haiku_names_and_own_words() -> None:
    params = {"linear": {"w": jnp.ones(1), "b": jnp.ones(1)}, "embed": {"w": jnp.ones(1)}}
    expected = {"linear": {"w": True, "b": False}, "embed": {"w": True}}
    assert optim.decay_mask(params) == expected
    only = optim.decay_mask(params, exclude=["embed"])
    assert only == {"linear": {"w": True, "b": True}, "embed": {"w": False}}

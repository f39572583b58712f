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

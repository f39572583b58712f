"""The block-diagonal gated unit against loops over its blocks, and its initial weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mbrl.networks.recurrent import BlockDense, BlockGRU, block_product
from tests.mbrl import plain

KEY = jax.random.key(0)


def _shapes(cell: BlockGRU, latent: int, action: int) -> Any:
    inputs = jnp.zeros((1, cell.size)), jnp.zeros((1, latent)), jnp.zeros((1, action))
    init = nn.init(lambda m, h, z, a: m(h, z, m.drive(a)), cell)
    return jax.eval_shape(init, KEY, *inputs)["params"]


def _step(cell: BlockGRU) -> Any:
    def step(params: Any, h: Any, z: Any, a: Any) -> Any:
        drive = cell.apply({"params": params}, a, method="drive")
        return cell.apply({"params": params}, h, z, drive)

    return step


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_cell_is_the_published_one(blocks: int) -> None:
    cell, rng = BlockGRU(8, 6, blocks), np.random.default_rng(blocks)
    params = plain.random_weights(_shapes(cell, 5, 3), seed=blocks, gain=2.0)
    h, step = rng.normal(size=(3, 8)), jax.jit(_step(cell))
    got, expected = jnp.asarray(h, jnp.float32), h
    for _ in range(4):
        z, a = rng.normal(size=(3, 5)), 2.0 * rng.normal(size=(3, 3))
        got = step(params, got, jnp.asarray(z, jnp.float32), jnp.asarray(a, jnp.float32))
        expected = plain.gru(plain.as_float64(params), expected, z, a)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
    assert np.abs(expected - h).max() > 0.3


def test_what_actions_contribute_may_be_computed_for_a_whole_sequence() -> None:
    cell = BlockGRU(8, 6, 2)
    params = {"params": plain.random_weights(_shapes(cell, 5, 3), seed=1)}
    actions = np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)
    drive = jax.jit(lambda a: cell.apply(params, a, method="drive"))
    whole, single = drive(actions), drive(actions[:, 5])
    np.testing.assert_allclose(whole[:, 5], single, rtol=1e-6, atol=1e-6)


def test_huge_actions_count_as_one_and_keep_their_gradient() -> None:
    cell = BlockGRU(8, 6, 2)
    params = {"params": plain.random_weights(_shapes(cell, 5, 1), seed=1)}

    def contribution(a: Any) -> Any:
        return jnp.sum(cell.apply(params, a[None], method="drive"))  # pyright: ignore

    at = jax.jit(jax.value_and_grad(contribution))
    (one, slope), (ten, flat) = at(jnp.ones(1)), at(jnp.full(1, 10.0))
    np.testing.assert_allclose(one, ten, rtol=1e-6)
    np.testing.assert_allclose(flat, slope / 10.0, rtol=1e-5)
    assert abs(float(slope[0])) > 1e-3


def test_the_cell_remembers_at_first() -> None:
    cell = BlockGRU(8, 6, 2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), _shapes(cell, 5, 3))
    h = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(2, 8)
    kept = jax.jit(_step(cell))(params, h, np.ones((2, 5)), np.ones((2, 3)))
    np.testing.assert_allclose(kept, (1.0 - plain.sigmoid(-1.0)) * h, rtol=1e-5)


def test_the_cell_remembers_for_the_span_asked_for() -> None:
    cell = BlockGRU(1024, 8, 2, span=64)
    init = nn.init(lambda m, h, z, a: m(h, z, m.drive(a)), cell)
    inputs = jnp.zeros((1, 1024)), jnp.zeros((1, 5)), jnp.zeros((1, 3))
    params = jax.jit(init)(KEY, *inputs)["params"]
    assert not np.any(params["gates_bias"][:2]), "reset and candidate begin as published"
    # All but the biases zero: a candidate of 0, and gates that are the biases alone.
    bare = jax.tree.map(jnp.zeros_like, params) | {"gates_bias": params["gates_bias"]}
    h = np.ones((2, 1024), np.float32)
    kept = np.asarray(jax.jit(_step(cell))(bare, h, np.ones((2, 5)), np.ones((2, 3))))
    # A unit that keeps T / (1 + T) of itself remembers for T steps, T uniform from 1 to 64.
    steps = kept / (1.0 - kept)
    assert steps.min() >= 0.99 and steps.max() <= 64.1
    np.testing.assert_allclose(np.quantile(steps[0], [0.25, 0.5, 0.75]), [17, 33, 48], atol=4)


# The product has one form for few rows and another one for many.
@pytest.mark.parametrize("rows", [1, 7, 3000])
@pytest.mark.parametrize("parts", [1, 3])
def test_block_products_are_dense_products_with_a_block_diagonal_matrix(
    rows: int, parts: int
) -> None:
    groups, inner, outer = 4, 3, 5
    rng = np.random.default_rng(rows)
    x, kernel = (
        rng.normal(size=(rows, groups * inner)),
        rng.normal(size=(groups, inner, parts, outer)),
    )
    matrix = np.zeros((parts, groups * inner, groups * outer))
    for g in range(groups):
        columns = slice(g * outer, (g + 1) * outer)
        matrix[:, g * inner : (g + 1) * inner, columns] = kernel[g].swapaxes(0, 1)
    flat = jnp.asarray(kernel.reshape(groups, inner, -1), jnp.float32)

    @jax.jit
    def product(x: Any, kernel: Any) -> Any:
        return jnp.stack(block_product(x, kernel, parts=parts))

    got, pull = jax.vjp(product, jnp.asarray(x, jnp.float32), flat)
    np.testing.assert_allclose(got, x @ matrix, rtol=1e-4, atol=1e-4)
    g = rng.normal(size=got.shape)
    to_x, to_kernel = pull(jnp.asarray(g, jnp.float32))
    expected = np.einsum("pbo,pio->bi", g, matrix)
    np.testing.assert_allclose(to_x, expected, rtol=1e-4, atol=1e-4)
    slope = np.einsum("bi,pbo->ipo", x, g)
    own = [
        slope[k * inner : (k + 1) * inner, :, k * outer : (k + 1) * outer] for k in range(groups)
    ]
    np.testing.assert_allclose(
        to_kernel, np.stack(own).reshape(groups, inner, -1), rtol=1e-3, atol=2e-3
    )


def test_low_precision_is_near_and_comes_back_as_float32() -> None:
    rng = np.random.default_rng(0)
    kernel = np.asarray(rng.normal(size=(4, 8, 6)) / 3, np.float32)
    product = jax.jit(block_product, static_argnums=2)
    for rows in (2, 2000):
        x = np.asarray(rng.normal(size=(rows, 32)), np.float32)
        high, low = product(x, kernel)[0], product(x, kernel, "bfloat16")[0]
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, atol=0.05)
        assert not np.allclose(low, high, atol=1e-5)


def _std(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_kernels_begin_at_the_scale_of_the_whole_layer() -> None:
    size, hidden, blocks, latent, action = 256, 64, 8, 40, 50
    cell = BlockGRU(size, hidden, blocks)
    inputs = jnp.zeros((1, size)), jnp.zeros((1, latent)), jnp.zeros((1, action))
    init = nn.init(lambda m, h, z, a: m(h, z, m.drive(a)), cell)
    params = jax.jit(init)(jax.random.key(1, impl="rbg"), *inputs)["params"]
    # A block sees its slice of the state and three inputs; the published layer counts all
    # the inputs of all its blocks.
    fan_in = size + blocks * 3 * hidden
    expected = {
        "recurrent": fan_in, "shared": fan_in, "gates": size,
        "state_in": size, "latent_in": latent, "action_in": action,
    }  # fmt: skip
    for name, number in expected.items():
        found = params[name]
        kernel = found["Dense_0"]["kernel"] if name.endswith("in") else found
        std = number**-0.5
        assert abs(_std(kernel) / std - 1.0) < 0.05, name
        # Cut at two standard deviations of what was cut: 2 / 0.88 of its own.
        assert 2.1 * std < np.abs(kernel).max() < 2.28 * std, name
    assert not np.any(params["bias"]) and not np.any(params["gates_bias"])
    assert np.all(params["norm"]["scale"] == 1.0)


def test_a_block_layer_begins_at_the_scale_of_all_its_inputs() -> None:
    init = jax.jit(BlockDense(96, 8).init)
    params = init(jax.random.key(2, impl="rbg"), jnp.zeros((1, 512)))["params"]
    assert params["kernel"].shape == (8, 64, 12)
    assert abs(_std(params["kernel"]) * 512**0.5 - 1.0) < 0.05
    assert not np.any(params["bias"])

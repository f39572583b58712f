"""Networks: closed forms, initializers, ensembles and adapters."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from mbrl.networks import core

KEY = jax.random.key(0)


def _jit(net: core.Network) -> core.Network:
    return core.Network(jax.jit(net.init), jax.jit(net.apply))


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_silu_is_x_times_sigmoid() -> None:
    x = np.linspace(-30.0, 30.0, 601)
    expected = x / (1.0 + np.exp(-x))
    np.testing.assert_allclose(core.silu(jnp.asarray(x, jnp.float32)), expected, atol=2e-6)
    assert core.silu(jnp.float32(0.0)) == 0.0
    assert jax.grad(core.silu)(0.0) == 0.5


def test_mlp_is_the_composition_of_affine_maps_and_activations() -> None:
    net = _jit(core.mlp((5, 7), 3))
    x = _normal(1, 4, 2)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        net.init(KEY, x),
    )
    h = np.asarray(x, np.float64)
    for name, last in (("Dense_0", False), ("Dense_1", False), ("Dense_2", True)):
        h = h @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        h = h if last else h / (1 + np.exp(-h))
    np.testing.assert_allclose(net.apply(params, x), h, rtol=1e-5, atol=1e-6)


def test_mlp_without_hidden_layers_is_linear_and_params_are_plain_dicts() -> None:
    net = _jit(core.mlp((), 3))
    params = net.init(KEY, jnp.zeros((1, 2)))
    assert type(params) is dict
    assert type(params["Dense_0"]) is dict
    assert core.num_params(params) == 2 * 3 + 3
    x = _normal(2, 6, 2)
    np.testing.assert_allclose(
        net.apply(params, 2 * x), 2 * net.apply(params, x), rtol=1e-5, atol=1e-6
    )


def test_num_params_of_the_pets_network() -> None:
    # 4 layers of 200 on 5 inputs: 5*200+200 + 3*(200*200+200) + 200*8+8
    shapes = jax.eval_shape(core.mlp((200,) * 4, 8).init, KEY, jnp.zeros((1, 5)))
    assert core.num_params(shapes) == 1200 + 3 * 40200 + 1608


def test_pets_initializer_is_cut_at_two_sigmas_and_has_their_standard_deviation() -> None:
    params = _jit(core.mlp((400,), 1)).init(KEY, jnp.zeros((1, 400)))
    kernel = np.asarray(params["Dense_0"]["kernel"])
    sigma = 0.5 / np.sqrt(400)
    assert np.abs(kernel).max() <= 2 * sigma
    # A standard normal cut at +-2 has standard deviation 0.8796.
    np.testing.assert_allclose(kernel.std(), 0.8796 * sigma, rtol=0.01)
    assert not np.any(params["Dense_0"]["bias"])
    # The output layer, 400 -> 1, has the same fan-in.
    np.testing.assert_allclose(np.std(params["Dense_1"]["kernel"]), 0.8796 * sigma, rtol=0.1)


def test_fan_in_and_orthogonal_initializers() -> None:
    x = jnp.zeros((1, 300))
    kernel = core.mlp((300,), 1, init="fan_in").init(KEY, x)["Dense_0"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), 300**-0.5, rtol=0.01)
    kernel = core.mlp((8,), 1, init="orthogonal").init(KEY, x[:, :8])["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(8), atol=1e-5)


def test_out_scale_zero_makes_a_zero_head_that_still_learns() -> None:
    net = _jit(core.mlp((8,), 2, out_scale=0.0))
    x = _normal(3, 5, 4)
    params = net.init(KEY, x)
    assert not np.any(net.apply(params, x))
    grads = jax.grad(lambda p: net.apply(p, x).sum())(params)
    assert np.all(np.abs(grads["Dense_1"]["kernel"]) > 0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_makes_the_output_blind_to_the_scale_of_the_first_layer(norm: str) -> None:
    net = _jit(core.mlp((16,), 2, norm=norm))
    x = 10 * _normal(4, 5, 4)
    params = net.init(KEY, x)
    scaled = params | {"Dense_0": jax.tree.map(lambda k: 7 * k, params["Dense_0"])}
    np.testing.assert_allclose(net.apply(scaled, x), net.apply(params, x), atol=1e-4)


def test_bfloat16_rounds_the_inputs_and_accumulates_in_float32() -> None:
    net = _jit(core.mlp((), 1, dtype="bfloat16"))
    ones = jnp.ones((1, 512))
    params = {"Dense_0": {"kernel": jnp.ones((512, 1)), "bias": jnp.zeros(1)}}
    # 1 + 2^-9 is not a bfloat16 number: it rounds to 1. 511 is not one either (8 bits of
    # mantissa), so a bfloat16 result would be 512.
    assert net.apply(params, ones * (1 + 2**-9)) == 512.0
    assert net.apply(params, ones.at[0, 0].set(0.0)) == 511.0
    assert net.apply(params, ones).dtype == jnp.float32


def test_bfloat16_stays_close_in_value_and_gradient() -> None:
    x = _normal(5, 32, 6)
    low, full = (_jit(core.mlp((32, 32), 3, dtype=d)) for d in ("bfloat16", "float32"))
    params = low.init(KEY, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    loss = [lambda p, net=net: jnp.mean((net.apply(p, x) - 1.0) ** 2) for net in (low, full)]
    flat = [ravel_pytree(jax.grad(f)(params))[0] for f in loss]
    cosine = flat[0] @ flat[1] / (jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1]))
    assert cosine > 0.999
    np.testing.assert_allclose(jnp.linalg.norm(flat[0]), jnp.linalg.norm(flat[1]), rtol=0.02)
    assert not np.array_equal(flat[0], flat[1])


def test_bfloat16_multiplies_in_bfloat16_on_the_way_back_too() -> None:
    net = core.mlp((8, 8), 3, dtype="bfloat16")
    x = _normal(11, 2, 5, 4)
    params = net.init(KEY, x)
    hlo = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, x)).sum())).lower(params).as_text()
    products = [line for line in hlo.splitlines() if "dot_general" in line]
    assert len(products) == 3 + 3 + 2  # forward, kernels, inputs but the first
    for line in products:
        operands, result = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2
        assert "xf32>" in result


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation": "swoosh"},
        {"init": "zeros"},
        {"dtype": "float16"},
        {"norm": "batch"},
        {"hidden": (0,)},
        {"out": 0},
    ],
)
def test_mlp_names_the_bad_argument(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        core.mlp(**({"hidden": (4,), "out": 1} | arguments))


def test_every_random_leaf_of_an_ensemble_differs_between_members() -> None:
    net = _jit(core.ensemble(core.mlp((8, 8), 2), 5))
    params = net.init(KEY, jnp.zeros((5, 1, 3)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        assert leaf.shape[0] == 5
        if "bias" in jax.tree_util.keystr(path):
            assert not np.any(leaf)
            continue
        for i in range(5):
            for j in range(i):
                assert np.all(leaf[i] != leaf[j]), f"members {i}, {j} share {path}"


def test_an_ensemble_is_its_members_side_by_side() -> None:
    member = core.mlp((8,), 2)
    net = _jit(core.ensemble(member, 3))
    x = _normal(6, 3, 4, 5)
    params = net.init(KEY, x)
    y = net.apply(params, x)
    assert y.shape == (3, 4, 2)
    for n in range(3):
        alone = jax.tree.map(lambda leaf, n=n: leaf[n], params)
        np.testing.assert_allclose(y[n], member.apply(alone, x[n]), rtol=1e-5, atol=1e-6)


def test_a_member_gets_no_gradient_from_the_rows_of_another() -> None:
    net = _jit(core.ensemble(core.mlp((8,), 2), 3))
    x = _normal(7, 3, 4, 5)
    grads = jax.grad(lambda p: net.apply(p, x)[1].sum())(net.init(KEY, x))
    for leaf in jax.tree.leaves(jax.device_get(grads)):
        assert np.any(leaf[1])
        assert not np.any(leaf[0])
        assert not np.any(leaf[2])


def test_ensemble_refuses_inputs_without_a_member_axis() -> None:
    net = _jit(core.ensemble(core.mlp((8,), 2), 3))
    with pytest.raises(ValueError, match=r"expected \[N=3, B, ...\]"):
        net.init(KEY, jnp.zeros((4, 5)))
    with pytest.raises(ValueError, match="num_members"):
        core.ensemble(net, 0)


def _haiku_network() -> core.Network:
    return core.from_haiku(lambda x: hk.nets.MLP([8, 2], activation=jnp.tanh)(x))


class _Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](jnp.tanh(self.layers[0](x)))


@pytest.mark.parametrize("net", [_haiku_network(), core.from_nnx(_Nnx)], ids=["haiku", "nnx"])
def test_adapters_give_plain_pytrees_that_jit_grad_vmap_and_ensemble(net: core.Network) -> None:
    x = _normal(8, 4, 3)
    params = net.init(KEY, x)
    assert type(params) is dict
    assert core.num_params(params) == 3 * 8 + 8 + 8 * 2 + 2
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    y = net.apply(params, x)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    first, second = sorted(kernels, key=lambda k: k.shape[1], reverse=True)
    np.testing.assert_allclose(y, np.tanh(x @ first) @ second, rtol=1e-4, atol=1e-5)
    grads = jax.grad(lambda p: net.apply(p, x).sum())(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    stacked = core.ensemble(net, 2)
    members = stacked.init(KEY, jnp.stack([x, x]))
    y = stacked.apply(members, jnp.stack([x, x]))
    assert np.all(y[0] != y[1])


def test_from_nnx_leaves_no_trace_between_calls() -> None:
    net = core.from_nnx(_Nnx)
    x = _normal(9, 4, 3)
    one, two = net.init(jax.random.key(1), x), net.init(jax.random.key(2), x)
    before = net.apply(one, x)
    net.apply(two, x)
    np.testing.assert_array_equal(net.apply(one, x), before)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda rngs: nnx.BatchNorm(3, rngs=rngs), "BatchStat"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "Rng"),
    ],
)
def test_from_nnx_refuses_hidden_state(make: Callable[[nnx.Rngs], nnx.Module], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        core.from_nnx(make)


def test_network_accepts_plain_functions() -> None:
    net = core.Network(lambda key, x: jnp.ones(x.shape[-1:]), lambda w, x: x * w)
    stacked = core.ensemble(net, 2)
    x = _normal(10, 2, 3, 4)
    np.testing.assert_array_equal(stacked.apply(stacked.init(KEY, x), x), x)

"""Images of any size to vectors and back, against loops over the pixels of the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.networks import convolution
from mbrl.networks.convolution import ConvDecoder, ConvEncoder, stage_channels, stage_sizes
from tests.mbrl import plain

KEY = jax.random.key(0)
SHAPES = [
    (1, 1, 1), (2, 9, 1), (5, 5, 1), (5, 5, 5), (7, 6, 3), (16, 16, 3), (30, 40, 4), (64, 64, 3),
    (84, 84, 3), (96, 64, 1), (210, 160, 3),
]  # fmt: skip


def _decoder(shape: tuple[int, int, int]) -> ConvDecoder:
    return ConvDecoder(shape, depth=2, units=4, blocks=4)


def _weights(module: Any, *inputs: Any) -> Any:
    return plain.random_weights(jax.eval_shape(module.init, KEY, *inputs)["params"], 3, gain=2.0)


def test_stages_halve_until_about_four_pixels_remain() -> None:
    assert stage_sizes(64, 64) == [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]
    assert stage_sizes(16, 16) == [(16, 16), (8, 8), (4, 4)]
    assert stage_sizes(5, 5) == [(5, 5), (3, 3)]
    for height, width, _ in SHAPES:
        sizes = stage_sizes(height, width)
        assert 1 <= min(sizes[-1]) <= 6
        for (high, wide), (h, w) in itertools.pairwise(sizes):
            # No row is lost on the way down, and none is missing on the way up.
            assert (2 * h - high, 2 * w - wide) in [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert stage_channels(4, 16) == [32, 48, 64, 64]
    assert stage_channels(2, 4) == [8, 12]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_any_size_come_back_in_their_shape(shape: tuple[int, int, int]) -> None:
    def there_and_back(key: Any) -> Any:
        tokens, _ = ConvEncoder(2).init_with_output(key, jnp.zeros((3, *shape)))
        return tokens, _decoder(shape).init_with_output(key, tokens[:, :1] + jnp.zeros(8), tokens)

    tokens, (image, _) = jax.eval_shape(there_and_back, KEY)
    assert tokens.ndim == 2 and image.shape == (3, *shape)
    height, width = stage_sizes(*shape[:2])[-1]
    assert (
        tokens.shape[1] == height * width * stage_channels(len(stage_sizes(*shape[:2])) - 1, 2)[-1]
    )


@pytest.mark.parametrize("shape", [(5, 5, 1), (9, 14, 2)], ids=str)
def test_the_encoder_is_its_loops(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).uniform(-0.5, 0.5, (2, *shape))
    net = ConvEncoder(2)
    params = _weights(net, jnp.zeros((1, *shape)))
    encode = jax.jit(lambda x: net.apply({"params": params}, x))
    expected = plain.conv_encoder(plain.as_float64(params), image)
    np.testing.assert_allclose(encode(np.float32(image)), expected, rtol=1e-4, atol=1e-5)
    # Every pixel counts, those of an odd edge too.
    seen = jax.jit(jax.jacobian(lambda x: encode(x)[0]))(np.float32(image))
    slopes = np.abs(np.asarray(seen[:, 0])).max(0)
    assert slopes[:, -1].max() > 0 and slopes[-1].max() > 0


@pytest.mark.parametrize("shape", [(5, 5, 1), (9, 14, 2)], ids=str)
def test_the_decoder_is_its_loops(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    deter, stoch = rng.normal(size=(2, 8)), rng.normal(size=(2, 5))
    net = _decoder(shape)
    params = _weights(net, jnp.zeros((1, 8)), jnp.zeros((1, 5)))
    decode = jax.jit(lambda h, z: net.apply({"params": params}, h, z))
    got = decode(np.float32(deter), np.float32(stoch))
    sizes = stage_sizes(*shape[:2])[::-1]
    expected = plain.conv_decoder(plain.as_float64(params), sizes, deter, stoch)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert 0.0 < expected.min() and expected.max() < 1.0 and expected.std() > 0.02
    # Both latents reach the image.
    for i in (0, 1):
        changed = [deter, stoch]
        changed[i] = changed[i] + 1.0
        assert not np.allclose(got, decode(*map(np.float32, changed)), atol=1e-3)


def _with_gradient(layer: Any, x: Any, kernel: Any) -> Any:
    def loss(x: Any, kernel: Any) -> Any:
        y = layer(x, kernel)
        return jnp.sum(jnp.sin(3.0 * y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (1, 1), (9, 5)], ids=str)
@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_products_and_convolutions_are_the_same_layer(
    size: tuple[int, int], up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(5, 5, 3, 4)).astype(np.float32) / 8.0

    def layer(x: Any, kernel: Any) -> Any:
        if up:
            return convolution.double_conv(x, kernel, size)
        return convolution.conv_halve(x, kernel)

    half = -(-size[0] // 2), -(-size[1] // 2)
    x = rng.normal(size=(2, *(half if up else size), 3)).astype(np.float32)
    by_products = _with_gradient(layer, x, kernel)
    monkeypatch.setattr(convolution, "_on_cpu", lambda products, convolution: convolution)
    by_convolution = _with_gradient(layer, x, kernel)
    assert by_products[0][1].shape == (2, *(size if up else half), 4)
    for one, two in zip(*map(jax.tree.leaves, (by_products, by_convolution)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_images_come_back_in_order_when_the_last_part_is_not_full(
    up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5, 4, 4, 2)).astype(np.float32)
    kernel = rng.normal(size=(5, 5, 2, 3)).astype(np.float32)

    def layer(x: Any, kernel: Any) -> Any:
        if up:
            return convolution.double_conv(x, kernel, (8, 8))
        return convolution.conv_halve(x, kernel)

    at_once = _with_gradient(layer, x, kernel)
    monkeypatch.setattr(convolution, "CHUNK", 2)
    in_parts = _with_gradient(layer, x, kernel)
    for one, two in zip(*map(jax.tree.leaves, (at_once, in_parts)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
def test_training_in_a_loop_convolves_by_products() -> None:
    net = ConvEncoder(2)
    images = jnp.zeros((2, 3, 8, 8, 1))
    params = _weights(net, images[0])

    def train(params: Any, images: Any) -> Any:
        def step(params: Any, image: Any) -> Any:
            grads = jax.grad(lambda p: net.apply({"params": p}, image).sum())(params)
            return jax.tree.map(jnp.subtract, params, grads), None

        return jax.lax.scan(step, params, images)[0]

    assert "convolution(" not in jax.jit(train).lower(params, images).compile().as_text()


def test_kernels_begin_at_the_scale_of_their_fan_in() -> None:
    encoder, decoder = ConvEncoder(8), ConvDecoder((16, 16, 3), 8, 32, 8)

    def init(key: Any) -> Any:
        down = encoder.init(key, jnp.zeros((1, 16, 16, 3)))["params"]
        up = decoder.init(key, jnp.zeros((1, 64)), jnp.zeros((1, 48)))["params"]
        return down, up

    down, up = jax.jit(init)(jax.random.key(0, impl="rbg"))
    expected = [
        (down["Conv_0"], 25 * 3), (down["Conv_1"], 25 * 16), (up["BlockDense_0"], 64),
        (up["Dense_1"], 48), (up["Dense_0"], 64), (up["Conv_0"], 25 * 24), (up["Conv_1"], 25 * 16),
    ]  # fmt: skip
    for layer, fan_in in expected:
        std = np.sqrt(np.mean(np.square(layer["kernel"])))
        assert abs(std * fan_in**0.5 - 1.0) < 0.06, (layer["kernel"].shape, fan_in)
        assert not np.any(layer["bias"])


def test_low_precision_is_near() -> None:
    net, low = _decoder((6, 6, 1)), ConvDecoder((6, 6, 1), 2, 4, 4, "bfloat16")
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    params = {"params": _weights(net, *inputs)}
    one, two = jax.jit(net.apply)(params, *inputs), jax.jit(low.apply)(params, *inputs)
    assert isinstance(two, jax.Array) and two.dtype == jnp.float32
    np.testing.assert_allclose(one, two, atol=0.05)

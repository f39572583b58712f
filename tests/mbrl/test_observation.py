"""Observations of any space as network input, back, and their reconstruction error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import normalization, spaces
from mbrl.networks import observation
from mbrl.networks.observation import Decoder, Encoder, Prepared, decoder_for, is_image
from mbrl.normalization import Moments
from mbrl.types import Box, Discrete, MultiDiscrete, Space
from tests.mbrl import plain

PIXELS = spaces.box(0, 255, (5, 4, 1), np.uint8)
DEPTH = spaces.box(-1.0, 3.0, (4, 6, 2))
VECTOR = spaces.box(-np.inf, np.inf, (3,))
# Sorted by name: cell, depth, inner/pixels, inner/place, numbers, raw, speed.
MIXED: Space = {
    "speed": VECTOR,
    "inner": {"place": Discrete(4), "pixels": PIXELS},
    "cell": MultiDiscrete((2, 3)),
    "numbers": spaces.box(-1.0, 1.0, (2, 2)),
    "raw": spaces.box(0, 255, (2,), np.uint8),
    "depth": DEPTH,
}
ROWS = 6


def mixed() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "speed": (50.0 * rng.normal(size=(ROWS, 3))).astype(np.float32),
        "inner": {
            "place": rng.integers(0, 4, ROWS).astype(np.int32),
            "pixels": rng.integers(0, 256, (ROWS, 5, 4, 1)).astype(np.uint8),
        },
        "cell": rng.integers(0, [2, 3], (ROWS, 2)).astype(np.int32),
        "numbers": rng.uniform(-1, 1, (ROWS, 2, 2)).astype(np.float32),
        "raw": rng.integers(0, 256, (ROWS, 2)).astype(np.uint8),
        "depth": rng.uniform(-1, 3, (ROWS, 4, 6, 2)).astype(np.float32),
    }


def moments_of(kind: str, size: int = 18) -> Moments:
    """Return those of no data, or those of data at another scale than `mixed`."""
    if kind == "none":
        return normalization.empty((size,))
    rng = np.random.default_rng(5)
    mean, var = rng.normal(size=size), rng.uniform(0.2, 9.0, size)
    var[-1] = 0.0  # a number that never varied is not divided by anything
    return Moments(jnp.float32(mean), jnp.float32(var), jnp.float32(7.0))


def as_input(obs: dict[str, Any], moments: Moments) -> tuple[Any, list[Any]]:
    """What the networks should see of `mixed`, by hand."""
    classes = [
        np.eye(2)[obs["cell"][:, 0]], np.eye(3)[obs["cell"][:, 1]], np.eye(4)[obs["inner"]["place"]]
    ]  # fmt: skip
    numbers = [obs["numbers"].reshape(ROWS, 4), obs["raw"] / 255.0, obs["speed"]]
    mean, std = np.asarray(moments.mean[9:]), np.sqrt(np.asarray(moments.var[9:], np.float64))
    numbers = (np.concatenate(numbers, -1) - mean) / np.where(std == 0.0, 1.0, std)
    vector = np.concatenate([*classes, plain.symlog(numbers)], -1)
    return vector, [(obs["depth"] + 1.0) / 4.0, obs["inner"]["pixels"] / 255.0]


prepare = jax.jit(lambda obs, moments: observation.prepare(MIXED, obs, moments))


def test_images_are_bounded_boxes_of_rank_three() -> None:
    assert is_image(PIXELS) and is_image(DEPTH)
    assert is_image(spaces.box(0, 255, (1, 1, 1), np.uint8))
    for leaf in (VECTOR, spaces.box(0, 255, (8, 8), np.uint8), Discrete(3), MultiDiscrete((2,))):
        assert not is_image(leaf)
    assert not is_image(spaces.box(0.0, np.inf, (4, 4, 3)))


@pytest.mark.parametrize("kind", ["none", "data"])
def test_every_leaf_is_scaled_by_its_kind(kind: str) -> None:
    obs, moments = mixed(), moments_of(kind)
    got = prepare(obs, moments)
    vector, images = as_input(obs, moments)
    np.testing.assert_allclose(got.vector, vector, rtol=1e-5, atol=1e-6)
    assert got.vector.dtype == jnp.float32
    for image, expected in zip(got.images, images, strict=True):
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-6)
        assert image.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["none", "data"])
def test_a_perfect_prediction_is_the_observation(kind: str) -> None:
    obs, moments = mixed(), moments_of(kind)
    restore = jax.jit(lambda x, moments: observation.restore(MIXED, x, moments))
    back = restore(prepare(obs, moments), moments)
    assert jax.tree.structure(back) == jax.tree.structure(obs)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(obs), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if np.issubdtype(expected.dtype, np.integer):
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-5)


def test_the_reconstruction_error_sums_over_everything_that_is_seen() -> None:
    obs, moments, rng = mixed(), moments_of("data"), np.random.default_rng(1)
    vector, images = as_input(obs, moments)
    said = rng.normal(size=vector.shape)
    drawn = [rng.uniform(size=image.shape) for image in images]
    expected = sum(((x - y) ** 2).sum((1, 2, 3)) for x, y in zip(drawn, images, strict=True))
    for part in (slice(0, 2), slice(2, 5), slice(5, 9)):
        expected = expected - (vector[:, part] * plain.log_softmax(said[:, part])).sum(-1)
    expected = expected + ((said[:, 9:] - vector[:, 9:]) ** 2).sum(-1)
    prediction = Prepared(jnp.float32(said), tuple(map(jnp.float32, drawn)))

    error = jax.jit(lambda *x: observation.reconstruction_nll(MIXED, *x))
    np.testing.assert_allclose(error(prediction, prepare(obs, moments)), expected, rtol=1e-5)


def test_constant_pixels_are_finite() -> None:
    flat = Box((4, 4, 1), np.zeros((4, 4, 1)), np.zeros((4, 4, 1)), np.dtype(np.float32))
    none = moments_of("none", 0)
    x = observation.prepare(flat, jnp.zeros((2, 4, 4, 1)), none)
    assert np.isfinite(x.images[0]).all()
    assert not np.any(observation.restore(flat, x, none))


@pytest.mark.parametrize(
    ("space", "width"),
    [
        (VECTOR, 8),
        (Discrete(4), 8),
        (PIXELS, 3 * 2 * 4),
        ({"a": PIXELS, "b": DEPTH}, 3 * 2 * 4 + 2 * 3 * 4),
        (MIXED, 8 + 3 * 2 * 4 + 2 * 3 * 4),
    ],
    ids=["vector", "integer", "image", "images", "mixed"],
)
def test_networks_take_any_space_and_predict_it(space: Any, width: int) -> None:
    def run(key: Any) -> Any:
        obs = spaces.zeros(space, (3,))
        none = moments_of("none", observation.vector_of(space, obs).shape[-1])
        obs = observation.prepare(space, obs, none)
        tokens, _ = Encoder(8, 2).init_with_output(key, obs)
        decoder = decoder_for(space, 8, 2, 4, "float32")
        said, _ = decoder.init_with_output(key, jnp.zeros((3, 8)), jnp.zeros((3, 6)))
        assert isinstance(said, Prepared)
        error = observation.reconstruction_nll(space, said, obs)
        return tokens, error, observation.restore(space, said, none)

    tokens, error, seen = jax.eval_shape(run, jax.random.key(0))
    assert tokens.shape == (3, width)
    assert error.shape == (3,)
    for got, expected in zip(
        jax.tree.leaves(seen), jax.tree.leaves(spaces.zeros(space, (3,))), strict=True
    ):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_networks_for_vectors_are_their_loops() -> None:
    rng = np.random.default_rng(0)
    x, deter, stoch = rng.normal(size=(4, 3)), rng.normal(size=(4, 8)), rng.normal(size=(4, 6))
    encoder, decoder = Encoder(7, 2), Decoder(3, (), 7, 2, 4)
    seen = Prepared(jnp.float32(x), ())

    def init(key: Any) -> Any:
        return encoder.init(key, seen), decoder.init(key, jnp.float32(deter), jnp.float32(stoch))

    down, up = (
        plain.random_weights(p["params"], seed=2) for p in jax.eval_shape(init, jax.random.key(0))
    )
    tokens = jax.jit(encoder.apply)({"params": down}, seen)
    expected = plain.mlp(plain.as_float64(down["MLP_0"]), x)
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)  # pyright: ignore
    said: Any = jax.jit(decoder.apply)({"params": up}, jnp.float32(deter), jnp.float32(stoch))
    hidden = plain.mlp(plain.as_float64(up["MLP_0"]), np.concatenate([deter, stoch], -1))
    expected = plain.dense(plain.as_float64(up["Dense_0"]), hidden)
    np.testing.assert_allclose(said.vector, expected, rtol=1e-4, atol=1e-5)
    # Three hidden layers on either side.
    assert len(down["MLP_0"]) == len(up["MLP_0"]) == 6

"""The decoder: what is seen, what is padding, and what a family is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.networks.attention import KeyValues, attend, causal, positions_of, rotate, rotation
from mbrl.networks.core import num_params
from mbrl.networks.lora import lora
from mbrl.networks.transformer import TransformerConfig, family_config, transformer
from mbrl.training.hugging_face_config import family_of

SIZES = {"vocab": 11, "layers": 2, "width": 8, "heads": 2, "mlp_width": 12, "max_length": 12}
CONFIG = family_config("qwen3", **SIZES, kv_heads=1, head_dim=6, padding_rows=3)
MODEL = transformer(CONFIG)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
LEFT = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)


@pytest.fixture(scope="module")
def params() -> dict:
    # Larger than at the start, or every token would get the same probability.
    params = jax.jit(MODEL.init)(jax.random.key(0))
    return jax.tree.map(lambda x: 20.0 * x if x.ndim > 1 else x, params)


hidden = jax.jit(MODEL.hidden)
extend = jax.jit(MODEL.extend)


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Attend with loops over sequences, heads and queries."""
    out = np.zeros(q.shape)
    share = q.shape[1] // k.shape[1]
    for b, h, t in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        scores = k[b, h // share, seen] @ q[b, h, t] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights / weights.sum() @ v[b, h // share, seen]
    return out


def test_attention_is_that_of_a_loop_over_heads() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, h, 6, 4)).astype(np.float32) for h in (4, 2, 2))
    visible = np.asarray(causal(jnp.ones((2, 6), bool)))
    assert visible[0].tolist() == np.tri(6, dtype=bool).tolist()
    got = attend(jnp.asarray(q), KeyValues(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(visible))
    np.testing.assert_allclose(got, plain_attention(q, k, v, visible), atol=1e-6)


def test_positions_count_real_tokens() -> None:
    assert positions_of(LEFT).tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))

    def score(i: int, j: int) -> float:
        turned = [
            rotate(x, rotation(jnp.array([[place]]), 6, 100.0)) for x, place in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 3) == pytest.approx(score(9, 7), abs=1e-5)
    assert abs(score(5, 3) - score(5, 4)) > 1e-2
    # The first pair of numbers, 0 and 3, turns by one radian per position.
    x = rotate(jnp.eye(6)[None, None, :1], rotation(jnp.array([[1]]), 6, 100.0))[0, 0, 0]
    np.testing.assert_allclose(x, [np.cos(1), 0, 0, np.sin(1), 0, 0], atol=1e-6)


def test_padding_is_seen_by_nobody_and_may_hold_anything(params: dict) -> None:
    alone = hidden(params, TOKENS[:1, 2:], jnp.ones((1, 4), bool))
    for junk in (0, 10):
        tokens = jnp.where(LEFT, TOKENS, junk)
        np.testing.assert_allclose(hidden(params, tokens, LEFT)[0, 2:], alone[0], atol=1e-5)
    right = hidden(params, jnp.roll(TOKENS, -2, 1), jnp.roll(LEFT, -2, 1))
    np.testing.assert_allclose(right[0, :4], alone[0], atol=1e-5)
    assert np.isfinite(hidden(params, TOKENS, jnp.zeros_like(LEFT))).all()


def test_no_token_sees_the_future(params: dict) -> None:
    changed = TOKENS.at[:, 4].set(0)
    before, after = (hidden(params, t, jnp.ones_like(LEFT)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (jnp.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


def test_the_cache_computes_what_the_whole_sequence_does(params: dict) -> None:
    cache, parts = MODEL.cache(2, 9), []
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        h, cache = extend(params, cache, TOKENS[:, part], LEFT[:, part])
        parts.append(h)
    whole = hidden(params, TOKENS, LEFT)
    error = jnp.abs(jnp.concatenate(parts, 1) - whole)[LEFT]
    assert error.max() < 1e-5
    assert int(cache.filled) == 6


def test_rows_beyond_the_vocabulary_have_no_probability(params: dict) -> None:
    h = hidden(params, TOKENS, LEFT)
    assert params["head"].shape == (14, 8)
    logits = MODEL.logits(params, h)
    assert logits.shape == (2, 6, 11)
    np.testing.assert_allclose(logits, h @ params["head"][:11].T, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_parameters_of_a_family_are_those_counted_by_hand(family: str) -> None:
    config = family_config(family, **SIZES)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    attention, mlp, table = 4 * 8 * 8, 8 * 12, 11 * 8
    block = {
        "gpt2": attention + 4 * 8 + 2 * mlp + 12 + 8 + 4 * 8,
        "llama": attention + 3 * mlp + 2 * 8,
        "qwen2": attention + 3 * 8 + 3 * mlp + 2 * 8,
        "qwen3": attention + 3 * mlp + 2 * 8 + 2 * 4,
    }[family]
    rest = table + 12 * 8 + 16 if family == "gpt2" else 2 * table + 8
    assert num_params(shapes) == 2 * block + rest
    assert family_of(config) == family


def test_branches_start_small_and_the_same_seed_gives_the_same_weights() -> None:
    config = family_config("gpt2", layers=8, width=64)
    params = jax.jit(transformer(config).init)(jax.random.key(1))
    deviation = {name: float(params["blocks"][name]["kernel"].std()) for name in ("up", "down")}
    assert deviation["up"] == pytest.approx(0.02, rel=0.05)
    assert deviation["down"] == pytest.approx(0.02 / 4, rel=0.05)
    assert float(params["embed"].std()) == pytest.approx(0.02, rel=0.05)
    assert not np.allclose(*params["blocks"]["up"]["kernel"][:2])


@pytest.fixture(scope="module")
def slope(params: dict) -> tuple[jax.Array, jax.Array]:
    return value_and_slope(CONFIG, params)


def value_and_slope(config: TransformerConfig, params: dict) -> tuple[jax.Array, jax.Array]:
    """Differentiate a sum over real tokens; the second sequence is padding alone."""
    mask = LEFT.at[1].set(False)

    def loss(params: dict) -> jax.Array:
        h = transformer(config).hidden(params, TOKENS, mask)
        return jnp.sum(jnp.where(mask[..., None], h, 0.0) ** 3)

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    return value, jnp.concatenate([x.ravel() for x in jax.tree.leaves(slope)])


def test_padding_does_not_spoil_gradients(slope: tuple[jax.Array, jax.Array]) -> None:
    assert np.isfinite(slope[1]).all()
    assert jnp.abs(slope[1]).max() > 0


@pytest.mark.parametrize(
    ("change", "error"), [({"remat": True}, 1e-5), ({"dtype": "bfloat16"}, 0.1)]
)
def test_recomputation_and_bfloat16_change_little(
    params: dict, slope: tuple[jax.Array, jax.Array], change: dict, error: float
) -> None:
    value, other = value_and_slope(dataclasses.replace(CONFIG, **change), params)
    assert value == pytest.approx(float(slope[0]), rel=error)
    assert jnp.linalg.norm(other - slope[1]) < error * jnp.linalg.norm(slope[1])
    assert other.dtype == jnp.float32


def test_too_many_tokens_are_refused(params: dict) -> None:
    tokens = jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(ValueError, match="length of 13, expected at most 12"):
        MODEL.hidden(params, tokens, tokens == 0)
    with pytest.raises(ValueError, match="length of 6, expected at most 4"):
        MODEL.extend(params, MODEL.cache(2, 4), TOKENS, LEFT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "width: got 256, expected a multiple of the 3 heads"),
        ({"kv_heads": 3}, "kv_heads: got 3 for 4 heads"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"norm": "batch"}, "norm: got 'batch'"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim: got 5, expected an even"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)


def test_families_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="family: got 'gpt5'"):
        family_config("gpt5")
    with pytest.raises(ValueError, match="qk_norm: set by the family llama"):
        family_config("llama", qk_norm=True)


def test_adapters_start_as_the_reference_and_stay_in_their_rank(params: dict) -> None:
    adapter = lora(rank=2, alpha=4.0, targets=("query", "down"))
    adapters = adapter.init(jax.random.key(1), params)
    merged = adapter.merge(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, params)

    adapters["down"]["b"] = jax.random.normal(jax.random.key(2), adapters["down"]["b"].shape)
    change = adapter.merge(params, adapters)["blocks"]["down"]["kernel"]
    change = change - params["blocks"]["down"]["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-4).tolist() == [2, 2]
    expected = 2.0 * jnp.einsum("lir,lro->lio", adapters["down"]["a"], adapters["down"]["b"])
    np.testing.assert_allclose(change, expected, atol=1e-5)


def test_adapters_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rank: got 0"):
        lora(rank=0)
    with pytest.raises(ValueError, match="targets: got 'c_attn'"):
        lora(targets=("c_attn",))

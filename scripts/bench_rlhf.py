"""The parts of `mbrl bench rlhf`: the steps of every stage on a small GPT-2."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.rlhf.direct import DirectBatch, DirectGiven, make_direct
from agents.rlhf.ppo import PromptBatch, TokenPPOConfig, TokenPPOGiven, make_token_ppo
from agents.rlhf.reward import RewardConfig, RewardGiven, make_reward
from agents.rlhf.stage import Stage
from mbrl.models.generation import generate
from mbrl.models.token_reward import token_reward
from mbrl.networks.transformer import TransformerConfig, family_config, transformer
from mbrl.text_batches import TextBatch
from scripts.bench import GEMM, QUICK_GEMM
from scripts.flops import count_flops
from scripts.timing import beside_gemm, warm_seconds

COUNTED = (
    "two FLOP per multiply-add of all matrix products of one step, loops as often as they run, "
    "from the jaxpr; generation runs all of its steps"
)
CONFIG = family_config("gpt2", vocab=1024, layers=4, width=256, heads=4, max_length=128)


FULL = family_config("gpt2", vocab=1024, layers=12, width=2048, heads=16, max_length=512)
"""What fills an accelerator: 0.6 billion parameters."""


class Sizes(NamedTuple):
    """How large the cases are, so that a test can shrink them."""

    gemm: tuple[int, int] = GEMM
    config: TransformerConfig = CONFIG
    pairs: int = 16
    prompt: int = 80
    response: int = 48
    batch: int = 32
    epochs: int = 4
    members: int = 5
    prompts: int = 4
    answers: int = 9


FULL_SIZES = Sizes((8192, 4096), FULL, 8, 256, 256)


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs."""
    tiny = family_config("gpt2", vocab=16, layers=1, width=8, heads=2, max_length=8)
    return Sizes(QUICK_GEMM, tiny, 2, 4, 4, 2, 1, 2, 1, 3)


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name.

    Args:
      quick: sizes that show that everything runs.
      repeats: warm calls per figure.
    """
    sizes = quick_sizes() if quick else Sizes()
    return {
        "reward": partial(reward_case, sizes, repeats),
        "direct": partial(direct_case, sizes, repeats),
        "generate": partial(generate_case, sizes, repeats),
        "ppo": partial(ppo_case, sizes, repeats),
        "members": partial(members_case, sizes, repeats),
        "rankings": partial(rankings_case, sizes, repeats),
    } | (
        {"full": partial(full_case, sizes if quick else FULL_SIZES, repeats)}
        if quick or jax.default_backend() != "cpu"
        else {}
    )


def reward_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time a step of the reward model on pairs."""
    return _reward(sizes, repeats, 1)


def _reward(sizes: Sizes, repeats: int, members: int) -> dict[str, Any]:
    stage = make_reward(transformer(sizes.config), RewardConfig(members=members))
    batch = answers(sizes, sizes.pairs, 2)
    return {"pairs": sizes.pairs, "tokens": batch.tokens.shape[-1], "members": members} | timed(
        stage, RewardGiven(start(sizes)), batch, repeats, sizes.gemm, sizes.config.dtype
    )


def full_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time a step of a reward model that fills an accelerator, in both precisions.

    The GEMM beside it is of the same precision.
    """
    return {
        dtype: _reward(
            sizes._replace(config=dataclasses.replace(sizes.config, dtype=dtype)), repeats, 1
        )
        for dtype in ("float32", "bfloat16")
    }


def direct_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time a step of DPO, with the reference's log-probabilities at hand."""
    batch = answers(sizes, sizes.pairs, 2)
    given = DirectBatch(batch, jnp.zeros((sizes.pairs, 2)))
    stage = make_direct(transformer(sizes.config))
    return {"pairs": sizes.pairs, "tokens": batch.tokens.shape[-1]} | timed(
        stage, DirectGiven(start(sizes)), given, repeats, sizes.gemm
    )


def generate_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time the sampling of responses, none of which ends early."""
    model, params, prompts = transformer(sizes.config), start(sizes), written(sizes)
    write = jax.jit(
        lambda params, key, prompts: generate(
            model, params, key, prompts.tokens, prompts.mask, sizes.response
        )
    )
    jax.block_until_ready(write(params, jax.random.key(0), prompts))
    seconds = warm_seconds(lambda i: write(params, jax.random.key(i), prompts), repeats)
    median = statistics.median(seconds)
    return {
        "batch": sizes.batch,
        "prompt": sizes.prompt,
        "response": sizes.response,
        "median_seconds": median,
        "min_seconds": min(seconds),
        "tokens_per_second": sizes.batch * sizes.response / median,
    }


def ppo_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time whole iterations of PPO, with a critic of its own and with the policy's transformer."""
    model, base = transformer(sizes.config), start(sizes)
    reward = token_reward(model)
    given = TokenPPOGiven(base, reward.init(jax.random.key(1), base))
    config = TokenPPOConfig(length=sizes.response, epochs=sizes.epochs)
    # A token that is never drawn ends a response: all have their full length.
    never = sizes.config.vocab
    found = {
        name: timed(
            make_token_ppo(model, reward, never, dataclasses.replace(config, value=name)),
            given, written(sizes), repeats, sizes.gemm,
        )
        for name in ("separate", "shared")
    }  # fmt: skip
    shape = {"batch": sizes.batch, "prompt": sizes.prompt, "response": sizes.response}
    return shape | {"epochs": sizes.epochs} | found


def members_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time a step of an ensemble of reward models beside that of one."""
    one, many = _reward(sizes, repeats, 1), _reward(sizes, repeats, sizes.members)
    return many | {"ratio": many["median_seconds"] / one["median_seconds"]}


def rankings_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time a step on rankings of K answers beside one on all of their pairs."""
    stage, given = make_reward(transformer(sizes.config)), RewardGiven(start(sizes))
    K = sizes.answers
    whole = answers(sizes, sizes.prompts, K)
    first, second = np.triu_indices(K, 1)

    def apart(x: Any) -> Any:
        return np.stack([x[:, first], x[:, second]], 2).reshape(-1, 2, *x.shape[2:])

    number = sizes.prompts * len(first)
    pairs = TextBatch(
        apart(whole.tokens), apart(whole.mask), apart(whole.response),
        np.tile(np.arange(2, dtype=np.int32), (number, 1)), np.zeros(number, np.float32),
        np.arange(number, dtype=np.int32),
    )  # fmt: skip
    found = {
        name: timed(stage, given, batch, repeats, sizes.gemm)
        for name, batch in (("ranking", whole), ("pairs", pairs))
    }
    ratio = found["pairs"]["median_seconds"] / found["ranking"]["median_seconds"]
    return {"prompts": sizes.prompts, "answers": K, "ratio": ratio} | found


def timed(
    stage: Stage,
    given: Any,
    batch: Any,
    repeats: int,
    shape: tuple[int, int],
    dtype: str = "float32",
) -> dict[str, float]:
    """Time the steps of a stage on one batch in turns with the GEMM."""
    state = jax.jit(stage.init)(jax.random.key(0), given)
    flop = count_flops(stage.step, state, given, batch, jax.random.key(0))
    step = jax.jit(stage.step, donate_argnums=0)
    state = jax.block_until_ready(step(state, given, batch, jax.random.key(1)))[0]

    def learn(i: int) -> Any:
        nonlocal state
        state, metrics = step(state, given, batch, jax.random.key(i))
        return metrics

    return beside_gemm(learn, repeats, shape, dtype).rates(flop / 1e9)


def start(sizes: Sizes) -> Any:
    """Make parameters of the model."""
    return transformer(sizes.config).init(jax.random.key(0))


def written(sizes: Sizes) -> PromptBatch:
    """Make prompts without padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.config.vocab, (sizes.batch, sizes.prompt), dtype=np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def answers(sizes: Sizes, prompts: int, options: int) -> TextBatch:
    """Make rankings of answers without padding; half of their tokens are those of the prompt."""
    rng, time = np.random.default_rng(0), sizes.prompt + sizes.response
    tokens = rng.integers(0, sizes.config.vocab, (prompts, options, time), dtype=np.int32)
    mask = np.ones(tokens.shape, bool)
    rank = np.tile(np.arange(options, dtype=np.int32), (prompts, 1))
    return TextBatch(
        tokens, mask, mask[..., time // 2 :], rank, np.zeros(prompts, np.float32),
        np.arange(prompts, dtype=np.int32),
    )  # fmt: skip

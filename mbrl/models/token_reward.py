"""Reward models of text: scalar heads on a transformer, read at the last token of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mbrl.networks.transformer import Transformer
from mbrl.normalization import MIN_STD
from mbrl.types import Array, Key, Params

Members = Literal["heads", "whole"]
"""What the members of an ensemble do not share: the head only, or the transformer too."""


class TokenRewardState(NamedTuple):
    """Parameters of a reward model; `score = gain * output + bias`.

    Attributes:
      trunk: parameters of the transformer, with a leading [N] for whole members.
      head: [N, D].
      gain: [N], positive.
      bias: [N].
    """

    trunk: Params
    head: Array
    gain: Array
    bias: Array


class TokenReward(NamedTuple):
    """An ensemble of scalar heads on a transformer.

    Attributes:
      init: `(key, trunk) -> TokenRewardState`, from the parameters of a language model.
      scores: `(state, tokens [B, T], mask [B, T]) -> [N, B]`, one score per member and row.
      normalize: `(state, scores [N, B]) -> state` whose members give these rows scores of mean
        0 and deviation 1. The reward then keeps its unit, whatever it was trained on.
    """

    init: Callable[[Key, Params], TokenRewardState]
    scores: Callable[[TokenRewardState, Array, Array], Array]
    normalize: Callable[[TokenRewardState, Array], TokenRewardState]


def last_token(x: Array, mask: Array) -> Array:
    """Read `x` [B, T, ...] at the last real token of every row, whichever side is padded.

    Args:
      x: [B, T, ...].
      mask: bool [B, T]; a row without a token reads its last position.
    """
    position = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    index = position.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, 1)[:, 0]


def token_reward(model: Transformer, members: int = 1, kind: Members = "heads") -> TokenReward:
    """Build a reward model of token sequences.

    Heads start with deviation `1 / sqrt(D + 1)`, so that first scores are of size one; members
    differ by that draw, and by whatever data each of them is shown.

    Args:
      model: the transformer that heads are put on.
      members: N.
      kind: 'heads' share one transformer, which is evaluated once; 'whole' members have one
        each, evaluated in one batched program.

    Raises:
      ValueError: for no member, or an unknown kind.

    Reference: Stiennon et al. 2020 (arXiv:2009.01325); Coste et al. 2023 (arXiv:2310.02743) for
    ensembles.
    """
    if members < 1 or kind not in get_args(Members):
        raise ValueError(
            f"members, kind: got {members} and {kind!r}, expected at least 1 and one of "
            f"{list(get_args(Members))}"
        )

    def init(key: Key, trunk: Params) -> TokenRewardState:
        width = model.config.width
        head = jax.random.normal(key, (members, width)) * (width + 1) ** -0.5
        if kind == "whole":
            trunk = jax.tree.map(lambda x: jnp.repeat(x[None], members, 0), trunk)
        return TokenRewardState(trunk, head, jnp.ones(members), jnp.zeros(members))

    def features(trunk: Params, tokens: Array, mask: Array) -> Array:
        return last_token(model.hidden(trunk, tokens, mask), mask)

    def scores(state: TokenRewardState, tokens: Array, mask: Array) -> Array:
        if kind == "heads":
            raw = (features(state.trunk, tokens, mask) @ state.head.T).T
        else:
            found = jax.vmap(features, (0, None, None))(state.trunk, tokens, mask)
            raw = jnp.einsum("nbd,nd->nb", found, state.head)
        return state.gain[:, None] * raw + state.bias[:, None]

    def normalize(state: TokenRewardState, scores: Array) -> TokenRewardState:
        mean, std = scores.mean(1), jnp.maximum(scores.std(1), MIN_STD)
        return state._replace(gain=state.gain / std, bias=(state.bias - mean) / std)

    return TokenReward(init, scores, normalize)

"""Sampling of token sequences: static shapes, a cache per layer, one compiled loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.networks.transformer import Cache, Transformer, unstack
from mbrl.types import Array, Key, Params


class Generated(NamedTuple):
    """Prompts and the responses to them.

    Attributes:
      tokens: int32 [B, P + L]; the pad token after the end of a response.
      mask: bool [B, P + L], real tokens, the EOS of a response among them.
      log_prob: [B, L] in nats of each token of the response, under the policy at the temperature
        of sampling and *over the whole vocabulary*, also where top-k or top-p have cut it: that
        is the policy that training sees. 0 after the end.
    """

    tokens: Array
    mask: Array
    log_prob: Array


def truncate(logits: Array, top_k: int = 0, top_p: float | Array = 1.0) -> Array:
    """Set the logits of unlikely tokens to -inf.

    Args:
      logits: [..., V], at the temperature of sampling.
      top_k: tokens that are kept (more where they tie); 0 = all.
      top_p: the likeliest tokens are kept until their probability reaches this; 1 = all. It is
        that of what `top_k` has left.

    Returns:
      [..., V]; the likeliest token always stays.

    Reference: Holtzman et al. 2019 (arXiv:1904.09751) for top-p.
    """
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if not isinstance(top_p, int | float) or top_p < 1.0:
        order = jnp.flip(jnp.sort(logits, -1), -1)
        probability = jax.nn.softmax(order, -1)
        before = jnp.cumsum(probability, -1) - probability
        # The likeliest one has nothing before it.
        kept = jnp.where(before < top_p, order, jnp.inf)
        logits = jnp.where(logits >= jnp.min(kept, -1, keepdims=True), logits, -jnp.inf)
    return logits


def sample_token(
    key: Key, logits: Array, temperature: float | Array, top_k: int = 0, top_p: float | Array = 1.0
) -> tuple[Array, Array]:
    """Draw a token per row.

    Args:
      key: consumed.
      logits: [B, V] of the policy.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: see `truncate`.
      top_p: see `truncate`.

    Returns:
      Tokens int32 [B], and their log-probabilities [B] at this temperature, before truncation; at
      temperature 0 those at temperature 1.
    """
    greedy = isinstance(temperature, int | float) and temperature == 0
    logits = logits if greedy else logits / temperature
    if greedy:
        token = jnp.argmax(logits, -1)
    else:
        token = jax.random.categorical(key, truncate(logits, top_k, top_p))
    chosen = jnp.take_along_axis(logits, token[:, None], -1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, -1)


class _Loop(NamedTuple):
    """What the loop carries; `logits` are of the token to come."""

    step: Array
    cache: Cache
    logits: Array
    alive: Array
    tokens: Array
    mask: Array
    log_prob: Array


def generate(
    model: Transformer,
    params: Params,
    key: Key,
    prompts: Array,
    mask: Array,
    length: int,
    temperature: float | Array = 1.0,
    top_k: int = 0,
    top_p: float | Array = 1.0,
    eos: int | None = None,
    pad: int = 0,
    stop: bool = True,
) -> Generated:
    """Continue every prompt by up to `length` tokens.

    Args:
      model: the policy.
      params: its parameters.
      key: consumed.
      prompts: int32 [B, P], padded on the left to one length.
      mask: bool [B, P], real tokens of the prompts.
      length: L, the longest response.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: see `truncate`.
      top_p: see `truncate`.
      eos: token that ends a response and belongs to it; None = none does.
      pad: token after the end; the mask tells it from a real one.
      stop: leave the loop once all responses have ended. False runs all L steps: under `vmap` a
        loop that may stop copies its whole cache at each of them.

    Returns:
      `Generated`.

    Raises:
      ValueError: for impossible settings, or a prompt that leaves no room for the response.
    """
    _check(model, prompts, mask, length, temperature, top_k, top_p)
    params, (batch, start) = unstack(params), prompts.shape
    hidden, cache = model.extend(params, model.cache(batch, start + length), prompts, mask)
    keys = jax.random.split(key, length)

    def more(loop: _Loop) -> Array:
        return (loop.step < length) & jnp.any(loop.alive)

    def step(loop: _Loop) -> _Loop:
        t = loop.step
        token, log_prob = sample_token(keys[t], loop.logits, temperature, top_k, top_p)
        token = jnp.where(loop.alive, token, pad)
        row = token[:, None]
        hidden, cache = model.extend(params, loop.cache, row, loop.alive[:, None])
        alive = loop.alive if eos is None else loop.alive & (token != eos)
        return _Loop(
            t + 1,
            cache,
            model.logits(params, hidden[:, 0]),
            alive,
            loop.tokens.at[:, t].set(token),
            loop.mask.at[:, t].set(loop.alive),
            loop.log_prob.at[:, t].set(jnp.where(loop.alive, log_prob, 0.0)),
        )

    loop = _Loop(
        jnp.zeros((), jnp.int32),
        cache,
        model.logits(params, hidden[:, -1]),
        jnp.ones(batch, bool),
        jnp.full((batch, length), pad, jnp.int32),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length)),
    )
    if stop and eos is not None:
        loop = jax.lax.while_loop(more, step, loop)
    else:
        loop = jax.lax.fori_loop(0, length, lambda _, loop: step(loop), loop)
    tokens = jnp.concatenate([prompts, loop.tokens], 1)
    return Generated(tokens, jnp.concatenate([mask, loop.mask], 1), loop.log_prob)


def _check(
    model: Transformer,
    prompts: Array,
    mask: Array,
    length: int,
    temperature: float | Array,
    top_k: int,
    top_p: float | Array,
) -> None:
    if prompts.ndim != 2 or prompts.shape != mask.shape:
        raise ValueError(
            f"prompts: got shape {prompts.shape} with a mask {mask.shape}, expected [B, P] for both"
        )
    most = model.config.max_length - prompts.shape[1]
    if not 1 <= length <= most:
        raise ValueError(
            f"length: got {length} after prompts of {prompts.shape[1]}, expected 1 to {most}, or "
            "the sequence exceeds max_length; shorten the prompts"
        )
    if isinstance(temperature, int | float) and not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or a number above")
    if not 0 <= top_k:
        raise ValueError(f"top_k: got {top_k}, expected a number of tokens, or 0 for all")
    if isinstance(top_p, int | float) and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}, expected a probability in (0, 1]; 1 keeps all")

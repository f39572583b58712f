"""Language models as policies: probabilities of responses, and the token task as an `MDP`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.mdp import SplitParams
from mbrl.networks.transformer import Cache, Transformer
from mbrl.types import (
    MDP,
    Array,
    Discrete,
    EnvSpec,
    Key,
    MultiDiscrete,
    Outcome,
    Params,
    Predictor,
)

Score = Callable[[Params, Array, Array], tuple[Array, Array]]
"""`(params, tokens [B, T], mask [B, T]) -> (score [B], epistemic standard deviation [B])`."""


def response_logits(
    model: Transformer, params: Params, tokens: Array, mask: Array, length: int
) -> Array:
    """Compute the logits that the last tokens of a sequence are drawn from.

    Args:
      model: the policy.
      params: its parameters.
      tokens: int32 [B, T].
      mask: bool [B, T], real tokens.
      length: L < T, tokens at the end to be predicted; nothing is computed for the others.

    Returns:
      [B, L, V] float32; entry `l` is of token `T - L + l`.

    Raises:
      ValueError: when no token comes before the first one to be predicted.
    """
    time = tokens.shape[1]
    if not 1 <= length < time:
        raise ValueError(
            f"length: got {length} for sequences of {time} tokens, expected 1 to {time - 1}; the "
            "first token of a sequence is given, not drawn"
        )
    hidden = model.hidden(params, tokens, mask)
    return model.logits(params, hidden[:, time - length - 1 : -1])


def token_log_probs(
    model: Transformer,
    params: Params,
    tokens: Array,
    mask: Array,
    length: int,
    temperature: float | Array = 1.0,
) -> Array:
    """Compute the log-probabilities of the last tokens of a sequence.

    Args:
      model: the policy.
      params: its parameters.
      tokens: int32 [B, T].
      mask: bool [B, T], real tokens.
      length: L < T, see `response_logits`.
      temperature: of the policy, the one that it was sampled at.

    Returns:
      [B, L] in nats; 0 where the token is not real.

    Raises:
      ValueError: see `response_logits`; and for a temperature of 0.
    """
    logits = response_logits(model, params, tokens, mask, length)
    return chosen_log_probs(logits, tokens[:, -length:], mask[:, -length:], temperature)


def chosen_log_probs(
    logits: Array, tokens: Array, mask: Array, temperature: float | Array = 1.0
) -> Array:
    """Read the log-probabilities of tokens off the logits that they were drawn from.

    Args:
      logits: [B, L, V] of the policy.
      tokens: int32 [B, L].
      mask: bool [B, L], real tokens.
      temperature: that divides the logits.

    Returns:
      [B, L] in nats; 0 where the token is not real.

    Raises:
      ValueError: for a temperature of 0.
    """
    if isinstance(temperature, int | float) and not temperature > 0.0:
        raise ValueError(
            f"temperature: got {temperature}, expected above 0; greedy tokens are certain, use the "
            "temperature that training is at"
        )
    logits = logits / temperature
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return jnp.where(mask, chosen - jax.nn.logsumexp(logits, -1), 0.0)


class TokenState(NamedTuple):
    """State of the token task.

    Attributes:
      tokens: int32 [B, P + L] prompt, response so far, and zeros.
      mask: bool [B, P + L], real tokens.
      cache: what the policy remembers; one cache of a single sequence per row, leaves [B, ...],
        since the rows of a search are not equally long.
      hidden: [B, D] of the last token, for a value head.
      logits: [B, V] of the policy for the next token.
      count: int32 [B], tokens of the response.
      done: bool [B].
    """

    tokens: Array
    mask: Array
    cache: Cache
    hidden: Array
    logits: Array
    count: Array
    done: Array


def token_mdp(
    model: Transformer, score: Score, prompt: int, length: int, eos: int | None = None
) -> MDP:
    """Make a language model's task a decision process: an action is a token.

    The reward is 0 until the response ends, by its EOS or its length, and the score then; a score
    with an epistemic uncertainty makes `penalized` work here as on any model. Parameters are
    `SplitParams(model, reward)`. Every step keeps the policy's cache, logits and hidden state.

    Args:
      model: the policy.
      score: see `Score`; evaluated when a response ends.
      prompt: P, length of the prompts, padded on the left.
      length: L, longest response.
      eos: token that ends a response.

    Returns:
      An `MDP` over `TokenState`. An observation is a dict of `tokens` and `mask`, int32
      [B, P + L]; `init` needs one, or the prompts alone, [B, P]: draw them with `with_resets`.

    Raises:
      ValueError: when prompt and response exceed the model; from `init`, for other lengths or
        without an observation.
    """
    vocab, total = model.config.vocab, prompt + length
    if prompt < 1 or length < 1 or total > model.config.max_length:
        raise ValueError(
            f"prompt, length: got {prompt} and {length}, expected at least 1 each and at most "
            f"{model.config.max_length} together, the max_length of the model"
        )
    observation = {"tokens": MultiDiscrete((vocab,) * total), "mask": MultiDiscrete((2,) * total)}
    spec = EnvSpec("tokens", observation, Discrete(vocab), length)
    extend_rows = jax.vmap(model.extend, (None, 0, 0, 0))

    def init(params: SplitParams, key: Key, obs: Any = None, batch: int = 1) -> TokenState:
        if obs is None:
            raise ValueError(
                "obs: got None, expected prompts; with_resets(mdp, prompts) draws them at random"
            )
        tokens, mask = jnp.asarray(obs["tokens"], jnp.int32), jnp.asarray(obs["mask"], bool)
        if tokens.shape[1] not in (prompt, total) or mask.shape != tokens.shape:
            raise ValueError(
                f"obs: got tokens {tokens.shape} and mask {mask.shape}, expected [B, {prompt}] or "
                f"[B, {total}] for both"
            )
        count = mask[:, prompt:].sum(1, dtype=jnp.int32)
        last = prompt - 1 + count
        rows = jnp.arange(tokens.shape[0])
        hidden, cache = model.extend(params.model, model.cache(len(rows), total), tokens, mask)
        hidden = hidden[rows, last]
        layers = jax.tree.map(lambda x: x[:, None], cache.layers)
        cache = Cache(layers, cache.mask[:, None], last + 1)
        done = count >= length
        if eos is not None:
            done = done | (count > 0) & (tokens[rows, last] == eos)
        room = ((0, 0), (0, total - tokens.shape[1]))
        tokens, mask = jnp.pad(jnp.where(mask, tokens, 0), room), jnp.pad(mask, room)
        logits = model.logits(params.model, hidden)
        return TokenState(tokens, mask, cache, hidden, logits, count, done)

    def step(
        params: SplitParams, key: Key, state: TokenState, action: Array
    ) -> tuple[TokenState, Outcome]:
        alive = ~state.done
        here = alive[:, None] & (jnp.arange(total) == prompt + state.count[:, None])
        tokens = jnp.where(here, action[:, None], state.tokens)
        mask = state.mask | here
        hidden, cache = extend_rows(
            params.model, state.cache, action[:, None, None], alive[:, None, None]
        )
        hidden = hidden[:, 0, 0]
        count = state.count + alive
        ended = count >= length
        ended = alive & (ended if eos is None else ended | (action == eos))
        zero = jnp.zeros(action.shape)
        mean, epistemic = jax.lax.cond(
            ended.any(), score, lambda *_: (zero, zero), params.reward, tokens, mask
        )
        done = state.done | ended
        outcome = Outcome(
            jnp.where(ended, mean, 0.0),
            1.0 - done.astype(jnp.float32),
            jnp.where(ended, epistemic, 0.0),
        )
        logits = model.logits(params.model, hidden)
        return TokenState(tokens, mask, cache, hidden, logits, count, done), outcome

    def observe(params: SplitParams, state: TokenState) -> Any:
        return {"tokens": state.tokens, "mask": state.mask.astype(jnp.int32)}

    return MDP(init, step, observe, spec)


def token_predictor(value: Callable[[Params, TokenState], Array] | None = None) -> Predictor:
    """Make the policy itself the prior of a tree search.

    Args:
      value: `(params, state) -> [B]`, expected score; None = 0, which is right where a tree
        reaches the end of the response.
    """

    def predict(params: Params, state: TokenState) -> tuple[Array, Array]:
        found = jnp.zeros(state.done.shape) if value is None else value(params, state)
        return state.logits, found

    return Predictor(predict)

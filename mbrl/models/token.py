"""Language models as policies: probabilities of responses, and the token task as an `MDP`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.networks.transformer import Transformer
from mbrl.types import Array, Params


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

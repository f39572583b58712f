"""Losses that fit a policy to comparisons directly, without a reward model in between.

What a policy prefers shows in its log-ratio to the reference policy: `beta` times it is the
reward that the policy would be optimal for. Sequences come in pairs [B, 2], the chosen one
first.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mbrl.losses.policy_gradient import average
from mbrl.losses.preference import bradley_terry_nll
from mbrl.types import Array, Metrics

DirectKind = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "ipo_sum", "kto"]
PER_TOKEN = ("sigmoid_norm", "ipo")
"""Kinds that compare means over the tokens of a sequence, where the others compare sums."""


def sequence_log_prob(log_prob: Array, mask: Array) -> Array:
    """Sum the log-probabilities of the tokens that count.

    Args:
      log_prob: [..., L] of each token; where the mask is false it may be anything.
      mask: bool [..., L].

    Returns:
      [...] nats.
    """
    return jnp.sum(jnp.where(mask, log_prob, 0.0), -1)


def robust_nll(difference: Array, smoothing: Array | float) -> Array:
    """Compute the pairwise loss whose mean over reversed labels is that of the right ones.

    Args:
      difference: [...] reward of the chosen one less that of the other, in nats.
      smoothing: [...] probability that a label is reversed, in [0, 1/2).

    Returns:
      [...], an unbiased estimate of the loss of clean labels; it may be negative.

    Reference: Provably Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    kept = (1.0 - smoothing) * bradley_terry_nll(difference, jnp.zeros_like(difference))
    reversed_ = smoothing * bradley_terry_nll(-difference, jnp.zeros_like(difference))
    return (kept - reversed_) / (1.0 - 2.0 * smoothing)


def kto_error(
    log_ratio: Array,
    desirable: Array,
    baseline: Array,
    beta: Array | float = 0.1,
    desirable_weight: Array | float = 1.0,
    undesirable_weight: Array | float = 1.0,
) -> Array:
    """Compute the loss of single answers that are merely called good or bad.

    Args:
      log_ratio: [...] log-probability of a sequence under the policy less under the reference.
      desirable: bool [...], the answer is good.
      baseline: [...] log-ratio that neither gains nor loses, see `kto_baseline`.
      beta: how steeply the gain saturates, per nat.
      desirable_weight: of the good answers.
      undesirable_weight: of the bad ones.

    Returns:
      [...] in [0, weight].

    Reference: KTO, Ethayarajh et al. 2024 (arXiv:2402.01306).
    """
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (log_ratio - baseline))


def kto_baseline(log_ratio: Array, weight: Array | None = None) -> Array:
    """Estimate the divergence of the policy from the reference over a batch, at least 0.

    Args:
      log_ratio: [...] of sequences that have nothing to do with what is fitted: in the paper
        the answers of a batch with the prompts of others.
      weight: [...] of each; None = all count.

    Returns:
      Scalar in nats; no gradient flows through it.
    """
    weight = jnp.ones(log_ratio.shape) if weight is None else weight
    return jax.lax.stop_gradient(jnp.maximum(average(log_ratio, weight), 0.0))


def direct_preference_error(
    log_ratio: Array,
    kind: DirectKind = "sigmoid",
    beta: Array | float = 0.1,
    smoothing: Array | float = 0.0,
    length: Array | None = None,
    baseline: Array | None = None,
) -> Array:
    """Compute the loss of each pair.

    Args:
      log_ratio: [B, 2] log-probability of the chosen and the rejected sequence under the
        policy less under the reference, summed over tokens.
      kind: 'sigmoid' = DPO, with `smoothing` cDPO; 'sigmoid_norm' = DPO on means over tokens;
        'robust' = unbiased under reversed labels; 'hinge' = SLiC; 'ipo' = squares, on means
        over tokens as its authors have it; 'ipo_sum' = on sums, as some libraries do; 'kto' =
        the mean over both answers of `kto_error`.
      beta: weight of the divergence from the reference, per nat; for 'ipo' half the inverse
        of the difference that is aimed at.
      smoothing: probability that a label is reversed ('sigmoid', 'sigmoid_norm', 'robust').
      length: [B, 2] tokens of the sequences; needed by 'sigmoid_norm' and 'ipo'.
      baseline: scalar for 'kto'; None = `kto_baseline` of these very pairs, which saves the
        evaluation of mismatched ones.

    Returns:
      [B].

    Raises:
      ValueError: for an unknown kind, pairs of another shape, a length that is missing, or
        smoothing where it has no meaning.

    Reference: Rafailov et al. 2023 (arXiv:2305.18290); Azar et al. 2023 (arXiv:2310.12036) for
    'ipo'; Zhao et al. 2023 (arXiv:2305.10425) for 'hinge'.
    """
    _check(log_ratio, kind, smoothing, length)
    if kind in PER_TOKEN and length is not None:
        log_ratio = log_ratio / jnp.maximum(length, 1)
    difference = log_ratio[:, 0] - log_ratio[:, 1]
    match kind:
        case "robust":
            return robust_nll(beta * difference, smoothing)
        case "hinge":
            return jax.nn.relu(1.0 - beta * difference)
        case "ipo" | "ipo_sum":
            return jnp.square(difference - 0.5 / beta)
        case "kto":
            base = kto_baseline(log_ratio) if baseline is None else baseline
            return kto_error(log_ratio, jnp.array([True, False]), base, beta).mean(-1)
    return bradley_terry_nll(beta * difference, jnp.zeros_like(difference), smoothing=smoothing)


def _check(log_ratio: Array, kind: str, smoothing: Array | float, length: Array | None) -> None:
    if kind not in get_args(DirectKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(DirectKind))}")
    if log_ratio.ndim != 2 or log_ratio.shape[1] != 2:
        raise ValueError(
            f"log_ratio: got shape {log_ratio.shape}, expected [B, 2], the chosen sequence first"
        )
    if kind in PER_TOKEN and (length is None or length.shape != log_ratio.shape):
        raise ValueError(
            f"length: got {None if length is None else length.shape}, expected the number of "
            f"tokens {log_ratio.shape}, since {kind!r} compares means over tokens; pass "
            "mask.sum(-1)"
        )
    if isinstance(smoothing, int | float):
        smooth = ("sigmoid", "sigmoid_norm", "robust")
        if smoothing and kind not in smooth:
            raise ValueError(f"smoothing: got {smoothing} for {kind!r}, expected 0; see {smooth}")
        if kind == "robust" and not 0.0 <= smoothing < 0.5:
            raise ValueError(
                f"smoothing: got {smoothing}, expected a probability in [0, 1/2); half of the "
                "labels reversed tell nothing"
            )


def direct_preference_loss(
    log_prob: Array,
    reference: Array,
    kind: DirectKind = "sigmoid",
    beta: Array | float = 0.1,
    smoothing: Array | float = 0.0,
    length: Array | None = None,
    baseline: Array | None = None,
    weight: Array | None = None,
) -> tuple[Array, Metrics]:
    """Fit a policy to pairs; its rewards and probabilities come along.

    Args:
      log_prob: [B, 2] of the chosen and the rejected sequence under the policy.
      reference: [B, 2] under the reference policy; no gradient flows through it.
      kind: see `direct_preference_error`; likewise the next four.
      beta: per nat.
      smoothing: a probability.
      length: [B, 2] tokens.
      baseline: scalar in nats.
      weight: [B] of each pair; None = all count.

    Returns:
      `(loss, metrics)`: a weighted mean, and scalars. Where `log_prob/chosen` falls together
      with `log_prob/rejected`, the policy moves to answers that nobody has compared.
    """
    weight = jnp.ones(log_prob.shape[:1]) if weight is None else weight
    log_ratio = log_prob - jax.lax.stop_gradient(reference)
    if kind == "kto" and baseline is None:
        baseline = kto_baseline(log_ratio, jnp.broadcast_to(weight[:, None], log_ratio.shape))
    error = direct_preference_error(log_ratio, kind, beta, smoothing, length, baseline)
    reward = implicit_reward(log_prob, reference, beta)
    leads = (1.0 + jnp.sign(reward[:, 0] - reward[:, 1])) / 2.0
    metrics = {
        "accuracy": average(leads, weight),
        "reward/chosen": average(reward[:, 0], weight),
        "reward/rejected": average(reward[:, 1], weight),
        "reward/margin": average(reward[:, 0] - reward[:, 1], weight),
        "log_prob/chosen": average(log_prob[:, 0], weight),
        "log_prob/rejected": average(log_prob[:, 1], weight),
    }
    return average(error, weight), metrics


def implicit_reward(log_prob: Array, reference: Array, beta: Array | float = 0.1) -> Array:
    """Return `beta (log_prob - reference)` [...]: the reward for which the policy is optimal,
    up to a constant per prompt.
    """
    return beta * (log_prob - reference)

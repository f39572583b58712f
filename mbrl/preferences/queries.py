"""Queries: which candidates to ask an annotator about, and how many in each session."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from mbrl.types import Array, Key

QueryKind = Literal["uniform", "disagreement", "entropy", "k_center"]
ScheduleKind = Literal["constant", "decaying"]


@partial(jax.jit, static_argnames=("kind", "num"))
def select(
    kind: QueryKind,
    key: Key,
    scores: Array,
    features: Array,
    num: int,
    asked: Array | None = None,
    asked_mask: Array | None = None,
) -> Array:
    """Choose which candidates to ask an annotator about.

    Args:
      kind: 'uniform' = at random. 'disagreement' = the largest variance over members of
        P(first better). 'entropy' = the largest entropy of the mean of that probability.
        For K > 2 both are means over all pairs. 'k_center' = greedily the one that is
        farthest from all that were chosen before.
      key: consumed; also breaks ties, so that equal candidates are drawn at random.
      scores: [N, M, K] of N reward models, for K segments of M candidates.
      features: [M, F] of each candidate, of similar scale: distances are Euclidean.
      num: how many of the M.
      asked: [Q, F] features of earlier queries, from which 'k_center' keeps away too.
      asked_mask: bool [Q], which of them there are; None = all.

    Returns:
      int32 [num] different rows of the candidates, the most wanted first.

    Raises:
      ValueError: for an unknown `kind`, or when `num` exceeds M.

    Reference: B-Pref, Lee et al. 2021 (arXiv:2111.03026); Sener and Savarese 2018
    (arXiv:1708.00489) for 'k_center'.
    """
    if kind not in get_args(QueryKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(QueryKind))}")
    candidates = scores.shape[1]
    if not 0 < num <= candidates:
        raise ValueError(
            f"num: got {num}, expected 1 to {candidates}, the candidates; sample more of them"
        )
    # Both ways of choosing prefer the first of equals: it is one at random.
    order = jax.random.permutation(key, candidates)
    if kind == "k_center":
        start = _distance(features, asked, asked_mask)
        return order[_farthest(features[order], start[order], num)].astype(jnp.int32)
    wanted = jnp.zeros(candidates) if kind == "uniform" else _uncertainty(kind, scores)
    return order[jax.lax.top_k(wanted[order], num)[1]].astype(jnp.int32)


def _uncertainty(kind: str, scores: Array) -> Array:
    i, j = np.triu_indices(scores.shape[2], 1)
    first = jax.nn.sigmoid(scores[..., i] - scores[..., j])
    if kind == "disagreement":
        return first.var(0).mean(-1)
    mean = first.mean(0)
    return jnp.mean(entr(mean) + entr(1.0 - mean), -1)


def _distance(features: Array, asked: Array | None, mask: Array | None) -> Array:
    """Return the squared distance [M] to the nearest earlier query, inf without any."""
    start = jnp.full(features.shape[0], jnp.inf)
    if asked is None:
        return start
    mask = jnp.ones(asked.shape[0], bool) if mask is None else mask

    def nearer(distance: Array, earlier: tuple[Array, Array]) -> tuple[Array, None]:
        point, there = earlier
        square = jnp.sum(jnp.square(features - point), -1)
        return jnp.where(there, jnp.minimum(distance, square), distance), None

    return jax.lax.scan(nearer, start, (asked, mask))[0]


def _farthest(features: Array, distance: Array, num: int) -> Array:
    def choose(distance: Array, _: None) -> tuple[Array, Array]:
        row = jnp.argmax(distance)
        square = jnp.sum(jnp.square(features - features[row]), -1)
        # Below every distance: duplicates of a chosen one come before the chosen one again.
        return jnp.minimum(distance, square).at[row].set(-1.0), row

    return jax.lax.scan(choose, distance, None, length=num)[1]


def schedule(
    total: int, sessions: int, kind: ScheduleKind = "decaying", first: float = 0.0
) -> np.ndarray:
    """Distribute labels over sessions.

    Args:
      total: labels.
      sessions: how often the annotator is asked.
      kind: 'constant', or 'decaying' as `1 / (1 + t)` with t from 0 to 1 over the sessions:
        the last asks for half as many as the first.
      first: share of all labels that the first session asks for, rounded down; `kind`
        rules the others. 0 = it is a session like any other.

    Returns:
      int [sessions], summing to `total`: shares are rounded down, then the largest
      remainders, earlier ones first, are rounded up.

    Raises:
      ValueError: for an unknown `kind`, a `first` outside [0, 1), too few sessions or a
        negative total.

    Reference: imitation, Gleave et al. 2022 (arXiv:2211.11972).
    """
    if kind not in get_args(ScheduleKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(ScheduleKind))}")
    if not 0.0 <= first < 1.0:
        raise ValueError(f"first: got {first}, expected a share in [0, 1); use for example 0.1")
    if total < 0:
        raise ValueError(f"total: got {total} labels, expected at least 0")
    upfront = first > 0.0
    if sessions < 1 + upfront:
        raise ValueError(
            f"sessions: got {sessions}, expected at least {1 + upfront}"
            + ("; with first > 0 others must follow the first" if upfront else "")
        )
    initial = [int(first * total + 1e-9)] if upfront else []
    t = np.linspace(0.0, 1.0, sessions - upfront)
    weight = np.ones_like(t) if kind == "constant" else 1.0 / (1.0 + t)
    exact = weight / weight.sum() * (total - sum(initial))
    share = np.floor(exact + 1e-9).astype(int)
    missing = total - sum(initial) - share.sum()
    share[np.argsort(share - exact, kind="stable")[:missing]] += 1
    return np.array([*initial, *share], int)

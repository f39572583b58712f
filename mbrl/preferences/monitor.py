"""Watches a reward that is learned from preferences for what an agent may make of its faults."""

from __future__ import annotations

import math
from typing import NamedTuple


class Session(NamedTuple):
    """One session of answers.

    Attributes:
      answers: how many were new.
      reward: mean learned reward of what the agent did at the time.
      agreement: share of the new answers that the reward had foretold.
    """

    answers: int
    reward: float
    agreement: float


class Overoptimization(NamedTuple):
    """What is told of a reward that is pursued where it is no longer right.

    Attributes:
      reward: mean learned reward before and now.
      agreement: with fresh answers before and now.
    """

    reward: tuple[float, float]
    agreement: tuple[float, float]


class Pursued(NamedTuple):
    """What an update of a policy has met.

    Attributes:
      learned: mean learned reward.
      true: mean true reward, or that of a judge who is asked about a few of the responses.
      error: standard error of `true`.
    """

    learned: float
    true: float
    error: float


def parted(updates: list[Pursued], window: int = 4) -> Overoptimization | None:
    """Tell whether the true reward has fallen while the learned one has risen.

    It has fallen when it did so by more than two standard errors.

    Args:
      updates: all so far, the oldest first.
      window: newest updates that are compared with as many before them.

    Returns:
      What has changed, with true rewards for the agreement; None while there are too few updates
      or there is no cause for alarm.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    if window < 1 or len(updates) < 2 * window:
        return None
    before, now = updates[-2 * window : -window], updates[-window:]
    learned = [sum(x.learned for x in part) / window for part in (before, now)]
    true = [sum(x.true for x in part) / window for part in (before, now)]
    error = math.sqrt(sum(x.error**2 for x in (*before, *now))) / window
    if learned[1] <= learned[0] or true[0] - true[1] <= 2.0 * error:
        return None
    return Overoptimization((learned[0], learned[1]), (true[0], true[1]))


def overoptimized(sessions: list[Session], window: int = 4) -> Overoptimization | None:
    """Tell whether the learned reward has risen while fresh answers came to contradict it.

    Agreement is a share of few answers: it has fallen when it did so by more than two standard
    errors.

    Args:
      sessions: all so far, the oldest first.
      window: newest sessions that are compared with as many before them.

    Returns:
      What has changed; None while there are too few sessions or there is no cause for alarm.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    if len(sessions) < 2 * window:
        return None
    before, now = sessions[-2 * window : -window], sessions[-window:]
    counts = [sum(x.answers for x in part) for part in (before, now)]
    if not all(counts):
        return None
    agreed = [sum(x.answers * x.agreement for x in part) for part in (before, now)]
    rewards = [sum(x.reward for x in part) / window for part in (before, now)]
    pooled = sum(agreed) / sum(counts)
    error = math.sqrt(pooled * (1.0 - pooled) * sum(1.0 / n for n in counts))
    shares = [a / n for a, n in zip(agreed, counts, strict=True)]
    if rewards[1] <= rewards[0] or shares[0] - shares[1] <= 2.0 * error:
        return None
    return Overoptimization((rewards[0], rewards[1]), (shares[0], shares[1]))

"""An alarm where the learned reward rises and fresh answers contradict it, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from mbrl.preferences.monitor import (
    Overoptimization,
    Pursued,
    Session,
    overoptimized,
    parted,
)


def sessions(*agreement: float, answers: int = 50, rising: bool = True) -> list[Session]:
    return [
        Session(answers, float(i if rising else -i), share) for i, share in enumerate(agreement)
    ]


def test_a_fall_of_agreement_under_a_rising_reward_is_told():
    found = overoptimized(sessions(0.9, 0.9, 0.6, 0.6), window=2)
    assert found == Overoptimization(reward=(0.5, 2.5), agreement=(0.9, 0.6))


@pytest.mark.parametrize(
    "history",
    [
        sessions(0.9, 0.9, 0.6),  # too few to tell
        sessions(0.9, 0.9, 0.6, 0.6, rising=False),  # nobody profits from it
        sessions(0.6, 0.6, 0.9, 0.9),  # answers come to agree
        sessions(0.9, 0.9, 0.6, 0.6, answers=0),  # nothing was answered
    ],
)
def test_nothing_else_is(history):
    assert overoptimized(history, window=2) is None


def test_few_answers_have_to_fall_further():
    # With 0.75 in all, two standard errors are 0.17 for 100 answers twice over, 0.55 for 5.
    assert overoptimized(sessions(0.9, 0.6, answers=50), window=1) is not None
    assert overoptimized(sessions(0.9, 0.6, answers=5), window=1) is None


def test_only_the_newest_sessions_count():
    assert overoptimized(sessions(0.2, 0.9, 0.9, 0.6, 0.6), window=2) is not None
    assert overoptimized(sessions(0.9, 0.9, 0.6, 0.6, 0.6, 0.6), window=2) is None


def test_sessions_count_by_their_answers():
    history = [Session(90, 0.0, 1.0), Session(10, 1.0, 0.0), Session(50, 2.0, 0.5)]
    history += [Session(50, 3.0, 0.5)]
    found = overoptimized(history, window=2)
    assert found is not None
    assert found.agreement == (0.9, 0.5)


def test_a_true_reward_that_falls_while_the_learned_one_rises_is_told() -> None:
    # A mean of two with an error of 0.1 each has one of 0.071, a difference of two 0.1.
    fallen = [Pursued(i, true, 0.1) for i, true in enumerate((1.0, 1.0, 0.75, 0.75))]
    found = parted(fallen, window=2)
    assert found is not None
    np.testing.assert_allclose(found.reward, (0.5, 2.5))
    np.testing.assert_allclose(found.agreement, (1.0, 0.75))
    assert parted([x._replace(error=0.13) for x in fallen], window=2) is None
    assert parted([x._replace(learned=1.0) for x in fallen], window=2) is None
    assert parted(fallen[::-1], window=2) is None
    assert parted(fallen[1:], window=2) is None

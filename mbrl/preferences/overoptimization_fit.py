"""How the true reward rises and falls with the distance at which a learned one is pursued."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp

from mbrl.types import Array

Pursuit = Literal["best_of_n", "rl"]


class Course(NamedTuple):
    """What was fitted, scalars in units of reward per square root of a nat.

    Attributes:
      alpha: how fast the true reward rises at first.
      beta: what takes it down again.
      r_squared: share of the variance of the true reward that the course explains.
    """

    alpha: Array
    beta: Array
    r_squared: Array


def fit_course(distance: Array, reward: Array, pursuit: Pursuit = "best_of_n") -> Course:
    """Fit the course of the true reward by least squares.

    With d = sqrt(KL) it is `d (alpha - beta d)` where the best of n was taken, and
    `d (alpha - beta log d)` where a policy was trained.

    Args:
      distance: [M] d, at least 0; at least two different ones above 0.
      reward: [M] true reward less that of the policy at d = 0.
      pursuit: 'best_of_n' or 'rl'.

    Returns:
      The `Course`.

    Raises:
      ValueError: for an unknown pursuit, or points that cannot tell alpha from beta.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    if distance.ndim != 1 or distance.shape != reward.shape or distance.shape[0] < 2:
        raise ValueError(
            f"distance, reward: got shapes {distance.shape} and {reward.shape}, expected two of "
            "[M] with at least 2 points"
        )
    rises, falls = _terms(distance, pursuit)
    solution = jnp.linalg.lstsq(jnp.stack([rises, -falls], 1), reward)[0]
    rest = reward - (solution[0] * rises - solution[1] * falls)
    spread = jnp.sum(jnp.square(reward - reward.mean()))
    tiny = jnp.finfo(jnp.float32).tiny
    return Course(
        solution[0], solution[1], 1.0 - jnp.sum(jnp.square(rest)) / jnp.maximum(spread, tiny)
    )


def course_at(course: Course, distance: Array, pursuit: Pursuit = "best_of_n") -> Array:
    """Return the reward [...] of a course at distances [...], see `fit_course`."""
    rises, falls = _terms(distance, pursuit)
    return course.alpha * rises - course.beta * falls


def summit(course: Course, pursuit: Pursuit = "best_of_n") -> Array:
    """Return the distance at which a course is highest; infinite where it never falls."""
    if pursuit == "rl":
        top = jnp.exp(course.alpha / course.beta - 1.0)
    else:
        top = 0.5 * course.alpha / course.beta
    return jnp.where(course.beta > 0.0, top, jnp.inf)


def _terms(distance: Array, pursuit: str) -> tuple[Array, Array]:
    if pursuit not in get_args(Pursuit):
        raise ValueError(f"pursuit: got {pursuit!r}, expected one of {list(get_args(Pursuit))}")
    if pursuit == "best_of_n":
        return distance, jnp.square(distance)
    return distance, distance * jnp.log(jnp.where(distance > 0.0, distance, 1.0))

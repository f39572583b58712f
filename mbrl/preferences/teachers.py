"""Synthetic annotators, who compare two segments by the true reward and have human faults."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mbrl.losses.preference import segment_scores
from mbrl.types import Array, Key


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """How an annotator deviates from always preferring the larger sum of rewards.

    Reference: B-Pref, Lee et al. 2021 (arXiv:2111.03026).
    """

    beta: float = math.inf
    """Rationality, per unit of reward: the first is preferred with probability
    `sigmoid(beta * difference)`; inf = always the better one."""
    myopia: float = 1.0
    """Weight `myopia^(L - 1 - t)` of step t: below 1 the late steps count most."""
    mistake: float = 0.0
    """Probability of saying the opposite."""
    skip: float = 0.0
    """No answer where neither sum exceeds this, in units of `scale`; 0 = always an answer."""
    equal: float = 0.0
    """Called equal where the sums differ by less than this, in units of `scale`."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning.

        Raises:
          ValueError: naming the field.
        """
        if not self.beta >= 0.0:
            raise ValueError(f"beta: got {self.beta}, expected at least 0; inf = no noise")
        if not 0.0 < self.myopia <= 1.0:
            raise ValueError(f"myopia: got {self.myopia}, expected a weight in (0, 1]")
        if not 0.0 <= self.mistake <= 1.0:
            raise ValueError(f"mistake: got {self.mistake}, expected a probability in [0, 1]")
        if not min(self.skip, self.equal) >= 0.0:
            raise ValueError(
                f"skip, equal: got {self.skip}, {self.equal}, expected thresholds of at least 0"
            )


TEACHERS = {
    "oracle": TeacherConfig(),
    "stochastic": TeacherConfig(beta=1.0),
    "myopic": TeacherConfig(myopia=0.9),
    "skip": TeacherConfig(skip=0.1),
    "mistake": TeacherConfig(mistake=0.1),
    "equal": TeacherConfig(equal=0.1),
}
"""The annotators of B-Pref with its settings; thresholds are relative, so give `scale`."""


def label_probabilities(config: TeacherConfig, reward: Array, scale: Array | float = 1.0) -> Array:
    """Compute how likely an annotator gives each answer.

    Thresholds are compared with plain sums, preferences are drawn from the myopic ones. A
    skipped pair is not called equal, and a pair that is called equal is not mistaken. Where
    the (myopic) sums are the very same, who is rational calls them equal, and who is not
    (`beta` is finite) throws a coin.

    Args:
      config: the annotator.
      reward: [M, 2, L] true reward of each step of two segments.
      scale: scalar, the unit of `skip` and `equal`; 1 = reward. In B-Pref it is the mean
        return of recent episodes times L over the length of an episode. Where returns are
        negative nothing is skipped and the magnitude serves `equal`.

    Returns:
      [M, 4]: the first is better, the second is better, equal, skipped; rows sum to 1.

    Raises:
      ValueError: when the reward is not that of pairs.
    """
    if reward.ndim != 3 or reward.shape[1] != 2:
        raise ValueError(f"reward: got shape {reward.shape}, expected [M, 2, L], pairs of segments")
    total = segment_scores(reward)
    weighted = segment_scores(reward[..., ::-1], config.myopia)
    difference = weighted[:, 0] - weighted[:, 1]
    same = difference == 0.0  # infinity times 0 is no number
    logit = jnp.where(same, 0.0, config.beta * jnp.where(same, 1.0, difference))
    first = jax.nn.sigmoid(logit)
    first = (1.0 - config.mistake) * first + config.mistake * (1.0 - first)
    threshold = config.skip * jnp.asarray(scale)
    skipped = (threshold > 0.0) & (total.max(1) <= threshold)
    equal = jnp.abs(total[:, 0] - total[:, 1]) < config.equal * jnp.abs(scale)
    if math.isinf(config.beta):
        equal = equal | same
    equal = equal & ~skipped
    answered = ~equal & ~skipped
    return jnp.stack([first * answered, (1.0 - first) * answered, equal, skipped], 1)


def teach(
    config: TeacherConfig, key: Key, reward: Array, scale: Array | float = 1.0
) -> tuple[Array, Array]:
    """Ask an annotator which of two segments is better.

    Args:
      config: the annotator.
      key: consumed.
      reward: [M, 2, L] true reward of each step of two segments.
      scale: see `label_probabilities`.

    Returns:
      `(rank, keep)`: int32 [M, 2], 0 = better or equal, 1 = worse, -1 where there is no
      answer; and bool [M], an answer was given.

    Raises:
      ValueError: when the reward is not that of pairs.
    """
    probabilities = label_probabilities(config, reward, scale)
    label = jax.random.categorical(key, jnp.log(probabilities))
    rank = jnp.array([[0, 1], [1, 0], [0, 0], [-1, -1]], jnp.int32)
    return rank[label], label != 3

"""Where a model knows what it does, judged by the data that it was fitted to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization
from mbrl.fitting import spread_rows
from mbrl.mdp import uncertainty_of
from mbrl.types import MDP, Array, Key, Params, Transition

MAX_ROWS = 4000
"""Recorded steps whose uncertainty is asked for, at most."""


class Halt(NamedTuple):
    """Arguments of `mbrl.mdp.halted`, both in units of reward.

    Attributes:
      threshold: [] uncertainty above which a step is unknown.
      penalty: [] cost of taking such a step.
    """

    threshold: Array
    penalty: Array


def no_halt() -> Halt:
    """Halt nowhere: before there is data, nothing is known to be unknown."""
    return Halt(jnp.asarray(jnp.inf), jnp.zeros(()))


def fit_halt(
    mdp: MDP, params: Params, key: Key, data: Transition, mask: Array, quantile: Array | float,
    margin: Array | float, steps: Array | float,
) -> Halt:  # fmt: skip
    """Choose where a model halts, and what that costs, from what was recorded.

    A step is unknown when the model is less certain of it than of a share `quantile` of the
    recorded ones. Beyond it, every step is as bad as the worst that was recorded, or as an end
    (whose steps are worth 0) if that is worse, by a margin of standard deviations of the reward.
    So neither other units of reward nor of observations change what is chosen.

    Reference: MOReL, Kidambi et al. 2020 (arXiv:2005.05951), where the threshold is the largest
    disagreement over a coefficient, and the reward of the halt a constant per task.

    Args:
      mdp: reports `Outcome.uncertainty`; its `init` takes observations.
      params: its parameters.
      key: consumed.
      data: recorded transitions [M, ...].
      mask: bool [M], which of them count.
      quantile: share in (0, 1] of recorded steps that are known, of `MAX_ROWS` evenly spread ones
        where there are more; 1 is their maximum, 0 halts nowhere. May be traced, as the next two.
      margin: standard deviations of the recorded reward.
      steps: how many steps the halt lasts, discounted: `1 / (1 - discount)` without end.

    Raises:
      ValueError: if the model was built without uncertainty.
    """
    # All members are asked about every row: a whole ring of them would not fit for long.
    rows, real = spread_rows(mask, min(MAX_ROWS, mask.shape[0]))
    obs, action = jax.tree.map(lambda x: x[rows], (data.obs, data.action))
    init_key, step_key = jax.random.split(key)
    outcome = mdp.step(params, step_key, mdp.init(params, init_key, obs), action)[1]
    found = uncertainty_of(outcome, "fit_halt")
    known = jnp.nanquantile(jnp.where(real, found, jnp.nan), quantile)
    some = mask.any() & (quantile > 0)
    worst = jnp.min(data.reward, where=mask, initial=0.0)
    spread = normalization.fit(data.reward[:, None], mask).std[0]
    penalty = (margin * spread - worst) * steps
    return Halt(jnp.where(some, known, jnp.inf), penalty)

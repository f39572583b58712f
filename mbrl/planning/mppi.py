"""Model-predictive path integral control."""

from __future__ import annotations

from mbrl.planning.config import PlannerConfig
from mbrl.planning.plans import Distribution, Gaussian, plan_space
from mbrl.planning.sampling import Recipe, sampling_planner, softmax_weights
from mbrl.planning.score import Prior, Value
from mbrl.types import MDP, Array, Planner


def mppi(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build MPPI: a softmax-weighted mean under noise of constant deviation `init_std`.

    The temperature is relative to the spread of the returns, so that one setting serves
    tasks of any reward scale.

    Reference: Williams et al. 2017 (arXiv:1707.02342).
    """
    space = plan_space(mdp.spec, config)

    def fit(
        dist: Distribution, plans: Array, weights: Array, momentum: float | Array
    ) -> Distribution:
        fitted = space.fit(dist, plans, weights, momentum)
        return fitted._replace(std=dist.std) if isinstance(fitted, Gaussian) else fitted

    recipe = Recipe(softmax_weights(config.temperature))
    return sampling_planner(mdp, config, space._replace(fit=fit), recipe, prior, value)

"""Random shooting: score uniformly drawn plans, act with the best."""

from __future__ import annotations

from mbrl.planning.config import PlannerConfig
from mbrl.planning.plans import Distribution, plan_space
from mbrl.planning.sampling import Recipe, elite_weights, sampling_planner
from mbrl.planning.score import Prior, Value
from mbrl.types import MDP, Array, Key, Planner


def random_shooting(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build a random-shooting planner; the best plan of the last step competes again.

    Reference: Nagabandi et al. 2017 (arXiv:1708.02596).
    """
    space = plan_space(mdp.spec, config)

    def sample(key: Key, dist: Distribution, population: int) -> Array:
        return space.uniform(key, space.mode(dist).shape[0], population)

    recipe = Recipe(elite_weights(1), num_kept=1, execute_best=True)
    return sampling_planner(mdp, config, space._replace(sample=sample), recipe, prior, value)

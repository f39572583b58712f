"""The cross-entropy method and its sample-efficient form, iCEM."""

from __future__ import annotations

from mbrl.planning.config import PlannerConfig
from mbrl.planning.plans import plan_space
from mbrl.planning.sampling import Recipe, elite_weights, sampling_planner
from mbrl.planning.score import Prior, Value
from mbrl.types import MDP, Planner


def cem(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build CEM as PETS uses it: truncated noise, act with the mean of the final fit.

    Reference: Chua et al. 2018 (arXiv:1805.12114).
    """
    space = plan_space(mdp.spec, config, truncate=True)
    return sampling_planner(mdp, config, space, Recipe(elite_weights(config.elites)), prior, value)


def icem(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build iCEM: coloured noise, kept and shifted elites, decaying population.

    Elites that are kept take the place of samples, so that `config.evaluations()` is
    exact. The mean joins the last population and the best plan is executed.

    Reference: Pinneri et al. 2020 (arXiv:2008.06389).
    """
    recipe = Recipe(
        elite_weights(config.elites),
        num_kept=max(1, round(config.keep_fraction * config.elites)),
        insert_mode=True,
        execute_best=True,
    )
    return sampling_planner(mdp, config, plan_space(mdp.spec, config), recipe, prior, value)

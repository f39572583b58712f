"""Planners over any `MDP`: random shooting, CEM, iCEM, MPPI, gradient ascent, tree search."""

from mbrl.planning.cem import cem, icem
from mbrl.planning.config import PETS_CEM, PlannerConfig, SearchConfig
from mbrl.planning.gradient import gradient
from mbrl.planning.mppi import mppi
from mbrl.planning.playout import playout_value
from mbrl.planning.score import Prior, Value
from mbrl.planning.search import Found, Search, search, tree_search, uniform_predictor
from mbrl.planning.shooting import random_shooting
from mbrl.types import MDP, Planner

PLANNERS = {
    "shooting": random_shooting,
    "cem": cem,
    "icem": icem,
    "mppi": mppi,
    "gradient": gradient,
    "search": tree_search,
}


def planner(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build the planner that `config.method` names; see `PLANNERS`.

    Raises:
      ValueError: for an unknown method.
    """
    if config.method not in PLANNERS:
        raise ValueError(f"planner.method: got {config.method!r}, expected one of {list(PLANNERS)}")
    return PLANNERS[config.method](mdp, config, prior, value)


__all__ = [
    "PETS_CEM",
    "PLANNERS",
    "Found",
    "PlannerConfig",
    "Search",
    "SearchConfig",
    "cem",
    "gradient",
    "icem",
    "mppi",
    "planner",
    "playout_value",
    "random_shooting",
    "search",
    "tree_search",
    "uniform_predictor",
]

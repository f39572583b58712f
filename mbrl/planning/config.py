"""Settings shared by all planners, validated where they are made."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mbrl.settings import check_whole, check_within

Method = Literal["shooting", "cem", "icem", "mppi", "gradient"]
Risk = Literal["mean", "lcb", "ucb", "cvar", "worst"]


@dataclasses.dataclass(frozen=True)
class PlannerConfig:
    """Model-predictive control. The defaults are iCEM at a budget that fits a CPU.

    Raises:
      ValueError: for impossible sizes, naming the field, its value and the fix.
    """

    method: Method = "icem"
    """shooting, cem (PETS), icem (Pinneri 2020), mppi (Williams 2017) or gradient."""
    horizon: int = 25
    """Steps of look-ahead H."""
    population: int = 48
    """Plans per iteration P; iCEM starts from it and decays, gradient: restarts."""
    iterations: int = 4
    """Refinements per action; gradient: optimizer steps."""
    particles: int = 5
    """Model rollouts Q per plan; a multiple of the members spreads them evenly."""
    elites: int = 10
    """cem, icem: plans that the next distribution is fitted to."""
    momentum: float = 0.1
    """cem, icem, mppi: share of the old mean and deviation that is kept (0 = none)."""
    init_std: float = 0.5
    """Initial deviation per step in half-ranges of the action; the sigma of MPPI."""
    noise_beta: float = 2.0
    """icem, mppi: exponent of the noise spectrum over time; 0 = white."""
    decay: float = 1.0
    """icem: factor by which the population shrinks per iteration, never below 2 x elites;
    any but 1 compiles each iteration by itself."""
    keep_fraction: float = 0.3
    """icem: share of the elites that is kept between iterations and between steps."""
    temperature: float = 0.5
    """mppi: softmax temperature in standard deviations of the returns."""
    learning_rate: float = 0.1
    """gradient: Adam step size in half-ranges of the action (or logits)."""
    discount: float = 1.0
    """Discount per step inside the horizon."""
    risk: Risk = "mean"
    """Measure over particles."""
    risk_coef: float = 1.0
    """lcb, ucb: standard deviations; cvar: tail share in (0, 1]."""
    prior_plans: int = 0
    """Plans per iteration that come from rolling out the policy prior."""

    def __post_init__(self) -> None:
        check_whole(
            self, "horizon", "population", "iterations", "particles", "elites", prefix="planner."
        )
        check_whole(self, "prior_plans", least=0, prefix="planner.")
        check_within(self, "momentum", 0, 1, prefix="planner.")
        check_within(self, "init_std", 0, ends="(]", prefix="planner.")
        check_within(self, "noise_beta", 0, prefix="planner.")
        check_within(self, "decay", 1, prefix="planner.")
        check_within(self, "keep_fraction", 0, 1, prefix="planner.")
        check_within(self, "temperature", 0, ends="(]", prefix="planner.")
        check_within(self, "learning_rate", 0, prefix="planner.")
        check_within(self, "discount", 0, 1, prefix="planner.")
        if self.risk not in get_args(Risk):
            raise ValueError(
                f"planner.risk: got {self.risk!r}, expected one of {', '.join(get_args(Risk))}"
            )
        if self.risk == "cvar":
            check_within(self, "risk_coef", 0, 1, "(]", prefix="planner.")
        if self.method in ("cem", "icem") and self.elites > self.population:
            raise ValueError(
                f"planner.elites must not exceed planner.population, got {self.elites} > "
                f"{self.population}; lower elites or raise population"
            )
        if self.prior_plans >= min(populations(self)):
            raise ValueError(
                f"planner.prior_plans must be smaller than the population of every iteration, got "
                f"{self.prior_plans} with {populations(self)}; lower it or raise population"
            )

    def evaluations(self) -> int:
        """Count the model evaluations (plans x particles x steps) of one action."""
        plans = sum(populations(self))
        if self.method == "gradient":
            plans += self.population
        return plans * self.particles * self.horizon


def populations(config: PlannerConfig) -> list[int]:
    """List the population of every iteration; only iCEM's shrinks."""
    if config.method == "shooting":
        return [config.population]
    if config.method != "icem":
        return [config.population] * config.iterations
    floor = min(config.population, 2 * config.elites)
    return [
        max(floor, round(config.population * config.decay**-i)) for i in range(config.iterations)
    ]


PETS_CEM = PlannerConfig(
    method="cem", horizon=25, population=400, iterations=5, particles=20, elites=40
)
"""The planner of Chua et al. 2018 (arXiv:1805.12114): 1,000,000 model evaluations a step."""

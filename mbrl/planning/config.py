"""Settings shared by all planners, validated where they are made."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mbrl.settings import check_whole, check_within

Method = Literal["shooting", "cem", "icem", "mppi", "gradient", "search"]
SearchMethod = Literal["gumbel", "puct"]
Risk = Literal["mean", "lcb", "ucb", "cvar", "worst"]


@dataclasses.dataclass(frozen=True)
class PlannerConfig:
    """Model-predictive control. The defaults are iCEM at a budget that fits a CPU.

    Raises:
      ValueError: for impossible sizes, naming the field, its value and the fix.
    """

    method: Method = "icem"
    """shooting, cem (PETS), icem (Pinneri 2020), mppi (Williams 2017), gradient or search
    (Danihelka 2022), which reads horizon, population, elites and discount alone."""
    horizon: int = 25
    """Steps of look-ahead H; search: of the deepest leaf."""
    population: int = 48
    """Plans per iteration P; iCEM starts from it and decays, gradient: restarts, search:
    simulations."""
    iterations: int = 4
    """Refinements per action; gradient: optimizer steps."""
    particles: int = 5
    """Model rollouts Q per plan; a multiple of the members spreads them evenly."""
    elites: int = 10
    """cem, icem: plans that the next distribution is fitted to; search: candidate actions per
    node (Box)."""
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
        """Count the model evaluations of one action: plans x particles x steps, or simulations."""
        if self.method == "search":
            return self.population
        plans = sum(populations(self))
        if self.method == "gradient":
            plans += self.population
        return plans * self.particles * self.horizon


def populations(config: PlannerConfig) -> list[int]:
    """List the population of every iteration; only iCEM's shrinks."""
    if config.method in ("shooting", "search"):
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


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Tree search. The defaults are those of mctx and of EfficientZero V2. Floats may be traced.

    Raises:
      ValueError: for impossible settings, naming the field, its value and the fix.
    """

    method: SearchMethod = "gumbel"
    """gumbel (Danihelka 2022: sequential halving, few simulations) or puct (MuZero)."""
    simulations: int = 32
    """Model evaluations per root (EfficientZero V2: 32, MuZero: 50 on Atari, 800 in Go)."""
    max_considered: int = 16
    """gumbel: actions tried at the root (mctx); at most `simulations` and all there are."""
    candidates: int = 16
    """Box: sampled actions K per node (EfficientZero V2)."""
    discount: float = 0.997
    """gamma per step (MuZero on Atari); multiplies the survival that the model predicts."""
    two_player: bool = False
    """Players alternate: rewards and values are those of whoever moves, and change sign."""
    max_depth: int = 0
    """Steps from the root to the deepest node; 0 = as deep as simulations reach (mctx)."""
    dirichlet_fraction: float = 0.25
    """puct: share of noise in the prior of the root (AlphaZero)."""
    dirichlet_alpha: float = 0.3
    """puct: concentration of that noise (AlphaZero in chess, MuZero on Atari: 0.25)."""
    value_scale: float = 0.1
    """gumbel: weight of values against logits, per visit (Danihelka 2022 on Atari, mctx)."""
    maxvisit_init: float = 50.0
    """gumbel: visits added to those of the most visited action in that weight (mctx)."""
    pb_c_init: float = 1.25
    """puct: weight of the prior against values in [0, 1] (MuZero)."""
    pb_c_base: float = 19652.0
    """puct: visits after which that weight grows (MuZero)."""
    std: float = 0.5
    """Box: deviation in half-ranges where the predictor gives the mean alone."""
    flatten: float = 3.0
    """Box: deviation of half of the candidates in units of the policy's (EfficientZero V2); 1 =
    all are drawn from the policy (Sampled MuZero)."""

    def __post_init__(self) -> None:
        if self.method not in get_args(SearchMethod):
            raise ValueError(
                f"search.method: got {self.method!r}, expected one of "
                f"{', '.join(get_args(SearchMethod))}"
            )
        check_whole(self, "simulations", "max_considered", "candidates", prefix="search.")
        check_whole(self, "max_depth", least=0, prefix="search.")
        check_within(self, "discount", 0, 1, prefix="search.")
        check_within(self, "dirichlet_fraction", 0, 1, prefix="search.")
        check_within(self, "flatten", 1, prefix="search.")
        for name in ("dirichlet_alpha", "value_scale", "pb_c_base", "std"):
            check_within(self, name, 0, ends="(]", prefix="search.")
        for name in ("maxvisit_init", "pb_c_init"):
            check_within(self, name, 0, prefix="search.")

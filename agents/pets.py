"""PETS: plan through a probabilistic ensemble that learns dynamics, reward and termination.

Reference: Chua et al. 2018 (arXiv:1805.12114). The default planner is iCEM at a budget
that fits a CPU; `--planner.method cem` with `mbrl.planning.PETS_CEM` is the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mbrl import optim, replay, spaces
from mbrl.fitting import Fit, FitConfig, fit_members
from mbrl.mdp import SplitParams, penalized, with_reward
from mbrl.models.probabilistic import ProbabilisticEnsemble, Target, probabilistic_ensemble
from mbrl.models.propagation import EnsembleState, Propagation
from mbrl.models.reward import RewardModel, RewardState, given_reward, reward_model
from mbrl.models.termination import cautious
from mbrl.models.value import ValueModel, ValueState, terminal_value, value_model
from mbrl.planning import PlannerConfig, planner
from mbrl.settings import check_whole, check_within
from mbrl.types import (
    Agent,
    Array,
    Batch,
    EnvSpec,
    Key,
    Metrics,
    Mode,
    Network,
    Planner,
    SampleSpec,
    reset_rows,
)

VALUE_FIT = FitConfig(batch_size=256, max_epochs=5, bootstrap=False)
"""Short, because every round of value iteration has another; members differ by their start."""


@dataclasses.dataclass(frozen=True)
class PETSConfig:
    """Settings of PETS; sources are the paper (P) or measured on small tasks here (M)."""

    members: int = 5
    """Networks in the ensemble N (P)."""
    elites: int = 5
    """Members that plan, best on held-out data first (P: all)."""
    hidden: tuple[int, ...] = (128, 128)
    """Hidden layers of each member (P: 3 x 500 or 4 x 200; smaller for CPU, M)."""
    propagation: Propagation = "ts1"
    """How particles move through the ensemble: ts1, tsinf, mean or moment_matching (P)."""
    targets: tuple[Target, ...] = ("delta",)
    """What is predicted of the next observation: delta, absolute or angle (P); one for all
    dimensions of the flattened observation, or one each."""
    learn_bounds: bool = True
    """Learn the log-variance bounds (P)."""
    nll_beta: float = 0.0
    """Weight rows of the likelihood by their variance to this power; 0.5 for contacts (M)."""
    reward: Literal["head", "gaussian", "two_hot"] = "head"
    """Output of the ensemble, or a model of its own; two_hot for rare and huge rewards."""
    learning_rate: float = 5e-3
    """Adam step size; weights are averaged, which allows a large one (P: 1e-3, M)."""
    weight_decay: float = 5e-5
    """Decoupled decay of the network kernels (P, per layer there)."""
    clip_norm: float = 100.0
    """Gradient norm above which a member's own gradient is scaled down (M)."""
    batch_size: int = 64
    """Transitions per member and gradient step (P: 32)."""
    max_epochs: int = 50
    """Passes over the data per model update at most (M)."""
    patience: int = 5
    """Epochs without held-out improvement after which a member stops (MBPO)."""
    termination_epochs: int = 10
    """Passes over the data per update of the termination model, which has no holdout (M)."""
    holdout: float = 0.1
    """Share of transitions that is held out (MBPO: 0.2)."""
    bootstrap: bool = True
    """Resample the data per member (P)."""
    random_steps: int = 200
    """Environment steps of uniform actions before the first update (P: one episode)."""
    train_every: int = 50
    """Environment steps between model updates (P: one episode)."""
    capacity: int = 10_000
    """Records kept in replay."""
    value_rounds: int = 0
    """Rounds of fitted value iteration per update, for plans that end in a learned value,
    discounted by `planner.discount`; 0 = plans end in nothing (P). 8 for survival (M)."""
    penalty: float = 0.0
    """Reward subtracted per standard deviation of model disagreement; < 0 is optimism."""
    dtype: str = "float32"
    """Precision of the matrix products, float32 or bfloat16."""
    planner: PlannerConfig = PlannerConfig()
    """Model-predictive control."""

    def __post_init__(self) -> None:
        check_whole(
            self, "members", "elites", "batch_size", "max_epochs", "patience",
            "termination_epochs", "train_every", "capacity",
        )  # fmt: skip
        check_whole(self, "random_steps", least=0)
        check_whole(self, "value_rounds", least=0)
        check_within(self, "nll_beta", 0, 1)
        check_within(self, "learning_rate", 0)
        check_within(self, "weight_decay", 0)
        check_within(self, "clip_norm", 0, ends="(]")
        check_within(self, "holdout", 0, 1, "[)")
        if self.elites > self.members:
            raise ValueError(
                f"elites must not exceed members, got {self.elites} > {self.members}; lower "
                "elites or raise members"
            )
        endless = not isinstance(self.planner.discount, Array) and self.planner.discount >= 1
        if self.value_rounds and endless:
            raise ValueError(
                f"planner.discount must be below 1 where a value is learned, got "
                f"{self.planner.discount} with value_rounds={self.value_rounds}; pass for example "
                "--planner.discount 0.99, or --value-rounds 0"
            )


class PETSState(NamedTuple):
    """Everything PETS learns; `reward` and `value` are None unless they are learned apart."""

    model: EnsembleState
    opt_state: optax.OptState
    termination_opt_state: optax.OptState
    reward: RewardState | None = None
    reward_opt_state: optax.OptState | None = None
    value: ValueState | None = None
    value_opt_state: optax.OptState | None = None


class PETSCarry(NamedTuple):
    """Acting state: the planner's warm start, leaves [E, ...]."""

    plan: Any


def make_pets(
    spec: EnvSpec,
    config: PETSConfig = PETSConfig(),
    network: Callable[[int], Network] | None = None,
    reward_fn: Callable[[Any, Array, Any], Array] | None = None,
) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task; actions Box (bounded) or Discrete.
      config: see `PETSConfig`. Float fields may be traced.
      network: `(out) -> Network` of one member, to replace the default MLP.
      reward_fn: known reward `(obs, action, next_obs) -> [B]`, to plan with instead of a
        learned one.

    Raises:
      ValueError: for tasks that PETS cannot model, and impossible settings.
    """
    spaces.check_one_player(spec, "PETS")
    _check(spec, config, reward_fn is not None)
    model, reward, value = _models(spec, config, network)
    source = reward if reward_fn is None else given_reward(reward_fn)
    uses_penalty = not (isinstance(config.penalty, float) and config.penalty == 0.0)
    mdp = model.mdp(config.propagation, uncertainty=uses_penalty)
    mdp = mdp if source is None else with_reward(mdp, source)
    mdp = penalized(mdp, config.penalty) if uses_penalty else mdp
    optimizer = _optimizer(config)
    fit_config = FitConfig(
        config.batch_size, config.max_epochs, config.patience, bootstrap=config.bootstrap
    )
    ending_config = FitConfig(config.batch_size, config.termination_epochs, bootstrap=False)

    def controller(after: ValueState | None = None) -> Planner:
        if value is None or after is None:
            return planner(mdp, config.planner)
        return planner(mdp, config.planner, value=terminal_value(value, after, mdp))

    def planning_params(state: PETSState, mode: Mode) -> Any:
        model = _cautious(state.model) if mode == "greedy" else state.model
        return model if source is None else SplitParams(model, state.reward)

    def init(key: Key) -> PETSState:
        state = model.init(key)
        ending = optimizer.init(state.termination.weights)
        learned = PETSState(state, optimizer.init(state.weights), ending)
        if reward is not None:
            head = reward.init(jax.random.fold_in(key, 1))
            learned = learned._replace(reward=head, reward_opt_state=optimizer.init(head.weights))
        if value is not None:
            after = value.init(jax.random.fold_in(key, 2))
            learned = learned._replace(value=after, value_opt_state=optimizer.init(after.weights))
        return learned

    def begin(num_envs: int) -> PETSCarry:
        return PETSCarry(controller().init(num_envs))

    def act(
        state: PETSState, carry: PETSCarry, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Array, PETSCarry, Any]:
        num_envs = is_first.shape[0]
        carry = reset_rows(is_first, begin(num_envs), carry)
        if mode == "random":
            return spaces.sample(spec.action, key, (num_envs,)), carry, ()
        init_key, plan_key = jax.random.split(key)
        params = planning_params(state, mode)
        start = mdp.init(params, init_key, obs)
        action, warm, _ = controller(state.value).plan(params, plan_key, start, carry.plan)
        return action, PETSCarry(warm), ()

    def update(state: PETSState, batch: Batch, key: Key) -> tuple[PETSState, Metrics, None]:
        data, valid = replay.transitions(batch)
        num_envs, rows = batch.valid.shape
        holdout = replay.holdout_mask((num_envs, rows), config.holdout).reshape(-1)
        train, held = valid & ~holdout, valid & holdout
        model_key, ending_key, reward_key, value_key = jax.random.split(key, 4)
        fit = Fitter(optimizer, data, held)

        params = model.standardize(state.model, data, valid)
        params, fitted = fit(
            model, params, state.opt_state, train, model_key, fit_config, model.error
        )
        ending = model.termination.standardize(params.termination, data, valid)
        ending, ending_fit = fit(
            model.termination, ending, state.termination_opt_state,
            valid & ending.unexplained, ending_key, ending_config,
        )  # fmt: skip
        elites = jnp.argsort(fitted.error)[: config.elites]
        params = params._replace(elites=elites, termination=ending)
        state = state._replace(
            model=params, opt_state=fitted.opt_state, termination_opt_state=ending_fit.opt_state
        )
        metrics = _metrics("model", fitted.opt_state, fitted.metrics)
        metrics |= _metrics("termination", ending_fit.opt_state, ending_fit.metrics)
        if reward is not None:
            head = reward.standardize(cast(RewardState, state.reward), data, valid)
            head, fitted = fit(
                reward, head, state.reward_opt_state, train, reward_key, fit_config, reward.error
            )
            state = state._replace(reward=head, reward_opt_state=fitted.opt_state)
            metrics |= _metrics("reward", fitted.opt_state, fitted.metrics)
        if value is not None:
            state, found = _iterate_value(
                value, optimizer, state, batch, value_key, config.value_rounds
            )
            metrics |= found
        return state, metrics, None

    sampling = SampleSpec("all", config.capacity, config.random_steps, config.train_every)
    return Agent(init, begin, act, update, sampling)


def _models(
    spec: EnvSpec, config: PETSConfig, network: Callable[[int], Network] | None
) -> tuple[ProbabilisticEnsemble, RewardModel | None, ValueModel | None]:
    model = probabilistic_ensemble(
        spec, config.members, config.hidden, config.targets, config.elites,
        config.learn_bounds, config.nll_beta, network, config.dtype,
    )  # fmt: skip
    reward = value = None
    if config.reward != "head":
        reward = reward_model(
            spec, config.members, kind=config.reward, network=network, dtype=config.dtype
        )
    if config.value_rounds:
        value = value_model(spec, config.planner.discount, config.members, network=network)
    return model, reward, value


def _optimizer(config: PETSConfig) -> optax.GradientTransformation:
    return optim.apply_if_finite_counted(
        optax.chain(
            optim.clip_by_member_norm(config.clip_norm),
            optax.adamw(
                config.learning_rate, weight_decay=config.weight_decay, mask=optim.decay_mask
            ),
        )
    )


class Fitter(NamedTuple):
    """Fit the weights of one part of the agent to rows [M, ...]; `held` [M] are kept back."""

    optimizer: optax.GradientTransformation
    data: Any
    held: Array

    def __call__(
        self, part: Any, params: Any, opt_state: Any, rows: Array, key: Key, config: FitConfig,
        error: Any = None,
    ) -> tuple[Any, Fit]:  # fmt: skip
        """Return the parameters with fitted weights, and how the fit went."""
        fit = fit_members(
            lambda weights, rows: part.loss(weights, params, rows),
            error and (lambda weights, rows, mask: error(weights, params, rows, mask)),
            self.optimizer, params.weights, opt_state, self.data, rows, self.held, key, config,
        )  # fmt: skip
        return params._replace(weights=fit.weights), fit


def _iterate_value(
    value: ValueModel, optimizer: Any, state: PETSState, batch: Batch, key: Key, rounds: int
) -> tuple[PETSState, Metrics]:
    """Alternate between bootstrapped returns of the whole replay and a fit to them."""
    rows = batch.valid.reshape(-1)

    def iterate(carry: Any, key: Key) -> Any:
        params, opt_state = carry
        returns = value.returns(params, batch)
        params = value.standardize(params, returns, rows)
        fit = Fitter(optimizer, returns, jnp.zeros_like(rows))
        params, fitted = fit(value, params, opt_state, rows, key, VALUE_FIT)
        return (params, fitted.opt_state), fitted.metrics

    start = cast(ValueState, state.value), state.value_opt_state
    (params, opt_state), found = jax.lax.scan(iterate, start, jax.random.split(key, rounds))
    metrics = _metrics("value", opt_state, jax.tree.map(lambda x: x[-1], found))
    metrics["value/mean"] = params.units.mean
    return state._replace(value=params, value_opt_state=opt_state), metrics


def _cautious(model: EnsembleState) -> EnsembleState:
    return model._replace(termination=cautious(model.termination))


def _metrics(part: str, opt: Any, metrics: Metrics) -> Metrics:
    found = {name.replace("model", part, 1): value for name, value in metrics.items()}
    return found | optim.skipped(opt, part)


def _check(spec: EnvSpec, config: PETSConfig, reward_given: bool) -> None:
    if reward_given and config.reward != "head":
        raise ValueError(
            f"reward_fn: a given reward leaves nothing to learn, got it with reward="
            f"{config.reward!r}; leave one of them out"
        )
    spaces.check_no_images(spec, "PETS")

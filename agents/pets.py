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

from agents.sac import rewarded
from mbrl import replay, spaces
from mbrl.exploitation import newest_exploitation
from mbrl.fitting import FitConfig
from mbrl.halting import Halt, fit_halt, no_halt
from mbrl.mdp import RewardFn, SplitParams, halted, with_reward
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    FittedEnsemble,
    Fitter,
    World,
    build_ensemble,
    curious_world,
    ensemble_optimizer,
    ensemble_world,
    fit_config,
    fit_ensemble,
    init_ensemble,
    part_metrics,
)
from mbrl.models.hallucination import executed_action
from mbrl.models.probabilistic import ProbabilisticEnsemble
from mbrl.models.propagation import EnsembleState, Weights
from mbrl.models.reward import RewardModel, RewardState, given_reward, reward_model
from mbrl.models.termination import cautious
from mbrl.models.value import ValueModel, ValueState, terminal_value, value_model
from mbrl.planning import PlannerConfig, planner
from mbrl.settings import check_choice, check_whole, check_within
from mbrl.types import (
    MDP,
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
class PETSConfig(EnsembleConfig):
    """Settings of PETS; sources are the paper (P) or measured on small tasks here (M)."""

    reward: Literal["head", "gaussian", "two_hot"] = "head"
    """Output of the ensemble, or a model of its own; two_hot for rare and huge rewards."""
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
    explore: Literal["reward", "disagreement", "hallucinated"] = "reward"
    """What actions are planned for while exploring: the same reward as in evaluation; the
    disagreement of the members alone (Plan2Explore, OPAX); or the reward in the most favourable
    plausible model, by hallucinated control (H-UCRL), which leaves `penalty` to evaluation."""
    optimism: float = 1.0
    """Epistemic standard deviations within which a model is plausible (hallucinated)."""
    halt: float = 0.0
    """Share of the recorded steps whose disagreement the model is trusted at; plans end beyond it
    (MOReL). 1 trusts the worst of them, 0 never halts."""
    halt_margin: float = 1.0
    """Standard deviations of reward by which each step there is worse than all recorded ones."""
    planner: PlannerConfig = PlannerConfig()
    """Model-predictive control."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "train_every", "capacity")
        check_whole(self, "random_steps", "value_rounds", least=0)
        check_choice(self, "explore", ("reward", "disagreement", "hallucinated"))
        check_within(self, "optimism", 0)
        check_within(self, "halt", 0, 1)
        check_within(self, "halt_margin", 0)
        endless = not isinstance(self.planner.discount, Array) and self.planner.discount >= 1
        if self.value_rounds and endless:
            raise ValueError(
                f"planner.discount must be below 1 where a value is learned, got "
                f"{self.planner.discount} with value_rounds={self.value_rounds}; pass for example "
                "--planner.discount 0.99, or --value-rounds 0"
            )


class PETSState(NamedTuple):
    """Everything PETS learns; `reward` and `value` are None unless they are learned apart,
    `posterior` unless the members are samples of it, `halt` unless plans halt.
    """

    model: EnsembleState
    opt_state: optax.OptState
    termination_opt_state: optax.OptState
    posterior: Weights | None = None
    reward: RewardState | None = None
    reward_opt_state: optax.OptState | None = None
    value: ValueState | None = None
    value_opt_state: optax.OptState | None = None
    halt: Halt | None = None


class PETSCarry(NamedTuple):
    """Acting state: the planner's warm start, leaves [E, ...]; `exploring` is that of another
    planner, where what is planned for while exploring is something else.
    """

    plan: Any
    exploring: Any = ()


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
        learned one, and in place of the recorded one in whatever is learned.

    Raises:
      ValueError: for tasks that PETS cannot model, and impossible settings.
    """
    spaces.check_one_player(spec, "PETS")
    _check(spec, config, reward_fn is not None)
    model, reward, value = _models(spec, config, network)
    source = reward if reward_fn is None else given_reward(reward_fn)
    believed = _world(model, config, source)
    halts = not (isinstance(config.halt, float) and config.halt == 0.0)
    mdp = ensemble_world(model, config, source, config.penalty, reports=halts)
    explored = mdp if config.explore == "reward" else _explored(spec, config, model, source)
    optimizer = ensemble_optimizer(config)

    def controller(
        world: MDP, after: ValueState | None = None, halt: Halt | None = None
    ) -> Planner:
        # Who explores is after what is unknown; what follows a plan is worth a return of the
        # reward, not of disagreement.
        trusted = world if halt is None or world is not mdp else halted(world, *halt)
        curious = config.explore == "disagreement" and world is explored
        if value is None or after is None or curious:
            return planner(trusted, config.planner)
        return planner(trusted, config.planner, value=terminal_value(value, after, world))

    def planning_params(state: PETSState, mode: Mode) -> Any:
        model = _cautious(state.model) if mode == "greedy" else state.model
        return model if source is None else SplitParams(model, state.reward)

    def init(key: Key) -> PETSState:
        learned = PETSState(**init_ensemble(model, optimizer, key)._asdict())
        if reward is not None:
            head = reward.init(jax.random.fold_in(key, 1))
            learned = learned._replace(reward=head, reward_opt_state=optimizer.init(head.weights))
        if value is not None:
            after = value.init(jax.random.fold_in(key, 2))
            learned = learned._replace(value=after, value_opt_state=optimizer.init(after.weights))
        return learned._replace(halt=no_halt()) if halts else learned

    def begin(num_envs: int) -> PETSCarry:
        exploring = () if explored is mdp else controller(explored).init(num_envs)
        return PETSCarry(controller(mdp).init(num_envs), exploring)

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
        if mode == "greedy" or explored is mdp:
            plan = controller(mdp, state.value, state.halt).plan
            action, warm, _ = plan(params, plan_key, start, carry.plan)
            return action, carry._replace(plan=warm), ()
        plan = controller(explored, state.value).plan
        action, warm, _ = plan(params, plan_key, start, carry.exploring)
        if config.explore == "hallucinated":
            action = executed_action(spec.action, action)
        return action, carry._replace(exploring=warm), ()

    def update(state: PETSState, batch: Batch, key: Key) -> tuple[PETSState, Metrics, None]:
        batch = _relabelled(batch, reward_fn)
        data, valid = replay.transitions(batch)
        num_envs, rows = batch.valid.shape
        holdout = replay.holdout_mask((num_envs, rows), config.holdout).reshape(-1)
        model_key, ending_key, reward_key, value_key, gap_key = jax.random.split(key, 5)
        compared = newest_exploitation(
            believed.mdp, believed.params(state), gap_key, batch, data, config.train_every,
            state.model.targets.count > 0,
        )  # fmt: skip
        fit = Fitter(optimizer, data, valid & holdout)
        ensemble = FittedEnsemble(
            state.model, state.opt_state, state.termination_opt_state, state.posterior
        )
        ensemble, metrics = fit_ensemble(model, config, ensemble, fit, valid, model_key, ending_key)
        metrics |= compared
        state = state._replace(**ensemble._asdict())
        if reward is not None:
            head = reward.standardize(cast(RewardState, state.reward), data, valid)
            head, fitted = fit(
                reward, head, state.reward_opt_state, valid & ~holdout, reward_key,
                fit_config(config), reward.error,
            )  # fmt: skip
            state = state._replace(reward=head, reward_opt_state=fitted.opt_state)
            metrics |= part_metrics("reward", fitted.opt_state, fitted.metrics)
        if value is not None:
            state, found = _iterate_value(
                value, optimizer, state, batch, value_key, config.value_rounds
            )
            metrics |= found
        if halts:
            state = state._replace(halt=fit_halt(
                mdp, planning_params(state, "explore"), jax.random.fold_in(key, 1), data, valid,
                config.halt, config.halt_margin, _plan_length(config.planner, value is not None),
            ))  # fmt: skip
        return state, metrics, None

    sampling = SampleSpec("all", config.capacity, config.random_steps, config.train_every)
    return Agent(init, begin, act, update, sampling)


def world(spec: EnvSpec, config: PETSConfig) -> World:
    """Build the model of an agent, with the reward that it has learned."""
    model, reward, _ = _models(spec, config, None)
    return _world(model, config, reward)


def _world(model: ProbabilisticEnsemble, config: PETSConfig, source: RewardFn | None) -> World:
    def params(state: PETSState) -> Any:
        return state.model if source is None else SplitParams(state.model, state.reward)

    return World(model, ensemble_world(model, config, source), params, lambda state: state.model)


def _models(
    spec: EnvSpec, config: PETSConfig, network: Callable[[int], Network] | None
) -> tuple[ProbabilisticEnsemble, RewardModel | None, ValueModel | None]:
    model = build_ensemble(spec, config, network)
    reward = value = None
    if config.reward != "head":
        reward = reward_model(
            spec, config.members, kind=config.reward, network=network, dtype=config.dtype
        )
    if config.value_rounds:
        value = value_model(spec, config.planner.discount, config.members, network=network)
    return model, reward, value


def _explored(
    spec: EnvSpec, config: PETSConfig, model: ProbabilisticEnsemble, source: RewardFn | None
) -> MDP:
    """Build what is planned in while exploring for something other than the reward."""
    if config.explore == "disagreement":
        return curious_world(model, config, source)
    explored = model.hallucinated(
        config.optimism, config.uncertainty, config.uncertainty_scale, source is None
    )
    if source is None:
        return explored

    def executed(params: Any, obs: Any, action: Array, next_obs: Any) -> tuple[Array, Array]:
        return source(params, obs, executed_action(spec.action, action), next_obs)

    return with_reward(explored, executed)


def _relabelled(batch: Batch, reward_fn: Callable[[Any, Array, Any], Array] | None) -> Batch:
    """Replace the rewards of a ring by known ones: of records, which pay for the step before."""
    if reward_fn is None:
        return batch
    data = rewarded(replay.transitions(batch)[0], reward_fn)
    paid = jnp.where(batch.valid, data.reward.reshape(batch.valid.shape), 0.0)
    return batch._replace(record=batch.record._replace(reward=jnp.roll(paid, 1, 1)))


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
    metrics = part_metrics("value", opt_state, jax.tree.map(lambda x: x[-1], found))
    metrics["value/mean"] = params.units.mean
    return state._replace(value=params, value_opt_state=opt_state), metrics


def _plan_length(config: PlannerConfig, endless: bool) -> Array | float:
    """Return the sum of the discounts of a plan, and of what follows it if that has a value."""
    if endless:
        return 1.0 / (1.0 - config.discount)
    return jnp.sum(config.discount ** jnp.arange(config.horizon))


def _cautious(model: EnsembleState) -> EnsembleState:
    return model._replace(termination=cautious(model.termination))


def _check(spec: EnvSpec, config: PETSConfig, reward_given: bool) -> None:
    if reward_given and config.reward != "head":
        raise ValueError(
            f"reward_fn: a given reward leaves nothing to learn, got it with reward="
            f"{config.reward!r}; leave one of them out"
        )
    spaces.check_no_images(spec, "PETS")

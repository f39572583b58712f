"""MBPO: SAC on short rollouts of a learned model that branch off from what has been recorded.

Reference: Janner et al. 2019 (arXiv:1906.08253); pessimistic rewards after Yu et al. 2020 (MOPO,
arXiv:2005.13239), or an end where nothing is known, Kidambi et al. 2020 (MOReL, arXiv:2005.05951).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from agents.sac import (
    LearnerConfig,
    RewardFn,
    SACState,
    choose,
    make_learner,
    rewarded,
    summary,
)
from mbrl import normalization, replay, spaces
from mbrl.exploitation import newest_exploitation
from mbrl.halting import fit_halt
from mbrl.imagination import branches, rollout_length
from mbrl.losses.policy_gradient import average
from mbrl.mdp import SplitParams, halted
from mbrl.mixing import mixed, pool
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    FittedEnsemble,
    Fitter,
    World,
    build_ensemble,
    curious_world,
    ensemble_optimizer,
    ensemble_world,
    fit_ensemble,
    init_ensemble,
    part_metrics,
)
from mbrl.models.probabilistic import ProbabilisticEnsemble
from mbrl.models.reward import given_reward
from mbrl.networks.observation import vector_of
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
    SampleSpec,
)


@dataclasses.dataclass(frozen=True)
class MBPOConfig(EnsembleConfig):
    """Settings of MBPO; sources are the paper (P) or measured on small tasks here (M)."""

    members: int = 7
    """Networks in the ensemble N (P)."""
    elites: int = 5
    """Members that predict, best on held-out data first (P)."""
    length: tuple[int, int] = (1, 1)
    """Steps of a rollout, before and after `schedule` (P: 1 to 25 by task)."""
    schedule: tuple[int, int] = (20_000, 100_000)
    """Environment steps between which the length grows along a line (P: Hopper)."""
    rollouts: int = 10_000
    """Rollouts per model update, which the next one forgets (P: 100,000)."""
    real_ratio: float = 0.05
    """Share of recorded transitions in what actor and critics learn from (P)."""
    penalty: float = 0.0
    """Reward subtracted per standard deviation of model disagreement (MOPO); < 0 is optimism."""
    explore: Literal["reward", "disagreement"] = "reward"
    """What a policy that explores is after: the same as in evaluation, or the disagreement of the
    members alone (Plan2Explore, OPAX): a policy of its own, from imagined data alone, that takes
    turns with the other one. It doubles the time of an update."""
    halt: float = 0.0
    """Share of the recorded steps whose disagreement the model is trusted at; imagined episodes end
    beyond it (MOReL). 1 trusts the worst of them, 0 never halts."""
    halt_margin: float = 1.0
    """Standard deviations of reward by which each step there is worse than all recorded ones."""
    train_ratio: float = 20.0
    """Updates of actor and critics per environment step (P: 10 to 40)."""
    random_steps: int = 500
    """Environment steps of uniform actions before the first update (P: 5,000)."""
    train_every: int = 250
    """Environment steps between updates, of the model and of what learns from it (P)."""
    capacity: int = 10_000
    """Records kept in replay."""
    sac: LearnerConfig = LearnerConfig()
    """Actor and critics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "rollouts", "train_every", "capacity", "random_steps")
        check_within(self, "real_ratio", 0, 1)
        check_choice(self, "explore", ("reward", "disagreement"))
        check_within(self, "halt", 0, 1)
        check_within(self, "halt_margin", 0)
        check_within(self, "train_ratio", 0, ends="(]")
        discount = self.sac.discount
        if isinstance(discount, float) and discount >= 1.0 and self.halt:
            raise ValueError(
                f"sac.discount must be below 1 where imagined episodes halt, got {discount} with "
                f"halt={self.halt}: what a halt costs would have no end; pass for example "
                "--sac.discount 0.99"
            )
        if min(self.length) < 1:
            raise ValueError(
                f"length must be at least 1 step, got {self.length}; pass for example --length 1 1"
            )
        if not 0 <= self.schedule[0] <= self.schedule[1]:
            raise ValueError(
                f"schedule must be two numbers of environment steps in order, got {self.schedule}; "
                "pass for example --schedule 20000 100000"
            )


class Explorer(NamedTuple):
    """A policy that is after the disagreement of the members."""

    sac: SACState
    acts: Array
    """[] whether it acts until the next update, and not the policy that is evaluated."""


class MBPOState(NamedTuple):
    """Everything MBPO learns."""

    ensemble: FittedEnsemble
    sac: SACState
    calls: Array
    """Updates so far, from which the length of rollouts follows."""
    explorer: Explorer | None = None
    """What takes turns with `sac` while exploring."""


def world(spec: EnvSpec, config: MBPOConfig) -> World:
    """Build the model of an agent, with the reward that it has learned."""
    return _world(build_ensemble(spec, config), config, None)


def _world(model: ProbabilisticEnsemble, config: MBPOConfig, source: Any) -> World:
    def params(state: MBPOState) -> Any:
        model = state.ensemble.model
        return model if source is None else SplitParams(model, None)

    return World(
        model, ensemble_world(model, config, source), params, lambda state: state.ensemble.model
    )


def make_mbpo(
    spec: EnvSpec,
    config: MBPOConfig = MBPOConfig(),
    network: Callable[[int], Network] | None = None,
    reward_fn: RewardFn | None = None,
) -> Agent:
    """Build the agent.

    Args:
      spec: spaces of the task: observations without images; Discrete or bounded Box actions, or a
        mapping of Boxes.
      config: see `MBPOConfig`. Float fields may be traced, except `train_ratio`.
      network: `(out) -> Network` of one member of the model, to replace the default MLP.
      reward_fn: known reward `(obs, action, next_obs) -> [B]`, to learn from instead of the
        recorded one.

    Raises:
      ValueError: for tasks that MBPO cannot act in, and impossible settings.
    """
    learner = make_learner(spec, config.sac, "MBPO")
    model = build_ensemble(spec, config, network)
    source = None if reward_fn is None else given_reward(reward_fn)
    halts = not (isinstance(config.halt, float) and config.halt == 0.0)
    believed = _world(model, config, source)
    mdp = ensemble_world(model, config, source, config.penalty, reports=halts)
    explored = mdp if config.explore == "reward" else curious_world(model, config, source)
    optimizer = ensemble_optimizer(config)
    num_updates = max(1, round(config.train_ratio * config.train_every))

    def init(key: Key) -> MBPOState:
        model_key, sac_key, *more = jax.random.split(key, 2 if explored is mdp else 3)
        ensemble = init_ensemble(model, optimizer, model_key)
        explorer = Explorer(learner.init(*more), jnp.ones((), bool)) if more else None
        return MBPOState(ensemble, learner.init(sac_key), jnp.zeros((), jnp.int32), explorer)

    def act(
        state: MBPOState, carry: Any, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Any, Any, Any]:
        sac, explorer = state.sac, state.explorer
        if mode == "explore" and explorer is not None:
            sac = jax.tree.map(partial(jnp.where, explorer.acts), explorer.sac, sac)
        return choose(spec, learner, sac, obs, is_first, key, mode), carry, ()

    def update(state: MBPOState, batch: Batch, key: Key) -> tuple[MBPOState, Metrics, None]:
        model_key, ending_key, gap_key, *keys = jax.random.split(key, 6 if explored is mdp else 10)
        data, valid = replay.transitions(batch)
        data = rewarded(data, reward_fn)
        num_envs, rows = batch.valid.shape
        holdout = replay.holdout_mask((num_envs, rows), config.holdout).reshape(-1)
        ensemble, metrics = fit_ensemble(
            model, config, state.ensemble, Fitter(optimizer, data, valid & holdout), valid,
            model_key, ending_key,
        )  # fmt: skip
        metrics |= newest_exploitation(
            believed.mdp, believed.params(state), gap_key, batch, data, config.train_every,
            state.calls > 0,
        )  # fmt: skip
        real = pool(data._replace(is_terminal=data.is_terminal.astype(jnp.float32)), valid)
        steps = config.random_steps + state.calls * config.train_every
        length = rollout_length(steps, config.schedule, config.length)
        params = believed.params(state._replace(ensemble=ensemble))
        trusted = mdp
        if halts:
            trusted = halted(mdp, *fit_halt(
                mdp, params, jax.random.fold_in(keys[1], 1), data, valid, config.halt,
                config.halt_margin, 1.0 / (1.0 - config.sac.discount),
            ))  # fmt: skip

        def improve(
            sac: SACState, world: MDP, ratio: Array | float, *keys: Key
        ) -> tuple[SACState, Metrics]:
            """Imagine what a policy meets in a world, and learn from that and what was recorded."""
            start_key, branch_key, learn_key = keys
            if config.sac.normalize_obs:
                seen = vector_of(spec.observation, data.obs)
                sac = sac._replace(obs=normalization.fit(seen, valid))
            starts = real.draw(start_key, config.rollouts).obs
            found, counts = branches(
                world, params, branch_key, starts, policy_of(sac), length, max(config.length)
            )
            counts &= real.count > 0
            imagined = pool(found, counts)

            def learn(sac: SACState, key: Key) -> tuple[SACState, Metrics]:
                draw_key, key = jax.random.split(key)
                part, weight = mixed(real, imagined, draw_key, config.sac.batch_size, ratio)
                return learner.learn(sac, part, weight, key)

            sac, learned = jax.lax.scan(learn, sac, jax.random.split(learn_key, num_updates))
            weight = counts.astype(jnp.float32)
            return sac, summary(sac, learned) | {
                "imagined/transitions": weight.sum(),
                "imagined/reward": average(found.reward, weight),
                "imagined/ended": average(found.is_terminal, weight),
            }

        sac, learned = improve(state.sac, trusted, config.real_ratio, *keys[:3])
        metrics |= learned | {
            "imagined/length": length.astype(jnp.float32),
            "replay/reward": average(data.reward, valid.astype(jnp.float32)),
        }
        explorer = state.explorer
        if explorer is not None:
            # Recorded rewards are not what it is after: it learns from imagined ones alone.
            curious, learned = improve(explorer.sac, explored, 0.0, *keys[3:6])
            metrics["explorer/reward"] = learned["imagined/reward"]
            metrics |= part_metrics("explorer", curious.opt_state, {})
            # Where it has led the other policy goes on, and meets the errors of its own critics.
            explorer = Explorer(curious, jax.random.bernoulli(keys[6]))
        return MBPOState(ensemble, sac, state.calls + 1, explorer), metrics, None

    def policy_of(sac: SACState) -> Callable[[Key, Any], Any]:
        def act(key: Key, obs: Any) -> Any:
            return spaces.decode_action(spec.action, learner.policy(sac, obs).sample(key))

        return act

    sampling = SampleSpec("all", config.capacity, config.random_steps, config.train_every)
    return Agent(init, lambda num_envs: (), act, update, sampling)

"""A probabilistic ensemble together with how it is fitted to the transitions of a replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from mbrl import optim
from mbrl.calibration import interval_coverage, interval_scale, mixture_cdf
from mbrl.fitting import Fit, FitConfig, fit_members, spread_rows
from mbrl.mdp import RewardFn, penalized, with_intrinsic_reward, with_reward
from mbrl.models.posterior import PosteriorKind, posterior
from mbrl.models.probabilistic import ProbabilisticEnsemble, Target, probabilistic_ensemble
from mbrl.models.propagation import EnsembleState, Propagation, Weights
from mbrl.settings import check_choice, check_whole, check_within
from mbrl.types import MDP, Array, EnvSpec, Key, Metrics, Network, Transition
from mbrl.uncertainty import UncertaintyKind, UncertaintyScale

LEVEL = 0.95
"""Central interval that recalibration makes right."""
MAX_HELD = 1000
"""Held-out transitions that it looks at, at most."""


@dataclasses.dataclass(frozen=True)
class EnsembleConfig:
    """Settings of the model; sources are the papers on PETS (P) and MBPO, or measured on small
    tasks here (M).
    """

    members: int = 5
    """Networks in the ensemble N (P), or samples of the posterior."""
    posterior: PosteriorKind = "ensemble"
    """What the members are: networks of their own, or samples of one Bayesian network:
    variational, dropout or laplace."""
    uncertainty: UncertaintyKind = "std"
    """How their predictions make the uncertainty of a step: std, pairwise, aleatoric, jensen_renyi
    or information_gain."""
    uncertainty_scale: UncertaintyScale = "reward"
    """Units of it: reward, or raw, those of the observations as published for MOPO."""
    elites: int = 5
    """Members that predict, best on held-out data first (P: all)."""
    hidden: tuple[int, ...] = (128, 128)
    """Hidden layers of each member (P: 3 x 500 or 4 x 200; smaller for CPU, M)."""
    propagation: Propagation | Literal["auto"] = "auto"
    """How particles move through the ensemble: ts1, tsinf, mean or moment_matching (P). auto = ts1,
    or tsinf where members are samples of a posterior: each row keeps its own from step to step."""
    targets: tuple[Target, ...] = ("delta",)
    """What is predicted of the next observation: delta, absolute or angle (P); one for all
    dimensions of the flattened observation, or one each."""
    learn_bounds: bool = True
    """Learn the log-variance bounds (P)."""
    nll_beta: float = 0.0
    """Weight rows of the likelihood by their variance to this power; 0.5 for contacts (M)."""
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
    recalibrate: bool = False
    """Scale the predicted deviations of each target to what held-out transitions need."""
    dtype: str = "float32"
    """Precision of the matrix products, float32 or bfloat16."""

    def __post_init__(self) -> None:
        check_whole(
            self, "members", "elites", "batch_size", "max_epochs", "patience",
            "termination_epochs",
        )  # fmt: skip
        check_choice(self, "propagation", ("auto", *get_args(Propagation)))
        check_choice(self, "posterior", get_args(PosteriorKind))
        check_choice(self, "uncertainty", get_args(UncertaintyKind))
        check_choice(self, "uncertainty_scale", get_args(UncertaintyScale))
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
        if self.recalibrate and isinstance(self.holdout, float) and self.holdout == 0.0:
            raise ValueError(
                "recalibrate needs transitions that were not learned from, got holdout 0.0; pass "
                "for example --holdout 0.1"
            )


class FittedEnsemble(NamedTuple):
    """An ensemble and the states of its optimizers; `posterior` is what is trained where the
    members are samples, else None.
    """

    model: EnsembleState
    opt_state: optax.OptState
    termination_opt_state: optax.OptState
    posterior: Weights | None = None


class World(NamedTuple):
    """What an agent believes of its task, without a penalty or a bonus for uncertainty.

    Attributes:
      model: the ensemble.
      mdp: the model with the reward that the agent acts for.
      params: `(state of the agent) -> parameters of mdp`.
      ensemble: `(state of the agent) -> EnsembleState`.
    """

    model: ProbabilisticEnsemble
    mdp: MDP
    params: Callable[[Any], Any]
    ensemble: Callable[[Any], EnsembleState]


def build_ensemble(
    spec: EnvSpec, config: EnsembleConfig, network: Callable[[int], Network] | None = None
) -> ProbabilisticEnsemble:
    """Build the model that `config` describes; arguments as in `probabilistic_ensemble`.

    Raises:
      ValueError: for a network of one's own that is to be Bayesian.
    """
    model = probabilistic_ensemble(
        spec, config.members, config.hidden, config.targets, config.elites,
        config.learn_bounds, config.nll_beta, network, config.dtype,
    )  # fmt: skip
    if config.posterior == "ensemble":
        return model
    if network is not None:
        raise ValueError(
            f"network: got one with posterior={config.posterior!r}, which has to know the layers; "
            "leave network out, or use posterior='ensemble'"
        )
    return model._replace(
        posterior=posterior(
            config.posterior, spec, config.members, config.hidden, config.targets,
            config.learn_bounds, config.nll_beta, config.dtype,
        )
    )  # fmt: skip


def ensemble_world(
    model: ProbabilisticEnsemble,
    config: EnsembleConfig,
    reward: RewardFn | None = None,
    penalty: float | Array = 0.0,
    reports: bool = False,
) -> MDP:
    """Present a model as the `MDP` that `config` describes.

    Args:
      model: the functions of the ensemble.
      config: how it propagates, and what it calls uncertainty.
      reward: in place of the members' own, as in `mbrl.mdp.with_reward`; theirs then does not
        count as uncertain either.
      penalty: per unit of uncertainty, see `mbrl.mdp.penalized`.
      reports: compute uncertainty also where the penalty is 0.
    """
    uses_penalty = not (isinstance(penalty, float) and penalty == 0.0)
    mdp = _world(model, config, reward, uses_penalty or reports)
    return penalized(mdp, penalty) if uses_penalty else mdp


def curious_world(
    model: ProbabilisticEnsemble, config: EnsembleConfig, reward: RewardFn | None = None
) -> MDP:
    """As `ensemble_world`, but paid in uncertainty: see `mbrl.mdp.with_intrinsic_reward`."""
    return with_intrinsic_reward(_world(model, config, reward, True))


def propagation_of(config: EnsembleConfig) -> Propagation:
    """Return how particles move, where that is left to the kind of the members."""
    if config.propagation == "auto":
        return "ts1" if config.posterior == "ensemble" else "tsinf"
    return config.propagation


def _world(
    model: ProbabilisticEnsemble, config: EnsembleConfig, reward: RewardFn | None, reports: bool
) -> MDP:
    mdp = model.mdp(
        propagation_of(config), reports, config.uncertainty, config.uncertainty_scale,
        reward is None,
    )  # fmt: skip
    return mdp if reward is None else with_reward(mdp, reward)


def ensemble_optimizer(config: EnsembleConfig) -> optax.GradientTransformation:
    """Build the optimizer of every part that is fitted; its members do not mix."""
    return optim.apply_if_finite_counted(
        optax.chain(
            optim.clip_by_member_norm(config.clip_norm),
            optax.adamw(
                config.learning_rate, weight_decay=config.weight_decay, mask=optim.decay_mask
            ),
        )
    )


def fit_config(config: EnsembleConfig) -> FitConfig:
    """Return how long members train that are stopped by held-out data.

    A posterior is one of all data: there is nothing to resample.
    """
    bootstrap = config.bootstrap and config.posterior == "ensemble"
    return FitConfig(config.batch_size, config.max_epochs, config.patience, bootstrap=bootstrap)


class Fitter(NamedTuple):
    """Fit the weights of one part of an agent to rows [M, ...]; `held` [M] are kept back."""

    optimizer: optax.GradientTransformation
    data: Any
    held: Array

    def __call__(
        self, part: Any, params: Any, opt_state: Any, rows: Array, key: Key, config: FitConfig,
        error: Any = None, keyed: bool = False,
    ) -> tuple[Any, Fit]:  # fmt: skip
        """Return the parameters with fitted weights, and how the fit went."""
        fit = fit_members(
            lambda weights, rows, *noise: part.loss(weights, params, rows, *noise),
            error and (lambda weights, rows, mask: error(weights, params, rows, mask)),
            self.optimizer, params.weights, opt_state, self.data, rows, self.held, key, config,
            keyed,
        )  # fmt: skip
        return params._replace(weights=fit.weights), fit


def init_ensemble(
    model: ProbabilisticEnsemble, optimizer: optax.GradientTransformation, key: Key
) -> FittedEnsemble:
    """Draw the weights of a model, and start its optimizers."""
    trained = None
    if model.posterior is not None:
        key, trained_key = jax.random.split(key)
        trained = model.posterior.init(trained_key)
    state = model.init(key)
    opt_state = optimizer.init(state.weights if trained is None else trained)
    return FittedEnsemble(state, opt_state, optimizer.init(state.termination.weights), trained)


def fit_ensemble(
    model: ProbabilisticEnsemble, config: EnsembleConfig, state: FittedEnsemble, fit: Fitter,
    valid: Array, model_key: Key, ending_key: Key,
) -> tuple[FittedEnsemble, Metrics]:  # fmt: skip
    """Fit dynamics and reward, then termination, and choose the elites.

    Args:
      model: the functions of the ensemble.
      config: how it is fitted.
      state: where it starts from.
      fit: optimizer, transitions [M, ...] and which of them are held out.
      valid: bool [M], rows that are transitions.
      model_key: consumed.
      ending_key: consumed.

    Returns:
      The fitted state, and metrics of `model/` and `termination/`.
    """
    train = valid & ~fit.held
    params = model.standardize(state.model, fit.data, valid)
    trained = state.posterior
    if trained is None:
        params, fitted = fit(
            model, params, state.opt_state, train, model_key, fit_config(config), model.error
        )
        elites = jnp.argsort(fitted.error)[: config.elites]
    else:
        ready = state._replace(model=params)
        params, trained, fitted = _fit_posterior(model, config, ready, fit, train, model_key)
        elites = jnp.arange(config.elites)  # samples are alike
    ending = model.termination.standardize(params.termination, fit.data, valid)
    ending, ending_fit = fit(
        model.termination, ending, state.termination_opt_state, valid & ending.unexplained,
        ending_key, FitConfig(config.batch_size, config.termination_epochs, bootstrap=False),
    )  # fmt: skip
    params = params._replace(elites=elites, termination=ending)
    metrics = part_metrics("model", fitted.opt_state, fitted.metrics)
    metrics |= part_metrics("termination", ending_fit.opt_state, ending_fit.metrics)
    if config.recalibrate:
        params, found = recalibrated(model, params, fit.data, valid & fit.held)
        metrics |= found
    return FittedEnsemble(params, fitted.opt_state, ending_fit.opt_state, trained), metrics


def _fit_posterior(
    model: ProbabilisticEnsemble, config: EnsembleConfig, state: FittedEnsemble, fit: Fitter,
    train: Array, key: Key,
) -> tuple[EnsembleState, Weights, Fit]:  # fmt: skip
    """Fit a Bayesian network, and let samples of it be the members until the next fit."""
    fit_key, sample_key = jax.random.split(key)
    law = model.posterior
    law = law._replace(loss=partial(law.loss, num_rows=train.sum()))
    params = state.model._replace(weights=state.posterior)
    params, fitted = fit(
        law, params, state.opt_state, train, fit_key, fit_config(config), law.error, keyed=True
    )
    trained = params.weights
    members = law.sample(trained, params, fit.data, train, sample_key)
    return params._replace(weights=members), trained, fitted


def recalibrated(
    model: ProbabilisticEnsemble, state: EnsembleState, data: Transition, held: Array
) -> tuple[EnsembleState, Metrics]:
    """Scale the predicted deviations so that 95 % of held-out targets lie in their interval.

    Args:
      model: the functions of the ensemble.
      state: fitted, its elites chosen; a scale that it has is fitted anew.
      data: transitions [M, ...].
      held: bool [M], rows that were not learned from. Of very many, some are looked at, evenly
        spread over the ring.

    Returns:
      The state with its `scale`; the mean of it, and the coverage before.
    """
    state = state._replace(scale=jnp.ones_like(state.scale))
    rows, known = spread_rows(held, min(MAX_HELD, held.shape[0]))
    part = jax.tree.map(lambda x: x[rows], data)
    out = model.predict(state, part.obs, part.action)
    mean, var = (x[state.elites] for x in out)  # those that will predict
    target = model.target(state, part)
    scale = interval_scale(mean, var, target, known, LEVEL)
    before = interval_coverage(mixture_cdf(mean, var, target), jnp.asarray([LEVEL]), known)
    metrics = {"model/scale": scale.mean(), "model/coverage": before.mean()}
    return state._replace(scale=scale), metrics


def part_metrics(part: str, opt_state: Any, metrics: Metrics) -> Metrics:
    """Name the metrics of a fit after the part that was fitted, with its skipped updates."""
    found = {name.replace("model", part, 1): value for name, value in metrics.items()}
    return found | optim.skipped(opt_state, part)

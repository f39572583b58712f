"""Planners find optima that are known in closed form, and keep out of known traps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.planning import PLANNERS, PlannerConfig, planner
from mbrl.planning.config import populations
from mbrl.planning.plans import box_plans, discrete_plans, noise_basis, plan_space
from mbrl.planning.sampling import elite_weights, softmax_weights
from mbrl.planning.score import score_plans
from mbrl.types import MDP, Array, Discrete, EnvSpec, Outcome

LOW, HIGH = np.array([-1.0, 3.0]), np.array([5.0, 4.0])
SMALL = PlannerConfig(
    horizon=5, population=64, iterations=6, particles=1, elites=8, momentum=0.0, noise_beta=0.5,
    decay=1.0,
)  # fmt: skip


def point_mass(target: Any, space: Any = None, bad: float = np.inf) -> MDP:
    """Reward `-|action - target|^2`, NaN where the first action component exceeds `bad`."""
    space = spaces.box(LOW, HIGH) if space is None else space
    spec = EnvSpec("point", spaces.box(-np.inf, np.inf, (1,)), space)

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Array:
        return jnp.zeros((batch, 1)) if obs is None else obs

    def step(params: Any, key: Any, state: Array, action: Array) -> tuple[Array, Outcome]:
        ones = jnp.ones(state.shape[0])
        if isinstance(space, Discrete):
            reward = (action == target).astype(jnp.float32)
        else:
            reward = -jnp.sum((action - (jnp.asarray(target) + state)) ** 2, -1)
            reward = jnp.where(action[:, 0] > bad, jnp.nan, reward)
        return state, Outcome(reward, ones, 0.0 * ones)

    return MDP(init, step, lambda params, state: state, spec)


def run(mdp: MDP, config: PlannerConfig, obs: Array, steps: int = 1, seed: int = 0) -> Any:
    mpc = planner(mdp, config)
    plan = jax.jit(mpc.plan)
    carry = mpc.init(obs.shape[0])
    for key in jax.random.split(jax.random.key(seed), steps):
        action, carry, info = plan(None, key, obs, carry)
    return action, carry, info


@pytest.mark.parametrize("method", ["cem", "icem", "mppi", "gradient", "shooting"])
def test_finds_the_optimum_of_an_asymmetric_box_for_each_start_state(method):
    target = np.array([4.2, 3.1])
    shift = jnp.array([[0.0], [-0.1], [0.3]])  # every row has its own optimum
    config = dataclasses.replace(SMALL, method=method, iterations=12, temperature=0.1)
    if method == "shooting":
        config = dataclasses.replace(config, population=4096, horizon=1)
    if method == "mppi":  # its noise never shrinks
        config = dataclasses.replace(config, init_std=0.1)

    action, _, _ = run(point_mass(target), config, shift, steps=4)

    want = np.clip(target + np.asarray(shift), LOW, HIGH)
    np.testing.assert_allclose(action, want, atol=0.35 if method == "shooting" else 0.15)
    assert np.all(action >= LOW - 1e-5) and np.all(action <= HIGH + 1e-5)


@pytest.mark.parametrize("method", sorted(PLANNERS))
def test_finds_the_right_discrete_action(method):
    population = 1000 if method == "shooting" else 64
    config = dataclasses.replace(
        SMALL, method=method, population=population, learning_rate=0.5, horizon=3
    )
    action, _, info = run(point_mass(3, Discrete(5)), config, jnp.zeros((4, 1)), steps=2)
    assert action.dtype == jnp.int32
    np.testing.assert_array_equal(action, 3)
    if method == "search":  # what it expects of itself, which is no better than the best
        assert np.all(info["value"] > 1.5) and np.all(info["value"] <= 3.0)
    else:
        np.testing.assert_allclose(info["value"], 3.0)


@pytest.mark.parametrize("method", sorted(PLANNERS))
def test_plans_that_leave_the_finite_numbers_lose(method):
    # Left of `bad` all rewards are negative: a NaN ranked as 0 would win.
    config = dataclasses.replace(SMALL, method=method, temperature=0.1, horizon=2)
    action, _, info = run(point_mass([4.0, 3.5], bad=2.5), config, jnp.zeros((2, 1)), steps=2)
    assert np.all(action[:, 0] <= (2.5 if method != "mppi" else 3.0))  # a mean of good plans
    assert np.all(np.isfinite(info["value"]))


@pytest.mark.parametrize("method", sorted(PLANNERS))
def test_survives_a_model_of_nothing_but_nan(method):
    mdp = point_mass([4.0, 3.5], bad=-np.inf)
    action, carry, _ = run(mdp, dataclasses.replace(SMALL, method=method), jnp.zeros((2, 1)))
    assert np.all(np.isfinite(action))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(carry))


def test_each_cem_iteration_draws_fresh_noise():
    # With one elite, one iteration and no momentum the mean is the best sample; if the
    # second iteration saw the same noise around it, its samples would be a shifted copy.
    seen = []
    mdp = point_mass([2.0, 3.5])

    def spy(params: Any, key: Any, state: Any, action: Array) -> Any:
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), action, ordered=True)
        return mdp.step(params, key, state, action)

    config = dataclasses.replace(
        SMALL, method="cem", horizon=1, iterations=2, population=16, elites=16, momentum=1.0
    )  # momentum 1 keeps the distribution: only the noise can differ
    run(mdp._replace(step=spy), config, jnp.zeros((1, 1)))
    jax.effects_barrier()
    first, second = np.sort(np.reshape(seen, (2, 16, -1)), 1)  # iterations, plans
    assert not np.any(np.isclose(first, second).all(-1))


def test_plans_are_compared_under_the_same_noise_which_changes_with_the_key():
    mdp = point_mass([2.0, 3.5])

    def noisy(params: Any, key: Any, state: Any, action: Array) -> Any:
        state, outcome = mdp.step(params, key, state, action)
        return state, outcome._replace(reward=jax.random.normal(key, outcome.reward.shape))

    config = dataclasses.replace(SMALL, horizon=3, particles=4)
    space = plan_space(mdp.spec, config)
    plans = space.sample(jax.random.key(0), space.prior(2), 5)
    score = jax.jit(
        lambda key: score_plans(
            mdp._replace(step=noisy), space, config, None, key, jnp.zeros((2, 1)), plans
        )
    )
    one, other = score(jax.random.key(1)), score(jax.random.key(2))
    np.testing.assert_allclose(one, jnp.broadcast_to(one[0, 0], (2, 5)), rtol=1e-5)
    assert abs(float(one[0, 0] - other[0, 0])) > 1e-3


def test_sigma_changes_an_mppi_plan():
    plans = [
        run(
            point_mass([4.2, 3.1]),
            dataclasses.replace(SMALL, method="mppi", init_std=std, iterations=1),
            jnp.zeros((1, 1)),
        )[0]
        for std in (0.01, 0.3, 1.0)
    ]
    assert not np.allclose(plans[0], plans[1], atol=1e-3)
    assert not np.allclose(plans[1], plans[2], atol=1e-3)


def test_kept_elites_are_shifted_and_end_in_a_fresh_action():
    config = dataclasses.replace(SMALL, method="icem", keep_fraction=0.5)
    mdp = point_mass([2.0, 3.5])
    mpc = planner(mdp, config)
    _, carry, info = mpc.plan(None, jax.random.key(0), jnp.zeros((1, 1)), mpc.init(1))
    best = plan_space(mdp.spec, config).encode(info["plan"])
    np.testing.assert_allclose(carry.kept[0, 0, :-1], best[0, 1:], atol=1e-5)
    assert len(np.unique(np.round(carry.kept[0, :, -1, 0], 6))) == carry.kept.shape[1]


def test_first_plan_of_an_episode_ignores_the_elites_of_the_last():
    config = dataclasses.replace(SMALL, method="icem")
    mdp = point_mass([2.0, 3.5])
    mpc = planner(mdp, config)
    _, old, _ = mpc.plan(None, jax.random.key(0), jnp.zeros((1, 1)), mpc.init(1))
    reset = old._replace(dist=mpc.init(1).dist, usable=jnp.zeros(1, bool))
    got = mpc.plan(None, jax.random.key(1), jnp.zeros((1, 1)), reset)[0]
    fresh = mpc.plan(None, jax.random.key(1), jnp.zeros((1, 1)), mpc.init(1))[0]
    np.testing.assert_array_equal(got, fresh)


def test_warm_start_beats_a_cold_start():
    config = dataclasses.replace(SMALL, method="icem", iterations=1, population=20)
    values = [
        float(run(point_mass([4.2, 3.1]), config, jnp.zeros((1, 1)), steps, seed=3)[2]["value"][0])
        for steps in (1, 6)
    ]
    assert values[1] > values[0] + 0.5


def test_planning_a_batch_equals_nothing_leaking_between_rows():
    config = dataclasses.replace(SMALL, method="icem")
    together = run(point_mass([4.2, 3.1]), config, jnp.array([[0.0], [0.3]]))[2]["value"]
    swapped = run(point_mass([4.2, 3.1]), config, jnp.array([[0.0], [-0.5]]))[2]["value"]
    np.testing.assert_array_equal(together[0], swapped[0])


def chain(num: int) -> MDP:
    """Walk right for a reward of 10 at the end; each step left pays 0.1 at once."""
    spec = EnvSpec("chain", spaces.box(0, num, (1,)), Discrete(2))

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Array:
        return jnp.zeros(batch, jnp.int32) if obs is None else obs[:, 0].astype(jnp.int32)

    def step(params: Any, key: Any, state: Array, action: Array) -> tuple[Array, Outcome]:
        state = jnp.clip(state + 2 * action - 1, 0, num)
        reward = jnp.where(action == 0, 0.1, 0.0) + jnp.where(state == num, 10.0, 0.0)
        ones = jnp.ones(state.shape[0])
        return state, Outcome(reward, jnp.where(state == num, 0.0, 1.0), 0.0 * ones)

    return MDP(init, step, lambda p, s: s[:, None].astype(jnp.float32), spec)


def test_a_terminal_value_carries_beyond_the_horizon():
    config = PlannerConfig("cem", 2, population=64, iterations=3, particles=1, elites=8)
    mdp, state = chain(6), jnp.zeros(1, jnp.int32)
    key = jax.random.key(0)
    blind = planner(mdp, config)
    told = planner(mdp, config, value=lambda params, s: s.astype(jnp.float32))
    assert blind.plan(None, key, state, blind.init(1))[0][0] == 0
    assert told.plan(None, key, state, told.init(1))[0][0] == 1


def test_a_policy_prior_shows_what_sampling_would_not_find():
    config = PlannerConfig("icem", 12, population=24, iterations=2, particles=1, elites=4,
                           prior_plans=2, noise_beta=0.0, decay=1.0)  # fmt: skip
    mdp, state = chain(12), jnp.zeros(1, jnp.int32)

    def right(params: Any, key: Any, s: Array) -> Array:
        return jnp.ones(s.shape[0], jnp.int32)

    key = jax.random.key(1)
    alone = planner(mdp, dataclasses.replace(config, prior_plans=0))
    led = planner(mdp, config, prior=right)
    assert alone.plan(None, key, state, alone.init(1))[2]["value"][0] < 2.0
    _, _, info = led.plan(None, key, state, led.init(1))
    np.testing.assert_array_equal(info["plan"][0], 1)


def test_score_is_the_discounted_return_until_termination():
    config = PlannerConfig("cem", 3, population=2, elites=2, particles=2, discount=0.5)
    mdp = chain(2)
    space = plan_space(mdp.spec, config)
    plans = jnp.array([[[1, 1, 0], [0, 0, 0]]])
    score = score_plans(mdp, space, config, None, jax.random.key(0), jnp.zeros(1, jnp.int32), plans)
    np.testing.assert_allclose(score, [[0.5 * 10.0, 0.1 * (1 + 0.5 + 0.25)]], rtol=1e-6)


def test_particles_are_independent_and_ranked_by_the_risk_measure():
    spec = EnvSpec("noise", spaces.box(-1, 1, (1,)), spaces.box(-1, 1, (1,)))

    def step(params: Any, key: Any, state: Array, action: Array) -> tuple[Array, Outcome]:
        noise = jax.random.normal(key, (state.shape[0],))
        ones = jnp.ones(state.shape[0])
        return state, Outcome((action[:, 0] + 1.0) * noise, ones, ones)

    mdp = MDP(lambda p, k, obs=None, batch=1: obs, step, lambda p, s: s, spec)
    base = PlannerConfig("cem", 1, population=400, iterations=4, particles=20, elites=40)
    first = {}
    for risk in ("lcb", "ucb", "worst", "cvar"):
        config = dataclasses.replace(base, risk=risk, risk_coef=0.25 if risk == "cvar" else 1.0)
        mpc = planner(mdp, config)
        action = mpc.plan(None, jax.random.key(0), jnp.zeros((1, 1)), mpc.init(1))[0]
        first[risk] = float(action[0, 0])
    assert first["lcb"] < -0.8 and first["worst"] < -0.8 and first["cvar"] < -0.8
    assert first["ucb"] > 0.8


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("horizon", [1, 2, 15, 30])
def test_coloured_noise_has_unit_variance_and_the_right_spectrum(beta, horizon):
    basis = noise_basis(horizon, beta)
    np.testing.assert_allclose((basis**2).sum(0), 1.0, rtol=1e-5)
    covariance = basis.T @ basis
    if horizon >= 30:
        lag = np.mean(np.diag(covariance, 1))
        assert abs(lag) < 0.12 if beta == 0.0 else lag > 0.5
        power = np.abs(np.fft.rfft(basis, axis=-1)) ** 2
        spectrum = power.sum(0)[1:-1]
        slope = np.polyfit(np.log(np.arange(1, len(spectrum) + 1)), np.log(spectrum), 1)[0]
        assert abs(slope + beta) < 0.3


def test_truncated_noise_never_leaves_the_bounds_and_is_not_clipped_onto_them():
    space = box_plans(spaces.box(-2.0, 2.0, (1,)), dataclasses.replace(SMALL, init_std=5.0), True)
    dist = space.prior(1)._replace(mean=jnp.full((1, 5, 1), 0.9))
    plans = space.sample(jax.random.key(0), dist, 1000)
    assert np.max(plans) < 1.0 and np.min(plans) > 0.78


def test_fit_is_the_weighted_maximum_likelihood_estimate():
    space = box_plans(spaces.box(-1.0, 1.0, (1,)), dataclasses.replace(SMALL, horizon=1), False)
    plans = jnp.array([[0.0, 0.5, 1.0, -1.0]])[:, :, None, None]
    dist = space.fit(space.prior(1), plans, jnp.array([[1.0, 1.0, 0.0, 0.0]]), 0.0)
    np.testing.assert_allclose([dist.mean[0, 0, 0], dist.std[0, 0, 0]], [0.25, 0.25], rtol=1e-6)
    kept = space.fit(dist, plans, jnp.zeros((1, 4)), 0.0)
    np.testing.assert_allclose(kept.mean, dist.mean)
    half = space.fit(dist, plans, jnp.array([[0.0, 0.0, 1.0, 0.0]]), 0.5)
    np.testing.assert_allclose(half.mean[0, 0, 0], 0.625, rtol=1e-6)
    np.testing.assert_allclose(half.std[0, 0, 0], np.sqrt(0.5 * 0.25**2), rtol=1e-5)


def test_discrete_samples_follow_the_probabilities_at_every_colour():
    probs = jnp.array([0.7, 0.2, 0.1])
    for beta in (0.0, 2.0):
        config = dataclasses.replace(SMALL, noise_beta=beta, horizon=8)
        space = discrete_plans(Discrete(3), config)
        dist = jnp.broadcast_to(probs, (1, 8, 3))
        plans = np.asarray(space.sample(jax.random.key(0), dist, 20_000))
        share = [np.mean(plans == i) for i in range(3)]
        np.testing.assert_allclose(share, 0.98 * np.asarray(probs) + 0.02 / 3, atol=0.01)
        persist = np.mean(plans[0, :, 1:] == plans[0, :, :-1])
        independent = np.sum(np.square(share))
        assert (persist > independent + 0.1) == (beta == 2.0)


def test_weights_ignore_infinities_and_the_scale_of_returns():
    values = jnp.array([[1.0, -jnp.inf, 3.0, 2.0], [-jnp.inf] * 4])
    np.testing.assert_array_equal(elite_weights(2)(values), [[0, 0, 1, 1], [0, 0, 0, 0]])
    weights = softmax_weights(0.5)(values)
    assert weights[0, 1] == 0 and weights[0, 2] == 1 and np.all(weights[1] == 0)
    np.testing.assert_allclose(softmax_weights(0.5)(1e4 * values[:1])[0], weights[0], rtol=1e-4)


def test_icem_spends_exactly_the_announced_evaluations():
    config = PlannerConfig(
        "icem", 7, population=40, iterations=4, particles=3, elites=10, decay=1.25
    )  # fmt: skip
    assert populations(config) == [40, 32, 26, 20]
    seen = []
    mdp = point_mass([2.0, 3.5])

    def spy(params: Any, key: Any, state: Any, action: Array) -> Any:
        jax.debug.callback(lambda a: seen.append(a.shape[0]), action, ordered=True)
        return mdp.step(params, key, state, action)

    run(mdp._replace(step=spy), config, jnp.zeros((1, 1)))
    jax.effects_barrier()
    assert sum(seen) == config.evaluations() == 118 * 3 * 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"elites": 65}, "elites must not exceed planner.population, got 65 > 64"),
        ({"particles": 0}, "particles must be at least 1, got 0; pass a whole number, such as 5"),
        ({"horizon": 1.5}, "horizon must be at least 1, got 1.5"),
        ({"prior_plans": 64}, "prior_plans must be smaller than the population"),
        ({"prior_plans": 40, "decay": 2.0, "iterations": 2}, r"got 40 with \[64, 32\]"),
        ({"prior_plans": -1}, "prior_plans must be at least 0"),
        ({"decay": 0.5}, r"decay must be in \[1, inf\), got 0.5; the default is 1"),
        ({"init_std": -1.0}, r"init_std must be in \(0, inf\)"),
        ({"momentum": 2.0}, r"momentum must be in \[0, 1\]"),
        ({"keep_fraction": 6.0}, "keep_fraction"),
        ({"discount": float("nan")}, "discount"),
        ({"temperature": 0.0}, "temperature"),
        ({"risk": "foo"}, "risk: got 'foo', expected one of mean, lcb"),
        ({"risk": "cvar", "risk_coef": 2.0}, r"risk_coef must be in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        PlannerConfig(**{"method": "icem", "population": 64, **settings})


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_a_prior_that_would_not_be_asked_is_refused(method):
    mdp = point_mass([0.0])
    config = PlannerConfig(method=method, population=16, elites=4)
    with pytest.raises(ValueError, match="prior_plans: got 0 and a policy prior"):
        planner(mdp, config, prior=lambda params, key, state: jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="prior_plans: got 2 and no policy prior"):
        planner(mdp, dataclasses.replace(config, prior_plans=2))


def test_unbounded_and_unsupported_action_spaces_are_refused():
    unbounded = point_mass([0.0], spaces.box(-np.inf, 1.0, (1,)))
    with pytest.raises(ValueError, match="bounds must be finite"):
        planner(unbounded, SMALL)
    nested = point_mass([0.0], {"a": Discrete(2)})
    with pytest.raises(ValueError, match="planners need Box or Discrete"):
        planner(nested, SMALL)
    with pytest.raises(ValueError, match="planner.method"):
        planner(chain(2), dataclasses.replace(SMALL, method="magic"))

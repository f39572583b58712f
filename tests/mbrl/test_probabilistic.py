"""The ensemble recovers known dynamics, rewards, terminations and noise."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import optim, spaces
from mbrl.fitting import FitConfig, bootstrap_rows, fit_members, select_members
from mbrl.models.probabilistic import (
    predicted_variance,
    probabilistic_ensemble,
    wrap_angle,
)
from mbrl.models.propagation import by_blocks
from mbrl.types import Array, EnvSpec, Transition
from mbrl.uncertainty import UncertaintyKind, reported_uncertainty

SPEC = EnvSpec("toy", spaces.box(-np.inf, np.inf, (2,)), spaces.box(-2.0, 2.0, (1,)))
NOISE = 0.05


def toy_data(num: int, seed: int = 0, scale: float = 1.0) -> Transition:
    """x' = x + 0.1 (v, a) + noise on x only; reward = -x'^2; terminal when v' > 1."""
    rng = np.random.default_rng(seed)
    obs = rng.uniform(-1.0, 1.0, (num, 2)).astype(np.float32)
    action = rng.uniform(-2.0, 2.0, (num, 1)).astype(np.float32)
    change = 0.1 * np.stack([obs[:, 1], action[:, 0]], 1)
    next_obs = obs + change
    next_obs[:, 0] += NOISE * rng.normal(size=num)
    reward = -(next_obs[:, 0] ** 2)
    terminal = next_obs[:, 1] > 1.0
    data = (scale * obs, action, reward, scale * next_obs, terminal)
    return Transition(*(jnp.asarray(x) for x in data))


@functools.cache
def fitted(num_elites: int = 3) -> Any:
    model = probabilistic_ensemble(SPEC, 3, (48, 48), num_elites=num_elites)
    data = toy_data(1200)
    everything = jnp.ones(1200, bool)
    state = model.standardize(model.init(jax.random.key(0)), data, everything)
    held = jnp.arange(1200) % 10 == 0
    optimizer = optax.adam(2e-3)
    config = FitConfig(batch_size=128, max_epochs=40)

    def fit(key):
        return fit_members(
            lambda weights, rows: model.loss(weights, state, rows),
            lambda weights, rows, mask: model.error(weights, state, rows, mask),
            optimizer, state.weights, optimizer.init(state.weights),
            data, ~held, held, key, config,
        )  # fmt: skip

    def fit_termination(key):
        part = model.termination
        ending = part.standardize(state.termination, data, everything)
        fit = fit_members(
            lambda weights, rows: part.loss(weights, ending, rows), None, optimizer,
            ending.weights, optimizer.init(ending.weights), data, everything, held, key, config,
        )  # fmt: skip
        return ending._replace(weights=fit.weights)

    result = jax.jit(fit)(jax.random.key(1))
    ending = jax.jit(fit_termination)(jax.random.key(2))
    return model, state._replace(weights=result.weights, termination=ending), result


def test_learns_dynamics_reward_noise_and_termination():
    model, state, _ = fitted()
    test = toy_data(400, seed=7)
    out = jax.jit(model.predict)(state, test.obs, test.action)
    mean = np.asarray(state.targets.mean + state.targets.std * out.mean)
    want = 0.1 * np.stack([test.obs[:, 1], test.action[:, 0]], 1)
    np.testing.assert_allclose(mean[..., 0].mean(0), want[:, 0], atol=0.05)
    np.testing.assert_allclose(mean[..., 1].mean(0), want[:, 1], atol=0.02)
    std = np.sqrt(np.asarray(out.var)) * np.asarray(state.targets.std)
    assert abs(np.median(std[..., 0]) / NOISE - 1.0) < 0.25  # learned aleatoric noise
    assert np.median(std[..., 1]) < 0.01  # and none where there is none
    split = predicted_variance(state, out)
    np.testing.assert_allclose(split.aleatoric, np.mean(std**2, 0), rtol=1e-4)
    np.testing.assert_allclose(split.epistemic, mean.var(0), rtol=1e-2, atol=1e-7)
    reward_error = np.abs(mean[..., 2].mean(0) + (test.obs[:, 0] + want[:, 0]) ** 2 + NOISE**2)
    assert np.mean(reward_error) < 0.02

    edges = jnp.array([[0.0, 0.7], [0.0, 1.2]])  # the rule is v > 1
    survival = jax.jit(model.survival)(state, edges).mean(0)
    np.testing.assert_array_equal(survival, [1.0, 0.0])


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "moment_matching"])
def test_every_propagation_predicts_the_mean_and_its_own_spread(propagation):
    model, state, _ = fitted()
    mdp = model.mdp(propagation, uncertainty=False)
    obs = jnp.broadcast_to(jnp.array([0.5, -0.5]), (999, 2))
    action = jnp.full((999, 1), 1.0)
    next_obs, outcome = jax.jit(mdp.step)(state, jax.random.key(0), obs, action)
    np.testing.assert_allclose(next_obs.mean(0), [0.45, -0.4], atol=0.03)
    np.testing.assert_allclose(outcome.reward.mean(), -(0.45**2) - NOISE**2, atol=0.03)
    assert np.all(outcome.discount > 0.9)
    spread = float(next_obs[:, 0].std())
    assert spread < 1e-6 if propagation == "mean" else 0.6 * NOISE < spread < 1.6 * NOISE
    assert outcome.uncertainty is None


def test_uncertainty_grows_off_the_data_and_does_not_depend_on_units():
    def disagreement(scale: float) -> Any:
        data = toy_data(500, scale=scale)
        obs = scale * jnp.array([[0.0, 0.0], [8.0, -8.0]])
        return spread(data, obs)

    def steps(model: Any, state: Any, obs: Array) -> Any:
        rest = state, jax.random.key(1), obs, jnp.zeros((2, 1))
        mdps = [model.mdp("mean", True, kind) for kind in get_args(UncertaintyKind)]
        return [mdp.step(*rest)[1].uncertainty for mdp in mdps]

    @jax.jit
    def spread(data, obs):
        model = probabilistic_ensemble(SPEC, 3, (32,))
        state = model.standardize(model.init(jax.random.key(0)), data, jnp.ones(500, bool))
        return steps(model, state, obs)

    for one, other in zip(disagreement(1.0), disagreement(1000.0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
    model, state, _ = fitted()
    obs = jnp.array([[0.0, 0.0], [8.0, -8.0]])
    found = jax.jit(functools.partial(steps, model))(state, obs)
    growth = {k: float(u[1] / u[0]) for k, u in zip(get_args(UncertaintyKind), found, strict=True)}
    assert min(growth[kind] for kind in ("std", "pairwise", "information_gain")) > 10
    assert growth["jensen_renyi"] > 2  # it is bounded


@pytest.mark.parametrize("world", ["ts1", "mean", "hallucinated"])
def test_all_members_count_in_the_uncertainty_and_not_the_elites_alone(world):
    model = probabilistic_ensemble(SPEC, 3, (4,), num_elites=1)
    state = jax.jit(model.init)(jax.random.key(0))
    obs, action = jnp.array([[0.3, -0.2]]), jnp.array([[0.5]])
    if world == "hallucinated":
        mdp, kind, action = model.hallucinated(0.0), "std", jnp.array([[0.5, 0.0, 0.0]])
    else:
        mdp, kind = model.mdp(world, True, "pairwise"), "pairwise"
    found = jax.jit(mdp.step)(state, jax.random.key(1), obs, action)[1].uncertainty
    everyone = jax.jit(model.predict)(state, obs, action[:, :1])
    want = reported_uncertainty(*everyone, state.targets.std, kind)
    assert want[0] > 1e-3
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 100, 101])
def test_rows_need_not_divide_by_the_members(rows):
    def apply(x):
        assert x.shape[0] == 3
        return x * 10 + jnp.arange(3.0)[:, None]

    x = jnp.arange(rows, dtype=jnp.float32)
    fixed = jax.jit(lambda x: by_blocks(None, 3, x, apply))(x)
    np.testing.assert_array_equal(fixed // 10, x)  # every row is served once, in place
    np.testing.assert_array_equal(fixed - 10 * x, np.arange(rows) * 3 // rows)
    deal = jax.jit(jax.vmap(lambda key: by_blocks(key, 3, x, apply) - 10 * x))
    members = np.asarray(deal(jax.random.split(jax.random.key(0), 60)))
    share = [np.mean(members == m) for m in range(3)]
    np.testing.assert_allclose(share, 1 / 3, atol=0.12)


def test_ts1_changes_member_and_tsinf_keeps_it():
    # Members that disagree by constants: the path tells who predicted.
    model = probabilistic_ensemble(SPEC, 2, (4,))
    state = jax.jit(model.init)(jax.random.key(0))
    zeros = jax.tree.map(np.zeros_like, state.weights.network)
    zeros["Dense_1"]["bias"][:, 0] = [1.0, -1.0]
    zeros["Dense_1"]["bias"][:, 3:] = -50.0  # log-variances: no noise
    state = state._replace(weights=state.weights._replace(network=zeros))

    def walk(propagation: str) -> np.ndarray:
        step = jax.jit(model.mdp(propagation, uncertainty=False).step)
        obs, path = jnp.zeros((64, 2)), []
        for key in jax.random.split(jax.random.key(1), 12):
            obs, _ = step(state, key, obs, jnp.zeros((64, 1)))
            path.append(obs[:, 0])
        return np.sign(np.round(np.diff(np.stack(path), axis=0)))

    infinite = walk("tsinf")
    assert np.all(infinite[:, :32] == 1) and np.all(infinite[:, 32:] == -1)
    one = walk("ts1")
    assert not np.any(np.all(one == one[0], axis=0))
    assert abs(one.mean()) < 0.2


def test_elites_are_the_members_that_predict():
    model, state, result = fitted(num_elites=1)
    best = int(np.argmin(result.error))
    state = state._replace(elites=jnp.array([best]))
    obs, action = jnp.array([[0.2, 0.3]]), jnp.array([[0.5]])
    mean = jax.jit(model.predict)(state, obs, action).mean[best]
    for propagation in ("ts1", "mean"):
        step = jax.jit(model.mdp(propagation, uncertainty=False).step)
        got, _ = step(state, jax.random.key(0), obs, action)
    want = obs + (state.targets.mean + state.targets.std * mean)[:, :2]
    np.testing.assert_allclose(got, want, rtol=1e-5)  # the deterministic one


def test_angles_wrap_and_absolute_targets_do_not_add():
    model = probabilistic_ensemble(SPEC, 2, (8,), targets=("angle", "absolute"))
    state = jax.jit(model.init)(jax.random.key(0))
    obs = jnp.array([[jnp.pi - 0.01, 100.0]])
    turned = obs - jnp.array([[2 * jnp.pi, 0.0]])
    predict = jax.jit(model.predict)
    a, b = (predict(state, o, jnp.zeros((1, 1))).mean for o in (obs, turned))
    np.testing.assert_allclose(a, b, atol=1e-4)  # the input does not see full turns
    data = Transition(obs, jnp.zeros((1, 1)), jnp.zeros(1), turned + 0.05, jnp.zeros(1, bool))
    state = jax.jit(model.standardize)(state, data, jnp.ones(1, bool))
    np.testing.assert_allclose(state.targets.mean[:2], [0.05, 100.05], atol=1e-4)
    flat, _ = jax.jit(model.mdp("mean").step)(state, jax.random.key(0), obs, jnp.zeros((1, 1)))
    assert np.all(np.abs(flat[:, 0]) <= np.pi)
    np.testing.assert_allclose(wrap_angle(jnp.array([3.5 * jnp.pi])), [-0.5 * jnp.pi], atol=1e-5)


def test_one_members_gradient_never_reaches_another():
    model = probabilistic_ensemble(SPEC, 3, (8,))
    state = jax.jit(model.init)(jax.random.key(0))
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (3, *x.shape)), toy_data(16))

    def second(weights):
        return model.loss(weights, state, batch)[0][1]

    for leaf in jax.tree.leaves(jax.jit(jax.grad(second))(state.weights)):
        assert np.any(leaf[1] != 0)
        assert np.all(leaf[0] == 0) and np.all(leaf[2] == 0)


def test_log_variance_bounds_are_learned_only_when_asked_and_never_decayed():
    for learned in (True, False):
        model = probabilistic_ensemble(SPEC, 2, (8,), learn_bounds=learned)
        state = jax.jit(model.init)(jax.random.key(0))
        batch = jax.tree.map(lambda x: np.broadcast_to(x, (2, *x.shape)), toy_data(16))

        @jax.jit
        @jax.grad
        def gradient(weights, model=model, state=state, batch=batch):
            return model.loss(weights, state, batch)[0].sum()

        grads = gradient(state.weights)
        # Beyond the penalty on their distance, whose gradient is the same everywhere:
        penalty = 0.01 / 3 if learned else 0.0
        moved = np.any(np.abs(grads.logvar_high - penalty) > 1e-6)
        assert moved == learned
        mask = optim.decay_mask(state.weights)
        assert not mask.logvar_low and not mask.logvar_high
        assert mask.network["Dense_0"]["kernel"] and not mask.network["Dense_0"]["bias"]


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_rare_noise_is_told_from_none(beta):
    """Few rows need a large variance; the bounds must neither collapse nor cross."""
    model = probabilistic_ensemble(SPEC, 2, (32, 32), nll_beta=beta)
    data = toy_data(1500)
    rare = data.obs[:, 1] > 0.9
    quiet = data.next_obs.at[:, 0].set(data.obs[:, 0] + 0.1 * data.obs[:, 1])
    data = data._replace(next_obs=jnp.where(rare[:, None], data.next_obs, quiet))
    everything = jnp.ones(1500, bool)
    state = model.standardize(model.init(jax.random.key(0)), data, everything)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def fit(key):
        return fit_members(
            lambda weights, rows: model.loss(weights, state, rows), None, optimizer,
            state.weights, optimizer.init(state.weights), data, everything, ~everything, key,
            FitConfig(batch_size=64, max_epochs=120),
        ).weights  # fmt: skip

    weights = fit(jax.random.key(1))
    assert np.all(weights.logvar_high > weights.logvar_low)
    obs = jnp.array([[0.0, 0.0], [0.5, 0.5], [0.0, 0.95]])
    var = model.predict(state._replace(weights=weights), obs, jnp.zeros((3, 1))).var.mean(0)
    sd = np.sqrt(np.asarray(var)) * np.asarray(state.targets.std)
    assert np.all(sd[:2, 0] < 0.2 * NOISE)
    assert 0.5 * NOISE < sd[2, 0] < 2.0 * NOISE


def test_the_loss_weighs_rows_by_their_variance():
    batch = toy_data(16)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), batch)
    y = jnp.concatenate([batch.next_obs - batch.obs, batch.reward[:, None]], 1)
    for beta in (0.0, 0.5):
        model = probabilistic_ensemble(SPEC, 2, (8,), nll_beta=beta)
        state = model.standardize(model.init(jax.random.key(0)), batch, jnp.ones(16, bool))
        out = model.predict(state, batch.obs, batch.action)
        error = (y - state.targets.mean) / state.targets.std - out.mean
        nll = 0.5 * (error**2 / out.var + jnp.log(2 * np.pi * out.var)) * out.var**beta
        want = nll.mean((1, 2)) + 0.01 * (0.5 + 10.0)
        np.testing.assert_allclose(model.loss(state.weights, state, rows)[0], want, rtol=1e-5)


# --- fitting ----------------------------------------------------------------------------


def linear_fit(
    holdout_target: Any, epochs: int = 30, patience: int = 3, averaging: float = 0.0, **config: Any
) -> Any:
    """Two members descend `(w - target)^2`; the held-out target of each is its own."""
    data = {"x": jnp.zeros(40)}
    optimizer = optax.sgd(0.05)
    weights = {"w": jnp.array([[4.0], [4.0]])}

    def loss(weights, batch):
        return jnp.sum((weights["w"] - 0.0) ** 2, 1) + 0.0 * batch["x"].sum(1), {}

    def error(weights, batch, mask):
        return jnp.log(jnp.abs(weights["w"][:, 0] - jnp.asarray(holdout_target)) + 1e-3)

    held = jnp.arange(40) < 8
    settings = FitConfig(
        batch_size=32, max_epochs=epochs, patience=patience, min_batches=1,
        averaging=averaging, **config,
    )  # fmt: skip

    @jax.jit
    def fit(key):
        opt_state = optimizer.init(weights)
        return fit_members(
            loss, error, optimizer, weights, opt_state, data, ~held, held, key, settings
        )

    return fit(jax.random.key(0))


def test_each_member_keeps_its_own_best_weights_and_stops_alone():
    # Member 0 is best near w = 3, member 1 keeps improving towards 0: stopping the first
    # must not stop or restore the second.
    fit = linear_fit([3.0, 0.0])
    assert abs(float(fit.weights["w"][0, 0]) - 3.0) < 0.35
    assert abs(float(fit.weights["w"][1, 0])) < 0.2
    assert float(fit.metrics["model/epochs"]) > 10


def test_stops_when_all_members_are_stale():
    fit = linear_fit([4.0, 4.0], patience=2)
    assert float(fit.metrics["model/epochs"]) == 2
    np.testing.assert_allclose(fit.weights["w"], 4.0)


def test_averaged_weights_are_what_is_kept():
    plain, averaged = (linear_fit([0.0, 0.0], epochs=3, averaging=a) for a in (0.0, 0.5))
    w, average = 4.0, 4.0
    for _ in range(3):
        w *= 0.9
        average = 0.5 * average + 0.5 * w
    np.testing.assert_allclose(plain.weights["w"], w, rtol=1e-5)
    np.testing.assert_allclose(averaged.weights["w"], average, rtol=1e-5)


def test_no_data_changes_nothing():
    weights = {"w": jnp.ones((2, 1))}
    optimizer = optax.sgd(0.1)
    nothing = jnp.zeros(10, bool)
    fit = fit_members(
        lambda w, b: (jnp.sum(w["w"] ** 2, 1), {}), lambda w, b, m: jnp.zeros(2),
        optimizer, weights, optimizer.init(weights), {"x": jnp.zeros(10)}, nothing, nothing,
        jax.random.key(0), FitConfig(),
    )  # fmt: skip
    np.testing.assert_array_equal(fit.weights["w"], 1.0)


def test_held_out_rows_are_spread_over_all_of_them_where_there_are_too_many():
    weights, optimizer = {"w": jnp.ones((2, 1))}, optax.sgd(0.1)
    data = {"x": jnp.arange(40.0)}

    def error(weights, batch, mask):  # names the rows that it was shown
        return jnp.sum(mask * 50.0 ** -jnp.arange(len(mask)) * batch["x"]) * jnp.ones(2)

    def shown(held, most):
        fit = fit_members(
            lambda w, b: (jnp.sum(w["w"] ** 2, 1) + 0.0 * b["x"].sum(1), {}), error,
            optimizer, weights, optimizer.init(weights), data, ~held, held, jax.random.key(0),
            FitConfig(batch_size=8, max_epochs=1, min_batches=1, max_holdout=most),
        )  # fmt: skip
        return float(fit.error[0])

    held = (jnp.arange(40) >= 4) & (jnp.arange(40) % 3 > 0)  # 24 rows, the first of which is 4
    place = np.flatnonzero(held)
    for most, rows in ((4, place[[0, 6, 12, 18]]), (30, place)):
        want = np.sum(rows * 50.0 ** -np.arange(len(rows)))
        np.testing.assert_allclose(shown(held, most), want, rtol=1e-6)


def test_bootstrap_is_drawn_once_with_replacement_from_the_valid_rows():
    rows = jnp.arange(100, 200)
    members = np.asarray(bootstrap_rows(jax.random.key(0), 3, rows, jnp.array(60), True))
    assert members.max() < 160 and members.min() >= 100
    counts = np.bincount(members[0, :60] - 100, minlength=60)
    assert counts.max() > 1 and abs(np.mean(counts == 0) - np.exp(-1)) < 0.15
    assert not np.array_equal(members[0], members[1])
    same = bootstrap_rows(jax.random.key(0), 3, rows, jnp.array(60), False)
    np.testing.assert_array_equal(same, np.broadcast_to(rows, (3, 100)))


def test_a_members_resample_stays_the_same_over_all_epochs():
    # A row outside a member's resample never reaches its gradient, however long it trains.
    num = 24
    optimizer = optax.sgd(1.0)
    weights = {"seen": jnp.zeros((2, num))}

    def loss(weights, batch):  # marks the rows that the member was shown
        hot = jax.nn.one_hot(batch["row"], num)
        return -jnp.einsum("nbk,nk->n", hot, weights["seen"]), {}

    train = jnp.ones(num, bool)
    fit = fit_members(
        loss, lambda w, b, m: jnp.zeros(2), optimizer, weights, optimizer.init(weights),
        {"row": jnp.arange(num)}, train, jnp.zeros(num, bool), jax.random.key(3),
        FitConfig(batch_size=8, max_epochs=25, patience=25, averaging=0.0),
    )  # fmt: skip
    unseen = np.mean(np.asarray(fit.weights["seen"]) == 0, axis=1)
    assert np.all(unseen > 0.15)  # exp(-1) on average; 0 if redrawn every epoch


def test_select_members_mixes_rows():
    new, old = {"a": jnp.ones((3, 2))}, {"a": jnp.zeros((3, 2))}
    got = select_members(jnp.array([True, False, True]), new, old)["a"]
    np.testing.assert_array_equal(got, [[1, 1], [0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_elites": 6}, "num_elites: got 6, expected 1 to num_members = 5"),
        ({"targets": ("delta",) * 3}, "each of the 2 dimensions"),
        ({"targets": "sideways"}, "expected delta, absolute or angle"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        probabilistic_ensemble(SPEC, **settings)


def test_unknown_propagation_and_missing_start_are_refused():
    model = probabilistic_ensemble(SPEC, 2, (4,))
    with pytest.raises(ValueError, match="propagation: got 'ts9'"):
        model.mdp("ts9")
    with pytest.raises(ValueError, match="with_resets"):
        model.mdp().init(model.init(jax.random.key(0)), jax.random.key(0))

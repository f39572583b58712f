"""PPO learns from its own newest steps alone, knows ends from cuts, and stops where it should."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.ppo import PPOConfig, make_ppo, ppo_loss, rollout_of
from mbrl import normalization, policies, replay, spaces
from mbrl.mdp import SplitParams, episodic, timestep, with_resets
from mbrl.models.probabilistic import probabilistic_ensemble
from mbrl.models.rssm import rssm
from mbrl.models.rssm_networks import RSSMConfig
from mbrl.models.token import token_mdp
from mbrl.networks.actor_critic import ActorCritic, evaluate
from mbrl.networks.observation import prepare
from mbrl.networks.transformer import family_config, transformer
from mbrl.policies import Policy
from mbrl.training.device import run_device
from mbrl.training.learner import (
    DriverConfig,
    Report,
    init_learner,
    learner_act,
    learner_update,
    per_call,
)
from mbrl.types import MDP, Discrete, EnvSpec, MultiDiscrete, Outcome

TINY = PPOConfig(rollout=32, epochs=3, minibatches=4, hidden=(8,), learning_rate=3e-3)
LINE = spaces.box(-np.inf, np.inf, (2,))
KEY = jax.random.key(3)
TASKS = {
    "push": EnvSpec("push", LINE, Discrete(3), 5),
    "reach": EnvSpec("reach", LINE, spaces.box(-1.0, 3.0, (2,)), 5),
    "dials": EnvSpec("dials", LINE, MultiDiscrete((2, 3)), 5),
    "both": EnvSpec("both", LINE, {"a": Discrete(2), "b": spaces.box(0.0, 1.0, (1,))}, 5),
    "camera": EnvSpec(
        "camera", {"camera": spaces.box(0, 255, (8, 8, 1), np.uint8), "speed": LINE}, Discrete(2), 5
    ),
}


def task(spec: EnvSpec, terminal_after: int = 3, reward: float = 1.0) -> MDP:
    """Walk at random whatever is done; half of the episodes end by themselves, early."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return jax.random.normal(key, (batch, 3)).at[:, 2].set(0.0)

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        moved = state + 0.3 * jax.random.normal(key, state.shape)
        moved = moved.at[:, 2].set(state[:, 2] + 1.0)
        over = (moved[:, 2] >= terminal_after) & (moved[:, 0] > 0.0)
        return moved, Outcome(jnp.full(over.shape, reward), 1.0 - over, None)

    def observe(params: Any, state: Any) -> Any:
        if spec.id != "camera":
            return state[:, :2]
        image = jnp.broadcast_to(jnp.uint8(128), (state.shape[0], 8, 8, 1))
        return {"camera": image, "speed": state[:, :2]}

    return MDP(init, step, observe, spec)


def run(mdp: MDP, config: PPOConfig, steps: int, num_envs: int = 4, seeds: Any = (0,)) -> Report:
    driver = DriverConfig(steps, num_envs, seeds, interval=config.rollout)
    reports = run_device(lambda hyper: make_ppo(mdp.spec, config), mdp, driver)
    return collections.deque(reports, maxlen=1).pop()


def rollout(config: PPOConfig, updates: int, name: str = "reach") -> tuple[Any, Any]:
    """Return the learner and the batch of its next update, after some updates."""
    mdp = task(TASKS[name])
    agent = make_ppo(mdp.spec, config)
    learner, stream = init_learner(agent, mdp.spec, 4, KEY), episodic(mdp, 5)
    state = stream.init(None, KEY, None, 4)
    for t in range(8 * (updates + 1)):
        learner, record, _ = learner_act(agent, learner, timestep(stream, None, state), "explore")
        learner = learner._replace(ring=replay.add(learner.ring, record))
        state = stream.step(None, jax.random.fold_in(KEY, t), state, record.action)[0]
        if t % 8 == 7 and t < 8 * updates:
            learner, _ = learner_update(agent, learner)
    return learner, replay.sample(learner.ring, KEY, per_call(agent.sampling, 4))


@pytest.mark.parametrize(
    ("name", "memory"),
    [("push", 0), ("reach", 0), ("dials", 0), ("both", 4), ("camera", 4)],
)
def test_the_first_ratio_of_every_update_is_one(name, memory):
    # After updates of weights and of moments, and across the ends of episodes.
    config = dataclasses.replace(TINY, memory=memory, length=4)
    mdp = task(TASKS[name])
    driver = DriverConfig(160, 4, (0,), interval=32)
    seen = []
    for report in run_device(lambda hyper: make_ppo(mdp.spec, config), mdp, driver):
        seen.append(report.metrics)
    ratios = [float(m["policy/first_ratio"][0]) for m in seen if m]
    assert len(ratios) >= 4
    assert max(ratios) < 1e-5
    assert all(np.isfinite(value).all() for m in seen for value in m.values())
    assert max(float(m["policy/ratio"][0]) for m in seen if m) > 1e-3  # later ones are not


def test_the_distance_from_the_first_policy_is_that_of_its_weights():
    found = []
    for updates in (0, 6):
        learner, batch = rollout(TINY, updates)
        spec, state = TASKS["reach"], learner.agent
        _, metrics, _ = make_ppo(spec, TINY).update(state, batch, KEY)
        found.append(float(metrics["policy/kl_from_start"]))
        # Actions of the newest policy are as likely under the first weights as those make them.
        seen = prepare(spec.observation, batch.record.obs.reshape(-1, 2), state.obs)
        fixed = tuple(bool(x) for x in policies.deviations(spec.action))
        net = ActorCritic(fixed, TINY.log_std, TINY.hidden, TINY.memory)
        is_first = jnp.ones(seen.vector.shape[0], bool)
        _, outputs, _ = evaluate(net, state.start, jnp.zeros((is_first.size, 0)), seen, is_first)
        sample, old = (
            batch.record.extras[k].reshape(is_first.size, -1) for k in ("sample", "log_prob")
        )
        log_ratio = Policy(spec.action, outputs, plain=True).log_prob(sample) - old[:, 0]
        each = (jnp.expm1(log_ratio) - log_ratio).reshape(4, 8)[:, :-1]
        counts = ~(batch.record.is_last[:, :-1] | batch.record.is_first[:, 1:])
        np.testing.assert_allclose(found[-1], each[counts].mean(), rtol=1e-3, atol=1e-6)
    assert abs(found[0]) < 1e-6
    assert found[1] > 1e-3


def test_a_rollout_is_what_one_state_of_the_agent_has_done():
    for updates in (0, 3):
        _, batch = rollout(TINY, updates)
        assert batch.valid.shape == (4, 8)
        assert bool(batch.valid.all())


def test_loss_equals_a_plain_restatement():
    config = dataclasses.replace(TINY, value_clip=0.1, entropy=0.02, discount=0.9, trace=0.8)
    learner, batch = rollout(config, 2)
    state, record = learner.agent, jax.tree.map(np.asarray, batch.record)
    agent_spec = TASKS["reach"]

    net = ActorCritic((False, False, True, True), 0.0, (8,), 0)
    data, units = rollout_of(agent_spec, config, net, state, batch)
    other = jax.tree.map(lambda x: x * 1.1, state.params)
    got, metrics = ppo_loss(agent_spec, config, net, other, data)

    def plainly(params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = prepare(LINE, record.obs.reshape(-1, 2), state.obs)
        _, out, value = net.apply({"params": params}, jnp.zeros((32, 0)), seen, jnp.zeros(32, bool))  # pyright: ignore
        out, value = np.float64(np.asarray(out)), np.float64(np.asarray(value))
        mean, log_std = out[:, :2], out[:, 2:]
        z = (record.extras["sample"].reshape(32, 2) - mean) / np.exp(log_std)
        law = -0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)
        entropy = log_std + 0.5 * np.log(2 * np.pi * np.e)
        return law.sum(1).reshape(4, 8), value.reshape(4, 8), entropy.sum(1).reshape(4, 8)

    old_log, old_value, _ = plainly(state.params)
    new_log, new_value, entropy = plainly(other)
    std = float(units.std)
    rows = []
    for e in range(4):
        running = 0.0
        advantages: dict[int, float] = {}
        for t in reversed(range(7)):
            if record.is_last[e, t]:
                running = 0.0
                continue
            alive = 1.0 - record.is_terminal[e, t + 1]
            bootstrap = 0.9 * alive * old_value[e, t + 1]
            delta = record.reward[e, t + 1] / std + bootstrap - old_value[e, t]
            running = delta + 0.9 * 0.8 * alive * (0.0 if record.is_last[e, t + 1] else running)
            advantages[t] = running
        for t, advantage in advantages.items():
            ratio = np.exp(new_log[e, t] - old_log[e, t])
            near = old_value[e, t] + np.clip(new_value[e, t] - old_value[e, t], -0.1, 0.1)
            target = advantage + old_value[e, t]
            worst = max((new_value[e, t] - target) ** 2, (near - target) ** 2)
            rows.append((advantage, ratio, 0.5 * worst, entropy[e, t]))
    advantage, ratio, error, entropy = np.array(rows).T
    assert len(rows) == int(data.weight.sum()) < 28
    white = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    gain = np.minimum(ratio * white, np.clip(ratio, 0.8, 1.2) * white)
    wanted = -gain.mean() + 0.5 * error.mean() - 0.02 * entropy.mean()
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["value/loss"], error.mean(), rtol=1e-4)


def test_returns_are_divided_by_their_running_deviation():
    learner, batch = rollout(TINY, 0)
    mdp = TASKS["reach"]

    net = ActorCritic((False, False, True, True), 0.0, (8,), 0)
    _, units = rollout_of(mdp, TINY, net, learner.agent, batch)
    sums, record = [], jax.tree.map(np.asarray, batch.record)
    for e in range(4):
        total = 0.0
        for t in range(8):
            total = record.reward[e, t] + (0.0 if record.is_first[e, t] else 0.99 * total)
            sums.append(total)
    np.testing.assert_allclose(units.std, np.std(sums), rtol=1e-5)
    off = dataclasses.replace(TINY, normalize_reward=False)
    assert float(rollout_of(mdp, off, net, learner.agent, batch)[1].std) == 1.0


@pytest.mark.parametrize(("limit", "value"), [(None, 1.0), (3, 2.0)])
def test_a_cut_is_worth_what_follows_and_an_end_is_not(limit, value):
    # Reward 1 and a discount of a half: 2 for ever, and 1 where every step is the last.
    spec = TASKS["push"]._replace(max_episode_steps=limit)
    mdp = task(spec, terminal_after=1 if limit is None else 99)._replace(
        observe=lambda params, state: jnp.zeros((state.shape[0], 2))
    )
    if limit is None:
        step = mdp.step

        def ends(params: Any, key: Any, state: Any, action: Any) -> Any:
            state, outcome = step(params, key, state, action)
            return state, outcome._replace(discount=jnp.zeros(state.shape[0]))

        mdp = mdp._replace(step=ends)
    config = dataclasses.replace(
        TINY, discount=0.5, normalize_reward=False, learning_rate=3e-2, epochs=10
    )
    report = run(mdp, config, 960)
    assert float(report.metrics["value/loss"][0]) < 1e-2
    state = jax.tree.map(lambda x: x[0], report.learner.agent)

    net = ActorCritic((False,) * 3, 0.0, (8,), 0)
    seen = prepare(LINE, jnp.zeros((1, 2)), state.obs)
    out = evaluate(net, state.params, jnp.zeros((1, 0)), seen, jnp.ones(1, bool))
    np.testing.assert_allclose(out[2], value, atol=0.1)


def test_an_update_ends_where_the_policy_has_moved_too_far():
    learner, _ = rollout(TINY, 1)
    agents = [
        make_ppo(TASKS["reach"], dataclasses.replace(TINY, target_kl=kl)) for kl in (0.0, 1e-9, 1e9)
    ]
    free, tight, loose = (learner_update(agent, learner) for agent in agents)
    assert float(tight[1]["policy/stopped"]) == pytest.approx(11 / 12)
    assert float(free[1]["policy/stopped"]) == 0.0

    def moved(found: Any) -> float:
        change = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max(), found[0].agent.params, learner.agent.params
        )
        return float(max(jax.tree.leaves(change)))

    # One step of Adam is about the step size.
    assert 0.0 < moved(tight) <= 3e-3 * 1.5 < moved(free)
    jax.tree.map(
        np.testing.assert_array_equal, free[0].agent.params, loose[0].agent.params
    )  # fmt: skip


def test_the_step_size_falls_to_a_tenth():
    config = dataclasses.replace(TINY, anneal=64)
    mdp = task(TASKS["push"])
    params = [run(mdp, config, steps).learner.agent.params for steps in (32, 64, 96, 128)]

    def moved(a: Any, b: Any) -> float:
        leaves = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.abs(x - y).mean(), a, b))
        return float(np.mean(leaves))

    early, late = moved(params[0], params[1]), moved(params[2], params[3])
    assert 0.05 * early < late < 0.35 * early


def test_a_policy_that_has_moved_since_it_acted_is_noticed():
    learner, batch = rollout(TINY, 1)
    spec, net = TASKS["reach"], ActorCritic((False, False, True, True), 0.0, (8,), 0)
    data, _ = rollout_of(spec, TINY, net, learner.agent, batch)
    assert float(ppo_loss(spec, TINY, net, learner.agent.params, data)[1]["policy/ratio"]) < 1e-5
    stale = learner.agent._replace(obs=normalization.empty((2,)))
    data, _ = rollout_of(spec, TINY, net, stale, batch)
    assert float(ppo_loss(spec, TINY, net, stale.params, data)[1]["policy/ratio"]) > 1e-3


def test_greedy_actions_are_the_same_each_time_and_use_the_statistics_of_training():
    learner, batch = rollout(TINY, 2)
    agent, obs = make_ppo(TASKS["reach"], TINY), batch.record.obs[:, 0]

    def act(state: Any, obs: Any, key: int, mode: Any) -> np.ndarray:
        first = jnp.ones(4, bool)
        out = agent.act(state, agent.begin(4), obs, first, jax.random.key(key), mode)
        return np.asarray(out[0])

    np.testing.assert_array_equal(
        act(learner.agent, obs, 0, "greedy"), act(learner.agent, obs, 1, "greedy")
    )
    assert (act(learner.agent, obs, 0, "explore") != act(learner.agent, obs, 1, "explore")).any()
    assert float(learner.agent.obs.count) == 64
    forgotten = learner.agent._replace(obs=normalization.empty((2,)))
    assert (act(forgotten, obs, 0, "greedy") != act(learner.agent, obs, 0, "greedy")).any()
    bounded = act(learner.agent, 1e6 * obs, 0, "explore")
    assert bounded.min() >= -1.0
    assert bounded.max() <= 3.0


def test_a_gradient_that_is_not_finite_changes_nothing():
    learner, _ = rollout(TINY, 1)
    ring = learner.ring
    broken = ring.record._replace(reward=jnp.full_like(ring.record.reward, jnp.nan))
    after, metrics = learner_update(
        make_ppo(TASKS["reach"], dataclasses.replace(TINY, normalize_reward=False)),
        learner._replace(ring=ring._replace(record=broken)),
    )
    jax.tree.map(np.testing.assert_array_equal, after.agent.params, learner.agent.params)
    assert float(metrics["policy/skipped_in_a_row"]) == 12


def test_seeds_share_a_program_and_nothing_else():
    mdp = task(TASKS["push"])
    both = run(mdp, TINY, 96, seeds=(4, 5)).learner.agent.params
    alone = run(mdp, TINY, 96, seeds=(5,)).learner.agent.params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], atol=2e-5), both, alone
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ensemble", "latent"])
def test_a_learned_model_is_a_task_as_well(kind):
    spec = TASKS["reach"]
    starts = jnp.array([[0.5, -0.5], [0.25, 0.0]])
    if kind == "ensemble":
        ensemble = probabilistic_ensemble(spec, num_members=2, hidden=(8,))
        inner, params = ensemble.mdp("ts1"), ensemble.init(KEY)
    else:
        latent = rssm(spec, RSSMConfig(deter=16, hidden=8, units=8, stoch=4, classes=4))
        inner, params = latent.mdp, latent.init(KEY)
    mdp = with_resets(inner, starts)
    driver = DriverConfig(96, 4, (0,), interval=32)
    reports = run_device(lambda hyper: make_ppo(spec, TINY), mdp, driver, params=params)
    report = collections.deque(reports, maxlen=1).pop()
    assert float(report.metrics["policy/first_ratio"][0]) < 1e-5
    record = jax.tree.map(lambda x: np.asarray(x[0]), report.learner.ring.record)
    begun = record.obs[record.is_first]
    assert len(begun) >= 4
    if kind == "latent":  # what is seen is what the model decodes
        assert len({tuple(obs) for obs in record.obs.reshape(-1, 2).tolist()}) > 8
        return
    assert {tuple(obs) for obs in begun.tolist()} <= {(0.5, -0.5), (0.25, 0.0)}
    assert np.abs(record.reward[~record.is_first]).max() > 0.0


def test_writing_tokens_is_a_task_as_well():
    model = transformer(family_config("gpt2", vocab=5, layers=1, width=8, heads=2, max_length=5))

    def threes(params, tokens, mask):
        score = jnp.sum((tokens[:, 2:] == 3) & mask[:, 2:], 1, dtype=jnp.float32)
        return score, jnp.zeros_like(score)

    writing = token_mdp(model, threes, prompt=2, length=3, eos=4)
    prompts = {"tokens": jnp.array([[0, 1], [3, 1]]), "mask": jnp.array([[0, 1], [1, 1]])}
    params = SplitParams(jax.jit(model.init)(KEY), ())
    driver = DriverConfig(96, 4, (0,), interval=32)
    make = lambda hyper: make_ppo(writing.spec, TINY)  # noqa: E731
    reports = run_device(make, with_resets(writing, prompts), driver, params=params)
    report = collections.deque(reports, maxlen=1).pop()
    assert float(report.metrics["policy/first_ratio"][0]) < 1e-5
    record = jax.tree.map(lambda x: np.asarray(x[0]), report.learner.ring.record)
    # A response is scored where it ends, after three tokens or by token 4, and nowhere else.
    written = np.where(record.obs["mask"][..., 2:] > 0, record.obs["tokens"][..., 2:], -1)
    ended = (written[..., 2] >= 0) | (written == 4).any(-1)
    assert (ended == record.is_last).all() and ended.any()
    np.testing.assert_array_equal(record.reward, np.where(ended, (written == 3).sum(-1), 0))
    assert record.reward.max() > 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"minibatches": 64}, ["64 minibatches of 32 rows", "--minibatches"]),
        ({"memory": 4, "length": 3}, ["8 records per environment", "length 3", "--rollout"]),
    ],
)
def test_rollouts_that_cannot_be_cut_are_refused(changes, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        run(task(TASKS["push"]), dataclasses.replace(TINY, **changes), 64)


def test_more_environments_than_half_a_rollout_are_refused():
    with pytest.raises(ValueError, match=r"num_envs: got 32 .* 32 .*--rollout"):
        run(task(TASKS["push"]), TINY, 64, num_envs=32)


@pytest.mark.parametrize(
    "wrong", [{"rollout": 0}, {"clip": 0.0}, {"discount": 1.1}, {"memory": -1}, {"target_kl": -1.0}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PPOConfig(**wrong)


def test_a_game_of_two_is_refused():
    with pytest.raises(ValueError, match="PPO"):
        make_ppo(TASKS["push"]._replace(players=2))

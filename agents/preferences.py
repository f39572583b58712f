"""Any agent on a reward that is learned from comparisons of trajectory segments.

`with_preferences` wraps an agent. Now and then it asks which of two segments is better, fits an
ensemble of reward heads to the answers, and hands the agent its records with the reward that these
predict: the newest rollout, minibatches or the whole of replay, relabelled whenever it is read.

Reference: Christiano et al. 2017 (arXiv:1706.03741); relabelling of replay after PEBBLE, Lee et al.
2021 (arXiv:2106.05091); teachers and queries after B-Pref (arXiv:2111.03026).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mbrl import normalization, optim, spaces
from mbrl.losses.preference import pair_nll, segment_scores
from mbrl.models.reward import RewardModel, RewardState, reward_model
from mbrl.normalization import Moments
from mbrl.preferences.ahead import aligned, cut, longer
from mbrl.preferences.comparisons import Comparisons, add, empty, filled
from mbrl.preferences.evaluation import accuracy, reward_correlation
from mbrl.preferences.queries import QueryKind, ScheduleKind, schedule, select
from mbrl.preferences.segments import draw, steps_per_call, streams, successors
from mbrl.preferences.teachers import TEACHERS, TeacherConfig, teach
from mbrl.settings import check_whole, check_within
from mbrl.types import (
    Agent,
    Array,
    Batch,
    EnvSpec,
    Key,
    Metrics,
    Params,
    State,
    Transition,
)

STEPS = 50
"""Environment steps that the heads learn for at a time, at least."""


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """Settings of a reward learned from preferences; sources are Christiano et al. (C) and B-Pref
    (B), or measured on small tasks here (M).
    """

    labels: int = 0
    """Comparisons to ask for in all; 0 = learn from the reward of the environment."""
    sessions: int = 20
    """Times that the teacher is asked (M)."""
    ask_every: int = 1000
    """Environment steps from one session to the next, rounded to whole updates (M)."""
    first: float = 0.25
    """Share of the labels that the first session asks for."""
    rate: ScheduleKind = "decaying"
    """Of the labels per session after the first."""
    segment: int = 15
    """Transitions per segment (C: one to two seconds; M)."""
    query: QueryKind = "disagreement"
    """How queries are chosen (C)."""
    pool: int = 10
    """Candidates per query of the largest session, which are that many in all of them (B: 10)."""
    teacher: Literal["oracle", "stochastic", "myopic", "skip", "mistake", "equal", "people"] = (
        "oracle"
    )
    """Synthetic annotator, who sees the true reward (B); or people, by `mbrl label RUN`."""
    mistake: float = 0.1
    """Probability that the teacher 'mistake' says the opposite (B)."""
    members: int = 3
    """Reward heads (C)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of their hidden layers (C)."""
    learning_rate: float = 1e-3
    """Step size of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled decay of the kernels."""
    batch_size: int = 32
    """Comparisons per gradient of each head."""
    updates: int = 100
    """Gradients per update of the agent, or per 50 environment steps where it learns more often
    than that (M)."""
    error: float = 0.1
    """Probability that an answer is taken for a random one (C)."""
    penalty: float = 0.0
    """Reward subtracted per standard deviation between heads; < 0 is optimism."""

    def __post_init__(self) -> None:
        check_whole(self, "labels", least=0, prefix="preferences.")
        names = ("sessions", "ask_every", "segment", "pool", "members", "batch_size", "updates")
        check_whole(self, *names, prefix="preferences.")
        check_within(self, "first", 0, 1, "[)", prefix="preferences.")
        check_within(self, "error", 0, 1, "[)", prefix="preferences.")
        check_within(self, "mistake", 0, 1, prefix="preferences.")
        check_within(self, "learning_rate", 0, ends="(]", prefix="preferences.")


class PreferencesState(NamedTuple):
    """State of the agent, and everything that its reward is learned with."""

    agent: State
    reward: RewardState
    opt_state: optax.OptState
    comparisons: Comparisons
    pending: Comparisons
    """Queries without an answer, for people; whoever drives the loop takes them away."""
    calls: Array
    session: Array
    known: Array
    """Answers that the heads have learned from."""
    agreement: Array
    """Of the heads with the newest answers, before they learned from them."""
    truth: Moments
    """Of the true reward of labelled steps, which no head has seen; empty with people."""


def with_preferences(agent: Agent, spec: EnvSpec, config: PreferencesConfig) -> Agent:
    """Let an agent learn from preferences instead of the reward of its environment.

    The reward of the environment is what synthetic teachers answer by, and metrics compare with;
    the agent never sees it.

    Args:
      agent: any.
      spec: of its task.
      config: see `PreferencesConfig`.

    Raises:
      ValueError: for settings that ask for nothing, or an agent that draws by priority.
    """
    if agent.sampling.priority:
        raise ValueError(
            "priority: got an agent that draws sequences by priority, expected uniform ones, "
            "because they begin one record earlier to tell the first reward; set --priority 0"
        )
    if not config.labels:
        raise ValueError("preferences.labels: got 0, expected at least 1 comparison; set it to 200")
    model = reward_model(spec, config.members, config.hidden)
    labels = schedule(config.labels, config.sessions, config.rate, config.first)
    asked = int(labels.max())
    sampling = longer(agent.sampling, config.segment)
    decay = optax.adamw(
        config.learning_rate, weight_decay=config.weight_decay, mask=optim.decay_mask
    )
    optimizer = optim.apply_if_finite_counted(decay)

    def init(key: Key) -> PreferencesState:
        agent_key, reward_key = jax.random.split(key)
        reward = model.init(reward_key)
        units = jnp.zeros((config.members, 1)), jnp.ones((config.members, 1))
        example, zero = _example(spec, config), jnp.zeros((), int)
        comparisons = empty(example, config.labels)
        pending = empty(example, asked if config.teacher == "people" else 1)
        return PreferencesState(
            agent.init(agent_key), reward._replace(offset=units[0], scale=units[1]),
            optimizer.init(reward.weights), comparisons, pending, zero, zero, zero, jnp.zeros(()),
            normalization.empty(),
        )  # fmt: skip

    def act(state: PreferencesState, *args: Any) -> tuple[Any, Any, Any]:
        return agent.act(state.agent, *args)

    def ask(state: PreferencesState, batch: Batch, key: Key) -> PreferencesState:
        draw_key, select_key, teach_key = jax.random.split(key, 3)
        record, starts = streams(batch, agent.sampling.kind == "all")
        num = 2 * config.pool * asked
        found, enough = draw(record, starts, draw_key, num, config.segment)
        pairs = jax.tree.map(lambda x: x.reshape(num // 2, 2, *x.shape[1:]), found)
        scores = segment_scores(score(model, state.reward, pairs))
        known = filled(state.comparisons)
        seen = [_features(spec, state.reward, x) for x in (pairs, state.comparisons.segments)]
        rows = select(config.query, select_key, scores, seen[0], asked, seen[1], known)
        pairs = jax.tree.map(lambda x: x[rows], pairs)
        keep = enough & (jnp.arange(asked) < jnp.asarray(labels)[state.session])
        # Where no episode has been long enough for a segment, the session is held later.
        state = state._replace(session=state.session + enough)
        if config.teacher == "people":
            unknown = jnp.full((asked, 2), -1)
            return state._replace(pending=add(state.pending, pairs, unknown, keep)[0])
        scale = config.segment * jnp.sum(starts * successors(record).reward) / starts.sum()
        rank, answered = teach(_annotator(config), teach_key, pairs.reward, scale)
        keep = keep & answered
        labelled = jnp.broadcast_to(keep[:, None, None], pairs.reward.shape)
        truth = normalization.update(state.truth, pairs.reward, labelled)
        comparisons, _ = add(state.comparisons, pairs, rank, keep)
        return state._replace(comparisons=comparisons, truth=truth)

    def update(state: PreferencesState, batch: Batch, key: Key) -> tuple[Any, Metrics, Any]:
        ask_key, fit_key, agent_key = jax.random.split(key, 3)
        _check_time(batch.valid.shape[-1], config)
        steps = steps_per_call(agent.sampling, batch)
        calls_per_session = max(1, round(config.ask_every / steps))
        gradients = max(1, round(config.updates * min(1.0, steps / STEPS)))
        due = (state.calls % calls_per_session == 0) & (state.session < config.sessions)
        due = due & (state.pending.size == 0)
        state = jax.lax.cond(due, ask, lambda state, *_: state, state, batch, ask_key)
        state = meet(model, state)
        reward, opt_state, fitted = fit_reward(config, model, optimizer, state, fit_key, gradients)
        batch, metrics = relabel(config, model, reward, batch, agent.sampling.kind == "all")
        seen = cut(batch, agent.sampling)
        inner, learned, feedback = agent.update(state.agent, seen, agent_key)
        state = state._replace(
            agent=inner, reward=reward, opt_state=opt_state, calls=state.calls + 1
        )
        if config.teacher != "people":
            truth = normalization.normalize(state.truth, metrics["preferences/true_reward"])
            metrics["preferences/gap"] = metrics["preferences/reward"] - truth
        metrics |= {
            "preferences/agreement": state.agreement,
            "preferences/labels": 1.0 * state.comparisons.size,
        }
        return state, learned | fitted | metrics, aligned(feedback, batch)

    return Agent(init, agent.begin, act, update, sampling)


def meet(model: RewardModel, state: PreferencesState) -> PreferencesState:
    """Compare the heads with answers that they have not learned from, whoever gave them."""
    answers = state.comparisons
    fresh = filled(answers) & (jnp.arange(answers.rank.shape[0]) >= state.known)
    foretold = segment_scores(score(model, state.reward, answers.segments)).mean(0)
    agreement = jnp.where(fresh.any(), accuracy(foretold, answers.rank, fresh), state.agreement)
    return state._replace(known=answers.size, agreement=agreement)


def score(model: RewardModel, state: RewardState, segments: Transition) -> Array:
    """Return what each head gives to every step, [N, ...], in the units of its own network."""
    members = state.offset.shape[0]
    own = state._replace(offset=jnp.zeros(()), scale=jnp.ones(()))
    everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (members, *x.shape)), segments)
    return model.score(state.weights, own, everyone)


def fit_reward(
    config: PreferencesConfig, model: RewardModel, optimizer: Any, state: PreferencesState,
    key: Key, gradients: int,
) -> tuple[RewardState, optax.OptState, Metrics]:  # fmt: skip
    """Fit the heads to all answers so far by some gradients, and put them on one scale.

    Returns:
      The reward model, whose heads have mean 0 and deviation 1 over all labelled segments,
      whatever the sizes of their networks' outputs, and give 0 before the first answer; the
      state of the optimizer; and metrics.
    """
    answers, known = state.comparisons, filled(state.comparisons)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), answers.segments)
    steps = jnp.broadcast_to(known[:, None, None], (*answers.rank.shape, config.segment))
    reward = model.standardize(state.reward, rows, steps.reshape(-1))

    def loss(weights: Params, batch: Comparisons) -> tuple[Array, Array]:
        own = reward._replace(offset=jnp.zeros(()), scale=jnp.ones(()))
        returns = segment_scores(model.score(weights, own, batch.segments))  # [N, b, K]

        def nll(scores: Array, rank: Array, margin: Array) -> Array:
            return pair_nll(scores, rank, margin, uniform=config.error)

        errors = jax.vmap(jax.vmap(nll))(returns, batch.rank, batch.margin)
        return errors.mean(1).sum(), errors.mean()

    def learn(carry: Any, key: Key) -> tuple[Any, Array]:
        weights, opt_state = carry
        shape = (config.members, config.batch_size)
        chosen = jax.random.randint(key, shape, 0, jnp.maximum(answers.size, 1))
        batch = jax.tree.map(lambda x: x[chosen], answers._replace(size=known))
        grads, error = jax.grad(loss, has_aux=True)(weights, batch)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        return (cast(Params, optax.apply_updates(weights, updates)), opt_state), error

    start, keys = (reward.weights, state.opt_state), jax.random.split(key, gradients)
    (weights, opt_state), errors = jax.lax.scan(learn, start, keys)
    reward = reward._replace(weights=weights)
    given = score(model, reward, answers.segments)  # [N, Q, K, L]
    count = jnp.maximum(steps.sum(), 1)
    mean = jnp.sum(given * steps, (1, 2, 3)) / count
    offset = mean[:, None, None, None]
    std = jnp.sqrt(jnp.sum(jnp.square(given - offset) * steps, (1, 2, 3)) / count + 1e-8)
    # Until there is an answer, all that is done is worth the same.
    scale = jnp.where(answers.size > 0, 1.0 / std, 0.0)
    reward = reward._replace(offset=(-mean * scale)[:, None], scale=scale[:, None])
    metrics = {
        "preferences/loss": errors.mean(),
        "preferences/accuracy": accuracy(segment_scores(given).mean(0), answers.rank, known),
    }
    return reward, opt_state, metrics | optim.skipped(opt_state, "preferences")


def relabel(
    config: PreferencesConfig, model: RewardModel, state: RewardState, batch: Batch, ring: bool
) -> tuple[Batch, Metrics]:
    """Replace the reward of a batch by what the heads agree on, and compare the two."""
    record, starts = streams(batch, ring)
    step = successors(record)
    rows = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (step.obs, step.action, step.next_obs)
    )
    estimate = model.predict(state, *rows)
    learned = (estimate.mean - config.penalty * estimate.epistemic).reshape(starts.shape)
    # It arrives with the next record; the first of an episode has none.
    arriving = jnp.roll(jnp.where(starts, learned, 0.0), 1, 1).reshape(batch.record.reward.shape)
    count = jnp.maximum(starts.sum(), 1)
    metrics = {
        "preferences/reward": jnp.sum(learned * starts) / count,
        "preferences/true_reward": jnp.sum(step.reward * starts) / count,
        "preferences/correlation": reward_correlation(learned, step.reward, starts),
        "preferences/spread": jnp.sum(estimate.epistemic.reshape(starts.shape) * starts) / count,
    }
    return batch._replace(record=batch.record._replace(reward=arriving)), metrics


def _annotator(config: PreferencesConfig) -> TeacherConfig:
    teacher = TEACHERS[config.teacher]
    return dataclasses.replace(teacher, mistake=config.mistake) if teacher.mistake else teacher


def _check_time(time: int, config: PreferencesConfig) -> None:
    if time <= config.segment:
        raise ValueError(
            f"preferences.segment: got {config.segment} transitions, expected fewer than the "
            f"{time} records per environment of an update; lower --preferences.segment or "
            "--num-envs, or raise what an update reads (--rollout of ppo)"
        )


def _example(spec: EnvSpec, config: PreferencesConfig) -> Transition:
    batch = (2, config.segment)
    obs, action = (spaces.zeros(space, batch) for space in (spec.observation, spec.action))
    nothing: Any = None
    return Transition(obs, action, nothing, obs, nothing)


def _features(spec: EnvSpec, reward: RewardState, pairs: Transition) -> Array:
    """Describe pairs [M, 2, L, ...] by what is seen on average, on the scale of all answers."""
    seen = spaces.flatten(spec.observation, pairs.obs).mean(2)
    size = seen.shape[-1]
    seen = (seen - reward.inputs.mean[:size]) / reward.inputs.std[:size]
    return seen.reshape(seen.shape[0], -1)

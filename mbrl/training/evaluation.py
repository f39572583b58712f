"""Evaluation of a trained agent: greedy episodes, and statistics that tell the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.mdp import episodic, timestep
from mbrl.training.host import HostEnvironment, per_seed, stack
from mbrl.training.learner import AgentFactory, Hyper, over_seeds
from mbrl.types import MDP, Array, Carry, Key, Mode, State, TimeStep

MAX_EPISODE_STEPS = 100_000
"""Length at which an episode on the host is taken to be endless."""


class Statistics(NamedTuple):
    """Summary of a set of returns."""

    mean: float
    std: float
    iqm: float


def statistics(returns: Any) -> Statistics:
    """Summarize returns [n] by mean, population deviation and interquartile mean.

    The interquartile mean drops a quarter at each end, weighing the boundary values by
    the share of them that belongs inside.

    Reference: Agarwal et al. 2021 (arXiv:2108.13264).
    """
    x = np.sort(np.asarray(returns, np.float64).reshape(-1))
    if x.size == 0:
        raise ValueError("returns: expected at least one episode, got none")
    edges = np.arange(x.size + 1) / x.size
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return Statistics(float(x.mean()), float(x.std()), float(np.sum(x * inside) / inside.sum()))


def evaluate_device(
    factory: AgentFactory,
    agent_state: State,
    env: MDP,
    keys: Key,
    episodes: int,
    hyper: Hyper | None = None,
    params: Any = None,
) -> np.ndarray:
    """Play greedy episodes on an `MDP`, all of them at once.

    Args:
      factory: builds the agent.
      agent_state: leaves [S, ...].
      env: the task; needs `spec.max_episode_steps`.
      keys: [S].
      episodes: number per seed.
      hyper: as in training.
      params: parameters of `env`.

    Returns:
      [S, episodes] undiscounted returns.

    Raises:
      ValueError: when the episodes of `env` have no maximal length.
    """
    limit = env.spec.max_episode_steps
    if limit is None:
        raise ValueError(f"env {env.spec.id}: evaluation needs spec.max_episode_steps, got None")
    stream = episodic(env, limit)

    def play(agent_state: State, key: Key, hyper: Hyper) -> Array:
        agent = factory(hyper)
        init_key, key = jax.random.split(key)

        def step(carry: Any, key: Key) -> tuple[Any, None]:
            env_state, acting, total, over = carry
            act_key, env_key = jax.random.split(key)
            now = timestep(stream, params, env_state)
            total = total + jnp.where(over, 0.0, now.reward)
            over = over | now.is_last
            action, acting, _ = agent.act(
                agent_state, acting, now.obs, now.is_first, act_key, "greedy"
            )
            env_state, _ = stream.step(params, env_key, env_state, action)
            return (env_state, acting, total, over), None

        start = (
            stream.init(params, init_key, None, episodes),
            agent.begin(episodes),
            jnp.zeros(episodes),
            jnp.zeros(episodes, bool),
        )
        (_, _, total, _), _ = jax.lax.scan(step, start, jax.random.split(key, limit + 1))
        return total

    return np.asarray(jax.jit(over_seeds(play, keys.shape[0]))(agent_state, keys, hyper or {}))


def evaluate_in_model(
    factory: AgentFactory,
    agent_state: State,
    model: MDP,
    params: Any,
    keys: Key,
    start_obs: Any,
    members: int = 1,
    hyper: Hyper | None = None,
) -> np.ndarray:
    """Predict the return of greedy episodes by a model: offline policy evaluation.

    Reference: Fu et al. 2021 (arXiv:2103.16596), where the model is one of the methods.

    Args:
      factory: builds the agent.
      agent_state: leaves [S, ...].
      model: any decision process whose `init` takes observations, such as a learned one; its
        `spec.max_episode_steps` cuts episodes.
      params: its parameters.
      keys: [S].
      start_obs: observations [M, ...] that every member starts from.
      members: models N that keep an equal share of the rows each, in order (an ensemble under
        'tsinf'); what they disagree about is what the data does not say.
      hyper: as in training.

    Returns:
      [S, N, M] undiscounted returns.

    Raises:
      ValueError: when the episodes have no maximal length.
    """
    num = jax.tree.leaves(start_obs)[0].shape[0]
    starts = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * members), start_obs)

    def init(params: Any, key: Key, obs: Any = None, batch: int = 1) -> State:
        return model.init(params, key, starts)

    at_starts = model._replace(init=init)
    returns = evaluate_device(factory, agent_state, at_starts, keys, members * num, hyper, params)
    return returns.reshape(-1, members, num)


def host_actor(
    factory: AgentFactory, keys: Key, num_envs: int, mode: Mode, hyper: Hyper
) -> tuple[Carry, Callable[..., tuple[Key, Array, Carry]]]:
    """Prepare agents that act in host environments without learning.

    Args:
      factory: builds the agent.
      keys: [S].
      num_envs: environments per seed.
      mode: of `Agent.act`.
      hyper: as in training.

    Returns:
      Carry [S, ...] to begin with, and a compiled `(keys, agent_state, carry, obs, is_first,
      hyper) -> (keys, action, carry)`.
    """

    def act(
        key: Key, state: State, carry: Carry, obs: Any, is_first: Array, hyper: Hyper
    ) -> tuple[Key, Array, Carry]:
        act_key, key = jax.random.split(key)
        action, carry, _ = factory(hyper).act(state, carry, obs, is_first, act_key, mode)
        return key, action, carry

    def begin(hyper: Hyper, key: Key) -> Carry:
        del key
        return factory(hyper).begin(num_envs)

    num_seeds = keys.shape[0]
    return over_seeds(begin, num_seeds)(hyper, keys), jax.jit(over_seeds(act, num_seeds))


def evaluate_host(
    factory: AgentFactory,
    agent_state: State,
    envs: list[HostEnvironment],
    keys: Key,
    seeds: tuple[int, ...],
    episodes: int,
    hyper: Hyper | None = None,
    on_step: Callable[[TimeStep], None] = lambda now: None,
) -> np.ndarray:
    """Play greedy episodes on host environments, `envs[s].num_envs` at a time.

    Each environment plays the same number of episodes, so that short episodes are not
    counted more often than long ones.

    Args:
      factory: builds the agent.
      agent_state: leaves [S, ...].
      envs: one per seed.
      keys: [S].
      seeds: reset seed of each.
      episodes: number per seed; at least `num_envs`.
      hyper: as in training.
      on_step: called with every time step [S, E, ...], for videos.

    Returns:
      [S, episodes] undiscounted returns.

    Raises:
      ValueError: when an episode does not end within `MAX_EPISODE_STEPS`.
    """
    num_envs = envs[0].num_envs
    rounds = -(-episodes // num_envs)

    hyper = hyper or {}
    carry, run_act = host_actor(factory, keys, num_envs, "greedy", hyper)
    now = stack([env.reset(seed) for env, seed in zip(envs, seeds, strict=True)])
    running = np.zeros(now.reward.shape)
    returns: list[list[list[float]]] = [[[] for _ in range(num_envs)] for _ in envs]
    length = np.zeros(now.reward.shape, int)
    while min(len(done) for seed in returns for done in seed) < rounds:
        on_step(now)
        running = np.where(now.is_first, 0.0, running + now.reward)
        length = np.where(now.is_first, 0, length + 1)
        if length.max() > MAX_EPISODE_STEPS:
            raise ValueError(
                f"env {envs[0].spec.id}: an episode has not ended after {MAX_EPISODE_STEPS} steps; "
                "give it a time limit (gymnasium.wrappers.TimeLimit, or max_episode_steps)"
            )
        for s, e in zip(*np.nonzero(now.is_last), strict=True):
            returns[s][e].append(float(running[s, e]))
        keys, action, carry = run_act(keys, agent_state, carry, now.obs, now.is_first, hyper)
        now = stack([env.step(a) for env, a in zip(envs, per_seed(action), strict=True)])
    played = [[r for i in range(rounds) for r in (done[i] for done in seed)] for seed in returns]
    return np.asarray(played)[:, :episodes]

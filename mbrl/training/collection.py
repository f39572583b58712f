"""Fresh experience of an agent that does not learn: data sets for offline training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.mdp import episodic, timestep
from mbrl.training.evaluation import host_actor
from mbrl.training.host import HostEnvironment, stack
from mbrl.training.learner import AgentFactory, over_seeds
from mbrl.types import MDP, Key, Mode, Record, State


def collect_device(
    factory: AgentFactory, agent_state: State, env: MDP, keys: Key, steps: int, num_envs: int,
    mode: Mode, params: Any = None,
) -> Record:  # fmt: skip
    """Act in an `MDP` and keep what happens.

    Args:
      factory: builds the agent.
      agent_state: leaves [S, ...].
      env: the task; episodes end after `env.spec.max_episode_steps`.
      keys: [S].
      steps: records per seed T * E, rounded up to whole steps of all environments.
      num_envs: environments E per seed.
      mode: of `Agent.act`.
      params: parameters of `env`.

    Returns:
      Leaves [S, E, T, ...], without extras.
    """
    stream = episodic(env, env.spec.max_episode_steps)

    def play(agent_state: State, key: Key) -> Record:
        agent = factory({})
        init_key, key = jax.random.split(key)

        def step(carry: Any, key: Key) -> tuple[Any, Record]:
            env_state, acting = carry
            act_key, env_key = jax.random.split(key)
            now = timestep(stream, params, env_state)
            action, acting, _ = agent.act(agent_state, acting, now.obs, now.is_first, act_key, mode)
            env_state, _ = stream.step(params, env_key, env_state, action)
            return (env_state, acting), _record(now, action)

        start = stream.init(params, init_key, None, num_envs), agent.begin(num_envs)
        rows = -(-steps // num_envs)
        record = jax.lax.scan(step, start, jax.random.split(key, rows))[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), record)

    found = jax.jit(over_seeds(play, keys.shape[0]))(agent_state, keys)
    return jax.tree.map(np.asarray, found)


def collect_host(
    factory: AgentFactory, agent_state: State, envs: list[HostEnvironment], keys: Key,
    seeds: tuple[int, ...], steps: int, mode: Mode,
) -> Record:  # fmt: skip
    """Act in host environments and keep what happens.

    Args:
      factory: builds the agent.
      agent_state: leaves [S, ...].
      envs: one per seed, of E environments each.
      keys: [S].
      seeds: reset seed of each.
      steps: records per seed T * E, rounded up to whole steps of all environments.
      mode: of `Agent.act`.

    Returns:
      Leaves [S, E, T, ...], without extras.
    """
    num_envs = envs[0].num_envs
    carry, run_act = host_actor(factory, keys, num_envs, mode, {})
    now = stack([env.reset(seed) for env, seed in zip(envs, seeds, strict=True)])
    rows = []
    for _ in range(-(-steps // num_envs)):
        keys, action, carry = run_act(keys, agent_state, carry, now.obs, now.is_first, {})
        action = jax.tree.map(np.asarray, action)
        # Environments may hand out the same arrays again.
        rows.append(jax.tree.map(np.copy, _record(now, action)))
        each = [jax.tree.map(lambda x, s=s: x[s], action) for s in range(len(envs))]
        now = stack([env.step(a) for env, a in zip(envs, each, strict=True)])
    return jax.tree.map(lambda *x: np.stack(x, 2), *rows)


def _record(now: Any, action: Any) -> Record:
    return Record(
        now.obs, action, now.reward, now.is_first, now.is_last, now.is_terminal, extras=()
    )

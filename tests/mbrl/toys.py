"""An agent and environments small enough that the drivers are all that is tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import spaces
from mbrl.mdp import episodic, timestep
from mbrl.types import MDP, Agent, EnvSpec, Outcome, SampleSpec, TimeStep


def counter_mdp(limit: int | None = 7, goal: float = 1e9) -> MDP:
    """Observe (step, sum of actions); reward 1 per step; terminal when the sum reaches `goal`.

    Every number in it is a small integer, so that no compiler can round it.
    """
    spec = EnvSpec("counter", spaces.box(-np.inf, np.inf, (2,)), spaces.box(0.0, 1.0, (1,)), limit)

    def init(params, key, obs=None, batch=1):
        return jnp.zeros((batch, 2)) if obs is None else obs

    def step(params, key, state, action):
        state = jnp.stack([state[:, 0] + 1, state[:, 1] + jnp.round(action[:, 0])], 1)
        alive = (state[:, 1] < goal).astype(jnp.float32)
        return state, Outcome(jnp.ones(state.shape[0]), alive, jnp.zeros(state.shape[0]))

    return MDP(init, step, lambda params, state: state, spec)


def linear_agent(
    spec: EnvSpec, hyper: Mapping[str, Any] = {}, start: int = 20, every: int = 20
) -> Agent:
    """Regress rewards on observations; act by the weights, the carry and noise.

    It uses all that drivers offer: sequences, extras, feedback, a carry that must be fresh
    at the start of an episode, and a float hyper-parameter.
    """
    rate = hyper.get("learning_rate", 0.01)
    size = spaces.flat_size(spec.observation)

    def init(key):
        return {"w": jax.random.normal(key, (size,)), "updates": jnp.zeros((), jnp.int32)}

    def begin(num_envs):
        return jnp.zeros(num_envs)

    def act(state, carry, obs, is_first, key, mode):
        carry = jnp.where(is_first, 0.0, carry) + 1.0
        action = spaces.sample(spec.action, key, is_first.shape)
        if mode != "random":
            flat = spaces.flatten(spec.observation, obs)
            drive = jnp.tanh(flat @ state["w"] + 0.1 * carry)
            noise = 0.0 if mode == "greedy" else 0.1 * jax.random.normal(key, drive.shape)
            action = spaces.from_unit(spec.action, jnp.clip(drive + noise, -1, 1)[:, None])
        return action, carry, {"latent": carry}

    def update(state, batch, key):
        flat = spaces.flatten(spec.observation, batch.record.obs)

        def loss(w):
            return jnp.mean(jnp.square(jnp.tanh(flat) @ w - batch.record.reward))

        value, grad = jax.value_and_grad(loss)(state["w"])
        w = state["w"] - rate * grad + 1e-3 * jax.random.normal(key, grad.shape)
        feedback = {"latent": 0.5 * batch.record.extras["latent"]}
        return {"w": w, "updates": state["updates"] + 1}, {"loss": value}, feedback

    sampling = SampleSpec("sequences", 60, start, every, updates=2, batch_size=4, length=3)
    return Agent(init, begin, act, update, sampling)


class StreamEnv:
    """Drives an `MDP` step by step, with the keys that `run_device` gives it."""

    def __init__(self, mdp: MDP, num_envs: int) -> None:
        self.spec, self.num_envs = mdp.spec, num_envs
        stream = episodic(mdp, mdp.spec.max_episode_steps)
        self._init = jax.jit(lambda key: stream.init(None, key, None, num_envs))
        self._step = jax.jit(lambda key, state, action: stream.step(None, key, state, action)[0])
        self._read = jax.jit(lambda state: timestep(stream, None, state))
        self._state: Any = None
        self._key: Any = None

    def _now(self) -> TimeStep:
        return jax.tree.map(np.asarray, self._read(self._state))

    def reset(self, seed: int) -> TimeStep:
        init_key, self._key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
        self._state = self._init(init_key)
        return self._now()

    def step(self, action: np.ndarray) -> TimeStep:
        env_key, self._key = jax.random.split(self._key)
        self._state = self._step(env_key, self._state, action)
        return self._now()

    def state(self) -> dict[str, np.ndarray]:
        leaves = jax.tree.leaves(self._state)
        named = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return {**named, "key": np.asarray(jax.random.key_data(self._key))}

    def restore(self, state: dict[str, np.ndarray]) -> TimeStep:
        if self._state is None:
            self.reset(0)
        tree = jax.tree.structure(self._state)
        leaves = [jnp.asarray(state[f"leaf_{i}"]) for i in range(tree.num_leaves)]
        self._state = jax.tree.unflatten(tree, leaves)
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]))
        return self._now()

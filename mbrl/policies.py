"""Policies as distributions over actions of any space, read from the output of a network.

The parts of an action (dimensions, Dict entries) are independent given the output. Boxes
are scaled to `[-1, 1]`; a sample may lie beyond: clip it before it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import spaces
from mbrl.distributions import Categorical, Normal, TanhNormal, unimix
from mbrl.types import Array, Box, Discrete, Key, MultiDiscrete, Space, reset_rows

UNIMIX = 0.01
"""Share of the uniform distribution in discrete policies: none becomes deterministic."""
MIN_STD, MAX_STD = 0.1, 1.0
MIN_LOG_STD, MAX_LOG_STD = -5.0, 2.0
"""Of a squashed Gaussian before it is squashed."""


def num_outputs(space: Space) -> int:
    """Return how many numbers parameterize a policy over `space`."""
    if isinstance(space, Mapping):
        return sum(num_outputs(part) for part in space.values())
    return spaces.flat_size(space) * (2 if isinstance(space, Box) else 1)


def deviations(space: Space) -> np.ndarray:
    """Mark the outputs that are deviations of a Box, bool [num_outputs(space)]."""
    parts = []
    for _, leaf in spaces.leaves(space):
        size = spaces.flat_size(leaf)
        parts.append(np.repeat([False, True], size) if isinstance(leaf, Box) else [False] * size)
    return np.concatenate(parts).astype(bool)


class Policy:
    """Distribution over actions, encoded as `spaces.encode_action` does.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """

    def __init__(self, space: Space, outputs: Array, plain: bool = False) -> None:
        """Read the distribution from `outputs` [..., num_outputs(space)].

        Args:
          space: of the actions.
          outputs: of a network.
          plain: take means, log-deviations and logits as they are, as PPO does; otherwise means
            and deviations are bounded and a share of discrete policies is uniform.
        """
        self._parts: list[Normal | Categorical] = []
        leaves = [leaf for _, leaf in spaces.leaves(space)]
        ends = np.cumsum([num_outputs(leaf) for leaf in leaves])[:-1]
        for leaf, out in zip(leaves, jnp.split(outputs, ends, -1), strict=True):
            if isinstance(leaf, Box):
                mean, raw = jnp.split(out, 2, -1)
                if plain:
                    self._parts.append(Normal(mean, jnp.exp(raw)))
                    continue
                std = MIN_STD + (MAX_STD - MIN_STD) * jax.nn.sigmoid(raw + 2.0)
                self._parts.append(Normal(jnp.tanh(mean), std))
                continue
            sizes = leaf.nums if isinstance(leaf, MultiDiscrete) else (leaf.num,)
            for logits in jnp.split(out, np.cumsum(sizes)[:-1], -1):
                self._parts.append(Categorical(logits if plain else unimix(logits, UNIMIX)))

    def sample(self, key: Key) -> Array:
        """Draw encoded actions [..., A]."""
        keys = jax.random.split(key, len(self._parts))
        return jnp.concatenate(
            [
                part.sample(k) if isinstance(part, Normal) else _hot(part, part.sample(k))
                for part, k in zip(self._parts, keys, strict=True)
            ],
            -1,
        )

    def mode(self) -> Array:
        """Return the likeliest encoded action [..., A]."""
        return jnp.concatenate(
            [p.mode() if isinstance(p, Normal) else _hot(p, p.mode()) for p in self._parts], -1
        )

    def gaussian(self) -> Array:
        """Return mean and log-deviation [..., 2 A] of a policy over one Box.

        Raises:
          ValueError: for another space.
        """
        (law,) = self._parts if len(self._parts) == 1 else (None,)
        if not isinstance(law, Normal):
            raise ValueError("policy: got a space other than one Box, expected a Box")
        return jnp.concatenate([law.mean, jnp.log(law.std)], -1)

    def log_prob(self, action: Array) -> Array:
        """Return the log-density [...] of encoded actions [..., A]."""
        total, start = jnp.zeros(action.shape[:-1]), 0
        for part in self._parts:
            size = (part.mean if isinstance(part, Normal) else part.logits).shape[-1]
            x = action[..., start : start + size]
            start += size
            if isinstance(part, Normal):
                total += part.log_prob(x).sum(-1)
            else:
                total += part.log_prob(jnp.argmax(x, -1))
        return total

    def entropy(self) -> Array:
        """Return the entropy [...] in nats, summed over the parts of the action."""
        return sum(
            (p.entropy().sum(-1) if isinstance(p, Normal) else p.entropy() for p in self._parts),
            jnp.zeros(()),
        )


class Choices(NamedTuple):
    """Actions over which an expectation under a policy is taken: one draw, or all there are.

    Attributes:
      action: [..., S, A] encoded.
      log_prob: [..., S], density or probability of each.
      chance: [..., S] weights of the expectation, which sum to 1.
    """

    action: Array
    log_prob: Array
    chance: Array

    def expect(self, x: Array) -> Array:
        """Return the expectation [...] of `x` [..., S]."""
        return jnp.sum(self.chance * x, -1)

    def entropy(self) -> Array:
        """Return the entropy [...] in nats: an estimate from one draw, exact from all actions."""
        return -self.expect(self.log_prob)


class SoftPolicy:
    """A policy that is differentiated through its actions: squashed Gaussian, or categorical.

    Reference: Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905); Soft
    Actor-Critic for Discrete Action Settings (arXiv 1910.07207).
    """

    def __init__(self, space: Space, outputs: Array) -> None:
        """Read the distribution from `outputs` [..., num_outputs(space)].

        Args:
          space: Discrete, or Box and mappings of Boxes, whose encoded actions are one vector in
            `[-1, 1]`.
          outputs: of a network: logits, or means and log-deviations before they are bounded.
        """
        if isinstance(space, Discrete):
            self._law: Categorical | TanhNormal = Categorical(outputs)
            return
        loc, raw = jnp.split(outputs, 2, -1)
        spread = 0.5 * (MAX_LOG_STD - MIN_LOG_STD)
        self._law = TanhNormal(loc, jnp.exp(MIN_LOG_STD + spread * (jnp.tanh(raw) + 1.0)))

    def sample(self, key: Key) -> Array:
        """Draw encoded actions [..., A]."""
        if isinstance(self._law, Categorical):
            return _hot(self._law, self._law.sample(key))
        return self._law.sample(key)

    def mode(self) -> Array:
        """Return the encoded action [..., A] to take without exploration."""
        if isinstance(self._law, Categorical):
            return _hot(self._law, self._law.mode())
        return self._law.mode()

    def choices(self, key: Key) -> Choices:
        """Return one reparameterized draw of a Gaussian, S = 1, or all S = A categories."""
        if isinstance(self._law, Categorical):
            log_prob = jax.nn.log_softmax(self._law.logits, -1)
            every = jnp.eye(log_prob.shape[-1])
            action = jnp.broadcast_to(every, (*log_prob.shape[:-1], *every.shape))
            return Choices(action, log_prob, jnp.exp(log_prob))
        action, log_prob = self._law.sample_and_log_prob(key)
        log_prob = log_prob.sum(-1)[..., None]
        return Choices(action[..., None, :], log_prob, jnp.ones_like(log_prob))


def explore(
    space: Space, key: Key, action: Array, chance: Array | float, invalid: Array | None = None
) -> tuple[Array, Array]:
    """Replace some actions by uniform ones (epsilon-greedy).

    Args:
      space: Discrete, or Box with bounds.
      key: consumed.
      action: [B, ...].
      chance: of being replaced.
      invalid: bool [B, num], Discrete actions that are never drawn.

    Returns:
      Actions [B, ...] and which of them were drawn, bool [B].
    """
    chance_key, action_key = jax.random.split(key)
    drawn = jax.random.bernoulli(chance_key, chance, action.shape[:1])
    uniform = spaces.sample(space, action_key, action.shape[:1], invalid)
    return reset_rows(drawn, uniform, action), drawn


def weighted_nll(
    space: Space, outputs: Array, weights: Array, candidates: Array | None = None
) -> Array:
    """Return the cross-entropy of the policy with weights over a few actions.

    Args:
      space: Discrete or Box.
      outputs: [..., num_outputs(space)].
      weights: [..., K] that sum to 1.
      candidates: [..., K, A] encoded actions of a Box; None = all K of a Discrete.

    Returns:
      [...] in nats; of the logits as they are, without the uniform share of `Policy`.
    """
    if candidates is None:
        return -jnp.sum(weights * jax.nn.log_softmax(outputs, -1), -1)
    law = Policy(space, jnp.expand_dims(outputs, -2))
    return -jnp.sum(weights * law.log_prob(candidates), -1)


def _hot(part: Categorical, x: Array) -> Array:
    return jax.nn.one_hot(x, part.logits.shape[-1])

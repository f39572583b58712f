"""Hallucinated control: optimism about dynamics as further actions of a planner or policy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mbrl import spaces
from mbrl.models.propagation import (
    EnsembleState,
    Heads,
    Measure,
    Prediction,
    flat_mdp,
    mean_survival,
    perturb,
    take_elites,
)
from mbrl.types import MDP, Array, Box, EnvSpec, Key, Outcome, Space
from mbrl.uncertainty import member_disagreement


def hallucinated_space(spec: EnvSpec) -> Box:
    """Extend a Box action space by a choice in [-1, 1] per dimension of the observation.

    Raises:
      ValueError: for another action space, or one without bounds.
    """
    action = spec.action
    if not isinstance(action, Box):
        raise ValueError(
            f"action space of {spec.id}: hallucinated control needs a Box, got {action}; explore "
            "with the disagreement of the members as the reward instead"
        )
    spaces.finite_bounds(action, f"action space of {spec.id}")
    choice = np.ones(spaces.flat_size(spec.observation), np.float32)
    low = np.concatenate([np.asarray(action.low, np.float32).reshape(-1), -choice])
    high = np.concatenate([np.asarray(action.high, np.float32).reshape(-1), choice])
    return Box(low.shape, low, high)


def executed_action(space: Space, action: Array) -> Array:
    """Return what is executed of hallucinated actions [..., A + D], in `space`: [..., *shape]."""
    assert isinstance(space, Box), "hallucinated_space has checked it"
    kept = action[..., : spaces.flat_size(space)]
    return kept.reshape(*action.shape[:-1], *space.shape).astype(space.dtype)


def hallucinated_mdp(
    spec: EnvSpec,
    heads: Heads,
    num_members: int,
    num_elites: int,
    beta: float | Array,
    uncertainty: Measure | None,
) -> MDP:
    """Present an ensemble as an `MDP` in which whoever acts also chooses what is unknown.

    The last D dimensions of an action move the next observation by up to `beta` epistemic standard
    deviations from the mean: the best plan is best in the most favourable of the plausible models,
    which is what optimism in the face of uncertainty asks for. A reward that is predicted by the
    same members is the upper end of its interval: of all choices the best. What the members call
    noise is drawn, as in moment matching.

    Reference: H-UCRL, Curi et al. 2020 (arXiv:2006.08684), equation 7.

    Args:
      spec: spaces of the task; its action space must be a bounded Box.
      heads: the learned functions.
      num_members: N; all of them count in the epistemic standard deviation.
      num_elites: M, how many members the mean and the noise are of.
      beta: standard deviations within which models are plausible; 0 leaves the mean. May be traced.
      uncertainty: what is reported as `Outcome.uncertainty`; None = nothing.

    Returns:
      An `MDP` over flattened observations whose action space is `hallucinated_space(spec)`. Read
      what is executed with `executed_action`; `with_reward` hands its reward function the whole
      action.

    Raises:
      ValueError: for actions other than a bounded Box.
    """
    space = hallucinated_space(spec)
    size = spaces.flat_size(spec.observation)

    def step(state: EnsembleState, key: Key, flat: Array, action: Array) -> tuple[Array, Outcome]:
        real, choice = executed_action(spec.action, action), action[..., -size:]
        x = heads.features(flat, real)
        everyone = jnp.broadcast_to(x, (num_members, *x.shape))
        members = heads.forward(state, state.weights, everyone)
        out: Prediction = take_elites(state, members, num_elites, num_members)
        choice = jnp.concatenate([choice, jnp.ones_like(choice[..., :1])], -1)
        target = out.mean.mean(0) + beta * choice * member_disagreement(members.mean)
        target = perturb(key, target, jnp.sqrt(out.var.mean(0)))
        flat, reward = heads.decode(state, flat, target)
        ending = take_elites(state, state.termination.weights, num_elites, num_members)
        survival = mean_survival(heads, state, ending, flat)
        spread = None if uncertainty is None else uncertainty(state, members)
        return flat, Outcome(reward, survival, spread)

    return flat_mdp(step, spec._replace(action=space))

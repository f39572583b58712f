"""The model that a run has learned, as an MDP beside its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from agents.mbpo import MBPOConfig
from agents.pets import PETSConfig
from mbrl.mdp import SplitParams, with_reward
from mbrl.models.fitted_ensemble import build_ensemble
from mbrl.models.propagation import Propagation
from mbrl.models.reward import reward_model
from mbrl.training.recorded import in_order
from mbrl.types import MDP
from scripts import runs


class LearnedModel(NamedTuple):
    """What a run knows of its task.

    Attributes:
      mdp: the model.
      params: its parameters.
      members: networks that predict.
      starts: recorded first observations [M, ...].
      run: that has learned it.
      step: that it was saved at.
    """

    mdp: MDP
    params: Any
    members: int
    starts: Any
    run: runs.Run
    step: int


def learned_model(directory: Path, propagation: Propagation) -> LearnedModel:
    """Read the model of a run of PETS or MBPO, that of its first seed.

    Args:
      directory: of the run.
      propagation: how imagined states move through the members.

    Raises:
      ValueError: for a run of another agent or with a reward from preferences, without a save, or
        without a recorded start.
    """
    job = runs.load(directory)
    config: Any = job.config
    if not isinstance(config, MBPOConfig | PETSConfig):
        raise ValueError(
            f"{directory}: {job.agent_name} learns no ensemble that episodes can begin in, "
            "expected a run of pets or mbpo"
        )
    if job.preferences.labels:
        raise ValueError(
            f"{directory}: {job.agent_name} learns its reward from preferences, expected a run "
            "with the reward of the environment"
        )
    restored = runs.restore(job, directory)
    if restored is None:
        raise ValueError(f"{directory}: there is no save to read; train it first")
    state = jax.tree.map(lambda x: x[0], runs.agent_of(job, restored.tree))
    mdp = build_ensemble(job.spec, config).mdp(propagation, uncertainty=False)
    if isinstance(config, MBPOConfig):
        params = state.ensemble.model
    elif config.reward == "head":
        params = state.model
    else:
        head = reward_model(job.spec, config.members, kind=config.reward, dtype=config.dtype)
        mdp, params = with_reward(mdp, head), SplitParams(state.model, state.reward)
    ring = jax.tree.map(lambda x: np.asarray(x[0]), runs.learner_of(restored.tree).ring)
    record = in_order(ring)
    starts = jax.tree.map(lambda x: x[np.asarray(record.is_first)], record.obs)
    if not np.any(record.is_first):
        raise ValueError(f"{directory}: its replay holds no first observation; collect more")
    return LearnedModel(mdp, params, config.elites, starts, job, restored.step)

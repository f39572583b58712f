"""`mbrl report RUN --model`: how far the ensemble of an agent can be believed.

The trained agent plays greedy episodes that its model has not learned from. Each of their steps
tells whether the predicted distribution is calibrated; from many of their records the model sums
the rewards of the recorded actions over several steps; and from the first record of each it
imagines the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents import mbpo, pets
from mbrl.calibration import INTERVALS, Calibration, calibration
from mbrl.exploitation import predicted_returns, realized_returns
from mbrl.models.fitted_ensemble import World
from mbrl.models.open_loop import OpenLoop, open_loop_from_first
from mbrl.normalization import MIN_STD
from mbrl.preferences.segments import streams, successors
from mbrl.types import Array, Batch, EnvSpec, Key, Record
from scripts import dream, model_figures, runs
from scripts.dream_figures import Scene
from scripts.model_figures import Returns

STEPS = (1, 5, 15)
"""Lengths of the returns that are compared, besides the horizon of the agent."""
STARTS = 200
"""Records that they start from, at most."""
PARTICLES = 20
"""Rollouts of each start, whose mean is the prediction."""
SAMPLES = 50
"""Open-loop rollouts of each episode."""


class Modelled(NamedTuple):
    """How to find the model of an agent.

    Attributes:
      world: `(spec, config) -> World`.
      horizon: `(config) -> steps` that the agent relies on it for.
    """

    world: Callable[[EnvSpec, Any], World]
    horizon: Callable[[Any], int]


MODELLED = {
    "pets": Modelled(pets.world, lambda config: config.planner.horizon),
    "mbpo": Modelled(mbpo.world, lambda config: max(config.length)),
}
"""Agents with an ensemble."""


class Found(NamedTuple):
    """What a model says of episodes [B, T].

    Attributes:
      calibration: of single steps.
      predicted, realized: [K, M] returns over 1 to K steps from the starts.
      whole: bool [K, M], whether nothing cut the episode within these steps.
      rollouts: from the first record of every episode.
    """

    calibration: Calibration
    predicted: Array
    realized: Array
    whole: Array
    rollouts: OpenLoop


def show(folder: Path, out: str, window: dream.Window, title: str = "") -> dict[str, Any]:
    """Play, predict and draw.

    Args:
      folder: of the run; of several seeds, the first is shown.
      out: PNG, PDF or SVG to write; model.png in the folder when empty.
      window: what to play.
      title: headline; agent, environment and step when empty.

    Returns:
      What the figure shows as JSON values.

    Raises:
      ValueError: for an agent without an ensemble, or one whose reward comes from preferences; for
        a run without a save, or settings that do not fit.
    """
    file = Path(out or folder / "model.png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out: got {file}, expected a name that ends in .png, .pdf or .svg")
    window = window._replace(context=1, seed=window.seed + runs.EVALUATION_SEED)
    dream.check_window(window)
    run = runs.load(folder)
    if run.agent_name not in MODELLED or run.preferences.labels:
        kind = "learns its reward from preferences" if run.preferences.labels else "has no ensemble"
        raise ValueError(
            f"--model: {folder} is a run of {run.agent_name}, which {kind}; it is for runs of "
            f"{', '.join(MODELLED)} with the reward of the environment"
        )
    restored = runs.restore(run, folder)
    if restored is None:
        raise ValueError(f"{folder}: there is no save to read a model from; train it first")
    agent = jax.tree.map(lambda x: x[:1], runs.learner_of(restored.tree).agent)
    record, valid = dream.play(run, agent, window)
    state, modelled = jax.tree.map(lambda x: x[0], agent), MODELLED[run.agent_name]
    world, longest = modelled.world(run.spec, run.config), record.reward.shape[1] - 1
    if longest < 1:
        raise ValueError(f"--length: {folder} plays episodes of one record, expected more")
    steps = sorted({k for k in (*STEPS, modelled.horizon(run.config)) if k <= longest})
    ask = jax.jit(partial(predict, world, longest=steps[-1]))
    key = jax.random.fold_in(jax.random.key(window.seed), 1)  # the agent has had the seed's own
    found: Found = jax.device_get(ask(state, key, record, valid))
    observed, outcomes = dream.parts(run.spec.observation, record, found.rollouts)
    errors = dream.errors([*observed, outcomes[0]], valid, 1)
    headline = title or f"{run.agent_name} on {run.env_id} after {restored.step:,} steps"
    scene = Scene(headline, observed, outcomes, valid, 1, errors)
    varies = np.asarray(world.ensemble(state).targets.var) > MIN_STD**2
    returns = {k: returns_of(found, k) for k in steps}
    model_figures.draw(scene, found.calibration, varies, returns, file)
    coverage = found.calibration.coverage[:, varies].mean(1)
    return {
        "figure": str(file), "agent": run.agent_name, "env": run.env_id, "step": restored.step,
        "episodes": window.episodes, "length": int(valid.shape[1]),
        "coverage": {str(p): round(float(x), 4) for p, x in zip(INTERVALS, coverage, strict=True)},
        "calibration_error": round(float(found.calibration.error[varies].mean()), 4),
        "nll": round(float(found.calibration.nll[varies].mean()), 4),
        "rank_correlation": round(float(found.calibration.correlation), 4),
        "scale": np.round(np.asarray(world.ensemble(state).scale), 4).tolist(),
        "returns": {str(k): model_figures.told(x) for k, x in returns.items()},
    }  # fmt: skip


def predict(
    world: World, state: Any, key: Key, record: Record, valid: Array, longest: int
) -> Found:
    """Ask a model about episodes.

    Args:
      world: the model of the agent.
      state: of the agent.
      key: consumed.
      record: leaves [B, T, ...].
      valid: bool [B, T], rows of the episode.
      longest: steps of the longest return.
    """
    init_key, return_key, rollout_key = jax.random.split(key, 3)
    params, ensemble = world.params(state), world.ensemble(state)
    record, follows = streams(Batch(jax.tree.map(jnp.asarray, record), jnp.asarray(valid)))
    data = successors(record)
    realized, counted = realized_returns(data.reward, data.is_terminal, follows, longest)

    # Rows that start a transition, evenly spread, and one of them again where there are few.
    count, time = follows.sum(), follows.shape[1]
    order = jnp.nonzero(follows.reshape(-1), size=follows.size, fill_value=0)[0]
    start = order[jnp.arange(STARTS) * jnp.maximum(count, 1) // STARTS]
    row, column = start // time, (start % time)[:, None] + jnp.arange(longest)

    def repeated(x: Array) -> Array:
        return jnp.broadcast_to(x, (PARTICLES, *x.shape)).reshape(-1, *x.shape[1:])

    action = jax.tree.map(
        lambda x: jnp.moveaxis(repeated(x[row[:, None], column % time]), 1, 0), record.action
    )
    obs = jax.tree.map(lambda x: repeated(x[row, start % time]), record.obs)
    whole = counted[:, row, start % time]
    predicted = predicted_returns(
        world.mdp, params, return_key, world.mdp.init(params, init_key, obs), action,
        jnp.ones((longest, PARTICLES * STARTS), bool),
    ).reshape(longest, PARTICLES, STARTS)  # fmt: skip

    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)
    mean, var = (x[ensemble.elites] for x in world.model.predict(ensemble, rows.obs, rows.action))
    judged = calibration(mean, var, world.model.target(ensemble, rows), follows.reshape(-1))
    rollouts = open_loop_from_first(world.mdp, params, rollout_key, record, SAMPLES)
    return Found(judged, predicted.mean(1), realized[:, row, start % time], whole, rollouts)


def returns_of(found: Found, steps: int) -> Returns:
    """Pick returns over so many steps, where nothing cut the episode before."""
    rows = np.asarray(found.whole)[steps - 1]
    picked = (np.asarray(x)[steps - 1][rows] for x in (found.predicted, found.realized))
    return Returns(*picked)

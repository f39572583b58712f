"""`mbrl report RUN --dream`: what a latent model predicts open loop, beside what happened.

The trained agent plays greedy episodes. Its world model sees the first records of each,
and predicts the others from the recorded actions alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from agents import dreamer
from mbrl import spaces
from mbrl.models.open_loop import ErrorAhead, OpenLoop, error_ahead, open_loop
from mbrl.models.rssm import RSSM, RSSMState
from mbrl.networks.observation import is_image
from mbrl.training.evaluation import evaluate_host
from mbrl.training.learner import seed_keys
from mbrl.types import Box, Record, Space, TimeStep
from scripts import dream_figures, runs
from scripts.dream_figures import Part

AHEAD = (1, 5, 15, 30)
"""Steps after the context whose errors are printed."""
CONTEXT = 5
SAMPLES = {True: 8, False: 50}
"""Continuations of every episode, with and without images among the observations."""


class Window(NamedTuple):
    """What to play: `episodes` of up to `length` records, the first `context` to be seen.

    A context of 0 is `CONTEXT`, or half of the longest episode where that is shorter.
    """

    episodes: int
    context: int
    length: int
    seed: int


def _dreamer(run: runs.Run, agent_state: Any) -> tuple[RSSM, RSSMState]:
    own = agent_state.agent if run.preferences.labels else agent_state
    return dreamer.build(run.spec, run.config).model, own.world


LATENT: dict[str, Callable[[runs.Run, Any], tuple[RSSM, RSSMState]]] = {"dreamer": _dreamer}
"""Agents with a latent model: `(run, state of one seed) -> (model, its parameters)`."""


def show(folder: Path, out: str, window: Window, title: str = "") -> dict[str, Any]:
    """Play, predict and draw.

    Args:
      folder: of the run; of several seeds, the first is shown.
      out: PNG, PDF or SVG to write, or GIF for images; dream.png in the folder when empty.
      window: what to play.
      title: headline; agent, environment and step when empty.

    Returns:
      What the figure shows as JSON values: file, extent, and normalized errors at `AHEAD`
      steps beside those of a constant, None where no episode is that long.

    Raises:
      ValueError: for an agent without a latent model, a run without a save, or settings
        that do not fit.
    """
    file = Path(out or folder / "dream.png")
    _check(file)
    check_window(window)
    run = runs.load(folder)
    if run.agent_name not in LATENT:
        raise ValueError(
            f"--dream: {folder} is a run of {run.agent_name}, which has no latent model; agents "
            f"that dream: {', '.join(LATENT)}"
        )
    images = any(is_image(leaf) for _, leaf in spaces.leaves(run.spec.observation))
    if file.suffix == ".gif" and not images:
        raise ValueError(f"--out: got {file}, but {run.env_id} shows no images; write a .png")
    restored = runs.restore(run, folder)
    if restored is None:
        raise ValueError(f"{folder}: there is no save to dream from; train it first")
    state = jax.tree.map(lambda x: x[:1], runs.learner_of(restored.tree).agent)
    record, valid = play(run, state, window)
    context = _context(window, valid.shape[1])
    model, world = LATENT[run.agent_name](run, jax.tree.map(lambda x: x[0], state))
    # The model is closed over: a specification is no argument of a compiled function.
    predict = jax.jit(
        lambda world, key, record: open_loop(model, world, key, record, context, SAMPLES[images])
    )
    key = jax.random.fold_in(jax.random.key(window.seed), 1)  # the agent has had the seed's own
    dream = jax.device_get(predict(world, key, record))
    observed, outcomes = parts(run.spec.observation, record, dream)
    found = errors([*observed, outcomes[0]], valid, context)
    headline = title or f"{run.agent_name} on {run.env_id} after {restored.step:,} steps"
    scene = dream_figures.Scene(headline, observed, outcomes, valid, context, found)
    dream_figures.write(scene, file)
    return {
        "figure": str(file), "agent": run.agent_name, "env": run.env_id, "step": restored.step,
        "episodes": window.episodes, "context": context, "length": int(valid.shape[1]),
        "ahead": list(AHEAD), "nrmse": {name: _at(AHEAD, pair) for name, pair in found.items()},
    }  # fmt: skip


def play(run: runs.Run, agent_state: Any, window: Window) -> tuple[Record, np.ndarray]:
    """Record greedy episodes from their start, in as many environments.

    Args:
      run: what was trained.
      agent_state: leaves [1, ...].
      window: how many, how long, and the seed of their start states.

    Returns:
      Records [B, T, ...], T that of the longest episode, and which of them belong to the
      episode of their row [B, T].
    """
    if run.env is None:
        env: Any = envs.make(run.env_id, window.episodes, run.on_bad, **run.options)
    else:
        env = envs.from_vector_env(envs.mdp_to_vector_env(run.env, None, window.episodes))
    tape: Any = Tape(env, window.length)
    seeds = (window.seed,)
    try:
        evaluate_host(run.factory, agent_state, [tape], seed_keys(seeds), seeds, window.episodes)
    finally:
        env.close()
    return tape.read()


class Tape:
    """A host environment that keeps what it emits, and ends every episode at `length`."""

    def __init__(self, env: Any, length: int) -> None:
        self.num_envs = env.num_envs
        self._env, self._length = env, length
        self._rows: list[tuple[TimeStep, Any]] = []
        self._now: Any = None

    def reset(self, seed: int) -> TimeStep:
        """Start a new stream; see `HostEnv.reset`."""
        self._rows = []
        self._now = self._env.reset(seed)
        return self._shown()

    def step(self, action: Any) -> TimeStep:
        """Keep the present time step and the action taken at it, and go on."""
        self._rows.append((self._now, jax.tree.map(np.array, action)))
        self._now = self._env.step(action)
        return self._shown()

    def read(self) -> tuple[Record, np.ndarray]:
        """Return the records [B, T, ...] and which belong to the first episode [B, T]."""
        now, action = jax.tree.map(lambda *x: np.stack(x, 1), *self._rows[: self._length])
        record = Record(now.obs, action, now.reward, now.is_first, now.is_last, now.is_terminal)
        valid = np.cumsum(now.is_first, 1) == 1
        longest = int(valid.any(0).sum())
        return jax.tree.map(lambda x: x[:, :longest], record), valid[:, :longest]

    def _shown(self) -> TimeStep:
        enough = len(self._rows) >= self._length - 1
        return self._now._replace(is_last=self._now.is_last | enough)


def parts(space: Space, record: Record, dream: OpenLoop) -> tuple[list[Part], list[Part]]:
    """Lay truth and prediction side by side: of the observation, and of reward and survival."""
    pairs = zip(jax.tree.leaves(record.obs), jax.tree.leaves(dream.obs), strict=True)
    observed = [
        Part(path or "observation", leaf, np.asarray(truth), np.asarray(samples))
        for (path, leaf), (truth, samples) in zip(spaces.leaves(space), pairs, strict=True)
    ]
    number, alive = spaces.box(-np.inf, np.inf, ()), 1.0 - np.asarray(record.is_terminal)
    reward, survival = np.asarray(dream.reward), np.asarray(dream.survival)
    return observed, [
        Part("reward", number, np.asarray(record.reward), reward),
        Part("survival probability", number, alive, survival),
    ]


def errors(compared: list[Part], valid: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Measure mean predictions.

    Returns:
      By name, [2, T - context] normalized errors of the model and of a constant.
    """
    steps = np.arange(1, valid.shape[1] - context + 1)

    def measure(part: Part) -> np.ndarray:
        pooled = is_image(part.space) or not isinstance(part.space, Box)

        @jax.jit
        def compare(truth: jax.Array, samples: jax.Array) -> ErrorAhead:
            truth = spaces.flatten(part.space, truth)
            mean = spaces.flatten(part.space, samples).mean(1)
            return error_ahead(truth, mean, jnp.asarray(valid), context, jnp.asarray(steps), pooled)

        return np.stack(jax.device_get(compare(part.truth, part.samples)))

    return {part.name: measure(part) for part in compared}


def _at(ahead: tuple[int, ...], pair: np.ndarray) -> dict[str, list[float | None]]:
    def number(line: np.ndarray, step: int) -> float | None:
        value = float(line[step - 1]) if step <= len(line) else math.nan
        return round(value, 4) if math.isfinite(value) else None

    names = ("model", "constant")
    return {n: [number(x, step) for step in ahead] for n, x in zip(names, pair, strict=True)}


def _check(file: Path) -> None:
    if file.suffix not in (".png", ".pdf", ".svg", ".gif"):
        raise ValueError(
            f"--out: got {file}, expected a name that ends in .png, .pdf, .svg or .gif"
        )


def check_window(window: Window) -> None:
    """Refuse episodes that cannot be played.

    Raises:
      ValueError: naming the flag.
    """
    for name, least in (("episodes", 1), ("context", 0), ("length", 2), ("seed", 0)):
        if getattr(window, name) < least:
            raise ValueError(f"--{name}: got {getattr(window, name)}, expected at least {least}")


def _context(window: Window, longest: int) -> int:
    context = window.context or max(1, min(CONTEXT, longest // 2))
    if context >= longest:
        raise ValueError(
            f"--context: got {context}, expected less than {longest}, the records of the longest "
            "episode within --length"
        )
    return context

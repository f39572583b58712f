"""Compare what MuZero has learned of a grid world with the exact values, in every state.

python scripts/value_error.py RUN... --out docs/results/muzero.jsonl
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mbrl import spaces
from mbrl.models.value_equivalent import value_equivalent
from mbrl.training import run_directory
from mbrl.types import MDP, Array, Discrete
from scripts import results, runs
from scripts.cli import parse, run

MAX_ERROR = 0.05
"""Of the value in any state: the target of the value-equivalence test."""


@dataclasses.dataclass(frozen=True)
class ValueErrorConfig:
    """Compare values and greedy actions of trained runs with those of value iteration."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs of MuZero on a GridWorld, one per seed."""
    out: str
    """JSON-lines file; lines of other results in it stay."""


class Exact(NamedTuple):
    """Values [M, A] of the actions in every state of a finite MDP; its observations [M, D]."""

    obs: Array
    action_value: np.ndarray


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(ValueErrorConfig, argv, "value_error.py")
    found = [compare(Path(folder)) for folder in config.runs]
    errors, shares = ([x[i] for x in found] for i in range(2))
    saved = run_directory.read_config(Path(config.runs[0])) or {}
    versions = saved["versions"]
    row = {
        "benchmark": "MuZero", "task": saved["env"], "agent": saved["agent"],
        "setting": shlex.join(results.changed_flags(saved)).replace("--", ""),
        "steps": saved["steps"], "seeds": len(found),
        "command": f"python scripts/value_error.py {shlex.join(argv)}",
        **results.origin(versions), "commit": versions.get("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d"), "note": "runs are those of the returns on this task",
    }  # fmt: skip
    worst = f"<= {MAX_ERROR:g}"
    rows = [
        row | {"metric": "largest error of the value, worst seed", "value": max(errors),
               "values": errors, "target": worst},
        row | {"metric": "share of states with a best action, worst seed", "value": min(shares),
               "values": shares, "target": ">= 1"},
    ]  # fmt: skip
    results.write(Path(config.out), rows)
    for folder, error, share in zip(config.runs, errors, shares, strict=True):
        print(f"{folder}: largest error {error:.3f}, best action in {share:.0%} of the states")
    return 0


def solve(mdp: MDP, discount: float, sweeps: int = 200) -> Exact:
    """Solve a deterministic MDP whose states are the one-hot rows of its observation."""
    assert isinstance(mdp.spec.action, Discrete)
    num_actions = mdp.spec.action.num
    obs = jnp.eye(spaces.flat_size(mdp.spec.observation))
    after, reward, survival = [], [], []
    for action in range(num_actions):
        state = mdp.init(None, jax.random.key(0), obs)
        chosen = jnp.full(obs.shape[0], action)
        state, outcome = mdp.step(None, jax.random.key(0), state, chosen)
        after.append(np.asarray(mdp.observe(None, state)).argmax(-1))
        reward.append(np.asarray(outcome.reward))
        survival.append(np.asarray(outcome.discount))
    value = np.zeros(obs.shape[0])
    action_value = np.zeros((obs.shape[0], num_actions))
    for _ in range(sweeps):
        action_value = np.stack(
            [r + discount * s * value[a] for r, s, a in zip(reward, survival, after, strict=True)],
            -1,
        )
        value = action_value.max(-1)
    return Exact(obs, action_value)


def compare(folder: Path) -> tuple[float, float]:
    """Return the largest error of the value, and the share of states with a best action."""
    job = runs.load(folder)
    restored = runs.restore(job, folder)
    if job.agent_name != "muzero" or job.env is None or "GridWorld" not in job.env_id:
        raise ValueError(f"{folder}: expected a run of muzero on a device/GridWorld")
    if job.preferences.labels:
        raise ValueError(
            f"{folder}: its values are those of a learned reward; train without labels"
        )
    if restored is None:
        raise ValueError(f"{folder}: there is no save; train it first")
    state: Any = jax.tree.map(lambda x: x[0], runs.learner_of(restored.tree).agent)
    exact = solve(job.env, job.config.discount)
    running = exact.action_value.max(-1) > 0  # all but the goal, where nothing follows
    model = value_equivalent(job.spec, job.config.model, job.config.discount)
    latent = model.mdp.init(state.target, jax.random.key(0), exact.obs)
    value = np.asarray(model.predictor.predict(state.target, latent)[1])
    error = np.abs(value - exact.action_value.max(-1))[running].max()
    first = jnp.ones(len(value), bool)
    act = job.factory({}).act
    action = np.asarray(act(state, (), exact.obs, first, jax.random.key(0), "greedy")[0])
    chosen = exact.action_value[np.arange(len(value)), action]
    best = np.isclose(chosen, exact.action_value.max(-1))[running]
    return float(error), float(best.mean())


if __name__ == "__main__":
    sys.exit(run(main))

"""`mbrl plan`: plan in a simulator, the bound on what planning in a learned model can reach."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
import tyro

import envs
from mbrl.models.value import terminal_value, value_model
from mbrl.planning import PlannerConfig, planner, playout_value
from mbrl.planning.score import Value
from mbrl.training import run_directory
from mbrl.training.evaluation import evaluate_device, evaluate_host, statistics
from mbrl.training.learner import seed_keys
from mbrl.types import MDP, Agent, Array, Key, Mode, Planner, SampleSpec, reset_rows
from scripts import results, runs
from scripts.cli import parse, run


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Plan in a simulator and act in it, or in an environment that it is a twin of."""

    model: tyro.conf.Positional[str]
    """Simulator to plan in: 'device/NAME', or an MDP as 'module:Name'."""
    env: str | None = None
    """Environment to act in, with the same spaces; the simulator itself when left out."""
    episodes: int = 20
    """Episodes."""
    seed: int = 0
    """Seed of the start states and of the planner."""
    value: str = ""
    """Folder of a run of PETS with --value-rounds: what it has learned says what a plan's end is
    worth."""
    playouts: int = 0
    """Or rollouts of random actions say it; 0 = nothing does."""
    playout_horizon: int = 20
    """Steps of such a rollout."""
    planner: PlannerConfig = PlannerConfig()
    """How to plan."""
    out: str = ""
    """JSON-lines file of results to add a line to."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(PlanConfig, argv, "mbrl plan")
    if config.episodes < 1:
        raise ValueError(f"--episodes: expected at least 1, got {config.episodes}")
    mdp = envs.make(config.model)
    if not isinstance(mdp, MDP):
        mdp.close()
        raise ValueError(f"{config.model}: expected a simulator that runs on the device, an MDP")
    agent = planning_agent(mdp, planner(mdp, config.planner, value=value_of(config, mdp)))
    where = config.env or config.model
    returns = play(agent, mdp, where, config.episodes, config.seed)[0]
    mean, std, iqm = statistics(returns)
    if config.out:
        results.write(Path(config.out), [result(config, mean, argv)])
    if config.json:
        found = {"return_mean": mean, "return_std": std, "return_iqm": iqm}
        print(json.dumps({**found, "env": where, "returns": [float(r) for r in returns]}))
    else:
        print(
            f"{config.planner.method} in {config.model}, acting in {where}: mean {mean:.1f}  std "
            f"{std:.1f}  IQM {iqm:.1f}  min {returns.min():.1f}  ({config.episodes} episodes)"
        )
    return 0


def result(config: PlanConfig, mean: float, argv: list[str]) -> dict[str, Any]:
    """Return the line of a result file, as `scripts/budget.py` writes them."""
    versions, plan = run_directory.versions(), config.planner
    return {
        "benchmark": "Planning budget", "task": config.env or config.model, "agent": "none",
        "setting": f"{plan.method} in {config.model}, {plan.evaluations():,} model evaluations "
        "per action",
        "metric": "return", "value": mean, "values": [mean], "steps": 0, "seeds": 1,
        "command": f"mbrl plan {shlex.join(argv)}", **results.origin(versions),
        "commit": versions.get("commit", "unknown"), "date": time.strftime("%Y-%m-%d"),
        "note": f"{config.episodes} episodes, seed {config.seed}",
    }  # fmt: skip


def value_of(config: PlanConfig, mdp: MDP) -> Value | None:
    """Return what says how much the end of a plan is worth, or None."""
    if config.playouts and config.value:
        raise ValueError("--playouts: got --value as well; give one of them")
    if config.playouts:
        steps = config.playout_horizon
        return playout_value(mdp, steps, config.playouts, config.planner.discount)
    if not config.value:
        return None
    trained = runs.load(Path(config.value))
    if not getattr(trained.config, "value_rounds", 0):
        raise ValueError(
            f"--value: {config.value} has learned no value, expected a run of PETS with "
            "--value-rounds above 0"
        )
    runs.check_spaces(config.model, mdp.spec, trained.env_id, trained.spec)
    restored = runs.restore(trained, Path(config.value))
    if restored is None:
        raise ValueError(f"--value: {config.value} has no save; train it first")
    first = jax.tree.map(lambda x: x[0], runs.agent_of(trained, restored.tree).value)
    model = value_model(mdp.spec, trained.config.planner.discount, trained.config.members)
    return terminal_value(model, first, mdp)


def planning_agent(mdp: MDP, plan: Planner) -> Agent:
    """Make an agent that learns nothing: it plans in `mdp` from what it observes."""

    def act(
        state: tuple[()], carry: Any, obs: Any, is_first: Array, key: Key, mode: Mode
    ) -> tuple[Array, Any, tuple[()]]:
        del state, mode
        carry = reset_rows(is_first, plan.init(is_first.shape[0]), carry)
        action, carry, _ = plan.plan(None, key, mdp.init(None, key, obs), carry)
        return action, carry, ()

    nothing = SampleSpec("latest", 2, 0, 1)
    return Agent(lambda key: (), plan.init, act, lambda state, *_: (state, {}, None), nothing)


def play(agent: Agent, mdp: MDP, where: str, episodes: int, seed: int) -> np.ndarray:
    """Play episodes in the environment `where`: returns [1, episodes]."""
    keys = seed_keys((seed,))
    env = envs.make(where, min(episodes, 20))
    runs.check_spaces(where, env.spec, mdp.spec.id, mdp.spec)
    if isinstance(env, MDP):
        return evaluate_device(lambda hyper: agent, (), env, keys, episodes)
    try:
        return evaluate_host(lambda hyper: agent, (), [env], keys, (seed,), episodes)
    finally:
        env.close()


if __name__ == "__main__":
    sys.exit(run(main))

"""`mbrl collect RUN --out FILE.npz | --to-minari NAME`: records to train on offline."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gymnasium as gym
import jax
import numpy as np
import tyro

from envs.experience import write_minari
from mbrl.training.collection import collect_device, collect_host
from mbrl.training.learner import seed_keys
from mbrl.training.recorded import check_records, in_order, named_arrays, write_records
from mbrl.types import Record
from scripts import runs
from scripts.cli import parse, run


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Write what the replay of a run holds, or fresh steps of its agent, one stream per environment
    and seed.
    """

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    out: str = ""
    """File to write (.npz)."""
    to_minari: str = ""
    """Data set of Minari to write, such as pendulum/medium-v0 (extra `offline`)."""
    steps: int = 0
    """Fresh records per seed, by the agent as it was saved last; 0 = what replay holds."""
    mode: Literal["greedy", "explore", "random"] = "explore"
    """How the agent acts: as it is evaluated, as in training, or uniformly."""
    num_envs: int = 1
    """Environments per seed that fresh steps are taken in."""
    seed: int = 0
    """Seed of fresh steps."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(CollectConfig, argv, "mbrl collect")
    folder, out = Path(config.run), Path(config.out)
    if not (config.out or config.to_minari):
        raise ValueError("--out: expected a file, or a data set with --to-minari, got neither")
    if config.out and out.suffix != ".npz":
        raise ValueError(f"--out: got {out}, expected a file that ends in .npz")
    if config.steps < 0 or config.num_envs < 1:
        raise ValueError(
            f"--steps and --num-envs: got {config.steps} and {config.num_envs}, expected at least "
            "0 and 1"
        )
    job = runs.load(folder)
    restored = runs.restore(job, folder)
    if restored is None:
        raise ValueError(f"{folder}: there is no save to read; train it first")
    learner = runs.learner_of(restored.tree)
    record = fresh(job, learner.agent, config) if config.steps else stored(learner.ring)
    source = f"records of {folder}"
    record = check_records(source, named_arrays(record), job.spec)
    ended = int(record.is_last.sum())
    if config.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_records(out, record)
        print(f"{out}: {record.reward.size} records, {ended} ended episodes of {job.env_id}")
    if config.to_minari:
        what = f"{config.mode} steps" if config.steps else "replay"
        text = f"{what} of {job.agent_name} on {job.env_id} after {restored.step} steps of training"
        name = gymnasium_id(job)
        episodes = write_minari(
            config.to_minari, record, job.spec, name, job.agent_name, f"{text}, by modelrl."
        )
        print(f"minari:{config.to_minari}: {episodes} episodes of {job.env_id}")
    return 0


def stored(rings: Any) -> Record:
    """Return what rings [S, ...] hold, leaves [S * E, T, ...]."""
    seeds = range(rings.size.shape[0])
    streams = [in_order(jax.tree.map(lambda x, s=s: np.asarray(x[s]), rings)) for s in seeds]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *streams)


def fresh(job: runs.Run, agent_state: Any, config: CollectConfig) -> Record:
    """Let the agents of a run act without learning, leaves [S * E, T, ...]."""
    seeds = tuple(config.seed + s for s in range(len(job.driver.seeds)))
    steps, keys = config.steps, seed_keys(seeds)
    if job.env is not None:
        found = collect_device(
            job.factory, agent_state, job.env, keys, steps, config.num_envs, config.mode
        )
    else:
        host_envs: list[Any] = job.host_envs(config.num_envs)
        try:
            found = collect_host(
                job.factory, agent_state, host_envs, keys, seeds, steps, config.mode
            )
        finally:
            for env in host_envs:
                env.close()
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def gymnasium_id(job: runs.Run) -> str | None:
    """Return the id that Gymnasium makes the environment of a run by, if there is one."""
    plain = {"pixels": None, "action_repeat": 1}
    if any(plain.get(name) != value for name, value in job.options.items()):
        return None  # what was seen is not what the environment itself shows
    try:
        return gym.spec(job.env_id).id
    except gym.error.Error:
        return None


if __name__ == "__main__":
    sys.exit(run(main))

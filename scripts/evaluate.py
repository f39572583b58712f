"""`mbrl evaluate RUN`: greedy episodes of a trained agent, as text, JSON or video."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
import tyro

from mbrl.training.evaluation import evaluate_in_model, statistics
from mbrl.training.learner import seed_keys
from scripts import runs
from scripts.cli import parse, run
from scripts.learned_models import learned_model

MAX_STARTS = 100
"""Starts that a model predicts from, with every member."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Play greedy episodes of a trained agent and print statistics of the returns."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    episodes: int = 20
    """Episodes per trained seed."""
    seed: int = 0
    """Seed of the start states."""
    env: str | None = None
    """Another environment id with the same spaces, for the agent as it was trained."""
    in_model: str = ""
    """Folder of a run of pets or mbpo, whose model predicts the return of the same agent."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""
    video: str = ""
    """GIF of the first episode (.gif), or MP4 with the extra `video` (.mp4)."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(EvaluateConfig, argv, "mbrl evaluate")
    if config.episodes < 1:
        raise ValueError(f"--episodes: expected at least 1, got {config.episodes}")
    # The save was made with the training environment, whatever is played now.
    trained = runs.load(Path(config.run))
    job = trained if config.env is None else runs.load(Path(config.run), config.env)
    restored = runs.restore(trained, Path(config.run))
    if restored is None:
        raise ValueError(f"{config.run}: there is no save to evaluate; train it first")
    frames: list[np.ndarray] = []
    options: dict[str, Any] = {}
    if config.video:
        if job.env is not None:
            raise ValueError(f"--video: {job.env_id} draws nothing; use its Gymnasium twin")
        options = {"render_mode": "rgb_array"}
        _check_video(job, config.video)

    def film(now: Any, host_envs: Any) -> None:
        if config.video and not (frames and now.is_first[0, 0]):
            frames.append(np.asarray(host_envs[0].render(0)))

    state = runs.learner_of(restored.tree).agent
    returns = runs.evaluate(job, state, config.episodes, config.seed, film, **options)
    result = summary(job, returns, restored.step)
    if config.in_model:
        result["predicted"] = predicted(job, state, config)
    if config.video:
        try:  # a film that fails takes nothing else with it
            write_video(Path(config.video), frames)
        except Exception as error:
            print(f"warning: no video: {error}", file=sys.stderr)
    if config.json:
        print(json.dumps(result))
    else:
        print(f"{config.run}: {job.agent_name} on {job.env_id} after {restored.step} steps")
        for name, seed in result["seeds"].items():
            print(
                f"  seed {name}: mean {seed['return_mean']:.1f}  std {seed['return_std']:.1f}  "
                f"IQM {seed['return_iqm']:.1f}  min {min(seed['returns']):.1f}  "
                f"max {max(seed['returns']):.1f}  ({config.episodes} episodes)"
            )
            if config.in_model:
                said = result["predicted"]["seeds"][name]
                members = "  ".join(f"{x:.1f}" for x in said["members"])
                print(
                    f"    predicted by {config.in_model}: mean {said['return_mean']:.1f}  std "
                    f"{said['members_std']:.1f} between its members ({members})"
                )
    return 0


def predicted(job: runs.Run, agent_state: Any, config: EvaluateConfig) -> dict[str, Any]:
    """Predict the return of the agent by the model of another run, from its recorded starts.

    Raises:
      ValueError: for a run without such a model, or of a task with other spaces.
    """
    model = learned_model(Path(config.in_model), "tsinf")
    runs.check_spaces(model.run.env_id, model.run.spec, job.env_id, job.spec)
    num = min(config.episodes, MAX_STARTS)
    rows = np.random.default_rng(config.seed).integers(len(_leaf(model.starts)), size=num)
    starts = jax.tree.map(lambda x: x[rows], model.starts)
    keys = seed_keys(tuple(config.seed + s for s in range(len(job.driver.seeds))))
    returns = evaluate_in_model(
        job.factory, agent_state, model.mdp, model.params, keys, starts, model.members
    ).mean(2)
    return {
        "run": config.in_model,
        "step": model.step,
        "seeds": {
            str(seed): {
                "return_mean": float(members.mean()),
                "members_std": float(members.std()),
                "members": [float(x) for x in members],
            }
            for seed, members in zip(job.driver.seeds, returns, strict=True)
        },
    }


def _leaf(tree: Any) -> Any:
    return jax.tree.leaves(tree)[0]


def _check_video(job: runs.Run, path: str) -> None:
    """Find out before the episodes are played that what films them is missing."""
    if not path.endswith(".gif") and importlib.util.find_spec("imageio") is None:
        raise ValueError(
            f'--video: {path} needs imageio: pip install "modelrl[video]", or ask for a .gif'
        )
    for env in job.host_envs(1, render_mode="rgb_array"):
        env.reset(0)
        env.render(0)
        env.close()


def summary(job: runs.Run, returns: np.ndarray, step: int) -> dict[str, Any]:
    """Summarize returns [S, episodes] over all seeds, and per seed."""

    def describe(values: np.ndarray) -> dict[str, Any]:
        mean, std, iqm = statistics(values)
        flat = [float(r) for r in values.reshape(-1)]
        return {"return_mean": mean, "return_std": std, "return_iqm": iqm, "returns": flat}

    return {
        **describe(returns),
        "episodes": int(returns.size),
        "env": job.env_id,
        "agent": job.agent_name,
        "step": step,
        "seeds": {
            str(seed): describe(returns[index]) for index, seed in enumerate(job.driver.seeds)
        },
    }


def write_video(path: Path, frames: list[np.ndarray], fps: int = 30) -> None:
    """Write frames [H, W, 3] as GIF, or as MP4 by imageio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
        return
    import imageio.v3 as imageio

    imageio.imwrite(path, np.stack(frames), fps=fps)


if __name__ == "__main__":
    sys.exit(run(main))

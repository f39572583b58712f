"""Pursue learned rewards of the synthetic language task, by PPO and by the best of n.

  mbrl rlhf run --num-seeds 6 --no-direct --out runs/rlhf
  python scripts/pursuit_study.py runs/rlhf --out docs/results/rlhf_pursuit.json \
      --figure docs/rlhf_pursuit.png

Reward models are trained on the same rankings in several ways and combined by several rules. PPO
pursues each without a cost of divergence, all seeds in one program, and the best of n chooses
among answers of the fine-tuned model. What the true reward makes of it is the result, and where a
budget of divergence would have ended it.

Reference: Gao et al. 2022 (arXiv:2210.10760); Coste et al. 2023 (arXiv:2310.02743).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from agents.rlhf.ppo import TokenPPOConfig
from mbrl.models.generation import generate
from mbrl.preferences import grammar
from mbrl.preferences.best_of_n import best_of_n, best_of_n_kl
from mbrl.preferences.overoptimization_fit import Pursuit, fit_course, summit
from mbrl.settings import check_whole, check_within
from mbrl.types import Array
from mbrl.uncertainty import RiskKind, risk
from scripts import pursuit, pursuit_study_figure, rlhf_jobs
from scripts.cli import parse, run
from scripts.rlhf_models import load_model, load_reward
from scripts.rlhf_pipeline import PipelineConfig
from scripts.studies import spread, write_study

TEXT = rlhf_jobs.TextConfig(grammar.MAX_PROMPT, grammar.MAX_ANSWER)
TRAINED = {
    "one": {"members": 1},
    "five": {"members": 5},
    "bootstrapped": {"members": 5, "bootstrap": True},
    "short": {"members": 5},
}
"""Reward models; 'short' sees the rankings once, the others as often as in the pipeline."""


class Arm(NamedTuple):
    """What is pursued: a reward model, and the rule that makes one score of its members."""

    reward: str
    rule: RiskKind


ARMS = {
    "one": Arm("one", "mean"),
    "mean of five": Arm("five", "mean"),
    "worst of five": Arm("five", "worst"),
    "mean less half the variance": Arm("five", "uwo"),
    "bootstrapped, mean": Arm("bootstrapped", "mean"),
    "one pass, mean": Arm("short", "mean"),
}
UWO_COEF = 0.5


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Pursue learned rewards of the synthetic language task."""

    run: tyro.conf.Positional[str]
    """Folder of `mbrl rlhf run --num-seeds S`."""
    out: str
    """JSON file to write."""
    figure: str = ""
    """Figure to draw; '' = none."""
    steps: int = 60
    """Updates of PPO."""
    budget: float = 1.0
    """Nats per response at which PPO would have been ended."""
    prompts: int = 64
    """Test prompts that are answered for the best of n."""
    pool: int = 1024
    """Answers to each."""

    def __post_init__(self) -> None:
        check_whole(self, "steps", "prompts", "pool")
        check_within(self, "budget", 0, ends="()")


def main(argv: list[str]) -> int:
    """Run the job; models are kept in the folder of the pipeline, and found there again."""
    config = parse(StudyConfig, argv, "pursuit_study.py")
    began, root = time.perf_counter(), Path(config.run)
    seeds = sorted(int(path.name[5:]) for path in (root / "sft").glob("seed_*"))
    if not seeds:
        raise ValueError(
            f"RUN: {root} holds no seeds, expected the folder of mbrl rlhf run --num-seeds S"
        )
    for name in TRAINED:
        train_reward(root, name, seeds)
    chosen = [choose(config, root, seed) for seed in seeds]
    n = 2 ** np.arange(int(np.log2(config.pool)))
    written: dict[str, Any] = {
        "config": {x: getattr(config, x) for x in ("steps", "budget", "prompts", "pool")},
        "seeds": seeds,
        "best_of_n": {"n": n.tolist(), "kl": np.asarray(best_of_n_kl(jnp.asarray(n))).tolist()},
        "ppo": {},
    }  # fmt: skip
    distance = np.sqrt(np.asarray(written["best_of_n"]["kl"]))
    for name, arm in ARMS.items():
        found = {x: np.stack([one[name][x] for one in chosen]) for x in ("gold", "score")}
        written["best_of_n"][name] = {
            **{x: spread(values) for x, values in found.items()},
            **shape(np.broadcast_to(distance, found["gold"].shape), found["gold"], "best_of_n"),
        }
        courses = pursue(config, root, name, arm, seeds)
        written["ppo"][name] = told(courses, config.budget)
        print(line(name, written), flush=True)
    written["seconds"] = time.perf_counter() - began
    written = write_study(config.out, written)
    if config.figure:
        pursuit_study_figure.draw(written, Path(config.figure))
    return 0


def train_reward(root: Path, name: str, seeds: list[int]) -> None:
    """Train a reward model of `TRAINED` for all seeds; one that is there is left alone."""
    step = PipelineConfig().reward
    steps = step.loop.steps
    if name == "short":
        rankings = root / "data" / f"seed_{seeds[0]}" / "train" / "rankings.jsonl"
        steps = max(1, len(rankings.read_text("utf-8").splitlines()) // step.loop.batch_size)
    tuning = dataclasses.replace(step.learner.tuning, anneal=steps)
    rlhf_jobs.reward(rlhf_jobs.RewardJob(
        str(root / "data/seed_{seed}/train/rankings.jsonl"), str(root / "sft/seed_{seed}"),
        str(root / "data/seed_{seed}/train/prompts.jsonl"), str(root / f"pursuit/reward-{name}"),
        TEXT, _loop(step.loop, seeds, steps),
        dataclasses.replace(step.learner, tuning=tuning, **TRAINED[name]),
    ))  # fmt: skip


def pursue(
    config: StudyConfig, root: Path, name: str, arm: Arm, seeds: list[int]
) -> list[pursuit.Pursuit]:
    """Let PPO pursue a reward for all seeds."""
    step = PipelineConfig().ppo
    out = root / "pursuit" / f"ppo-{name.replace(' ', '-').replace(',', '')}"
    rlhf_jobs.ppo(rlhf_jobs.PPOJob(
        str(root / "data/seed_{seed}/train/prompts.jsonl"), str(root / "sft/seed_{seed}"),
        str(root / f"pursuit/reward-{arm.reward}/seed_{{seed}}"), gold="grammar", out=str(out),
        text=TEXT, loop=_loop(step.loop, seeds, config.steps),
        learner=pursuer(arm),
    ))  # fmt: skip
    return pursuit.load(out, name)


def pursuer(arm: Arm) -> TokenPPOConfig:
    """Return the settings of PPO that pursues a reward whatever it costs in divergence."""
    learner = PipelineConfig().ppo.learner
    return dataclasses.replace(learner, kl_coef=0.0, risk=arm.rule, risk_coef=UWO_COEF)


def _loop(loop: Any, seeds: list[int], steps: int) -> Any:
    return dataclasses.replace(
        loop, seed=seeds[0], num_seeds=len(seeds), steps=steps, log_every=1, tensorboard=False
    )


def choose(config: StudyConfig, root: Path, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Take the best of n answers of a fine-tuned model, by every arm: gold and score, [M]."""
    language = load_model(str(root / f"sft/seed_{seed}"))
    file = str(root / f"data/seed_{seed}/test/prompts.jsonl")
    rows = rlhf_jobs.read_rows(file, "prompts", language.tokenizer, TEXT)
    batch = next(rlhf_jobs.prompt_batches(rows, TEXT, config.prompts, seed))
    rewards = {
        name: load_reward(str(root / f"pursuit/reward-{name}/seed_{seed}")) for name in TRAINED
    }

    @jax.jit
    def answers(key: Array, states: Any) -> dict[str, Array]:
        written = generate(
            language.model, language.params, key, batch.tokens[:, 0], batch.mask[:, 0],
            TEXT.max_answer, eos=language.tokenizer.eos,
        )  # fmt: skip
        found = {"gold": grammar.gold(written.tokens, written.mask, TEXT.max_answer)}
        for name, loaded in rewards.items():
            found[name] = loaded.reward.scores(states[name], written.tokens, written.mask)
        return found

    states = {name: loaded.state for name, loaded in rewards.items()}
    keys = jax.random.split(jax.random.key(seed), config.pool)
    drawn = [jax.device_get(answers(key, states)) for key in keys]
    pool = {name: np.stack([one[name] for one in drawn], -1) for name in drawn[0]}
    n = 2 ** np.arange(int(np.log2(config.pool)))
    best = jax.jit(jax.vmap(partial(best_of_n, n=n)))
    found = {}
    for name, arm in ARMS.items():
        combined = risk(jnp.asarray(pool[arm.reward]), arm.rule, UWO_COEF)
        values = {"gold": jnp.asarray(pool["gold"]), "score": combined}
        found[name] = {x: np.asarray(best(combined, v).mean(0)) for x, v in values.items()}
    return found


def told(courses: list[pursuit.Pursuit], budget: float) -> dict[str, Any]:
    """Summarize what PPO has made of the seeds.

    Returns:
      `kl`, `gold`, `score` and `spread` of the members over updates as means and standard errors;
      what the budget would have left of the best gold of the smoothed course.
    """
    series = {x: np.stack([one.series[x] for one in courses]) for x in ("kl", "gold", "score")}
    deviation = np.stack([one.series["score/spread"] for one in courses])
    smooth, within = smoothed(series["gold"]), smoothed(series["kl"])
    over = within > budget
    ends = np.where(over.any(1), over.argmax(1), over.shape[1] - 1)
    rows = np.arange(len(courses))
    return {
        "updates": courses[0].series["update"].tolist(),
        **{x: spread(values) for x, values in series.items()},
        "spread": spread(deviation),
        "of_peak_at_budget": (smooth[rows, ends] / smooth.max(1)).tolist(),
        **shape(np.sqrt(np.maximum(series["kl"], 0.0)), series["gold"], "rl"),
    }


def smoothed(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Average [S, T] over `width` updates, of 128 responses each: [S, T - width + 1]."""
    width = min(width, values.shape[1])
    return np.lib.stride_tricks.sliding_window_view(values, width, 1).mean(-1)


def shape(distance: np.ndarray, gold: np.ndarray, kind: Pursuit) -> dict[str, Any]:
    """Fit the course of Gao et al. to the mean over seeds, and measure its rise and its fall."""
    away, mean = distance.mean(0), gold.mean(0)
    far = away > pursuit.SEEN
    course = fit_course(jnp.asarray(away[far]), jnp.asarray(mean[far] - mean[0]), kind)
    return {
        "fit": {x: float(v) for x, v in course._asdict().items()}
        | {"summit": float(summit(course, kind))},
        "rise": spread(gold.max(1) - gold[:, 0]),
        "fall": spread(gold.max(1) - gold[:, -1]),
    }


def line(name: str, written: dict[str, Any]) -> str:
    """Say what was found of an arm."""
    parts = []
    for how in ("best_of_n", "ppo"):
        one = written[how][name]
        rise, fall = one["rise"], one["fall"]
        parts.append(
            f"{how}: gold rises by {rise['mean']:.2f} +- {rise['error']:.2f}, falls by "
            f"{fall['mean']:.2f} +- {fall['error']:.2f}, R^2 {one['fit']['r_squared']:.3f}"
        )
    kept = ", ".join(f"{x:.2f}" for x in written["ppo"][name]["of_peak_at_budget"])
    return f"{name}: {'; '.join(parts)}; of the peak at the budget {kept}"


if __name__ == "__main__":
    sys.exit(run(main))

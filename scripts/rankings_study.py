"""Rankings as one batch element beside their pairs, shuffled: what they teach, and what they cost.

  python scripts/rankings_study.py runs/rlhf --out docs/results/rlhf_rankings.json

Both see the same rankings: K answers of a prompt in one batch element, or all of its pairs,
shuffled among those of others. One pass over pairs evaluates every answer K - 1 times, which is
what K - 1 passes over rankings do.

Reference: Ouyang et al. 2022 (arXiv:2203.02155), section 3.5.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
import tyro

from agents.rlhf.direct import pairs_of
from agents.rlhf.reward import RewardConfig, RewardGiven, make_reward, reward_of, score_rankings
from agents.rlhf.stage import TuningConfig
from mbrl.preferences import grammar
from mbrl.preferences.evaluation import accuracy, log_loss
from mbrl.preferences.teachers import TeacherConfig
from mbrl.text_batches import BatchConfig, epoch, text_loader
from mbrl.text_rows import TokenRow, encode_rows
from scripts.cli import parse, run
from scripts.rlhf_jobs import at_update
from scripts.rlhf_models import LanguageModel, load_model
from scripts.studies import write_study

WAYS = ("ranking", "ranking, as many evaluations as pairs", "pairs")
SHAPE = (grammar.MAX_PROMPT, grammar.MAX_ANSWER)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Train reward models on rankings, and on their pairs."""

    run: tyro.conf.Positional[str]
    """Folder of a pipeline, whose fine-tuned model they begin as."""
    out: str
    """JSON file to write."""
    prompts: int = 400
    """Rankings."""
    answers: int = 9
    """Answers of each."""
    seeds: int = 3
    """Sets of rankings."""
    rows: int = 72
    """Answers in a batch, in rankings or pairs."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Step sizes, of which each way gets its best."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(StudyConfig, argv, "rankings_study.py")
    language = load_model(str(Path(config.run) / "sft"))
    found: dict[str, Any] = {way: {} for way in WAYS}
    for (way, by_rate), rate in itertools.product(found.items(), config.rates):
        by_rate[str(rate)] = [study(config, language, way, rate, s) for s in range(config.seeds)]
        losses = [one["log_loss"] for one in by_rate[str(rate)]]
        print(f"{way}, step size {rate:g}: held-out log-loss {np.mean(losses):.4f}", flush=True)
    write_study(config.out, {
        "config": dataclasses.asdict(config) | {"run": "runs/rlhf"},
        "found": found,
    })  # fmt: skip
    return 0


def study(
    config: StudyConfig, language: LanguageModel, way: str, rate: float, seed: int
) -> dict[str, float]:
    """Train one reward model in one of `WAYS`."""
    split = grammar.split_prompts(seed)
    train = ranked(config, split.train[: config.prompts], 2 * seed)
    held = ranked(config, split.validation, 2 * seed + 1)
    rows = pairs_of(train) if way == "pairs" else train
    size = config.rows // (2 if way == "pairs" else config.answers)
    loader = text_loader(rows, [SHAPE], BatchConfig(size, seed=seed))
    updates = loader.batches * (config.answers - 1 if way == WAYS[1] else 1)
    learner = RewardConfig(tuning=TuningConfig(rate, warmup=max(1, updates // 10), anneal=updates))
    stage, given = make_reward(language.model, learner), RewardGiven(language.params)
    state = jax.jit(stage.init)(jax.random.key(seed), given)
    step = jax.jit(stage.step, donate_argnums=0)
    began = time.perf_counter()
    for update in range(updates):
        state, _ = step(state, given, at_update(loader, update), jax.random.key(0))
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    final = stage.result(state, given)
    score = jax.jit(partial(score_rankings, reward_of(language.model, learner)))
    whole = text_loader(held, [SHAPE], BatchConfig(len(held), shuffle=False))
    batch = next(epoch(whole))
    scores = score(final, batch)[0]
    return {
        "log_loss": float(log_loss(scores, jax.numpy.asarray(batch.rank))),
        "accuracy": float(accuracy(scores, jax.numpy.asarray(batch.rank))),
        "updates": updates,
        "seconds": seconds,
    }


def ranked(config: StudyConfig, prompts: Sequence[str], seed: int) -> list[TokenRow]:
    """Let an annotator with faults rank K answers to each prompt."""
    rows = grammar.rankings(
        jax.random.key(seed), np.random.default_rng(seed), prompts, TeacherConfig(beta=5.0),
        config.answers, 0.5,
    )  # fmt: skip
    return encode_rows(grammar.grammar_tokenizer(), rows, *SHAPE).rows


if __name__ == "__main__":
    sys.exit(run(main))

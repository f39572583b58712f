"""What is done with models besides training them: data, new models, answers, judgements."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agents.rlhf.reward import score_rankings
from mbrl.losses.direct_preference import sequence_log_prob
from mbrl.losses.preference import ranked_pairs
from mbrl.models.generation import generate
from mbrl.models.token import token_log_probs
from mbrl.networks.transformer import TransformerConfig, family_config, transformer
from mbrl.preferences import grammar
from mbrl.preferences.evaluation import accuracy, expected_calibration_error, log_loss
from mbrl.text_batches import BatchConfig, epoch, text_loader
from mbrl.text_rows import TextRow, encode_rows
from mbrl.training import run_directory
from mbrl.training.grammar_files import GrammarConfig, write_grammar
from mbrl.training.text_data import write_text
from mbrl.training.tokenizer_files import BYTES, load_tokenizer, save_bytes
from mbrl.types import Array
from scripts.rlhf_jobs import TextConfig, prompt_batches, read_data, read_rows
from scripts.rlhf_models import (
    LoadedReward,
    check_fit,
    copy_tokenizer,
    load_model,
    load_reward,
    save_model,
)

CHUNK = 256
"""Rows that are evaluated at once."""


@dataclasses.dataclass(frozen=True)
class DataJob:
    """Write the synthetic task as files."""

    out: str = "runs/rlhf/data"
    """Folder of the files."""
    task: GrammarConfig = GrammarConfig()


def data(job: DataJob) -> Path:
    """Run the job; returns its folder."""
    for name, rows in write_grammar(Path(job.out), job.task).items():
        print(f"{rows:6,} rows  {name}")
    return Path(job.out)


@dataclasses.dataclass(frozen=True)
class NewJob:
    """Make a language model with random weights."""

    out: str = "runs/rlhf/base"
    """Folder of the model."""
    tokenizer: str = ""
    """Folder of the tokenizer, or 'bytes'; its vocabulary is that of the model."""
    seed: int = 0
    """Of the weights."""
    architecture: TransformerConfig = family_config("gpt2")


def new(job: NewJob) -> Path:
    """Run the job; returns the folder."""
    for name in ("dtype", "remat"):
        if (value := getattr(job.architecture, name)) != getattr(TransformerConfig, name):
            raise ValueError(
                f"architecture.{name}: got {value!r}, which a folder of weights does not hold; set "
                f"--learner.tuning.{name} of the stages that train it"
            )
    out = Path(job.out)
    with tempfile.TemporaryDirectory() as made:
        source = Path(job.tokenizer)
        if job.tokenizer == BYTES:
            source = Path(made)
            save_bytes(source)
        config = dataclasses.replace(job.architecture, vocab=load_tokenizer(source).vocab)
        if not out.exists():
            params = transformer(config).init(jax.random.key(job.seed))
            save_model(out, config, params, source)
        copy_tokenizer(source, out)
    return out


@dataclasses.dataclass(frozen=True)
class GenerateJob:
    """Answer prompts."""

    model: str = ""
    """Folder of the model."""
    prompt: str = ""
    """One prompt; or use `data`."""
    data: str = ""
    """Prompts, as JSON lines."""
    out: str = ""
    """File for the answers, as JSON lines; they are printed if empty."""
    samples: int = 1
    """Answers to each prompt."""
    best_of: int = 1
    """Answers that the one which the reward model likes best is chosen from."""
    reward: str = ""
    """Folder of the reward model, for `best_of`."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Likeliest tokens to choose from; 0 = all."""
    top_p: float = 1.0
    """Probability of the likeliest tokens to choose from."""
    seed: int = 0
    """Of the samples."""
    text: TextConfig = TextConfig()


def generate_answers(job: GenerateJob) -> Path | None:
    """Run the job; returns the file that it has written, if any."""
    if job.best_of > 1 and not job.reward:
        raise ValueError("--reward: expected the folder of a reward model for --best-of")
    language = load_model(job.model)
    tokenizer = language.tokenizer
    if bool(job.prompt) == bool(job.data):
        raise ValueError("--prompt, --data: expected one of the two")
    rows = [TextRow(job.prompt)]
    if job.data:
        rows = read_data(job.data, "prompts", job.text, language.template).rows
    tokens = encode_rows(tokenizer, rows, job.text.max_prompt, job.text.max_answer).rows
    loaded = load_reward(job.reward) if job.best_of > 1 else None
    if loaded is not None:
        check_fit(language, loaded, job.reward)
    loader = text_loader(tokens, [(job.text.max_prompt, 0)], BatchConfig(
        min(CHUNK, len(tokens)), shuffle=False
    ))  # fmt: skip

    @jax.jit
    def answer(params: Any, state: Any, key: Array, prompts: Array, mask: Array) -> Any:
        written = generate(
            language.model, params, key, prompts, mask, job.text.max_answer, job.temperature,
            job.top_k, job.top_p, tokenizer.eos, tokenizer.pad,
        )  # fmt: skip
        liked = 0.0 * prompts[:, 0]
        if loaded is not None:
            liked = loaded.reward.scores(state, written.tokens, written.mask).mean(0)
        length = job.text.max_answer
        return written.tokens[:, -length:], written.mask[:, -length:], liked

    found: list[TextRow] = []
    for number, batch in enumerate(epoch(loader)):
        key = jax.random.fold_in(jax.random.key(job.seed), number)
        written = [
            answer(
                language.params, None if loaded is None else loaded.state,
                jax.random.fold_in(key, index), batch.tokens[:, 0], batch.mask[:, 0],
            )
            for index in range(job.samples * job.best_of)
        ]  # fmt: skip
        out, real, liked = (np.stack(part) for part in zip(*jax.device_get(written), strict=True))
        liked = liked.reshape(job.samples, job.best_of, -1)
        for b, row in enumerate(batch.row):
            for sample in range(job.samples if row >= 0 else 0):
                best = sample * job.best_of + int(liked[sample, :, b].argmax())
                text = tokenizer.decode(out[best, b][real[best, b]].tolist())
                found.append(TextRow(rows[row].prompt, (text,), (0,)))
    if not job.out:
        for row in found:
            print(f"{row.prompt}\t{row.answers[0]}")
        return None
    write_text(Path(job.out), "demonstrations", found)
    return Path(job.out)


@dataclasses.dataclass(frozen=True)
class ScoreJob:
    """Judge a reward model on rankings, or answers by a reward model."""

    reward: str = ""
    """Folder of the reward model."""
    data: str = ""
    """Rankings (with `subset`, as RewardBench has them, by category too); or demonstrations with
    --answers, which are scored one by one."""
    answers: bool = False
    """The data are prompts with one answer each."""
    out: str = ""
    """File for the result, as JSON; it is printed if empty."""
    text: TextConfig = TextConfig()


def score(job: ScoreJob) -> Path | None:
    """Run the job; returns the file that it has written, if any."""
    found: Any = (
        score_answers(job.reward, job.data, job.text)
        if job.answers
        else judge_reward(job.reward, job.data, job.text)
    )
    if not job.out:
        print(json.dumps(found, indent=2))
        return None
    run_directory.write_json(Path(job.out), found)
    return Path(job.out)


def score_answers(reward: str, data: str, text: TextConfig) -> list[dict[str, Any]]:
    """Score prompts with one answer each: mean and spread of the members."""
    loaded = load_reward(reward)
    rows = read_data(data, "demonstrations", text, loaded.template).rows
    scores, _, source = _all_scores(loaded, rows, text)
    return [
        {
            "prompt": rows[i].prompt,
            "answer": rows[i].answers[0],
            "score": float(s.mean()),
            "spread": float(s.std()),
        }
        for i, s in zip(source, scores[:, :, 0].T, strict=True)
    ]


def judge_reward(reward: str, data: str, text: TextConfig) -> dict[str, Any]:
    """Measure a reward model on rankings: accuracy, log-loss and calibration, also by K and subset.

    Returns:
      Results of the mean of the members, and the accuracy of each.
    """
    loaded = load_reward(reward)
    rows = read_data(data, "rankings", text, loaded.template).rows
    scores, ranks, source = _all_scores(loaded, rows, text)
    rank = jnp.asarray(ranks)
    mean = jnp.asarray(scores.mean(0))
    subsets = np.array([rows[i].subset for i in source])
    sizes = (ranks >= 0).sum(1)
    result = _measured(mean, rank) | {
        "members": [float(accuracy(jnp.asarray(s), rank)) for s in scores],
        "by_size": {
            str(k): _measured(mean[sizes == k], rank[sizes == k]) for k in np.unique(sizes)
        },
    }
    if subsets.any():
        result["by_subset"] = {
            str(name): _measured(mean[subsets == name], rank[subsets == name])
            for name in np.unique(subsets)
        }
    return result


def _measured(scores: Array, rank: Array) -> dict[str, float]:
    pairs = ranked_pairs(scores, rank)
    counts = pairs.present & ~pairs.tied
    prob = jax.nn.sigmoid(jnp.abs(pairs.better - pairs.worse))
    right = (pairs.better > pairs.worse).astype(jnp.float32)
    return {
        "pairs": int(counts.sum()),
        "accuracy": float(accuracy(scores, rank)),
        "log_loss": float(log_loss(scores, rank)),
        "calibration_error": float(
            expected_calibration_error(prob.reshape(-1), right.reshape(-1), counts.reshape(-1))
        ),
    }


def _all_scores(
    loaded: LoadedReward, rows: list[TextRow], text: TextConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score all answers: [N, n, K], their ranks [n, K], and which row of the text each one is."""
    encoded = encode_rows(
        loaded.tokenizer, rows, text.max_prompt, text.max_answer, on_error=text.on_error
    )
    config = BatchConfig(min(CHUNK, len(encoded.rows)), shuffle=False)
    loader = text_loader(encoded.rows, [(text.max_prompt, text.max_answer)], config)
    evaluate = jax.jit(partial(score_rankings, loaded.reward))
    scores, ranks = [], []
    for batch in epoch(loader):
        there = batch.row >= 0
        scores.append(np.asarray(evaluate(loaded.state, batch))[:, there])
        ranks.append(batch.rank[there])
    return np.concatenate(scores, 1), np.concatenate(ranks), encoded.source


def judge_policy(*args: Any) -> dict[str, dict[str, float]]:
    """Return means and standard errors of what `measure_policy` finds."""
    return {
        name: {"mean": float(x.mean()), "error": float(x.std(ddof=1) / math.sqrt(x.size))}
        for name, x in measure_policy(*args).items()
    }


def measure_policy(
    model: str, reward: str, reference: str, prompts: str, text: TextConfig,
    temperature: float, seed: int, known: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Answer each prompt once and measure the answers.

    Args:
      model: folder of the policy.
      reward: folder of the reward model.
      reference: folder of the model that the policy is compared with.
      prompts: file of prompts.
      text: how it is read.
      temperature: of sampling.
      seed: of the samples.
      known: the true reward is that of the synthetic task.

    Returns:
      Score, length and divergence of each answer, and gold where it is known.
    """
    language, loaded, base = load_model(model), load_reward(reward), load_model(reference)
    length = text.max_answer
    rows = read_rows(prompts, "prompts", language.tokenizer, text, language.template)

    @jax.jit
    def measure(params: Any, start: Any, state: Any, key: Array, tokens: Array, mask: Array) -> Any:
        written = generate(
            language.model, params, key, tokens, mask, length, temperature,
            eos=language.tokenizer.eos,
        )  # fmt: skip
        expected = token_log_probs(
            base.model, start, written.tokens, written.mask, length, temperature
        )
        response = written.mask[:, -length:]
        found = {
            "score": loaded.reward.scores(state, written.tokens, written.mask).mean(0),
            "kl": sequence_log_prob(written.log_prob - expected, response),
            "length": response.sum(1).astype(jnp.float32),
        }
        if known:
            found["gold"] = grammar.gold(written.tokens, written.mask, length)
        return found

    parts = []
    for number, batch in enumerate(prompt_batches(rows, text, CHUNK, seed)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        prompt = batch.tokens[:, 0], batch.mask[:, 0]
        part = jax.device_get(measure(language.params, base.params, loaded.state, key, *prompt))
        parts.append({name: x[batch.row >= 0] for name, x in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

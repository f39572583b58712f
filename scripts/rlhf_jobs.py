"""The stages of RLHF as jobs: files and folders in, a folder out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from agents.rlhf.direct import (
    DirectBatch,
    DirectConfig,
    DirectGiven,
    answer_log_probs,
    make_direct,
    pairs_of,
)
from agents.rlhf.ppo import PromptBatch, TokenPPOConfig, TokenPPOGiven, make_token_ppo
from agents.rlhf.reward import RewardConfig, RewardGiven, make_reward, reward_of
from agents.rlhf.supervised import SupervisedConfig, SupervisedGiven, make_supervised
from mbrl.models.generation import generate
from mbrl.models.token_reward import TokenReward, TokenRewardState
from mbrl.preferences import grammar
from mbrl.text_batches import (
    BatchConfig,
    Cursor,
    Loader,
    TextBatch,
    epoch,
    supervised_loader,
    text_loader,
)
from mbrl.text_rows import TokenRow, encode_rows
from mbrl.tokenizers import Tokenizer
from mbrl.training.text_data import Kind, Template, TextData, plain_chat, read_dataset, read_text
from mbrl.types import Array
from scripts.rlhf_models import (
    MODEL,
    REWARD,
    LanguageModel,
    check_fit,
    digest_of,
    load_model,
    load_reward,
    model_path,
    reward_update,
    save_model,
    save_reward,
)
from scripts.rlhf_seeds import Prepared, train
from scripts.rlhf_stage import LoopConfig, StageRun
from scripts.rlhf_watch import watch_of

REFERENCE = "reference.npz"
"""What the reference says of the answers, in the folder of a run of `direct`."""
NORMALIZED_ON = 256
"""Responses that the unit of the scores is taken from (Ziegler et al. 2019)."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How text becomes rows of tokens."""

    max_prompt: int = 64
    """Tokens of a prompt; longer ones lose their beginning."""
    max_answer: int = 64
    """Tokens of an answer, its end included."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with rows that cannot be used."""


@dataclasses.dataclass(frozen=True)
class SupervisedJob:
    """Fine-tune a language model on demonstrations."""

    data: str = ""
    """Demonstrations, as JSON lines of prompt and answer."""
    model: str = ""
    """Folder of the model to begin with."""
    out: str = "runs/sft"
    """Folder of the run."""
    text: TextConfig = TextConfig()
    loop: LoopConfig = LoopConfig()
    learner: SupervisedConfig = SupervisedConfig()


@dataclasses.dataclass(frozen=True)
class RewardJob:
    """Train a reward model on rankings."""

    data: str = ""
    """Rankings, as JSON lines: prompt and chosen and rejected, or answers and their rank."""
    model: str = ""
    """Folder of the fine-tuned model to begin with."""
    prompts: str = ""
    """Prompts whose responses by that model get mean 0 and deviation 1; those of the data if
    empty."""
    out: str = "runs/reward"
    """Folder of the run."""
    text: TextConfig = TextConfig()
    loop: LoopConfig = LoopConfig()
    learner: RewardConfig = RewardConfig()
    normalize_first: bool = False
    """Give those responses mean 0 and deviation 1 before training, too."""


@dataclasses.dataclass(frozen=True)
class PPOJob:
    """Improve a policy by a reward model."""

    data: str = ""
    """Prompts, as JSON lines."""
    model: str = ""
    """Folder of the fine-tuned model to begin with; it is the reference, too."""
    reward: str = ""
    """Folder of the reward model."""
    demonstrations: str = ""
    """Demonstrations for `learner.pretraining`."""
    gold: Literal["", "grammar"] = ""
    """True reward to log beside the learned one, where the task has one."""
    kl_budget: float = 0.0
    """Nats per response at which training ends; 0 = none."""
    early_stop: int = 0
    """Training ends when the true reward of so many updates lies below that of as many before
    them by two standard errors, while the learned one has risen; 0 = never. Needs `gold`."""
    out: str = "runs/ppo"
    """Folder of the run."""
    text: TextConfig = TextConfig()
    loop: LoopConfig = LoopConfig()
    learner: TokenPPOConfig = TokenPPOConfig()


@dataclasses.dataclass(frozen=True)
class DirectJob:
    """Fit a policy to comparisons directly (DPO and its relatives)."""

    data: str = ""
    """Pairs, as JSON lines of prompt, chosen and rejected; rankings count as all their pairs."""
    kind: Literal["rankings", "unpaired"] = "rankings"
    """Of the data: 'unpaired' are prompts with one answer that is good or bad, for KTO."""
    model: str = ""
    """Folder of the fine-tuned model to begin with; it is the reference, too."""
    out: str = "runs/dpo"
    """Folder of the run."""
    text: TextConfig = TextConfig()
    loop: LoopConfig = LoopConfig()
    learner: DirectConfig = DirectConfig()


def supervised(job: SupervisedJob) -> Path:
    """Run the job; returns the folder of the model."""
    return train(job, _supervised)


def _supervised(job: SupervisedJob) -> Prepared:
    language = _begin_with(job)
    rows = _rows_for(language, job.data, "demonstrations", job.text)
    loader = supervised_loader(rows, job.text.max_prompt + job.text.max_answer, _batches(job.loop))
    given = SupervisedGiven(language.params)
    stage = make_supervised(language.model, job.learner)
    run = StageRun("sft", stage, given, partial(at_update, loader))
    return Prepared(run, language.model.config, partial(_save_language, run, job, language))


def _begin_with(job: Any) -> LanguageModel:
    """Load the model that a stage begins with, to be computed with as its tuning says."""
    tuned = job.learner.tuning
    return load_model(_given(job.model, "model"), dtype=tuned.dtype, remat=tuned.remat)


def _save_language(
    run: StageRun, job: Any, language: LanguageModel, state: Any, update: int
) -> Path:
    """Save the model that a stage has made; returns its folder."""
    params, folder = run.stage.result(state, run.given), Path(job.out) / MODEL
    save_model(folder, language.model.config, params, model_path(job.model), update)
    return folder


def reward(job: RewardJob) -> Path:
    """Run the job; returns the folder of the reward model."""
    return train(job, _reward)


def _reward(job: RewardJob) -> Prepared:
    language, folder = _begin_with(job), Path(job.out) / REWARD
    rows = prompts = _rows_for(language, job.data, "rankings", job.text)
    if job.prompts:
        prompts = _rows_for(language, job.prompts, "prompts", job.text)
    loader = answers_loader(rows, job.text, job.loop)
    given, stage = RewardGiven(language.params), make_reward(language.model, job.learner)
    if job.normalize_first:
        given = given._replace(responses=_responses(language, prompts, job))

    def save(state: Any, update: int) -> Path:
        if reward_update(folder) == update:
            return folder
        scored, result = reward_of(language.model, job.learner), stage.result(state, given)
        result = _normalized(scored, result, *_responses(language, prompts, job))
        kind = job.learner.kind
        save_reward(folder, language.model.config, kind, result, model_path(job.model), update)
        return folder

    run = StageRun("reward", stage, given, partial(at_update, loader))
    return Prepared(run, language.model.config, save)


def _responses(
    language: LanguageModel, rows: Sequence[TokenRow], job: RewardJob
) -> tuple[Array, Array]:
    """Answer some prompts by the model that a stage begins with; tokens and mask [R, T]."""
    batch = next(prompt_batches(rows, job.text, NORMALIZED_ON, job.loop.seed))

    @jax.jit
    def write(params: Any, tokens: Array, mask: Array) -> Any:
        return generate(
            language.model, params, jax.random.key(job.loop.seed), tokens, mask,
            job.text.max_answer, eos=language.tokenizer.eos,
        )  # fmt: skip

    written = write(language.params, batch.tokens[:, 0], batch.mask[:, 0])
    return written.tokens, written.mask


@partial(jax.jit, static_argnums=0)
def _normalized(
    reward: TokenReward, state: TokenRewardState, tokens: Array, mask: Array
) -> TokenRewardState:
    """Give scores their unit: responses of the reference have mean 0 and deviation 1."""
    return reward.normalize(state, reward.scores(state, tokens, mask))


def ppo(job: PPOJob) -> Path:
    """Run the job; returns the folder of the model."""
    return train(job, _ppo)


def _ppo(job: PPOJob) -> Prepared:
    watch = watch_of(job)
    language, learner = _begin_with(job), job.learner
    loaded = load_reward(_given(job.reward, "reward"))
    check_fit(language, loaded, job.reward)
    rows = _rows_for(language, job.data, "prompts", job.text)
    prompts = text_loader(rows, [(job.text.max_prompt, 0)], _batches(job.loop, last="drop"))
    written = None
    if learner.pretraining:
        shown = _rows_for(language, job.demonstrations, "demonstrations", job.text)
        length = job.text.max_prompt + job.text.max_answer
        written = supervised_loader(shown, length, _batches(job.loop, last="drop"))
    gold = partial(grammar.gold, length=learner.length) if job.gold == "grammar" else None
    end = language.tokenizer.eos
    stage = make_token_ppo(language.model, loaded.reward, end, learner, gold)
    given = TokenPPOGiven(language.params, loaded.state)

    def batch(update: int) -> PromptBatch:
        text = at_update(prompts, update)
        shown = None if written is None else at_update(written, update)
        return PromptBatch(text.tokens[:, 0], text.mask[:, 0], shown)

    run = StageRun("ppo", stage, given, batch, watch)
    return Prepared(run, language.model.config, partial(_save_language, run, job, language))


def direct(job: DirectJob) -> Path:
    """Run the job; returns the folder of the model."""
    return train(job, _direct)


def _direct(job: DirectJob) -> Prepared:
    if job.kind == "unpaired" and job.learner.kind != "kto":
        raise ValueError(
            f"learner.kind: got {job.learner.kind!r} for answers without pairs, expected 'kto'; "
            "set --learner.kind kto, or give rankings"
        )
    language = _begin_with(job)
    rows = _rows_for(language, job.data, job.kind, job.text)
    rows = pairs_of(rows) if job.kind == "rankings" else rows
    given, stage = DirectGiven(language.params), make_direct(language.model, job.learner)
    loader = answers_loader(rows, job.text, job.loop)
    reference = reference_log_probs(language, rows, job)

    def batch(update: int) -> DirectBatch:
        text = at_update(loader, update)
        return DirectBatch(text, jnp.asarray(reference[text.row]))

    run = StageRun("dpo", stage, given, batch)
    return Prepared(run, language.model.config, partial(_save_language, run, job, language))


def reference_log_probs(
    language: LanguageModel, rows: Sequence[TokenRow], job: DirectJob
) -> np.ndarray:
    """Evaluate the reference once, [n, K], and keep what it says beside the run."""
    file = Path(job.out) / REFERENCE
    # Of what is computed with: the same weights in other files are the same reference.
    digest = hashlib.sha256(f"{language.model.config} {digest_of(language.params)}".encode())
    for row in rows:
        for part in (row.prompt, *row.answers):
            digest.update(np.asarray(part, np.int32).tobytes() + b";")
    if file.exists():
        with np.load(file, allow_pickle=False) as saved:
            if str(saved["digest"]) == digest.hexdigest():
                return saved["log_prob"]
    evaluate = jax.jit(partial(answer_log_probs, language.model))
    found = np.zeros((len(rows), len(rows[0].answers)), np.float32)
    whole = dataclasses.replace(job.loop, seed=0)
    for text in epoch(answers_loader(rows, job.text, whole)):
        there = text.row >= 0
        found[text.row[there]] = np.asarray(evaluate(language.params, text))[there]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    np.savez(temporary, log_prob=found, digest=digest.hexdigest())
    os.replace(temporary, file)
    return found


def read_data(
    source: str, kind: Kind, text: TextConfig, template: Template = plain_chat
) -> TextData:
    """Read a file of JSON lines, or a folder that the package `datasets` knows."""
    if Path(_given(source, "data")).is_dir():
        return read_dataset(source, kind, template=template, on_error=text.on_error)
    return read_text(Path(source), kind, template=template, on_error=text.on_error)


def _rows_for(language: LanguageModel, source: str, kind: Kind, text: TextConfig) -> list[TokenRow]:
    return read_rows(source, kind, language.tokenizer, text, language.template)


def read_rows(
    file: str, kind: Kind, tokenizer: Tokenizer, text: TextConfig,
    template: Template = plain_chat,
) -> list[TokenRow]:  # fmt: skip
    """Read a file or a folder of text as rows of tokens; `template` writes conversations."""
    data = read_data(file, kind, text, template)
    encoded = encode_rows(
        tokenizer, data.rows, text.max_prompt, text.max_answer, on_error=text.on_error
    )
    for reason, count in {**data.bad, **encoded.counts}.items():
        print(f"{file}: {count} rows: {reason}")
    for field, count in data.unused.items():
        print(f"{file}: field {field!r} of {count} rows is not used")
    return encoded.rows


def at_update(loader: Any, update: int) -> Any:
    """Return the batch of an update, counted from 0."""
    return loader.get(Cursor(update // loader.batches, update % loader.batches))[0]


def answers_loader(rows: Sequence[TokenRow], text: TextConfig, loop: LoopConfig) -> Loader:
    """Batch prompts with their answers."""
    return text_loader(rows, [(text.max_prompt, text.max_answer)], _batches(loop))


def prompt_batches(
    rows: Sequence[TokenRow], text: TextConfig, size: int, seed: int
) -> Iterator[TextBatch]:
    """Yield one pass over prompts, without any answers; all batches but the last are full."""
    alone = [row._replace(answers=(), rank=()) for row in rows]
    config = BatchConfig(min(size, len(alone)), seed=seed)
    yield from epoch(text_loader(alone, [(text.max_prompt, 0)], config))


def _batches(loop: LoopConfig, last: Literal["pad", "drop"] = "pad") -> BatchConfig:
    return BatchConfig(loop.batch_size, last=last, seed=loop.seed)


def _given(value: str, name: str) -> str:
    if not value:
        raise ValueError(f"--{name}: expected a path, got nothing; see --help")
    return value

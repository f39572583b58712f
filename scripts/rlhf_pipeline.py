"""The whole of RLHF in one command, on files or on the synthetic task."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from agents.rlhf.direct import DirectConfig
from agents.rlhf.ppo import TokenPPOConfig
from agents.rlhf.reward import RewardConfig
from agents.rlhf.stage import TuningConfig
from agents.rlhf.supervised import SupervisedConfig
from mbrl.networks.transformer import TransformerConfig, family_config
from mbrl.preferences.grammar import MAX_ANSWER, MAX_PROMPT
from mbrl.training import run_directory
from mbrl.training.grammar_files import GrammarConfig
from scripts import config_json, rlhf_use
from scripts import rlhf_jobs as jobs
from scripts.rlhf_stage import LoopConfig

BASE, DATA, RESULT = "base", "data", "result.json"


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
    """Fine-tuning on demonstrations."""

    loop: LoopConfig = LoopConfig(steps=600, batch_size=48, log_every=20)
    learner: SupervisedConfig = SupervisedConfig(
        TuningConfig(learning_rate=3e-3, warmup=20, anneal=600)
    )


@dataclasses.dataclass(frozen=True)
class RewardStep:
    """A reward model from rankings."""

    loop: LoopConfig = LoopConfig(steps=200, batch_size=32)
    learner: RewardConfig = RewardConfig(
        members=3, tuning=TuningConfig(learning_rate=1e-3, warmup=20, anneal=200)
    )
    normalize_first: bool = False
    """Scores have their unit before training, too, see RewardJob."""


@dataclasses.dataclass(frozen=True)
class PPOStep:
    """A policy that the reward model improves."""

    loop: LoopConfig = LoopConfig(steps=100, batch_size=128)
    kl_budget: float = 0.0
    """Nats per response at which training ends; 0 = none."""
    early_stop: int = 0
    """Updates whose true reward is compared with that of as many before them, see PPOJob."""
    # The longest response is `text.max_answer`.
    learner: TokenPPOConfig = TokenPPOConfig(
        length=MAX_ANSWER, temperature=1.0, minibatches=2, value="shared", value_weight=0.5,
        kl_coef=0.1, tuning=TuningConfig(learning_rate=3e-4),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DirectStep:
    """A policy from the same rankings, without the reward model; `direct` says whether."""

    loop: LoopConfig = LoopConfig(steps=200, batch_size=64)
    learner: DirectConfig = DirectConfig(tuning=TuningConfig(learning_rate=3e-4, anneal=200))


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The stages of RLHF one after the other; the same command again goes on."""

    out: str = "runs/rlhf"
    """Folder of the pipeline; every stage has one in it."""
    data: str = ""
    """Folder with train/ and test/ of demonstrations.jsonl, rankings.jsonl and prompts.jsonl;
    the synthetic task is written if empty."""
    base: str = ""
    """Folder of a pretrained model; one with random weights is made if empty."""
    seed: int = 0
    """Of all stages."""
    num_seeds: int = 1
    """Seeds trained in one program, `seed` the first; each has folders `seed_N`."""
    direct: bool = True
    """Also train a policy by direct preference optimization."""
    architecture: TransformerConfig = family_config(
        "llama", layers=2, width=64, heads=4, mlp_width=256, max_length=64, tied=True
    )
    """Of the model with random weights; its vocabulary is that of the data."""
    task: GrammarConfig = GrammarConfig(bias=0.5)
    """Of the synthetic task."""
    text: jobs.TextConfig = jobs.TextConfig(MAX_PROMPT, MAX_ANSWER)
    sft: SupervisedStep = SupervisedStep()
    reward: RewardStep = RewardStep()
    ppo: PPOStep = PPOStep()
    dpo: DirectStep = DirectStep()


def pipeline(config: PipelineConfig) -> Path:
    """Run all stages, then judge the models on prompts that nobody has seen.

    Returns:
      The file of the results; with several seeds the folder that holds one for each.
    """
    out, text, seeds = (
        Path(config.out),
        config.text,
        range(config.seed, config.seed + config.num_seeds),
    )
    if config.ppo.learner.length not in (MAX_ANSWER, text.max_answer):
        raise ValueError(
            f"ppo.learner.length: got {config.ppo.learner.length}, expected text.max_answer, which "
            f"is {text.max_answer}; set --text.max-answer alone"
        )
    began, fresh = time.perf_counter(), not (out / "sft").exists()
    each = "seed_{seed}" if config.num_seeds > 1 else "."
    data, base = Path(config.data or out / DATA / each), Path(config.base or out / BASE / each)
    for seed in seeds:
        _begin(config, seed, data, base)

    def loop(step: Any) -> LoopConfig:
        return dataclasses.replace(step.loop, seed=config.seed, num_seeds=config.num_seeds)

    train = data / "train"
    print("sft: fine-tuning on demonstrations")
    sft = jobs.supervised(jobs.SupervisedJob(
        str(train / "demonstrations.jsonl"), str(base), str(out / "sft"), text,
        loop(config.sft), config.sft.learner,
    ))  # fmt: skip
    print("reward: learning from rankings")
    reward = jobs.reward(jobs.RewardJob(
        str(train / "rankings.jsonl"), str(sft), str(train / "prompts.jsonl"),
        str(out / "reward"), text, loop(config.reward), config.reward.learner,
        config.reward.normalize_first,
    ))  # fmt: skip
    print("ppo: improving the policy")
    ppo = jobs.ppo(jobs.PPOJob(
        str(train / "prompts.jsonl"), str(sft), str(reward),
        str(train / "demonstrations.jsonl"), "" if config.data else "grammar",
        config.ppo.kl_budget, config.ppo.early_stop, str(out / "ppo"), text, loop(config.ppo),
        dataclasses.replace(config.ppo.learner, length=text.max_answer),
    ))  # fmt: skip
    models = {"sft": sft, "ppo": ppo}
    if config.direct:
        print("dpo: fitting a policy to the rankings directly")
        models["dpo"] = jobs.direct(jobs.DirectJob(
            str(train / "rankings.jsonl"), "rankings", str(sft), str(out / "dpo"), text,
            loop(config.dpo), config.dpo.learner,
        ))  # fmt: skip
    about = {"versions": run_directory.versions(), "seconds": None}
    if fresh:
        about["seconds"] = time.perf_counter() - began
    for seed in seeds:
        one = dataclasses.replace(config, seed=seed)
        file = Path(str(out / each).replace("{seed}", str(seed))) / RESULT
        result = _judge(one, data / "test", models, reward)
        if fresh or not file.exists():
            run_directory.write_json(file, result | {"config": config_json.to_json(one)} | about)
    return out / RESULT if config.num_seeds == 1 else out


def _begin(config: PipelineConfig, seed: int, data: Path, base: Path) -> None:
    """Write what a seed starts from, where it has not been given."""
    data, base = (Path(str(path).replace("{seed}", str(seed))) for path in (data, base))
    if not config.data and not (data / "test" / "rankings.jsonl").exists():
        task = dataclasses.replace(config.task, seed=seed)
        rlhf_use.data(rlhf_use.DataJob(str(data), task))
    if not config.base:
        rlhf_use.new(rlhf_use.NewJob(str(base), str(data), seed, config.architecture))


def _judge(
    config: PipelineConfig, test: Path, models: dict[str, Path], reward: Path
) -> dict[str, Any]:
    """Score answers to the test prompts, and the reward model on the test rankings."""

    def at(path: Path) -> str:
        return str(path).replace("{seed}", str(config.seed))

    result: dict[str, Any] = {
        "reward": rlhf_use.judge_reward(at(reward), at(test / "rankings.jsonl"), config.text)
    }
    for name, model in models.items():
        result[name] = rlhf_use.judge_policy(
            at(model), at(reward), at(models["sft"]), at(test / "prompts.jsonl"),
            config.text, config.ppo.learner.temperature, config.seed, not config.data,
        )  # fmt: skip
        told = ", ".join(f"{key} {value['mean']:.3f}" for key, value in result[name].items())
        print(f"{name}: {told}" if config.num_seeds == 1 else f"seed {config.seed}: {name}: {told}")
    return result

"""Time steps of TRL on a small GPT-2, in an environment of its own; print JSON.

  python3.11 -m venv PEER
  PEER/bin/pip install torch==2.13.0 trl==1.12.0

1.12 is the last version with a trainer for PPO. Sizes are those of `mbrl bench rlhf`;
dropout is off and no prompt is padded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = ("trl", "torch", "transformers")
PAD, END = 0, 1
"""Tokens that no row of data has. Where a model draws one, a response counts as shorter, for the
same work."""


def main(argv: Sequence[str]) -> int:
    """Print the timing as one JSON object; return 2 where the library cannot be imported."""
    flags = argparse.ArgumentParser(description="Time steps of TRL on a small GPT-2.")
    flags.add_argument("--part", choices=("reward", "direct", "generate", "ppo"), default="reward")
    for name, default in (
        ("vocab", 1024), ("layers", 4), ("width", 256), ("heads", 4), ("pairs", 16), ("prompt", 80),
        ("response", 48), ("batch", 32), ("epochs", 4), ("repeat", 10), ("threads", 2),
    ):  # fmt: skip
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--check", action="store_true", help="print versions and time nothing")
    args = flags.parse_args(argv)
    try:
        found: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        }
        torch = importlib.import_module("torch")
        importlib.import_module("trl.experimental.ppo")
    except ImportError as error:
        print(f"TRL cannot be imported: {error}", file=sys.stderr)
        return 2
    if not args.check:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        # Trainers print what they have done.
        quiet = contextlib.redirect_stdout(sys.stderr)
        with tempfile.TemporaryDirectory() as folder, quiet:
            parts: dict[str, Callable[..., list[float]]] = {
                "reward": reward, "direct": direct, "generate": generate, "ppo": ppo,
            }  # fmt: skip
            found["seconds"] = parts[args.part](args, torch, folder)
    print(json.dumps(found, allow_nan=False))
    return 0


def reward(args: Any, torch: Any, folder: str) -> list[float]:
    """Train on pairs; return seconds per step."""
    trl = importlib.import_module("trl")
    stamps = clock()
    config = trl.RewardConfig(
        per_device_train_batch_size=args.pairs, max_length=None, **common(args, folder)
    )
    trainer = trl.RewardTrainer(
        model=network(args, torch, scores=True), args=config, processing_class=tokenizer(args),
        train_dataset=pairs(args, torch, whole=True), callbacks=[stamps],
    )  # fmt: skip
    trainer.train()
    return stamps.seconds[1:]


def direct(args: Any, torch: Any, folder: str) -> list[float]:
    """Fit a policy to pairs, with the reference evaluated before; return seconds per step."""
    trl = importlib.import_module("trl")
    stamps = clock()
    config = trl.DPOConfig(
        per_device_train_batch_size=args.pairs, max_length=None,
        precompute_ref_log_probs=True, **common(args, folder),
    )  # fmt: skip
    model = network(args, torch)
    trainer = trl.DPOTrainer(
        model=model, args=config, processing_class=tokenizer(args),
        train_dataset=pairs(args, torch, whole=False), callbacks=[stamps],
    )  # fmt: skip
    trainer.train()
    return stamps.seconds[1:]


def generate(args: Any, torch: Any, folder: str) -> list[float]:
    """Sample responses; return seconds per batch."""
    del folder
    model, found = network(args, torch).eval(), []
    prompts = torch.randint(2, args.vocab, (args.batch, args.prompt))
    settings = importlib.import_module("transformers").GenerationConfig(
        max_new_tokens=args.response, min_new_tokens=args.response, do_sample=True, top_k=0,
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    for _ in range(args.repeat + 1):
        start = time.perf_counter()
        with torch.no_grad():
            written = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
            )
        found.append(time.perf_counter() - start)
        assert written.shape[1] == args.prompt + args.response
    return found[1:]


def ppo(args: Any, torch: Any, folder: str) -> list[float]:
    """Run iterations of PPO; return the seconds of each but the first."""
    trainers = importlib.import_module("trl.experimental.ppo")
    data = importlib.import_module("datasets").Dataset.from_dict(
        {"input_ids": tokens(args, torch, args.batch, args.prompt)}
    )
    stamps, options = clock(), common(args, folder)
    del options["max_steps"]
    config = trainers.PPOConfig(
        per_device_train_batch_size=args.batch, gradient_accumulation_steps=1, num_mini_batches=1,
        total_episodes=args.batch * (args.repeat + 1), response_length=args.response,
        num_ppo_epochs=args.epochs, temperature=1.0, local_rollout_forward_batch_size=args.batch,
        num_sample_generations=0, stop_token=None, **options,
    )  # fmt: skip
    trainer = trainers.PPOTrainer(
        args=config, processing_class=tokenizer(args), model=network(args, torch),
        ref_model=network(args, torch), reward_model=network(args, torch, scores=True),
        value_model=network(args, torch, scores=True), train_dataset=data, callbacks=[stamps],
    )  # fmt: skip
    trainer.train()
    ends = stamps.ends
    return [after - before for before, after in itertools.pairwise(ends)]


def common(args: Any, folder: str) -> dict[str, Any]:
    """Return settings of every trainer."""
    return {
        "output_dir": folder, "max_steps": args.repeat + 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip


def clock() -> Any:
    """Make a callback with the seconds of every step, and when each ended."""
    transformers = importlib.import_module("transformers")

    class Clock(transformers.TrainerCallback):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self) -> None:
            self.start, self.seconds, self.ends = 0.0, [], []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())
            self.seconds.append(self.ends[-1] - self.start)

    return Clock()


def network(args: Any, torch: Any, scores: bool = False) -> Any:
    """Make a GPT-2 with random weights, as a language model or with one score."""
    del torch
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=args.vocab, n_positions=args.prompt + args.response, n_embd=args.width,
        n_layer=args.layers, n_head=args.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        num_labels=1, pad_token_id=PAD, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    kind = "GPT2ForSequenceClassification" if scores else "GPT2LMHeadModel"
    return getattr(transformers, kind)(config)


def tokenizer(args: Any) -> Any:
    """Make a tokenizer of as many words."""
    tokenizers = importlib.import_module("tokenizers")
    words = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(2, args.vocab)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )


def tokens(args: Any, torch: Any, rows: int, length: int) -> list[list[int]]:
    """Draw rows of tokens."""
    return torch.randint(2, args.vocab, (rows, length)).tolist()


def pairs(args: Any, torch: Any, whole: bool) -> Any:
    """Draw pairs of the length of a prompt and a response: whole rows of tokens, or text of which
    the first half is the prompt; the trainer adds the end to an answer.
    """
    length = args.prompt + args.response
    rows, half = args.pairs * (args.repeat + 1), length // 2

    def text(count: int) -> list[str]:
        return ["".join(f" w{i}" for i in row) for row in tokens(args, torch, rows, count)]

    found: dict[str, Any] = (
        {f"{name}_ids": tokens(args, torch, rows, length) for name in ("chosen", "rejected")}
        if whole
        else {name: text(length - half - 1) for name in ("chosen", "rejected")}
    )
    if not whole:
        found["prompt"] = text(half)
    return importlib.import_module("datasets").Dataset.from_dict(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

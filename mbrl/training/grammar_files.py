"""The language task of `mbrl.preferences.grammar` as files, for those who read files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from mbrl.preferences import grammar
from mbrl.preferences.teachers import TeacherConfig
from mbrl.text_rows import TextRow
from mbrl.training.text_data import Kind, write_text
from mbrl.training.tokenizer_files import save_words


@dataclasses.dataclass(frozen=True)
class GrammarConfig:
    """What is written."""

    seed: int = 0
    """Of the split, the answers and the annotators."""
    demonstrations: int = 4
    """Of each prompt."""
    rankings: int = 2
    """Of each prompt."""
    options: int = 4
    """Answers of each ranking."""
    bias: float = 1.0
    """How much annotators are flattered; 0 = they judge by gold."""
    teacher: TeacherConfig = TeacherConfig(beta=5.0)
    """Who ranks; the best and the worst answers differ by about 2."""


def write_grammar(folder: Path, config: GrammarConfig = GrammarConfig()) -> dict[str, int]:
    """Write the task: `vocabulary.json`, and three kinds of rows for each part of the prompts.

    The files are `PART/prompts.jsonl`, `PART/demonstrations.jsonl` and `PART/rankings.jsonl`
    for train, validation and test. No prompt is in two parts.

    Args:
      folder: made if there is none.
      config: of the task.

    Returns:
      Rows of each file, by its name.
    """
    folder = Path(folder)
    save_words(folder, grammar.VOCABULARY)
    split = grammar.split_prompts(config.seed)
    rng = np.random.default_rng(config.seed)
    keys = jax.random.split(jax.random.key(config.seed), len(split))
    counts = {}
    for part, prompts, key in zip(split._fields, split, keys, strict=True):
        ranked = grammar.rankings(
            key, rng, prompts * config.rankings, config.teacher, config.options, config.bias
        )
        kinds: dict[Kind, list[TextRow]] = {
            "prompts": [TextRow(prompt) for prompt in prompts],
            "demonstrations": grammar.demonstrations(rng, prompts * config.demonstrations),
            "rankings": ranked,
        }
        for kind, rows in kinds.items():
            name = f"{part}/{kind}.jsonl"
            write_text(folder / name, kind, rows)
            counts[name] = len(rows)
    return counts

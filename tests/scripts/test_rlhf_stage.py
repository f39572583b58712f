"""Stages of RLHF end when they should, and hand on folders that are whole."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.rlhf.stage import Stage
from mbrl.models.token_reward import token_reward
from mbrl.networks.transformer import family_config, transformer
from mbrl.training import checkpoint, run_directory
from mbrl.training.text_data import plain_chat
from mbrl.training.tokenizer_files import load_tokenizer, save_words
from scripts import cli, rlhf_jobs, rlhf_pipeline
from scripts.rlhf_models import (
    UPDATE,
    check_fit,
    digest_of,
    load_model,
    load_reward,
    save_model,
    save_reward,
)
from scripts.rlhf_stage import CHECKPOINTS, LoopConfig, StageRun, StoppedError, run_stage
from scripts.rlhf_watch import watch_of

pytestmark = pytest.mark.usefixtures("same_versions")
WORDS = ("red", "blue", "and", "list")
CONFIG = family_config("llama", vocab=6, layers=1, width=8, heads=2, mlp_width=8, max_length=16)


def call(*argv: str) -> int:
    return cli.main(["rlhf", *argv])


class AtOnce(run_directory.StopSignal):
    """A signal that is there before the first update."""

    requested = True

    def __init__(self) -> None:
        pass

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def pursued(watch: Any) -> StageRun:
    """Make a stage whose divergence and learned reward rise; its true one falls after 5."""

    def step(state: Any, given: Any, batch: Any, key: Any) -> Any:
        t = state + 1.0
        true = -jnp.abs(t - 5.0)
        return t, {"kl": 0.5 * t, "score": t, "gold": true, "gold/error": 0.1 + 0.0 * t}

    stage = Stage(lambda key, given: jnp.zeros(()), step, lambda state, given: state)
    return StageRun("ppo", stage, (), lambda update: (), watch)


@pytest.mark.parametrize(
    ("limits", "last", "reason"),
    [
        # 0.5 t is above 1.2 first at t = 3, in the middle of an interval of metrics.
        ({"kl_budget": 1.2}, 3, "1.50 nats from the reference, 1.2 allowed"),
        # Means of two: -0.5 at 4 and 5, -1.5 at 6 and 7, and 0.2 are two standard errors.
        ({"early_stop": 2, "gold": "grammar"}, 7, "the true reward falls from -0.500 to -1.500"),
        ({"kl_budget": 1.2, "early_stop": 2, "gold": "grammar"}, 3, "1.50 nats"),
        ({}, 9, ""),
    ],
)
def test_a_pursuit_ends_where_it_should(
    tmp_path: Path, monkeypatch: Any, capsys: Any, limits: Any, last: int, reason: str
) -> None:
    run, loop = pursued(watch_of(rlhf_jobs.PPOJob(**limits))), LoopConfig(9, tensorboard=False)
    whole = run_stage(run, loop, tmp_path / "whole", {})
    assert whole.update == last
    assert reason in capsys.readouterr().err
    saved = checkpoint.read_manifest(tmp_path / "whole" / CHECKPOINTS)
    assert saved is not None and saved[1]["ended"].startswith(reason)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == last
    # It stays ended, though there is room for more.
    assert run_stage(run, loop, tmp_path / "whole", {}).update == last
    monkeypatch.setattr(run_directory, "StopSignal", AtOnce)
    for _ in range(last - 1):
        with pytest.raises(StoppedError):
            run_stage(run, loop, tmp_path / "often", {})
    assert run_stage(run, loop, tmp_path / "often", {}).update == last


@pytest.fixture(scope="module")
def params() -> Any:
    return transformer(CONFIG).init(jax.random.key(0))


def test_what_ends_a_text_is_handed_on(tmp_path: Path, params: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "red": 1, "blue": 2, "and": 3, "</s>": 4, "</turn>": 5}
    base = tmp_path / "base"
    base.mkdir()
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    table.save(str(base / "tokenizer.json"))
    # Named nowhere else, as by folders of pretrained models.
    (base / "config.json").write_text('{"eos_token_id": [4, 5]}')
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    save_model(tmp_path / "sft", CONFIG, params, base)
    save_model(tmp_path / "ppo", CONFIG, params, tmp_path / "sft")
    entries = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert (entries["eos_token_id"], entries["pad_token_id"]) == ([4, 5], 4)
    language = load_model(str(tmp_path / "ppo"))
    assert language.tokenizer.eos == 4
    assert language.template is not plain_chat
    state = token_reward(language.model).init(jax.random.key(1), params)
    save_reward(tmp_path / "reward", CONFIG, "heads", state, tmp_path / "sft")
    loaded = load_reward(str(tmp_path / "reward"))
    assert loaded.tokenizer.eos == 4
    check_fit(language, loaded, "reward")
    other = loaded._replace(tokenizer=loaded.tokenizer._replace(eos=5))
    with pytest.raises(ValueError, match="reward: there was trained with 6 tokens, the end .* 5"):
        check_fit(language, other, "there")


def test_a_model_is_replaced_by_one_of_another_update(tmp_path: Path, params: Any) -> None:
    save_words(tmp_path / "words", WORDS)
    folder, more = tmp_path / "model", jax.tree.map(lambda x: x + 1.0, params)
    save_model(folder, CONFIG, params, tmp_path / "words", 3)
    save_model(folder, CONFIG, more, tmp_path / "words", 3)
    assert digest_of(load_model(str(folder)).params) == digest_of(params)
    save_model(folder, CONFIG, more, tmp_path / "words", 4)
    assert digest_of(load_model(str(folder)).params) == digest_of(more) != digest_of(params)
    assert json.loads((folder / "config.json").read_text())[UPDATE] == 4
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model", "words"]


def test_conversations_are_written_as_the_model_wants_them(
    tmp_path: Path, params: Any, monkeypatch: Any
) -> None:
    save_words(tmp_path / "words", WORDS)
    save_model(tmp_path / "model", CONFIG, params, tmp_path / "words")
    talk = [{"role": "user", "content": "list red"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": talk}))
    text = rlhf_jobs.TextConfig(4, 4)

    def prompt(source: Path) -> list[int]:
        language = load_model(str(tmp_path / "model"))
        found = rlhf_jobs.read_rows(
            str(source), "prompts", language.tokenizer, text, language.template
        )
        return np.asarray(found[0].prompt).tolist()

    with pytest.raises(ValueError, match="'user:', expected words"):
        prompt(tmp_path / "talks.jsonl")
    # A folder is a data set of the package of that name.
    stand_in = types.ModuleType("datasets")
    stand_in.__dict__["load_dataset"] = lambda source: {"train": [{"prompt": "and blue"}]}
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (tmp_path / "set").mkdir()
    assert prompt(tmp_path / "set") == [2, 1]
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}{{ m.content }} and{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert prompt(tmp_path / "talks.jsonl") == [3, 0, 2]


def test_a_stage_computes_as_its_tuning_says(
    tmp_path: Path, params: Any, monkeypatch: Any, capsys: Any
) -> None:
    save_words(tmp_path / "words", WORDS)
    save_model(tmp_path / "model", CONFIG, params, tmp_path / "words")
    (tmp_path / "shown.jsonl").write_text('{"prompt": "list", "answer": "red"}')

    def make(model: Any, learner: Any) -> Any:
        raise ValueError(f"{model.config.dtype}, remat {model.config.remat}")

    monkeypatch.setattr(rlhf_jobs, "make_supervised", make)
    argv = ["--data", str(tmp_path / "shown.jsonl"), "--model", str(tmp_path / "model")]
    argv += ["--loop.batch-size", "1", "--out", str(tmp_path / "sft")]
    assert call("sft", *argv) == 2
    assert "float32, remat False" in capsys.readouterr().err
    assert call("sft", *argv, "--learner.tuning.dtype", "bfloat16", "--learner.tuning.remat") == 2
    assert "bfloat16, remat True" in capsys.readouterr().err


def test_responses_of_the_pipeline_are_as_long_as_its_answers(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(job: Any) -> Any:
        raise ValueError(f"responses of {job.learner.length}")

    monkeypatch.setattr(rlhf_pipeline, "_begin", lambda *_: None)
    for name in ("supervised", "reward"):
        monkeypatch.setattr(rlhf_jobs, name, lambda job: Path(job.out))
    monkeypatch.setattr(rlhf_jobs, "ppo", refuse)
    assert call("run", "--out", str(tmp_path), "--text.max-answer", "24") == 2
    assert "responses of 24" in capsys.readouterr().err


def test_a_model_of_bytes_needs_no_tokenizer(tmp_path: Path) -> None:
    sizes = ["--architecture.layers", "1", "--architecture.width", "8", "--architecture.heads", "2"]
    assert call("new", "--tokenizer", "bytes", "--out", str(tmp_path / "base"), *sizes) == 0
    tokenizer = load_model(str(tmp_path / "base")).tokenizer
    assert tokenizer.decode(tokenizer.encode("Gr\u00fc\u00dfe")) == "Gr\u00fc\u00dfe"
    shutil.copytree(tmp_path / "base", tmp_path / "next")
    assert load_tokenizer(tmp_path / "next").vocab == 259

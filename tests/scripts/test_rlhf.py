"""`mbrl rlhf`: the pipeline on files, each stage alone, and going on after a stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.rlhf.supervised import SupervisedGiven, make_supervised
from mbrl.training import checkpoint, hugging_face, run_directory
from mbrl.training.text_data import read_text
from scripts import (
    benchmarks_page,
    cli,
    pursuit,
    rankings_study,
    results,
    rlhf,
    rlhf_jobs,
    rlhf_pipeline,
    rlhf_use,
)
from scripts.rlhf_models import load_model, load_reward
from scripts.rlhf_pipeline import PipelineConfig
from scripts.rlhf_stage import CHECKPOINTS, LoopConfig

pytestmark = pytest.mark.usefixtures("same_versions")

SMALL = {
    "architecture": {"layers": 1, "width": 16, "heads": 2, "padding_rows": 3},
    "sft": {"loop": {"steps": 4, "batch_size": 8, "save_every": 2, "tensorboard": False}},
    "reward": {
        "loop": {"steps": 2, "batch_size": 4, "save_every": 1, "tensorboard": False},
        "learner": {"members": 2},
    },
    "ppo": {
        "loop": {"steps": 2, "batch_size": 8, "save_every": 1, "tensorboard": False},
        "learner": {"epochs": 1, "minibatches": 1}, "early_stop": 1,
    },
    "dpo": {"loop": {"steps": 2, "batch_size": 8, "save_every": 1, "tensorboard": False}},
}  # fmt: skip


def call(*argv: str) -> int:
    return cli.main(["rlhf", *argv])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf")
    (folder / "config.json").write_text(json.dumps(SMALL))
    assert call("run", "--config", str(folder / "config.json"), "--out", str(folder / "run")) == 0
    return folder / "run"


def test_the_pipeline_judges_every_policy_on_new_prompts(made: Path) -> None:
    result = json.loads((made / "result.json").read_text())
    assert {"reward", "sft", "ppo", "dpo", "seconds", "config"} <= set(result)
    # Every prompt has been answered once; the reference is no distance from itself.
    assert abs(result["sft"]["kl"]["mean"]) < 1e-5
    assert abs(result["sft"]["score"]["mean"]) < 0.5
    for policy in ("sft", "ppo", "dpo"):
        assert np.isfinite(result[policy]["gold"]["mean"])
    assert result["reward"]["pairs"] == 402 * 6
    lines = [json.loads(x) for x in (made / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["kl"]) < 1.0
    assert {"gold", "score", "score/spread", "length", "ended"} <= lines[0].keys()


def test_every_prompt_is_answered_once(made: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rlhf_use, "CHUNK", 64)  # 201 prompts: three batches and a part
    folders = (str(made / "ppo"), str(made / "reward"), str(made / "sft"))
    found = rlhf_use.measure_policy(
        *folders, str(made / "data/test/prompts.jsonl"), rlhf_jobs.TextConfig(6, 16), 1.0, 0, True
    )
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(
        ("gold", "kl", "length", "score"), (201,)
    )
    assert 1.0 <= found["length"].min() <= found["length"].max() <= 16.0


def test_the_same_command_finds_all_of_it_done(made: Path, capsys: Any) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*.safetensors")}
    config = str(made.parent / "config.json")
    assert call("run", "--config", config, "--out", str(made)) == 0
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*.safetensors")} == before
    assert "compiling" not in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_a_stage_that_was_cut_goes_on_as_if_it_had_not_been(
    made: Path, stage: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rlhf_pipeline, "_judge", lambda *_: {})
    folder = made / stage

    def learned() -> list[Any]:
        if stage == "reward":
            return jax.tree.leaves(load_reward(str(folder)).state)
        return jax.tree.leaves(load_model(str(folder)).params)

    whole, before = learned(), checkpoint.read_manifest(folder / CHECKPOINTS)
    # As a kill before the newest save leaves it.
    shutil.rmtree(max((folder / CHECKPOINTS).glob("step_*")))
    shutil.rmtree(folder / ("reward" if stage == "reward" else "model"))
    argv = ["--config", str(made.parent / "config.json"), "--out", str(made)]
    assert call("run", *argv) == 0
    assert checkpoint.read_manifest(folder / CHECKPOINTS) == before
    for mine, other in zip(learned(), whole, strict=True):
        np.testing.assert_array_equal(mine, other)
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_stage_that_is_extended_hands_on_what_it_has_become(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    text = ["--text.max-prompt", "6", "--text.max-answer", "16", "--loop.batch-size", "8"]
    text += ["--loop.no-tensorboard"]
    data = ["--data", str(made / "data/train/demonstrations.jsonl")]
    sft = ["sft", *data, "--model", str(made / "base"), "--out", str(tmp_path / "sft"), *text]
    assert call(*sft, "--loop.steps", "1") == 0
    first = load_model(str(tmp_path / "sft"))
    # In shards, whose names say nothing: the reference of DPO is recognized by its weights.
    cut = Path(shutil.copytree(tmp_path / "sft/model", tmp_path / "cut"))
    (cut / "model.safetensors").unlink()
    shards = tmp_path / "shards"
    hugging_face.save(shards, first.model.config, first.params, shard_bytes=1000)
    for file in shards.iterdir():
        shutil.copy(file, cut)
    data = ["--data", str(made / "data/train/rankings.jsonl")]
    dpo = ["dpo", *data, "--model", str(cut), "--out", str(tmp_path / "dpo"), *text]
    assert call(*dpo, "--loop.steps", "1") == 0

    assert call(*sft, "--loop.steps", "2", "--loop.override-config") == 0
    second = load_model(str(tmp_path / "sft"))
    saved = checkpoint.restore(
        tmp_path / "sft" / CHECKPOINTS,
        jax.eval_shape(make_supervised(second.model).init, jax.random.key(0),
                       SupervisedGiven(second.params)),
    )  # fmt: skip
    assert saved is not None and saved.step == 2
    for mine, other in zip(
        jax.tree.leaves(second.params), jax.tree.leaves(saved.tree.weights), strict=True
    ):
        np.testing.assert_array_equal(mine, other)
    # What was begun with the model as it was does not go on with another one.
    shutil.rmtree(cut)
    shutil.copytree(tmp_path / "sft/model", cut)
    capsys.readouterr()
    assert call(*dpo, "--loop.steps", "2", "--loop.override-config") == 2
    assert "weights_given: " in capsys.readouterr().err


def test_seeds_of_one_program_are_those_of_one_each(made: Path, tmp_path: Path) -> None:
    argv = ["--config", str(made.parent / "config.json"), "--out", str(tmp_path), "--no-direct"]
    argv += ["--ppo.early-stop", "0"]
    assert call("run", *argv, "--seed", "0", "--num-seeds", "2") == 0
    several = load_model(str(tmp_path / "sft" / "seed_0")).params
    for mine, alone in zip(
        jax.tree.leaves(several), jax.tree.leaves(load_model(str(made / "sft")).params), strict=True
    ):
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-5)
    other = load_model(str(tmp_path / "sft" / "seed_1")).params
    assert any(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(other), strict=True)
    )
    golds = [
        json.loads((tmp_path / f"seed_{seed}" / "result.json").read_text())["ppo"]["gold"]["mean"]
        for seed in range(2)
    ]
    alone = json.loads((made / "result.json").read_text())["ppo"]["gold"]["mean"]
    assert abs(golds[0] - alone) < 1e-3
    assert golds[1] != golds[0]
    config = rlhf.merged(PipelineConfig(), SMALL, "test")
    train = tmp_path / "data" / "seed_1" / "train"
    lone = rlhf_jobs.reward(rlhf_jobs.RewardJob(
        str(train / "rankings.jsonl"), str(tmp_path / "sft/seed_1"), str(train / "prompts.jsonl"),
        str(tmp_path / "lone"), config.text, dataclasses.replace(config.reward.loop, seed=1),
        config.reward.learner,
    ))  # fmt: skip
    for mine, alone in zip(
        jax.tree.leaves(load_reward(str(tmp_path / "reward/seed_1")).state),
        jax.tree.leaves(load_reward(str(lone)).state),
        strict=True,
    ):
        np.testing.assert_allclose(mine, alone, rtol=1e-3, atol=1e-4)
    first, second = pursuit.load(tmp_path, "run")
    assert first.label == "run, seed 0" and list(first.series["update"]) == [2]
    assert second.series["score"] != first.series["score"]


def test_what_seeds_cannot_share_is_refused(made: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--data", str(made / "data/train/prompts.jsonl"), "--model", str(made / "sft")]
    flags += ["--reward", str(made / "reward"), "--out", str(tmp_path), "--loop.num-seeds", "2"]
    assert call("ppo", *flags, "--kl-budget", "1.0") == 2
    assert "kl_budget: got 1 with 2 seeds" in capsys.readouterr().err
    assert call("ppo", *flags, "--early-stop", "4", "--gold", "grammar") == 2
    assert "early_stop: got 4 with 2 seeds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_seeds: got 2 with 2 x 1 devices"):
        LoopConfig(num_seeds=2, data_devices=2)


def test_a_stop_saves_and_says_so(
    made: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    class AtOnce(run_directory.StopSignal):
        requested = True

        def __init__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def __enter__(self) -> AtOnce:
            return self

    monkeypatch.setattr(run_directory, "StopSignal", AtOnce)
    flags = ["--data", str(made / "data/train/demonstrations.jsonl"), "--model", str(made / "base")]
    flags += ["--text.max-prompt", "6", "--text.max-answer", "16", "--out", str(tmp_path)]
    assert call("sft", *flags, "--loop.no-tensorboard") == 75
    assert "stopped at update 1, saved" in capsys.readouterr().err
    assert checkpoint.read_manifest(tmp_path / CHECKPOINTS) is not None


def test_other_settings_are_refused(made: Path, capsys: Any) -> None:
    config = str(made.parent / "config.json")
    argv = ["--config", config, "--out", str(made), "--sft.learner.tuning.learning-rate", "0.5"]
    assert call("run", *argv) == 2
    assert "learning_rate: 0.003 -> 0.5" in capsys.readouterr().err


def test_answers_are_chosen_by_the_reward_model(
    made: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    loaded = load_reward(str(made / "reward"))
    apple = loaded.tokenizer.encode("apple")[0]

    def scores(state: Any, tokens: Any, mask: Any) -> Any:
        return jnp.sum((tokens == apple) & mask, 1, dtype=jnp.float32)[None]

    likes_apples = loaded._replace(reward=loaded.reward._replace(scores=scores))
    text = ["--text.max-prompt", "6", "--text.max-answer", "16"]
    flags = ["--model", str(made / "sft"), "--data", str(made / "data/test/prompts.jsonl"), *text]
    flags += ["--reward", str(made / "reward"), "--out", str(tmp_path / "answers.jsonl")]
    means = []
    with monkeypatch.context() as patch:
        patch.setattr(rlhf_use, "load_reward", lambda folder: likes_apples)
        for n in ("1", "8"):
            assert call("generate", *flags, "--best-of", n) == 0
            rows = read_text(tmp_path / "answers.jsonl", "demonstrations").rows
            assert len(rows) == 201
            means.append(np.mean([row.answers[0].split().count("apple") for row in rows]))
    assert means[1] > means[0] + 0.5

    argv = ["--reward", str(made / "reward"), "--data", str(tmp_path / "answers.jsonl")]
    # An answer without an end has no room for one among 16 tokens.
    argv += ["--answers", "--text.max-prompt", "6", "--text.max-answer", "17"]
    assert call("score", *argv, "--out", str(tmp_path / "scores.json")) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert len(found) == 201
    assert found[3]["prompt"] == rows[3].prompt
    capsys.readouterr()
    argv = ["--model", str(made / "sft"), "--prompt", "list two fruits", *text]
    assert call("generate", *argv, "--samples", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("list two fruits\t") for line in lines)


def test_a_reward_model_is_judged_by_category(made: Path, tmp_path: Path, capsys: Any) -> None:
    row = {"prompt": "list two fruits", "chosen": "apple and fig", "rejected": "cow"}
    lines = [json.dumps(row | {"subset": name}) for name in ("chat", "safety", "chat")]
    (tmp_path / "bench.jsonl").write_text("\n".join(lines))
    flags = ["--reward", str(made / "reward"), "--data", str(tmp_path / "bench.jsonl")]
    capsys.readouterr()
    assert call("score", *flags, "--text.max-prompt", "6", "--text.max-answer", "16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by_subset"]["chat"]["pairs"] == 2
    assert found["by_subset"]["safety"]["accuracy"] in (0.0, 1.0)
    assert found["by_size"]["2"]["pairs"] == 3


def test_what_is_saved_is_what_was_trained(made: Path) -> None:
    language, loaded = load_model(str(made / "ppo")), load_reward(str(made / "reward"))
    # The embedding has three rows more than there are tokens; nobody ever writes them.
    assert language.tokenizer.vocab == language.model.config.vocab == 61
    assert language.params["embed"].shape == (64, 16)
    assert loaded.state.head.shape == (2, 16)
    # The unit of the scores was taken from responses of the reference.
    assert not np.allclose(loaded.state.gain, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pppo"], "got 'pppo', stages: run, data"),
        (["sft", "--loop.stps", "3"], "unknown flag --loop.stps"),
        (["sft"], "--model: expected a path"),
        (["ppo", "--model", "nowhere"], "nowhere: expected the folder of a model"),
        (["generate", "--model", "x", "--best-of", "4"], "--reward: expected the folder"),
        (["ppo", "--early-stop", "4"], "early_stop: got 4 without a true reward"),
        (["ppo", "--kl-budget", "-1"], "kl_budget: got -1, expected at least 0"),
        (["dpo", "--kind", "unpaired"], "learner.kind: got 'sigmoid' for answers without pairs"),
        (["new", "--architecture.dtype", "bfloat16"], "--learner.tuning.dtype of the stages"),
        (["run", "--ppo.learner.length", "24"], "expected text.max_answer, which is 16"),
    ],
)
def test_bad_commands_are_told_in_a_line(argv: list[str], message: str, capsys: Any) -> None:
    with contextlib.suppress(SystemExit):
        assert call(*argv) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_settings_is_checked(tmp_path: Path, capsys: Any) -> None:
    for text, message in (
        ('{"sft": {"loop": {"stepps": 3}}}', "unknown field 'stepps'"),
        ('{"ppo": {"learner": {"epochs": "four"}}}', "epochs: expected int, got 'four'"),
        ("[1]", "expected a JSON object"),
        ("{", "expected a JSON file of settings"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert call("run", "--config", str(tmp_path / "config.json")) == 2
        assert message in capsys.readouterr().err


def test_pipelines_become_lines_of_results(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_directory, "versions", lambda: {"cpu": "of this machine"})
    other = Path(shutil.copytree(made, tmp_path / "other"))
    result = json.loads((other / "result.json").read_text())
    result["config"]["seed"] = 1
    for name, gain in (("sft", 0.1), ("ppo", 0.5)):
        result[name]["gold"]["mean"] += gain
    (other / "result.json").write_text(json.dumps(result))
    out = tmp_path / "lines" / "rlhf.jsonl"
    assert results.main(["rlhf", str(made), str(other), "--out", str(out)]) == 0
    rows = benchmarks_page.load(out.parent)
    found = {(row["agent"], row["metric"]): row for row in rows}
    first, second = found["ppo", "true reward, mean over test prompts"]["values"]
    assert second - first == pytest.approx(0.5)
    # Gains of g and g + 0.4: their mean is g + 0.2, its standard error 0.2.
    gain = first - found["sft", "true reward, mean over test prompts"]["values"][0]
    errors = found["ppo", "true reward gained over sft, in standard errors over seeds"]
    assert errors["value"] == pytest.approx((gain + 0.2) / 0.2)
    assert len(found["all stages", "minutes"]["values"]) == 2
    assert "## RLHF" in benchmarks_page.render(rows)

    result["config"]["ppo"]["kl_budget"] = 3.0
    (other / "result.json").write_text(json.dumps(result))
    assert cli.run(results.main, ["rlhf", str(made), str(other), "--out", str(out)]) == 2


def test_rankings_and_their_pairs_are_compared(
    made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run_directory, "versions", lambda: {"cpu": "of this machine"})
    out = tmp_path / "rankings.json"
    argv = [str(made), "--out", str(out), "--prompts", "4", "--answers", "3", "--seeds", "1"]
    assert rankings_study.main([*argv, "--rows", "6", "--rates", "0.001"]) == 0
    found = json.loads(out.read_text())["found"]
    updates = [found[way]["0.001"][0]["updates"] for way in rankings_study.WAYS]
    # Four rankings of three are two batches of six answers, their twelve pairs are four of them.
    assert updates == [2, 4, 4]
    assert all(0.0 < by_rate["0.001"][0]["log_loss"] < 2.0 for by_rate in found.values())

"""Both sides of the comparison do the same work, take turns, and end on the benchmark page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from agents.presets import preset
from scripts import (
    bench_peers,
    bench_planning,
    bench_ppo,
    bench_rlhf,
    benchmarks_page,
    results,
)
from scripts.cli import run
from scripts.peers import mbrl_lib

FAKE = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
answer = {{"versions": {{"mbrl-lib": "0.2.0", "torch": "2.13.0"}}}}
if "--check" not in sys.argv:
    answer |= {{"seconds": [0.5, 0.25, 2.0], "median_seconds": 0.5, "min_seconds": 0.25,
               "elites": {elites}, "threads": 2}}
print(json.dumps(answer))
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def script(file: Path, text: str) -> str:
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def fake_peer(folder: Path, elites: int = 2) -> tuple[str, Path]:
    """Write a Python that answers like mbrl-lib and notes what it was asked."""
    log = folder / "log"
    text = FAKE.format(python=sys.executable, log=str(log), elites=elites)
    return script(folder / "python", text), log


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    folder = tmp_path_factory.mktemp("peers")
    python, log = fake_peer(folder)
    out = folder / "new" / "peers.json"
    argv = ["planning", "--python", python, "--out", str(out), "--repeats", "3", "--quick"]
    assert bench_peers.main(argv) == 0
    calls = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return json.loads(out.read_text("utf-8")), calls


def test_the_sides_take_turns_at_the_same_work(measured: Any) -> None:
    result, calls = measured
    assert list(result["peers"]) == ["a", "b"]
    # First whether there is a peer at all; always away from our own `mbrl`.
    assert [flags[:2] for flags in calls] == [["-I", str(bench_peers.FOLDER / "mbrl_lib.py")]] * 3
    assert calls[0][2:] == ["--check"]
    sizes = bench_planning.quick_sizes()
    for flags, side in zip(calls[1:], "ab", strict=True):
        args, ours = mbrl_lib.parser().parse_args(flags[2:]), result["peers"][side]["ours"]
        for name in ("obs", "act", "population", "horizon", "iterations", "particles", "members"):
            assert getattr(args, name) == ours[name], name
        assert [args.width] * args.layers == ours["hidden"] == list(sizes.hidden)
        assert (args.repeat, args.elites) == (3, 2)
        assert ours["method"] == "cem"
        # One step of all particles of all plans, for every step and iteration.
        work = args.population * args.particles * args.horizon * args.iterations
        assert ours["evaluations"] == work


def test_rates_of_the_peer_follow_from_our_work_and_its_time(measured: Any) -> None:
    for name in "ab":
        case = measured[0]["peers"][name]
        ours, theirs = case["ours"], case["mbrl_lib"]
        assert theirs["gflops"] == pytest.approx(ours["gflop"] / 0.5)
        around = (theirs["gemm_before_gflops"] + theirs["gemm_after_gflops"]) / 2
        assert theirs["share_of_gemm"] == pytest.approx(theirs["gflops"] / around)
        assert theirs["seconds"] == [0.5, 0.25, 2.0]
        assert case["times_faster"] == pytest.approx(0.5 / ours["median_seconds"])


def test_both_sides_reach_the_page(measured: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "peers.json", tmp_path / "lines" / "planning.jsonl"
    # The line of `mbrl bench` for the same task must stay.
    row = {"task": "PETS-CEM act(), obs 3, action 1", "metric": "seconds", "value": 1.0}
    old = results.speed(measured[0] | {"quick": False})[0] | row
    old |= {"setting": "10 plans, horizon 2, float32", "command": "mbrl bench planning"}
    results.write(out, [old])
    source.write_text(json.dumps(measured[0] | {"quick": False}))
    assert results.main(["bench", str(source), "--out", str(out)]) == 0
    rows = benchmarks_page.load(out.parent)
    assert rows.pop(0) == old
    # The two cases of the quick sizes are of one size: the second overwrites the first.
    assert [(row["setting"].partition("float32, ")[2], row["metric"]) for row in rows] == [
        ("by mbrl-lib", "seconds"),
        ("by mbrl-lib", "share of the f32 GEMM rate"),
        ("in turns with mbrl-lib", "seconds"),
        ("in turns with mbrl-lib", "times faster than mbrl-lib"),
    ]
    assert rows[0]["value"] == 0.5
    assert rows[3]["target"] == ">= 1"
    assert rows[0]["versions"]["mbrl-lib"] == "0.2.0"
    assert "PEER/bin/python" in rows[0]["command"]
    assert str(tmp_path.parent) not in benchmarks_page.render(rows)


def test_defaults_of_the_peer_are_the_small_case() -> None:
    args, sizes = mbrl_lib.parser().parse_args([]), bench_planning.Sizes()
    assert (args.obs, args.act) == sizes.small_task
    assert [args.width] * args.layers == list(sizes.hidden)
    for name in ("population", "elites", "horizon", "iterations", "particles"):
        assert getattr(args, name) == getattr(sizes.small, name), name


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(python: str, *more: str) -> str:
        argv = ["planning", "--python", python, "--out", str(tmp_path / "x.json"), "--quick", *more]
        assert run(bench_peers.main, argv) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert not (tmp_path / "x.json").exists()
        return line

    fix = "the commands at the top of scripts/peers/mbrl_lib.py"
    missing = refused(str(tmp_path / "absent"))
    assert "--python" in missing and "No such file" in missing and fix in missing
    # This very environment has no mbrl-lib; its own `mbrl` is not mistaken for it.
    other = refused(sys.executable)
    assert "mbrl-lib cannot be imported: No package metadata was found for mbrl" in other
    assert fix in other
    killed = refused(script(tmp_path / "killed", "#!/bin/sh\nexit 7\n"))
    assert "exit code 7" in killed
    chatty = refused(script(tmp_path / "chatty", "#!/bin/sh\necho hello\n"))
    assert "printed 'hello" in chatty and fix in chatty
    assert "at least 1" in refused("python", "--repeats", "0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "JAX_PLATFORMS=cpu" in refused("python")


def test_another_number_of_elites_is_refused(tmp_path: Path) -> None:
    python, _ = fake_peer(tmp_path, elites=3)
    sizes = bench_planning.quick_sizes()
    config = bench_peers.PeersConfig("planning", python, "", 1)
    ours = {"obs": 3, "act": 1, "members": 5, "gflop": 1.0}
    with pytest.raises(ValueError, match="elites"):
        bench_peers.peer_case(config, sizes, ours, sizes.small)


def test_training_beside_stable_baselines3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "log", tmp_path / "x.json"
    text = f"""#!{sys.executable}
import json, sys
with open({str(log)!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
answer = {{"versions": {{"stable-baselines3": "2.9.2"}}}}
if "--check" not in sys.argv:
    answer |= {{"seconds": 40.0 if "--threads=2" in sys.argv else 30.0, "return": 500.0}}
print(json.dumps(answer))
"""
    python = script(tmp_path / "python", text)
    seconds = iter([(9.0, 1.5), (6.0, 2.0)])

    def trained(sizes: bench_ppo.Sizes, seeds: int, repeats: int) -> dict[str, Any]:
        assert (seeds, repeats) == (1, 1)
        first, warm = next(seconds)
        return {"steps": sizes.steps, "first_seconds": first, "warm_seconds": warm}

    monkeypatch.setattr(bench_ppo, "train_case", trained)
    argv = ["ppo", "--python", python, "--out", str(out), "--repeats", "2", "--quick"]
    assert bench_peers.main(argv) == 0
    calls = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert calls[0][1:] == [str(bench_peers.FOLDER / "sb3.py"), "--check"]
    steps = f"--steps={bench_ppo.quick_sizes().steps}"
    assert [call[2:] for call in calls[1:]] == [
        [steps, f"--threads={n}"] for n in (1, 2, 1, 2)
    ]  # fmt: skip
    result = json.loads(out.read_text("utf-8"))
    assert result["versions"]["stable-baselines3"] == "2.9.2"
    # The fastest of each: 30 seconds beside 1.5 and 6.
    assert result["peers"]["times_faster"] == 20.0
    assert result["peers"]["times_faster_in_all"] == 5.0
    rows = results.speed(result | {"quick": False})
    targets = [(row["value"], row["target"]) for row in rows if row["target"]]
    assert targets == [(20.0, ">= 20"), (5.0, ">= 5")]


def test_steps_of_rlhf_beside_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "log", tmp_path / "x.json"
    text = f"""#!{sys.executable}
import json, sys
with open({str(log)!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
answer = {{"versions": {{"trl": "1.12.0"}}}}
if "--check" not in sys.argv:
    answer |= {{"seconds": [3.0, 6.0, 9.0]}}
print(json.dumps(answer))
"""
    medians = iter([2.0, 4.0, 3.0, 1.5, 12.0, 12.0, 6.0, 8.0])

    def timed(sizes: Any, repeats: int) -> dict[str, Any]:
        assert repeats == 3
        return {"median_seconds": next(medians)}

    def iteration(sizes: Any, repeats: int) -> dict[str, Any]:
        separate = next(medians)
        return {
            name: {"median_seconds": separate / n} for n, name in ((1, "separate"), (2, "shared"))
        }

    for name in ("reward", "direct", "generate"):
        monkeypatch.setattr(bench_rlhf, f"{name}_case", timed)
    monkeypatch.setattr(bench_rlhf, "ppo_case", iteration)
    python = script(tmp_path / "python", text)
    argv = ["rlhf", "--python", python, "--out", str(out), "--repeats", "3", "--quick"]
    assert bench_peers.main(argv) == 0
    calls = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert calls[0][1:] == [str(bench_peers.FOLDER / "trl.py"), "--check"]
    assert [call[2] for call in calls[1:]] == [
        f"--part={part}" for part in ("reward", "direct", "generate", "ppo")
    ]
    quick = bench_rlhf.quick_sizes()
    sizes = {f"--prompt={quick.prompt}", f"--response={quick.response}", f"--batch={quick.batch}"}
    assert all(sizes <= set(call) for call in calls[1:])
    rows = results.speed(json.loads(out.read_text("utf-8")) | {"quick": False})
    ratios = [(row["value"], row["target"]) for row in rows if row["target"]]
    assert ratios == [(3.0, ">= 1"), (4.0, ">= 1"), (0.5, ">= 1"), (1.0, ">= 1"), (2.0, ">= 1.5")]


def test_settings_of_stable_baselines3_are_those_of_the_preset() -> None:
    source = (bench_peers.FOLDER / "sb3.py").read_text("utf-8")
    config = preset("ppo", "CartPole-v1")
    given = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)[,)]", source)}
    assert given["n_steps"] * bench_ppo.NUM_ENVS == given["batch_size"] == config.rollout
    assert given["n_epochs"] == config.epochs
    assert (given["gamma"], given["gae_lambda"]) == (config.discount, config.trace)
    assert given["ent_coef"] == config.entropy
    assert f"learning_rate=falling({config.learning_rate:.0e}".replace("e-03", "e-3") in source

"""`mbrl report --dream`: pictures of runs that were never trained, and of a perfect model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import envs
from agents import AGENTS
from mbrl import spaces
from mbrl.models.rssm import RSSM
from mbrl.training import checkpoint, run_directory
from mbrl.training.learner import DriverConfig
from mbrl.types import MDP, TimeStep
from scripts import config_json, dream, report, runs
from scripts.cli import main
from scripts.cli import run as run_job

MINIMAL = ("--episodes", "3", "--length", "12")


def save(folder: Path, env: str, agent: str = "dreamer", **settings: Any) -> Path:
    """Write a run as `mbrl train` does, with weights drawn at random."""
    rng = np.random.default_rng(0)

    def draw(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return rng.uniform(0.0, 0.1, x.shape).astype(x.dtype)
        return np.zeros(x.shape, x.dtype)

    settings = settings or {"capacity": 2000}
    config, driver = AGENTS[agent].config(**settings), DriverConfig(100, 1, (3,), 10)
    job = runs.build(agent, config, env, driver)
    snapshot = jax.tree.map(draw, runs.snapshot_like(job, {}))
    checkpoint.save(folder / runs.CHECKPOINTS, 100, snapshot, runs.manifest_of(snapshot))
    saved = {"agent": agent, "env": env, "config": config_json.to_json(config), "steps": 100}
    saved |= {"seeds": [3], "num_envs": 1, "log_every": 10, "on_bad": "raise"}
    run_directory.write_config(folder, saved)
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pixels"), "device/PixelCatch")


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pendulum"), "Pendulum-v1")


def printed(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    """Return the one line on stdout."""
    capsys.readouterr()
    assert report.main([str(arg) for arg in argv]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_strip_of_images(pixels, capsys):
    line = printed(capsys, pixels, "--dream", *MINIMAL)
    assert line["figure"] == str(pixels / "dream.png")
    assert (line["agent"], line["env"], line["step"]) == ("dreamer", "device/PixelCatch", 100)
    # The ball falls through eight rows: there is no record of fifteen steps ahead.
    assert (line["episodes"], line["context"], line["length"]) == (3, 4, 8)
    assert line["ahead"] == [1, 5, 15, 30]
    for kind in ("model", "constant"):
        numbers = line["nrmse"]["observation"][kind]
        assert [number is None for number in numbers] == [False, True, True, True]
        assert numbers[0] > 0
    with Image.open(pixels / "dream.png") as image:
        assert image.format == "PNG"
        assert image.width == 1680
        # Three strips of three rows, and a row of panels below.
        assert 3 * 3 * 0.85 * 160 < image.height < 2000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100


def test_film_of_images(pixels, tmp_path, capsys):
    out = tmp_path / "new" / "film.gif"
    line = printed(capsys, pixels, "--dream", "--out", out, *MINIMAL)
    assert line["context"] == 4
    with Image.open(out) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("GIF", 8)
        # Sixteen pixels, tenfold; three pictures across and three episodes down.
        assert image.size == (3 * 166 + 6, 44 + 3 * 166)


def test_bands_of_numbers(pendulum, tmp_path, capsys):
    out = tmp_path / "bands.png"
    line = printed(capsys, pendulum, "--dream", "--out", out, *MINIMAL, "--title", "Swing")
    assert (line["context"], line["length"]) == (5, 12)
    assert list(line["nrmse"]) == ["observation", "reward"]
    assert [n is None for n in line["nrmse"]["reward"]["model"]] == [False, False, True, True]
    with Image.open(out) as image:
        assert (image.format, image.width) == ("PNG", 1680)
        assert image.height == round((3 * 1.75 + 1.1) * 160)  # three numbers, reward, survival


class Sums:
    """Observe the sum of the actions so far; row 0 has episodes of two steps, row 1 of nine."""

    num_envs = 2

    def reset(self, seed: int) -> TimeStep:
        self.sum, self.time = np.full(2, float(seed)), np.zeros(2, int)
        return self.emit()

    def step(self, action: np.ndarray) -> TimeStep:
        over = self.time == (2, 9)
        self.sum = np.where(over, 0.0, self.sum + action)
        self.time = np.where(over, 0, self.time + 1)
        return self.emit()

    def emit(self) -> TimeStep:
        over = self.time == (2, 9)
        return TimeStep(self.sum.copy(), 0.0 * self.sum, self.time == 0, over, over)


def test_the_tape_keeps_each_action_with_what_it_was_taken_at():
    tape = dream.Tape(Sums(), 6)
    now, rng = tape.reset(10), np.random.default_rng(0)
    shown = [now.is_last]
    for _ in range(8):
        now = tape.step(rng.normal(size=2))
        shown.append(now.is_last)
    # The first episode of row 1 is cut at its sixth record, that of row 0 ends by itself.
    assert np.argmax(shown, 0).tolist() == [2, 5]
    record, valid = tape.read()
    assert valid.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert record.is_terminal[:, :3].tolist() == [[False, False, True], [False] * 3]
    assert record.obs[:, 0].tolist() == [10, 10]
    np.testing.assert_allclose(np.diff(record.obs[1]), record.action[1, :-1])
    np.testing.assert_allclose(np.diff(record.obs[0, :3]), record.action[0, :2])


def simulator(mdp: MDP) -> RSSM:
    """A model that reads the state off the observation and knows the dynamics."""

    def encode(state, key, latent, obs, prev_action, is_first):
        return mdp.init(None, key, obs)

    def begin(batch):
        return mdp.init(None, jax.random.key(0), batch=batch)

    def nothing(state, latent):
        return jnp.zeros(jax.tree.leaves(latent)[0].shape[0])

    fields = dict.fromkeys(RSSM._fields)
    fields |= {"begin": begin, "encode": encode, "decode": mdp.observe, "mdp": mdp}
    return RSSM(**fields | {"reward": nothing, "survival": nothing})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pixels", "pendulum"])
def test_the_true_dynamics_predict_what_happens(name, request, monkeypatch, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    twin = envs.make({"pixels": "device/PixelCatch", "pendulum": "device/Pendulum"}[name])
    assert isinstance(twin, MDP)
    monkeypatch.setitem(dream.LATENT, "dreamer", lambda run, state: (simulator(twin), None))
    out = tmp_path / "a.png"
    argv = ("--out", out, "--episodes", "3", "--length", "12", "--context", "2")
    line = printed(capsys, folder, "--dream", *argv)
    model, constant = (line["nrmse"]["observation"][kind][:2] for kind in ("model", "constant"))
    np.testing.assert_allclose(model, 0.0, atol=1e-2)
    assert min(constant) > 0.1
    assert spaces.leaves(twin.spec.observation)[0][0] == ""


def test_more_numbers_and_no_image_channel_fit_into_the_picture():
    rng = np.random.default_rng(0)
    valid = np.arange(6) < np.array([[3], [6], [6]])
    part = dream.Part(
        "x", spaces.box(-1, 1, (9,)), rng.normal(size=(3, 6, 9)), rng.normal(size=(3, 4, 6, 9))
    )
    grey = dream.Part(
        "eye", spaces.box(0, 255, (4, 4, 2), np.uint8),
        np.zeros((3, 6, 4, 4, 2), np.uint8), np.full((3, 4, 6, 4, 4, 2), 255, np.uint8),
    )  # fmt: skip
    figures = dream.dream_figures
    scene = figures.Scene("", [part, grey], [], valid, 2, {})
    assert figures.episodes(scene, 2) == [1, 2]
    assert [line.name for line in figures.lines(scene, 0)] == [f"x[{i}]" for i in range(8)]
    assert figures.lines(scene, 0)[5].samples.shape == (4, 3)
    np.testing.assert_array_equal(figures.lines(scene, 1)[5].truth, part.truth[1, :, 5])
    (film,) = figures.films(scene, 0)
    assert film.images.shape == (3, 3, 4, 4, 3)
    assert [np.unique(x).tolist() for x in film.images.swapaxes(0, 1)] == [[0.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{pendulum}", "{pixels}"], "RUN: got 2, expected one run with --dream"),
        (["{nowhere}"], "expected the folder of a run"),
        (["{pendulum}", "--out", "film.gif"], "Pendulum-v1 shows no images"),
        (["{pendulum}", "--out", "film.txt"], "--out: got film.txt"),
        (["{pendulum}", "--episodes", "0"], "--episodes: got 0, expected at least 1"),
        (["{pendulum}", "--length", "1"], "--length: got 1, expected at least 2"),
        (["{pixels}", *MINIMAL, "--context", "8"], "--context: got 8, expected less than 8"),
    ],
)
def test_bad_input(argv, message, pixels, pendulum, tmp_path, capsys):
    places = {"pixels": pixels, "pendulum": pendulum, "nowhere": tmp_path / "nowhere"}
    assert run_job(report.main, [arg.format(**places) for arg in [*argv, "--dream"]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_agent_without_a_latent_model_has_no_dreams(tmp_path, capsys):
    folder = save(tmp_path, "Pendulum-v1", "pets")
    assert run_job(report.main, [str(folder), "--dream"]) == 2
    error = capsys.readouterr().err
    assert "a run of pets, which has no latent model; agents that dream: dreamer" in error
    assert error.count("\n") == 1


def test_a_run_without_a_save_is_named(pendulum, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((pendulum / "config.json").read_bytes())
    assert run_job(report.main, [str(tmp_path), "--dream"]) == 2
    assert "there is no save to dream from" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("env", ["device/PixelCatch", "Pendulum-v1"])
def test_a_run_of_the_command_line(env, tmp_path, capsys):
    argv = ["--env", env, "--steps", "40", "--batch-size", "2", "--length", "4", "--horizon", "2"]
    argv += ["--random-steps", "20", "--train-ratio", "0.1", "--eval-episodes", "0"]
    out = str(tmp_path / "run")
    assert main(["train", "dreamer", *argv, "--out", out, "--no-tensorboard"]) == 0
    assert printed(capsys, out, "--dream", *MINIMAL)["step"] == 40
    with Image.open(tmp_path / "run" / "dream.png") as image:
        assert image.width == 1680

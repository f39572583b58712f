"""The documents are true: their code runs, their files and commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.types import Batch, EnvSpec, Record
from scripts.cli import JOBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def section(title: str) -> dict[str, Any]:
    """Run the code of a section of CONTRIBUTING.md and return what it defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    body = text.split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.S | re.M)
    names: dict[str, Any] = {"__name__": "skeleton"}
    exec(compile(code, f"CONTRIBUTING.md, {title}", "exec", dont_inherit=True), names)
    return names


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@every_page
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mbrl"]:
            assert words[1] in JOBS, line
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[-1]}:", makefile, re.M), line
        for extra in re.findall(r"\[(\w+)\]", line):
            assert extra in extras["optional-dependencies"], line


def test_the_list_of_extras_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (listed,) = re.findall(r"# extras: (.*)", (ROOT / "README.md").read_text("utf-8"))
    assert set(listed.split()) == set(project["optional-dependencies"]) - {"bench", "dev", "docs"}


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    numbers = re.findall(r"-?\d+\.\d*", capsys.readouterr().out)
    assert len(numbers) == 6  # three torques of each controller
    assert all(-2.0 <= float(number) <= 2.0 for number in numbers)


def test_model_skeleton() -> None:
    names = section("Add a model")
    spec = EnvSpec("linear", spaces.box(-9.0, 9.0, (2,)), spaces.box(-1.0, 1.0, (1,)))
    mdp = names["linear_model"](spec)
    params = names["Linear"](jnp.array([[1.0, 0.0], [2.0, 1.0]]), jnp.array([[3.0, 0.0]]))
    key = jax.random.key(0)
    state = mdp.init(params, key, jnp.array([[1.0, 1.0]]))
    state, outcome = mdp.step(params, key, state, jnp.array([[-1.0]]))
    np.testing.assert_allclose(mdp.observe(params, state), [[0.0, 1.0]])
    np.testing.assert_allclose(outcome.reward, [-0.5])


def test_planner_and_environment_skeletons() -> None:
    mdp = section("Add an environment")["make_walk"]()
    planner = section("Add a planner")["constant_action"](mdp, population=64, horizon=30)
    start = mdp.init(None, jax.random.key(0), jnp.array([[0.0], [0.5]]))
    action, _, info = planner.plan(None, jax.random.key(1), start, planner.init(2))
    # Faster is better all the way: the best of 64 uniform actions is close to full speed.
    assert action.shape == (2, 1)
    assert (np.asarray(action) > 0.8).all()
    assert info["value"].shape == (2,)
    _, outcome = mdp.step(
        None,
        jax.random.key(2),
        mdp.init(None, jax.random.key(0), jnp.array([[0.95]])),
        jnp.array([[1.0]]),
    )
    assert (outcome.reward[0], outcome.discount[0]) == (1.0, 0.0)


def test_agent_skeleton() -> None:
    spec = section("Add an environment")["make_walk"]().spec
    agent = section("Add an agent")["make_random"](spec)
    key = jax.random.key(0)
    flags, obs = jnp.array([[True, False, False]]), jnp.zeros((1, 3, 1))
    state = agent.init(key)
    action, _, _ = agent.act(state, agent.begin(3), obs[0], flags[0], key, "explore")
    assert action.shape == (3, 1)
    reward = jnp.array([[0.0, 2.0, 4.0]])
    record = Record(obs, action[None], reward, flags, ~flags, ~flags)
    state, metrics, _ = agent.update(state, Batch(record, jnp.array([[True, True, False]])), key)
    assert metrics["replay/reward"] == 1.0
    assert state["updates"] == 1

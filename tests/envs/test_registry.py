"""`envs.make`: every kind of name, and messages that name the way out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import gymnasium as gym
import jax
import numpy as np
import pytest

import envs
from envs import registry
from envs.host import HostEnv
from mbrl.types import MDP
from tests.envs.fakes import Counter


@pytest.mark.parametrize("id", registry.DEVICE)
def test_device_ids_are_their_own_name(id):
    mdp = envs.make(id)
    assert isinstance(mdp, MDP)
    assert mdp.spec.id == id
    assert (
        mdp.spec.max_episode_steps
        == {
            "Pendulum": 200,
            "PendulumSparse": 200,
            "CartPole": 500,
            "CartPoleFixed": 200,
            "CartPoleSwingUp": 200,
            "Acrobot": 500,
            "MountainCarContinuous": 999,
            "Catch": 20,
            "GridWorld": 100,
            "GridWorld4": 100,
            "PixelCatch": 16,
            "PixelGridWorld": 100,
            "MemoryChain": 22,
            "TicTacToe": 9,
            "TicTacToeRandom": 5,
            "TicTacToePerfect": 5,
            "ConnectFour": 42,
            "ConnectFourRandom": 21,
        }[id.removeprefix("device/")]
    )


def test_device_arguments():
    mdp = envs.make("device/GridWorld", size=3, max_episode_steps=7)
    assert isinstance(mdp, MDP)
    assert mdp.spec.max_episode_steps == 7
    assert mdp.observe(None, mdp.init(None, jax.random.key(0), batch=2)).shape == (2, 9)
    with pytest.raises(ValueError, match=r"unknown arguments \['sizes'\], expected some of \['max"):
        envs.make("device/GridWorld", sizes=3)
    with pytest.raises(ValueError, match=r"TicTacToeRandom: unknown arguments \['opponent'\]"):
        envs.make("device/TicTacToeRandom", opponent="self")


def test_gymnasium_ids_become_host_environments():
    env = envs.make("Pendulum-v1", num_envs=3, max_episode_steps=2, g=3.0)
    assert isinstance(env, HostEnv)
    assert env.num_envs == 3
    assert env.spec.id == "Pendulum-v1"
    assert env.spec.max_episode_steps == 2
    env.reset(0)
    zero = np.zeros((3, 1), np.float32)
    assert [env.step(zero).is_last.all() for _ in range(4)] == [False, True, False, False]
    assert {e.unwrapped.g for e in env._envs} == {3.0}  # pyright: ignore


def test_limit_of_the_registry_is_kept():
    env = envs.make("CartPole-v1")
    assert isinstance(env, HostEnv)
    assert env.spec.max_episode_steps == 500


def test_classes_and_functions_of_modules():
    env = envs.make("tests.envs.fakes:Counter", num_envs=2, limit=9, max_episode_steps=4)
    assert isinstance(env, HostEnv)
    assert env.spec.id == "tests.envs.fakes:Counter"
    assert env.spec.max_episode_steps == 4
    assert isinstance(env._envs[0].unwrapped, Counter)
    assert env._envs[0].unwrapped.limit == 9
    mdp = envs.make("envs.ondevice.catch:make", rows=4)
    assert isinstance(mdp, MDP)
    assert mdp.spec.observation.shape == (4, 5)  # pyright: ignore
    assert isinstance(envs.make("gymnasium:CartPole-v1"), HostEnv)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("cartpole-v1", "unknown environment 'cartpole-v1'; did you mean 'CartPole-v1'"),
        ("CartPole", "'CartPole' needs a version; use 'CartPole-v1'"),
        ("LunarLander-v2", "'LunarLander-v2' is out of date; use 'LunarLander-v3'"),
        ("Ant-v9", "'Ant-v9' has no version 9; use 'Ant-v5'"),
        ("device/Pendulm", "unknown environment 'device/Pendulm'; did you mean 'device/Pendulum'"),
        ("qqqqqq", "unknown environment 'qqqqqq'; expected 'device/NAME', a Gymnasium id or"),
        ("a b c", "unknown environment 'a b c'"),
        ("nowhere:Env", "no module 'nowhere' for 'nowhere:Env'"),
        ("tests.envs.fakes:Countr", "'tests.envs.fakes' has no 'Countr'; did you mean 'Counter'"),
        ("math:gcd", r"math:gcd: expected a gymnasium.Env or an MDP, got <class 'int'>"),
    ],
)
def test_unknown_ids_name_the_nearest(id, message):
    with pytest.raises(ValueError, match=message):
        envs.make(id)


@pytest.mark.parametrize(
    ("id", "module", "install"),
    [
        ("HalfCheetah-v5", "mujoco", "modelrl[mujoco]"),
        ("LunarLander-v3", "Box2D", "modelrl[box2d]"),
        ("ALE/Pong-v5", "ale_py", "modelrl[atari]"),
        ("dm_control/cartpole-balance-v0", "shimmy", "modelrl[dmc]"),
        ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
    ],
)
def test_missing_packages_come_with_the_command(id, module, install, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    message = f'{id} needs {module}, which is not installed: pip install "{install}"'
    with pytest.raises(ValueError, match=re.escape(message)):
        envs.make(id)


def test_dm_control_and_mujoco_4_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.1")
    with pytest.raises(ValueError, match="does not run with mujoco 4.0.1"):
        envs.make("dm_control/cartpole-balance-v0")


def test_arguments_that_the_environment_does_not_take():
    with pytest.raises(ValueError, match=r"CartPole-v1: .*unexpected keyword argument 'foo'"):
        envs.make("CartPole-v1", foo=3)


def test_environments_that_left_gymnasium_name_their_successor():
    with (
        pytest.warns(DeprecationWarning, match="out of date"),
        pytest.raises(ValueError, match="HalfCheetah-v3 cannot be built.*use 'HalfCheetah-v5'"),
    ):
        envs.make("HalfCheetah-v3")


class Missing(Counter):
    def __init__(self):
        raise gym.error.DependencyNotInstalled("engine is not installed")


class Talking(Counter):
    """Has an entry that no array can hold."""

    def __init__(self):
        box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        super().__init__(observation_space=gym.spaces.Dict(a=box, mission=gym.spaces.Text(9)))

    def _obs(self):
        return {"a": np.array([float(self.t)]), "mission": "go"}


@pytest.fixture
def registered(request):
    gym.register("Temporary-v0", entry_point=request.param)
    yield "Temporary-v0"
    gym.registry.pop("Temporary-v0")


@pytest.mark.parametrize("registered", [Missing], indirect=True)
def test_missing_dependencies_of_others_are_passed_on(registered):
    with pytest.raises(ValueError, match="Temporary-v0 cannot be built: engine is not installed"):
        envs.make(registered)


@pytest.mark.parametrize("registered", [Talking], indirect=True)
def test_text_entries_are_left_out_with_a_warning(registered):
    with pytest.warns(UserWarning, match=r"\['mission'\] of kind \['Text'\] have no array form"):
        env = envs.make(registered)
    assert isinstance(env, HostEnv)
    assert env.reset(0).obs.keys() == {"a"}


@pytest.mark.parametrize(
    ("display", "before", "after"),
    [("", None, "egl"), (":0", None, None), ("", "osmesa", "osmesa")],
)
def test_headless_machines_draw_with_egl(display, before, after, monkeypatch):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if before:
        monkeypatch.setenv("MUJOCO_GL", before)
    envs.make("CartPole-v1")
    assert os.environ.get("MUJOCO_GL") == after

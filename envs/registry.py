"""One `make` for on-device MDPs, Gymnasium ids and environments of one's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id

from envs import wrappers
from envs.host import DRAWING, HostEnv, OnBad
from envs.ondevice import (
    acrobot,
    cartpole,
    cartpole_swingup,
    catch,
    connect_four,
    gridworld,
    memory_chain,
    mountain_car,
    pendulum,
    pixel_catch,
    pixel_gridworld,
    tic_tac_toe,
)
from envs.spec import observation_space
from mbrl.types import MDP

DEVICE: dict[str, Callable[..., MDP]] = {
    "device/Pendulum": pendulum.make,
    "device/PendulumSparse": partial(pendulum.make, sparse=True),
    "device/CartPole": cartpole.make,
    "device/CartPoleFixed": partial(cartpole.make, fixed=200),
    "device/CartPoleSwingUp": cartpole_swingup.make,
    "device/Acrobot": acrobot.make,
    "device/MountainCarContinuous": mountain_car.make,
    "device/Catch": catch.make,
    "device/GridWorld": gridworld.make,
    "device/GridWorld4": partial(gridworld.make, 4),
    "device/PixelCatch": pixel_catch.make,
    "device/PixelGridWorld": pixel_gridworld.make,
    "device/MemoryChain": memory_chain.make,
    "device/TicTacToe": partial(tic_tac_toe.make, "self"),
    "device/TicTacToeRandom": partial(tic_tac_toe.make, "random"),
    "device/TicTacToePerfect": partial(tic_tac_toe.make, "perfect"),
    "device/ConnectFour": partial(connect_four.make, "self"),
    "device/ConnectFourRandom": partial(connect_four.make, "random"),
}
"""Factories of the simulators that run on the device."""

PLUGINS = {
    "ALE/": (("ale_py",), "modelrl[atari]"),
    "dm_control/": (("shimmy", "dm_control"), "modelrl[dmc]"),
    "MiniGrid-": (("minigrid",), "minigrid"),
    "BabyAI-": (("minigrid",), "minigrid"),
}
"""Prefix of an id -> modules it needs (the first registers it), and what to install."""

SIMULATORS = {
    "gymnasium.envs.mujoco": ("mujoco", "modelrl[mujoco]"),
    "gymnasium.envs.box2d": ("Box2D", "modelrl[box2d]"),
}
"""Prefix of an entry point -> module that it needs, and what to install."""


def make(
    id: str,
    num_envs: int = 1,
    on_bad: OnBad = "raise",
    *,
    pixels: int | None = None,
    action_repeat: int = 1,
    **kwargs: Any,
) -> MDP | HostEnv:
    """Make an environment by name.

    Without a display, MUJOCO_GL is set to 'egl' (unless it is set already), so that
    MuJoCo can draw.

    Args:
      id: 'device/NAME' for a simulator that runs on the device; a Gymnasium id with its
        version; or 'module:Name' for an environment class, a function that returns an
        environment or an `MDP`, or an id that importing the module registers.
      num_envs: environments of a `HostEnv`; an `MDP` takes its batch size in `init`.
      on_bad: see `HostEnv`.
      pixels: side of the images to observe instead, for a `HostEnv`; see
        `envs.wrappers.pixels`.
      action_repeat: simulator steps per step of a `HostEnv`, their rewards summed.
      **kwargs: handed to the environment; `max_episode_steps` overrides its time limit.

    Returns:
      An `MDP` (it runs on the device) or a `HostEnv` (it runs on the host).

    Raises:
      ValueError: for an unknown id, with the nearest ones; for a package that is missing,
        with the command to install it; for an argument that the environment does not take.
    """
    if action_repeat < 1:
        raise ValueError(f"action_repeat: expected at least 1, got {action_repeat}")
    if id.startswith("device/"):
        return _plain(_make_device(id, kwargs), on_bad, pixels, action_repeat)
    _prepare_rendering()
    found = _load_object(id, kwargs) if ":" in id else None
    if isinstance(found, MDP):
        return _plain(found, on_bad, pixels, action_repeat)
    target = found or _find(id.rpartition(":")[2])
    if pixels is not None and isinstance(target, str):
        kwargs.setdefault("render_mode", "rgb_array")

    def build() -> gym.Env[Any, Any]:
        env = _make_gym(target, kwargs)
        if action_repeat > 1:
            env = gym.wrappers.RepeatAction(env, action_repeat)
        try:
            return env if pixels is None else wrappers.pixels(env, pixels)
        except gym.error.DependencyNotInstalled as error:
            raise ValueError(f"pixels: {id} cannot be drawn: {error}; {DRAWING}") from error

    env = HostEnv(build, num_envs, on_bad, id)
    if env.spec.max_episode_steps:  # the limit counts steps of the simulator
        limit = -(-env.spec.max_episode_steps // action_repeat)
        env.spec = env.spec._replace(max_episode_steps=limit)
    return env


def _plain(mdp: MDP, on_bad: OnBad, pixels: int | None, action_repeat: int) -> MDP:
    """Refuse what only environments on the host can do."""
    if pixels is not None or action_repeat != 1:
        raise ValueError(
            f"pixels, action_repeat: {mdp.spec.id} runs on the device and takes neither, got "
            f"pixels={pixels}, action_repeat={action_repeat}"
        )
    if on_bad != "raise":
        raise ValueError(
            f"on_bad: {mdp.spec.id} runs on the device, where bad numbers always raise, got "
            f"{on_bad!r}; leave it out"
        )
    return mdp


def _make_device(id: str, kwargs: dict[str, Any]) -> MDP:
    if id not in DEVICE:
        raise ValueError(_unknown(id))
    limit = kwargs.pop("max_episode_steps", None)
    if limit is not None and limit < 1:
        raise ValueError(f"max_episode_steps: expected at least 1, got {limit}; None has no limit")
    accepted = inspect.signature(DEVICE[id]).parameters
    if not kwargs.keys() <= accepted.keys():
        extra = sorted(kwargs.keys() - accepted.keys())
        raise ValueError(f"{id}: unknown arguments {extra}, expected some of {sorted(accepted)}")
    mdp = DEVICE[id](**kwargs)
    limit = mdp.spec.max_episode_steps if limit is None else limit
    return mdp._replace(spec=mdp.spec._replace(id=id, max_episode_steps=limit))


def _load_object(id: str, kwargs: dict[str, Any]) -> EnvSpec | MDP | None:
    """Look 'module:Name' up; None when Name is an id that the module registers."""
    module_name, _, name = id.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"id: no module {error.name!r} for {id!r}; it must be installed, or in the "
                "directory of the run or on PYTHONPATH"
            ) from None
        raise
    if not hasattr(module, name):
        if name in gym.registry:
            return None
        near = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], 3, 0.5)
        raise ValueError(f"id: {module_name!r} has no {name!r}{_did_you_mean(near)}")
    factory: Any = getattr(module, name)
    if not (inspect.isclass(factory) and issubclass(factory, gym.Env)):
        built = factory(**{k: v for k, v in kwargs.items() if k != "max_episode_steps"})
        if isinstance(built, MDP):
            return built
        if not isinstance(built, gym.Env):
            raise ValueError(f"{id}: expected a gymnasium.Env or an MDP, got {type(built)}")
        built.close()
    creator: Any = factory
    return EnvSpec(re.sub(r"[^\w-]", "-", id), entry_point=creator)


def _find(id: str) -> str:
    """Return a registered id, importing the package that registers it."""
    for prefix, (modules, package) in PLUGINS.items():
        if id.startswith(prefix):
            for module in modules:
                _require(id, module, package)
            if "dm_control" in modules:
                _check_dm_control(id)
            _register(id, modules[0], package)
    if id not in gym.registry:
        raise ValueError(_unknown(id))
    entry_point = gym.registry[id].entry_point
    for prefix, (module, package) in SIMULATORS.items():
        if isinstance(entry_point, str) and entry_point.startswith(prefix):
            _require(id, module, package)
    return id


def _register(id: str, module: str, package: str) -> None:
    try:
        gym.register_envs(importlib.import_module(module))
    except ImportError as error:
        raise ValueError(
            f'{id}: {module} cannot be imported ({error}): pip install "{package}"'
        ) from error


def _require(id: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{id} needs {module}, which is not installed: pip install "{package}"')


def _check_dm_control(id: str) -> None:
    version = importlib.metadata.version("mujoco")
    if int(version.split(".")[0]) >= 4:
        raise ValueError(
            f'{id}: dm_control does not run with mujoco {version}: pip install "modelrl[dmc]" '
            "in an environment of its own (it takes mujoco<4)"
        )


def _unknown(id: str) -> str:
    """Say what is wrong with an id, and which ones are near."""
    by_lower = {name.lower(): name for name in [*DEVICE, *gym.registry]}
    try:
        namespace, name, version = parse_env_id(id)
        newest = find_highest_version(namespace, name)
    except gym.error.Error:
        newest = None
    else:
        if newest is not None:
            current = get_env_id(namespace, name, newest)
            why = "is out of date" if version is not None else "needs a version"
            if version is not None and version > newest:
                why = f"has no version {version}"
            return f"id: {id!r} {why}; use {current!r}"
    near = difflib.get_close_matches(id.lower(), by_lower, 3, 0.6)
    return (
        f"id: unknown environment {id!r}{_did_you_mean([by_lower[n] for n in near])}; expected "
        "'device/NAME', a Gymnasium id or 'module:Class'"
    )


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def _make_gym(target: str | EnvSpec, kwargs: dict[str, Any]) -> gym.Env[Any, Any]:
    """Build one environment; HostEnv checks more than Gymnasium's passive checker does."""
    spec = gym.registry[target] if isinstance(target, str) else target
    try:
        env = gym.make(target, disable_env_checker=True, **kwargs)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        newest = find_highest_version(spec.namespace, spec.name)
        hint = ""
        if newest is not None and spec.version is not None and newest > spec.version:
            hint = f"; use {get_env_id(spec.namespace, spec.name, newest)!r}"
        raise ValueError(f"{spec.id} cannot be built: {error}{hint}") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{spec.id}: {error}") from error
    return _without_texts(env)


def _without_texts(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Drop the entries of a Dict observation that have no array form, and say so."""
    space = env.observation_space
    if not isinstance(space, gym.spaces.Dict):
        return env
    keep = []
    for name, sub in space.spaces.items():
        try:
            observation_space(sub)
        except ValueError:
            continue
        keep.append(name)
    dropped = sorted(space.spaces.keys() - set(keep))
    if not dropped or not keep:
        return env
    kinds = [type(space[name]).__name__ for name in dropped]
    warnings.warn(
        f"{env.spec.id if env.spec else env}: observations {dropped} of kind {kinds} have no array "
        "form and are left out",
        UserWarning,
        stacklevel=2,
    )
    return gym.wrappers.FilterObservation(env, keep)


def _prepare_rendering() -> None:
    displays = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not displays:
        os.environ.setdefault("MUJOCO_GL", "egl")

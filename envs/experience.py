"""Recorded experience by name: a file of this project, or a data set of Minari.

A record of this project is an observation with what came with it; an episode of Minari is a list of
T + 1 observations beside T actions, rewards and flags. Both hold the final observation.

Reference: https://minari.farama.org
"""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np

from envs.codec import ActionCodec, ObservationCodec
from envs.spec import action_space, to_gymnasium
from mbrl import replay, spaces
from mbrl.training.recorded import check_records, named_arrays, read_records
from mbrl.types import Box, Discrete, EnvSpec, MultiDiscrete, Record

PREFIX = "minari:"
INSTALL = 'pip install "modelrl[offline]"'


def read_experience(source: str, spec: EnvSpec) -> Record:
    """Read records of a task.

    Args:
      source: .npz file (see `mbrl.training.recorded`), or `minari:NAME` for a data set of Minari,
        which is downloaded when it is not on this machine.
      spec: spaces that the records must fit.

    Returns:
      Leaves [E, T, ...], without extras; a data set of Minari is one stream.

    Raises:
      ValueError: naming the source and what is wrong with it.
    """
    if source.startswith(PREFIX):
        return read_minari(source.removeprefix(PREFIX), spec)
    return read_records(Path(source), spec)


def read_minari(name: str, spec: EnvSpec) -> Record:
    """Read a data set of Minari as one stream of records [1, T, ...].

    The last record of an episode is terminal where Minari has it terminated; where it is neither
    terminated nor truncated, recording has stopped there, and it counts as truncated.

    Raises:
      ValueError: where Minari is not installed, the data set is not there or damaged, or its
        episodes do not fit `spec`.
    """
    minari, source = _minari(), PREFIX + name
    dataset = _load(minari, name)
    try:
        _check_size(source, spec, dataset.total_steps + dataset.total_episodes)
        parts = [
            _records(f"{source}, episode {i}", dataset, spec, episode)
            for i, episode in enumerate(dataset.iterate_episodes())
        ]
    except (OSError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{source}: damaged ({_line(error)}); delete and fetch it again"
        ) from error
    if not parts:
        raise ValueError(f"{source}: got no episodes, expected at least one")
    whole = jax.tree.map(lambda *x: np.concatenate(x)[None], *parts)
    return check_records(source, named_arrays(whole), spec)


def write_minari(
    name: str, record: Record, spec: EnvSpec, env_id: str | None, made_by: str, text: str
) -> int:
    """Write records as a data set of Minari.

    Args:
      name: such as `pendulum/medium-v0`; there must be none of this name on this machine.
      record: leaves [E, T, ...]; streams may begin and end within an episode, which is then
        truncated there.
      spec: of the task.
      env_id: Gymnasium id of the environment, in whose form actions are written; None where it
        has none.
      made_by: name of the agent that has acted.
      text: description.

    Returns:
      The number of episodes.

    Raises:
      ValueError: where Minari is not installed, the name is malformed or taken, or there is no
        transition to write.
    """
    minari = _minari()
    if not re.fullmatch(r"(?:[-\w]+/)*[-\w]+-v\d+", name):
        raise ValueError(f"--to-minari: got {name!r}, expected a name such as pendulum/medium-v0")
    folder = minari.storage.datasets_root_dir.get_dataset_path(name)
    if folder.exists():
        raise ValueError(
            f"--to-minari: {name} is there already ({folder}); choose another name or version"
        )
    space = to_gymnasium(spec.action) if env_id is None else gym.make(env_id).action_space
    buffers = list(_episodes(minari, record, space))
    if not buffers:
        raise ValueError("--to-minari: got no transition, expected at least one; collect more")
    try:
        with warnings.catch_warnings():
            # It asks for an author, an address and a link to code, which only people have.
            warnings.simplefilter("ignore", UserWarning)
            minari.create_dataset_from_buffers(
                name, buffers, env=env_id, action_space=space, algorithm_name=made_by,
                observation_space=to_gymnasium(spec.observation), description=text,
                jpeg_encoding=False,
            )  # fmt: skip
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a data set would take the name
        raise
    return len(buffers)


def _minari() -> Any:
    try:
        importlib.import_module("h5py")
        return importlib.import_module("minari")
    except ImportError as error:
        raise ValueError(f"data sets of Minari need an extra ({error}): {INSTALL}") from error


def _load(minari: Any, name: str) -> Any:
    source = PREFIX + name
    folder = minari.storage.datasets_root_dir.get_dataset_path(name)
    try:
        if not (folder / "data").exists():
            minari.download_dataset(name)
        return minari.load_dataset(name)
    except Exception as error:  # whatever a disk or the network may answer
        if (folder / "data").exists():
            raise ValueError(f"{source}: cannot be read from {folder} ({_line(error)})") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            known = ", ".join(minari.list_local_datasets()) or "none"
        raise ValueError(
            f"{source}: not on this machine (there are: {known}), and could not be downloaded "
            f"({_line(error)}); write one with: mbrl collect RUN --to-minari {name}"
        ) from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _check_size(source: str, spec: EnvSpec, rows: int) -> None:
    leaves = [*spaces.leaves(spec.observation), *spaces.leaves(spec.action)]
    row = sum(
        int(np.prod(x.shape)) * x.dtype.itemsize if isinstance(x, Box) else 4 for _, x in leaves
    )
    replay.check_memory(rows * (row + 7), source)


def _records(source: str, dataset: Any, spec: EnvSpec, episode: Any) -> Record:
    """Turn an episode of T steps into T + 1 records, leaves [T + 1, ...]."""
    steps = len(episode.rewards)
    over = {"terminations": episode.terminations, "truncations": episode.truncations}
    for flag, values in over.items():
        if np.shape(values) != (steps,) or np.any(np.asarray(values)[:-1]):
            raise ValueError(
                f"{source}: {flag}: expected one per step, of {steps}, and none but the last to be "
                f"set, got shape {np.shape(values)} with {int(np.sum(values))} set; split the "
                "episode there"
            )
    try:
        reader = ObservationCodec(dataset.observation_space)
        obs = reader.finish(reader.read(episode.observations, (steps + 1,)))
        action = _actions(dataset.action_space, episode.actions, steps)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    # The action at the last observation is never taken: any of the space will do.
    action = jax.tree.map(lambda x: np.concatenate([x, x[-1:]]), action)
    at = np.arange(steps + 1)
    ended = bool(steps) and bool(over["terminations"][-1])
    reward = np.concatenate([np.zeros(1), np.asarray(episode.rewards, np.float64)])
    flags: tuple[Any, ...] = (at == 0, at == steps, (at == steps) & ended)
    fields: Any = (obs, action, reward, *flags)
    return Record(*fields, extras=())


def _actions(space: gym.Space[Any], value: Any, steps: int) -> Any:
    """Read actions [T, ...] in the form of `space` into that of a `Record`."""
    if isinstance(space, gym.spaces.Dict):
        return {name: _actions(sub, value[name], steps) for name, sub in space.items()}
    wanted = action_space(space)
    x = np.asarray(value)
    shape = () if isinstance(wanted, Discrete) else space.shape
    if x.shape != (steps, *(shape or ())):
        raise ValueError(f"action: expected shape {(steps, *(shape or ()))}, got {x.shape}")
    if isinstance(wanted, Box):
        return x
    x = x.astype(np.int64) - getattr(space, "start", 0)
    return x.reshape(steps, -1) if isinstance(wanted, MultiDiscrete) else x


def _episodes(minari: Any, record: Record, space: gym.Space[Any]) -> Iterator[Any]:
    for stream in range(record.reward.shape[0]):
        rows: Any = jax.tree.map(lambda x, s=stream: np.asarray(x[s]), record._replace(extras=()))
        starts = np.flatnonzero(rows.is_first | (np.arange(len(rows.reward)) == 0))
        for begin, end in zip(starts, [*starts[1:], len(rows.reward)], strict=True):
            if end - begin > 1:
                yield _buffer(minari, jax.tree.map(lambda x, b=begin, e=end: x[b:e], rows), space)


def _buffer(minari: Any, rows: Any, space: gym.Space[Any]) -> Any:
    """Turn the records of one episode [T + 1, ...] into a buffer of Minari."""
    steps = len(rows.reward) - 1
    last = np.arange(steps) == steps - 1
    return minari.data_collector.EpisodeBuffer(
        observations=rows.obs,
        actions=_written(space, jax.tree.map(lambda x: x[:-1], rows.action)),
        rewards=rows.reward[1:],
        terminations=last & rows.is_terminal[-1],
        truncations=last & ~rows.is_terminal[-1],
    )


def _written(space: gym.Space[Any], action: Any) -> Any:
    if isinstance(space, gym.spaces.Dict) or isinstance(action, Mapping):
        return {name: _written(space[name], action[name]) for name in action}  # pyright: ignore
    return ActionCodec(space, len(action)).to_batch(action)

"""Fresh experience: what is recorded is what has happened, on the device and on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.training.collection import collect_device, collect_host
from mbrl.training.learner import seed_keys
from mbrl.training.recorded import check_records, named_arrays
from tests.mbrl.toys import StreamEnv, counter_mdp, linear_agent

TASK = counter_mdp()
STATE = {"w": jnp.array([[0.3, -0.4], [0.1, 0.9]]), "updates": jnp.zeros(2, jnp.int32)}


def agents(hyper: Any) -> Any:
    return linear_agent(TASK.spec, hyper)


def on_host(mode: Any, steps: int = 40) -> Any:
    envs: list[Any] = [StreamEnv(TASK, 2), StreamEnv(TASK, 2)]
    return collect_host(agents, STATE, envs, seed_keys((1, 2)), (1, 2), steps, mode)


@pytest.mark.parametrize("place", ["device", "host"])
def test_records_follow_from_each_other(place):
    if place == "device":
        found = collect_device(agents, STATE, TASK, seed_keys((1, 2)), 40, 2, "explore")
    else:
        found = on_host("explore")
    assert found.reward.shape == (2, 2, 20)
    for seed in range(2):
        one: Any = jax.tree.map(lambda x, s=seed: x[s], found)
        record: Any = check_records("these", named_arrays(one), TASK.spec)
        step, total = record.obs[..., 0], record.obs[..., 1]
        # Episodes of seven steps and a reset, whose sums are those of the actions.
        np.testing.assert_array_equal(step, np.tile(np.arange(20) % 8, (2, 1)))
        np.testing.assert_array_equal(record.is_first, step == 0)
        np.testing.assert_array_equal(record.is_last, step == 7)
        np.testing.assert_array_equal(record.reward, step > 0)
        moves = np.round(record.action[:, :-1, 0]) * ~record.is_last[:, :-1]
        grown = (total[:, 1:] - total[:, :-1]) * ~record.is_first[:, 1:]
        np.testing.assert_array_equal(grown, moves)


def test_modes_differ_and_greedy_ones_repeat():
    greedy, again, bold, blind = (on_host(m, 16) for m in ("greedy", "greedy", "explore", "random"))
    np.testing.assert_array_equal(greedy.action, again.action)
    assert 0.0 < np.abs(greedy.action - bold.action).mean() < 0.3
    assert np.std(blind.action[0]) > np.std(greedy.action[0])

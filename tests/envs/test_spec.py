"""Conversion between Gymnasium spaces and `mbrl` spaces."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from envs import spec
from mbrl.types import Box, Discrete, MultiDiscrete


def test_box_keeps_asymmetric_bounds_and_casts_float64():
    box = spec.observation_space(
        spaces.Box(np.array([-1.0, 0.5]), np.array([3.0, np.inf]), dtype=np.float64)
    )
    assert isinstance(box, Box)
    assert box.shape == (2,)
    assert box.low.tolist() == [-1.0, 0.5]
    assert box.high.tolist() == [3.0, np.inf]
    assert box.dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(np.uint8, np.uint8), (np.int8, np.int32), (np.int64, np.int32), (np.float16, np.float32)],
)
def test_box_dtypes(dtype, expected):
    box = spec.observation_space(spaces.Box(0, 100, (2, 3), dtype))
    assert isinstance(box, Box)
    assert box.dtype == expected
    assert (box.low == 0).all()
    assert (box.high == 100).all()


def test_int64_bounds_are_cut_to_int32():
    limit = np.iinfo(np.int64)
    box = spec.observation_space(spaces.Box(limit.min, limit.max, (1,), np.int64))
    assert isinstance(box, Box)
    assert box.low == np.iinfo(np.int32).min
    assert box.high == np.iinfo(np.int32).max


def test_integer_spaces():
    assert spec.observation_space(spaces.Discrete(4, start=7)) == Discrete(4)
    assert spec.observation_space(
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]))
    ) == MultiDiscrete((2, 3, 4, 5))
    assert spec.observation_space(spaces.MultiBinary(3)) == MultiDiscrete((2, 2, 2))


def test_nested_spaces_become_mappings():
    nested = spaces.Dict(
        a=spaces.Discrete(2), b=spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(1)))
    )
    assert spec.observation_space(nested) == {
        "a": Discrete(2),
        "b": {"0": Discrete(3), "1": MultiDiscrete((2,))},
    }


@pytest.mark.parametrize(
    "bad",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf((spaces.Discrete(2), spaces.Discrete(3))),
    ],
)
def test_unsupported_observation_spaces_are_named(bad):
    with pytest.raises(ValueError, match=rf"observation/x: {type(bad).__name__} .*Transform"):
        spec.observation_space(spaces.Dict(x=bad))


def test_action_spaces():
    box = spec.action_space(
        spaces.Box(np.array([-0.4, 0.0]), np.array([0.4, 3.0]), dtype=np.float64)
    )
    assert isinstance(box, Box)
    np.testing.assert_array_equal(box.high, [0.4, 3.0])
    assert spec.action_space(spaces.Discrete(3, start=-1)) == Discrete(3)
    assert spec.action_space(spaces.MultiDiscrete([2, 5])) == MultiDiscrete((2, 5))
    nested = spaces.Dict(a=spaces.Discrete(2), b=spaces.Dict(c=spaces.MultiDiscrete([2, 5])))
    assert spec.action_space(nested) == {"a": Discrete(2), "b": {"c": MultiDiscrete((2, 5))}}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spaces.Box(-np.inf, 1.0, (2,)), "low bound of a Box must be finite"),
        (spaces.Box(-1.0, np.inf, (2,)), "high bound of a Box must be finite"),
        (spaces.Box(0, 5, (2,), np.int32), "Box of int32 is not supported"),
        (spaces.MultiBinary(3), "MultiBinary is not supported"),
        (spaces.Dict(a=spaces.MultiBinary(2)), "action/a: MultiBinary is not supported"),
        (spaces.Tuple((spaces.Discrete(2),)), "Tuple is not supported"),
    ],
)
def test_unsupported_action_spaces_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        spec.action_space(bad)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-2.0, -np.inf], np.float32), np.array([0.1, 3.0], np.float32)),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 4]),
        spaces.Dict(a=spaces.Box(-1, 1, (), np.float32), b=spaces.Dict(c=spaces.Discrete(2))),
    ],
)
def test_round_trip(space):
    assert spec.to_gymnasium(spec.observation_space(space)) == space


def test_to_gymnasium_refuses_other_objects():
    with pytest.raises(ValueError, match=r"expected an mbrl space.*got str"):
        spec.to_gymnasium("Box")  # pyright: ignore


def test_env_spec_names_the_environment():
    with pytest.raises(ValueError, match="action space of Mine"):
        spec.env_spec("Mine", spaces.Discrete(2), spaces.Text(3))
    got = spec.env_spec("Mine", spaces.Discrete(2), spaces.Discrete(3), 7)
    assert got == ("Mine", Discrete(2), Discrete(3), 7, 1)

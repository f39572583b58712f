"""Image observations and repeated actions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import envs
from envs.host import HostEnv
from envs.wrappers import pixels
from tests.envs.fakes import Counter


class Quarters(Counter):
    """Renders and observes four quarters of known brightness."""

    def __init__(self, observe: bool = False):
        space = gym.spaces.Box(0, 255, (8, 12, 3), np.uint8) if observe else None
        super().__init__(observation_space=space)
        self.observe = observe

    def render(self):
        frame = np.zeros((8, 12, 3), np.uint8)
        frame[:4, 6:] = [10, 20, 30]
        frame[4:, :6] = 100
        frame[::2, 6:, 0] += 100
        return frame

    def _obs(self):
        return self.render() if self.observe else super()._obs()


@pytest.mark.parametrize("observe", [False, True])
def test_pixels_average_areas(observe):
    env = HostEnv(lambda: pixels(Quarters(observe), 2))
    image = env.reset(0).obs
    assert image.dtype == np.uint8
    expected = [[[0, 0, 0], [60, 20, 30]], [[100, 100, 100], [50, 0, 0]]]
    np.testing.assert_array_equal(image[0], expected)


class Camera(Counter):
    """Aims its camera where the first frame is drawn, as MuJoCo does."""

    aim = None

    def render(self):
        self.aim = self.np_random.integers(200) if self.aim is None else self.aim
        return np.full((4, 4, 3), self.aim + self.t, np.uint8)


def test_pictures_do_not_depend_on_how_the_process_began():
    frames = [HostEnv(lambda: pixels(Camera(), 2), num_envs=2).reset(7).obs for _ in range(3)]
    np.testing.assert_array_equal(frames[0][0], frames[0][1])
    np.testing.assert_array_equal(frames[0], frames[1])
    np.testing.assert_array_equal(frames[0], frames[2])


def test_pixels_need_a_picture():
    env = Counter()
    env.render_mode = None  # pyright: ignore
    with pytest.raises(ValueError, match="render_mode=None; make it with render_mode='rgb_array'"):
        pixels(env)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        pixels(Quarters(), 0)


def test_pictures_of_cartpole_are_means_of_its_frames():
    pytest.importorskip("pygame")
    env = pixels(gym.make("CartPole-v1", render_mode="rgb_array"), 50)
    first, _ = env.reset(seed=3)
    image = first
    for action in (0, 0, 1, 0, 0, 0):
        frame = np.asarray(env.unwrapped.render(), float)  # 400 x 600 pixels
        means = frame.reshape(50, 8, 50, 12, 3).mean((1, 3))
        np.testing.assert_allclose(image, means, atol=1)
        image, *_ = env.step(action)
    assert not np.array_equal(image, first)
    made = envs.make("CartPole-v1", pixels=64)
    assert isinstance(made, HostEnv)
    start = made.reset(0).obs
    assert (start.shape, start.dtype) == ((1, 64, 64, 3), np.uint8)


def test_make_with_pixels_and_repeated_actions():
    pytest.importorskip("pygame")
    env = envs.make("Pendulum-v1", pixels=16, action_repeat=3)
    assert isinstance(env, HostEnv)
    assert env.spec.max_episode_steps == 67
    plain = envs.make("Pendulum-v1")
    assert isinstance(plain, HostEnv)
    first, state = env.reset(0), plain.reset(0)
    assert first.obs.shape == (1, 16, 16, 3)
    assert not state.is_last[0]
    action = np.full((1, 1), 0.5, np.float32)
    rewards = sum(plain.step(action).reward for _ in range(3))
    np.testing.assert_allclose(env.step(action).reward, rewards, rtol=1e-6)
    count = 1
    while not env.step(action).is_last[0]:
        count += 1
    assert count + 1 == 67


@pytest.mark.parametrize("id", ["device/Pendulum", "envs.ondevice.catch:make"])
def test_device_environments_take_neither(id):
    with pytest.raises(ValueError, match="runs on the device and takes neither, got pixels=8"):
        envs.make(id, pixels=8)
    with pytest.raises(ValueError, match="action_repeat: expected at least 1, got 0"):
        envs.make(id, action_repeat=0)

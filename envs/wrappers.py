"""Image observations for Gymnasium environments; everything else is in Gymnasium itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


def pixels(env: gym.Env[Any, Any], size: int = 64) -> gym.Env[Any, Any]:
    """Make the observation an image of `size` x `size`.

    Images stay images and are resized; any other observation is replaced by the rendered
    frame. Resizing averages areas with Pillow, where gymnasium.wrappers.ResizeObservation
    would need OpenCV.

    Args:
      env: observes images, or was made with render_mode='rgb_array'.
      size: pixels per side.

    Returns:
      An environment that observes uint8 [size, size, channels].

    Raises:
      ValueError: when the environment neither observes nor renders images.
    """
    from PIL import Image

    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    space = env.observation_space
    if not (
        isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8
    ):
        if env.render_mode != "rgb_array":
            raise ValueError(
                f"env: {env} observes no images and has render_mode={env.render_mode!r}; make it "
                "with render_mode='rgb_array'"
            )
        # The wrapper draws once to learn the size, and MuJoCo aims its camera at that first
        # frame: an unseeded start would make the pictures of every run different.
        env.reset(seed=0)
        env = gym.wrappers.AddRenderObservation(env, render_only=True)
        space = env.observation_space
    channels = space.shape[2]  # pyright: ignore[reportOptionalSubscript]

    def resize(frame: np.ndarray) -> np.ndarray:
        planes = [Image.fromarray(frame[..., c]) for c in range(channels)]
        small = [np.asarray(p.resize((size, size), Image.Resampling.BOX)) for p in planes]
        return np.stack(small, -1)

    image = gym.spaces.Box(0, 255, (size, size, channels), np.uint8)
    return gym.wrappers.TransformObservation(env, resize, image)

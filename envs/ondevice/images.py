"""Boards of cells as images: drawing them, and reading them back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mbrl.spaces import box
from mbrl.types import Array, Box

RED, GREEN = 0, 1
BRIGHT, DIM = 255, 32


def board_space(size: int, cell: int) -> Box:
    """Make the space of images of a `size` x `size` board, `cell` pixels per side of a cell.

    Raises:
      ValueError: for a board without a second cell, or cells without a pixel.
    """
    if size < 2:
        raise ValueError(f"size: expected at least 2 cells per side, got {size}")
    if cell < 1:
        raise ValueError(f"cell: expected at least 1 pixel per side, got {cell}")
    return box(0, 255, (size * cell, size * cell, 3), np.uint8)


def draw(pieces: dict[int, tuple[Array, Array]], size: int, cell: int) -> Array:
    """Draw one piece per channel on a dim background.

    Pieces in the same cell mix their colours, so that both can be read back.

    Args:
      pieces: channel -> row and column of its piece, both [B].
      size: cells per side of the board.
      cell: pixels per side of a cell.

    Returns:
      [B, size * cell, size * cell, 3] uint8.
    """
    line = jnp.arange(size * cell) // cell
    planes = [jnp.full((1, 1, 1), False)] * 3
    for channel, (row, column) in pieces.items():
        planes[channel] = (line == row[:, None])[:, :, None] & (line == column[:, None])[:, None]
    bright = jnp.stack(jnp.broadcast_arrays(*planes), -1)
    return jnp.where(bright, BRIGHT, DIM).astype(jnp.uint8)


def locate(image: Array, channel: int, size: int) -> tuple[Array, Array]:
    """Find the piece that `draw` put into a channel: its brightest cell.

    Args:
      image: [B, size * cell, size * cell, 3].
      channel: that of the piece.
      size: cells per side of the board.

    Returns:
      Row and column, both int32 [B].
    """
    cell = image.shape[1] // size
    plane = image[:, ::cell, ::cell, channel].reshape(-1, size * size)
    index = jnp.argmax(plane, -1).astype(jnp.int32)
    return index // size, index % size

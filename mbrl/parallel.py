"""Several devices: rows of a batch over one axis of a mesh, matrices of a transformer over another.

Nothing else changes: arrays say where they lie, and jit partitions whatever computes with them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, TENSOR = "data", "tensor"

# Axes counted from the end, so that stacked layers and members need no rule of their own. What a
# column-parallel layer splits is what the row-parallel one after it sums over: one sum over devices
# per attention and per MLP.
_COLUMNS = ("query", "key", "value", "up", "gate")
_ROWS = ("out", "down")
_TABLES = ("embed", "head")


def make_mesh(data: int = 1, tensor: int = 1) -> Mesh:
    """Arrange the first `data * tensor` devices.

    Args:
      data: devices that share the rows of a batch.
      tensor: devices that share the matrices of a transformer.

    Raises:
      ValueError: when there are not so many devices.
    """
    devices = jax.devices()
    if data < 1 or tensor < 1 or data * tensor > len(devices):
        raise ValueError(
            f"mesh: got data={data}, tensor={tensor}, expected at least 1 each and at most "
            f"{len(devices)} together, the devices that there are"
        )
    return Mesh(np.array(devices[: data * tensor]).reshape(data, tensor), (DATA, TENSOR))


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Lay out the parameters of transformers, and whatever has their names and shapes.

    Args:
      tree: parameters, states of their optimizers, or a state of both. What is no matrix of a
        transformer, or does not divide by the axis, is on all devices.
      mesh: see `make_mesh`.
    """

    def place(path: Any, leaf: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, _spec(path, np.shape(leaf), mesh)))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Spread the leading axis of every leaf over the devices that share batches.

    Raises:
      ValueError: for a leaf whose rows do not divide by their number.
    """
    share = mesh.shape[DATA]

    def place(leaf: Any) -> Any:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % share:
            raise ValueError(
                f"batch: got a leaf of shape {np.shape(leaf)}, expected rows that divide by the "
                f"{share} devices of the axis {DATA!r}; change the size of the batch"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA)))

    return jax.tree.map(place, tree)


def _spec(path: Any, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    axis = None
    if any(name in _COLUMNS for name in names):
        axis = -1
    elif any(name in _ROWS for name in names) and names[-1] == "kernel":
        axis = -2
    elif names and names[-1] in _TABLES and len(shape) > 1:
        axis = -2
    if axis is None or len(shape) < -axis or shape[axis] % mesh.shape[TENSOR]:
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)
    spec[axis] = TENSOR
    return PartitionSpec(*spec)

"""Leaves of a pytree as plain numpy arrays and back: what a save needs to know of a state."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Leaf(NamedTuple):
    """One leaf as it is stored.

    Attributes:
      path: where it is in the tree, for example `.params['w']`.
      shape: of the stored array; of the key data for PRNG keys.
      dtype: numpy name of the stored array.
      kind: 'array', 'python int' (float, bool, complex), or 'key ' and its implementation.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


def describe(tree: Any) -> list[Leaf]:
    """List the leaves of a tree of arrays, `jax.ShapeDtypeStruct`s and Python numbers.

    Raises:
      ValueError: naming the leaf that is none of these.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
            kind, leaf = f"python {type(leaf).__name__}", np.asarray(leaf)
        elif not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"tree{name}: expected an array or a number, got {type(leaf).__name__}; "
                "keep text and other settings in the manifest"
            )
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind, leaf = f"key {_implementation(leaf.dtype)}", _key_data(leaf)
        else:
            kind = "array"
        dtype = np.dtype(leaf.dtype)
        if not _is_number(dtype):
            raise ValueError(f"tree{name}: expected an array of numbers, got dtype {dtype}")
        found.append(Leaf(name, tuple(leaf.shape), dtype.name, kind))
    return found


def to_host(leaf: Any) -> np.ndarray:
    """Return the stored form of a leaf: a contiguous array in native byte order.

    Raises:
      ValueError: when other processes hold parts of the leaf.
    """
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            raise ValueError("tree: a leaf is spread over several processes; gather it first")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    # Not ascontiguousarray, which turns scalars into vectors.
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def from_host(array: np.ndarray, like: Any) -> Any:
    """Turn a stored array into the type, weak type and sharding of `like`.

    Raises:
      ValueError: when jax would silently narrow a 64-bit array.
    """
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, bool | int | float | complex):
        return type(like)(array.item())
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(array)
        return _place(jax.random.wrap_key_data(data, impl=_implementation(like.dtype)), like)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"like: {array.dtype} needs jax_enable_x64 to become a jax array; "
            "pass a numpy array as this leaf of `like`"
        )
    if getattr(like, "weak_type", False):
        # Promotion depends on the weak type; only an update of a weak array keeps it.
        base = jnp.asarray(np.zeros((), array.dtype).item())
        return _place(jnp.broadcast_to(base, array.shape).at[...].set(array), like)
    return _place(jax.device_put(array, may_alias=False), like)


def digest(tree: Any) -> str:
    """Return the sha256 of a state: equal exactly when paths, types and all bits are equal."""
    total = hashlib.sha256()
    for leaf, value in zip(describe(tree), jax.tree.leaves(tree), strict=True):
        total.update(repr(tuple(leaf)).encode())
        total.update(sha256(to_host(value)).encode())
    return total.hexdigest()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """View a contiguous array as uint8 [nbytes]."""
    return array.reshape(-1).view(np.uint8)


def sha256(array: np.ndarray) -> str:
    """Return the checksum of the bytes of a contiguous array."""
    return hashlib.sha256(as_bytes(array).data).hexdigest()


def _place(value: jax.Array, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    committed = getattr(like, "committed", sharding is not None)
    return jax.device_put(value, sharding) if sharding is not None and committed else value


def _key_data(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _implementation(dtype: Any) -> str:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda impl=name: jax.random.key(0, impl=impl)).dtype == dtype:
            return name
    raise ValueError(f"tree: unknown PRNG key type {dtype}; use threefry2x32, rbg or unsafe_rbg")


def _is_number(dtype: np.dtype) -> bool:
    # The small floats and integers of ml_dtypes are of kind V, as structured arrays are.
    plain = dtype.fields is None and dtype.subdtype is None and dtype.type is not np.void
    return dtype.kind in "biufc" or (dtype.kind == "V" and plain)

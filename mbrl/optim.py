"""Optimizer parts beside optax: ensembles, skipped updates, target networks, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl.types import Array, Params


def clip_by_member_norm(max_norm: float) -> optax.GradientTransformation:
    """Clip the gradient of every ensemble member to a global norm of its own.

    Clipping the norm of the whole stack would couple the members: one with a large
    gradient would stop the others.

    Args:
      max_norm: largest norm of one member's gradient; > 0.

    Returns:
      A stateless transformation of gradients whose every leaf is [N, ...]. Put it first in
      `optax.chain`.

    Raises:
      ValueError: when leaves disagree on the leading axis, at the first update.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = jax.tree.leaves(updates)
        sizes = sorted({leaf.shape[:1] for leaf in leaves})
        if len(sizes) > 1 or sizes == [()]:
            raise ValueError(
                f"updates: got leaves with leading axes {sizes}, expected one axis [N] of "
                "members on every leaf; clip shared parameters with optax.masked"
            )
        axes = [tuple(range(1, leaf.ndim)) for leaf in leaves]
        squares = [jnp.sum(jnp.square(g), a) for g, a in zip(leaves, axes, strict=True)]
        norm = jnp.sqrt(sum(squares[1:], squares[0]))
        # max_norm / max(norm, max_norm) is exactly 1 below the bound, and has no 0 / 0.
        factor = max_norm / jnp.maximum(norm, max_norm)

        def scale(g: Array) -> Array:
            return g * factor.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype)

        return jax.tree.map(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FiniteState(NamedTuple):
    """State of `apply_if_finite_counted`.

    Attributes:
      inner: state of the wrapped optimizer.
      skipped: int32 scalar, updates skipped so far.
      consecutive: int32 scalar, updates skipped since the last one that was applied.
    """

    inner: Any
    skipped: Array
    consecutive: Array


def apply_if_finite_counted(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Skip updates whose gradient is not finite, for ever, and count them.

    A skipped update leaves parameters and optimizer state as they were. Unlike
    `optax.apply_if_finite` this never gives up and lets a NaN through: whoever drives the
    loop reads `consecutive` when it next fetches metrics, and stops. It also skips
    gradients whose squares overflow, which would freeze Adam's second moment at infinity.

    Args:
      inner: the optimizer to protect.

    Returns:
      A transformation whose state is `FiniteState`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> FiniteState:
        zero = jnp.zeros((), jnp.int32)
        return FiniteState(inner.init(params), zero, zero)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, FiniteState]:
        finite = jnp.isfinite(optax.tree.norm(updates, squared=True))
        updates, new = inner.update(updates, state.inner, params, **extra)
        # A select and not a cond: it fuses with the update itself, and under vmap over
        # seeds a cond would become one anyway.
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state.inner)
        bad = (~finite).astype(jnp.int32)
        counts = state.skipped + bad, (state.consecutive + 1) * bad
        return updates, FiniteState(kept, *counts)

    return optax.GradientTransformationExtraArgs(init, update)


def polyak(target: Params, online: Params, tau: Array | float) -> Params:
    """Return `(1 - tau) target + tau online`, leaf by leaf; `tau` 1 copies."""
    return jax.tree.map(lambda t, o: (1.0 - tau) * t + tau * o, target, online)


NO_DECAY = ("bias", "b", "scale", "offset", "logvar")


def decay_mask(params: Params, exclude: Sequence[str] = NO_DECAY) -> Any:
    """Mark the parameters that weight decay may touch: `optax.adamw(mask=decay_mask)`.

    Args:
      params: pytree of parameters.
      exclude: words that spare a leaf when one of them is a part, between underscores, of
        a key on its path. The default spares biases, scales and offsets of norms (Linen,
        NNX and Haiku names) and bounds of log-variances such as `logvar_low`.

    Returns:
      Pytree of bools of the same structure, true = decay.
    """

    def keep(path: tuple[Any, ...], leaf: Array) -> bool:
        del leaf
        names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        return not any(part in exclude for name in names for part in name.split("_"))

    return jax.tree_util.tree_map_with_path(keep, params)

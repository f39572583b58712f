"""Optimizer parts beside optax: clipping, LaProp, skipped updates, target networks, decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

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


def adaptive_gradient_clip(
    clip: Array | float = 0.3, min_norm: Array | float = 1e-3
) -> optax.GradientTransformation:
    """Clip the update of every tensor to a fraction of the norm of that tensor.

    `u *= 1 / max(1, |u| / (clip * max(min_norm, |p|)))`, where norms are those of whole
    tensors; `optax.adaptive_grad_clip` takes one norm for each output unit. A stack of
    ensemble members is one tensor, unless it is mapped over.

    Reference: Brock et al. 2021 (arXiv:2102.06171); over whole tensors in DreamerV3,
    Hafner et al. 2023 (arXiv:2301.04104).

    Args:
      clip: largest norm of an update, as a fraction of the norm of its parameters; > 0.
      min_norm: norm below which that of the parameters does not count, so that tensors
        which begin at zero can leave it; > 0.

    Returns:
      A stateless transformation that needs `params`. Put it before the optimizer in
      `optax.chain`: behind one it would bound the step and not the gradient.

    Raises:
      ValueError: for a bound that is not positive; at an update without parameters.
    """
    for name, value in (("clip", clip), ("min_norm", min_norm)):
        if not isinstance(value, jax.Array) and value <= 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")

    def shorten(u: Array, p: Array) -> Array:
        limit = clip * jnp.maximum(min_norm, jnp.linalg.norm(p.astype(jnp.float32)))
        ratio = jnp.linalg.norm(u.astype(jnp.float32)) / limit
        return u * (1.0 / jnp.maximum(1.0, ratio)).astype(u.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "params: adaptive_gradient_clip compares updates with parameters and got None; "
                "call update(updates, state, params)"
            )
        return jax.tree.map(shorten, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def laprop(
    learning_rate: Array | float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
    warmup: int = 0,
) -> optax.GradientTransformation:
    """Make LaProp: RMSProp first, then momentum over what it has normalized.

    With bias-corrected moments `nu` and `mu`: `nu <- b2 nu + (1 - b2) g^2`,
    `mu <- b1 mu + (1 - b1) g / (sqrt(nu) + eps)`, and the update is `-lr mu`. Adam divides
    the momentum instead, so that one large gradient shrinks the steps before it as well.

    Reference: LaProp, Ziyin et al. 2020 (arXiv:2002.04839).

    Args:
      learning_rate: of the updates after the warm-up; may be traced.
      beta1: decay of the momentum, in [0, 1).
      beta2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, in units of the gradient.
      warmup: updates over which the learning rate rises: the n-th, from 1, is scaled by
        `min(1, n / warmup)`; 0 = none.

    Returns:
      An optimizer, its sign included: `optax.apply_updates` adds what it yields.

    Raises:
      ValueError: for a negative `warmup`.
    """
    if warmup < 0:
        raise ValueError(f"warmup: expected a number of updates of at least 0, got {warmup}")

    def schedule(count: Any) -> Array:
        return learning_rate * jnp.minimum(1.0, (count + 1) / max(warmup, 1))

    return optax.chain(
        optax.scale_by_rms(beta2, eps, eps_in_sqrt=False, bias_correction=True),
        # |g| / sqrt(nu) never exceeds this bound, but squares of gradients below 1e-16
        # vanish in float32, and g / eps alone may be 1e4.
        optax.clip((1.0 - beta2) ** -0.5),
        optax.ema(beta1, debias=True),
        optax.scale_by_learning_rate(schedule),
    )


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
        # An array each: a state that shares a buffer cannot be donated.
        skipped, consecutive = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return FiniteState(inner.init(params), skipped, consecutive)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, FiniteState]:
        norms = jnp.stack([jnp.sqrt(jnp.sum(jnp.square(u))) for u in jax.tree.leaves(updates)])
        # A product, because XLA would repeat a sum of scalars in the select of every leaf
        # below, and take half as long again to compile.
        finite = jnp.isfinite(norms @ norms)
        updates, new = inner.update(updates, state.inner, params, **extra)
        # A select and not a cond: it fuses with the update itself, and under vmap over
        # seeds a cond would become one anyway.
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state.inner)
        bad = (~finite).astype(jnp.int32)
        counts = state.skipped + bad, (state.consecutive + 1) * bad
        return updates, FiniteState(kept, *counts)

    return optax.GradientTransformationExtraArgs(init, update)


def falling(rate: Array | float, updates: int) -> Any:
    """Return a step size that falls to a tenth along a cosine over `updates`; 0 = constant."""
    return optax.cosine_decay_schedule(cast(Any, rate), updates, 0.1) if updates else rate


def skipped(state: FiniteState, part: str = "model") -> dict[str, Array]:
    """Return the counts of skipped updates as metrics of `part`."""
    return {
        f"{part}/skipped_updates": state.skipped.astype(jnp.float32),
        f"{part}/skipped_in_a_row": state.consecutive.astype(jnp.float32),
    }


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

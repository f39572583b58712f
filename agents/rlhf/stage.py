"""What the stages of RLHF have in common: what is trained of a language model, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mbrl import optim
from mbrl.networks.lora import lora
from mbrl.settings import check_whole, check_within
from mbrl.types import Array, Key, Metrics, Params, State


class Stage(NamedTuple):
    """A learner of batches as pure functions over ONE state pytree.

    What a stage is given and does not change (the model that it starts from, which is its
    reference too; a reward model) stays outside of the state, so that saves hold what is learned.

    Attributes:
      init: `(key, given) -> state`.
      step: `(state, given, batch, key) -> (state, metrics)`.
      result: `(state, given) -> params`, what the stage was for.
    """

    init: Callable[[Key, Any], State]
    step: Callable[[State, Any, Any, Key], tuple[State, Metrics]]
    result: Callable[[State, Any], Params]


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the parameters of a language model are changed."""

    learning_rate: float = 1e-4
    """Step size of Adam after the warm-up."""
    warmup: int = 0
    """Updates over which the step size rises."""
    anneal: int = 0
    """Updates, the warm-up included, after which the step size is zero; 0 = it stays."""
    clip_norm: float = 1.0
    """Gradient norm above which it is scaled down."""
    eps: float = 1e-5
    """Of Adam, added to the root of the second moment (1e-8 in torch, 1e-5 in RLHF)."""
    weight_decay: float = 0.0
    """Share of the parameters that a step of size 1 takes away (AdamW)."""
    lora: int = 0
    """Rank of the adapters that are trained instead of the model; 0 = all of the model."""
    alpha: float = 16.0
    """Scale of the adapters, times their rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs of matrix products; parameters and their gradients are float32."""
    remat: bool = False
    """Compute each block again in the backward pass: less memory, a third more work."""

    def __post_init__(self) -> None:
        check_whole(self, "warmup", "anneal", "lora", least=0)
        check_within(self, "learning_rate", 0, ends="(]")
        check_within(self, "clip_norm", 0, ends="(]")
        check_within(self, "eps", 0, ends="(]")
        check_within(self, "weight_decay", 0)


class Tuning(NamedTuple):
    """What is trained of a model: all of it, or adapters.

    Attributes:
      init: `(key, base) -> weights`, a tree of its own: no buffer is shared with the base.
      merge: `(base, weights) -> params` of the model.
      optimizer: of any tree; steps that are not finite are skipped and counted.
    """

    init: Callable[[Key, Params], Params]
    merge: Callable[[Params, Params], Params]
    optimizer: optax.GradientTransformationExtraArgs


def tuning(config: TuningConfig, members: bool = False) -> Tuning:
    """Build what `config` says; with `members`, every leaf that is trained has an axis [N] of them,
    and each has a gradient norm of its own.
    """

    def rate(count: Any) -> Array:
        rising = jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))
        left = max(config.anneal - config.warmup, 1)
        falling = jnp.clip((config.anneal - count) / left, 0.0, 1.0) if config.anneal else 1.0
        return config.learning_rate * rising * falling

    adam = optax.adamw(rate, eps=config.eps, weight_decay=config.weight_decay)
    clip = optim.clip_by_member_norm if members else optax.clip_by_global_norm
    optimizer = optim.apply_if_finite_counted(optax.chain(clip(config.clip_norm), adam))
    if config.lora:
        adapters = lora(config.lora, config.alpha)
        return Tuning(adapters.init, adapters.merge, optimizer)
    return Tuning(
        lambda key, base: jax.tree.map(jnp.copy, base), lambda base, weights: weights, optimizer
    )


def descend(
    optimizer: optax.GradientTransformationExtraArgs, grads: Any, opt_state: Any, weights: Any
) -> tuple[Any, Any, Metrics]:
    """Take one step; returns weights, state of the optimizer, and the count of skipped steps."""
    updates, changed = optimizer.update(grads, opt_state, weights)
    counts = optim.skipped(cast(optim.FiniteState, changed))
    metrics = counts | {"gradient_norm": optax.tree.norm(grads)}
    return optax.apply_updates(weights, updates), changed, metrics

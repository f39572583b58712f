"""Low-rank adapters: a policy as its reference plus what it has learned.

Reference: LoRA, Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Key, Params

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
"""Dense layers of a block of a transformer."""


class LoRA(NamedTuple):
    """Adapters of a transformer as pure functions.

    Attributes:
      init: `(key, params) -> adapters`, a dict of `a` [layers, in, rank] and `b`
        [layers, rank, out] per adapted layer. `b` is zero, so that the policy begins as its
        reference.
      merge: `(params, adapters) -> params` with `kernel + alpha / rank * a @ b`; the others are
        shared, not copied. Gradients by the adapters flow through it.
    """

    init: Callable[[Key, Params], Params]
    merge: Callable[[Params, Params], Params]


def lora(rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = LAYERS) -> LoRA:
    """Build adapters of the dense layers of a transformer.

    Kernels are merged once per call, and the gradient passes through them: a step costs as much
    work as one of all weights. What is saved is memory: of the optimizer, and of a second copy of
    the reference.

    Args:
      rank: of each adapter.
      alpha: the adapters are scaled by `alpha / rank`.
      targets: names of the layers, of `LAYERS`; those that a block does not have (`gate` of
        GPT-2) are left out.

    Raises:
      ValueError: for a rank below 1 or an unknown layer.
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1; leave LoRA out for none")
    if unknown := sorted(set(targets) - set(LAYERS)):
        raise ValueError(f"targets: got {unknown[0]!r}, expected some of {list(LAYERS)}")

    def init(key: Key, params: Params) -> Params:
        names = [name for name in LAYERS if name in targets and name in params["blocks"]]
        adapters = {}
        for name, one in zip(names, jax.random.split(key, len(names)), strict=True):
            layers, rows, columns = params["blocks"][name]["kernel"].shape
            a = jax.random.normal(one, (layers, rows, rank)) * rows**-0.5
            adapters[name] = {"a": a, "b": jnp.zeros((layers, rank, columns))}
        return adapters

    def merge(params: Params, adapters: Params) -> Params:
        blocks: dict[str, Any] = dict(params["blocks"])
        for name, adapter in adapters.items():
            change = (alpha / rank) * (adapter["a"] @ adapter["b"])
            blocks[name] = blocks[name] | {"kernel": blocks[name]["kernel"] + change}
        return params | {"blocks": blocks}

    return LoRA(init, merge)

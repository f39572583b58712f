"""Networks as `init`/`apply` pairs: MLPs, ensembles and adapters of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbrl.types import Array, Key, Network, Params

if TYPE_CHECKING:
    from flax import nnx


def sigmoid(x: Array) -> Array:
    """Return `1 / (1 + exp(-x))`, elementwise."""
    # Equal to (1 + tanh(x / 2)) / 2. XLA:CPU vectorizes tanh as a rational polynomial but
    # evaluates the logistic function through exp and a division, and activations are about
    # a tenth of the time of a planning step on CPU.
    return 0.5 * (1.0 + jnp.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """Return `x * sigmoid(x)`, elementwise."""
    return x * sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "silu": silu,
    "tanh": jnp.tanh,
}


def _truncated_normal(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    # PETS draws with the standard deviation that the normal has *before* it is cut at two
    # sigmas; the kernel's own standard deviation is 0.88 of it. Kept, because the published
    # results were made with it.
    std = 0.5 * float(shape[-2]) ** -0.5
    return std * jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), dtype)


INITIALIZERS: dict[str, Callable[..., Array]] = {
    "truncated_normal": _truncated_normal,
    "fan_in": nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
    "orthogonal": nn.initializers.orthogonal(2.0**0.5),
}

# An epsilon of 1e-6 would blow up what a nearly silent layer says; 1e-4 is DreamerV3's.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": partial(nn.RMSNorm, epsilon=1e-4),
}


def _low(x: Array) -> Array:
    return x.astype(jnp.bfloat16)


@jax.custom_vjp
def _bfloat16_matmul(x: Array, kernel: Array) -> Array:
    return jnp.matmul(_low(x), _low(kernel), preferred_element_type=jnp.float32)


def _bfloat16_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16_matmul(x, kernel), (_low(x), _low(kernel))


def _bfloat16_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # JAX would multiply the float32 cotangent with the bfloat16 operand, which no matrix
    # unit can do: both backward products would run at float32 speed.
    x, kernel = saved
    g = _low(g)
    rows, cotangents = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    return product(g, kernel.T), product(rows.T, cotangents)


_bfloat16_matmul.defvjp(_bfloat16_forward, _bfloat16_backward)


def _bfloat16_dot(lhs: Array, rhs: Array, dimensions: Any, **_: Any) -> Array:
    assert dimensions == (((lhs.ndim - 1,), (0,)), ((), ()))
    return _bfloat16_matmul(lhs, rhs)


DOTS: dict[str, Callable[..., Array] | None] = {"float32": None, "bfloat16": _bfloat16_dot}


def matmul(x: Array, kernel: Array, dtype: str = "float32") -> Array:
    """Multiply [..., I] by [I, O] in float32, or with inputs rounded to bfloat16."""
    return _bfloat16_matmul(x, kernel) if dtype == "bfloat16" else x @ kernel


class MLP(nn.Module):
    """A stack of dense layers as a Linen module; see `mlp` for the fields."""

    hidden: tuple[int, ...]
    out: int | None
    activation: str
    init_name: str
    dtype: str
    norm: str | None
    out_scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initializer = INITIALIZERS[self.init_name]
        dense = partial(nn.Dense, dot_general=DOTS[self.dtype])
        for size in self.hidden:
            x = dense(size, kernel_init=initializer)(x)
            x = NORMS[self.norm]()(x) if self.norm else x
            x = ACTIVATIONS[self.activation](x)
        if self.out is None:
            return x
        return dense(self.out, kernel_init=lambda *args: self.out_scale * initializer(*args))(x)


def _choose(argument: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: got {value!r}, expected one of {list(choices)}")


def mlp(
    hidden: Sequence[int],
    out: int | None,
    activation: str = "silu",
    init: str = "truncated_normal",
    dtype: str = "float32",
    norm: str | None = None,
    out_scale: float = 1.0,
) -> Network:
    """Build a multi-layer perceptron `[B, D] -> [B, out]`.

    Parameters are float32 and biases start at zero, whatever the options.

    Args:
      hidden: widths of the hidden layers; empty for a linear map.
      out: width of the output; None = no linear layer after the last hidden one.
      activation: key of `ACTIVATIONS`, after every hidden layer.
      init: 'truncated_normal' (PETS: standard deviation `1 / (2 sqrt(fan_in))` before the
        cut at two sigmas), 'fan_in' (variance `1 / fan_in`) or 'orthogonal' (gain sqrt 2).
      dtype: of the matrix products' inputs, 'float32' or 'bfloat16'; they accumulate and
        return float32 in both cases. 'bfloat16' pays on accelerators and on CPUs with AMX;
        on other CPUs it is slower.
      norm: None, 'layer' or 'rms', before every activation.
      out_scale: factor on the initial kernel of the last layer; 0 makes a head that
        starts at exactly zero.

    Returns:
      A `Network`; its parameters are a dict of dicts of arrays.

    Raises:
      ValueError: for an unknown name or a width below 1.

    Reference: Deep Reinforcement Learning in a Handful of Trials using Probabilistic
    Dynamics Models (arXiv 1805.12114).
    """
    _choose("activation", activation, list(ACTIVATIONS))
    _choose("init", init, list(INITIALIZERS))
    _choose("dtype", dtype, list(DOTS))
    _choose("norm", norm, [None, *NORMS])
    if any(width < 1 for width in (*hidden, 1 if out is None else out)):
        raise ValueError(
            f"hidden, out: every width must be at least 1, got hidden={hidden}, out={out}; "
            "leave a layer out by removing its width"
        )
    module = MLP(tuple(hidden), out, activation, init, dtype, norm, out_scale)

    def apply(params: Params, x: Array) -> Array:
        # One row axis: XLA:CPU takes twice as long for the gradient of a product over two.
        y = module.apply({"params": params}, x.reshape(-1, x.shape[-1]))
        assert isinstance(y, jax.Array)
        return y.reshape(*x.shape[:-1], -1)

    return Network(lambda key, x: module.init(key, x)["params"], apply)


def ensemble(network: Network, num_members: int) -> Network:
    """Stack `num_members` independently initialized copies of a network.

    Args:
      network: the member, `[B, ...] -> [B, ...]`.
      num_members: N.

    Returns:
      A `Network` from `[N, B, ...]` to `[N, B, ...]` whose parameter leaves carry a
      leading `[N]`; member `n` sees row `n` of the input.

    Raises:
      ValueError: when `num_members < 1`, or at the call when the input has no leading
        axis of that size.
    """
    if num_members < 1:
        raise ValueError(f"num_members: got {num_members}, expected at least 1")

    def check(x: Array, members: int) -> None:
        for leaf in jax.tree.leaves(x):
            if leaf.ndim < 2 or leaf.shape[0] != members:
                raise ValueError(
                    f"x: got shape {leaf.shape}, expected [N={members}, B, ...]; give "
                    "every member the same batch with jnp.broadcast_to(x, (N, *x.shape))"
                )

    def init(key: Key, x: Array) -> Params:
        check(x, num_members)
        return jax.vmap(network.init)(jax.random.split(key, num_members), x)

    def apply(params: Params, x: Array) -> Array:
        # The parameters say how many members there are: a selection of them will do.
        members = jax.tree.leaves(params)[0].shape[0]
        check(x, members)
        if members == 1:  # XLA:CPU takes twice as long for the gradient with a batch axis of one
            alone, row = jax.tree.map(lambda leaf: leaf[0], (params, x))
            return jax.tree.map(lambda y: y[None], network.apply(alone, row))
        return jax.vmap(network.apply)(params, x)

    return Network(init, apply)


def from_haiku(fn: Callable[[Array], Array]) -> Network:
    """Adapt a Haiku function, `x -> y` built from `hk` modules.

    Args:
      fn: deterministic function of `[B, ...]` that keeps no Haiku state.

    Returns:
      A `Network`.
    """
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform(fn))
    return Network(transformed.init, transformed.apply)


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Adapt a Flax NNX module, called as `module(x)`.

    Args:
      make: builds the module from `rngs`; traced, never run, at construction.

    Returns:
      A `Network`; its parameters are the values of the module's `nnx.Param`s in nested
      dicts.

    Raises:
      ValueError: when the module holds other variables (batch statistics, dropout keys):
        a `Network` is a function of its parameters and input alone.
    """
    from flax import nnx

    def build(key: Key) -> nnx.Module:
        return make(nnx.Rngs(key))

    abstract = nnx.eval_shape(build, jax.random.key(0))
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)
    others = sorted({type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=_is_variable)})
    if others:
        raise ValueError(
            f"make: the module holds {', '.join(others)} variables, expected nnx.Param only; "
            "replace batch norm by layer norm and leave dropout out"
        )

    def init(key: Key, x: Array) -> Params:
        del x  # NNX modules know their input size
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(params: Params, x: Array) -> Array:
        state = jax.tree.map(lambda v: v, template)
        nnx.replace_by_pure_dict(state, params)
        module: Any = nnx.merge(graphdef, state)
        return module(x)

    return Network(init, apply)


def _is_variable(x: Any) -> bool:
    from flax import nnx

    return isinstance(x, nnx.Variable)


def num_params(params: Params) -> int:
    """Count the numbers in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

"""Count the floating-point operations of a JAX function from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Count two operations per multiply-add of all matrix products and convolutions.

    Loops count as often as they run, which XLA's own cost analysis does not do: it counts
    their bodies once. Elementwise work is not counted. Of the branches of a conditional the
    dearest counts; a `while` loop whose trips are unknown counts once.

    Args:
      fn: function to trace.
      *args: its arguments; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Number of operations of one call.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contract)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = [value for value in params.values() if hasattr(value, "eqns") or _is_closed(value)]
    return sum(_count(getattr(value, "jaxpr", value)) for value in inner)


def _is_closed(value: Any) -> bool:
    return hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns")


def _of_convolution(equation: Any) -> int:
    """Count a convolution: every output pixel reads one window of its group's channels.

    The gradient with respect to the image dilates its input with zeros, which are not
    multiplied by anyone who cares: each kernel entry then meets one in `dilation` pixels.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    kernel = equation.invars[1].aval.shape
    window = math.prod(kernel[i] for i in numbers.rhs_spec[2:])
    channels = kernel[numbers.rhs_spec[1]]
    dilation = math.prod(params["lhs_dilation"])
    return 2 * math.prod(out) * window * channels // dilation

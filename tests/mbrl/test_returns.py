"""Returns against their quadratic-time definitions, by hand, and across episode borders."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import returns
from mbrl.types import Record

T = 9


class Data:
    """A random stretch of T transitions with a terminal state in it, in float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.r = rng.normal(size=T)
        self.d = rng.uniform(0.5, 1.0, size=T)
        self.d[3] = 0.0
        self.v = rng.normal(size=T + 1)
        self.rho = rng.lognormal(sigma=0.7, size=T)
        self.lam = rng.uniform(size=T)


D = Data()
F32 = partial(jnp.asarray, dtype=jnp.float32)
R_T, D_T, V_TM1, V_T, RHO = F32(D.r), F32(D.d), F32(D.v[:-1]), F32(D.v[1:]), F32(D.rho)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def _n_step_brute_force(n: int) -> np.ndarray:
    out = []
    for t in range(T):
        end = min(t + n, T)
        total = sum(np.prod(D.d[t:k]) * D.r[k] for k in range(t, end))
        out.append(total + np.prod(D.d[t:end]) * D.v[end])
    return np.array(out)


def _lambda_brute_force(lam: float) -> np.ndarray:
    """The forward view: exponentially weighted n-step returns, the last takes the rest."""
    steps = [_n_step_brute_force(n) for n in range(1, T + 1)]
    out = np.zeros(T)
    for t in range(T):
        left = T - t
        for n in range(1, left + 1):
            weight = (1 - lam) * lam ** (n - 1) if n < left else lam ** (n - 1)
            out[t] += weight * steps[n - 1][t]
    return out


def test_discounted_by_hand() -> None:
    got = returns.discounted(F32([1, 2, 3]), F32([0.5, 0.5, 0.5]), 8.0)
    close(got, [1 + 0.5 * (2 + 0.5 * (3 + 4)), 2 + 0.5 * 7, 7])


def test_discounted_is_the_sum_of_discounted_rewards() -> None:
    expected = _n_step_brute_force(T) - [np.prod(D.d[t:]) * D.v[-1] for t in range(T)]
    close(returns.discounted(R_T, D_T), expected)
    close(returns.discounted(R_T, D_T, V_T[-1]), _n_step_brute_force(T))


@pytest.mark.parametrize("n", [1, 2, 5, T, T + 4])
def test_n_step_is_its_definition(n: int) -> None:
    close(returns.n_step(R_T, D_T, V_T, n), _n_step_brute_force(n))


def test_n_step_may_be_shortened_by_a_traced_number() -> None:
    short = jax.jit(lambda n: returns.n_step(R_T, D_T, V_T, 4, at_most=n))
    for n in (1, 2, 3, 4, 9):
        close(short(n), _n_step_brute_force(min(n, 4)))


@pytest.mark.parametrize("lam", [0.0, 0.4, 0.95, 1.0])
def test_lambda_returns_are_the_forward_view(lam: float) -> None:
    close(returns.lambda_returns(R_T, D_T, V_T, lam), _lambda_brute_force(lam))


def test_nothing_crosses_a_terminal_state() -> None:
    poisoned = R_T.at[4:].set(1e6), V_T.at[4:].set(-1e6)
    for fn in (
        lambda r, v: returns.discounted(r, D_T, v[-1]),
        lambda r, v: returns.lambda_returns(r, D_T, v, 0.9),
        lambda r, v: returns.n_step(r, D_T, v, 6),
        lambda r, v: returns.gae(r, D_T, V_TM1, v, 0.9),
        lambda r, v: returns.vtrace(r, D_T, V_TM1, v, RHO).target,
        lambda r, v: returns.vtrace(r, D_T, V_TM1, v, RHO).advantage,
    ):
        np.testing.assert_array_equal(fn(*poisoned)[:4], fn(R_T, V_T)[:4])


def test_gae_is_the_sum_of_discounted_td_errors() -> None:
    delta = D.r + D.d * D.v[1:] - D.v[:-1]
    for lam in (0.0, 0.7, 1.0):
        expected = [sum(np.prod(lam * D.d[t:k]) * delta[k] for k in range(t, T)) for t in range(T)]
        close(returns.gae(R_T, D_T, V_TM1, V_T, lam), expected)


def test_gae_identities() -> None:
    close(returns.gae(R_T, D_T, V_TM1, V_T, 0.0), D.r + D.d * D.v[1:] - D.v[:-1])
    close(returns.gae(R_T, D_T, V_TM1, V_T, 1.0), _n_step_brute_force(T) - D.v[:-1])
    lam = F32(D.lam)
    close(
        returns.gae(R_T, D_T, V_TM1, V_T, lam) + V_TM1,
        returns.lambda_returns(R_T, D_T, V_T, lam),
    )


def _vtrace_brute_force(clip_rho: float, clip_pg: float) -> tuple[np.ndarray, np.ndarray]:
    """Equation 1 of the IMPALA paper, term by term."""
    delta = np.minimum(D.rho, clip_rho) * (D.r + D.d * D.v[1:] - D.v[:-1])
    c = np.minimum(D.rho, 1.0)
    target = np.array(
        [
            D.v[s] + sum(np.prod(D.d[s:t]) * np.prod(c[s:t]) * delta[t] for t in range(s, T))
            for s in range(T)
        ]
    )
    following = np.append(target[1:], D.v[-1])
    advantage = np.minimum(D.rho, clip_pg) * (D.r + D.d * following - D.v[:-1])
    return target, advantage


@pytest.mark.parametrize("clips", [(1.0, 1.0), (2.0, 0.5)])
def test_vtrace_is_its_definition(clips: tuple[float, float]) -> None:
    got = returns.vtrace(R_T, D_T, V_TM1, V_T, RHO, 1.0, *clips)
    target, advantage = _vtrace_brute_force(*clips)
    close(got.target, target)
    close(got.advantage, advantage)


def test_vtrace_on_policy_is_the_lambda_return() -> None:
    for lam in (1.0, 0.6):
        got = returns.vtrace(R_T, D_T, V_TM1, V_T, jnp.ones(T), lam)
        close(got.target, returns.lambda_returns(R_T, D_T, V_T, lam))
        close(got.advantage, got.target - V_TM1)


def test_vtrace_with_zero_ratios_keeps_the_values() -> None:
    got = returns.vtrace(R_T, D_T, V_TM1, V_T, jnp.zeros(T))
    close(got.target, V_TM1)
    close(got.advantage, 0.0)


def _stream() -> Record:
    """Two episodes and a torso in one stream: 3 records truncated, 3 terminal, 3 cut off.

    The last stretch is broken by a crash: its third record is followed by a first one.
    """
    flags = {
        "is_first": [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0],
        "is_last": [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0],
        "is_terminal": [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
    }
    reward = [0, 1, 2, 0, 4, 8, 0, 16, 32, 0, 64]
    none = jnp.zeros(11)
    return Record(none, none, F32(reward), **{k: jnp.array(v, bool) for k, v in flags.items()})


def test_align_pairs_rewards_with_arrivals_and_marks_borders() -> None:
    signals = returns.align(_stream(), 0.5)
    valid = np.array([1, 1, 0, 1, 1, 0, 1, 1, 0, 1], bool)
    np.testing.assert_array_equal(signals.valid, valid)
    np.testing.assert_array_equal(signals.r_t[valid], [1, 2, 4, 8, 16, 32, 64])
    np.testing.assert_array_equal(signals.discount_t[valid], [0.5, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(signals.trace_t, [1, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    # Either flag alone marks a border.
    blind = returns.align(_stream()._replace(is_first=jnp.zeros(11, bool)), 0.5)
    np.testing.assert_array_equal(np.flatnonzero(~blind.valid), [2, 5])


def test_returns_bootstrap_at_truncation_and_stop_at_termination() -> None:
    record = _stream()
    s = returns.align(record, 0.5)
    v = jnp.arange(100.0, 111.0)  # the value of record k is 100 + k
    v_tm1, v_t, valid = v[:-1], v[1:], np.asarray(s.valid)
    by_hand = [
        1 + 0.5 * (2 + 0.5 * 102),  # truncated: the value of the final observation
        2 + 0.5 * 102,
        4 + 0.5 * 8,  # terminal: nothing beyond
        8,
        16 + 0.5 * (32 + 0.5 * 108),  # cut off: the value of the last record seen
        32 + 0.5 * 108,
        64 + 0.5 * 110,  # end of the data
    ]
    got = returns.lambda_returns(s.r_t, s.discount_t, v_t, s.trace_t)
    close(got[valid], by_hand)
    close(returns.n_step(s.r_t, s.discount_t, v_t, 5, s.trace_t)[valid], by_hand)
    gae = returns.gae(s.r_t, s.discount_t, v_tm1, v_t, s.trace_t)
    close((gae + v_tm1)[valid], by_hand)
    on_policy = returns.vtrace(s.r_t, s.discount_t, v_tm1, v_t, jnp.ones(10), s.trace_t)
    close(on_policy.target[valid], by_hand)
    close((on_policy.advantage + v_tm1)[valid], by_hand)


def test_vmap_over_a_batch_and_gradients_flow() -> None:
    batch = jax.vmap(returns.lambda_returns, (0, 0, 0, None))
    r_t, discount_t, v_t = (
        jnp.stack([x, y]) for x, y in ((R_T, 2 * R_T), (D_T, D_T), (V_T, 2 * V_T))
    )
    close(batch(r_t, discount_t, v_t, 0.9)[1], returns.lambda_returns(2 * R_T, D_T, 2 * V_T, 0.9))
    # d G_0 / d r_k is the product of (lambda discount) up to k.
    grad = jax.grad(lambda r: returns.lambda_returns(r, D_T, V_T, 0.9)[0])(R_T)
    close(grad, [np.prod(0.9 * D.d[:k]) for k in range(T)])


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="n: got 0"):
        returns.n_step(R_T, D_T, V_T, 0)
    with pytest.raises(AssertionError):
        returns.discounted(R_T[None], D_T[None])
    with pytest.raises(AssertionError):
        returns.gae(R_T, D_T, V_TM1, V_T[:-1], 0.9)

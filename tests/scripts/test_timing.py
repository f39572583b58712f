"""Timings beside the machine's own rate."""

from __future__ import annotations

import pytest

from scripts import timing


def test_share_is_the_median_of_each_call_beside_its_own_gemm() -> None:
    # The machine slows down by half in the second call, and the work with it.
    timed = timing.Timed(seconds=[1.0, 2.0, 2.5], gemm=[100.0, 50.0, 50.0])
    found = timed.rates(gflop=50.0)
    assert found["share_of_gemm"] == pytest.approx(0.5)
    assert found["median_seconds"] == 2.0
    assert found["min_seconds"] == 1.0
    assert found["gflops"] == 25.0
    assert found["gemm_gflops"] == 50.0


def test_the_gemm_is_measured_before_and_after_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rates = iter([1.0, 3.0, 5.0])

    def gemm_rate(shape: tuple[int, int], dtype: str) -> float:
        order.append(f"gemm {shape} {dtype}")
        return next(rates)

    monkeypatch.setattr(timing, "gemm_rate", gemm_rate)
    timed = timing.beside_gemm(lambda i: order.append(f"call {i}"), 2, (8, 4), "bfloat16")
    gemm = "gemm (8, 4) bfloat16"
    assert order == [gemm, "call 0", gemm, "call 1", gemm]
    assert timed.gemm == [2.0, 4.0]
    assert len(timed.seconds) == 2

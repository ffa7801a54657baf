"""Our own scan for the start of a tail against one distance after the other."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.kernels import tail

PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-fma")
pytestmark = pytest.mark.skipif(tail.library() is None, reason="no C compiler here")


def case(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logs = np.sort(np.log(rng.pareto(1.5, n) + rng.uniform(0.1, 1)))
    rest = n - np.arange(n - 1)
    return logs, 1 + rest / np.maximum(np.cumsum(logs[::-1])[::-1][:-1] - rest * logs[:-1], 1e-9)


def distances(logs: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    n = len(logs)
    gaps = [
        np.abs(1 - np.exp((1 - a) * (logs[i:] - logs[i])) - np.arange(n - i) / (n - i)).max()
        for i, a in enumerate(alphas)
    ]
    return np.array(gaps)


@pytest.mark.parametrize("flags", [(), PLAIN], ids=["native", "plain"])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 31, 32, 33, 40, 65, 200, 701])
def test_equals_one_distance_after_the_other(flags: tuple[str, ...], n: int) -> None:
    lib = tail.library(*flags)
    if lib is None:
        pytest.skip("these flags are for x86")
    for seed in range(5):
        logs, alphas = case(n, seed)
        penalty = np.random.default_rng(seed).uniform(-0.1, 0.1, n - 1) * (seed % 2)
        alphas[np.random.default_rng(seed).random(n - 1) < 0.2 * (n > 4)] = np.nan
        want = distances(logs, alphas) + penalty
        right = int(np.nanargmin(want))
        best, distance, sure = tail.best_start(logs, alphas, penalty, np.zeros(n - 1), lib)
        assert best == right
        assert distance == pytest.approx(want[right] - penalty[right], abs=1e-14)
        assert sure
        others = np.delete(want, right)
        if np.isfinite(others).any():
            gap = np.nanmin(others) - want[right]
            for share, still in ((0.49, True), (0.51, False)):
                slack = np.full(n - 1, share * gap)
                assert tail.best_start(logs, alphas, penalty, slack, lib)[2] is still


def test_no_start_at_all() -> None:
    best, distance, _ = tail.best_start(np.arange(5.0), np.full(4, np.nan), np.zeros(4), np.zeros(4))
    assert best == -1
    assert np.isnan(distance)


def test_switched_off_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tail.available()
    monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    assert not tail.available()

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.posterior import posterior_of_units
from bitatlas.analysis.fisher.resampled import RESAMPLED, resampled_factors
from bitatlas.analysis.schema import QuantUnit

FORMATS = ("int2-g64", "int3-g64", "int4-g64")
SEQUENCES, UNITS = 24, 12


def _units() -> list[QuantUnit]:
    return [
        QuantUnit(f"u{i}", "up" if i % 2 else "down", i // 4, -1, 8, 64, f"u{i}.weight") for i in range(UNITS)
    ]


def _probes(same: bool = False) -> ProbeMatrix:
    rng = np.random.default_rng(3)
    n = 1 if same else SEQUENCES
    a = rng.normal(size=(n, 2, UNITS, 3)) * np.array([4, 2, 1]) * rng.lognormal(0, 1, (UNITS, 1))
    gsq = rng.chisquare(8, (n, 2, UNITS))
    if same:
        a, gsq = np.repeat(a, SEQUENCES, 0), np.repeat(gsq, SEQUENCES, 0)
    reached = np.full((2 * SEQUENCES, UNITS), 32)
    reached[:, 5] = 0
    return ProbeMatrix(
        tuple(f"u{i}" for i in range(UNITS)), FORMATS, a.reshape(-1, UNITS, 3).astype(np.float32),
        gsq.reshape(-1, UNITS), np.repeat(np.arange(SEQUENCES), 2), np.full(2 * SEQUENCES, 32.0), reached,
        rng.lognormal(0, 1, (UNITS, 1)) * np.array([16.0, 4, 1]),
    )  # fmt: skip


def test_sequences_are_drawn_whole_and_twice_counts_twice():
    probes = _probes()
    drawn = probes.drawn(np.array([7, 7, 2]))
    assert np.array_equal(drawn.a, probes.a[[14, 15, 14, 15, 4, 5]])
    again = ProbeMatrix(drawn.units, drawn.formats, drawn.a, drawn.gsq, drawn.sequence, drawn.tokens, drawn.reached, drawn.norm_sq)  # fmt: skip
    for kept, made in zip(drawn.by_sequence, again.by_sequence):
        np.testing.assert_allclose(kept, made)


def test_factors_of_the_projection_are_a_bootstrap():
    probes = _probes()
    drawn = np.array(list(resampled_factors(probes, "fisher_projection", _units(), 400)))
    assert np.isnan(drawn[:, 5]).all()  # no token reached it
    known = np.delete(drawn, 5, 1)
    asq = np.delete(probes.by_sequence[0], 5, 1)
    relative = asq.std(0, ddof=1) / asq.mean(0) / np.sqrt(SEQUENCES)
    assert known.mean(0) == pytest.approx(np.ones((UNITS - 1, 3)), abs=0.08)
    assert np.median(known.std(0) / relative) == pytest.approx(1, abs=0.05)


def test_the_posterior_moves_less_than_the_projection():
    probes = _probes()
    spread = {
        name: np.nanmedian(np.std(list(resampled_factors(probes, name, _units(), 60)), 0))
        for name in ("fisher_projection", "fisher")
    }
    assert 0 < spread["fisher"] < spread["fisher_projection"]
    first = next(resampled_factors(probes, "fisher", _units(), 1, seed=5))
    chosen = np.random.default_rng(5).integers(0, SEQUENCES, SEQUENCES)
    value = [posterior_of_units(p, _units()).value for p in (probes.drawn(chosen), probes)]
    reached = np.arange(UNITS) != 5
    np.testing.assert_allclose(first[reached], (value[0] / value[1])[reached])


@pytest.mark.parametrize("metric", RESAMPLED)
def test_equal_sequences_change_nothing(metric):
    for factor in resampled_factors(_probes(same=True), metric, _units(), 3):
        np.testing.assert_allclose(np.delete(factor, 5, 0), 1.0)


def test_what_cannot_be_resampled():
    with pytest.raises(ValueError, match="kl_flip"):
        next(resampled_factors(_probes(), "kl_flip", _units(), 1))
    with pytest.raises(ValueError, match="1 sequences"):
        next(resampled_factors(_probes().drawn(np.array([0])), "fisher", _units(), 1))

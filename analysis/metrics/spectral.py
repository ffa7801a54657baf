"""Spectral shape of a weight as WeightWatcher reads it: power-law tail, norms, log-determinant."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Parts, StepResult, UnitMetric, chunks_by_layer
from bitatlas.analysis.power_law import THRESHOLD
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.analysis.spectra import unit_spectrum

__all__ = ["Spectral"]


class Spectral(UnitMetric):
    """The eigenvalues l of W^T W and what WeightWatcher makes of them.

        spectral_alpha     exponent of the tail p(l) ~ l^-alpha, maximum likelihood, xmin of smallest KS distance
        spectral_distance  that Kolmogorov-Smirnov distance
        spectral_weighted  alpha * log10(l_max)
        spectral_log_norm  log10(sum l), the Frobenius norm squared
        spectral_log_det   mean of ln l over the eigenvalues above 1e-5

    Clauset, Shalizi, Newman (SIAM Review 51, 2009), as in Martin, Peng, Mahoney (Nature Communications 12,
    2021). alpha below 2 is called over-trained and above 6 under-trained; its standard error is
    (alpha - 1) / sqrt(tail) and ``count`` the tail's length. The eigenvalues stay in the parts of the run.
    """

    NAME = "spectral"
    TITLE = "Spectral tail (KS fit)"
    UNIT = "exponent"
    SOURCE = "Clauset et al. 2009, eq. 3.1 and sec. 3.3; WeightWatcher (Nature Communications 12, 2021)"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = (
        "spectral_alpha", "spectral_distance", "spectral_weighted", "spectral_log_norm", "spectral_log_det",
    )  # fmt: skip
    VERSION = 3

    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Spectrum and fit of a unit; arrays: its eigenvalues, and how many they are."""
        lam, fit = unit_spectrum(ctx, unit)  # (min(rows, cols),) ascending
        known = lam[lam > THRESHOLD]
        top = float(np.log10(lam[-1])) if known.size else float("nan")
        values = (
            (fit.alpha, fit.sigma, fit.tail),
            (fit.distance, float("nan"), fit.tail),
            (fit.alpha * top, fit.sigma * abs(top), fit.tail),
            (float(np.log10(lam.sum())) if known.size else float("nan"), float("nan"), len(known)),
            (float(np.log(known).mean()) if known.size else float("nan"), float("nan"), len(known)),
        )
        rows = [
            DamageRow(name, unit.key, NO_FORMAT, value, stderr, count)
            for name, (value, stderr, count) in zip(self.EMITS, values)
        ]
        return StepResult(
            rows, {"eigenvalues": lam.astype(np.float32), "sizes": np.array([len(lam)], np.int64)}
        )

    @staticmethod
    def eigenvalues(ctx: MeasureContext, parts: Parts, unit: str) -> np.ndarray:
        """Ascending eigenvalues of one unit out of the parts of a run.

        Raises:
            KeyError: no such unit.
        """
        for key, units in chunks_by_layer(ctx.index.units).items():
            for i, u in enumerate(units):
                if u.key == unit:
                    part = parts[key]
                    end = part["sizes"].cumsum()[i]
                    return part["eigenvalues"][end - part["sizes"][i] : end]
        raise KeyError(unit)

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read, a Gram product and its eigenvalues per unit."""
        flops = 0.0
        for u in ctx.index.units:
            n, m = min(u.rows, u.cols), max(u.rows, u.cols)
            # A double precision eigensolver runs some 25 times below the rate of a float32 product.
            flops += 4.0 * m * n * n + 25 * 4 / 3 * n**3
        return Cost(steps=len(self.plan(ctx)), bytes_read=checkpoint_bytes(ctx.index), flops=flops)

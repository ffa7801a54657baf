"""AlphaQ: bits by how heavy-tailed a weight's spectrum is, no data needed."""

from __future__ import annotations

import numpy as np
import torch

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Parts, StepResult, UnitMetric, chunks_by_layer
from bitatlas.analysis.metrics.weight_error import squared_error
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.analysis.spectra import (
    FARMS_TILE,
    farms_pick,
    farms_takes_all,
    farms_tiles,
    hill_alpha,
    spectral_entropy,
    stable_rank,
    tiles_hill,
    unit_spectrum,
)
from bitatlas.kernels.errors import UserError

__all__ = ["AlphaQ"]

_FREE = ("alpha_hill", "alpha_hill_plain", "stable_rank", "spectral_entropy")


class AlphaQ(UnitMetric):
    """Heavy-tail sensitivity: a heavier tail (smaller alpha) marks a better trained, more sensitive unit.

        alpha  = 1 + k / sum_{i<=k} ln(l_{m-i+1} / l_{m-k}),  k = max(10, floor(0.1 m))   (PL_Alpha_Hill)
        damage = (alpha_median / alpha)^gamma * n * Var(W) * 2^(-2 b)

    l are squared singular values, ascending, pooled over random 128 x 128 tiles (FARMS), which takes the
    shape of the matrix out of alpha. The published cost leaves out n, the number of weights, and
    so under-weights large matrices; ``size_factor=False`` gives it as published. b is the format's code
    width: group size does not enter, unless ``distortion="measured"`` puts ||Q(W) - W||^2 in the place of
    n Var 2^(-2b). The standard error is the spread over FARMS seeds / sqrt(seeds). The tail's weight is a
    hypothesis about training quality, not a bound on the loss.
    """

    NAME = "alphaq"
    TITLE = "AlphaQ heavy tail"
    UNIT = "squared weight"
    SOURCE = "AlphaQ (arXiv 2606.04980), PL_Alpha_Hill with FARMS and the MILP cost, times n"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("alphaq", *_FREE)
    VERSION = 3
    SETTINGS = {
        "gamma": 1.0,
        "farms_seeds": 3,
        "farms_tiles": 256,
        "size_factor": True,
        "distortion": "model",
    }

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per layer, more for a large one."""
        if self.option(ctx, "distortion") not in ("model", "measured"):
            raise UserError(
                "unknown distortion", found=repr(self.option(ctx, "distortion")), fix="model or measured"
            )
        for name, most in (("farms_seeds", 100), ("farms_tiles", 65536)):
            if not 1 <= int(self.option(ctx, name)) <= most:
                raise UserError(f"{name} must be 1 to {most}", found=str(self.option(ctx, name)))
        return super().plan(ctx)

    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Alpha for every seed, the whole spectrum's numbers, and the distortion per format; one row of each."""
        most, measured = int(self.option(ctx, "farms_tiles")), self.option(ctx, "distortion") == "measured"
        whole = torch.from_numpy(unit_spectrum(ctx, unit)[0])
        plain = hill_alpha(whole), stable_rank(whole), spectral_entropy(whole)
        total, square, distortion = 0.0, 0.0, np.zeros(len(ctx.formats))
        for block in ctx.blocks(unit):
            total += float(block.sum(dtype=torch.float64))
            square += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            if measured:
                distortion += [squared_error(block, f, ctx.largest(unit)) for f in ctx.formats]
        if not measured:
            energy = square - total * total / unit.params  # n times the population variance
            distortion[:] = [energy * 2.0 ** (-2 * f.bits) for f in ctx.formats]
        if not self.option(ctx, "size_factor"):
            distortion /= unit.params
        alphas = self._alphas(ctx, unit, most, plain[0])
        arrays = {"alphas": alphas, "plain": np.array(plain), "distortion": distortion}
        return StepResult(arrays={name: a[None] for name, a in arrays.items()})

    def _alphas(self, ctx: MeasureContext, unit: QuantUnit, most: int, plain: float) -> np.ndarray:
        """(seeds,) PL_Alpha_Hill over the tiles that each seed picks."""
        seeds = int(self.option(ctx, "farms_seeds"))
        if min(unit.rows, unit.cols) < FARMS_TILE:
            return np.full(seeds, plain)
        picks = [
            farms_pick(
                unit.rows,
                unit.cols,
                torch.Generator().manual_seed(ctx.random_seed("farms", s, unit.key)),
                most,
            )
            for s in range(1 if farms_takes_all(unit.rows, unit.cols, most) else seeds)
        ]
        found = [tiles_hill(tiles) for tiles in farms_tiles(ctx.blocks(unit), picks)]
        return np.array(found + [found[-1]] * (seeds - len(found)))

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Alpha against the median over all units, which needs every layer."""
        chunks = chunks_by_layer(ctx.index.units)
        gamma = float(self.option(ctx, "gamma"))
        alphas = np.concatenate([parts[k]["alphas"] for k in chunks])  # (U, seeds)
        plain = np.concatenate([parts[k]["plain"] for k in chunks])  # (U, 3)
        distortion = np.concatenate([parts[k]["distortion"] for k in chunks])  # (U, F)
        units = [u for chunk in chunks.values() for u in chunk]
        seeds = alphas.shape[1]
        alpha = alphas.mean(1)
        stderr = alphas.std(1, ddof=1) / seeds**0.5 if seeds > 1 else np.full(len(alpha), np.nan)
        stderr[np.ptp(alphas, axis=1) == 0] = 0.0 if seeds > 1 else np.nan
        known = alpha[np.isfinite(alpha)]
        scale = (np.median(known) / alpha) ** gamma if known.size else np.full(len(alpha), np.nan)
        rows = []
        for i, unit in enumerate(units):
            damage = scale[i] * distortion[i]
            spread = damage * abs(gamma) * stderr[i] / alpha[i]  # first order in alpha's spread
            rows += [
                DamageRow(self.NAME, unit.key, f.name, float(d), float(e), seeds)
                for f, d, e in zip(ctx.formats, damage, spread)
            ]
            rows.append(
                DamageRow("alpha_hill", unit.key, NO_FORMAT, float(alpha[i]), float(stderr[i]), seeds)
            )
            rows += [
                DamageRow(name, unit.key, NO_FORMAT, float(v), count=min(unit.rows, unit.cols))
                for name, v in zip(_FREE[1:], plain[i])
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read, a Gram product and its eigenvalues per unit, and the FARMS tiles."""
        flops = 0.0
        for u in ctx.index.units:
            n, m = min(u.rows, u.cols), max(u.rows, u.cols)
            most = int(self.option(ctx, "farms_tiles"))
            tiles = (u.rows // 128) * (u.cols // 128)
            tiles = tiles if tiles <= most else most * int(self.option(ctx, "farms_seeds"))
            # A double precision eigensolver runs some 25 times below the rate of a float32 product.
            flops += 2.0 * m * n * n + 25 * 4 / 3 * n**3 + tiles * (2 + 25 * 4 / 3) * 128**3
        measured = self.option(ctx, "distortion") == "measured"
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            flops=flops,
            quantised=ctx.index.params * len(ctx.formats) if measured else 0,
        )

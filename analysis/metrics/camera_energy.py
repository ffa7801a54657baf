"""CAMERA: energy of micro-experts, the channels that gate, up and down of an expert share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.capture import layer_groups, watch_units
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.activation_error import relative_stderr
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.kernels.errors import UserError

__all__ = ["CameraEnergy", "micro_expert_bits"]

_BATCH_TOKENS = 2048
_BYTES = 1 << 28
_DOWN = ("down", "shared_down", "fc2")
_INTO = {"down": ("gate", "up", "gate_up"), "shared_down": ("shared_gate", "shared_up", "shared_gate_up"), "fc2": ("fc1",)}  # fmt: skip
_BITS = np.array([8.0, 4.0, 2.0])
_SHARES = np.array([0.1, 0.3, 0.6])


class CameraEnergy(Metric):
    """Energy of the micro-experts of every expert, shared expert or dense MLP.

        phi_i(t) = route(t) h_i(t),   E_i = ||w_down_i||^2 [ (1 - a) sum_t phi_i(t)^2 + a max_t phi_i(t)^2 ]
        camera_energy = (1/N) sum_i ||w_down_i||^2 sum_t phi_i(t)^2,   camera_score = sum_i E_i

    CAMERA (arXiv 2508.02322), the energy as its code computes it. h is the input of the down projection, so that
    micro-expert i is row i of gate and up and column i of down; a = ``camera_alpha`` (0.9 in the published run).
    All micro-experts of a layer are ranked together by E: ``camera_top_share`` = share of an expert's that are
    in the layer's top 10 %, ``camera_bits`` = mean bits of its micro-experts under CAMERA-Q's split (8, 4, 2 bits for
    10, 30, 60 %). The values stand at all projections of the expert. Experts that no token reaches are unknown and stay
    outside the ranking. ``count`` is tokens; standard error over sequences for the energy. E_i per micro-expert stays
    in the step's arrays (``energy``), units in the order of the step's down projections.
    """

    NAME = "camera_energy"
    TITLE = "Micro-expert energy"
    UNIT = "squared activation per token"
    SOURCE = "CAMERA (AAAI 2026, arXiv 2508.02322), micro-expert energy"
    NEEDS = "activations"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("camera_energy", "camera_score", "camera_top_share", "camera_bits")
    VERSION = 1
    SETTINGS = {"camera_alpha": 0.9}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Groups of layers.

        Raises:
            UserError: no layer has a projection back from an intermediate.
        """
        return list(self._groups(ctx))

    def _groups(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        down = [u for u in ctx.index.units if u.role in _DOWN]
        if not down:
            raise UserError(
                "no layer here has a down projection, so there are no micro-experts",
                found=ctx.index.model_type,
            )
        return layer_groups(down, _BYTES, lambda u: 16 * u.cols)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays energy (sum of cols), total (units,), stderr (units,), count (units,)."""
        units = self._groups(ctx)[key]
        alpha = float(self.option(ctx, "camera_alpha"))
        norm = {u.key: ctx.weight(u).double().square().sum(0) for u in units}  # (cols,)
        square = {u.key: torch.zeros(u.cols, dtype=torch.float64) for u in units}
        top = {u.key: torch.zeros(u.cols, dtype=torch.float64) for u in units}
        by_sequence = {u.key: np.zeros(len(ctx.calibration.tokens)) for u in units}
        count = dict.fromkeys(norm, 0)

        def watch(unit: str, x: Tensor, sequence: np.ndarray, weight: Tensor | None) -> None:
            phi = x.double().cpu()
            if weight is not None:
                phi = phi * weight.double().cpu().unsqueeze(-1)
            phi = phi.square_() if weight is not None else phi.square()
            count[unit] += len(phi)
            square[unit] += phi.sum(0)
            top[unit] = torch.maximum(top[unit], phi.amax(0))
            np.add.at(by_sequence[unit], sequence, (phi @ norm[unit]).numpy())

        watch_units(ctx, units, watch, _BATCH_TOKENS)
        total = np.array([by_sequence[u.key].sum() for u in units])
        spread = np.array([relative_stderr(by_sequence[u.key]) for u in units])
        energy = [norm[u.key] * ((1 - alpha) * square[u.key] + alpha * top[u.key]) for u in units]
        return StepResult(
            arrays={
                "energy": torch.cat(energy).numpy(),
                "total": total / ctx.calibration.size,
                "stderr": total / ctx.calibration.size * spread,
                "count": np.array([count[u.key] for u in units]),
            }
        )

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Ranks the micro-experts of each layer together."""
        layers: dict[int, list[tuple[QuantUnit, np.ndarray, tuple[float, float, int]]]] = {}
        for key, units in self._groups(ctx).items():
            part = parts[key]
            ends = np.cumsum([u.cols for u in units])
            for i, u in enumerate(units):
                energy = part["energy"][ends[i] - u.cols : ends[i]]
                found = float(part["total"][i]), float(part["stderr"][i]), int(part["count"][i])
                layers.setdefault(u.layer, []).append((u, energy, found))
        return [r for members in layers.values() for r in self._rows(ctx, members)]

    def _rows(
        self, ctx: MeasureContext, members: Sequence[tuple[QuantUnit, np.ndarray, tuple[float, float, int]]]
    ) -> list[DamageRow]:
        known = [m for m in members if m[2][2] > 0]
        bits, high = (
            micro_expert_bits(np.concatenate([e for _, e, _ in known]))
            if known
            else (np.empty(0), np.empty(0))
        )
        rows, at = [], 0
        for down, energy, (total, spread, count) in members:
            peers = [
                u.key
                for u in ctx.index.units
                if (u.layer, u.expert) == (down.layer, down.expert)
                and (u.key == down.key or u.role in _INTO[down.role])
            ]
            if not count:
                rows += [r for m in self.EMITS for p in peers for r in unknown_rows(m, p, [NO_FORMAT])]
                continue
            own = slice(at, at + len(energy))
            at += len(energy)
            values = (
                (total, spread),
                (float(energy.sum()), float("nan")),
                (float(high[own].mean()), float("nan")),
                (float(bits[own].mean()), float("nan")),
            )
            rows += [
                DamageRow(m, p, NO_FORMAT, v, e, count)
                for p in peers
                for m, (v, e) in zip(self.EMITS, values)
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, group by group, and one read of the down projections."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )


def micro_expert_bits(energy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each micro-expert by rank of its energy (n,), and whether it is in the top group (bool)."""
    rank = np.empty(len(energy), int)
    rank[np.argsort(-energy, kind="stable")] = np.arange(len(energy))
    edges = np.round(np.cumsum(_SHARES) * len(energy))
    group = np.searchsorted(edges[:-1], rank, side="right")
    return _BITS[group], group == 0

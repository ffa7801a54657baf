"""HAWQ-V2: average Hessian trace x weight error, with a standard-error stop.

Hutchinson's estimator z^T H z with Rademacher z (Dong et al. 2020, HAWQ-V2, eq. 8; Hutchinson 1990). A probe that
is non-zero in all layers at once is unbiased but carries the off-diagonal blocks of every other layer as noise, so
that small traces would need about a thousand probes. Here z lives in one layer (``probe_group`` "layer"), in one
unit ("unit"), or in every n-th layer (a number), and a unit whose trace is known well enough leaves the probe.

With ``control`` "fisher" each probe is compared with the same probe on the Gauss-Newton part G (the Fisher
information of the same text), whose trace one ordinary backward pass with random signs estimates for all units:
    tr H ~ mean(z^T H z - b z^T G z) + b tr G,  b by regression over the probes of the unit.

Cost: per group one forward, one backward that keeps its graph, and about 1.5 backwards per probe through the layers
from the group on, 4 with the control. Second derivatives need the unfused attention, chosen for the time being.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.measure import MeasureContext

__all__ = ["HawqTrace", "Trace", "controlled_mean", "over_batches"]


@dataclass(frozen=True, slots=True)
class Trace:
    """Traces of the units of a group, (U,) each; ``known`` = a token reached the unit."""

    mean: np.ndarray
    stderr: np.ndarray
    probes: np.ndarray
    known: np.ndarray


class HawqTrace(Metric):
    """1/2 (Tr H / n) ||Q(W) - W||^2, H the Hessian of the mean next-token loss. ``count`` = probes.

    ``stderr`` is that of the probes on the sequences used, or, with several batches, over batches; a negative trace
    (the Hessian is indefinite) stays negative in ``hessian_trace`` and counts as 0 damage.

    Settings:
        trace_tol: stop when stderr / |mean| of a unit is below.
        min_probes, max_probes: bounds on the probes of a unit.
        trace_tokens: tokens of calibration text in a batch.
        probe_group: ``layer``, ``unit``, or n >= 2 for every n-th layer together.
        control: ``none`` or ``fisher``; control_draws: backward passes for the Fisher traces.
        hessian_batches: disjoint batches of text; the traces are averaged.
        hessian_spread: standard deviations over batches added to the mean in the damage (Q-BERT, Shen et al.
            2020, eq. 3: 1).
    """

    NAME = "hawq_trace"
    TITLE = "HAWQ-V2 trace x error"
    UNIT = "nats/token"
    SOURCE = "HAWQ-V2 (Dong et al. 2020), eq. 8 and Omega of section 3.1"
    NEEDS = "gradients"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("hawq_trace", "hessian_trace")
    VERSION = 1
    SETTINGS: ClassVar = {
        "trace_tol": 0.1, "min_probes": 8, "max_probes": 32, "trace_tokens": 256, "probe_group": "layer",
        "control": "none", "control_draws": 16, "hessian_batches": 1, "hessian_spread": 0.0, "quantizer": "rtn",
    }  # fmt: skip

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per probe group."""
        if not ctx.formats:
            raise UserError("HAWQ-V2 needs formats", fix="--formats int{2,3,4}-g64")
        if self.option(ctx, "control") not in ("none", "fisher"):
            raise UserError(
                "unknown control variate", found=str(ctx.settings["control"]), fix="none or fisher"
            )
        return list(self._groups(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Traces and damages of one group, as rows."""
        from bitatlas.analysis.hessian import hessian_batches

        units = self._groups(ctx)[key]
        many = int(self.option(ctx, "hessian_batches"))
        batches = hessian_batches(ctx, int(self.option(ctx, "trace_tokens")), many)
        found = [self._traces(ctx, units, (key, b), ids) for b, ids in enumerate(batches)]
        mean, stderr, spread = over_batches(found)
        rows = []
        for i, unit in enumerate(units):
            seen = any(t.known[i] for t in found)
            count = sum(int(t.probes[i]) for t in found if t.known[i])
            trace, error = (float(mean[i]), float(stderr[i])) if seen else (float("nan"), float("nan"))
            rows.append(DamageRow("hessian_trace", unit.key, NO_FORMAT, trace, error, count))
            level = max(trace, 0.0) + float(self.option(ctx, "hessian_spread")) * spread[i]
            weight = ctx.weight(unit)
            for fmt in ctx.formats:
                error_sq = float((ctx.candidate(unit, fmt) - weight).double().square().sum())
                scale = 0.5 * error_sq / unit.params
                value = scale * level if seen else float("nan")
                rows.append(DamageRow(self.NAME, unit.key, fmt.name, value, scale * error, count))
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """Expected at half way between the bounds on the probes."""
        from bitatlas.analysis.hessian import hessian_cost

        probes = 0.5 * (int(self.option(ctx, "min_probes")) + int(self.option(ctx, "max_probes")))
        controlled = self.option(ctx, "control") == "fisher"
        passes = 1 + (4.0 if controlled else 1.5) * probes
        passes += int(self.option(ctx, "control_draws")) * controlled
        tokens = int(self.option(ctx, "trace_tokens")) * int(self.option(ctx, "hessian_batches"))
        return hessian_cost(ctx, self._groups(ctx), tokens, passes)

    def _groups(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        """Step key -> units that share a probe."""
        from bitatlas.analysis.hessian import probe_groups

        return probe_groups(ctx.index.units, self.option(ctx, "probe_group"))

    def _traces(
        self, ctx: MeasureContext, units: tuple[QuantUnit, ...], label: tuple[str, int], ids: Tensor
    ) -> Trace:
        """Probes on one batch until every unit has settled."""
        import torch

        from bitatlas.analysis.hessian import curvature

        tol = float(self.option(ctx, "trace_tol"))
        least, most = int(self.option(ctx, "min_probes")), int(self.option(ctx, "max_probes"))
        controlled = self.option(ctx, "control") == "fisher"
        labels: tuple[object, ...] = label if label[1] else label[:1]
        samples: list[list[tuple[float, float]]] = [[] for _ in units]
        fisher = np.zeros((0, len(units)))
        active = list(range(len(units)))
        with curvature(ctx.loaded, [u.key for u in units], ids.to(ctx.loaded.device)) as c:
            if controlled:
                g = torch.Generator().manual_seed(ctx.random_seed(self.NAME, *labels, "control"))
                fisher = np.array([c.fisher_traces(g) for _ in range(int(self.option(ctx, "control_draws")))])
            for probe in range(most):
                generator = torch.Generator().manual_seed(ctx.random_seed(self.NAME, *labels, probe))
                signs = {}
                for i in active:
                    shape = (units[i].rows, units[i].cols)
                    signs[i] = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
                z = c.vectors(signs)
                hz = c.product(z)
                gz = c.gauss_newton(z) if controlled else ()
                for i in active:
                    zi = c.view(i, z).double()
                    other = float((zi * c.view(i, gz).double()).sum()) if controlled else 0.0
                    samples[i].append((float((zi * c.view(i, hz).double()).sum()), other))
                if probe + 1 >= least:
                    active = [i for i in active if not _settled(samples[i], fisher[:, i], tol)]
                if not active:
                    break
            known = c.known
        estimates = np.array([controlled_mean(np.array(s), fisher[:, i]) for i, s in enumerate(samples)])
        return Trace(estimates[:, 0], estimates[:, 1], np.array([len(s) for s in samples]), known)


def controlled_mean(samples: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the first column, with the second as control variate.

    Args:
        samples: (m, 2) a quantity and its control on the same probes.
        control: (D,) independent estimates of the control's mean; empty = no control.
    """
    y, x = samples.T
    m = len(y)
    if m < 2:
        return float(y.mean()), float("nan")
    plain = float(y.mean()), float(y.std(ddof=1) / np.sqrt(m))
    if len(control) < 2 or m < 4 or x.std() == 0:
        return plain
    dx, dy, own = x - x.mean(), y - y.mean(), control.var(ddof=1) / len(control)
    # Minimises the variance of the difference plus that of the control's own mean.
    slope = float(dx @ dy / (dx @ dx + (m - 1) * m * own))
    error = np.sqrt(((dy - slope * dx) ** 2).sum() / (m - 2) / m + slope**2 * own)
    return (
        (float(y.mean() - slope * (x.mean() - control.mean())), float(error)) if error < plain[1] else plain
    )


def over_batches(found: list[Trace]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, its standard error and the standard deviation over batches, (U,) each; unreached batches count as 0."""
    values = np.array([np.where(t.known, t.mean, 0.0) for t in found])
    if len(found) == 1:
        return values[0], found[0].stderr, np.zeros(values.shape[1])
    spread = values.std(0, ddof=1)
    return values.mean(0), spread / np.sqrt(len(found)), spread


def _settled(samples: list[tuple[float, float]], control: np.ndarray, tol: float) -> bool:
    mean, error = controlled_mean(np.array(samples), control)
    return bool(error <= tol * abs(mean))

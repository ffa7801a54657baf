"""HAWQ-V2: average Hessian trace x weight error, with a standard-error stop.

Hutchinson's estimator z^T H z with Rademacher z (Dong et al. 2020, HAWQ-V2, eq. 8; Hutchinson 1990). A probe that
is non-zero in all layers at once is unbiased but carries the off-diagonal blocks of every other layer as noise, so
that small traces would need about a thousand probes; here z lives in one layer's units only (``probe_group``
"layer") or in one unit ("unit"), and a unit whose trace is known well enough leaves the probe.

Cost: per group one forward, one backward that keeps its graph, and about 1.5 backwards per probe through the layers
from the group on. Second derivatives need the unfused attention,
which is chosen for the time being.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.measure import MeasureContext

__all__ = ["HawqTrace"]


class HawqTrace(Metric):
    """1/2 (Tr H / n) ||Q(W) - W||^2, H the Hessian of the mean next-token loss. ``count`` = probes.

    ``stderr`` is that of the probes on the sequences used; a negative trace (the Hessian is indefinite) stays
    negative in ``hessian_trace`` and counts as 0 damage.

    Settings:
        trace_tol: stop when stderr / |mean| of a unit is below.
        min_probes, max_probes: bounds on the probes of a unit.
        trace_tokens: tokens of calibration text used.
        probe_group: ``layer`` or ``unit``.
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
    }  # fmt: skip

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per probe group."""
        if not ctx.formats:
            raise UserError("HAWQ-V2 needs formats", fix="--formats int{2,3,4}-g64")
        return list(self._groups(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Traces and damages of one group, as rows."""
        units = self._groups(ctx)[key]
        mean, error, count, known = self._traces(ctx, units, key)
        rows = []
        for i, unit in enumerate(units):
            trace = float(mean[i]) if known[i] else float("nan")
            spread = float(error[i]) if known[i] else float("nan")
            rows.append(
                DamageRow("hessian_trace", unit.key, NO_FORMAT, trace, spread, int(count[i] * known[i]))
            )
            weight = ctx.weight(unit)
            for fmt in ctx.formats:
                error_sq = float((ctx.candidate(unit, fmt) - weight).double().square().sum())
                scale = 0.5 * error_sq / unit.params
                value = scale * max(trace, 0.0) if known[i] else float("nan")
                rows.append(
                    DamageRow(self.NAME, unit.key, fmt.name, value, scale * spread, int(count[i] * known[i]))
                )
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """Expected at half way between the bounds on the probes."""
        groups = self._groups(ctx)
        layers = max(ctx.index.n_layers, 1)
        share = sum(
            1.0 if u[0].layer < 0 else (layers - u[0].layer) / layers for u in groups.values()
        )  # graphs reach from the group to the loss only
        tokens = int(self.option(ctx, "trace_tokens"))
        probes = 0.5 * (int(self.option(ctx, "min_probes")) + int(self.option(ctx, "max_probes")))
        return Cost(
            steps=len(groups),
            bytes_read=2 * 2 * ctx.index.params,
            forward_tokens=tokens * len(groups),
            backward_tokens=int(tokens * share * (1 + 1.5 * probes)),
            quantised=len(ctx.formats) * ctx.index.params,
        )

    def _groups(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        """Step key -> units that share a probe. Units inside one fused parameter stay together."""
        by_unit = {"unit": True, "layer": False}.get(str(self.option(ctx, "probe_group")))
        if by_unit is None:
            raise UserError(
                "unknown probe group", found=str(ctx.settings["probe_group"]), fix="layer or unit"
            )
        groups: dict[str, list[QuantUnit]] = {}
        for u in ctx.index.units:
            alone = by_unit or u.layer < 0
            groups.setdefault(u.key if alone else f"layer {u.layer}", []).append(u)
        return {key: tuple(units) for key, units in groups.items()}

    def _traces(
        self, ctx: MeasureContext, units: tuple[QuantUnit, ...], key: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard error, probes and "a token reached it" of every unit's trace, (len(units),) each."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        loaded, tol = ctx.loaded, float(self.option(ctx, "trace_tol"))
        least, most = int(self.option(ctx, "min_probes")), int(self.option(ctx, "max_probes"))
        length = ctx.calibration.tokens.shape[1]
        wanted = max(1, int(self.option(ctx, "trace_tokens")) // length)
        ids = torch.from_numpy(ctx.calibration.tokens[:wanted]).to(loaded.device)
        samples: list[list[float]] = [[] for _ in units]
        active = list(range(len(units)))
        handles = [loaded.handle(u.key) for u in units]
        with sdpa_kernel(SDPBackend.MATH), loaded.requires_grad(u.key for u in units) as params:
            position = {id(p): i for i, p in enumerate(params)}
            with torch.enable_grad():
                logits = loaded.logits(ids)[:, :-1]  # (B, T - 1, V)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)

            def at(i: int, tensors: Sequence[Tensor]) -> Tensor:
                return handles[i].view(tensors[position[id(handles[i].param)]])

            known = np.array([bool(at(i, gradients).detach().abs().sum() > 0) for i in range(len(units))])
            for probe in range(most):
                generator = torch.Generator().manual_seed(ctx.random_seed(self.NAME, key, probe))
                z = [torch.zeros_like(p) for p in params]
                for i in active:
                    view = at(i, z)
                    signs = torch.randint(0, 2, view.shape, generator=generator, dtype=torch.int8) * 2 - 1
                    view.copy_(signs)
                hz = torch.autograd.grad(gradients, params, z, retain_graph=True, materialize_grads=True)
                for i in active:
                    samples[i].append(float((at(i, z).double() * at(i, hz).double()).sum()))
                if probe + 1 >= least:
                    active = [i for i in active if not _settled(samples[i], tol)]
                if not active:
                    break
        mean = np.array([np.mean(s) for s in samples])
        count = np.array([len(s) for s in samples])
        error = np.array([np.std(s, ddof=1) / np.sqrt(len(s)) if len(s) > 1 else np.nan for s in samples])
        return mean, error, count, known


def _settled(samples: list[float], tol: float) -> bool:
    error = np.std(samples, ddof=1) / np.sqrt(len(samples))
    return bool(error <= tol * abs(np.mean(samples)))

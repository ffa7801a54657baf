"""Fisher projection: one backward pass per probe prices every unit in every format, interactions included.

KL(p || p') of a weight change d is 1/2 d^T F d + O(d^3) per sequence, F = E[G G^T] with G from `analysis.fisher.probes`.
Three values come from the same pass:

- ``fisher_projection``: 1/(2T) mean <G, Q(W) - W>^2, unbiased, stderr over sequences;
- ``fisher_trace``: 1/2 (mean ||G||^2 / (T n)) ||Q(W) - W||^2, the isotropic form (HAWQ-V2's with the Fisher);
- ``fisher``: the two combined (`analysis.fisher.posterior`); the one to solve with.

The projections of all probes stay in the run's part files; `analysis.fisher.matrix.load_probes` reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix, pack_names
from bitatlas.analysis.fisher.posterior import posterior, trace_form
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.schema import DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.probes import ProbePass
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FisherProjection"]

_STEP_TOKENS = 512  # a few seconds of forward and backward passes on two cores


class FisherProjection(Metric):
    """One backward pass per probe, all units and formats together. ``count`` = tokens that passed through the unit."""

    NAME = "fisher_projection"
    TITLE = "Fisher projection"
    UNIT = "nats/token"
    SOURCE = "second-order KL with sampled labels (Martens 2020, eq. 10); <G, dW> for all units and formats in one pass"
    NEEDS = "gradients"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("fisher_projection", "fisher_trace", "fisher")
    VERSION = 1
    SETTINGS: ClassVar = {"draws": 2, "score": "signs", "stack_gib": 6.0}

    def __init__(self) -> None:
        self._pass: tuple[MeasureContext, ProbePass] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences, ``sequences 0-3``."""
        if not ctx.formats:
            raise UserError("the Fisher projection needs formats", fix="--formats int{2,3,4,5,6,8}-g64")
        sequences, length = _shape(ctx)
        per_step = max(1, _STEP_TOKENS // length)
        return [
            f"sequences {start}-{min(start + per_step, sequences) - 1}"
            for start in range(0, sequences, per_step)
        ]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """The probes of a chunk of sequences, as arrays."""
        import torch

        first, last = (int(n) for n in key.split()[1].split("-"))
        units = ctx.index.units
        probes = self._probe_pass(ctx)
        draws = int(self.option(ctx, "draws"))
        a, gsq, reached, sequence = [], [], [], []
        for s in range(first, last + 1):
            tokens = torch.from_numpy(ctx.calibration.tokens[s])
            seeds = [ctx.random_seed(self.NAME, s, d) for d in range(draws)]
            chunk = probes.run(tokens, seeds)
            a.append(chunk.a)
            gsq.append(chunk.gsq)
            reached.append(np.broadcast_to(chunk.reached, chunk.gsq.shape))
            sequence += [s] * draws
        norm_sq = np.stack([probes.store.norm_sq(u.key).numpy() for u in units])
        return StepResult(
            arrays={
                "a": np.concatenate(a),
                "gsq": np.concatenate(gsq),
                "reached": np.concatenate(reached),
                "sequence": np.array(sequence, np.int64),
                "tokens": np.full(len(sequence), ctx.calibration.tokens.shape[1], np.int64),
                "norm_sq": norm_sq,
                "names": pack_names([u.key for u in units], [f.name for f in ctx.formats]),
            }
        )

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """The three tables from all probes."""
        probes = ProbeMatrix.from_parts(parts)
        units = ctx.index.units
        params = np.array([u.params for u in units], np.float64)
        draws = max(1, int(self.option(ctx, "draws")))
        count = probes.reached.sum(0) // draws  # (U,) tokens
        asq, _, tokens = probes.by_sequence
        per_sequence = asq / (2 * tokens[:, None, None])  # (N, U, F)
        n = len(per_sequence)
        stderr = per_sequence.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(asq.shape[1:], np.nan)
        trace, trace_stderr = trace_form(probes, params)
        best = posterior(probes, params, [u.role for u in units], pools=[_pool(u) for u in units])
        tables = {
            "fisher_projection": (probes.damage(), stderr),
            "fisher_trace": (trace, trace_stderr),
            "fisher": (best.value, best.stderr),
        }
        rows = []
        for metric, (value, error) in tables.items():
            for i, unit in enumerate(units):
                for f, name in enumerate(probes.formats):
                    known = count[i] > 0
                    rows.append(
                        DamageRow(
                            metric, unit.key, name,
                            float(value[i, f]) if known else float("nan"),
                            float(error[i, f]) if known else float("nan"),
                            int(count[i]),
                        )
                    )  # fmt: skip
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward per sequence, one backward per draw, one rounding of every weight to every format."""
        sequences, length = _shape(ctx)
        tokens, draws = sequences * length, int(self.option(ctx, "draws"))
        formats, params = len(ctx.formats), ctx.index.params
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * 2 * params,  # once into the model, once for the errors
            forward_tokens=tokens,
            backward_tokens=tokens * draws,
            flops=2.0 * formats * params * sequences * draws,
            quantised=formats * params,
        )

    def _probe_pass(self, ctx: MeasureContext) -> ProbePass:
        """The pass of this process; the errors of the weights are computed once."""
        from bitatlas.analysis.fisher.deltas import DeltaStore
        from bitatlas.analysis.fisher.probes import SCORES, ProbePass

        if self._pass is None or self._pass[0] is not ctx:
            score = str(self.option(ctx, "score"))
            if score not in SCORES:
                raise UserError("unknown score for the probes", found=score, fix=" or ".join(SCORES))
            store = DeltaStore(
                lambda key: ctx.weight(ctx.unit_by_key[key]),
                lambda key, f: ctx.candidate(ctx.unit_by_key[key], ctx.formats[f]),
                len(ctx.formats),
                limit_bytes=int(float(self.option(ctx, "stack_gib")) * 2**30),
                device=ctx.device,
            )
            self._pass = ctx, ProbePass(ctx.loaded, ctx.index.unit_keys(), store, score)
        return self._pass[1]


def _shape(ctx: MeasureContext) -> tuple[int, int]:
    """(sequences, tokens of each): the calibration set's where it has been made, else what was asked for."""
    made = ctx.__dict__.get("calibration")
    return made.tokens.shape if made is not None else (-(-ctx.tokens // ctx.seq_len), ctx.seq_len)


def _pool(unit: QuantUnit) -> tuple[int, str] | None:
    """Experts of one layer and projection: what a rarely reached one is shrunk towards."""
    return (unit.layer, unit.role) if unit.expert >= 0 else None

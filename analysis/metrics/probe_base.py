"""What metrics made of gradient probes share: groups of layers, chunks of sequences, settings, cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bitatlas.analysis.fisher.matrix import ratio_stderr
from bitatlas.analysis.fisher.parts import NO_PROBES, Joined, join_parts, pack_names
from bitatlas.analysis.gradient_groups import (
    ALL_UNITS,
    default_bytes,
    gradient_groups,
    units_of_group,
)
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.schema import DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.deltas import DeltaStore
    from bitatlas.analysis.fisher.probes import ProbePass
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["PROBE_LIMITS", "PROBE_SETTINGS", "ProbeMetric", "damage_rows", "ratio_stderr", "sequences_of"]

_STEP_TOKENS = 512  # a few seconds of forward and backward passes on two cores

PROBE_SETTINGS: dict[str, Any] = {
    "draws": 2, "quantizer": "rtn", "score": "signs", "group_layers": 0, "gradient_bytes": 0, "dtype": "",
    "tokens": "all", "answer_marker": "", "answer_end": "", "least_weight": 1.0, "most_weight": 3.0,
}  # fmt: skip
"""Common settings.

draws: backward passes per sequence. quantizer: how the codes are chosen whose damage is measured. score: see `analysis.fisher.probes`.
group_layers: layers whose gradients exist together; 0 = as many as fit into gradient_bytes, which is half of the
    machine's memory beside the model when 0. The numbers do not depend on it.
dtype: ``bfloat16`` runs the model in it; errors and products stay float32. "" = the context's (float32).
tokens and the rest: see `analysis.token_weights`.
"""

PROBE_LIMITS: dict[str, tuple[Any, ...]] = {
    "dtype": ("", "float32", "bfloat16", "float16"), "tokens": ("all", "answer", "attention"),
}  # fmt: skip


class ProbeMetric(Metric):
    """Probes of all sequences for one group of layers after the other, as arrays; a subclass reduces them in ``finish``."""

    NEEDS = "gradients"
    PER_FORMAT = True
    SQUARE: ClassVar[bool] = False
    CE: ClassVar[bool] = False
    """One more probe per sequence, draw -1: the gradient of the cross-entropy on the text itself."""
    SCORES: ClassVar[tuple[str, ...]] = ("signs", "labels")
    SETTINGS: ClassVar = PROBE_SETTINGS
    LIMITS: ClassVar = PROBE_LIMITS

    def __init__(self) -> None:
        self._pass: tuple[MeasureContext, str, ProbePass] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences, ``sequences 0-3``, for each group of layers: ``layers 0-5: sequences 0-3``."""
        if not ctx.formats:
            raise UserError(f"the metric {self.NAME} needs formats", fix="--formats int{2,3,4,5,6,8}-g64")
        if self.option(ctx, "score") not in self.SCORES:
            raise UserError("unknown score for the probes", found=str(self.option(ctx, "score")),
                            fix=" or ".join(self.SCORES))  # fmt: skip
        sequences, length = sequences_of(ctx)
        per_step = max(1, _STEP_TOKENS // length)
        chunks = [
            f"sequences {start}-{min(start + per_step, sequences) - 1}"
            for start in range(0, sequences, per_step)
        ]
        return [
            chunk if name == ALL_UNITS else f"{name}: {chunk}"
            for name in self._groups(ctx)
            for chunk in chunks
        ]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """The probes of a chunk of sequences, as arrays."""
        import torch

        from bitatlas.analysis.token_weights import token_weights

        group, _, chunk = key.rpartition(": ")
        first, last = (int(n) for n in chunk.split()[1].split("-"))
        units = units_of_group(ctx.index.units, group or ALL_UNITS)
        probes = self._probe_pass(ctx, group or ALL_UNITS, units)
        weights = token_weights(ctx, self.token_options(ctx), probes.loaded)
        draws, length = int(self.option(ctx, "draws")), ctx.calibration.tokens.shape[1]
        rows: dict[str, list[Any]] = {n: [] for n in ("a", "gsq", "reached", "sequence", "draw", "tokens")}
        for s in range(first, last + 1):
            w = np.ones(length, np.float32) if weights is None else weights[s].copy()
            if self.CE:
                w[-1] = 0.0  # the last position predicts nothing that the text could answer
            if not w.any():
                continue
            plain = weights is None and not self.CE
            got = probes.run(
                torch.from_numpy(ctx.calibration.tokens[s]),
                [ctx.random_seed("fisher_projection", s, d) for d in range(draws)],
                None if plain else torch.from_numpy(w),
                self.CE,
            )
            n = len(got.gsq)
            rows["a"].append(got.a)
            rows["gsq"].append(got.gsq)
            rows["reached"].append(np.broadcast_to(got.reached, got.gsq.shape))
            rows["sequence"] += [s] * n
            rows["draw"] += [*range(draws), -1][:n]
            rows["tokens"] += [float(w.sum(dtype=np.float64))] * n
        place = {u.key: i for i, u in enumerate(ctx.index.units)}
        shape = (0, len(units), len(ctx.formats))
        empty = {
            "a": np.zeros(shape, np.float32),
            "gsq": np.zeros(shape[:2]),
            "reached": np.zeros(shape[:2], np.int64),
        }
        return StepResult(
            arrays={name: np.concatenate([zero, *rows[name]]) for name, zero in empty.items()}
            | {
                "sequence": np.array(rows["sequence"], np.int64),
                "draw": np.array(rows["draw"], np.int64),
                "tokens": np.array(rows["tokens"], np.float64),
                "norm_sq": np.stack([probes.store.norm_sq(u.key).numpy() for u in units]),
                "names": pack_names([u.key for u in units], [f.name for f in ctx.formats]),
                "place": np.array([place[u.key] for u in units], np.int64),
            }
            # Squares are no projections: nobody shall take them for the probes of an interaction term.
            | ({NO_PROBES: np.ones(1, np.int8)} if self.SQUARE or self.CE else {})
        )

    def token_options(self, ctx: MeasureContext) -> dict[str, Any]:
        """Settings of `analysis.token_weights`."""
        names = ("tokens", "answer_marker", "answer_end", "least_weight", "most_weight")
        return {name: self.option(ctx, name) for name in names}

    def joined(self, parts: Parts) -> Joined:
        """All probes of the run."""
        return join_parts(parts)

    def square_rows(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Rows of a metric whose probes hold <G^2, dW^2>: half their mean per token, stderr over sequences."""
        j = self.joined(parts)
        sequences, at = np.unique(j.sequence, return_inverse=True)
        sums, weight = np.zeros((len(sequences), *j.a.shape[1:])), np.zeros(len(sequences))
        np.add.at(sums, at, j.a.astype(np.float64))
        np.add.at(weight, at, j.tokens)
        count = j.reached.sum(0) // max(1, int(self.option(ctx, "draws")))
        value = 0.5 * sums.sum(0) / weight.sum()
        return damage_rows(self.NAME, j, value, 0.5 * ratio_stderr(sums, weight), count)

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward per sequence and group, one backward per draw down to the group, one rounding of every weight."""
        sequences, length = sequences_of(ctx)
        tokens, draws = sequences * length, int(self.option(ctx, "draws")) + self.CE
        formats, params, groups = len(ctx.formats), ctx.index.params, self._groups(ctx)
        layers = max(ctx.index.n_layers, 1)
        # Below a group's first layer nothing is differentiated; above its last, inputs only: half of a backward.
        share = 0.0
        for units in groups.values():
            first = max(0, min((u.layer for u in units), default=0))
            inside = len({u.layer for u in units if u.layer >= 0}) / layers
            share += inside + 0.5 * max(0.0, 1 - first / layers - inside)
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * 2 * params,  # once into the model, once for the errors
            forward_tokens=tokens * len(groups),
            backward_tokens=int(tokens * draws * min(max(share, 1.0), len(groups))),
            flops=2.0 * formats * params * sequences * draws,
            quantised=formats * params,
        )

    def _groups(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        limit = int(float(self.option(ctx, "gradient_bytes"))) or default_bytes(ctx)
        layers = int(self.option(ctx, "group_layers"))
        return gradient_groups(ctx.index.units, limit, lambda u: self._unit_bytes(ctx, u), layers)

    def _unit_bytes(self, ctx: MeasureContext, unit: QuantUnit) -> float:
        """The errors of all formats in half precision, and a gradient."""
        return float((2 * len(ctx.formats) + 4) * unit.params)

    def _store(self, ctx: MeasureContext, units: tuple[QuantUnit, ...], limit: int) -> DeltaStore:
        """What gradients are multiplied by."""
        from bitatlas.analysis.fisher.deltas import DeltaStore

        return DeltaStore(
            lambda key: ctx.weight(ctx.unit_by_key[key]),
            lambda key, f: ctx.candidate(ctx.unit_by_key[key], ctx.formats[f]),
            len(ctx.formats),
            limit_bytes=limit,
            device=ctx.device,
            square=self.SQUARE,
        )

    def _probe_pass(self, ctx: MeasureContext, group: str, units: tuple[QuantUnit, ...]) -> ProbePass:
        """The pass over a group in this process; the errors of its weights are computed once."""
        from bitatlas.analysis.fisher.probes import ProbePass

        if self._pass is None or self._pass[0] is not ctx or self._pass[1] != group:
            self._pass = None  # the errors of the last group make room
            limit = int(float(self.option(ctx, "gradient_bytes"))) or default_bytes(ctx)
            loaded = ctx.loaded_in(str(self.option(ctx, "dtype")))
            store = self._store(ctx, units, limit)
            keys = [u.key for u in units]
            self._pass = ctx, group, ProbePass(loaded, keys, store, str(self.option(ctx, "score")))
        return self._pass[2]


def damage_rows(
    metric: str,
    joined: Joined,
    value: np.ndarray,
    stderr: np.ndarray,
    count: np.ndarray,
    floor: np.ndarray | None = None,
) -> list[DamageRow]:
    """Rows of a (U, F) table with the formats' noise floors (F,); unknown where ``count`` (U,) is 0."""
    return [
        DamageRow(
            metric, unit, name,
            float(value[i, f]) if count[i] else float("nan"),
            float(stderr[i, f]) if count[i] else float("nan"), int(count[i]),
            0.0 if floor is None else float(floor[f]),
        )
        for i, unit in enumerate(joined.units) for f, name in enumerate(joined.formats)
    ]  # fmt: skip


def sequences_of(ctx: MeasureContext) -> tuple[int, int]:
    """(sequences, tokens of each): the calibration set's where it has been made, else what was asked for."""
    made = ctx.__dict__.get("calibration")
    return made.tokens.shape if made is not None else (-(-ctx.tokens // ctx.seq_len), ctx.seq_len)

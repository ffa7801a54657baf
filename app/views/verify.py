"""Verify: was the prediction right? Allocations and their verifications in, a frozen view out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bitatlas.analysis.schema import MEASURED_KL
from bitatlas.cache.plans import PlanInfo
from bitatlas.solvers import SEARCHERS

__all__ = ["AnswersView", "VerifiedRow", "VerifyView", "build_answers", "build_verify"]


@dataclass(frozen=True, slots=True)
class VerifiedRow:
    """One allocation, measured. KL in nats per token; flips is the share of tokens whose most likely successor changed."""

    allocation: str
    label: str
    metric: str
    bits_per_weight: float
    weights_bytes: int
    predicted: float
    kl_mean: float
    kl_stderr: float
    kl_p50: float
    kl_p99: float
    flips: float
    ppl_before: float
    ppl_after: float
    floor: float
    tokens: int
    text: str
    predicts_kl: bool
    quantizer: str = "rtn"
    packed: str = ""

    @property
    def ratio(self) -> float:
        """Predicted / measured; NaN when nothing predicted a KL, as where a search measured its own."""
        return self.predicted / self.kl_mean if self.predicts_kl and self.kl_mean > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class VerifyView:
    """Everything the Verify page shows: rows best first, the floor, and the answer in words."""

    title: str
    detail: str
    rows: tuple[VerifiedRow, ...]
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AnswersView:
    """Original and packed model side by side. ``rows``: prompt, original, packed, and what changed, in words."""

    title: str
    detail: str
    rows: tuple[dict[str, str], ...]


def build_answers(result: Mapping[str, Any]) -> AnswersView:
    """From the result of an ``answers`` job; changed refusals first, then other differences."""
    rows = []
    for r in result["answers"]:
        change = "same"
        if r["original_refuses"] != r["packed_refuses"]:
            change = "refuses now" if r["packed_refuses"] else "no longer refuses"
        elif not r["same"]:
            change = "differs"
        rows.append({"change": change, **{k: str(r[k]) for k in ("prompt", "original", "packed")}})
    order = {"no longer refuses": 0, "refuses now": 1, "differs": 2, "same": 3}
    rows.sort(key=lambda r: order[r["change"]])
    differ = sum(r["change"] != "same" for r in rows)
    tail = result.get("tail") or []
    words = "verify the folder to see the tail of its KL"
    if tail:
        words = (
            f"on held-out text one token in a hundred moves by {tail[0]['kl_p99']:.3g} nats or more (mean "
            f"{tail[0]['kl_mean']:.3g}), and {tail[0]['flips']:.1%} of the most likely tokens change"
        )
    title = f"{differ} of {len(rows)} answers differ; {result['changed_refusals']} refusals changed"
    return AnswersView(
        title, f"Greedy answers; {words}. Refusals are found by their first words, in English.", tuple(rows)
    )


def build_verify(
    allocations: Mapping[str, PlanInfo],
    verifications: Iterable[Mapping[str, Any]],
    kl_metrics: frozenset[str],
) -> VerifyView:
    """Join what was predicted with what was measured.

    Args:
        allocations: id -> what is stored about it.
        verifications: rows of the store, newest first; the newest one of each (allocation, text, quantiser, packed folder) is shown.
        kl_metrics: metrics whose sum is a KL in nats per token; only these can be right or wrong in scale.
    """
    rows: dict[tuple[str, ...], VerifiedRow] = {}
    for v in verifications:
        allocation = allocations.get(str(v["allocation"]))
        quantizer, packed = str(v.get("quantizer") or "rtn"), str(v.get("packed") or "")
        key = (str(v["allocation"]), str(v.get("text", "")), quantizer, packed)
        if allocation is None or key in rows:
            continue
        rows[key] = VerifiedRow(
            allocation=key[0],
            label=_label(allocation),
            metric=allocation.metric,
            bits_per_weight=allocation.bits_per_weight,
            weights_bytes=allocation.weights_bytes,
            predicted=allocation.predicted,
            kl_mean=float(v["kl_mean"]),
            kl_stderr=float(v.get("kl_stderr") or 0.0),
            kl_p50=float(v["kl_p50"]),
            kl_p99=float(v["kl_p99"]),
            flips=float(v["flips"]),
            ppl_before=float(v["ppl_before"]),
            ppl_after=float(v["ppl_after"]),
            floor=float(v.get("floor") or 0.0),
            tokens=int(v["tokens"]),
            text=key[1],
            # A prediction is for rounding to nearest unless its metric was measured otherwise.
            predicts_kl=allocation.metric in kl_metrics
            and not _searched(allocation)
            and math.isfinite(allocation.predicted),
            quantizer=quantizer,
            packed=packed,
        )
    ordered = tuple(sorted(rows.values(), key=lambda r: (r.weights_bytes, r.kl_mean)))
    floor = max((r.floor for r in ordered), default=0.0)
    return VerifyView(_title(ordered), _detail(ordered), ordered, floor)


def _searched(allocation: PlanInfo) -> bool:
    """Whether ``predicted`` is what a search measured; older ones bear the damage that the search used as their metric."""
    return allocation.metric == MEASURED_KL or allocation.solver.rpartition("+")[2] in SEARCHERS


def _label(allocation: PlanInfo) -> str:
    if _searched(allocation) or not allocation.metric:
        return allocation.solver
    return f"{allocation.solver} on {allocation.metric}"


def _title(rows: tuple[VerifiedRow, ...]) -> str:
    judged = sorted(r.ratio for r in rows if math.isfinite(r.ratio))
    if not rows:
        return "Nothing has been verified yet"
    if not judged:
        best = min(rows, key=lambda r: r.kl_mean)
        return f"{len(rows)} measured; the lowest KL is {best.kl_mean:.3g} nats per token at {best.bits_per_weight:.2f} bits"
    median = judged[len(judged) // 2]
    words = (
        "as measured"
        if 0.9 <= median <= 1.1
        else f"{1 / median:.2f} times the prediction"
        if median < 1
        else f"{1 / median:.2f} of the prediction"
    )
    return f"{len(judged)} predictions checked: measured KL is, at the median, {words}"


def _detail(rows: tuple[VerifiedRow, ...]) -> str:
    if not rows:
        return "Verify runs an allocation for real on held-out text, with the quantiser that the packer uses."
    worst = max(rows, key=lambda r: r.kl_p99)
    return (
        f"The tail matters: at worst one token in a hundred moves by {worst.kl_p99:.3g} nats ({worst.label}, "
        f"{worst.bits_per_weight:.2f} bits), where {worst.flips:.1%} of the most likely tokens change."
    )

"""What a measurement would cost, before any of it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitatlas.app.tasks.measuring import (
    applicable_metrics,
    asks_for_all,
    calibration_file,
    check_text_mode,
    metric_names,
    planned_context,
)
from bitatlas.app.tasks.models import register
from bitatlas.app.views.run import LOADING

__all__ = ["estimate", "estimate_total"]


def estimate(
    model: str | Path,
    metric: str | Iterable[str] = "fisher",
    *,
    formats: str | Iterable[str] = "int{2,3,4,5,6,8}-g64",
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 128,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    text_mode: str = "packed",
) -> list[dict[str, Any]]:
    """What a measurement would take, metric by metric, and `LOADING`, which is paid once; nothing is loaded.

    The arguments are those of `measure`; a text may still be missing. For ``all``, metrics that do not apply come last, with
    the reason as ``skipped`` and no seconds.

    Raises:
        UserError: the model, a named text that is not there, options that no metric takes.
    """
    from bitatlas.analysis import cost as costs
    from bitatlas.analysis.metrics import METRICS, get_metric

    index = register(model)
    text = calibration_file(index.path, calibration)
    check_text_mode(text_mode)
    every = asks_for_all(metric)
    names = metric_names(metric)
    skipped: dict[str, str] = {}
    if every:
        names, skipped = applicable_metrics(
            model, formats=formats, calibration=calibration, tokens=tokens, seq_len=seq_len, needs_text=False
        )
    ctx = planned_context(index, names, formats, tokens, seq_len, seed, settings)
    runs = any(METRICS[n].NEEDS != "weights" for n in names)
    found = {LOADING: costs.loading(ctx, model=runs, sampled=str(text) == "self")}
    found |= {name: costs.estimate(get_metric(name), ctx) for name in names}
    rows = [
        {"metric": name, "steps": cost.steps, "bytes_read": cost.bytes_read, "forward_tokens": cost.forward_tokens,
         "backward_tokens": cost.backward_tokens, "seconds": cost.seconds} | ({"skipped": ""} if every else {})
        for name, cost in found.items()
    ]  # fmt: skip
    rows += [
        {"metric": name, "steps": 0, "bytes_read": 0, "forward_tokens": 0, "backward_tokens": 0,
         "seconds": float("nan"), "skipped": why}
        for name, why in skipped.items()
    ]  # fmt: skip
    return rows


def estimate_total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of an estimate's rows, as a row; what is skipped costs nothing."""
    paid = [r for r in rows if not r.get("skipped")]
    names = ("steps", "bytes_read", "forward_tokens", "backward_tokens", "seconds")
    return {"metric": "total"} | {name: sum(r[name] for r in paid) for name in names}

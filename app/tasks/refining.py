"""Refining: an allocation improved on the real model, accepted only where measured KL falls by more than its noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import Allocation, Budget, KvLayout, UserError
from bitatlas.app.expert_rules import ExpertRules
from bitatlas.app.tasks.jobs import submit_and_wait
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.searching import submit_search
from bitatlas.app.tasks.solving import read_allocation
from bitatlas.cache.paths import Home, write_output
from bitatlas.cache.store import Store

__all__ = ["refine", "submit_refine"]


def submit_refine(
    model: str | Path,
    allocation: str | Path | Allocation,
    *,
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    rounds: int = 8,
    seed: int = 77,
) -> str:
    """Start (or join) the search `refine` from an allocation, on its own metric, formats, pins, budget and rules for experts.

    Half of ``tokens`` gives the slopes, the other half judges; of at most ``rounds`` rounds.

    Raises:
        UserError: allocation of another model, one that no measurement stands behind, no text.
    """
    index = register(model)
    plan = allocation if isinstance(allocation, Allocation) else read_allocation(allocation)
    plan.check_model(index)
    settings = plan.provenance.settings
    run, formats = settings.get("run"), settings.get("formats")
    if not run or not formats:
        raise UserError(
            "no measurement stands behind this allocation",
            found=f"solver {plan.solver}",
            fix="refine one made by `bitatlas solve` on a metric",
        )
    if settings.get("target") is True:  # before the name was kept
        raise UserError("this allocation does not say for which engine it was solved", fix="solve it again")
    if settings.get("side"):
        raise UserError("refining keeps to the bytes only", found=f"also limited: {settings['side']}",
                        fix="refine one solved without further limits")  # fmt: skip
    if plan.kv and (plan.kv_block, plan.kv_residual) != (KvLayout().block, KvLayout().residual):
        window = {"kv_block": plan.kv_block, "kv_residual": plan.kv_residual}
    else:
        window = {}
    # Files from before a joint budget said which of its two metrics is the weights'.
    metric = str(settings.get("metric") or plan.metric.partition("+")[0])
    half = max(tokens // 2, 1)
    budget = plan.budget or Budget(plan.weights_bytes)
    return submit_search(
        index.path, solver="refine", metric=metric, run=str(run), budget=replace(budget), kv=plan.kv, kv_layout=window,
        formats=tuple(formats), pins=plan.pins, target=settings.get("target") or None, calibration=calibration, tokens=tokens, seq_len=seq_len, steps=rounds, seed=seed,
        settings={"tokens": half, "judge_tokens": half, "few_tokens": max(half // 4, 1)}, start=[plan], label=f"{plan.solver}+refine",
        experts=ExpertRules.of(settings.get("experts")), rules_seed=plan.provenance.seed,
    )  # fmt: skip


def refine(
    model: str | Path,
    allocation: str | Path | Allocation,
    *,
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    rounds: int = 8,
    seed: int = 77,
    output: str | Path | None = None,
    on_progress: Callable[[Any], None] | None = None,
) -> Allocation:
    """A better allocation of the same budget, or the same one when nothing better was found.

    Half of the calibration sequences propose, the other half judges. Held-out text is for `verify`.
    """
    job = submit_refine(
        model, allocation, calibration=calibration, tokens=tokens, seq_len=seq_len, rounds=rounds, seed=seed
    )
    status = submit_and_wait(job, True, on_progress)
    refined = Store(Home.default()).allocation((status.result or {})["allocation"])
    if output is not None:
        write_output(output, refined.to_json().encode())
    return refined

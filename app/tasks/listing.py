"""What there is: metrics, formats, solvers, targets. Straight from the tables, so nothing can be forgotten."""

from __future__ import annotations

from typing import Any

from bitatlas.analysis.schema import FORMATS

__all__ = ["formats", "metrics", "quantizers", "solvers", "targets"]


def metrics() -> list[dict[str, Any]]:
    """Every metric: name, title, unit, what it needs, whether it adds up, what it emits, options with their defaults, source."""
    from bitatlas.analysis.metrics import METRICS

    return [
        {"name": m.NAME, "title": m.TITLE, "unit": m.UNIT, "needs": m.NEEDS, "additive": m.ADDITIVE,
         "per_format": m.PER_FORMAT, "emits": list(m.EMITS), "settings": " ".join(f"{k}={_short(v)}" for k, v in m.SETTINGS.items()), "source": m.SOURCE}
        for m in METRICS.values()
    ]  # fmt: skip


def formats() -> list[dict[str, Any]]:
    """Every format, with the effective bits of a 4096 x 4096 matrix."""
    return [
        {"name": f.name, "bits": f.bits, "group": f.group_size or ("-" if f.kind == "float" else "channel"),
         "symmetric": f.symmetric, "bits_per_weight": f.bits_per_weight(4096, 4096)}
        for f in FORMATS.values()
    ]  # fmt: skip


def quantizers() -> list[str]:
    """Names of the quantisers."""
    from bitatlas.kernels.quantizers import QUANTIZERS

    return list(QUANTIZERS)


def solvers() -> list[dict[str, Any]]:
    """Every allocator: name, title, exact or not, whole front or not, source; then the searches on the real model."""
    from bitatlas.solvers import SEARCHERS, SOLVERS

    rows = [
        {"name": s.NAME, "title": s.TITLE, "command": "solve", "exact": s.EXACT, "front": s.FRONT, "ties": s.HANDLES_TIES,
         "needs_damage": s.NEEDS_DAMAGE, "settings": " ".join(f"{k}={_short(v)}" for k, v in s.SETTINGS.items()), "source": s.SOURCE}
        for s in SOLVERS.values()
    ]  # fmt: skip
    return rows + [
        {"name": s.NAME, "title": s.TITLE, "command": "search", "exact": False, "front": False, "ties": True,
         "needs_damage": s.NEEDS_DAMAGE, "settings": " ".join(f"{k}={_short(v)}" for k, v in s.SETTINGS.items()), "source": s.SOURCE}
        for s in SEARCHERS.values()
    ]  # fmt: skip


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def targets() -> list[dict[str, Any]]:
    """Every engine that allocations can be exported to."""
    from bitatlas.app.targets import TARGETS

    return [{"name": t.NAME, "title": t.TITLE} for t in TARGETS.values()]

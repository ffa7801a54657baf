"""Module names and regular expressions for configs that match by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bitatlas.analysis.schema import QuantUnit

__all__ = ["alternatives", "experts_path", "is_linear", "stacked_on_disk"]

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def is_linear(unit: QuantUnit) -> bool:
    """Whether the unit is an nn.Linear of its own in the usual modelling code: no table, no Conv1D, no 3-D stack."""
    return unit.role not in ("embed", "head") and not unit.transposed and not stacked_on_disk(unit)


def stacked_on_disk(unit: QuantUnit) -> bool:
    """Whether the checkpoint stores the expert inside a 3-D tensor."""
    return "[" in unit.key


def experts_path(unit: QuantUnit) -> str:
    """``model.layers.3.mlp.experts`` of a routed expert stored on its own, "" for others."""
    found = _EXPERT.match(unit.key)
    return found[1] if found and unit.expert >= 0 else ""


def alternatives(names: Iterable[str]) -> str:
    """A group that matches exactly these names, escaped, in order."""
    parts = [re.escape(n) for n in names]
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"

"""What a target leaves to choose: formats, ties, units that must stay as they are. For solving under an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import (
    FORMATS,
    Format,
    ModelIndex,
    TieGroup,
    UserError,
    expand_formats,
    parse_format,
)
from bitatlas.app.targets.base import Target

__all__ = ["Limits", "limits_of", "to_measure"]

_LAST_RESORT = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Limits:
    """Attributes:
    formats: those wanted that some unit may have.
    ties: units that must share a format.
    pins: units (with whatever is tied to them) that may have none of the formats -> what they get instead.
    target: the engine.
    """

    formats: tuple[str, ...]
    ties: tuple[TieGroup, ...]
    pins: dict[str, str]
    target: Target

    def mask(self, index: ModelIndex, formats: Sequence[str], free: Sequence[str] = ()) -> np.ndarray:
        """(units, formats) bool: what the engine stores as planned. Units in ``free`` (pinned by hand) are not limited."""
        skip, fmts = set(free), [FORMATS[f] for f in formats]
        rows = [[u.key in skip or self.target.keeps(u, f, index) for f in fmts] for u in index.units]
        return np.array(rows, bool).reshape(len(index.units), len(fmts))

    def bytes(self, index: ModelIndex, formats: Sequence[str]) -> np.ndarray:
        """(units, formats) int64: in the engine's container or our own, whichever is larger."""
        fmts = [FORMATS[f] for f in formats]
        memo: dict[tuple[int, int, str], int] = {}
        table = index.bytes_table(fmts)
        for i, u in enumerate(index.units):
            for j, f in enumerate(fmts):
                key = (u.rows, u.cols, f.name)
                if key not in memo:
                    memo[key] = self.target.unit_bytes(u, f)
                table[i, j] = max(table[i, j], memo[key])
        return table


def to_measure(target: Target, index: ModelIndex) -> tuple[str, ...]:
    """Formats to measure before solving under ``target``: its own grids, where the shapes of the model take them.

    Without two of those, every format of the first grouping of which units take more; nothing where they take none.
    """

    def taken(fmts: Sequence[Format]) -> tuple[str, ...]:
        return tuple(f.name for f in fmts if any(target.keeps(u, f, index) for u in index.units))

    names = taken(expand_formats(target.MEASURE))
    if len(names) > 1:
        return names
    ints = [f for f in FORMATS.values() if f.kind == "int"]
    for group in dict.fromkeys((f.group_size, f.symmetric) for f in ints):
        found = taken([f for f in ints if (f.group_size, f.symmetric) == group])
        if len(found) > len(names):
            return found
    return names


def limits_of(target: Target, index: ModelIndex, formats: Sequence[str]) -> Limits:
    """The limits of ``target`` on a choice among ``formats``.

    Raises:
        UserError: it loads none of them.
    """
    fmts = {f: parse_format(f) for f in formats}
    usable = tuple(f for f, fmt in fmts.items() if any(target.keeps(u, fmt, index) for u in index.units))
    if not usable:
        refused = [
            found for u in index.units for f in fmts.values() if (found := target.refuses(u, f, index))
        ]
        why = f"; {refused[0]}" if refused else "; rows are not whole blocks of its types"
        raise UserError(
            f"{target.NAME} loads none of these formats for {index.name}", found=", ".join(formats) + why,
            fix=f"--formats {','.join(own)}" if (own := to_measure(target, index)) else "another --target",
        )  # fmt: skip
    ties = tuple(target.ties(index))
    units = {u.key: u for u in index.units}
    pins: dict[str, str] = {}
    tied = {key for tie in ties for key in tie.units}
    for members in [tie.units for tie in ties] + [(key,) for key in units if key not in tied]:
        both = (usable, _LAST_RESORT)
        for names in both:
            common = [f for f in names if all(target.keeps(units[u], FORMATS[f], index) for u in members)]
            if common:
                break
        if common and names is _LAST_RESORT:
            pins.update(dict.fromkeys(members, common[0]))
    return Limits(usable, ties, pins, target)

"""A selection of units and an undoable list of pins. Pure: no Streamlit, so that the command line can read them too.

Units are integers: the position in the model index. A selection written as text is a list of runs, ``0-6,12,40-55:3``
(from 40 to 55 in steps of 3), short enough for a URL when a person made it by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bitatlas.analysis.schema import UserError, parse_format

__all__ = ["Edit", "EditList", "Selection", "decode_pins", "encode_pins", "read_runs"]

_MAX_TEXT = 2_000_000
_RUN = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::([1-9]\d{0,8}))?)?")


@dataclass(frozen=True, slots=True)
class Selection:
    """Sorted unit ids without repeats."""

    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Iterable[int]) -> Selection:
        """From any integers."""
        return cls(tuple(sorted({int(i) for i in ids})))

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self) -> str:
        """As runs. Inverse of `decode`."""
        out, i, ids = [], 0, self.ids
        while i < len(ids):
            step = ids[i + 1] - ids[i] if i + 1 < len(ids) else 1
            j = i + 1
            while j < len(ids) and ids[j] - ids[j - 1] == step:
                j += 1
            if j - i >= 3 or (j - i == 2 and step == 1):
                out.append(f"{ids[i]}-{ids[j - 1]}" + (f":{step}" if step > 1 else ""))
                i = j
            else:
                out.append(str(ids[i]))
                i += 1
        return ",".join(out)

    @classmethod
    def decode(cls, text: str, units: int) -> Selection:
        """Read runs; ids at or above ``units`` are refused.

        Raises:
            UserError: not a list of runs, or a unit that the model does not have.
        """
        try:
            return cls(read_runs(text, units, "unit"))
        except ValueError as e:
            raise UserError(
                "the selection in this link cannot be read",
                found=str(e),
                fix="clear the selection, or open the link with its own study",
            ) from None


def read_runs(text: str, count: int, noun: str) -> tuple[int, ...]:
    """The numbers that runs stand for, sorted; all below ``count``, the number of ``noun``s of the model.

    Raises:
        ValueError: not a list of runs, or a number that is too large; the words are for the user.
    """
    ids: set[int] = set()
    if len(text) > _MAX_TEXT:
        raise ValueError("too long")
    for run in filter(None, text.split(",")):
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(repr(run[:40]))
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last >= count:
            raise ValueError(f"{noun} {last}, but the model has {noun}s 0 to {count - 1}")
        ids.update(range(first, last + 1, step))
    return tuple(sorted(ids))


@dataclass(frozen=True, slots=True)
class Edit:
    """One command: pin these units to a format, or free them (``format == ""``)."""

    selection: Selection
    format: str


@dataclass(frozen=True, slots=True)
class EditList:
    """Commands with a cursor; undo moves the cursor, a new command drops what was undone."""

    edits: tuple[Edit, ...] = ()
    cursor: int = 0

    def add(self, selection: Selection, format: str) -> EditList:
        """Append a command (``format == ""`` frees the units).

        Raises:
            UserError: no such format.
        """
        name = parse_format(format).name if format else ""
        kept = (*self.edits[: self.cursor], Edit(selection, name))
        return EditList(kept, len(kept))

    @property
    def can_undo(self) -> bool:
        """Is there a command to take back?"""
        return self.cursor > 0

    @property
    def can_redo(self) -> bool:
        """Is there a command that was taken back?"""
        return self.cursor < len(self.edits)

    def undo(self) -> EditList:
        """One step back (itself when there is none)."""
        return EditList(self.edits, max(self.cursor - 1, 0))

    def redo(self) -> EditList:
        """One step forward (itself when there is none)."""
        return EditList(self.edits, min(self.cursor + 1, len(self.edits)))

    def pins(self) -> dict[int, str]:
        """Unit id -> format name, as things stand; later commands win."""
        out: dict[int, str] = {}
        for edit in self.edits[: self.cursor]:
            for i in edit.selection.ids:
                if edit.format:
                    out[i] = edit.format
                else:
                    out.pop(i, None)
        return out


def encode_pins(pins: Mapping[int, str]) -> str:
    """``0-6=int4-g64;9=int8-g64``, formats in name order. Inverse of `decode_pins`."""
    by_format: dict[str, list[int]] = {}
    for unit, name in pins.items():
        by_format.setdefault(name, []).append(unit)
    return ";".join(f"{Selection.of(ids).encode()}={name}" for name, ids in sorted(by_format.items()))


def decode_pins(text: str, units: int) -> EditList:
    """One command per format.

    Raises:
        UserError: not written by `encode_pins`, or for a model with fewer units.
    """
    out = EditList()
    for part in filter(None, text.split(";")):
        runs, _, name = part.rpartition("=")
        out = out.add(Selection.decode(runs, units), name)
    return out

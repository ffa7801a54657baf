"""What an engine can load, and what it gets: the contract of a target. One engine, one file, one class.

A verdict comes before any work: *servable*, *loads but decodes wrong*, or *rejected*, unit by unit, with the
smallest change that makes it servable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup, UserError
from bitatlas.app.targets.kv import KvSetting, kv_setting

if TYPE_CHECKING:
    from bitatlas.analysis.calibration import CalibrationSet
    from bitatlas.app.work.engine_checkpoint import Container

__all__ = ["REJECTED", "SERVABLE", "WRONG", "Finding", "Target", "Verdict"]

SERVABLE = "servable"
WRONG = "loads but decodes wrong"
REJECTED = "rejected"
_WORST_FIRST = (REJECTED, WRONG, SERVABLE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason against an allocation, with the units it is about."""

    status: str
    reason: str
    units: tuple[str, ...]

    def __str__(self) -> str:
        where = self.units[0] if len(self.units) == 1 else f"{len(self.units)} units such as {self.units[0]}"
        return f"{where}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an engine will do with an allocation.

    Attributes:
        status: `SERVABLE`, `WRONG` or `REJECTED`.
        findings: reasons against it, worst first.
        changes: unit -> format, the smallest change that makes it servable; empty when it is, or when none does.
        notes: what else to know; nothing that keeps it from being served.
        bytes: weights in the engine's own container, headers aside.
        kv: the engine's options for the nearest KV cache; "" for one at 16 bits, or where it is no option.
    """

    status: str
    findings: tuple[Finding, ...] = ()
    changes: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    bytes: int = 0
    kv: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings as sentences."""
        return tuple(str(f) for f in self.findings)

    @property
    def units(self) -> dict[str, str]:
        """Unit -> the worst reason against it."""
        out: dict[str, str] = {}
        for finding in self.findings:
            for unit in finding.units:
                out.setdefault(unit, finding.reason)
        return out

    @property
    def change(self) -> str:
        """The smallest change in words."""
        if not self.changes:
            return "" if self.status == SERVABLE else "no choice of formats makes this engine load it"
        kinds = Counter(self.changes.values()).most_common(3)
        what = ", ".join(f"{n} to {f}" for f, n in kinds)
        return f"change {len(self.changes)} units ({what}), or solve with --target"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "status": self.status, "reasons": list(self.reasons), "units": self.units, "change": self.change,
            "changes": dict(self.changes or {}), "notes": list(self.notes), "bytes": self.bytes, "kv": self.kv,
        }  # fmt: skip


class Target(ABC):
    """An engine. A subclass says what it loads (`refuses`, `ties`) and writes its files (`render`)."""

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    SERVES: ClassVar[str]  # who reads the files, in words
    KV_ENGINE: ClassVar[str] = "transformers"  # whose KV cache it is (`targets.kv`)
    MEASURE: ClassVar[str] = "int{2,3,4,5,6,8}-g64"  # its own grids: what to measure before solving under it
    TAKES_TEXT: ClassVar[bool] = False  # a calibration text becomes files (`write_text_files`)
    NEEDS_TEXT: ClassVar[bool] = False  # without them its command cannot run

    # -- what it loads ------------------------------------------------------------------------------------------

    @abstractmethod
    def loads(self, fmt: Format) -> bool:
        """Whether some unit may have this format."""

    def format_names(self) -> list[str]:
        """The formats it loads."""
        return [name for name, fmt in FORMATS.items() if self.loads(fmt)]

    @staticmethod
    def ours(fmt: Format) -> bool:
        """Formats that few engines' files hold: tables (NF4, FP4, MXFP4, FP8) and outliers."""
        return fmt.kind not in ("int", "float")

    def own(self, fmt: Format) -> bool:
        """Whether the codes are those of the engine's own grids, so that damage measured for the format is its damage."""
        return True

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Why this unit may not have this format; None when it may."""
        if self.loads(fmt):
            return None
        return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))

    def keeps(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> bool:
        """Whether the unit may have this format and is stored as planned: what solving under the engine chooses among."""
        return self.refuses(unit, fmt, index) is None

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """Units that must share a format."""
        return ()

    def tie_status(self, tie: TieGroup, formats: Mapping[str, str]) -> str:
        """What happens when ``formats`` break a tie."""
        return REJECTED

    def allowed(self, unit: QuantUnit, index: ModelIndex) -> list[str]:
        """Formats that this unit may have."""
        return [name for name, fmt in FORMATS.items() if self.refuses(unit, fmt, index) is None]

    # -- the verdict --------------------------------------------------------------------------------------------

    def check(self, allocation: Allocation, index: ModelIndex) -> Verdict:
        """What the engine will do with ``allocation``.

        Raises:
            UserError: the allocation is for another model.
        """
        allocation.check_model(index)
        findings = self._findings(allocation.formats, index)
        status = min((f.status for f in findings), key=_WORST_FIRST.index, default=SERVABLE)
        changes: dict[str, str] | None = None
        if status != SERVABLE:
            changed = self.repaired(allocation.formats, index)
            if not self._findings(changed, index):
                changes = {u: f for u, f in changed.items() if f != allocation.formats[u]}
        cache = self.kv(allocation, index)
        return Verdict(
            status,
            findings,
            changes,
            (*self.notes(allocation, index), *cache.notes),
            self.engine_bytes(allocation, index),
            cache.flags,
        )

    def _findings(self, formats: Mapping[str, str], index: ModelIndex) -> tuple[Finding, ...]:
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        for unit in index.units:
            found = self.refuses(unit, FORMATS[formats[unit.key]], index)
            if found:
                grouped[found.status, found.reason] += found.units
        for tie in self.ties(index):
            if len({formats[u] for u in tie.units}) > 1:
                grouped[self.tie_status(tie, formats), tie.reason] += tie.units
        out = [Finding(status, reason, tuple(units)) for (status, reason), units in grouped.items()]
        return tuple(sorted(out, key=lambda f: _WORST_FIRST.index(f.status)))

    def repaired(self, formats: Mapping[str, str], index: ModelIndex) -> dict[str, str]:
        """``formats`` changed as little as possible: refused ones to the nearest allowed, ties to their majority."""
        out = dict(formats)
        units = {u.key: u for u in index.units}
        for unit in index.units:
            if self.refuses(unit, FORMATS[out[unit.key]], index):
                out[unit.key] = _nearest(FORMATS[out[unit.key]], self.allowed(unit, index)) or out[unit.key]
        for tie in self.ties(index):
            votes = Counter(out[u] for u in tie.units)
            if len(votes) == 1:
                continue
            common = [
                f for f in votes if all(self.refuses(units[u], FORMATS[f], index) is None for u in tie.units)
            ]
            common = common or [
                f for f in FORMATS if all(f in self.allowed(units[u], index) for u in tie.units)
            ]
            if common:
                # Fewest units change; between equals the one with more bits hurts less.
                best = max(common, key=lambda f: (votes[f], FORMATS[f].bits))
                out.update(dict.fromkeys(tie.units, best))
        return out

    def kv(self, allocation: Allocation, index: ModelIndex) -> KvSetting:
        """The nearest setting of the engine's KV cache."""
        return kv_setting(self.KV_ENGINE, allocation, index)

    # -- what it gets -------------------------------------------------------------------------------------------

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """Remarks for people."""
        return ()

    def unit_bytes(self, unit: QuantUnit, fmt: Format) -> int:
        """Bytes of a unit in the engine's own container."""
        return fmt.payload_bytes(unit.rows, unit.cols)

    def kept_bytes(self, index: ModelIndex) -> int:
        """Bytes of the tensors that are not quantised, in the engine's container."""
        return index.kept_bytes

    def engine_bytes(self, allocation: Allocation, index: ModelIndex) -> int:
        """Bytes of the weights in the engine's container."""
        units = (self.unit_bytes(u, FORMATS[allocation.formats[u.key]]) for u in index.units)
        return sum(units) + self.kept_bytes(index)

    def container(self) -> Container | None:
        """How the engine stores quantised matrices, where we can write them; imports torch."""
        return None

    def check_weights(self, allocation: Allocation, index: ModelIndex, quantizer: str = "rtn") -> None:
        """Whether `write_weights` can make this checkpoint; a look, no work.

        Raises:
            UserError: the engine's own tools make it, something in the model is not written here, or the container
                cannot hold the codes of this quantiser.
        """
        if self.container() is None:
            raise UserError(f"the weights of {self.NAME} are made by its own tools",
                            fix="export without --weights and run the command")  # fmt: skip
        from bitatlas.app.work.engine_checkpoint import check_quantizer

        check_quantizer(quantizer, index)

    def write_weights(
        self, allocation: Allocation, index: ModelIndex, out: str | Path, *, quantizer: str = "rtn",
        calibration: CalibrationSet | None = None,
    ) -> list[Path]:  # fmt: skip
        """Write the finished checkpoint into the folder ``out``; returns its files.

        ``calibration`` holds the tokens for a quantiser that needs or takes the units' inputs.

        Raises:
            UserError: as `check_weights`; no text where the quantiser needs one.
        """
        self.check_weights(allocation, index, quantizer)
        container = self.container()
        assert container is not None
        from bitatlas.app.work.engine_checkpoint import write_engine_checkpoint

        folder = write_engine_checkpoint(
            container, index, allocation, out, quantizer=quantizer, calibration=calibration
        )
        return sorted(folder.iterdir())

    def serve_command(self, folder: str, allocation: Allocation, index: ModelIndex) -> str:
        """What starts the engine on what `write_weights` wrote into ``folder``; "" where it writes nothing."""
        return ""

    def write_text_files(self, index: ModelIndex, text: CalibrationSet, out: Path) -> list[Path]:
        """Files that a calibration text becomes, in the folder ``out``; only where `TAKES_TEXT`."""
        return []

    @abstractmethod
    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The files: name -> text. Deterministic."""

    @abstractmethod
    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """The command to run beside the files."""


def _nearest(fmt: Format, allowed: Iterable[str]) -> str:
    """The allowed format that keeps the bits, then the group, then the symmetry; never fewer bits if avoidable."""

    def distance(name: str) -> tuple[int, int, int, int]:
        other = FORMATS[name]
        bits = other.bits - fmt.bits
        group = abs((other.group_size or 1 << 20) - (fmt.group_size or 1 << 20))
        return (bits < 0, abs(bits), group, other.symmetric != fmt.symmetric)

    return min(allowed, key=distance, default="")

"""What was decided: budgets, allocations (and their file), frontiers, pins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bitatlas.analysis.schema.damage import Provenance
from bitatlas.analysis.schema.model import ModelIndex
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.kv.formats import KvLayout, KvPair, parse_kv_format

__all__ = ["ALLOCATION_SCHEMA", "MEASURED_KL", "Allocation", "Budget", "Frontier", "null_nan", "resolve_pins"]

ALLOCATION_SCHEMA = "bitatlas/allocation/1"
MEASURED_KL = "kl"
"""Metric of what a search on the real model leaves: ``predicted`` is the KL that it measured on its own text."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the model must fit into. All bytes.

    Attributes:
        weights_bytes: limit for the units' payload plus the kept tensors.
        kv_bytes: what the KV cache takes at ``context`` tokens and ``batch`` sequences.
        reserve_bytes: activations, workspace, the runtime itself.
        context, batch: what kv_bytes was computed for (0 = KV not part of the question).
        label: the user's words: ``"3.5 bits"``, ``"8GiB, context 8192, batch 1"``.
    """

    weights_bytes: int
    kv_bytes: int = 0
    reserve_bytes: int = 0
    context: int = 0
    batch: int = 1
    label: str = ""

    @property
    def total_bytes(self) -> int:
        """Weights + KV + reserve."""
        return self.weights_bytes + self.kv_bytes + self.reserve_bytes


@dataclass(frozen=True, slots=True)
class Allocation:
    """unit -> format, with everything needed to trust it. The file format is `ALLOCATION_SCHEMA`.

    Attributes:
        model_digest, model_name: the model it is for.
        formats: unit key -> format name, every unit present.
        payload_bytes: exact bytes of the units; kept_bytes: of the tensors left alone.
        bits_per_weight: effective, over the units.
        predicted: predicted damage (sum of the metric), NaN when the metric predicts none; see `MEASURED_KL`.
        metric, solver, status: how it was found; status is one of `solvers.base.STATUSES`.
        lower_bound, gap: of the certificate; NaN when there is none.
        budget: as asked for.
        pins: unit key -> format as pinned by the user.
        kv: layer -> (k format, v format), names of `KV_FORMATS`; empty = 16-bit cache.
        kv_block, kv_residual: rules of the cache's 16-bit window (`KvLayout`).
        provenance: what it was made from.
    """

    model_digest: str
    model_name: str
    formats: dict[str, str]
    payload_bytes: int
    kept_bytes: int
    bits_per_weight: float
    predicted: float = float("nan")
    metric: str = ""
    solver: str = ""
    status: str = "feasible"
    lower_bound: float = float("nan")
    gap: float = float("nan")
    budget: Budget | None = None
    pins: dict[str, str] = field(default_factory=dict)
    kv: dict[int, tuple[str, str]] = field(default_factory=dict)
    kv_block: int = KvLayout().block
    kv_residual: int = KvLayout().residual
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def weights_bytes(self) -> int:
        """Units plus kept tensors."""
        return self.payload_bytes + self.kept_bytes

    @property
    def searched(self) -> bool:
        """Whether ``predicted`` is a KL measured by a search; its files once named the damage that it used as their metric."""
        return self.metric == MEASURED_KL or not {"search", "refined"}.isdisjoint(self.provenance.settings)

    @property
    def kv_plan(self) -> dict[int, KvPair]:
        """Layer -> formats of K and V."""
        return {layer: KvPair(parse_kv_format(k), parse_kv_format(v)) for layer, (k, v) in self.kv.items()}

    @property
    def kv_layout(self) -> KvLayout:
        """Rules of the cache's 16-bit window."""
        return KvLayout(self.kv_block, self.kv_residual)

    def to_json(self) -> str:
        """The allocation file: versioned JSON, NaN written as null, keys sorted so that equal means equal."""
        data = {"schema": ALLOCATION_SCHEMA, **asdict(self)}
        data["kv"] = {str(layer): list(pair) for layer, pair in self.kv.items()}
        if not self.kv:
            # Without K/V formats the window says nothing, and the file is what it was before there was one.
            del data["kv_block"], data["kv_residual"]
        return json.dumps(null_nan(data), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Inverse of `to_json`; strict.

        Raises:
            UserError: not JSON, another schema, an unknown or missing key, an unknown format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise UserError("the allocation file is not JSON", found=str(e)) from None
        if not isinstance(data, dict) or data.pop("schema", None) != ALLOCATION_SCHEMA:
            raise UserError("this is not an allocation file", found=f"no \"schema\": \"{ALLOCATION_SCHEMA}\"",
                            fix="make one with `bitatlas solve`")  # fmt: skip
        known = set(cls.__dataclass_fields__)
        unknown, missing = set(data) - known, {"model_digest", "model_name", "formats"} - set(data)
        if unknown or missing:
            raise UserError(
                "the allocation file has the wrong keys",
                found=f"unknown: {sorted(unknown) or 'none'}; missing: {sorted(missing) or 'none'}",
            )
        formats = data["formats"]
        if not isinstance(formats, dict) or not formats:
            raise UserError("the allocation names no units", found=f"formats = {str(formats)[:60]!r}")
        for name in [*formats.values(), *data.get("pins", {}).values()]:
            parse_format(str(name))
        try:
            data["budget"] = Budget(**data["budget"]) if data.get("budget") else None
            data["provenance"] = Provenance(**data.get("provenance", {}))
            data["kv"] = {int(k): (str(v[0]), str(v[1])) for k, v in data.get("kv", {}).items()}
            for key in ("predicted", "lower_bound", "gap"):
                data[key] = float("nan") if data.get(key) is None else float(data[key])
            for key in ("payload_bytes", "kept_bytes"):
                data[key] = int(data.get(key, 0))
            for pair in data["kv"].values():
                for name in pair:
                    parse_kv_format(name)
            KvLayout(data.get("kv_block", 1), data.get("kv_residual", 0))
            data["bits_per_weight"] = float(data.get("bits_per_weight", 0.0))
            return cls(**data)
        except (TypeError, ValueError, KeyError, IndexError) as e:
            raise UserError("the allocation file has a value of the wrong kind", found=str(e)) from None

    def check_model(self, index: ModelIndex) -> None:
        """Raises `UserError` unless this allocation names exactly the units of ``index``."""
        keys = set(index.unit_keys())
        unknown, missing = set(self.formats) - keys, keys - set(self.formats)
        if unknown or missing:
            raise UserError(
                f"the allocation is for another model ({self.model_name})",
                found=f"{len(unknown)} units unknown to {index.name} (such as {min(unknown, default='-')}), "
                f"{len(missing)} missing (such as {min(missing, default='-')})",
                fix="solve again for this model, or name the checkpoint it was made for",
            )
        if self.model_digest and self.model_digest != index.digest:
            raise UserError(
                f"the allocation was made for other weights of the same architecture ({self.model_name})",
                found=f"digest {self.model_digest[:12]}, this checkpoint has {index.digest[:12]}",
                fix="measure and solve on this checkpoint",
            )
        strangers = sorted(set(self.kv) - set(index.kv.layers if index.kv else ()))
        if strangers:
            raise UserError(
                f"the allocation has K/V formats for layer {strangers[0]}, which keeps no K/V of its own",
                found=f"{len(index.kv.layers) if index.kv else 0} layers of {index.name} do",
            )


@dataclass(frozen=True, slots=True)
class Frontier:
    """Allocations over a sweep of budgets, cheapest first.

    Attributes:
        units, formats: the axes of ``choice``.
        payload_bytes: (P,) int64; predicted: (P,) float64.
        choice: (P, U) uint8, index into formats.
        supported: (P,) bool, on the lower convex hull (the others fill gaps).
        metric, solver: how it was made.
        seconds, evaluations, tokens: what it cost; tokens are forward-equivalents of the real model (a backward pass counts
            two). NaN and 0 where nothing was written down.
        kv_bytes: (P,) int64, what the KV cache takes of ``payload_bytes`` in a front of weights and cache together, whose units end
            with ``kv.L`` and whose formats end with pairs; empty where it is of weights alone.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    payload_bytes: np.ndarray
    predicted: np.ndarray
    choice: np.ndarray
    metric: str = ""
    solver: str = ""
    supported: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    seconds: float = float("nan")
    evaluations: int = 0
    tokens: int = 0
    kv_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def at(self, limit_bytes: int) -> int:
        """Index of the best point within ``limit_bytes``, -1 when even the cheapest is too large."""
        return int(np.searchsorted(self.payload_bytes, limit_bytes, side="right")) - 1


def resolve_pins(pins: Iterable[str], units: Sequence[str]) -> dict[str, str]:
    """``REGEX=FORMAT`` rules to unit -> format; later rules win. A rule matches anywhere in the key.

    Raises:
        UserError: a bad rule, a bad regex, an unknown format, or a rule that matches nothing.
    """
    out: dict[str, str] = {}
    for rule in pins:
        pattern, eq, name = rule.rpartition("=")
        if not eq or not pattern:
            raise UserError("a pin must be REGEX=FORMAT", found=repr(rule), fix="--pin 'down_proj=int8-g64'")
        fmt = parse_format(name)
        try:
            regex = re.compile(pattern)
        except re.error as e:
            raise UserError("the pin's regular expression is not valid", found=f"{pattern!r}: {e}") from None
        hits = [u for u in units if regex.search(u)]
        if not hits:
            raise UserError(
                f"the pin {rule!r} matches no unit", found=f"{len(units)} units, such as {', '.join(units[:3])}",
                fix="run `bitatlas scan MODEL` for the names",
            )  # fmt: skip
        out.update(dict.fromkeys(hits, fmt.name))
    return out


def null_nan(value: Any) -> Any:
    """NaN and Inf become None, all the way down: JSON has neither."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): null_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_nan(v) for v in value]
    return value

"""``bitatlas.json``: what a packed checkpoint holds, tensor by tensor. Torch-free, strict both ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS, Format

T = TypeVar("T")

__all__ = [
    "MANIFEST",
    "PARTIAL",
    "SCHEMA",
    "Manifest",
    "PackedKept",
    "PackedUnit",
    "plan_shards",
    "shard_name",
]

SCHEMA = "bitatlas/packed/1"
MANIFEST = "bitatlas.json"
PARTIAL = "bitatlas.json.partial"
_MAX_BYTES = 256 << 20
_MAX_SIDE = 1 << 31


def shard_name(number: int) -> str:
    """File name of shard ``number`` (from 0)."""
    return f"packed-{number + 1:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class PackedUnit:
    """One packed matrix and where it comes from; the fields are those of the quantisation unit.

    Attributes:
        key: unit key; the stored tensors are ``key.codes``, ``key.scales``, ``key.zeros`` (or ``key.weight``).
        tensor: checkpoint tensor that held it.
        rows, cols: output and input dimension, whatever the orientation in the checkpoint.
        format: format name.
        expert: expert index, -1 for none.
        part: "" | "gate" | "up", half of a fused gate_up tensor.
        transposed, interleaved: layout of the checkpoint tensor.
        shard: number of the shard.
    """

    key: str
    tensor: str
    rows: int
    cols: int
    format: str
    expert: int = -1
    part: str = ""
    transposed: bool = False
    interleaved: bool = False
    shard: int = 0

    @property
    def fmt(self) -> Format:
        """The format itself."""
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Exact bytes of the stored tensors."""
        return self.fmt.payload_bytes(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class PackedKept:
    """A tensor that is stored as it was. ``dtype`` is the code of safetensors (``BF16``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    shard: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything in a packed checkpoint.

    Attributes:
        units, kept: in the order of the checkpoint's index.
        shards: bytes of tensor data in each shard, headers aside.
        quantizer: how the codes were made.
        model: name, architecture, model type and digest of the original.
    """

    units: tuple[PackedUnit, ...]
    kept: tuple[PackedKept, ...]
    shards: tuple[int, ...]
    quantizer: str = "rtn"
    model: dict[str, str] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the units."""
        return sum(u.nbytes for u in self.units)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors left alone."""
        return sum(k.nbytes for k in self.kept)

    def to_json(self) -> str:
        """The file's text: deterministic, one line per tensor so that two can be compared."""
        head = {
            "schema": SCHEMA, "model": self.model, "quantizer": self.quantizer,
            "payload_bytes": self.payload_bytes, "kept_bytes": self.kept_bytes,
            "shards": [{"file": shard_name(i), "bytes": n} for i, n in enumerate(self.shards)],
        }  # fmt: skip
        lines = [f" {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in head.items()]
        for name, rows in (("units", self.units), ("kept", self.kept)):
            body = ",\n".join("  " + json.dumps(_without_defaults(r)) for r in rows)
            lines.append(f' "{name}": [\n{body}\n ]' if rows else f' "{name}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a packed checkpoint.

        Raises:
            UserError: not a packed checkpoint, an unfinished one, or a damaged file.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / PARTIAL).is_file():
                raise UserError(f"{folder} was not packed to the end", found=f"{PARTIAL}, no {MANIFEST}",
                                fix="run the same `bitatlas pack` again; it goes on where it stopped")  # fmt: skip
            raise UserError(f"{folder} is not a packed checkpoint", found=f"no {MANIFEST}",
                            fix="make one with `bitatlas pack MODEL allocation.json -o DIR`")  # fmt: skip
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is too large to be a manifest", found=f"{path.stat().st_size} bytes")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise _damaged(str(e)) from None

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`; strict.

        Raises:
            UserError: another schema, unknown or missing keys, wrong types, unknown formats, sums that do not agree.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as e:
            raise _damaged(f"not JSON: {e}") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise _damaged(f'no "schema": "{SCHEMA}"')
        want = {"schema", "model", "quantizer", "payload_bytes", "kept_bytes", "shards", "units", "kept"}
        if set(data) != want:
            raise _damaged(
                f"unknown keys {sorted(set(data) - want)}, missing keys {sorted(want - set(data))}"
            )
        shards = [_row(_Shard, s) for s in _list(data["shards"])]
        if [s.file for s in shards] != [shard_name(i) for i in range(len(shards))]:
            raise _damaged("shards are not numbered packed-00001.safetensors, packed-00002.safetensors, …")
        model = data["model"]
        if not isinstance(model, dict) or not all(isinstance(v, str) for v in model.values()):
            raise _damaged("model is not a table of texts")
        if not isinstance(data["quantizer"], str):
            raise _damaged("quantizer is not a text")
        units = tuple(_row(PackedUnit, u) for u in _list(data["units"]))
        kept = tuple(_row(PackedKept, k) for k in _list(data["kept"]))
        out = cls(units, kept, tuple(s.bytes for s in shards), data["quantizer"], model)
        out._check(data["payload_bytes"], data["kept_bytes"])
        return out

    def _check(self, payload: Any, kept: Any) -> None:
        per_shard = [0] * len(self.shards)
        for u in self.units:
            if u.format not in FORMATS:
                raise _damaged(f"{u.key} has the unknown format {u.format!r}")
            if not (0 < u.rows < _MAX_SIDE and 0 < u.cols < _MAX_SIDE) or u.part not in ("", "gate", "up"):
                raise _damaged(f"{u.key} has shape ({u.rows}, {u.cols}) and part {u.part!r}")
        rows: list[PackedUnit | PackedKept] = [*self.units, *self.kept]
        for row in rows:
            if not 0 <= row.shard < len(self.shards) or row.nbytes < 0:
                raise _damaged(f"{row} names a shard that does not exist")
            per_shard[row.shard] += row.nbytes
        if tuple(per_shard) != self.shards or (payload, kept) != (self.payload_bytes, self.kept_bytes):
            raise _damaged("the byte counts do not add up")
        names = [u.key for u in self.units] + [k.name for k in self.kept]
        if len(set(names)) != len(names):
            raise _damaged("a tensor is listed twice")


def plan_shards(
    units: Iterable[PackedUnit], kept: Iterable[PackedKept], shard_bytes: int
) -> tuple[tuple[PackedUnit, ...], tuple[PackedKept, ...], tuple[int, ...]]:
    """Spread tensors over shards of at most ``shard_bytes`` (a larger single tensor gets a shard of its own)."""
    sizes = [0]

    def place(nbytes: int) -> int:
        if sizes[-1] and sizes[-1] + nbytes > shard_bytes:
            sizes.append(0)
        sizes[-1] += nbytes
        return len(sizes) - 1

    placed_kept = tuple(replace(k, shard=place(k.nbytes)) for k in kept)
    placed_units = tuple(replace(u, shard=place(u.nbytes)) for u in units)
    return placed_units, placed_kept, tuple(sizes)


@dataclass(frozen=True, slots=True)
class _Shard:
    file: str
    bytes: int


def _damaged(found: str) -> UserError:
    return UserError(f"{MANIFEST} is damaged", found=found, fix="pack the model again")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _damaged(f"a list was expected, not {str(value)[:40]!r}")
    return value


def _without_defaults(row: Any) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(row)}
    return {k: v for k, v in asdict(row).items() if v != defaults[k] or k == "shard"}


def _row(kind: type[T], data: Any) -> T:
    """A dataclass from a JSON object; every field checked for its plain type."""
    if not isinstance(data, Mapping):
        raise _damaged(f"an object was expected, not {str(data)[:40]!r}")
    types = {"str": str, "int": int, "bool": bool}
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if set(data) - set(known):
        raise _damaged(f"unknown keys {sorted(set(data) - set(known))}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        declared = str(known[name].type)
        if declared == "tuple[int, ...]":
            if not isinstance(value, list) or not all(type(v) is int and 0 <= v < _MAX_SIDE for v in value):
                raise _damaged(f"{name} is {str(value)[:40]!r}")
            value = tuple(value)
        elif type(value) is not types[declared]:
            raise _damaged(f"{name} is {str(value)[:40]!r}")
        values[name] = value
    try:
        return kind(**values)
    except TypeError as e:
        raise _damaged(str(e)) from None

"""Formats: the ways to store a matrix, and the only place that counts their bytes. Torch-free.

A format's bytes are exact: what `kernels.packed` writes for a matrix is what `payload_bytes` says.

- codes: every row is one little-endian bit stream of ``bits`` per weight, padded to whole 32-bit words;
- scales: one float16 per row and group (the last group of a row may be ragged: 576 columns in groups
  of 128 are 4.5, so 5 groups);
- zeros (asymmetric only): one ``bits``-wide code per row and group, all rows in one bit stream padded to
  32-bit words;
- formats with a table (NF4, FP4, MXFP4, FP8) store codes and scales in the same way, MXFP4 one byte per scale,
  ``fp8-tensor`` one scale for the whole matrix;
- outliers (``-o1`` = 1 % of the weights): the same number in every row, each a float16 value and a 16-bit column
  (32-bit beyond 65 536 columns). A fixed number per row needs no row pointers and makes bytes known beforehand.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bitatlas.kernels.errors import UserError

__all__ = ["FORMATS", "Format", "expand_formats", "parse_format"]

_WORD_BITS = 32
_SCALE_BITS = 16
_NARROW = 1 << 16  # columns up to which an outlier's column fits into 16 bits
INT_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES: tuple[int | None, ...] = (32, 64, 128, None)


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store a (rows, cols) matrix. Groups run along the columns (the input dimension).

    Attributes:
        name: ``int4-g64`` (asymmetric), ``int4-g64-sym``, ``int8-channel``, ``int3-g64-o1``, ``nf4-g64``, ``mxfp4``, ``fp8-tensor``, ``bf16``.
        bits: width of one code; 16 for the pass-through types.
        group_size: columns that share a scale; None = the whole row ("channel"), also for ``bf16``.
        symmetric: no zero point is stored.
        kind: ``int`` (codes, scales, zeros), ``sparse`` (the same with outliers), ``codebook`` (codes name entries
            of a table) or ``float`` (stored as it is).
        codebook: ``nf4``, ``fp4`` or ``fp8``, the table of a codebook format.
        scale: ``fp16``, or ``e8m0`` for powers of two in one byte.
        outliers: weights per thousand that are stored as they are.
        per_tensor: the matrix has a single scale; ``group_size`` is None.
    """

    name: str
    bits: int
    group_size: int | None
    symmetric: bool
    kind: str = "int"
    codebook: str = ""
    scale: str = "fp16"
    outliers: int = 0
    per_tensor: bool = False

    @property
    def qmax(self) -> int:
        """The largest unsigned code, 2**bits - 1."""
        return (1 << self.bits) - 1

    def groups(self, cols: int) -> int:
        """How many groups a row of ``cols`` columns has; a ragged last one counts."""
        if self.kind == "float":
            return 0
        return 1 if self.group_size is None else -(-cols // self.group_size)

    def scale_rows(self, rows: int) -> int:
        """Rows of scales that a matrix of ``rows`` rows has."""
        return 1 if self.per_tensor else rows

    def code_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the codes alone, each row padded to whole 32-bit words."""
        if self.kind == "float":
            return rows * cols * self.bits // 8
        return rows * (-(-cols * self.bits // _WORD_BITS)) * 4

    def scale_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the scales."""
        return self.scale_rows(rows) * self.groups(cols) * (1 if self.scale == "e8m0" else _SCALE_BITS // 8)

    def outlier_count(self, cols: int) -> int:
        """Outliers in each row of ``cols`` columns, rounded up."""
        return min(-(-cols * self.outliers // 1000), cols)

    def outlier_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the outliers: values and columns."""
        return rows * self.outlier_count(cols) * (2 + (2 if cols <= _NARROW else 4))

    def zero_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the packed zero points (0 for symmetric formats)."""
        if self.kind == "float" or self.symmetric:
            return 0
        return -(-rows * self.groups(cols) * self.bits // _WORD_BITS) * 4

    def payload_bytes(self, rows: int, cols: int) -> int:
        """Exact bytes that a (rows, cols) matrix takes on disk and in memory, headers aside."""
        dense = self.code_bytes(rows, cols) + self.scale_bytes(rows, cols) + self.zero_bytes(rows, cols)
        return dense + self.outlier_bytes(rows, cols)

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Effective bits per weight, scales and zeros counted."""
        return self.payload_bytes(rows, cols) * 8 / (rows * cols)


def _int_format(bits: int, group_size: int | None, symmetric: bool) -> Format:
    group = "channel" if group_size is None else f"g{group_size}"
    return Format(f"int{bits}-{group}{'-sym' if symmetric else ''}", bits, group_size, symmetric)


def _table_format(name: str, bits: int, group_size: int | None, codebook: str, scale: str = "fp16") -> Format:
    return Format(name, bits, group_size, True, "codebook", codebook, scale)


def _sparse_format(bits: int, share: float) -> Format:
    return Format(f"int{bits}-g64-o{share:g}", bits, 64, False, "sparse", outliers=round(share * 10))


# Order: symmetric after asymmetric, small groups first, few bits first; outliers, tables, pass-through last. Menus follow it.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(_int_format(b, g, sym) for sym in (False, True) for g in GROUP_SIZES for b in INT_BITS),
        *(_sparse_format(b, share) for share in (0.5, 1) for b in (2, 3, 4)),
        *(_table_format(f"nf4-g{g}", 4, g, "nf4") for g in (32, 64, 128)),
        *(_table_format(f"fp4-g{g}", 4, g, "fp4") for g in (16, 32)),
        _table_format("mxfp4", 4, 32, "fp4", "e8m0"),
        _table_format("fp8-channel", 8, None, "fp8"),
        Format("fp8-tensor", 8, None, True, "codebook", "fp8", per_tensor=True),
        Format("bf16", 16, None, True, "float"),
        Format("fp16", 16, None, True, "float"),
    )
}


def parse_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        UserError: no such format; the message names the nearest ones.
    """
    found = FORMATS.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), FORMATS, n=3, cutoff=0.4)
        raise UserError(
            f"there is no format called {name!r}",
            found=f"nearest: {', '.join(near) or 'none'}",
            fix="run `bitatlas formats` for the list; the pattern is int{2,3,4,5,6,8}-{g32,g64,g128,channel}[-sym]; nf4-g64, fp4-g32, mxfp4, fp8-channel, fp8-tensor, int3-g64-o1",
        )
    return found


def expand_formats(text: str | Iterable[str]) -> tuple[Format, ...]:
    """Formats from a comma list with optional braces: ``"int{2,3,4}-g64,bf16"``; duplicates dropped, order kept.

    Raises:
        UserError: an unknown format, or none at all.
    """
    raw = text if isinstance(text, str) else ",".join(text)
    # Split at commas outside braces only.
    names: list[str] = []
    for part in re.findall(r"(?:[^,{]|\{[^}]*\})+", raw):
        match = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", part.strip())
        if match:
            names += [match[1] + middle.strip() + match[3] for middle in match[2].split(",")]
        elif part.strip():
            names.append(part.strip())
    if not names:
        raise UserError(
            "no format was given", found=repr(raw), fix="for example --formats int{2,3,4,5,6,8}-g64"
        )
    return tuple(dict.fromkeys(parse_format(n) for n in names))

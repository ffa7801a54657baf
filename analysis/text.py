"""Reading text files that people hand in: plain UTF-8 or JSON lines, bounded, with honest errors. Torch-free."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from bitatlas.kernels.errors import UserError

__all__ = ["load_text"]

_MAX_BYTES = 8 << 20  # far more text than any calibration uses; a larger file is sampled evenly
_SLICES = 64
_JSON_LINES = (".jsonl", ".ndjson")
_NOT_TEXT = {
    b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"GGUF": "a GGUF model",
    b"PAR1": "a Parquet table", b"%PDF": "a PDF", b"\x80\x02": "a pickle", b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text", b"\x28\xb5\x2f\xfd": "a zstd archive",
}  # fmt: skip


def load_text(
    path: str | Path, *, text_field: str = "text", whole: bool = True, seed: int = 0,
    max_bytes: int = _MAX_BYTES,
) -> list[str]:  # fmt: skip
    """Documents of a text or JSON-lines file.

    Args:
        path: ``*.jsonl`` / ``*.ndjson``: one JSON object a line with its text under ``text_field``;
            everything else is UTF-8 text.
        whole: a plain text is one document; else its paragraphs (blank lines between) are.
        max_bytes: a larger file is sampled: 64 stretches spread over it, cut at line ends, shifted by ``seed``.

    Returns:
        non-empty documents, at least one.

    Raises:
        UserError: missing, a folder, empty, binary, not UTF-8, a broken line, or a line without the field.
    """
    file = Path(path)
    if not file.exists():
        raise UserError("the text file does not exist", found=str(path), fix="check the path")
    if not file.is_file():
        raise UserError(
            "the calibration text must be a file",
            found=f"{path} is a folder",
            fix="name a .txt or .jsonl file",
        )
    try:
        raw = _read(file, max_bytes, seed)
    except OSError as e:
        raise UserError("the text file cannot be read", found=f"{path}: {e.strerror}") from None
    text = _decode(file, raw)
    if not text.strip():
        raise UserError("the text file is empty", found=f"{file.name}: {file.stat().st_size} bytes, no text")
    if file.suffix.lower() in _JSON_LINES:
        return _json_lines(file, text, text_field)
    if whole:
        return [text]
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def _read(file: Path, max_bytes: int, seed: int) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= max_bytes:
            return handle.read(max_bytes)
        pieces = []
        length, stretch = max_bytes // _SLICES, size / _SLICES
        room = np.random.default_rng(seed).random(_SLICES) * (stretch - length)
        for i in range(_SLICES):
            start = int(i * stretch + room[i])
            handle.seek(start)
            piece = handle.read(length)
            # Whole lines only: a slice must not begin or end inside a character or a JSON object.
            first = piece.find(b"\n") + 1 if start else 0
            last = piece.rfind(b"\n") + 1
            pieces.append(piece[first:last])
        return b"".join(pieces)


def _decode(file: Path, raw: bytes) -> str:
    for magic, what in _NOT_TEXT.items():
        if raw.startswith(magic):
            raise UserError(
                "the calibration file is not a text",
                found=f"{file.name} is {what}",
                fix="give plain UTF-8 text or JSON lines with a text field",
            )
    if b"\0" in raw[: 1 << 20]:
        raise UserError(
            "the calibration file is binary",
            found=f"{file.name} has a zero byte at offset {raw.index(0)}",
            fix="give plain UTF-8 text or JSON lines with a text field",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            "the text is not UTF-8",
            found=f"{file.name}: byte {raw[e.start]:#04x} at offset {e.start}",
            fix=f"iconv -f latin1 -t utf-8 {file.name} > utf8.txt",
        ) from None


def _json_lines(file: Path, text: str, text_field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(
                "a line is not JSON", found=f"{file.name}, line {number}: {str(e)[:80]}",
                fix="one JSON object a line; save plain text as .txt",
            ) from None  # fmt: skip
        value = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"a line has no text under {text_field!r}", found=f"{file.name}, line {number}: {keys[:120]}"
            )
        if value.strip():
            documents.append(value)
    if not documents:
        raise UserError("no line of the file holds text", found=file.name)
    return documents

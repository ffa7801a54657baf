"""Calibration text to token sequences: deterministic, spread over the text, with a digest. Torch-free.

A text becomes one stream of tokens (documents joined by the end-of-text token), is cut into blocks, and
one block is drawn from each of S equal stretches of it, so that the sequences cover the whole text. In
per-document mode every sequence is the beginning of a document of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bitatlas.analysis.text import load_text
from bitatlas.kernels.errors import UserError

__all__ = [
    "SELF",
    "CalibrationSet",
    "check_disjoint",
    "load_text",
    "load_tokenizer",
    "make_calibration",
    "shared_windows",
    "spread",
]

SELF = "self"
"""Stands for a text file: sequences sampled from the model itself (`analysis.self_text`)."""

_WINDOW = 32  # tokens; two texts that share a run this long share a source


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token sequences and where they came from.

    Attributes:
        tokens: (S, T) int64 token ids, no padding.
        digest: sha256 of ids and settings; two sets with the same digest are the same set.
        source: the file, for people.
        settings: mode, seed, sequence length, and how many tokens the text held.
    """

    tokens: np.ndarray
    digest: str
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tokens: np.ndarray, source: str = "", settings: dict[str, Any] | None = None
    ) -> CalibrationSet:
        """A set from (S, T) ids, digest computed."""
        ids = np.ascontiguousarray(tokens, dtype="<i8")
        head = json.dumps({"shape": ids.shape, **(settings or {})}, sort_keys=True)
        digest = hashlib.sha256(head.encode() + b"\0" + ids.tobytes()).hexdigest()
        return cls(ids, digest, source, dict(settings or {}))

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self.tokens.size)

    def batches(self, tokens: int) -> list[np.ndarray]:
        """Consecutive (B, T) slices of at most ``tokens`` tokens each (at least one sequence)."""
        step = max(1, tokens // self.tokens.shape[1])
        return [self.tokens[i : i + step] for i in range(0, len(self.tokens), step)]


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer; never runs code from it.

    Raises:
        UserError: the folder holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(
            "the checkpoint has no usable tokenizer",
            found=f"{Path(path).name}: {str(e).splitlines()[0][:160] if str(e) else type(e).__name__}",
            fix="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from None


def make_calibration(
    tokenizer: Any,
    path: str | Path,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    *,
    mode: Literal["packed", "document"] = "packed",
    text_field: str = "text",
    avoid: Sequence[CalibrationSet] = (),
    vocab_size: int = 0,
) -> CalibrationSet:
    """(S, T) sequences with S * T >= ``tokens``, drawn by ``seed`` and spread over the text.

    Args:
        tokenizer: a transformers tokenizer; where it opens a text with a BOS token, so does every sequence.
        tokens: how many tokens are wanted; rounded up to whole sequences.
        seq_len: T.
        mode: ``packed`` cuts one stream; ``document`` starts every sequence at a document's beginning and
            uses only documents of at least T tokens, so that nothing is ever padded.
        avoid: sets that must share no run of 32 tokens with the result (calibration and evaluation text).
        vocab_size: the model's, to refuse a tokenizer of another model; 0 = not checked.

    Raises:
        UserError: unreadable, empty or too short text, or a tokenizer that does not fit the model.
    """
    if tokens < 1 or seq_len < 2:
        raise UserError("too few tokens asked for", found=f"tokens = {tokens}, sequence length = {seq_len}")
    want = -(-tokens // seq_len)
    documents = load_text(
        path, text_field=text_field, whole=mode == "packed", seed=seed, max_bytes=max(8 << 20, 16 * tokens)
    )
    encode = _encoder(tokenizer)
    bos = _bos(tokenizer)
    body = seq_len - len(bos)
    if mode == "packed":
        eos = [] if getattr(tokenizer, "eos_token_id", None) is None else [int(tokenizer.eos_token_id)]
        stream = encode(documents[0])
        for document in documents[1:]:
            stream += eos + encode(document)
        total, blocks = len(stream), _cut(stream, body)
        short = f"{total} tokens = {len(blocks)} sequences of {seq_len}"
    elif mode == "document":
        encoded = [encode(d) for d in documents]
        total = sum(map(len, encoded))
        blocks = np.array([e[:body] for e in encoded if len(e) >= body], np.int64).reshape(-1, body)
        short = (
            f"{len(documents)} documents, {len(blocks)} of them with at least {seq_len} tokens "
            f"(the longest has {max(map(len, encoded)) + len(bos)})"
        )
    else:
        raise UserError("unknown calibration mode", found=repr(mode), fix="packed or document")
    if avoid and len(blocks):
        blocks = blocks[~_touches(blocks, avoid)]
        short += f", {len(blocks)} of them free of the text that must stay apart"
    if len(blocks) < want:
        raise UserError(
            f"the text {Path(path).name} is too short: {want} sequences of {seq_len} tokens are needed "
            f"({want * seq_len} tokens)",
            found=short,
            fix="give a longer text, or ask for fewer tokens or a shorter sequence length",
        )
    ids = blocks[spread(len(blocks), want, np.random.default_rng(seed))]
    ids = np.concatenate([np.tile(np.array(bos, np.int64), (want, 1)), ids], axis=1)  # (S, T)
    if vocab_size and int(ids.max()) >= vocab_size:
        raise UserError(
            "the tokenizer does not belong to this model",
            found=f"token id {int(ids.max())}, the model knows {vocab_size} tokens",
            fix="use the tokenizer files that came with the checkpoint",
        )
    settings = {"mode": mode, "seed": seed, "seq_len": seq_len, "bos": bool(bos), "text_tokens": total}
    return CalibrationSet.of(ids, Path(path).name, settings)


def shared_windows(a: np.ndarray, b: np.ndarray, window: int = _WINDOW) -> float:
    """Share of ``b``'s runs of ``window`` tokens that occur in ``a``; (S, T) arrays, any T >= 1."""
    window = min(window, a.shape[1], b.shape[1])
    return float(np.isin(_windows(b, window), _windows(a, window)).mean()) if a.size and b.size else 0.0


def check_disjoint(a: CalibrationSet, b: CalibrationSet, tolerance: float = 0.0) -> None:
    """Raises `UserError` when more than ``tolerance`` of ``b``'s 32-token runs occur in ``a``."""
    share = shared_windows(a.tokens, b.tokens)
    if share > tolerance:
        raise UserError(
            "calibration and evaluation text overlap, so the result would flatter itself",
            found=f"{share:.1%} of the 32-token runs of {b.source or 'the second set'} occur in "
            f"{a.source or 'the first set'}",
            fix="evaluate on another text, or let the second set avoid the first",
        )


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def _bos(tokenizer: Any) -> list[int]:
    """The BOS token where the tokenizer opens a text with it by itself (Llama, Gemma), else nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    first = list(tokenizer("a")["input_ids"])[:1]
    return [int(bos)] if bos is not None and first == [bos] else []


def _cut(stream: Sequence[int], body: int) -> np.ndarray:
    usable = len(stream) // body * body
    return np.array(stream[:usable], np.int64).reshape(-1, body)  # (blocks, body)


def spread(n: int, want: int, rng: np.random.Generator) -> np.ndarray:
    """``want`` <= ``n`` distinct positions of ``n``, ascending: one from each of ``want`` equal stretches."""
    edges = np.arange(want + 1) * n // max(want, 1)
    draw = rng.random(want)
    return edges[:-1] + (draw * np.diff(edges)).astype(np.int64)


def _windows(tokens: np.ndarray, window: int) -> np.ndarray:
    """Hashes of all runs of ``window`` tokens inside each row, flat uint64."""
    rng = np.random.default_rng(0x5EED)
    factors = rng.integers(1, 2**63, window, dtype=np.uint64) | np.uint64(1)
    ids = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    ids ^= ids >> np.uint64(29)
    count = tokens.shape[1] - window + 1
    out = np.zeros((len(tokens), count), np.uint64)
    for j in range(window):
        out += ids[:, j : j + count] * factors[j]
    return out.reshape(-1)


def _touches(blocks: np.ndarray, avoid: Sequence[CalibrationSet]) -> np.ndarray:
    """(blocks,) bool: shares a run with one of the sets."""
    hit = np.zeros(len(blocks), bool)
    for other in avoid:
        window = min(_WINDOW, blocks.shape[1], other.tokens.shape[1])
        own = _windows(blocks, window).reshape(len(blocks), -1)
        hit |= np.isin(own, _windows(other.tokens, window)).any(1)
    return hit

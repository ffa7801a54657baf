"""The front of a search that has not ended, from the candidates that it has stored so far. Rows in, a frozen view out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitatlas.app.views.words import count

__all__ = ["SearchFront", "build_search_front"]


@dataclass(frozen=True, slots=True)
class SearchFront:
    """What a search has found by now.

    Attributes:
        title, detail: in words.
        weights_bytes, kl: the front, cheapest first; bytes with the kept tensors, KL in nats per token.
        tokens: each point's KL was measured on. spent, best: forward-equivalent tokens by each candidate, and the lowest KL so far
            on a text of that length or a longer one.
    """

    title: str
    detail: str
    weights_bytes: tuple[int, ...]
    kl: tuple[float, ...]
    tokens: int
    spent: tuple[int, ...]
    best: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        return asdict(self)


def build_search_front(
    candidates: Sequence[Mapping[str, Any]], kept_bytes: int, name: str, state: str
) -> SearchFront | None:
    """The candidates scored on the longest text that no other one dominates in bytes and KL; None before the first.

    Args:
        candidates: rows of `tasks.search_candidates`.
        name: the search's; state: of its job, in words.
    """
    known = [c for c in candidates if c["kl"] is not None and c["kl"] == c["kl"]]
    if not known:
        return None
    longest = max(int(c["tokens"]) for c in known)
    judged = [c for c in known if int(c["tokens"]) == longest]
    front: list[tuple[int, float]] = []
    for size, kl in sorted((int(c["payload_bytes"]), float(c["kl"])) for c in judged):
        if not front or kl < front[-1][1]:
            front.append((size, kl))
    spent: list[int] = []
    best: list[float] = []
    for c in sorted(judged, key=lambda c: int(c["forward_equivalents"] or 0)):
        spent.append(int(c["forward_equivalents"] or 0))
        best.append(min(float(c["kl"]), best[-1] if best else float("inf")))
    total = max(int(c["forward_equivalents"] or 0) for c in known)
    return SearchFront(
        f"{name}, {state}: measured KL {front[-1][1]:.4g} nats per token so far",
        f"{count(len(known), 'candidate')} after {total:,} forward-equivalent tokens; the front is of the {len(judged)} read on {longest:,} tokens.",
        tuple(b + kept_bytes for b, _ in front), tuple(k for _, k in front), longest, tuple(spent), tuple(best),
    )  # fmt: skip

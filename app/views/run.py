"""What a measurement would cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.app.views.words import count, duration, short_bytes

__all__ = [
    "BITS",
    "GROUPS",
    "LOADING",
    "EstimateView",
    "RunRequest",
    "cost_table",
    "estimate_view",
    "total_seconds",
]

LOADING = "loading"  # the row of `tasks.estimate` that is no metric: what every job pays once
BITS = ["2", "3", "4", "5", "6", "8"]
GROUPS = ["32", "64", "128", "channel"]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the form says.

    ``calibration`` is a path, ``self``, ``datasets:NAME``, or "" for the model's own text; ``options`` is NAME=VALUE pairs
    between spaces, quoted where a value holds one.
    """

    metrics: tuple[str, ...]
    bits: tuple[str, ...]
    group: str
    symmetric: bool
    calibration: str
    tokens: int
    seq_len: int
    seed: int
    per_document: bool = False
    options: str = ""

    @property
    def text_mode(self) -> str:
        """``document``: every sequence begins with a document; ``packed``: one stream is cut."""
        return "document" if self.per_document else "packed"

    @property
    def pairs(self) -> tuple[str, ...]:
        """The options one by one.

        Raises:
            UserError: a quotation that does not end.
        """
        try:
            return tuple(shlex.split(self.options))
        except ValueError as e:
            raise UserError("the options cannot be read", found=f"{self.options!r}: {e}",
                            fix="draws=4 dtype=bfloat16") from None  # fmt: skip

    @property
    def _tail(self) -> str:
        return ("channel" if self.group == "channel" else f"g{self.group}") + (
            "-sym" if self.symmetric else ""
        )

    @property
    def formats(self) -> tuple[str, ...]:
        """Format names, few bits first."""
        return tuple(f"int{b}-{self._tail}" for b in BITS if b in self.bits)

    @property
    def pattern(self) -> str:
        """The same with braces, as on the command line."""
        bits = [b for b in BITS if b in self.bits]
        return f"int{{{','.join(bits)}}}-{self._tail}" if len(bits) > 1 else ",".join(self.formats)

    def check(self) -> None:
        """Raises `UserError` when something is missing."""
        if not self.metrics:
            raise UserError("no metric is chosen", fix="choose at least one above")
        if not self.bits:
            raise UserError("no bit width is chosen", fix="choose at least one above")
        if self.seq_len > self.tokens:
            raise UserError("a sequence is longer than all tokens together", found=f"{self.seq_len} of {self.tokens}",
                            fix="more tokens, or shorter sequences")  # fmt: skip
        self.pairs  # noqa: B018 - unreadable ones say so


@dataclass(frozen=True, slots=True)
class EstimateView:
    """The page's title and what it rests on."""

    title: str
    subtitle: str


def total_seconds(estimate: Sequence[Mapping[str, Any]]) -> float:
    """All metrics together."""
    return sum(float(row["seconds"]) for row in estimate)


def estimate_view(model: str, estimate: Sequence[Mapping[str, Any]]) -> EstimateView:
    """``Measuring 2 metrics on demo takes about 40 s``."""
    if not estimate:
        return EstimateView(f"What shall be measured on {model}?", "Choose metrics and formats; the cost is estimated first.")  # fmt: skip
    seconds = total_seconds(estimate)
    names = [str(r["metric"]) for r in estimate if r["metric"] != LOADING]
    what = names[0] if len(names) == 1 else count(len(names), "metric")
    tokens = sum(int(r["forward_tokens"]) + int(r["backward_tokens"]) for r in estimate)
    facts = [f"{count(sum(int(r['steps']) for r in estimate), 'step')}, each safe once it is done"]
    if tokens:
        facts.append(f"{tokens:,} tokens through the model")
    facts.append(f"{short_bytes(sum(int(r['bytes_read']) for r in estimate))} read")
    return EstimateView(
        f"Measuring {what} on {model} takes about {duration(seconds)}",
        " · ".join(facts),
    )


def cost_table(estimate: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """One row a metric."""
    return {
        "metric": [r["metric"] for r in estimate],
        "about": [duration(float(r["seconds"])) for r in estimate],
        "steps": [int(r["steps"]) for r in estimate],
        "forward": [int(r["forward_tokens"]) for r in estimate],
        "backward": [int(r["backward_tokens"]) for r in estimate],
        "read": [short_bytes(int(r["bytes_read"])) for r in estimate],
    }

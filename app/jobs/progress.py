"""How far, how fast, how long still."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Progress"]

_RECENT = 50


@dataclass
class Progress:
    """What a job shows while it runs; `to_dict` is the event that clients read.

    Attributes:
        total, done: steps.
        computed: steps computed by this process; the others were there already and say nothing about speed.
        phase: ``starting``, ``running``, ``finishing``.
        note: a few words.
        fraction: of the step in hand, 0 when unknown.
    """

    total: int = 0
    done: int = 0
    phase: str = "starting"
    note: str = ""
    fraction: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    computed: int = 0

    def step_done(self, seconds: float) -> None:
        """One step computed in ``seconds``. The first one also loads the model, so a second one replaces it."""
        self.done += 1
        self.computed += 1
        self.fraction = 0.0
        if self.computed == 2:
            self.seconds.clear()
        self.seconds.append(seconds)

    def rate(self) -> float | None:
        """Steps per second over the recent ones; None before the first."""
        spent = sum(self.seconds)
        return len(self.seconds) / spent if spent > 0 else None

    def eta(self) -> tuple[float, float] | None:
        """Seconds left as a range (about 90 %): from the spread of the recent steps; None while unknown."""
        left = self.total - self.done - self.fraction
        if not self.seconds or self.total == 0:
            return None
        n = len(self.seconds)
        mean = sum(self.seconds) / n
        # One sample says nothing about the spread: assume as much spread as mean.
        spread = mean if n < 2 else math.sqrt(sum((s - mean) ** 2 for s in self.seconds) / (n - 1))
        half = 1.645 * spread * math.sqrt(max(left, 0) + max(left, 0) ** 2 / n)
        return max(0.0, left * mean - half), max(0.0, left * mean + half)

    def to_dict(self) -> dict[str, Any]:
        """The event: phase, done, total, fraction, rate (steps/s), eta (low, high; s), note, at (Unix s)."""
        eta = self.eta()
        return {
            "phase": self.phase, "done": self.done, "total": self.total, "fraction": self.fraction,
            "rate": self.rate(), "eta": list(eta) if eta else None, "note": self.note, "at": time.time(),
        }  # fmt: skip

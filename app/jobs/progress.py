"""How far, how fast, how long still."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Progress"]

_RECENT = 50
_UNSEEN = 2.5  # a group of which no step has run may take so many times what is expected, or so much less
_TRUSTED = (
    1.0  # squared seconds of spread between estimates from which on the steps say more than the estimates
)
_STEEPEST = 20.0
_LEAST_WEIGHT = 1e-6


@dataclass
class Progress:
    """What a job shows while it runs; `to_dict` is the event that clients read.

    Attributes:
        total, done: steps.
        computed: steps computed by this process; the others were there already and say nothing about speed.
        phase: ``starting``, ``running``, ``finishing``.
        note: a few words.
        fraction: of the step in hand, 0 when unknown.
        seconds: of the recent steps.
    """

    total: int = 0
    done: int = 0
    phase: str = "starting"
    note: str = ""
    fraction: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    computed: int = 0
    _weights: list[float] = field(default_factory=list)
    _groups: list[str] = field(default_factory=list)
    _seen: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)

    def begin(self, steps: Sequence[str], weights: Sequence[float] = ()) -> None:
        """The plan: keys in order, and the seconds that each is expected to take; () = all the same.

        Steps that say ``metric/step`` are timed metric by metric: estimates are off by a factor of their own for each.
        """
        self.total = len(steps)
        fits = len(weights) == len(steps)
        self._weights = [
            w if math.isfinite(w) and w > _LEAST_WEIGHT else _LEAST_WEIGHT for w in map(float, weights)
        ] if fits else []  # fmt: skip
        self._groups = [key.partition("/")[0] for key in steps] if fits else []

    def step_done(self, seconds: float) -> None:
        """One step computed in ``seconds``. The first one also loads the model, so a second one replaces it."""
        if self.computed == 1:
            self.seconds.clear()
            self._seen.clear()
        self._seen.setdefault(self._group(self.done), deque(maxlen=_RECENT)).append(
            (self._weight(self.done), seconds)
        )
        self.done += 1
        self.computed += 1
        self.fraction = 0.0
        self.seconds.append(seconds)

    def rate(self) -> float | None:
        """Steps per second over the recent ones; None before the first."""
        spent = sum(self.seconds)
        return len(self.seconds) / spent if spent > 0 else None

    def eta(self) -> tuple[float, float] | None:
        """Seconds left as a range; None while unknown.

        Steps left of what has run already: by its recent steps and their spread, about 90 %. Of what has not: the estimates
        as far as they held so far, within a factor.
        """
        if not self._seen or self.total == 0:
            return None
        left: defaultdict[str, float] = defaultdict(float)
        steps: defaultdict[str, float] = defaultdict(float)
        for i in range(self.done, self.total):
            share = 1.0 - self.fraction if i == self.done else 1.0
            left[self._group(i)] += share * self._weight(i)
            steps[self._group(i)] += share
        middle = spread_sq = unseen = 0.0
        beside, per_second = self._line()
        for group, weight in left.items():
            found = self._seen.get(group)
            if not found:
                unseen += steps[group] * beside + weight * per_second
                continue
            rate, spread = _speed(found)
            each = weight / steps[group]
            middle += weight * rate
            spread_sq += (1.645 * spread * each) ** 2 * (steps[group] + steps[group] ** 2 / len(found))
        half = math.sqrt(spread_sq)
        return max(0.0, middle - half) + unseen / _UNSEEN, middle + half + unseen * _UNSEEN

    def _line(self) -> tuple[float, float]:
        """What a step costs beside its work, and seconds per estimated second: a line through the groups that have run.

        While these are alike they say nothing about the second; then it stays near 1, as if the estimates were right.
        """
        points = []
        for found in self._seen.values():
            n = len(found)
            points.append((n, sum(w for w, _ in found) / n, sum(s for _, s in found) / n))
        total = sum(n for n, _, _ in points)
        w0, s0 = sum(n * w for n, w, _ in points) / total, sum(n * s for n, _, s in points) / total
        along = sum(n * (w - w0) ** 2 for n, w, _ in points)
        slope = (sum(n * (w - w0) * (s - s0) for n, w, s in points) + _TRUSTED) / (along + _TRUSTED)
        slope = min(max(slope, 1 / _STEEPEST), _STEEPEST)
        return max(0.0, s0 - slope * w0), slope

    def _weight(self, step: int) -> float:
        return self._weights[step] if step < len(self._weights) else 1.0

    def _group(self, step: int) -> str:
        return self._groups[step] if step < len(self._groups) else ""

    def to_dict(self) -> dict[str, Any]:
        """The event: phase, done, total, fraction, rate (steps/s), eta (low, high; s), note, at (Unix s)."""
        eta = self.eta()
        return {
            "phase": self.phase, "done": self.done, "total": self.total, "fraction": self.fraction,
            "rate": self.rate(), "eta": list(eta) if eta else None, "note": self.note, "at": time.time(),
        }  # fmt: skip


def _speed(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds per unit of weight of some steps (weight, seconds), and the standard deviation of one step's."""
    rate = sum(s for _, s in found) / sum(w for w, _ in found)
    if len(found) < 2:
        return rate, rate  # one sample says nothing about the spread: assume as much spread as mean
    return rate, math.sqrt(sum((s / w - rate) ** 2 for w, s in found) / (len(found) - 1))

"""The Fit page's controls, without the page: bounds that suit the model, the budget they mean, their command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from bitatlas.analysis.schema import FORMATS, SOLVE_WITH, Budget, ModelIndex, UserError, parse_format
from bitatlas.app.budgets import resolve_budget
from bitatlas.app.expert_rules import ExpertRules
from bitatlas.app.kv_plan import decode_kv, kv_pairs

__all__ = [
    "PIN_FORMATS", "Asked", "Bounds", "bounds", "decode_question", "encode_question", "pin_rules", "preferred", "twin", "usual",
]  # fmt: skip

PIN_FORMATS: tuple[str, ...] = tuple(
    n for n, f in FORMATS.items() if not n.endswith("-sym") or f.kind == "float"
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A slider that suits the model, in ``word`` (MiB or GiB; ``scale`` bytes each)."""

    low: float
    high: float
    start: float
    step: float
    reserve: float
    context: int
    scale: int
    word: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What the controls say. Bytes throughout; ``kv``: bits of K and V by layer (`app.kv_plan`).

    ``target``: the engine to solve for, "" for none; ``groups``, ``group_limits``: as in `app.expert_rules`.
    """

    metric: str
    formats: tuple[str, ...]
    total_bytes: int
    context: int
    batch: int
    kv: str
    reserve_bytes: int
    target: str = ""
    groups: str = ""
    group_limits: tuple[str, ...] = ()

    @property
    def rules(self) -> ExpertRules:
        """The limits on groups."""
        return ExpertRules(self.groups if self.group_limits else "", self.group_limits)

    def budget(self, index: ModelIndex, smallest: int = 0) -> Budget:
        """The weights' share of the memory; ``smallest``: bytes that they take at least, for the error.

        Raises:
            UserError: nothing is left for them.
        """
        return resolve_budget(
            index, fit=self.total_bytes, context=self.context, batch=self.batch,
            reserve=self.reserve_bytes, kv=kv_pairs(index, self.kv), smallest=smallest,
        )  # fmt: skip


def encode_question(asked: Asked) -> str:
    """For a link: JSON of the fields in order."""
    return json.dumps(astuple(asked), separators=(",", ":"))


def decode_question(text: str) -> Asked:
    """Inverse of `encode_question`; strict, because links come from anywhere.

    Raises:
        UserError: not what `encode_question` writes.
    """
    try:
        metric, formats, total, context, batch, kv, reserve, *more = json.loads(text)
        target, groups, limits = more or ("", "", ())
        words = (metric, kv, target, groups, *limits)
        ok = all(isinstance(w, str) for w in words) and all(parse_format(f) for f in formats)
        decode_kv(kv.rpartition("=")[2], ())  # the layers are the model's business
        if ok and all(type(n) is int and 0 <= n < 1 << 50 for n in (total, context, batch, reserve)):
            return Asked(
                metric, tuple(formats), total, context, batch, kv, reserve, target, groups, tuple(limits)
            )
    except (ValueError, TypeError, AttributeError, UserError):
        pass
    raise UserError(
        "the question in this link cannot be read", found=text[:80], fix="ask again on the Fit page"
    )


def bounds(index: ModelIndex) -> Bounds:
    """From about two bits a weight to the model as it is, with room for a cache."""
    full = index.params * 2 + index.kept_bytes
    context = 2048
    kv = index.kv.cache_bytes(context, 1) if index.kv else 0
    scale, word = ((1 << 30), "GiB") if full >= 2 << 30 else ((1 << 20), "MiB")
    reserve = full * 0.02
    step = _nice(full / scale / 200)
    low = _down(index.params * 0.2 / scale, step)
    high = _down((full + kv + reserve) * 1.1 / scale, step) + step
    start = _down((index.params * 4 / 8 + index.kept_bytes + kv + reserve) / scale, step) + step
    return Bounds(
        max(step, low),
        high,
        start,
        step,
        _down(reserve / scale, step),
        context if index.kv else 0,
        scale,
        word,
    )


def _nice(value: float) -> float:
    """The largest of 1, 2, 5 x 10^k below ``value``."""
    power = 10.0 ** int(f"{value:e}".split("e")[1])
    return next(round(m * power, 10) for m in (5, 2, 1) if m * power <= value)


def _down(value: float, step: float) -> float:
    return round(int(value / step) * step, 10)


def preferred(metrics: Sequence[str]) -> int:
    """Index of the metric to start with: the most trustworthy one that was measured."""
    for name in SOLVE_WITH:
        if name in metrics:
            return list(metrics).index(name)
    return 0


def usual(measured: Sequence[str]) -> list[str]:
    """Start with one grouping: the asymmetric groups of 64 if measured, else everything integer."""
    same = [f for f in measured if re.fullmatch(r"int\d-g64", f)]
    return same or [f for f in measured if parse_format(f).kind == "int"] or list(measured)


def twin(path: str, asked: Asked, pins: Mapping[str, str]) -> str:
    """The same question for the shell."""
    parts = ["bitatlas", "solve", path, "--metric", asked.metric, "--fit", str(asked.total_bytes)]
    if asked.context:
        parts += [
            "--context",
            str(asked.context),
            "--batch",
            str(asked.batch),
            "--kv-plan",
            asked.kv,
        ]
    parts += [
        "--reserve",
        str(asked.reserve_bytes),
        "--formats",
        ",".join(asked.formats),
        "--solver",
        "hull",
    ]
    parts += ["--target", asked.target] if asked.target else []
    parts += ["--expert-groups", asked.groups] if asked.rules else []
    for limit in asked.rules.limits:
        parts += ["--group-limit", limit]
    for rule in pin_rules(pins):
        parts += ["--pin", rule]
    return shlex.join([*parts, "-o", "allocation.json"])


def pin_rules(pins: Mapping[str, str]) -> list[str]:
    """One anchored rule per format, so that a lasso of a hundred experts stays one flag."""
    by_format: dict[str, list[str]] = {}
    for unit, name in pins.items():
        by_format.setdefault(name, []).append(re.escape(unit))
    return [f"^({'|'.join(units)})$={name}" for name, units in by_format.items()]

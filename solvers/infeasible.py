"""What to tell a user whose budget cannot be met."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitatlas.analysis.schema import FORMATS, UserError
from bitatlas.solvers.classes import tie_labels

if TYPE_CHECKING:
    from bitatlas.solvers.problem import Problem, SideBudget

__all__ = ["check_feasible", "format_that_fits", "in_words", "least_of", "megabytes"]

_NEVER = 1 << 46  # bytes; far beyond every model, and units times this is an int64


def megabytes(nbytes: int) -> str:
    """``41.2 MB``; ``9.0 kB`` below and ``15.24 GB`` above (powers of ten)."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def least_of(problem: Problem, side: SideBudget) -> float:
    """The smallest possible sum of a further limit's costs, pins and ties kept, nothing else asked."""
    c = problem.classes
    cost = np.zeros(c.bytes.shape)
    np.add.at(cost, c.of_unit, side.cost)
    return float(np.where(c.allowed, cost, np.inf).min(axis=1).sum())


def in_words(side: SideBudget, value: float) -> str:
    """A value of a limit as the user writes it, rounded up to four digits: ``--bops 0.613``."""
    shown = value / side.unit
    step = 10.0 ** (np.floor(np.log10(shown)) - 3) if shown > 0 else 1.0
    text = f"{np.ceil(shown / step - 1e-9) * step:.4g}" if side.unit != 1 else str(int(np.ceil(shown - 1e-6)))
    name = side.option or side.name
    return f"{name}{'=' if side.option and ' ' in name else ' '}{text}"


def _check_sides(problem: Problem) -> None:
    """Return if every further limit could be met, were it the only one.

    Raises:
        UserError: one cannot; names the smallest possible value of each that cannot.
    """
    short = [(s, least) for s in problem.side if (least := least_of(problem, s)) > s.limit * (1 + 1e-9)]
    if short:
        raise UserError(
            f"the limit on {' and on '.join(s.name for s, _ in short)} cannot be met",
            found=f"{', '.join(in_words(s, s.limit) for s, _ in short)}; with {', '.join(problem.formats)} no allocation has less than "
            + ", ".join(in_words(s, least) for s, least in short),
            fix=f"at least {' '.join(in_words(s, least) for s, least in short)}, or smaller formats",
        )


def check_feasible(problem: Problem) -> None:
    """Return if some allocation fits the bytes, and if each further limit could be met alone.

    Raises:
        UserError: none does; names the smallest possible payload, and what would have to be allowed: dropping
            the pins if they are the reason, else the format with the most bits that would fit.
    """
    smallest = problem.min_bytes
    if smallest <= problem.limit_bytes:
        _check_sides(problem)
        return
    found = (
        f"{megabytes(max(problem.limit_bytes, 0))} for the quantised units, the smallest possible with "
        f"{', '.join(problem.formats)} is {megabytes(smallest)} ({smallest} bytes)"
    )
    if problem.kept_bytes:
        found += f"; {megabytes(problem.kept_bytes)} more stay unquantised"
    if problem.engine_pins:
        rows = np.isin(problem.units, list(problem.engine_pins))
        kept = int(np.where(problem.allowed, problem.bytes, 0).max(axis=1)[rows].sum())
        found += f"; {problem.engine} has none of these formats for {rows.sum()} units: {megabytes(kept)} at 16 bits"
    least = smallest + problem.kept_bytes
    advice = [f"a budget of at least {megabytes(least)} ({least} bytes in all)"]
    pinned = [u for u in problem.pins if u not in problem.engine_pins]
    free = _smallest_without_pins(problem, pinned)
    if pinned and free <= problem.limit_bytes:
        raise UserError(
            f"the pins make the budget impossible: without the {len(pinned)} pinned units it fits",
            found=f"{found}; without the pins {megabytes(free)}",
            fix=f"drop or lower some pins, or {advice[0]}",
        )
    change = format_that_fits(problem)
    if change is not None and (change[2] or not problem.engine):
        name, nbytes, fits = change
        advice.insert(0, f"allow {name}: {megabytes(nbytes)}" + ("" if fits else " (the smallest there is)"))
    where = f" in {problem.engine}" if problem.engine else ""
    raise UserError(f"the budget is too small for this model{where}", found=found, fix=" or ".join(advice))


def _smallest_without_pins(problem: Problem, pins: list[str]) -> int:
    """Bytes of the smallest allocation if these pins were dropped, ties kept.

    Formats that only pinned units may take (a pin outside the allowed list) still count only for them.
    """
    position = {key: i for i, key in enumerate(problem.units)}
    labels = tie_labels(problem.units, problem.ties)
    pinned = np.isin(labels, [labels[position[u]] for u in pins])
    # What the free units may take is what a pinned one could have had.
    general = (
        np.any(problem.allowed[~pinned], axis=0) if (~pinned).any() else np.ones(len(problem.formats), bool)
    )
    allowed = np.where(pinned[:, None], general[None, :] | problem.allowed, problem.allowed)
    if problem.more_formats is not None:  # unpinned, a unit gets what the engine takes
        taken = np.column_stack([problem.more_formats(name)[1] for name in problem.formats])
        allowed &= taken | ~pinned[:, None]
    return _smallest(problem.bytes, allowed, labels)


def _smallest(bytes_table: np.ndarray, allowed: np.ndarray, labels: np.ndarray) -> int:
    shape = (int(labels.max()) + 1, bytes_table.shape[1])
    size, joint = np.zeros(shape, np.int64), np.ones(shape, bool)
    np.add.at(size, labels, bytes_table)
    np.logical_and.at(joint, labels, allowed)
    return int(np.where(joint, size, _NEVER).min(axis=1).sum())


def format_that_fits(problem: Problem) -> tuple[str, int, bool] | None:
    """The format whose addition is the smallest change that fits: (name, smallest payload, does it fit).

    Among those that make the budget possible the one with the most bytes; if none does, the smallest one.
    """
    if problem.shapes is None:
        return None
    shapes, which = np.unique(problem.shapes, axis=0, return_inverse=True)
    which = which.reshape(-1)
    labels = tie_labels(problem.units, problem.ties)
    position = {key: i for i, key in enumerate(problem.units)}
    pinned = [labels[position[u]] for u in problem.pins if u not in problem.engine_pins]
    free = ~np.isin(labels, pinned)
    best: tuple[str, int, bool] | None = None
    for name, fmt in FORMATS.items():
        if name in problem.formats or fmt.kind != "int":
            continue
        if problem.more_formats is not None:
            column, taken = problem.more_formats(name)
        else:
            column = np.array([fmt.payload_bytes(int(r), int(c)) for r, c in shapes], np.int64)[which]  # (U,)
            taken = np.ones(len(column), bool)
        table = np.column_stack([problem.bytes, column])
        total = _smallest(table, np.column_stack([problem.allowed, free & taken]), labels)
        fits = total <= problem.limit_bytes
        if best is None or (fits, total if fits else -total) > (best[2], best[1] if best[2] else -best[1]):
            best = (name, total, fits)
    return best if best is not None and best[1] < problem.min_bytes else None

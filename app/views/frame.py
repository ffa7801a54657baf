"""Words of the frame's chips."""

from __future__ import annotations

from bitatlas.app.views.words import count, short_bytes

__all__ = ["budget_chip", "selection_chip"]


def budget_chip(budget: tuple[int, int] | None) -> str:
    """``22.0 of 24.0 GiB`` (used, limit), or that there is no budget yet."""
    if budget is None:
        return ":gray-badge[:material/memory: no budget yet]"
    used, limit = budget
    a, b = short_bytes(used), short_bytes(limit)
    if a.split()[1] == b.split()[1]:
        a = a.split()[0]
    colour = "red" if used > limit else "primary"
    return f":{colour}-badge[:material/memory: {a} of {b}]"


def selection_chip(n: int) -> str:
    """``37 units``."""
    if not n:
        return ":gray-badge[:material/select: nothing selected]"
    return f":primary-badge[:material/select: {count(n, 'unit')}]"

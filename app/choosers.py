"""The README's chooser tables, written from the code's own tables: ``python -m bitatlas.app.choosers``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bitatlas.app.tasks.listing import metrics, solvers, targets

__all__ = ["choosers"]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def choosers() -> str:
    """Markdown: metrics by what they need, solvers by what they promise, targets."""
    measured = [
        (f"`{m['name']}`", m["title"], m["unit"], m["needs"], "yes" if m["additive"] else "no", m["source"])
        for m in metrics()
    ]
    solved = [
        (f"`{s['name']}`", s["title"], s["command"], "yes" if s["exact"] else "no", "yes" if s["front"] else "no",
         "yes" if s["needs_damage"] else "no", s["source"])
        for s in solvers()
    ]  # fmt: skip
    shipped = [(f"`{t['name']}`", t["title"]) for t in targets()]
    return (
        "## Metrics\n" + _table(("metric", "what", "unit", "needs", "adds up", "source"), measured)
        + "\n## Solvers\n" + _table(("solver", "what", "command", "exact", "whole front", "needs damage", "source"), solved)
        + "\n## Targets\n" + _table(("target", "engine"), shipped)
    )  # fmt: skip


def main() -> None:
    """Write the tables into the README of the checkout that this file belongs to."""
    readme = Path(__file__).resolve().parent.parent / "README.md"
    text = readme.read_text()
    pattern = r"(<!-- generated: choosers -->\n).*?(<!-- /generated -->)"
    readme.write_text(re.sub(pattern, lambda m: m[1] + choosers() + m[2], text, flags=re.S))


if __name__ == "__main__":
    main()

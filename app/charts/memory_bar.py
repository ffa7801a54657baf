"""The memory bar: what fills the memory asked for, as markup.

It follows every step of a slider: boxes are laid out once, a chart would be mounted anew and drawn twice each time.
"""

from __future__ import annotations

from html import escape

from bitatlas.app.sizes import format_bytes
from bitatlas.app.theme import Palette, bit_colour
from bitatlas.app.views.fit import FitView, MemorySegment

__all__ = ["memory_bar"]

_LABEL_FROM = 0.08
"""Share of the bar that a number needs; the legend and the tooltip have every one."""
_BAR = "display:flex;height:3.4rem;border-radius:.3rem;overflow:hidden;width:100%"
_BOX = "display:flex;align-items:center;justify-content:center;overflow:hidden;white-space:nowrap;font-size:.8rem"
_LEGEND = "display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;font-size:.8rem;margin-bottom:.4rem"
_MARK = "display:inline-block;width:.75rem;height:.75rem;border-radius:.15rem;margin-right:.35rem;vertical-align:-.05rem"


def memory_bar(view: FitView, p: Palette) -> str:
    """HTML of one bar that adds up to ``view.total_bytes``, its legend above, its scale below; all text escaped."""
    boxes, legend = [], []
    for s in view.segments:
        share, colour, label = s.nbytes / view.total_bytes, _colour(s, p), escape(s.label)
        size = format_bytes(s.nbytes)
        inside = size if share > _LABEL_FROM else ""
        boxes.append(
            f'<div title="{label}: {s.nbytes:,} bytes ({share:.1%})" style="{_BOX};width:{100 * share:.3f}%;background:{colour};'
            f'color:{p.ink if s.kind in ("reserve", "free") else "#ffffff"}">{inside}</div>'
        )
        legend.append(f'<span><span style="{_MARK};background:{colour}"></span>{label} {size}</span>')
    ends = f"<span>0</span><span>{format_bytes(view.total_bytes)}</span>"
    return (
        f'<div role="img" aria-label="{escape(view.title)}" style="color:{p.ink}"><div style="{_LEGEND}">{"".join(legend)}</div>'
        f'<div style="{_BAR}">{"".join(boxes)}</div>'
        f'<div style="display:flex;justify-content:space-between;font-size:.8rem;color:{p.muted}">{ends}</div></div>'
    )


def _colour(s: MemorySegment, p: Palette) -> str:
    named = {"kept": p.muted, "kv": "#c77d3a", "reserve": p.grid, "free": p.below_floor}
    return bit_colour(s.bits) if s.kind == "weights" else named[s.kind]

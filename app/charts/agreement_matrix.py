"""The matrix of rank correlations between metrics, as markup: it changes with every step of the format slider."""

from __future__ import annotations

from html import escape

import numpy as np

from bitatlas.app.theme import Palette

__all__ = ["agreement_matrix"]

_NUMBERS_UP_TO = 16  # metrics; smaller cells hold no number
_TALL, _CELL = 420, (12, 36)  # pixels of the whole and of a row
_NAME = "font-size:.78rem;white-space:nowrap"
_MID = "display:flex;align-items:center;justify-content:center;font-size:.72rem;overflow:hidden"


def agreement_matrix(names: tuple[str, ...], rho: np.ndarray, p: Palette) -> str:
    """HTML of (N, N) correlations: blue agrees, red is opposed, grey where nothing can be said; names escaped."""
    n = len(names)
    height = int(np.clip(_TALL / max(n, 1), *_CELL))
    label = [escape(name) for name in names]
    out = []
    for i, row in enumerate(rho.tolist()):
        out.append(
            f'<div style="{_NAME};text-align:right;padding-right:.5rem;line-height:{height}px">{label[i]}</div>'
        )
        out += [_cell(value, f"{label[i]} and {label[j]}", n, height, p) for j, value in enumerate(row)]
    turned = f"{_NAME};writing-mode:vertical-rl;transform:rotate(180deg);text-align:right;padding-bottom:.4rem;justify-self:center"
    out += ["<div></div>", *(f'<div style="{turned}">{name}</div>' for name in label)]
    ramp = ",".join(f"{colour} {100 * at:.0f}%" for at, colour in _scale(p))
    legend = (
        f'<div style="display:flex;align-items:center;gap:.5rem;font-size:.78rem;color:{p.muted};margin-bottom:.5rem">rank correlation '
        f'-1<span style="flex:0 0 9rem;height:.6rem;border-radius:.2rem;background:linear-gradient(90deg,{ramp})"></span>1</div>'
    )
    grid = f"display:grid;grid-template-columns:max-content repeat({n},minmax(0,1fr));gap:1px"
    return f'<div role="img" aria-label="Rank correlation of every two metrics" style="color:{p.ink}">{legend}<div style="{grid}">{"".join(out)}</div></div>'


def _scale(p: Palette) -> list[tuple[float, str]]:
    """From -1 (at 0) to 1 (at 1)."""
    return [(1 - at, colour) for at, colour in reversed(p.diverging)]


def _cell(value: float, pair: str, n: int, height: int, p: Palette) -> str:
    known = bool(np.isfinite(value))
    words = f"{value:.2f}" if known else "unknown"
    colour = _colour(value, p) if known else p.unknown
    ink = p.paper if known and abs(value) > 0.6 else p.ink
    text = words if known and n <= _NUMBERS_UP_TO else ""
    return f'<div title="{pair}: {words}" style="{_MID};height:{height}px;background:{colour};color:{ink}">{text}</div>'


def _colour(value: float, p: Palette) -> str:
    """Between the two nearest colours of the scale."""
    at, stops = (min(max(value, -1.0), 1.0) + 1) / 2, _scale(p)
    channels = [
        np.interp(at, [s for s, _ in stops], [int(c[i : i + 2], 16) for _, c in stops]) for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{round(float(c)):02x}" for c in channels)

"""The curves of the searches on SmolLM2, drawn: held-out KL against what was spent, `docs/pictures/search_curve.png`.

    python benchmarks/draw_search.py

Reads benchmarks/results/search_smollm2.jsonl (made by search_smollm2.py) and needs Chromium for the picture. A search that was
started twice is drawn from its longer run.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"path": "path descent (its measuring included)", "evopress": "EvoPress, random start", "refine": "verified refinement"}  # fmt: skip
COLOURS = {"path": "#0f766e", "evopress": "#c2410c", "refine": "#64748b"}


def runs(rows: list[dict[str, Any]]) -> dict[tuple[str, float, int], list[dict[str, Any]]]:
    """(search, bits, seed) -> its steps in order, of the longest run; a step 0 starts a new one."""
    out: dict[tuple[str, float, int], list[list[dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        if "search" not in row:
            continue  # the verification of an end
        key = (row["search"], row["bits"], row["seed"])
        if row["step"] == 0 or not out[key]:
            out[key].append([])
        out[key][-1].append(row)
    return {key: max(found, key=len) for key, found in out.items()}


def curve(rows: list[dict[str, Any]]) -> go.Figure:
    """Held-out KL with its standard error over forward-equivalent tokens, logarithmic."""
    figure, budgets = go.Figure(), sorted({bits for _, bits, _ in runs(rows)})
    for (search, bits, seed), steps in runs(rows).items():
        figure.add_scatter(
            x=[s["forward_equivalents"] for s in steps], y=[s["kl_held_out"] for s in steps], mode="lines+markers",
            error_y={"type": "data", "array": [s["kl_held_out_stderr"] for s in steps], "thickness": 0.5, "width": 0},
            name=f"{TITLES.get(search, search)}, {bits:g} bits, seed {seed}", marker={"size": 5},
            line={"color": COLOURS.get(search, "#334155"), "dash": ("solid", "dot", "dash", "dashdot", "longdash")[budgets.index(bits) % 5]},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=900, height=480, margin={"l": 70, "r": 20, "t": 70, "b": 60},
        xaxis={"type": "log", "title": "forward-equivalent tokens spent", "tickvals": [s * 10**p for p in (4, 5, 6, 7) for s in (1, 3)]},
        yaxis={"title": "KL on held-out text, nats per token"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    return figure


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "benchmarks" / "results" / "search_smollm2.jsonl"))
    parser.add_argument("--out", default=str(ROOT / "docs" / "pictures" / "search_curve.png"))
    args = parser.parse_args()
    figure = curve([json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()])
    from playwright.sync_api import sync_playwright

    chromium = runpy.run_path(str(ROOT / "tests" / "browser" / "ensure_chromium.py"))["find"]()
    if chromium is None:
        sys.exit("no Chromium on this machine; see tests/browser/ensure_chromium.py")
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 480}, device_scale_factor=1.5)
        page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
        page.wait_for_selector(".main-svg")
        page.locator(".plot-container").screenshot(path=args.out)
        browser.close()


if __name__ == "__main__":
    main()
